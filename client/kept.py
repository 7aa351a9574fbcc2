"""What a worker keeps of each path from task to task, and on disk from process to process.

    <run>/<path>/state.json                    the position in the data, and which files count
    <run>/<path>/<module>.optimiser-<n>        AdamW's state
    <run>/<path>/<module>.residual-<n>         what the codec left out of the updates so far
    <run>/<path>/<module>.carried-<n>          streaming: the worker's own parameters

A module that several paths share has a state of its own on each: it is trained on other data there. All of it moves on
only when an update is accepted: what was dropped has not happened. New files come first, then ``state.json`` is
replaced, so that a process that is killed in between finds the state before. In memory are only the paths used last.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Final

from weft.client.trainer.training import TrainResult
from weft.common.blobs import storage_errors
from weft.common.codec import CodecSettings, ErrorFeedback
from weft.common.errors import InputError, TensorFileError
from weft.common.identity.files import private_directory
from weft.common.ids import Digest, ModuleKey, Path
from weft.common.manifest import canonical_json, parse_json
from weft.common.modules import Schema
from weft.common.tensors import Float32Array, TensorFile, write_tensors

logger = logging.getLogger(__name__)

PATHS_IN_MEMORY: Final = 2
_INDEX: Final = "state.json"
_INDEX_BYTES_MAX: Final = 1 << 20
_VERSION: Final = "version"
"""Key of carried parameters' metadata: the version that they have taken up."""

Tensors = Mapping[str, Float32Array]


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """The worker's own parameters of a module, which go on from task to task (streaming fragments)."""

    tensors: Tensors
    """Float32, by name."""
    version: Digest
    """Of the published version that was mixed into them last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """Steps that were done while an update was on its way; they belong to the path's next task."""

    num_steps: int
    num_tokens: int
    losses: tuple[float, ...]
    tensors: Tensors
    """All of the path's parameters after them."""
    optimiser_states: Mapping[ModuleKey, Tensors]
    """AdamW's state after them."""


@dataclass(slots=True)
class PathState:
    """A path of a run on this worker, after its last accepted update."""

    num_batches: int = 0
    """Batches in accepted updates."""
    optimiser_states: dict[ModuleKey, Tensors] = field(default_factory=dict)
    residuals: dict[ModuleKey, ErrorFeedback] = field(default_factory=dict)
    carried: dict[ModuleKey, Carried] = field(default_factory=dict)
    """Only of runs that stream."""
    ahead: Ahead | None = None
    """In memory only: without it these steps are done again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What was sent of a module."""

    schema: Schema
    corrected: Tensors
    """The movement with the residual added, which the update was encoded from."""
    update: FilePath
    """The update file."""
    codec: CodecSettings


