"""Blobs in both directions: four chunks in flight, resumed after whatever happens, failed only by silence.

A transfer has no deadline. It goes on as long as it gets further, through lost connections and restarts of
either side, and fails with TransferStalled when nothing got further for the idle time. Getting further means
more bytes there than ever before: sending again what was lost does not count, so a transfer cannot go in
circles. What is there already is never sent again: the receiver says what it lacks.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TypeVar

from weft.common.blobs import FILES, BlobStore, PartialBlob, check_manifest, chunk_bytes, manifest_of
from weft.common.errors import (
    CorruptState,
    InputError,
    NotFound,
    SubmissionRefused,
    TransferStalled,
    Unreachable,
    WeftError,
)
from weft.common.ids import Digest
from weft.common.protocol import CHUNK_BYTES, BlobManifest, Missing

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Told bytes there and bytes in all, in the thread that called."""

IN_FLIGHT: Final = 4
CHUNK_S: Final = 60.0
"""Shortest deadline of one chunk; the idle time where that is longer."""
PAUSE_FIRST_S: Final = 0.1
PAUSE_MAX_S: Final = 5.0


class ByteCalls(Protocol):
    """The RPCs that move bytes; they raise classes of ``common.errors``."""

    def find_missing(self, *, lease_token: str, blob: BlobManifest, timeout_s: float) -> Missing:
        """See the proto."""

    def put_chunk(
        self,
        *,
        lease_token: str,
        blake3: Digest,
        index: int,
        data: bytes,
        timeout_s: float,
        halted: Callable[[], bool],
    ) -> None:
        """See the proto; gives up when ``halted`` says so."""

    def commit_blob(self, *, lease_token: str, blake3: Digest, timeout_s: float) -> None:
        """See the proto."""

    def get_blob(self, *, blake3: Digest) -> BlobManifest:
        """See the proto."""

    def get_chunk(self, *, blake3: Digest, index: int, timeout_s: float, halted: Callable[[], bool]) -> bytes:
        """See the proto; gives up when ``halted`` says so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long to go on."""

    idle_s: float
    """Fail when nothing got further for this long."""
    clock: Callable[[], float]
    """Monotonic seconds."""
    jitter: Callable[[], float]
    """Uniform in [0, 1)."""
    stop: threading.Event
    """Set, it ends pauses: the transfer fails with what it waited for."""

    @property
    def chunk_s(self) -> float:
        """Deadline of calls that move or check bytes."""
        return max(CHUNK_S, self.idle_s)


class Transfer:
    """One blob on its way."""

    def __init__(self, patience: Patience, progress: Progress | None) -> None:
        self.patience = patience
        self._progress = progress
        self._lock = threading.Lock()
        self._given_up = threading.Event()
        self._most = -1
        self._further_at_s = patience.clock()

    def patiently(self, attempt: Callable[[], T], *passing: type[WeftError]) -> T:
        """Attempt again and again while the error is exactly of a class in ``passing``, with growing pauses.

        Raises:
            TransferStalled: Nothing got further for the idle time.
            WeftError: Any other error; a passing one too when the transfer was given up.
        """
        pause_s = PAUSE_FIRST_S
        while True:
            try:
                return attempt()
            except WeftError as error:
                if type(error) not in passing or self._given_up.is_set():
                    raise
                self._check_idle(error)
                if self.patience.stop.wait(pause_s * (0.5 + self.patience.jitter())):
                    raise
                pause_s = min(2 * pause_s, PAUSE_MAX_S)

    def chunks(self, manifest: BlobManifest, indexes: Sequence[int], move: Callable[[int], None]) -> None:
        """Move the chunks, four at a time, each patiently; the first error that does not pass ends all."""
        there = manifest.size_bytes - sum(chunk_bytes(manifest, index) for index in indexes)
        self._reach(there, manifest.size_bytes)
        try:
            # Leaving it waits for the threads, which break off their calls when the transfer is given up.
            with ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="weft-transfer") as pool:
                self._collect(manifest, pool, indexes, move, there)
        finally:
            self._given_up.clear()

    def _collect(
        self,
        manifest: BlobManifest,
        pool: ThreadPoolExecutor,
        indexes: Sequence[int],
        move: Callable[[int], None],
        there: int,
    ) -> None:
        moving = {pool.submit(self.patiently, partial(move, index), Unreachable): index for index in indexes}
        try:
            for done in as_completed(moving):
                done.result()
                there += chunk_bytes(manifest, moving[done])
                self._reach(there, manifest.size_bytes)
        except BaseException:
            self._given_up.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise

    def halted(self) -> bool:
        """Whether calls that are under way should be broken off."""
        return self._given_up.is_set()

    def _reach(self, there: int, size_bytes: int) -> None:
        with self._lock:
            if there > self._most:
                self._most, self._further_at_s = there, self.patience.clock()
        if self._progress is not None:
            self._progress(there, size_bytes)

    def _check_idle(self, error: WeftError) -> None:
        with self._lock:
            idle_s = self.patience.clock() - self._further_at_s
        if idle_s >= self.patience.idle_s:
            raise TransferStalled(
                f"the transfer got no further for {idle_s:.0f} s: {error}",
                hint="check the network and the coordinator; what has arrived is kept",
            ) from error


