"""A pulled grid: a directory with a run's modules, its router and what is needed to run any of its paths.

    weft-grid.json                  what is here: recipe, base, module files with version and digest, best versions
    router.router                   which path a text belongs to; absent where nothing was routed
    modules/<level.expert>@<version>.module
    weft-recipe.json, weft-manifest-<module>@<version>.json     the signed documents, for whoever verifies them again

``weft pull RUN --all --to DIR`` writes one; what it has verified against signatures is checked against digests when
the grid is opened.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Final

from blake3 import blake3

from weft.common.blobs import storage_errors
from weft.common.errors import InputError, UsageError, WeftError
from weft.common.ids import Digest, ModuleKey, Path, digest
from weft.common.manifest import parse_json
from weft.common.recipe import Recipe
from weft.common.routing import Router, check_router, read_router
from weft.common.settings import from_table, to_table
from weft.common.tensors import Float32Array, TensorFile, to_float32

GRID_FILE: Final = "weft-grid.json"
ROUTER_FILE: Final = "router.router"
_GRID_BYTES_MAX: Final = 64 << 20
_READ_BYTES: Final = 1 << 20
_AGAIN: Final = "pull it again: weft pull RUN --all --to DIR"


@dataclass(frozen=True, slots=True, kw_only=True)
class GridModule:
    """One version of a module in the directory."""

    module: str
    """``level.expert``."""
    version: int
    """Of the module."""
    blake3: Digest
    """Of the file."""

    def __post_init__(self) -> None:
        ModuleKey.parse(self.module)
        digest(self.blake3)
        if self.version < 0:
            raise UsageError(f"module {self.module} has version {self.version}")

    @property
    def file(self) -> str:
        """Name below the directory."""
        return f"modules/{self.module}@{self.version}.module"


@dataclass(frozen=True, slots=True, kw_only=True)
class BestVersions:
    """The versions under which a path's validation loss was lowest (early stopping)."""

    path: str
    """As ``Path`` writes it."""
    versions: tuple[int, ...]
    """By level."""
    validation_loss: float
    """Nats per label, on the path's own held-out documents."""

    def __post_init__(self) -> None:
        if len(Path.parse(self.path).experts) != len(self.versions):
            raise UsageError(f"path {self.path} has {len(self.versions)} best versions")


