"""Content-addressed blobs: files named by the BLAKE3-256 of their bytes, moved in chunks of 2 MiB.

    root/ab/ab12…      a whole blob, verified and durable
    root/partial/ab12… what has arrived of one; after a restart it is hashed again, so that nothing is lost

A chunk is checked against the digest declared for it before it is written, and again before it is handed out.
A blob appears under its name in one step: write, fsync, rename, fsync the directory. A failed fsync is never
tried again, since the kernel may have dropped the pages and call the next one a success: what has arrived is
thrown away.

Nothing that arrives is used as a path: a name is the hex of 32 bytes, checked where it came in.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Final

from blake3 import blake3

from weft.common.errors import (
    CorruptState,
    DiskFull,
    InputError,
    NotFound,
    StorageError,
    SubmissionRefused,
    UsageError,
)
from weft.common.ids import Digest, digest
from weft.common.protocol import CHUNK_BYTES, BlobManifest, Missing

MANIFESTS_CACHED: Final = 1024

_PARTIAL: Final = "partial"


class Files:
    """What is done to files; all of it raises OSError. A test gives one that fails at the n-th step."""

    def read_at(self, path: Path, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes; fewer at the end of the file."""
        handle = os.open(path, os.O_RDONLY)
        try:
            return _read_all(handle, offset, size)
        finally:
            os.close(handle)

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        """Write all of ``data``, making the file when it is not there, for its owner alone."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            view = memoryview(data)
            while view:
                written = os.pwrite(handle, view, offset)
                view, offset = view[written:], offset + written
        finally:
            os.close(handle)

    def sync(self, path: Path) -> None:
        """Make a file's bytes, or a directory's names, survive a power cut."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Replace ``target`` in one step."""
        os.replace(source, target)

    def remove(self, path: Path) -> None:
        """Remove a file; one that is not there is no error."""
        path.unlink(missing_ok=True)

    def make_directory(self, path: Path) -> None:
        """Make a directory for its owner alone; one that is there is no error."""
        path.mkdir(mode=0o700, exist_ok=True)


FILES: Final = Files()


def digest_of(data: bytes) -> Digest:
    """BLAKE3-256 of exact bytes."""
    return Digest(blake3(data).hexdigest())


def manifest_of(path: Path, files: Files = FILES) -> BlobManifest:
    """Read a file once and say what it consists of, in memory flat in its size.

    Raises:
        NotFound, StorageError: It cannot be read.
        InputError: It is empty.
    """
    whole, chunks, size_bytes = blake3(), [], 0
    with storage_errors(path):
        while data := files.read_at(path, size_bytes, CHUNK_BYTES):
            whole.update(data)
            chunks.append(digest_of(data))
            size_bytes += len(data)
    if not chunks:
        raise InputError(f"{path} is empty")
    return BlobManifest(blake3=Digest(whole.hexdigest()), size_bytes=size_bytes, chunk_blake3=tuple(chunks))


def check_manifest(manifest: BlobManifest, *, bytes_max: int) -> None:
    """Refuse what cannot be, before anything is kept for it; raises UsageError."""
    if not 0 < manifest.size_bytes <= bytes_max:
        raise UsageError(f"a blob of {manifest.size_bytes:,} bytes where 1 to {bytes_max:,} are allowed")
    wanted = -(-manifest.size_bytes // CHUNK_BYTES)
    if len(manifest.chunk_blake3) != wanted:
        raise UsageError(
            f"a blob of {manifest.size_bytes:,} bytes has {wanted} chunks, not {len(manifest.chunk_blake3)}"
        )


def chunk_bytes(manifest: BlobManifest, index: int) -> int:
    """Size of a chunk: 2 MiB, or what is left for the last."""
    return min(CHUNK_BYTES, manifest.size_bytes - index * CHUNK_BYTES)


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Raise DiskFull, NotFound or StorageError for an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no space left for {path}", hint="free some space; what has arrived is kept"
            ) from error
        if isinstance(error, FileNotFoundError):
            raise NotFound(f"{path} does not exist") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error


