"""What a worker keeps of a run from task to task, and on disk from process to process.

AdamW's state, the codec's residual and the position in the data move on only when an update is accepted: what was
dropped has not happened. They are saved then.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weft.client.trainer.training import Trainer, TrainResult
from weft.common.blobs import storage_errors
from weft.common.codec import CODECS, ErrorFeedback
from weft.common.errors import TensorFileError
from weft.common.identity.files import private_directory
from weft.common.ids import Digest, ModuleKey
from weft.common.modules import Schema
from weft.common.recipe import Recipe
from weft.common.tensors import Float32Array, TensorFile, write_tensors

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RunOnWorker:
    """What a worker keeps in memory of a run."""

    recipe: Recipe
    recipe_digest: Digest
    base_dir: Path
    state: Path
    """What is kept of it on disk."""
    schemas: Mapping[ModuleKey, Schema] = field(default_factory=dict)
    trainer: Trainer | None = None
    num_batches: int = 0
    """Batches in accepted updates."""
    optimiser_states: dict[ModuleKey, dict[str, Float32Array]] = field(default_factory=dict)
    residuals: dict[ModuleKey, ErrorFeedback] = field(default_factory=dict)

    def recall(self) -> None:
        """Take up what an earlier process of this worker saved; what is damaged starts afresh."""
        for key, schema in self.schemas.items():
            optimiser, residual = self.state / f"{key}.optimiser", self.state / f"{key}.residual"
            try:
                if optimiser.exists():
                    self.optimiser_states[key] = _read_optimiser(optimiser, schema)
                if residual.exists():
                    self.residuals[key] = ErrorFeedback.load(residual, schema)
            except TensorFileError as error:
                logger.warning("module %s of %s starts afresh: %s", key, self.recipe.run, error)
        batches = self.state / "batches"
        text = batches.read_text() if batches.exists() else ""
        self.num_batches = int(text) if text.strip().isdecimal() else 0

    def advance(
        self,
        result: TrainResult,
        corrected: Mapping[ModuleKey, Mapping[str, Float32Array]],
        updates: Mapping[ModuleKey, Path],
    ) -> None:
        """The update was accepted: AdamW's state, the residual and the position in the data move on and are saved.

        Raises:
            DiskFull, StorageError: They cannot be saved.
        """
        self.num_batches += result.num_steps
        self.optimiser_states |= result.optimiser_states
        private_directory(self.state)
        with storage_errors(self.state):
            for key, state in result.optimiser_states.items():
                _write_whole(self.state / f"{key}.optimiser", functools.partial(_write_arrays, state))
            for key in result.deltas if CODECS[self.recipe.codec.kind].sparse else ():
                residual = self.residuals.setdefault(key, ErrorFeedback(self.schemas[key]))
                residual.keep(corrected[key], updates[key])
                residual.save(self.state / f"{key}.residual")
            _write_whole(self.state / "batches", lambda path: path.write_text(f"{self.num_batches}\n"))


def _write_arrays(arrays: Mapping[str, Float32Array], path: Path) -> None:
    write_tensors(path, arrays)


def _read_optimiser(path: Path, schema: Schema) -> dict[str, Float32Array]:
    """AdamW's state of a module, as its trainer gave it; raises TensorFileError when it is another module's."""
    with TensorFile(path) as file:
        state = {name: file.array(name).copy() for name in file.header.entries}
    if {name.partition("/")[2] for name in state} != {spec.name for spec in schema.tensors}:
        raise TensorFileError(f"{path.name} is not of this module")
    return state


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file wholly or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    write(partial)
    partial.replace(path)
