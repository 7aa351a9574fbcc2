"""Which documents a path learns from, and which are held out, in each of the three modes of routing.

    none    all of the worker's own data, whatever the path; nothing is held out
    given   the path's shard, which comes with the task
    local   the worker's own documents that the run's router sends to the path

Documents are held out by a digest of what is in them (``weft.common.documents.is_heldout``), so the same ones for all
versions, paths and restarts, and never one that was learnt. Routes are kept in a file, by data and router: computing
them takes a pass of the base over the beginning of each document.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from weft.client.data import sequences_of
from weft.common.blobs import storage_errors
from weft.common.documents import files_below, is_heldout, read_rows
from weft.common.errors import DataError, TensorFileError
from weft.common.identity.files import private_directory
from weft.common.ids import Digest, Path
from weft.common.recipe import Recipe, RoutingMode
from weft.common.routing import FeatureBase, Router, route_documents
from weft.common.sequences import Row, Tokenizer
from weft.common.statements import Holding
from weft.common.tensors import TensorFile, canonical_json, write_tensors

logger = logging.getLogger(__name__)

Routes = npt.NDArray[np.int64]
"""[N, n] indices of each document's paths, best first."""
OnDocuments = Callable[[int], None]
"""Told how many documents were looked at; may raise to break off."""
ROUTES_KEPT: Final = 4
_CHUNK_ROWS: Final = 1024
_REPORT_ROWS: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Where a path's documents are."""

    recipe: Recipe
    path: Path
    data: FilePath
    """A path's shard, or the worker's own data."""
    routes: Routes | None = None
    """Of the worker's own documents, where it routes them."""

    @property
    def where(self) -> str:
        """For messages."""
        match self.recipe.routing.mode:
            case RoutingMode.NONE:
                return str(self.data)
            case RoutingMode.GIVEN:
                return f"the shard of path {self.path}"
            case RoutingMode.LOCAL:
                return f"what {self.data} has for path {self.path}"

    def learnt(self) -> Iterator[Row]:
        """The documents to learn from; errors of ``read_rows``."""
        if self.recipe.routing.mode is RoutingMode.NONE:
            return read_rows(self.data)
        return self._split(heldout=False)

    def heldout(self) -> Iterator[Row]:
        """The documents to evaluate on; there may be none.

        Raises:
            DataError: Documents are not routed, or they cannot be read.
        """
        if self.recipe.routing.mode is RoutingMode.NONE:
            raise DataError(
                f"{self.recipe.run} does not route documents, and so holds none of them out",
                hint='set routing.mode to "given" or "local", or paths.evaluate_every = 0',
            )
        return self._split(heldout=True)

    def _split(self, *, heldout: bool) -> Iterator[Row]:
        share = self.recipe.routing.validation_share
        return (row for row in self._of_path() if is_heldout(row, share) is heldout)

    def _of_path(self) -> Iterator[Row]:
        rows = read_rows(self.data)
        if self.routes is None:
            return rows
        index = self.recipe.topology.paths.index(self.path)
        belongs = (self.routes == index).any(axis=1)
        return itertools.compress(rows, belongs.tolist())


