"""Shards on disk: one file of documents for each path, and an index that says what they are.

``weft route shard`` writes them, ``routing.shards`` of a run file names the directory, and the coordinator gives each
task the file of its path. Documents that are held out for the operator's own judging lie apart, in ``heldout``; those
that are reserved for fitting the next router are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Final

from blake3 import blake3

from weft.common.blobs import storage_errors
from weft.common.documents import is_heldout
from weft.common.errors import InputError, UsageError
from weft.common.ids import Digest, Path, digest
from weft.common.manifest import parse_json
from weft.common.recipe import Recipe
from weft.common.routing.documents import RoutedDocument
from weft.common.routing.router import Router
from weft.common.settings import from_table, to_table

INDEX_FILE: Final = "index.json"
HELDOUT: Final = "heldout"
_INDEX_BYTES_MAX: Final = 4 << 20
HELDOUT_PURPOSE: Final = "heldout"
"""Which documents the operator keeps for judging, as ``is_heldout`` understands it."""
ROUTER_PURPOSE: Final = "router"
"""Which are reserved for fitting a discriminative router."""
_READ_BYTES: Final = 1 << 20
_BUFFER_BYTES: Final = 1 << 15
_AGAIN: Final = "make the shards again: weft route shard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The documents of one path."""

    path: str
    """As ``Path`` writes it."""
    file: str
    """Name in the directory."""
    blake3: Digest
    """Of the file."""
    size_bytes: int
    """Of the file."""
    num_documents: int
    """Lines of the file."""

    def __post_init__(self) -> None:
        Path.parse(self.path)
        digest(self.blake3)
        if self.file != shard_name(self.path):
            raise UsageError(f"the file of path {self.path} is {self.file!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex:
    """What a directory of shards holds."""

    router: Digest
    """Of the router's file, by which the documents were sent."""
    base: Digest
    """Of the base that the router sees documents through."""
    overlap: int
    """How many paths each document belongs to."""
    validation_share: float
    """Share of the documents that lies in ``heldout`` and in no shard."""
    router_share: float
    """Share of the documents that is reserved for fitting a router and lies nowhere here."""
    shards: tuple[Shard, ...]
    """One for each path, in the topology's order."""
    format: int = 1
    """Version of the index."""

    def shard_of(self, path: Path) -> Shard | None:
        """The shard of a path, if it has documents."""
        return next((item for item in self.shards if item.path == str(path) and item.num_documents), None)


def shard_name(path: str) -> str:
    """The file of a path's shard."""
    return f"path-{path}.jsonl"


def write_shards(
    to: FilePath,
    documents: Iterable[RoutedDocument],
    router: Router,
    *,
    overlap: int,
    validation_share: float,
    router_share: float,
) -> ShardIndex:
    """Write each document into the shards of its best ``overlap`` paths, or into the held-out file of its best one.

    Args:
        to: A new or empty directory.
        documents: With at least ``overlap`` routes each; one at a time is in memory.
        router: That routed them.
        overlap: Paths of a training document.
        validation_share: Share of the documents that is held out, chosen by their content.
        router_share: Share of the documents that is left out altogether, likewise.

    Raises:
        UsageError: The directory is not empty.
        DiskFull, StorageError: It cannot be written.
    """
    if to.exists() and any(to.iterdir()):
        raise UsageError(f"{to} is not empty", hint="give --to a directory that does not exist yet")
    with storage_errors(to):
        (to / HELDOUT).mkdir(parents=True)
        shards = [_Writer(to / shard_name(str(path))) for path in router.paths]
        heldout = [_Writer(to / HELDOUT / shard_name(str(path))) for path in router.paths]
        for document in documents:
            if is_heldout(document.row, router_share, purpose=ROUTER_PURPOSE):
                continue
            line = _line(document.row.columns)
            if is_heldout(document.row, validation_share, purpose=HELDOUT_PURPOSE):
                heldout[document.routes[0]].write(line)
                continue
            for route in document.routes[:overlap]:
                shards[route].write(line)
        index = ShardIndex(
            router=router.digest,
            base=router.base_digest,
            overlap=overlap,
            validation_share=validation_share,
            router_share=router_share,
            shards=tuple(writer.finish(path) for writer, path in zip(shards, router.paths, strict=True)),
        )
        for writer, path in zip(heldout, router.paths, strict=True):
            writer.finish(path)
        (to / INDEX_FILE).write_text(json.dumps(to_table(index), indent=1) + "\n")
    return index


def read_shards(directory: FilePath, recipe: Recipe | None = None) -> ShardIndex:
    """Read the index of a directory of shards and look for its files.

    Args:
        directory: What ``weft route shard`` wrote.
        recipe: When given, base and paths must be the run's.

    Raises:
        InputError: There is no index, a shard is missing or of another size, or they are another run's.
    """
    path = directory / INDEX_FILE
    try:
        index = from_table(ShardIndex, parse_json(path.read_bytes(), _INDEX_BYTES_MAX))
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror}", hint="weft route shard DATA --to DIR"
        ) from error
    except (UsageError, InputError, ValueError) as error:
        raise InputError(f"{path} is not an index of shards: {error}", hint=_AGAIN) from error
    for shard in index.shards:
        file = directory / shard.file
        if not file.is_file() or file.stat().st_size != shard.size_bytes:
            found = "is missing" if not file.is_file() else "is not the one that the index describes"
            raise InputError(f"the shard of path {shard.path} {found}: {file}", hint=_AGAIN)
    if recipe is not None:
        _check_run(path, index, recipe)
    return index


def check_shard(directory: FilePath, shard: Shard) -> None:
    """Raise InputError unless a shard's file has the digest of the index."""
    hasher = blake3()
    with (directory / shard.file).open("rb") as file:
        while part := file.read(_READ_BYTES):
            hasher.update(part)
    if hasher.hexdigest() != shard.blake3:
        raise InputError(f"the shard of path {shard.path} is damaged: {directory / shard.file}", hint=_AGAIN)


def _check_run(path: FilePath, index: ShardIndex, recipe: Recipe) -> None:
    if index.base != recipe.base.digest:
        raise InputError(
            f"{path} was made with base {index.base[:12]} and the run's is {recipe.base.digest[:12]}",
            hint=_AGAIN,
        )
    if [shard.path for shard in index.shards] != [str(item) for item in recipe.topology.paths]:
        raise InputError(f"{path} has other paths than the run's {recipe.topology.num_paths}", hint=_AGAIN)


def _line(columns: Mapping[str, Any]) -> bytes:
    return (
        json.dumps(dict(columns), ensure_ascii=False, default=_listed).encode("utf-8", "surrogatepass")
        + b"\n"
    )


def _listed(value: Any) -> Any:
    """Arrays of tables, such as a chat's messages from parquet."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


class _Writer:
    """One shard on its way to disk. Its file is open only while it is written to: there may be thousands."""

    def __init__(self, path: FilePath) -> None:
        self._path = path
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._hasher = blake3()
        self._num_documents = 0
        self._size_bytes = 0

    def write(self, line: bytes) -> None:
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._hasher.update(line)
        self._num_documents += 1
        self._size_bytes += len(line)
        if self._waiting_bytes > _BUFFER_BYTES:
            self._flush()

    def finish(self, path: Path) -> Shard:
        self._flush()
        return Shard(
            path=str(path),
            file=self._path.name,
            blake3=Digest(self._hasher.hexdigest()),
            size_bytes=self._size_bytes,
            num_documents=self._num_documents,
        )

    def _flush(self) -> None:
        with self._path.open("ab") as file:
            file.writelines(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