class PathStates:
    """The paths of a run; the ones used last stay in memory, all rest on disk.

    Args:
        directory: Of the run; made when something is first written.
        decay: ``codec.residual_decay``.
    """

    def __init__(self, directory: FilePath, *, decay: float = 1.0) -> None:
        self._directory = directory
        self._decay = decay
        self._used: OrderedDict[Path, PathState] = OrderedDict()

    def of(self, path: Path, schemas: Mapping[ModuleKey, Schema]) -> PathState:
        """The state of a path; what is damaged, or of tensors unlike ``schemas``, starts afresh."""
        state = self._used.get(path)
        if state is None or not _fits(state, schemas):
            state = self._recall(path, schemas)
        self._used[path] = state
        self._used.move_to_end(path)
        while len(self._used) > PATHS_IN_MEMORY:
            self._used.popitem(last=False)
        return state

    def advance(
        self,
        state: PathState,
        result: TrainResult,
        sent: Mapping[ModuleKey, Sent],
        carried: Mapping[ModuleKey, Carried],
    ) -> None:
        """An update of the path was accepted: its state moves on, in memory until it is saved."""
        state.num_batches += result.num_steps
        state.optimiser_states |= result.optimiser_states
        state.carried |= carried
        state.ahead = None
        for key, what in sent.items():
            if what.codec.keeps_residual or key in state.residuals:
                fresh = ErrorFeedback(what.schema, decay=self._decay)
                state.residuals.setdefault(key, fresh).keep(what.corrected, what.update)

    def save(self, path: Path, state: PathState, *, changed: Iterable[ModuleKey]) -> None:
        """Save what moved on of the modules ``changed``; raises DiskFull, StorageError."""
        with storage_errors(self._directory):
            self._save(self._directory / str(path), state, changed)

    # ---- on disk -------------------------------------------------------------------------------------------------

    def _save(self, directory: FilePath, state: PathState, changed: Iterable[ModuleKey]) -> None:
        private_directory(directory)
        files = _read_index(directory).files
        for key in changed:
            if key in state.optimiser_states:
                name = files[f"{key}.optimiser"] = f"{key}.optimiser-{state.num_batches}"
                write_tensors(directory / name, state.optimiser_states[key])
            if key in state.residuals:
                name = files[f"{key}.residual"] = f"{key}.residual-{state.num_batches}"
                state.residuals[key].save(directory / name)
            if key in state.carried:
                name = files[f"{key}.carried"] = f"{key}.carried-{state.num_batches}"
                carried = state.carried[key]
                write_tensors(directory / name, carried.tensors, {_VERSION: carried.version})
        partial = directory / f"{_INDEX}.partial"
        partial.write_bytes(canonical_json({"num_batches": state.num_batches, "files": dict(files)}))
        partial.replace(directory / _INDEX)
        for file in directory.iterdir():
            if file.name != _INDEX and file.name not in files.values():
                file.unlink()

    def _recall(self, path: Path, schemas: Mapping[ModuleKey, Schema]) -> PathState:
        directory = self._directory / str(path)
        index = _read_index(directory)
        state = PathState(num_batches=index.num_batches)
        for key, schema in schemas.items():
            named = {
                kind: directory / name
                for kind in ("optimiser", "residual", "carried")
                if (name := index.files.get(f"{key}.{kind}"))
            }
            try:
                if "optimiser" in named:
                    state.optimiser_states[key] = _read_optimiser(named["optimiser"], schema)
                if "residual" in named:
                    residual = ErrorFeedback.load(named["residual"], schema, decay=self._decay)
                    state.residuals[key] = residual
                if "carried" in named:
                    state.carried[key] = _read_carried(named["carried"], schema)
            except TensorFileError as error:
                logger.warning("module %s on path %s starts afresh: %s", key, path, error)
        return state


@dataclass(frozen=True, slots=True)
class _Index:
    num_batches: int = 0
    files: dict[str, str] = field(default_factory=dict)
    """Names of files, by module and kind."""


def _read_index(directory: FilePath) -> _Index:
    path = directory / _INDEX
    if not path.exists():
        return _Index()
    try:
        table: Any = parse_json(path.read_bytes(), _INDEX_BYTES_MAX)
        return _Index(int(table["num_batches"]), dict(table["files"]))
    except (InputError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s is damaged, the path starts afresh: %s", path, error)
        return _Index()


def _fits(state: PathState, schemas: Mapping[ModuleKey, Schema]) -> bool:
    """Whether what is in memory has the shapes that the task's modules have."""
    return all(
        state.optimiser_states[key][f"exp_avg/{spec.name}"].shape == spec.shape
        for key, schema in schemas.items()
        if key in state.optimiser_states
        for spec in schema.tensors
    )


def _read_optimiser(path: FilePath, schema: Schema) -> Tensors:
    """AdamW's state of a module, as its trainer gave it; raises TensorFileError when it is of other tensors."""
    expected = {
        f"{part}/{spec.name}": (1,) if part == "step" else spec.shape
        for spec in schema.tensors
        for part in ("exp_avg", "exp_avg_sq", "step")
    }
    with TensorFile(path) as file:
        if {spec.name: spec.shape for spec in file.header.specs} != expected:
            raise TensorFileError(f"{path.name} is not of this module")
        return {name: file.array(name).copy() for name in expected}


def _read_carried(path: FilePath, schema: Schema) -> Carried:
    with TensorFile(path) as file:
        if set(file.header.specs) != set(schema.tensors) or _VERSION not in file.header.metadata:
            raise TensorFileError(f"{path.name} is not of this module")
        tensors = {spec.name: file.array(spec.name).copy() for spec in schema.tensors}
        return Carried(tensors=tensors, version=Digest(file.header.metadata[_VERSION]))
