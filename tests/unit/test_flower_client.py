"""A node's side without training: settings, the socket's line, the resident's life, and what the shim loads."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from weft.client.flower.line import check_peer, receive_answer, receive_question, send_question, socket_path
from weft.client.flower.resident import Resident, listening
from weft.client.flower.settings import NodeSettings, read_settings
from weft.client.flower.shim import exchange
from weft.common.errors import AccessError, InputError, Unreachable, UsageError
from weft.common.identity.files import private_directory
from weft.common.parcel import Parcel, write_parcel

QUESTION = Parcel(documents={"a": b"1"})


class Echo:
    """A host that says what it was told."""

    def answer(self, settings: NodeSettings, parcel: Parcel) -> Parcel:
        if settings.name == "bug":
            raise RuntimeError("a bug")
        return Parcel(documents={**parcel.documents, "name": settings.name.encode()})


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    private_directory(tmp_path / "node")
    return tmp_path / "node"


def asked(state: Path, settings: dict[str, object]) -> Parcel:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(socket_path(state)))
        return exchange(connection, settings, QUESTION, state=state)


def test_a_resident_answers_and_leaves_when_nothing_comes(state: Path) -> None:
    with listening(state) as listener:
        path = socket_path(state)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        resident = Resident(listener, Echo(), idle_s=0.3)  # type: ignore[arg-type]
        thread = threading.Thread(target=resident.serve)
        thread.start()
        assert asked(state, {"name": "one"}).text("name") == "one"
        assert asked(state, {"nome": "one"}).text("error") == "UsageError"
        assert asked(state, {"name": "bug"}).text("message") == "RuntimeError: a bug"
        thread.join(20)
        assert not thread.is_alive()
    assert not path.exists()


def test_a_trainer_that_dies_is_said_to_have_died(state: Path) -> None:
    here, there = socket.socketpair()
    with here:

        def die() -> None:
            with there:
                receive_question(there)

        receiver = threading.Thread(target=die)
        receiver.start()
        with pytest.raises(Unreachable, match="died"):
            exchange(here, {}, QUESTION, state=state)
        receiver.join()


def test_settings_that_are_no_table_are_refused() -> None:
    here, there = socket.socketpair()
    with here, there:
        here.sendall((2).to_bytes(4, "big") + b"[]")
        with pytest.raises(InputError, match="table"):
            receive_question(there)
        here.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(InputError, match="bytes"):
            receive_question(there)


def test_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = socket.socketpair()
    with here, there:
        check_peer(here)
        monkeypatch.setattr("os.getuid", lambda: 12345)
        with pytest.raises(AccessError, match="other end"):
            check_peer(here)


def test_a_directory_that_others_may_enter_is_refused(state: Path) -> None:
    socket_path(state).parent.chmod(0o755)
    with pytest.raises(AccessError):
        socket_path(state)


def test_a_path_too_long_for_a_socket_says_so(
    state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    with pytest.raises(UsageError, match="too long"):
        socket_path(state)


def test_questions_and_answers_cross_the_line() -> None:
    here, there = socket.socketpair()
    with here, there:
        send_question(here, {"name": "n"}, QUESTION)
        assert receive_question(there) == ({"name": "n"}, QUESTION)
        write_parcel(QUESTION, there.sendall)
        assert receive_answer(here) == QUESTION


def test_node_config_is_read_with_either_spelling() -> None:
    found = read_settings({"partition-id": 1, "num-partitions": 2, "idle-minutes": 5, "data": "/d"})
    assert (found.idle_minutes, found.data) == (5.0, "/d")


@pytest.mark.parametrize("config", [{"dta": "x"}, {"threads": "x"}, {"idle-minutes": 0}])
def test_wrong_node_config_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        read_settings(config)


def test_the_client_app_loads_no_torch() -> None:
    """Flower starts a process a message: what the ClientApp imports, every message pays for."""
    code = "import sys, weft.client.flower.app; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0"},
    )
    loaded = set(done.stdout.split())
    assert "weft.client.flower.shim" in loaded
    assert not loaded & {"torch", "transformers", "peft", "datasets", "weft.v1", "weft.client.flower.host"}
