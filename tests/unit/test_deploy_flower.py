"""The federation of Compose: options that Flower has, settings that the app reads, keys that both sides accept."""

from __future__ import annotations

import re
import runpy
import shlex
import ssl
import stat
import tomllib
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

yaml = pytest.importorskip("yaml")
DEPLOY: Final = Path(__file__).parents[2] / "deploy"


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.flower.yaml").read_text())["services"]
    return found


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def readable(path: str, service: dict[str, Any]) -> bool:
    """Whether a service has a volume for a path."""
    targets = [volume.rsplit(":ro", 1)[0].rsplit(":", 1)[1] for volume in service["volumes"]]
    return any(Path(path).is_relative_to(target) for target in targets)


def make_keys(*words: object) -> None:
    # Not imported: that would leave compiled files in deploy/.
    assert runpy.run_path(str(DEPLOY / "flower_keys.py"))["main"]([str(word) for word in words]) == 0


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys", "--host", "superlink", "--node", "a", "--node", "b")
    return tmp_path / "keys"


# ---- the file --------------------------------------------------------------------------------------------------


def test_options_are_flowers() -> None:
    flwr = pytest.importorskip("flwr")
    sources = Path(flwr.__file__).parent
    for program, folder in (("flower-superlink", "superlink"), ("flower-supernode", "supernode")):
        files = [
            path for where in (folder, "supercore", "common") for path in sources.glob(f"{where}/**/*.py")
        ]
        known = {name for path in files for name in re.findall(r'"(--[a-z-]+)"', path.read_text())}
        for service in services().values():
            if service["command"][0] == program:
                assert {word for word in service["command"] if word.startswith("--")} <= known


def test_what_is_named_is_mounted() -> None:
    for service in services().values():
        named = [word for word in service["command"] if word.startswith("/")]
        assert len(named) >= 2
        assert all(readable(path, service) for path in named)
        assert "--insecure" not in service["command"]


def test_nodes_are_told_what_the_app_reads() -> None:
    from weft.client.flower.settings import read_settings

    for name in ("a", "b"):
        service = services()[f"supernode-{name}"]
        pairs = shlex.split(option(service["command"], "--node-config"))
        settings = read_settings(dict(pair.split("=", 1) for pair in pairs))
        assert settings.name == name
        assert readable(settings.data, service)
        port = option(services()["superlink"]["command"], "--port")
        assert option(service["command"], "--superlink") == f"superlink:{port}"


def test_the_run_that_the_readme_starts_is_where_the_superlink_has_it() -> None:
    from weft.server.flower.app import read_settings

    found = re.search(r"--run-config '([^']+)'", (DEPLOY / "README.md").read_text())
    assert found is not None
    given = tomllib.loads("\n".join(found[1].split()))
    settings = read_settings(given)
    assert readable(settings.run, services()["superlink"])
    assert readable(settings.state, services()["superlink"])
    known = tomllib.loads((DEPLOY / "flower/pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert given.keys() <= known.keys(), "flwr overrides what the app has and nothing else"


def test_rights_are_taken_away() -> None:
    for service in services().values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert "no-new-privileges:true" in service["security_opt"]


def test_flower_does_not_phone_home() -> None:
    stage = (DEPLOY / "Dockerfile").read_text().partition(" AS flower\n")[2]
    assert "FLWR_TELEMETRY_ENABLED=0" in stage
    assert "FLWR_DISABLE_UPDATE_CHECK=1" in stage


# ---- the keys --------------------------------------------------------------------------------------------------


def test_the_superlinks_certificate_is_for_its_names_and_of_the_authority_that_all_know(keys: Path) -> None:
    authority = x509.load_pem_x509_certificate((keys / "superlink/ca.pem").read_bytes())
    server = x509.load_pem_x509_certificate((keys / "superlink/server.pem").read_bytes())
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["superlink", "localhost"]
    for holder in ("a", "b", "operator"):
        assert (keys / holder / "ca.pem").read_bytes() == (keys / "superlink/ca.pem").read_bytes()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys / "superlink/server.pem", keys / "superlink/server.key")
    ssl.create_default_context(cafile=str(keys / "a/ca.pem"))


def test_a_nodes_key_is_of_the_kind_that_flower_reads(keys: Path) -> None:
    public = serialization.load_ssh_public_key((keys / "operator/a.pub").read_bytes())
    private = serialization.load_ssh_private_key((keys / "a/node.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert private.public_key() == public
    assert (keys / "a/node.key").read_bytes() != (keys / "b/node.key").read_bytes()


def test_private_keys_are_for_their_owner(keys: Path) -> None:
    assert all(
        stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600) for path in keys.rglob("*")
    )


def test_the_operator_finds_the_superlink_at_its_published_port(keys: Path) -> None:
    here = tomllib.loads((keys / "operator/config.toml").read_text())["superlink"]["here"]
    published = re.search(r":-(\d+)\}:\d+$", services()["superlink"]["ports"][0])
    assert published is not None
    assert here["address"] == f"127.0.0.1:{published[1]}"
    assert Path(here["root-certificates"]).is_file()


def test_a_second_time_adds_nodes_and_changes_nothing(keys: Path) -> None:
    before = {path: path.read_bytes() for path in keys.rglob("*") if path.is_file()}
    make_keys(keys, "--host", "elsewhere", "--node", "a", "--node", "c")
    assert {path: path.read_bytes() for path in before} == before
    added = {path.relative_to(keys).as_posix() for path in keys.rglob("*") if path.is_file()} - {
        path.relative_to(keys).as_posix() for path in before
    }
    assert added == {"c/ca.pem", "c/node.key", "operator/c.pub"}
