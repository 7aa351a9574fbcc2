"""The gateway, the mailbox and the ordinary worker on a real training: everything but Flower."""

from __future__ import annotations

import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.running import PATIENCE_S, ThreadEngine
from tests.tiny import TEXT

from weft.client.flower.host import Host
from weft.client.flower.line import socket_path
from weft.client.flower.settings import NodeSettings
from weft.client.flower.shim import ask
from weft.client.home import Home
from weft.common.ids import ModuleKey, ModuleRef, RunId
from weft.common.parcel import Parcel
from weft.common.settings import to_table
from weft.server.app import Opened, ServeOptions, opened_state, start_run
from weft.server.engine_process import Jobs
from weft.server.flower.gateway import Gateway
from weft.server.flower.local import LocalPost
from weft.server.runfile import parse_run_file
from weft.server.verify import verify

RUN = """
[run]
name = "alpha"
[base]
source = "{base}"
[rounds]
count = 2
quorum = 2
target = 2
[inner]
steps = 3
batch_size = 2
sequence_length = 32
[codec]
kind = "int8"
"""


class Clients:
    """Nodes of one process, as a simulation has them."""

    def __init__(self, directory: Path, base: Path, *, keep: bool) -> None:
        self._directory = directory
        self._base = base
        self.host = Host(keep=keep, home=Home(directory / "home"))
        self.num_tasks = 0
        (directory / "data").mkdir(parents=True)

    def settings(self, node: int) -> NodeSettings:
        data = self._directory / "data" / f"{node}.txt"
        data.write_text(TEXT * (node + 1))
        state = self._directory / f"client-{node}"
        return NodeSettings(
            data=str(data), base=str(self._base), state=str(state), name=f"n{node}", threads=1
        )

    def answer(self, node: int, parcel: Parcel) -> Parcel:
        self.num_tasks += "PollTask" in parcel.documents
        return self.host.answer(self.settings(node), parcel)


@contextmanager
def coordinator(directory: Path, base: Path, jobs: Jobs, *, text: str = RUN) -> Iterator[Opened]:
    engine = ThreadEngine(jobs)
    with opened_state(ServeOptions(state=directory / "state"), engine) as opened:
        run_file = parse_run_file(text.format(base=base))
        start_run(opened, run_file, directory / "state" / "scratch", lambda text: None)
        yield opened


def gateway_of(opened: Opened, post: LocalPost, said: list[str], **options: Any) -> Gateway:
    return Gateway(
        opened.coordinator,
        opened.identity,
        post,
        clock=time.monotonic,
        rng_bytes=os.urandom,
        say=said.append,
        **options,
    )


def run(gateway: Gateway, post: LocalPost, said: list[str]) -> None:
    ends_s = time.monotonic() + PATIENCE_S

    def wait() -> None:
        assert time.monotonic() < ends_s, said
        post.wait(0.1)

    gateway.run(wait)


@pytest.mark.parametrize("keep", [True, False], ids=["workers stay", "workers leave"])
def test_a_run_is_trained_by_messages_and_published_like_any_other(
    tmp_path: Path, tiny_base: Path, jobs: Jobs, *, keep: bool
) -> None:
    said: list[str] = []
    clients = Clients(tmp_path, tiny_base, keep=keep)
    with coordinator(tmp_path, tiny_base, jobs) as opened:
        post = LocalPost(2, clients.answer, num_threads=1)
        gateway = gateway_of(opened, post, said)
        run(gateway, post, said)
        post.close()
        clients.host.close()
        versions = opened.coordinator.runs[RunId("alpha")].versions[ModuleKey(0, 0)]
        assert [version.version for version in versions] == [0, 1, 2], said
        assert gateway.num_accepted == 4
        workers = opened.coordinator.roster.workers.values()
        assert {worker.display_name for worker in workers} >= {"n0", "n1"}
    engine = ThreadEngine(jobs)
    found = verify(tmp_path / "state", ModuleRef.parse("alpha"), engine)
    engine.close()
    assert [item.num_updates for item in found] == [2]


def test_messages_go_to_one_resident_process(
    tmp_path: Path, tiny_base: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    said: list[str] = []
    clients = Clients(tmp_path, tiny_base, keep=True)

    def answer(node: int, parcel: Parcel) -> Parcel:
        settings = clients.settings(node)
        return ask(to_table(settings), parcel, state=Path(settings.state), idle_minutes=10)

    with coordinator(tmp_path, tiny_base, jobs, text=RUN.replace("= 2\ntarget = 2", "= 1")) as opened:
        post = LocalPost(1, answer, num_threads=1)
        gateway = gateway_of(opened, post, said)
        try:
            run(gateway, post, said)
        finally:
            stop_resident(tmp_path / "client-0")
            post.close()
    assert gateway.num_accepted == 2
    log = (tmp_path / "client-0" / "resident.log").read_text()
    assert log.count("stays resident") == 1


def stop_resident(state: Path) -> None:
    """Find the process by its socket, and end it."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(socket_path(state)))
        process, _, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