class RoutesFile:
    """Routes of one data set by one router, on disk.

    Args:
        directory: Of all routes.
        data: The worker's own data.
        recipe: Says to how many paths a document belongs.
        router: Digest of the router.
    """

    def __init__(self, directory: FilePath, data: FilePath, recipe: Recipe, router: Digest) -> None:
        self._directory = directory
        self._num_paths = recipe.topology.num_paths
        self._overlap = min(recipe.routing.overlap, self._num_paths)
        self._path = directory / f"{router[:16]}-{_fingerprint(data)[:16]}-{self._overlap}.routes"
        self._data = data

    def read_or_make(
        self, base: FeatureBase, router: Callable[[], Router], on_documents: OnDocuments
    ) -> Routes:
        """The routes of every document, in the order in which they are read.

        Args:
            base: Sees the documents.
            router: Called when they have to be computed.
            on_documents: Follows it.

        Raises:
            DataError: The data cannot be read, or hold no document.
            DiskFull, StorageError: The routes cannot be kept.
        """
        if self._path.exists():
            try:
                return self._read()
            except TensorFileError as error:
                logger.warning("documents are routed anew: %s", error)
        routes = self._route(base, router(), on_documents)
        private_directory(self._directory)
        with storage_errors(self._directory):
            partial = self._path.with_suffix(".partial")
            write_tensors(partial, {"routes": routes})
            partial.replace(self._path)
            keep_newest(self._directory, {self._path}, num_kept=ROUTES_KEPT)
        return routes

    def _read(self) -> Routes:
        with TensorFile(self._path) as file:
            shapes = {spec.name: spec.shape for spec in file.header.specs}
            if shapes.keys() != {"routes"} or shapes["routes"][1:] != (self._overlap,):
                raise TensorFileError(f"{self._path.name} does not hold routes")
            routes = np.array(file.array("routes"), np.int64)
        if len(routes) and not 0 <= routes.min() <= routes.max() < self._num_paths:
            raise TensorFileError(f"{self._path.name} names paths that there are not")
        return routes

    def _route(self, base: FeatureBase, router: Router, on_documents: OnDocuments) -> Routes:
        routes: list[tuple[int, ...]] = []
        for document in route_documents(read_rows(self._data), base, router, top_n=self._overlap):
            routes.append(document.routes)
            if len(routes) % _REPORT_ROWS == 0:
                on_documents(len(routes))
        if not routes:
            raise DataError(f"{self._data} holds no document", hint="give data with text in it")
        return np.array(routes, np.int64)


def holdings_of(
    data: FilePath, routes: Routes, recipe: Recipe, tokenizer: Tokenizer, on_documents: OnDocuments
) -> tuple[Holding, ...]:
    """How much of the data each path gets: all that leaves this machine of documents that it routes.

    Sequences are those that the documents which are not held out fill; fewer than one batch of them count as none,
    since nothing can be trained on them. Windows in which nothing would be learnt are counted too.

    Raises:
        DataError: The data cannot be read.
    """
    num_paths, share = recipe.topology.num_paths, recipe.routing.validation_share
    num_documents = np.bincount(routes.reshape(-1), minlength=num_paths)
    sizes = np.zeros(num_paths, np.int64)
    rows = zip(read_rows(data), routes.tolist(), strict=True)
    num_seen = 0
    while chunk := tuple(itertools.islice(rows, _CHUNK_ROWS)):
        by_path: dict[int, list[Row]] = {}
        for row, paths in chunk:
            for path in () if is_heldout(row, share) else paths:
                by_path.setdefault(path, []).append(row)
        for path, of_path in by_path.items():
            sizes[path] += _size(of_path, recipe, tokenizer)
        num_seen += len(chunk)
        on_documents(num_seen)
    return tuple(
        Holding(path=str(path), num_documents=int(count), num_sequences=_num_sequences(int(size), recipe))
        for path, count, size in zip(recipe.topology.paths, num_documents, sizes, strict=True)
        if count
    )


def _size(rows: list[Row], recipe: Recipe, tokenizer: Tokenizer) -> int:
    """Tokens of documents; of a classification, the documents."""
    sequences = sequences_of(rows, tokenizer, recipe)
    return len(sequences) if recipe.task.num_labels else sequences.num_tokens


def _num_sequences(size: int, recipe: Recipe) -> int:
    num_sequences = size if recipe.task.num_labels else max(0, size - 1) // recipe.inner.sequence_length
    return num_sequences if num_sequences >= recipe.inner.batch_size else 0


def _fingerprint(data: FilePath) -> Digest:
    """Changes when files come, go or are written to."""
    files = [data] if data.is_file() else files_below(data)
    facts = [[str(file), *_facts(file.stat())] for file in files]
    return Digest(blake3(canonical_json(facts).encode()).hexdigest())


def _facts(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def keep_newest(directory: FilePath, keep: set[FilePath], *, num_kept: int) -> None:
    """Remove files that are neither in use nor among the newest; raises StorageError."""
    with storage_errors(directory):
        by_age = sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in by_age[num_kept:]:
            if path not in keep:
                path.unlink()
