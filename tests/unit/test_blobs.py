import errno
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from weft.common.blobs import (
    BlobStore,
    Files,
    PartialBlob,
    check_manifest,
    digest_of,
    manifest_of,
)
from weft.common.errors import (
    CorruptState,
    DiskFull,
    InputError,
    NotFound,
    StorageError,
    SubmissionRefused,
    UsageError,
)
from weft.common.ids import Digest
from weft.common.protocol import CHUNK_BYTES, BlobManifest, Missing

DATA = bytes(range(251)) * 20_000  # three chunks, the last one short
BYTES_MAX = 10 * CHUNK_BYTES


def chunk(index: int, data: bytes = DATA) -> bytes:
    return data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def manifest(source: Path) -> BlobManifest:
    return manifest_of(source)


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def upload(store: BlobStore, manifest: BlobManifest, data: bytes = DATA) -> None:
    for index in store.begin(manifest, bytes_max=BYTES_MAX).missing:
        store.put_chunk(manifest.blake3, index, chunk(index, data))
    store.commit(manifest.blake3)


class Failing(Files):
    """Fails the n-th operation that changes the disk, counted from 0; a sticky one fails all later ones too."""

    def __init__(self, at: int, code: int, *, sticky: bool = False) -> None:
        self.at, self.code, self.sticky = at, code, sticky
        self.steps = self.failures = 0

    def _step(self) -> None:
        self.steps += 1
        if self.steps - 1 == self.at or (self.sticky and self.steps - 1 > self.at):
            self.failures += 1
            raise OSError(self.code, os.strerror(self.code))

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        self._step()
        super().write_at(path, offset, data)

    def sync(self, path: Path) -> None:
        self._step()
        super().sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)


def test_manifest_names_all_chunks(manifest: BlobManifest) -> None:
    assert manifest.size_bytes == len(DATA)
    assert manifest.blake3 == digest_of(DATA)
    assert manifest.chunk_blake3 == tuple(digest_of(chunk(index)) for index in range(3))


def test_upload_in_any_order_becomes_one_private_file(store: BlobStore, manifest: BlobManifest) -> None:
    assert store.begin(manifest, bytes_max=BYTES_MAX) == Missing(complete=False, missing=(0, 1, 2))
    for index in (2, 0, 1):
        assert not store.has(manifest.blake3)
        store.put_chunk(manifest.blake3, index, chunk(index))
    store.commit(manifest.blake3)
    path = store.path(manifest.blake3)
    assert path.read_bytes() == DATA
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parents[1].stat().st_mode) == 0o700
    assert store.has(manifest.blake3)
    assert store.manifest(manifest.blake3) == manifest
    assert [store.read_chunk(manifest.blake3, index) for index in range(3)] == [chunk(i) for i in range(3)]
    assert list(store.digests()) == [manifest.blake3]


def test_repeats_change_nothing(store: BlobStore, manifest: BlobManifest) -> None:
    upload(store, manifest)
    store.put_chunk(manifest.blake3, 0, chunk(0))
    store.commit(manifest.blake3)
    assert store.begin(manifest, bytes_max=BYTES_MAX) == Missing(complete=True, missing=())
    assert store.path(manifest.blake3).read_bytes() == DATA


def test_upload_resumes_in_another_process(tmp_path: Path, store: BlobStore, manifest: BlobManifest) -> None:
    store.begin(manifest, bytes_max=BYTES_MAX)
    store.put_chunk(manifest.blake3, 1, chunk(1))
    again = BlobStore(tmp_path / "blobs")
    with pytest.raises(NotFound, match="not declared"):
        again.put_chunk(manifest.blake3, 0, chunk(0))
    with pytest.raises(NotFound, match="not declared"):
        again.commit(manifest.blake3)
    assert again.begin(manifest, bytes_max=BYTES_MAX).missing == (0, 2)
    upload(again, manifest)
    assert again.path(manifest.blake3).read_bytes() == DATA


def test_damaged_part_is_found_when_it_is_resumed(
    tmp_path: Path, store: BlobStore, manifest: BlobManifest
) -> None:
    store.begin(manifest, bytes_max=BYTES_MAX)
    for index in range(3):
        store.put_chunk(manifest.blake3, index, chunk(index))
    part = tmp_path / "blobs" / "partial" / manifest.blake3
    part.write_bytes(b"\xff" + part.read_bytes()[1:])
    assert BlobStore(tmp_path / "blobs").begin(manifest, bytes_max=BYTES_MAX).missing == (0,)


