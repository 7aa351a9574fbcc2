"""Files that hold secrets: readable by their owner alone, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
import tempfile
from pathlib import Path
from typing import Final, NoReturn

from weft.common.errors import AccessError, CorruptState, DiskFull, NotFound, StorageError

FILE_BYTES_MAX: Final = 65536
"""No key or certificate chain comes near this; more is another file."""


def private_directory(path: Path) -> None:
    """Make ``path`` and its missing parents with mode 0700.

    Raises:
        AccessError: It exists and other users may enter it.
        StorageError: It cannot be made.
    """
    try:
        for directory in reversed([d for d in (path, *path.parents) if not d.exists()]):
            directory.mkdir(mode=0o700, exist_ok=True)
            _sync_directory(directory.parent)
        mode = path.stat().st_mode
    except OSError as error:
        _refuse(path, error)
    if not stat.S_ISDIR(mode):
        raise StorageError(f"{path} is not a directory", hint="name another directory")
    if mode & 0o077:
        raise AccessError(f"{path} is open to other users", hint=f"chmod 700 {shlex.quote(str(path))}")


def write_private(path: Path, data: bytes) -> None:
    """Write ``path`` with mode 0600, durably: after a crash it holds all of ``data`` or what it held before.

    Raises:
        DiskFull: There is no space; ``path`` is as it was.
        StorageError: It cannot be written; ``path`` is as it was.
    """
    temporary = None
    try:
        # mkstemp opens with 0600 whatever the umask allows, so the bytes are never readable in between.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        _sync_directory(path.parent)
    except OSError as error:
        _refuse(path, error)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def read_private(path: Path) -> bytes:
    """Read a file that :func:`write_private` wrote.

    Raises:
        NotFound: There is no such file.
        AccessError: Group or others may read or write it, or this process may not.
        CorruptState: It is larger than any key.
        StorageError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = file.read(FILE_BYTES_MAX + 1) if not mode & 0o077 else b""
    except OSError as error:
        _refuse(path, error)
    if mode & 0o077:
        raise AccessError(f"{path} holds a private key that other users can read", hint=_chmod(path))
    if len(data) > FILE_BYTES_MAX:
        raise CorruptState(f"{path} is larger than any key", hint=f"restore {path} from a backup")
    return data


def _refuse(path: Path, error: OSError) -> NoReturn:
    """Say what ``error`` means for ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFull(
            f"no space left to write {path}", hint="free some space and run the same command again"
        )
    if isinstance(error, FileNotFoundError):
        raise NotFound(f"{path} does not exist")
    if isinstance(error, PermissionError):
        raise AccessError(f"{path} may not be used by this user", hint=f"ls -ld {shlex.quote(str(path))}")
    raise StorageError(f"{path}: {error.strerror or error}")


def _chmod(path: Path) -> str:
    return f"chmod 600 {shlex.quote(str(path))}"


def _sync_directory(path: Path) -> None:
    """Make a rename in ``path`` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
