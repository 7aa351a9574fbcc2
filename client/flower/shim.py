"""What runs for each message: hands it to the resident trainer, which is started where there is none.

Flower starts a process for every message. This is all of Weft that such a process loads: no PyTorch, no gRPC.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from weft.client.flower.line import check_peer, receive_answer, send_question, socket_path
from weft.common.errors import EngineFailed, StorageError, Unreachable
from weft.common.identity.files import private_directory
from weft.common.parcel import Parcel

ATTEMPTS_MAX: Final = 3
"""A trainer may leave, having nothing to do, just when a message comes."""
LOG: Final = "resident.log"


def ask(settings: Mapping[str, object], parcel: Parcel, *, state: Path, idle_minutes: float) -> Parcel:
    """Have a message answered by the resident trainer of a node.

    Args:
        settings: The node's, for the trainer to read.
        parcel: The message.
        state: The node's directory, absolute.
        idle_minutes: A trainer that is started now leaves after this long without a message.

    Raises:
        Unreachable: The trainer died over it.
        EngineFailed: It does not start.
        AccessError: Somebody else listens where it should.
    """
    private_directory(state)
    with _connected(state, idle_minutes) as connection:
        return exchange(connection, settings, parcel, state=state)


def exchange(
    connection: socket.socket, settings: Mapping[str, object], parcel: Parcel, *, state: Path
) -> Parcel:
    """Ask on a connection; raises Unreachable when the trainer dies, AccessError when it is somebody else's."""
    check_peer(connection)
    try:
        send_question(connection, settings, parcel)
        return receive_answer(connection)
    except (ConnectionError, Unreachable) as error:
        raise Unreachable(f"the resident trainer died; see {state / LOG}") from error


def _connected(state: Path, idle_minutes: float) -> socket.socket:
    path = socket_path(state)
    for _ in range(ATTEMPTS_MAX):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            start_resident(state, idle_minutes)
        else:
            return connection
    raise EngineFailed(f"the resident trainer does not start; see {state / LOG}")


def start_resident(state: Path, idle_minutes: float) -> None:
    """Start a trainer that outlives this process, and return when it listens, or when another does.

    Raises:
        StorageError: It cannot be started, or its log cannot be written.
    """
    command = [sys.executable, "-m", "weft.client.flower.resident", "--state", str(state)]
    command += ["--idle-minutes", str(idle_minutes)]
    listens, output = os.pipe()
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    try:
        with os.fdopen(listens) as ready:
            try:
                # In a session of its own: Flower ends a message's process with all that belongs to it.
                os.posix_spawn(
                    sys.executable,
                    command,
                    os.environ,
                    setsid=True,
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_DUP2, output, 1),
                        (os.POSIX_SPAWN_OPEN, 2, str(state / LOG), append, 0o600),
                    ],
                )
            finally:
                os.close(output)
            # It closes its output when it listens, and goes on.
            ready.read()
    except OSError as error:
        raise StorageError(f"the resident trainer cannot be started: {error.strerror}") from error