def test_part_that_is_too_long_is_thrown_away(
    tmp_path: Path, store: BlobStore, manifest: BlobManifest
) -> None:
    (tmp_path / "blobs" / "partial" / manifest.blake3).write_bytes(DATA + b"more")
    assert store.begin(manifest, bytes_max=BYTES_MAX).missing == (0, 1, 2)
    upload(store, manifest)
    assert store.path(manifest.blake3).read_bytes() == DATA


@pytest.mark.parametrize("bad", [b"", b"x" * 10, chunk(1), chunk(0)[:-1] + b"?"])
def test_wrong_chunk_is_not_written(store: BlobStore, manifest: BlobManifest, bad: bytes) -> None:
    store.begin(manifest, bytes_max=BYTES_MAX)
    with pytest.raises(CorruptState, match="chunk 0"):
        store.put_chunk(manifest.blake3, 0, bad)
    assert store.begin(manifest, bytes_max=BYTES_MAX).missing == (0, 1, 2)


def test_chunk_that_does_not_exist_is_refused(store: BlobStore, manifest: BlobManifest) -> None:
    store.begin(manifest, bytes_max=BYTES_MAX)
    with pytest.raises(UsageError, match="no chunk 3"):
        store.put_chunk(manifest.blake3, 3, b"x")


def test_commit_before_all_is_there_is_refused(store: BlobStore, manifest: BlobManifest) -> None:
    store.begin(manifest, bytes_max=BYTES_MAX)
    store.put_chunk(manifest.blake3, 0, chunk(0))
    with pytest.raises(SubmissionRefused, match="2 chunks"):
        store.commit(manifest.blake3)
    assert store.begin(manifest, bytes_max=BYTES_MAX).missing == (1, 2)


def test_chunks_that_do_not_make_the_whole_are_thrown_away(
    tmp_path: Path, store: BlobStore, manifest: BlobManifest
) -> None:
    false = BlobManifest(
        blake3=Digest("ab" * 32), size_bytes=manifest.size_bytes, chunk_blake3=manifest.chunk_blake3
    )
    with pytest.raises(CorruptState, match="not what was declared"):
        upload(store, false)
    assert list((tmp_path / "blobs").glob("*/*")) == []
    with pytest.raises(NotFound):
        store.commit(false.blake3)


def test_another_declaration_of_the_same_digest_is_refused(store: BlobStore, manifest: BlobManifest) -> None:
    store.begin(manifest, bytes_max=BYTES_MAX)
    other = BlobManifest(
        blake3=manifest.blake3, size_bytes=manifest.size_bytes, chunk_blake3=manifest.chunk_blake3[::-1]
    )
    with pytest.raises(UsageError, match="other chunks"):
        store.begin(other, bytes_max=BYTES_MAX)


@pytest.mark.parametrize(
    ("size_bytes", "num_chunks"),
    [(0, 0), (0, 1), (CHUNK_BYTES, 2), (CHUNK_BYTES + 1, 1), (BYTES_MAX + 1, 11), (1, 10**5)],
)
def test_impossible_manifest_is_refused_before_anything_is_kept(
    tmp_path: Path, store: BlobStore, size_bytes: int, num_chunks: int
) -> None:
    chunks = (Digest("cd" * 32),) * num_chunks
    false = BlobManifest(blake3=Digest("ab" * 32), size_bytes=size_bytes, chunk_blake3=chunks)
    with pytest.raises(UsageError):
        store.begin(false, bytes_max=BYTES_MAX)
    with pytest.raises(UsageError):
        check_manifest(false, bytes_max=BYTES_MAX)
    assert list((tmp_path / "blobs" / "partial").iterdir()) == []


def test_names_are_never_paths(store: BlobStore, manifest: BlobManifest) -> None:
    for name in ("../../etc/passwd", "ab/../cd", "", "AB" * 32):
        with pytest.raises(ValueError, match="digest"):
            store.path(Digest(name))


@pytest.mark.parametrize("known", [False, True], ids=["first-read", "known-manifest"])
def test_stored_damage_is_found_before_use(
    tmp_path: Path, store: BlobStore, manifest: BlobManifest, known: bool
) -> None:
    upload(store, manifest)
    path = store.path(manifest.blake3)
    data = bytearray(DATA)
    data[CHUNK_BYTES + 5] ^= 1
    path.write_bytes(data)
    reader = store if known else BlobStore(tmp_path / "blobs")
    with pytest.raises(CorruptState, match="damaged"):
        reader.read_chunk(manifest.blake3, 1)
    if known:
        assert reader.read_chunk(manifest.blake3, 0) == chunk(0)


def test_what_is_not_there(store: BlobStore, manifest: BlobManifest) -> None:
    with pytest.raises(NotFound, match="no blob"):
        store.manifest(manifest.blake3)
    upload(store, manifest)
    for index in (3, -1):
        with pytest.raises(NotFound, match="no chunk"):
            store.read_chunk(manifest.blake3, index)


