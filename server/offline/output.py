"""The result on its way to disk: shards, a journal, and one rename.

Beside ``OUT`` grows ``OUT.partial``. Its shards have their full length and header from the start, so tensors
are written where they belong, in any order. When all tensors of a unit are written, one line of
``journal.jsonl`` says so, with their BLAKE3 digests. A merge that is started again over the same inputs keeps
what the journal names and the digests confirm, whatever the crash left of the page cache. At the end
everything is synced and ``OUT.partial`` is renamed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from weft.common.errors import ComputeError, DiskFull, StateLocked, StorageError, UsageError
from weft.common.modules import TensorSpec
from weft.common.tensors import DTYPES, FOREIGN, Entry, parse_header, render_header
from weft.server.merge.tiles import Float32
from weft.server.offline.sources import is_finite

JOURNAL: Final = "journal.jsonl"
_METADATA: Final = {"format": "pt"}
_INFINITY: Final = {"F16": 0x7C00, "BF16": 0x7F80}
"""Its bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One file of the result."""

    name: str
    """Of the file, in the result's directory."""
    stem: str
    """What the names of all files begin with that it is one model with."""
    header: bytes
    """Its JSON."""
    entries: Mapping[str, Entry]
    """Its tensors."""

    @property
    def data_start(self) -> int:
        """Offset of the data section."""
        return 8 + len(self.header)

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return self.data_start + max((entry.stop for entry in self.entries.values()), default=0)


def plan_shards(specs: Sequence[TensorSpec], *, stem: str, shard_bytes_max: int) -> tuple[Shard, ...]:
    """Cut tensors, in their order, into files of at most so many bytes, or of one tensor.

    Args:
        specs: What is stored, by the dtypes of the files.
        stem: ``model`` or ``adapter_model``, after the folder's name if they lie in one.
        shard_bytes_max: Longest data section.
    """
    groups: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        nbytes = spec.size * DTYPES[spec.dtype].itemsize
        if groups[-1] and size + nbytes > shard_bytes_max:
            groups.append([])
            size = 0
        groups[-1].append(spec)
        size += nbytes
    count = len(groups)
    names = [f"{stem}-{number:05d}-of-{count:05d}" for number in range(1, count + 1)] if count > 1 else [stem]
    return tuple(_shard(name, stem, group) for name, group in zip(names, groups, strict=True))