def upload(
    calls: ByteCalls, path: Path, lease_token: str, *, patience: Patience, progress: Progress | None = None
) -> BlobManifest:
    """Send a file and have it made durable; what the coordinator has of it is not sent again.

    Raises:
        InputError, NotFound: The file is empty or not there.
        TransferStalled: Nothing got further for the idle time.
        CorruptState: The file changed while it was sent.
        WeftError: What the coordinator refuses, such as LeaseLost or DiskFull.
    """
    manifest = manifest_of(path)
    transfer = Transfer(patience, progress)
    doubtful: set[int] = set()

    def find() -> Missing:
        return calls.find_missing(lease_token=lease_token, blob=manifest, timeout_s=patience.chunk_s)

    def send(index: int) -> None:
        # An answer that was lost is no chunk that was lost: ask before the bytes go again.
        if index in doubtful and index not in find().missing:
            return
        doubtful.add(index)
        calls.put_chunk(
            lease_token=lease_token,
            blake3=manifest.blake3,
            index=index,
            data=_read(path, index * CHUNK_BYTES, chunk_bytes(manifest, index)),
            timeout_s=patience.chunk_s,
            halted=transfer.halted,
        )

    def commit() -> None:
        calls.commit_blob(lease_token=lease_token, blake3=manifest.blake3, timeout_s=patience.chunk_s)

    def attempt() -> None:
        found = transfer.patiently(find, Unreachable)
        if found.missing and found.missing[-1] >= len(manifest.chunk_blake3):
            raise CorruptState(f"the coordinator asks for a chunk that blob {manifest.blake3} does not have")
        doubtful.clear()
        transfer.chunks(manifest, found.missing, send)
        if not found.complete:
            transfer.patiently(commit, Unreachable)

    # A coordinator that restarted has to be told of the blob again, and may lack chunks that it had.
    transfer.patiently(attempt, NotFound, SubmissionRefused)
    return manifest


def download(
    calls: ByteCalls,
    blake3: Digest,
    to: BlobStore | Path,
    *,
    size_bytes: int | None = None,
    patience: Patience,
    progress: Progress | None = None,
) -> Path:
    """Get a blob into a store or to a path; chunks from an earlier attempt, or process, are used.

    Every chunk is checked before it is kept and the whole before it gets its name.

    Args:
        calls: The RPCs.
        blake3: The blob.
        to: Where to; a file that is there already and is another one is replaced.
        size_bytes: Its size, where a signed document says so.
        patience: How long to go on.
        progress: Told how far it is.

    Returns:
        Where the blob is.

    Raises:
        NotFound: The coordinator has no such blob, or not for this worker.
        CorruptState: What came is not what was asked for.
        TransferStalled: Nothing got further for the idle time.
        DiskFull, StorageError: It cannot be written.
    """
    if _is_there(blake3, to):
        return _place(blake3, to)
    transfer = Transfer(patience, progress)
    manifest = transfer.patiently(lambda: calls.get_blob(blake3=blake3), Unreachable)
    if manifest.blake3 != blake3 or size_bytes not in (None, manifest.size_bytes):
        raise CorruptState(f"the coordinator described another blob than {blake3}")
    check_manifest(manifest, bytes_max=manifest.size_bytes)
    missing, put, commit = _receiver(to, manifest)

    def fetch(index: int) -> None:
        data = calls.get_chunk(blake3=blake3, index=index, timeout_s=patience.chunk_s, halted=transfer.halted)
        put(index, data)

    transfer.chunks(manifest, missing, fetch)
    commit()
    return _place(blake3, to)


def _receiver(
    to: BlobStore | Path, manifest: BlobManifest
) -> tuple[tuple[int, ...], Callable[[int, bytes], None], Callable[[], None]]:
    """What is missing at the receiving end, how to put a chunk there, and how to end."""
    if isinstance(to, BlobStore):
        missing = to.begin(manifest, bytes_max=manifest.size_bytes).missing
        return missing, partial(to.put_chunk, manifest.blake3), partial(to.commit, manifest.blake3)
    path = to.with_name(f".{to.name}.{manifest.blake3[:16]}.part")
    arriving = PartialBlob(manifest, path=path, target=to)
    return arriving.missing, arriving.put, arriving.commit


def _place(blake3: Digest, to: BlobStore | Path) -> Path:
    return to.path(blake3) if isinstance(to, BlobStore) else to


def _is_there(blake3: Digest, to: BlobStore | Path) -> bool:
    if isinstance(to, BlobStore):
        return to.has(blake3)
    try:
        return manifest_of(to).blake3 == blake3
    except (NotFound, InputError):
        return False


def _read(path: Path, offset: int, size: int) -> bytes:
    try:
        return FILES.read_at(path, offset, size)
    except OSError as error:
        raise InputError(f"{path} cannot be read any more: {error.strerror}") from error