class PartialBlob:
    """A blob that is arriving: a file with holes beside the place where the whole will be.

    Threads may put different chunks at once. The file is opened for each: thousands of uploads at a time
    would else use up the process's handles.
    """

    def __init__(self, manifest: BlobManifest, *, path: Path, target: Path, files: Files = FILES) -> None:
        self.manifest = manifest
        self._path = path
        self._target = target
        self._files = files
        self._lock = threading.Lock()
        self._commit_lock = threading.Lock()
        self._present: set[int] | None = None
        self._committed = False

    @property
    def missing(self) -> tuple[int, ...]:
        """Indexes of the chunks that are not there yet, ascending; the first time it hashes what is there."""
        present = self._scanned()
        with self._lock:
            return tuple(index for index in range(len(self.manifest.chunk_blake3)) if index not in present)

    def put(self, index: int, data: bytes) -> None:
        """Check a chunk and write it where it belongs, without fsync. Idempotent.

        Raises:
            CorruptState: It is not the chunk that was declared.
            UsageError: There is no such chunk.
            DiskFull, StorageError: It cannot be written.
        """
        self._check(index, data)
        if index in self._scanned():
            return
        with storage_errors(self._path):
            self._files.write_at(self._path, index * CHUNK_BYTES, data)
        with self._lock:
            self._scanned_while_locked().add(index)

    def commit(self) -> None:
        """Check the whole, make it durable and give it its name. Idempotent.

        Raises:
            SubmissionRefused: Chunks are missing.
            CorruptState: The whole is not what was declared; all of it is thrown away.
            DiskFull, StorageError: It cannot be made durable; all of it is thrown away.
        """
        with self._commit_lock:
            if self._committed:
                return
            if missing := self.missing:
                raise SubmissionRefused(f"{len(missing)} chunks of blob {self.manifest.blake3} are missing")
            self._check_whole()
            self._settle()
            self._committed = True

    def discard(self) -> None:
        """Throw away what has arrived."""
        with self._lock:
            self._present = set()
        with contextlib.suppress(OSError):
            self._files.remove(self._path)

    def _check(self, index: int, data: bytes) -> None:
        if not 0 <= index < len(self.manifest.chunk_blake3):
            raise UsageError(f"blob {self.manifest.blake3} has no chunk {index}")
        wanted = self.manifest.chunk_blake3[index]
        if len(data) != chunk_bytes(self.manifest, index) or digest_of(data) != wanted:
            raise CorruptState(f"chunk {index} of blob {self.manifest.blake3} is not what was declared")

    def _check_whole(self) -> None:
        found = manifest_of(self._path, self._files)
        if found != self.manifest:
            self.discard()
            raise CorruptState(f"blob {self.manifest.blake3} is not what was declared")

    def _settle(self) -> None:
        """Give the whole its name, durably or not at all."""
        try:
            with storage_errors(self._target):
                self._files.sync(self._path)
                self._files.rename(self._path, self._target)
        except StorageError:
            self.discard()
            raise
        try:
            with storage_errors(self._target):
                self._files.sync(self._target.parent)
        except StorageError:
            self.discard()
            # A name that is not durable must not be found.
            with contextlib.suppress(OSError):
                self._files.remove(self._target)
            raise

    def _scanned(self) -> set[int]:
        with self._lock:
            return self._scanned_while_locked()

    def _scanned_while_locked(self) -> set[int]:
        if self._present is None:
            with storage_errors(self._path):
                self._present = set(self._scan())
        return self._present

    def _scan(self) -> Iterator[int]:
        """Indexes of the chunks that are there from an earlier process."""
        if not self._path.exists():
            return
        if self._path.stat().st_size > self.manifest.size_bytes:
            # Of another declaration under the same digest: one of the two is false.
            self._files.remove(self._path)
            return
        for index, wanted in enumerate(self.manifest.chunk_blake3):
            data = self._files.read_at(self._path, index * CHUNK_BYTES, chunk_bytes(self.manifest, index))
            if digest_of(data) == wanted:
                yield index


