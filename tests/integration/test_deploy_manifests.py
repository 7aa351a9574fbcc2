"""What the manifests start, started here: their arguments and environment, on volumes as a cluster mounts them."""

from __future__ import annotations

import contextlib
import http.client
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.running import Program, eventually, main, write_run

yaml = pytest.importorskip("yaml")
BASE = Path(__file__).parents[2] / "deploy/kubernetes/base"


@pytest.fixture
def programs() -> Iterator[ExitStack]:
    """Ends what a test started."""
    with ExitStack() as stack:
        yield stack


def arguments(file: str, kind: str, places: Mapping[str, str]) -> list[str]:
    """A container's arguments, with a cluster's names and places replaced by those of this machine."""
    (workload,) = [item for item in yaml.safe_load_all((BASE / file).read_text()) if item["kind"] == kind]
    (container,) = workload["spec"]["template"]["spec"]["containers"]
    words = [str(word) for word in container["args"]]
    for there, here in places.items():
        words = [word.replace(there, here) for word in words]
    return words


def volume(path: Path) -> Path:
    """A volume's root as the kubelet leaves it for an fsGroup: open to the group, and its group inherited."""
    path.mkdir()
    path.chmod(0o2770)
    return path


def page(address: str, path: str) -> tuple[int, str]:
    with contextlib.closing(http.client.HTTPConnection(address)) as connection:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_a_coordinator_and_a_worker_of_the_manifests_train_a_run(
    tiny_base: Path,
    text: Path,
    tmp_path: Path,
    programs: ExitStack,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    state, work, secrets = (volume(tmp_path / name) for name in ("state", "work", "secrets"))
    write_run(tmp_path / "run.toml", tiny_base, count=1, quorum=1)

    def start(words: list[str], home: Path, name: str) -> Program:
        return programs.enter_context(Program(*words, home=home, directory=tmp_path, name=name))

    places = {"/etc/weft": str(tmp_path), "/var/lib/weft": str(state), "0.0.0.0:7444": "0.0.0.0:0"}
    words = [*arguments("coordinator.yaml", "StatefulSet", places), "--listen", "127.0.0.1:0"]
    coordinator = start(words, state / "home", "coordinator")
    host, _, port = coordinator.says("weft join").split()[2].partition(":")
    assert host == "weft-coordinator", "the address that is handed out is the service's"
    pages = f"127.0.0.1:{coordinator.says('metrics').split()[1].split('/')[2].rpartition(':')[2]}"
    assert page(pages, "/healthz") == (200, "ok\n")

    # As `kubectl exec … weft token create | kubectl create secret`.
    monkeypatch.setenv("WEFT_HOME", str(state / "home"))
    assert main(["token", "create", "--uses", "64", "--ttl", "30d"]) == 0
    (secrets / "token").write_text(capsys.readouterr().out)

    places = {
        "weft-coordinator:7443": f"127.0.0.1:{port}",
        "/run/secrets/weft": str(secrets),
        "/data": str(text.parent),
        "$(POD_NAME)": "weft-worker-5d9c7",
    }
    worker = start(arguments("workers.yaml", "Deployment", places), work / "home", "worker")
    eventually(lambda: 'weft_run_finished{run="run"} 1.0' in page(pages, "/metrics")[1], worker.shown)
    assert main(["workers", "list"]) == 0
    assert "weft-worker-5d9c7" in capsys.readouterr().out
    for program in (worker, coordinator):
        program.signal(signal.SIGTERM)
        assert program.code() == 0
    assert not _open_to_others(state / "state")
    assert not _open_to_others(work / "home")


def _open_to_others(directory: Path) -> list[Any]:
    return [
        path for path in (directory, *directory.rglob("*")) if path.is_dir() and path.stat().st_mode & 0o077
    ]
