"""Images, compose file, units: right syntax, nothing named that is not there, real commands, few rights."""

from __future__ import annotations

import configparser
import fnmatch
import json
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from tests.commandline import check_line

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
INSTRUCTIONS: Final = frozenset(
    {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "STOPSIGNAL"}
    | {"USER", "VOLUME", "WORKDIR"}
)
UNITS = ("weft-coordinator.service", "weft-worker@.service")
CREDENTIALS: Final = re.compile(r"WEFT1\.[A-Z2-7]{8}", re.IGNORECASE)


@dataclass
class Stage:
    """One stage of the Dockerfile."""

    name: str
    parent: str
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def last(self, instruction: str) -> str | None:
        """The arguments of the last such instruction, or None."""
        found = [arguments for name, arguments in self.instructions if name == instruction]
        return found[-1] if found else None


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, lines that go on joined, comments left out."""
    lines = [
        line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name, arguments) for name, arguments in pairs]


def stages() -> dict[str, Stage]:
    """The stages by name."""
    found: dict[str, Stage] = {}
    for name, arguments in instructions():
        if name == "FROM":
            parent, keyword, stage = arguments.split()
            assert keyword == "AS"
            found[stage] = Stage(stage, parent)
        elif found:
            found[[*found][-1]].instructions.append((name, arguments))
    return found


def inherited(stage: Stage, instruction: str) -> str:
    """The instruction in force in a stage: its own, or that of the stage that it is built on."""
    own = stage.last(instruction)
    if own is None:
        return inherited(stages()[stage.parent], instruction)
    return own


def test_dockerfile_has_only_known_instructions_and_begins_with_from() -> None:
    names = [name for name, _ in instructions()]
    assert set(names) <= INSTRUCTIONS
    assert next(name for name in names if name != "ARG") == "FROM"


def test_stages_build_on_stages_or_on_an_official_image() -> None:
    known = stages()
    assert {"coordinator", "worker"} <= known.keys()
    for stage in known.values():
        assert stage.parent in known or stage.parent == "python:${PYTHON_VERSION}-slim"


def test_copied_sources_exist_and_are_sent_to_the_builder() -> None:
    copies = [arguments.split() for name, arguments in instructions() if name == "COPY"]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    sent = {line.removeprefix("!") for line in ignored if line.startswith("!")}
    sources = [word for words in copies if not words[0].startswith("--from=") for word in words[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert source in sent, f"Dockerfile.dockerignore keeps {source} away"
    for words in copies:
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages()


def test_everything_that_the_project_is_built_from_is_copied() -> None:
    copied = {word for name, arguments in instructions() if name == "COPY" for word in arguments.split()}
    folders = re.findall(r'"weft\.\w+": "(\w+)', (ROOT / "setup.py").read_text())
    assert folders
    assert set(folders) <= copied
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= copied


def test_torch_of_the_lock_is_found_by_the_line_that_installs_it() -> None:
    pinned = [
        line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.startswith("torch==")
    ]
    assert len(pinned) == 1


@pytest.mark.parametrize("target", ["coordinator", "worker", "flower"])
def test_an_image_runs_as_a_user_without_rights(target: str) -> None:
    assert inherited(stages()[target], "USER") == "weft"


@pytest.mark.parametrize("target", ["coordinator", "worker"])
def test_an_image_runs_a_real_command(target: str) -> None:
    stage = stages()[target]
    command = [*json.loads(inherited(stage, "ENTRYPOINT")), *json.loads(inherited(stage, "CMD"))]
    assert command[0] == "weft"
    check_line(command[1:])


def test_coordinator_image_is_asked_for_its_health_where_it_answers() -> None:
    check = stages()["coordinator"].last("HEALTHCHECK")
    assert check is not None
    program = json.loads(check.partition("CMD ")[2])[-1]
    compile(program, "healthcheck", "exec")
    assert "127.0.0.1:7444/healthz" in program


def test_compose_starts_real_commands_with_all_that_they_name() -> None:
    compose = _compose()
    for name, service in compose["services"].items():
        check_line(service["command"])
        assert (ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert service["build"]["target"] in stages()
        assert set(service.get("depends_on", {})) <= compose["services"].keys()
        assert set(service.get("secrets", ())) <= compose["secrets"].keys()
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert source.startswith((".", "/")) or source in compose["volumes"], f"{name}: {source}"


def test_compose_with_gpus_gives_one_to_each_worker() -> None:
    yaml = pytest.importorskip("yaml")
    over = yaml.safe_load((DEPLOY / "compose.gpu.yaml").read_text())["services"]
    workers = {
        name for name, service in _compose()["services"].items() if service["build"]["target"] == "worker"
    }
    assert over.keys() == workers
    for service in over.values():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert (device["driver"], device["count"], device["capabilities"]) == ("nvidia", 1, ["gpu"])


def test_compose_serves_an_example_and_two_workers() -> None:
    services = _compose()["services"]
    run_file = next(volume for volume in services["coordinator"]["volumes"] if "run.toml" in volume)
    default = re.search(r":-([^}]+)\}", run_file)
    assert default is not None
    assert (DEPLOY / default[1]).resolve() in set((ROOT / "examples").glob("*.toml"))
    assert sum(service["build"]["target"] == "worker" for service in services.values()) == 2


def test_compose_hands_the_token_over_as_a_file_and_takes_rights_away() -> None:
    for name, service in _compose()["services"].items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]
        assert "environment" not in service
        if name.startswith("worker"):
            assert "/run/secrets/join-token" in service["command"]


def _compose() -> dict[str, Any]:
    yaml = pytest.importorskip("yaml")
    compose: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    return compose


def _unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=True, comment_prefixes=("#", ";"))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / name).read_text())
    return parser


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_has_its_sections_and_starts_a_real_command(name: str) -> None:
    unit = _unit(name)
    assert unit.sections() == ["Unit", "Service", "Install"]
    program, *words = shlex.split(unit["Service"]["ExecStart"])
    assert program == "/opt/weft/bin/weft"
    check_line(words)


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_hardened(name: str) -> None:
    service = _unit(name)["Service"]
    assert service["User"] == "weft"
    for key, value in {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "PrivateTmp": "yes",
        "CapabilityBoundingSet": "",
        "UMask": "0077",
        "StateDirectoryMode": "0700",
        "SystemCallFilter": "@system-service",
    }.items():
        assert service[key] == value
    assert service["ProtectHome"] in {"yes", "read-only"}


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_writes_in_its_state_directory_alone(name: str) -> None:
    service = _unit(name)["Service"]
    state = f"/var/lib/{service['StateDirectory']}"
    written = [word.partition("=")[2] for word in service["Environment"].split() if "HOME=" in word]
    assert written
    assert all(fnmatch.fnmatchcase(path, f"{state}*") for path in (*written, service["WorkingDirectory"]))


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_stops_as_ctrl_c_does_and_does_not_repeat_what_cannot_work(name: str) -> None:
    from weft.common.errors import AccessError, InputError, NetworkError, UsageError

    service = _unit(name)["Service"]
    assert service["KillSignal"] == "SIGINT"
    hopeless = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert hopeless == {UsageError.exit_code, InputError.exit_code, AccessError.exit_code}
    assert NetworkError.exit_code not in hopeless


def test_units_wait_for_a_drain() -> None:
    from weft.server.app import DRAIN_S, GRACE_S

    assert float(_unit("weft-coordinator.service")["Service"]["TimeoutStopSec"]) > DRAIN_S + GRACE_S
    grace = _compose()["services"]["coordinator"]["stop_grace_period"]
    assert float(grace.removesuffix("s")) > DRAIN_S + GRACE_S


def test_no_file_holds_a_token() -> None:
    for path in [*DEPLOY.rglob("*"), *(ROOT / "examples").rglob("*")]:
        assert path.is_dir() or not CREDENTIALS.search(path.read_text()), path