class BlobStore:
    """Blobs by digest. Threads may work on the same and on different blobs; one process owns ``root``."""

    def __init__(self, root: Path, files: Files = FILES) -> None:
        """Open the store at ``root``, which is made, with mode 0700, when it is not there.

        Raises:
            DiskFull, StorageError: It cannot be made.
        """
        self._root = root
        self._files = files
        self._lock = threading.Lock()
        self._arriving: dict[Digest, PartialBlob] = {}
        self._manifests: dict[Digest, BlobManifest] = {}
        self._durable: set[str] = set()
        with storage_errors(root):
            root.parent.mkdir(parents=True, exist_ok=True)
            for directory in (root, root / _PARTIAL):
                files.make_directory(directory)

    # --- arriving ---

    def begin(self, manifest: BlobManifest, *, bytes_max: int) -> Missing:
        """Declare a blob and say what of it is missing. Idempotent; nothing is written yet.

        Raises:
            UsageError: The manifest cannot be, is larger than ``bytes_max``, or differs from one that was
                declared before for the same digest.
            StorageError: What is there of it cannot be read.
        """
        check_manifest(manifest, bytes_max=bytes_max)
        partial = self._declare(manifest)
        if partial is None:
            return Missing(complete=True, missing=())
        return Missing(complete=False, missing=partial.missing)

    def put_chunk(self, name: Digest, index: int, data: bytes) -> None:
        """Take a chunk of a declared blob. Idempotent; a chunk of a blob that is whole is dropped.

        Raises:
            NotFound: The blob was not declared since this store was opened.
            CorruptState, UsageError, DiskFull, StorageError: As :meth:`PartialBlob.put`.
        """
        partial = self._arriving.get(name)
        if partial is not None:
            partial.put(index, data)
        elif not self.has(name):
            raise _not_declared(name)

    def commit(self, name: Digest) -> None:
        """Make a declared blob durable. Idempotent: a repeat waits for the first.

        Raises:
            NotFound: The blob was not declared since this store was opened.
            SubmissionRefused, CorruptState, DiskFull, StorageError: As :meth:`PartialBlob.commit`.
        """
        partial = self._arriving.get(name)
        if partial is None:
            if not self.has(name):
                raise _not_declared(name)
            return
        self._settle_directory(name[:2])
        try:
            partial.commit()
        except CorruptState:
            self._forget(name)
            raise
        self._remember(partial.manifest)
        self._forget(name)

    def add_file(self, source: Path, *, move: bool = False) -> BlobManifest:
        """Put a file into the store, durably; with ``move`` it is gone from its old place."""
        manifest = manifest_of(source, self._files)
        if not (move and self._take(source, manifest)):
            self._add(manifest, lambda index: self._read(source, index))
        if move:
            with storage_errors(source):
                self._files.remove(source)
        return manifest

    def add_bytes(self, data: bytes) -> BlobManifest:
        """Put bytes into the store, durably; raises InputError when there are none."""
        if not data:
            raise InputError("a blob of 0 bytes")
        chunks = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
        digests = tuple(digest_of(chunk) for chunk in chunks)
        manifest = BlobManifest(blake3=digest_of(data), size_bytes=len(data), chunk_blake3=digests)
        self._add(manifest, chunks.__getitem__)
        return manifest

    # --- there ---

    def has(self, name: Digest) -> bool:
        """Whether the whole blob is there, and durable."""
        with self._lock:
            return self._is_whole(name)

    def path(self, name: Digest) -> Path:
        """Where the blob is, or would be."""
        return self._root / name[:2] / digest(name)

    def manifest(self, name: Digest) -> BlobManifest:
        """What a blob consists of; the first time it reads the whole.

        Raises:
            NotFound: It is not there.
            CorruptState: The stored bytes are not those of this digest.
        """
        found = self._manifests.get(name)
        if found is None:
            if not self.has(name):
                raise NotFound(f"there is no blob {name}")
            found = manifest_of(self.path(name), self._files)
            if found.blake3 != name:
                raise _damaged(name)
            self._remember(found)
        return found

    def read_chunk(self, name: Digest, index: int) -> bytes:
        """A chunk, checked.

        Raises:
            NotFound: There is no such blob or chunk.
            CorruptState: The stored bytes are damaged.
        """
        manifest = self.manifest(name)
        if not 0 <= index < len(manifest.chunk_blake3):
            raise NotFound(f"blob {name} has no chunk {index}")
        data = self._read(self.path(name), index)
        if digest_of(data) != manifest.chunk_blake3[index]:
            raise _damaged(name)
        return data

    def digests(self) -> Iterator[Digest]:
        """All whole blobs, in order of their digests."""
        for path in sorted(self._root.glob("[0-9a-f][0-9a-f]/*")):
            yield digest(path.name)

    # --- going ---

    def remove(self, name: Digest) -> None:
        """Remove a blob, whole or arriving; one that is not there is no error."""
        with self._lock:
            partial = self._arriving.pop(name, None)
            self._manifests.pop(name, None)
        if partial is not None:
            partial.discard()
        with storage_errors(self._root):
            self._files.remove(self.path(name))
            self._files.remove(self._root / _PARTIAL / name)

    def sweep(self, keep: Container[Digest]) -> tuple[Digest, ...]:
        """Remove all that is not in ``keep``, also what is arriving; returns what was removed.

        ``keep`` is asked blob by blob, just before one goes. It has to hold what living leases declared.
        """
        arriving = [digest(path.name) for path in sorted((self._root / _PARTIAL).iterdir())]
        with self._lock:
            arriving += [name for name in self._arriving if name not in arriving]
        garbage = tuple(name for name in (*self.digests(), *arriving) if name not in keep)
        for name in garbage:
            self.remove(name)
        return garbage

    # --- inside ---

    def _declare(self, manifest: BlobManifest) -> PartialBlob | None:
        """The arriving blob that the manifest describes; None when the whole is there."""
        name = digest(manifest.blake3)
        with self._lock:
            partial = self._arriving.get(name)
            if partial is None:
                if self._is_whole(name):
                    return None
                path = self._root / _PARTIAL / name
                partial = PartialBlob(manifest, path=path, target=self.path(name), files=self._files)
                self._arriving[name] = partial
        if partial.manifest != manifest:
            raise UsageError(f"blob {name} was declared with other chunks")
        return partial

    def _add(self, manifest: BlobManifest, chunk: Callable[[int], bytes]) -> None:
        partial = self._declare(manifest)
        if partial is not None:
            for index in partial.missing:
                partial.put(index, chunk(index))
            self.commit(manifest.blake3)

    def _take(self, source: Path, manifest: BlobManifest) -> bool:
        """Move a file into its place; False when it lies on another file system."""
        target = self.path(manifest.blake3)
        self._settle_directory(manifest.blake3[:2])
        with storage_errors(target):
            try:
                self._files.sync(source)
                self._files.rename(source, target)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    return False
                raise
            self._files.sync(target.parent)
        self._remember(manifest)
        self._forget(manifest.blake3)
        return True

    def _read(self, path: Path, index: int) -> bytes:
        with storage_errors(path):
            return self._files.read_at(path, index * CHUNK_BYTES, CHUNK_BYTES)

    def _is_whole(self, name: Digest) -> bool:
        """Whether a blob is there and durable; the caller holds the lock.

        One that is being committed is not: it has its name a moment before the name is durable.
        """
        if name in self._arriving or not self.path(name).is_file():
            return False
        self._settle_directory(name[:2])
        return True

    def _settle_directory(self, prefix: str) -> None:
        """Make ``root/ab`` and its names durable, once.

        An earlier process may have died between a rename, or making the directory, and the fsync after it.
        """
        if prefix in self._durable:
            return
        with storage_errors(self._root / prefix):
            self._files.make_directory(self._root / prefix)
            self._files.sync(self._root / prefix)
            self._files.sync(self._root)
        self._durable.add(prefix)

    def _remember(self, manifest: BlobManifest) -> None:
        with self._lock:
            while len(self._manifests) >= MANIFESTS_CACHED:
                self._manifests.pop(next(iter(self._manifests)))
            self._manifests[manifest.blake3] = manifest

    def _forget(self, name: Digest) -> None:
        with self._lock:
            self._arriving.pop(name, None)


def _read_all(handle: int, offset: int, size: int) -> bytes:
    parts = []
    while size and (part := os.pread(handle, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _not_declared(name: Digest) -> NotFound:
    return NotFound(f"blob {name} was not declared", hint="send FindMissing first")


def _damaged(name: Digest) -> CorruptState:
    return CorruptState(
        f"the stored bytes of blob {name} are damaged", hint="restore the state directory from a backup"
    )