@dataclass(frozen=True, slots=True, kw_only=True)
class GridIndex:
    """What ``weft-grid.json`` says."""

    recipe: Recipe
    """Of the run."""
    base: str
    """Directory or Hub id of the base; empty when it has to be named."""
    modules: tuple[GridModule, ...]
    """All there are: the newest of each, and those that a path was best with."""
    router: Digest | None = None
    """Of the router's file, if there is one."""
    best: tuple[BestVersions, ...] = ()
    """Of the paths that were evaluated."""
    format: int = 1
    """Version of this file."""

    def __post_init__(self) -> None:
        if self.format != 1:
            raise UsageError(f"grid format {self.format} is not known here", hint="upgrade weft")
        if self.router is not None:
            digest(self.router)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid that was opened; arrays of shared modules are read once and shared."""

    directory: FilePath
    """Where it lies."""
    index: GridIndex
    """What is in it."""
    router: Router | None
    """Which path a text belongs to; None where nothing was routed."""
    _read: dict[GridModule, dict[str, Float32Array]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, directory: FilePath) -> Grid:
        """Read the index and the router of a grid; module files are checked when they are read.

        Raises:
            InputError: No grid, damaged, or incomplete; RouterMismatch when the router is another run's.
        """
        path = directory / GRID_FILE
        try:
            index = from_table(GridIndex, parse_json(path.read_bytes(), _GRID_BYTES_MAX))
        except OSError as error:
            raise InputError(
                f"{directory} is not a grid: cannot read {GRID_FILE}: {error.strerror}",
                hint="weft pull RUN --all --to DIR",
            ) from error
        except WeftError as error:
            raise InputError(f"{path} does not describe a grid: {error}", hint=_AGAIN) from error
        grid = cls(directory=directory, index=index, router=_router(directory, index))
        grid.check_complete()
        return grid

    @property
    def recipe(self) -> Recipe:
        """Of the run."""
        return self.index.recipe

    @property
    def paths(self) -> tuple[Path, ...]:
        """All paths of the run."""
        return self.recipe.topology.paths

    def check_complete(self) -> None:
        """Raise InputError unless every path has a version of each module, and each file is there."""
        missing = {str(key) for key in self.recipe.topology.modules} - {
            item.module for item in self.index.modules
        }
        if missing:
            raise InputError(f"{self.directory} lacks module {min(missing)}", hint=_AGAIN)
        for item in self.index.modules:
            if not (self.directory / item.file).is_file():
                raise InputError(f"{self.directory / item.file} is missing", hint=_AGAIN)

    def versions(self, path: Path, *, best: bool = False) -> tuple[GridModule, ...]:
        """The modules of a path, by level: the newest, or with ``best`` those that it was best with.

        A path that was never evaluated has no best versions; its newest are taken.
        """
        found = next((item for item in self.index.best if best and item.path == str(path)), None)
        if found is None:
            return tuple(self._newest(key) for key in path.modules)
        return tuple(
            self._version(key, version) for key, version in zip(path.modules, found.versions, strict=True)
        )

    def tensors(self, path: Path, *, best: bool = False) -> dict[str, Float32Array]:
        """All tensors of a path, float32 by name; paths that share a module get the same arrays.

        Raises:
            InputError: A file is not the one that was pulled.
        """
        tensors: dict[str, Float32Array] = {}
        for item in self.versions(path, best=best):
            if item not in self._read:
                self._read[item] = _read_module(self.directory / item.file, item)
            tensors |= self._read[item]
        return tensors

    def _newest(self, key: ModuleKey) -> GridModule:
        return max(
            (item for item in self.index.modules if item.module == str(key)), key=lambda item: item.version
        )

    def _version(self, key: ModuleKey, version: int) -> GridModule:
        for item in self.index.modules:
            if (item.module, item.version) == (str(key), version):
                return item
        raise InputError(f"{self.directory} lacks {key}@{version}", hint=_AGAIN)


def write_grid(
    to: FilePath,
    index: GridIndex,
    *,
    modules: Mapping[GridModule, FilePath],
    router: FilePath | None = None,
    documents: Mapping[str, bytes] | None = None,
) -> None:
    """Write a grid from files that were verified; it appears in one step.

    Args:
        to: A directory that does not exist or is empty.
        index: What it holds; ``index.router`` is the digest of ``router``.
        modules: Where the file of each of ``index.modules`` is.
        router: The router's file, if there is one.
        documents: Signed documents to put beside, by file name.

    Raises:
        UsageError: ``to`` is not empty.
        InputError: The files are not those of the index.
        DiskFull, StorageError: It cannot be written.
    """
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        raise UsageError(f"{to} is not empty", hint="give --to a directory that does not exist yet")
    partial = to.with_name(f".{to.name}.partial")
    with storage_errors(to):
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "modules").mkdir(parents=True)
        for item in index.modules:
            shutil.copyfile(modules[item], partial / item.file)
            _check_digest(partial / item.file, item.blake3)
        if router is not None:
            shutil.copyfile(router, partial / ROUTER_FILE)
        for name, content in (documents or {}).items():
            (partial / name).write_bytes(content)
        (partial / GRID_FILE).write_text(json.dumps(to_table(index), indent=1) + "\n")
        Grid.open(partial)
        if to.is_dir():
            to.rmdir()
        partial.replace(to)


def is_grid(directory: FilePath) -> bool:
    """Whether a directory says that it is a grid."""
    return (directory / GRID_FILE).is_file()


def _router(directory: FilePath, index: GridIndex) -> Router | None:
    if index.router is None:
        return None
    _check_digest(directory / ROUTER_FILE, index.router)
    router = read_router(directory / ROUTER_FILE)
    check_router(router, index.recipe)
    return router


def _read_module(path: FilePath, item: GridModule) -> dict[str, Float32Array]:
    _check_digest(path, item.blake3)
    with TensorFile(path) as file:
        return {spec.name: to_float32(file.array(spec.name), spec.dtype) for spec in file.header.specs}


def _check_digest(path: FilePath, expected: Digest) -> None:
    hasher = blake3()
    try:
        with path.open("rb") as file:
            while part := file.read(_READ_BYTES):
                hasher.update(part)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint=_AGAIN) from error
    if hasher.hexdigest() != expected:
        raise InputError(f"{path} is not the file that was pulled", hint=_AGAIN)
