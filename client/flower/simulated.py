"""Clients of a simulation: many in one process, each with its own key, data and state, over one base in its memory.

<directory>/00042/node.json      how client 42 works
<directory>/00042/…              its key and what it keeps of its training
<directory>/process-0/           lock and log of a process, where they are no actors of Ray
"""

from __future__ import annotations

import contextlib
import functools
import os
import queue
import socket
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from weft.client.flower.line import socket_path
from weft.client.flower.settings import NodeSettings, read_settings
from weft.client.flower.shim import LOG, exchange
from weft.client.home import Home
from weft.common.errors import EngineFailed, InputError
from weft.common.identity.files import private_directory
from weft.common.manifest import parse_json
from weft.common.parcel import Parcel
from weft.common.settings import to_table

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.clientapp import ClientApp

    from weft.client.flower.host import Host

NODE: Final = "node.json"
_FILE_BYTES_MAX: Final = 64 * 1024
_IDLE_MINUTES: Final = 24 * 60.0
_END_S: Final = 10.0


def client_settings(directory: Path, client: int) -> NodeSettings:
    """How a client works; raises InputError, UsageError."""
    path = directory / f"{client:05}" / NODE
    try:
        table = parse_json(path.read_bytes(), _FILE_BYTES_MAX)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    if not isinstance(table, dict):
        raise InputError(f"{path} holds no table")
    return read_settings(table)


# ---- in actors of Ray --------------------------------------------------------------------------------------------


def ray_app(directory: Path) -> ClientApp:
    """The ClientApp of a simulation on Flower's engine."""
    from weft.client.flower.app import make_app

    return make_app(partial(answer_in_actor, directory))


def answer_in_actor(directory: Path, context: Context, parcel: Parcel) -> Parcel:
    """Answer a message in this process, which Ray keeps for the next one."""
    client = int(context.node_config["partition-id"])
    return _host().answer(client_settings(directory, client), parcel)


@functools.cache
def _host() -> Host:
    """This process's: an actor is called as a function, and has nowhere else to keep a base."""
    from weft.client.flower.host import Host

    return Host(keep=False, home=Home.of(os.environ))


# ---- in processes of our own -------------------------------------------------------------------------------------


class Processes:
    """Processes that answer for all clients; each message goes to one that is free."""

    def __init__(self, directory: Path, num_processes: int) -> None:
        self._directory = directory
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        self._all = [_Process(directory / f"process-{index}") for index in range(num_processes)]
        for process in self._all:
            self._free.put(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End them all; what they were answering is lost."""
        for process in self._all:
            process.close()

    def answer(self, client: int, parcel: Parcel) -> Parcel:
        """Answer a client's message; raises EngineFailed, Unreachable where the process dies."""
        settings = client_settings(self._directory, client)
        process = self._free.get()
        try:
            return process.answer(settings, parcel)
        finally:
            self._free.put(process)


class _Process:
    """One resident trainer, started at its first message and again where it died."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    def answer(self, settings: NodeSettings, parcel: Parcel) -> Parcel:
        with self._lock:
            if self._is_closed:
                raise EngineFailed("the simulation is ending")
            if self._process is None or self._process.poll() is not None:
                self._process = self._start()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.connect(str(socket_path(self._state)))
            except OSError as error:
                raise EngineFailed(f"a process does not start; see {self._state / LOG}") from error
            return exchange(connection, to_table(settings), parcel, state=self._state)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            with contextlib.suppress(OSError):
                socket_path(self._state).unlink()

    def _start(self) -> subprocess.Popen[bytes]:
        private_directory(self._state)
        module = "weft.client.flower.resident"
        command = [sys.executable, "-m", module, "--state", str(self._state), "--many"]
        command += ["--idle-minutes", str(_IDLE_MINUTES)]
        with (self._state / LOG).open("ab") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, start_new_session=True
            )
        assert process.stdout is not None  # noqa: S101 - a pipe was asked for
        with process.stdout as ready:
            # It closes its output when it listens.
            ready.read()
        return process
