"""Where a base comes from: a directory that was given, this machine's cache, the Hub, or the coordinator.

Whatever the source, all files are checked against the digests that the signed recipe pins. What is fetched lies in
``$WEFT_HOME/bases/<digest>`` and is shared by all workers of this machine: the first one fetches, under a lock that
ends with its process; the others wait for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from weft.common.base import check_base, resolve_source
from weft.common.blobs import storage_errors
from weft.common.errors import BaseModelError, CorruptState
from weft.common.identity.files import private_directory
from weft.common.ids import Digest
from weft.common.recipe import BasePin

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Told bytes there and bytes in all; may raise to break the fetch off."""
LOOK_S: Final = 0.5
"""How often one that waits for another worker's fetch looks how far it is."""


class Source(Protocol):
    """Where blobs come from: a transport."""

    def download(
        self, blake3: Digest, to: Path, *, idle_s: float, size_bytes: int | None, progress: Progress | None
    ) -> Path:
        """Get a blob, resuming what is there."""


def find_base(
    pin: BasePin,
    *,
    given: Path | None,
    cache: Path,
    source: Source,
    idle_s: float,
    progress: Progress,
    pause: Callable[[float], object],
) -> Path:
    """The directory of a base, checked; fetched when it is nowhere on this machine.

    Args:
        pin: From the verified recipe.
        given: What ``--base`` named, if anything; then nothing else is tried.
        cache: Directory of this base in this machine's cache.
        source: The coordinator, asked last.
        idle_s: Longest silence of a transfer.
        progress: Told how far a fetch is.
        pause: Waits that many seconds.

    Raises:
        BaseModelError: It differs from the pinned one.
        NetworkError, StorageError: It cannot be fetched or kept.
    """
    if given is not None:
        check_base(given, pin)
        return given
    if cache.is_dir():
        return _from_cache(cache, pin)
    if pin.hub_id and (found := _from_hub(pin)) is not None:
        return found
    private_directory(cache.parent)
    with _alone(cache, pin, progress, pause):
        if not cache.is_dir():
            _fetch(pin, cache, source, idle_s, progress)
    return cache


def _from_cache(cache: Path, pin: BasePin) -> Path:
    try:
        check_base(cache, pin)
    except BaseModelError as error:
        raise CorruptState(f"the cached base is damaged: {error}", hint=f"rm -r {cache}") from error
    return cache


def _from_hub(pin: BasePin) -> Path | None:
    try:
        directory = resolve_source(pin.hub_id, revision=pin.revision)
        check_base(directory, pin)
    except BaseModelError as error:
        logger.info("the base is taken from the coordinator: %s", error)
        return None
    return directory


def _fetch(pin: BasePin, cache: Path, source: Source, idle_s: float, progress: Progress) -> None:
    """Fetch all files into a directory beside the place, which it takes in one step."""
    partial = _partial(cache)
    private_directory(partial)
    there = 0
    for file in pin.files:
        if file.size_bytes:

            def on_bytes(num_done: int, _: int, before: int = there) -> None:
                progress(before + num_done, pin.size_bytes)

            source.download(
                Digest(file.digest),
                partial / file.name,
                idle_s=idle_s,
                size_bytes=file.size_bytes,
                progress=on_bytes,
            )
        else:
            (partial / file.name).touch()
        there += file.size_bytes
    check_base(partial, pin)
    with storage_errors(cache):
        partial.replace(cache)


@contextlib.contextmanager
def _alone(cache: Path, pin: BasePin, progress: Progress, pause: Callable[[float], object]) -> Iterator[None]:
    """Hold the base's lock, watching meanwhile how far the worker is that holds it."""
    with storage_errors(cache), cache.with_name(f"{cache.name}.lock").open("w") as lock:
        while not _try_lock(lock.fileno()):
            progress(_size_of(_partial(cache)), pin.size_bytes)
            pause(LOOK_S)
        yield


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _partial(cache: Path) -> Path:
    return cache.with_name(f"{cache.name}.partial")


def _size_of(directory: Path) -> int:
    """Bytes of the files there; they come and go meanwhile."""
    size = 0
    for path in directory.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size