def _shard(name: str, stem: str, specs: Sequence[TensorSpec]) -> Shard:
    header = render_header(specs, _METADATA)
    size = sum(spec.size * DTYPES[spec.dtype].itemsize for spec in specs)
    entries = parse_header(header, size, FOREIGN).entries
    return Shard(name=f"{name}.safetensors", stem=stem, header=header, entries=entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What the journal says of a unit."""

    outputs: Mapping[str, str]
    """BLAKE3 of the stored bytes by tensor."""
    inputs: Mapping[str, Mapping[str, str]]
    """BLAKE3 of the bytes that were read, by input and tensor; empty where digests are off."""
    lost_square_sum: float
    """‖ΔW − recompressed‖²."""
    total_square_sum: float
    """‖ΔW‖²."""


class Output:
    """The files of a result while they are written; use as a context.

    Args:
        to: Where the result appears; must not exist, or be an empty directory.
        shards: Its weight files.
        identity: Digest of everything that decides the result: another merge's remains are refused.
        advance: Told how many bytes of the result were written.
        durable: Wait until all of it is on the disk.

    Raises:
        UsageError: ``to`` holds something, or the remains are of another merge.
        StateLocked: Another process writes the same result.
        DiskFull: There is too little space.
    """

    def __init__(
        self,
        to: Path,
        shards: Sequence[Shard],
        identity: str,
        *,
        advance: Callable[[int], None],
        durable: bool = True,
    ) -> None:
        self._to, self._shards, self._advance, self._durable = to, shards, advance, durable
        with _storage_errors(to):
            check_free(to)
        self.partial = to.with_name(f"{to.name}.partial")
        self._places = {name: (shard, entry) for shard in shards for name, entry in shard.entries.items()}
        self._stack = contextlib.ExitStack()
        self._files: dict[str, BinaryIO] = {}
        self._maps: dict[str, mmap.mmap] = {}
        try:
            with _storage_errors(to):
                self._journal = self._open(identity)
            self.done = self._resume(identity)
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._stack.close()

    def _open(self, identity: str) -> BinaryIO:
        fresh = not (self.partial / JOURNAL).exists()
        if fresh and self.partial.exists() and any(self.partial.iterdir()):
            raise UsageError(
                f"{self.partial} exists and is no merge of Weft's", hint="remove it, or give another --to"
            )
        self._to.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            _check_space(self._to.parent, sum(shard.size_bytes for shard in self._shards))
        self.partial.mkdir(exist_ok=True)
        journal = self._stack.enter_context((self.partial / JOURNAL).open("a+b", buffering=0))
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateLocked(f"another process is writing {self._to}", hint="wait for it") from error
        journal.seek(0)
        if b"\n" not in journal.read():  # new, or torn by a crash before its first line was there
            journal.truncate(0)
            journal.write(json.dumps({"merge": identity}).encode() + b"\n")
        for shard in self._shards:
            file = self._stack.enter_context(_create(self.partial, shard))
            self._files[shard.name] = file
            self._maps[shard.name] = self._stack.enter_context(
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            )
        return journal

    def _resume(self, identity: str) -> dict[str, Done]:
        self._journal.seek(0)
        first, *lines = (content := self._journal.read()).split(b"\n")
        if json.loads(first).get("merge") != identity:
            raise UsageError(
                f"{self.partial} was begun by another merge, or its inputs have changed since",
                hint=f"rm -r {self.partial}",
            )
        # A last line without its end was torn by a crash; the next one is not to be its end.
        self._journal.truncate(len(content) - len(lines.pop()))
        found = {}
        for line in lines:
            record = json.loads(line)
            name = record.pop("unit")
            done = Done(**record)
            if all(self.digest(tensor) == digest for tensor, digest in done.outputs.items()):
                found[name] = done
        return found

    def write(self, name: str, start: int, values: Float32) -> None:
        """Store elements from ``start`` of a tensor, rounded to its dtype.

        Raises:
            ComputeError: A value is not finite, or not once it is rounded.
        """
        dtype = self._places[name][1].spec.dtype
        stored = _stored(values, dtype)
        if not _all_finite(stored, dtype):
            raise ComputeError(
                f"the merged {name} is not finite as {dtype}, near element {start}",
                hint="an input holds NaN or infinity there, or --dtype has too small a range: use bf16 or fp32",
            )
        self.store(name, start, stored)

    def store(self, name: str, start: int, stored: npt.NDArray[Any]) -> None:
        """Store elements that have the dtype of the file already."""
        shard, entry = self._places[name]
        offset = shard.data_start + entry.start + start * stored.itemsize
        with _storage_errors(self._to):
            _write_all(
                self._files[shard.name].fileno(), np.ascontiguousarray(stored).view(np.uint8).data, offset
            )
        self._advance(stored.nbytes)

    def finish_unit(
        self,
        unit: str,
        done: Done,
    ) -> None:
        """Note that all tensors of a unit are written."""
        record = {"unit": unit, **{field: getattr(done, field) for field in Done.__slots__}}
        with _storage_errors(self._to):
            self._journal.write(json.dumps(record).encode() + b"\n")
        self.done[unit] = done

    def size_of(self, name: str) -> int:
        """Bytes of a tensor."""
        entry = self._places[name][1]
        return entry.stop - entry.start

    def digest(self, name: str) -> str:
        """BLAKE3-256 of a tensor as it is stored."""
        shard, entry = self._places[name]
        begin, stop = shard.data_start + entry.start, shard.data_start + entry.stop
        with memoryview(self._maps[shard.name]) as view:
            return blake3(view[begin:stop]).hexdigest()

    def publish(self, files: Mapping[str, bytes | Path]) -> None:
        """Add the other files and let the result appear, complete, at its place."""
        with _storage_errors(self._to):
            for name, content in (self._index() | dict(files)).items():
                if isinstance(content, Path):
                    shutil.copyfile(content, self.partial / name)
                else:
                    (self.partial / name).write_bytes(content)
            (self.partial / JOURNAL).unlink()
            for path in (*self.partial.rglob("*"), self.partial) if self._durable else ():
                _sync(path)
            self.partial.replace(self._to)
            if self._durable:
                _sync(self._to.resolve().parent)

    def _index(self) -> dict[str, bytes | Path]:
        stems = dict.fromkeys(shard.stem for shard in self._shards)
        models = {stem: [shard for shard in self._shards if shard.stem == stem] for stem in stems}
        return {
            f"{stem}.safetensors.index.json": _index_of(shards)
            for stem, shards in models.items()
            if len(shards) > 1
        }


def _index_of(shards: Sequence[Shard]) -> bytes:
    total = sum(shard.size_bytes - shard.data_start for shard in shards)
    places = {name: Path(shard.name).name for shard in shards for name in shard.entries}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    return json.dumps(index, indent=2).encode() + b"\n"


def _stored(values: Float32, dtype: str) -> npt.NDArray[Any]:
    if dtype == "F32":
        return values
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    if dtype == "BF16":  # torch rounds four times as fast as numpy can
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    raise ValueError(f"results are not stored as {dtype}")


def _all_finite(stored: npt.NDArray[Any], dtype: str) -> bool:
    if dtype == "F32":
        return is_finite(stored)
    # All bits of the exponent are set in infinity and NaN alone.
    largest = np.bitwise_and(stored.view(np.uint16), 0x7FFF).max(initial=0)
    return bool(largest < _INFINITY[dtype])


def _create(directory: Path, shard: Shard) -> BinaryIO:
    path = directory / shard.name
    path.parent.mkdir(exist_ok=True)
    file = path.open("r+b" if path.exists() else "w+b", buffering=0)
    _write_all(file.fileno(), memoryview(len(shard.header).to_bytes(8, "little") + shard.header), 0)
    os.ftruncate(file.fileno(), shard.size_bytes)
    return file


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def check_free(to: Path) -> None:
    """Raise UsageError if there is something at the place of a result."""
    if not to.name:
        raise UsageError(f"{to} is a directory already", hint="give a name: --to ./merged")
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise UsageError(f"{to} exists", hint="give a directory that does not exist yet")


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise DiskFull(
            f"the result takes {needed / 1e9:.1f} GB and {directory} has {free / 1e9:.1f} GB free",
            hint="free some space, or give another --to",
        )


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _storage_errors(to: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(
                f"no space left for {to}", hint="free space and run the same command again"
            ) from error
        raise StorageError(f"cannot write {to}: {error.strerror}", hint="give another --to") from error
