"""The line between a message's process and the resident trainer: a local socket that only one user can use.

    <runtime>/weft-<uid>/<name>.sock   0600, in a directory of mode 0700 that this user owns

``runtime`` is ``XDG_RUNTIME_DIR``, or the directory for temporary files; ``name`` follows from the node's directory,
since the path of a socket may have 107 bytes at most. Each side checks that the other is the same user. One question a
connection: a table with the node's settings, then the parcel; back comes a parcel.
"""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from weft.common.errors import AccessError, InputError, Unreachable, UsageError
from weft.common.identity.files import private_directory
from weft.common.manifest import canonical_json, parse_json
from weft.common.parcel import Parcel, Read, read_parcel, write_parcel

PATH_BYTES_MAX: Final = 107
SETTINGS_BYTES_MAX: Final = 64 * 1024
_PIECE_BYTES: Final = 1 << 20
_CREDENTIALS: Final = struct.Struct("3i")
"""Process, user and group of who is at the other end, as Linux says."""


def socket_path(state: Path) -> Path:
    """Where the trainer of a node listens; its directory is made.

    Raises:
        AccessError: Somebody else owns the directory, or may enter it.
        UsageError: The path is too long.
    """
    root = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
    directory = root / f"weft-{os.getuid()}"
    private_directory(directory)
    found = directory.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode):
        raise AccessError(f"{directory} belongs to somebody else", hint="set XDG_RUNTIME_DIR to your own")
    path = directory / f"{hashlib.sha256(str(state).encode()).hexdigest()[:20]}.sock"
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise UsageError(
            f"{path} is too long for a socket", hint="set XDG_RUNTIME_DIR to a shorter directory"
        )
    return path


def check_peer(connection: socket.socket) -> None:
    """Raise AccessError unless the other end is a process of this user."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user, _ = _CREDENTIALS.unpack(data)
    if user != os.getuid():
        raise AccessError(f"user {user} is at the other end of the trainer's socket")


def send_question(connection: socket.socket, settings: Mapping[str, object], parcel: Parcel) -> None:
    """Send a node's settings and a message."""
    table = canonical_json(settings)  # type: ignore[arg-type]  # checked by who reads it
    connection.sendall(len(table).to_bytes(4, "big") + table)
    write_parcel(parcel, connection.sendall)


def receive_question(connection: socket.socket) -> tuple[Mapping[str, object], Parcel]:
    """Receive them; raises InputError, Unreachable."""
    read = _reader(connection)
    size = int.from_bytes(read(4), "big")
    if size > SETTINGS_BYTES_MAX:
        raise InputError(f"settings of {size} bytes")
    table = parse_json(read(size), SETTINGS_BYTES_MAX)
    if not isinstance(table, dict):
        raise InputError("settings are a table")
    return table, read_parcel(read)


def receive_answer(connection: socket.socket) -> Parcel:
    """Receive the answer; raises InputError, Unreachable when the other end is gone."""
    return read_parcel(_reader(connection))


def _reader(connection: socket.socket) -> Read:
    def read(size: int) -> bytes:
        data = bytearray(size)
        view, there = memoryview(data), 0
        while there < size:
            num = connection.recv_into(view[there : there + _PIECE_BYTES])
            if not num:
                raise Unreachable("the other end of the trainer's socket is gone")
            there += num
        return bytes(data)

    return read