@pytest.mark.parametrize("move", [False, True])
def test_files_and_bytes_are_added(store: BlobStore, source: Path, move: bool) -> None:
    manifest = store.add_file(source, move=move)
    assert source.exists() is not move
    assert store.path(manifest.blake3).read_bytes() == DATA
    assert store.add_bytes(DATA) == manifest
    assert list(store.digests()) == [manifest.blake3]
    with pytest.raises(InputError, match="0 bytes"):
        store.add_bytes(b"")


def test_file_is_copied_when_it_cannot_be_moved(tmp_path: Path, source: Path) -> None:
    class OtherDisk(Files):
        def rename(self, source: Path, target: Path) -> None:
            if source.parent == tmp_path:
                raise OSError(errno.EXDEV, "another disk")
            super().rename(source, target)

    store = BlobStore(tmp_path / "blobs", OtherDisk())
    manifest = store.add_file(source, move=True)
    assert not source.exists()
    assert store.path(manifest.blake3).read_bytes() == DATA


def test_empty_and_missing_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        manifest_of(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="empty"):
        manifest_of(tmp_path / "empty")


def test_sweep_removes_all_but_what_is_kept(tmp_path: Path, store: BlobStore, manifest: BlobManifest) -> None:
    kept, gone = store.add_bytes(b"kept"), store.add_bytes(b"gone")
    store.begin(manifest, bytes_max=BYTES_MAX)
    store.put_chunk(manifest.blake3, 0, chunk(0))
    assert store.sweep({kept.blake3, manifest.blake3}) == (gone.blake3,)
    store.put_chunk(manifest.blake3, 1, chunk(1))
    assert store.sweep({kept.blake3}) == (manifest.blake3,)
    assert list(store.digests()) == [kept.blake3]
    assert list((tmp_path / "blobs" / "partial").iterdir()) == []
    with pytest.raises(NotFound):
        store.put_chunk(manifest.blake3, 2, chunk(2))
    assert BlobStore(tmp_path / "blobs").sweep(()) == (kept.blake3,)


def test_two_workers_send_the_same_blob_at_once(store: BlobStore, manifest: BlobManifest) -> None:
    def work(_: int) -> None:
        upload(store, manifest)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert store.path(manifest.blake3).read_bytes() == DATA


# --- failing disks: every step, once and for ever ---


def steps_of(action: Callable[[Path, Files], None], tmp_path: Path) -> int:
    counting = Failing(at=-1, code=errno.EIO)
    action(tmp_path / "counted", counting)
    return counting.steps


def send(root: Path, files: Files) -> None:
    store = BlobStore(root, files)
    small = b"small"
    manifest = BlobManifest(blake3=digest_of(small), size_bytes=5, chunk_blake3=(digest_of(small),))
    for index in store.begin(manifest, bytes_max=BYTES_MAX).missing:
        store.put_chunk(manifest.blake3, index, small)
    store.commit(manifest.blake3)
    assert store.has(manifest.blake3)


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "sticky"])
@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, StorageError)]
)
def test_no_failure_of_the_disk_is_taken_for_success(
    tmp_path: Path, code: int, kind: type[StorageError], sticky: bool
) -> None:
    num_steps = steps_of(send, tmp_path)
    assert num_steps > 5
    for at in range(num_steps):
        files = Failing(at, code, sticky=sticky)
        root = tmp_path / f"{code}-{sticky}-{at}"
        with pytest.raises(kind):
            send(root, files)
        assert files.failures
        # Nothing is found under its name that was not answered; and with space again all goes well.
        whole = list(root.glob("[0-9a-f][0-9a-f]/*"))
        assert whole == []
        send(root, Files())


def test_failed_fsync_throws_the_bytes_away(tmp_path: Path) -> None:
    class NoSync(Files):
        broken = False

        def sync(self, path: Path) -> None:
            if self.broken and path.name == "part":
                raise OSError(errno.EIO, "lost pages")
            super().sync(path)

    files = NoSync()
    manifest = BlobManifest(blake3=digest_of(b"x"), size_bytes=1, chunk_blake3=(digest_of(b"x"),))
    partial = PartialBlob(manifest, path=tmp_path / "part", target=tmp_path / "whole", files=files)
    partial.put(0, b"x")
    files.broken = True
    with pytest.raises(StorageError, match="lost pages"):
        partial.commit()
    files.broken = False
    assert partial.missing == (0,)
    with pytest.raises(SubmissionRefused):
        partial.commit()
    partial.put(0, b"x")
    partial.commit()
    partial.commit()
    assert (tmp_path / "whole").read_bytes() == b"x"
