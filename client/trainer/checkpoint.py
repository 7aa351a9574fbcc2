"""A checkpoint inside the inner loop, so that a worker that is preempted goes on where it was.

    tensors    parameter/NAME · exp_avg/NAME · exp_avg_sq/NAME [shape of NAME] · step/NAME [1]   float32
               losses [steps done] float64 · num_tokens [1] int64
    metadata   binding: what the training follows from · blake3: of the tensors' bytes, in order of their names

One strict tensor file, replaced whole. It is not synced to disk: after a power cut the digest does not fit, and what
does not fit is left aside with a warning, as is a file of another task. It never stands in a task's way: a
checkpoint that cannot be written is a warning too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from weft.client.trainer.optimiser import OptimiserState
from weft.common.blobs import storage_errors
from weft.common.errors import StorageError, TensorFileError
from weft.common.ids import Digest, ModuleKey
from weft.common.protocol import Task
from weft.common.tensors import Float32Array, TensorFile, canonical_json, write_tensors

logger = logging.getLogger(__name__)

TIME_SHARE_MAX: Final = 0.05
"""Of the time that may go into saving: what takes long to write is written more rarely than asked for."""
_PARAMETER: Final = "parameter"
_OPTIMISER: Final = ("exp_avg", "exp_avg_sq", "step")

Shapes = Mapping[ModuleKey, Mapping[str, tuple[int, ...]]]
"""Of the trained tensors, by module and name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerState:
    """How far a task is."""

    parameters: Mapping[ModuleKey, Mapping[str, Float32Array]]
    """Trained tensors by module and name."""
    optimiser: Mapping[ModuleKey, OptimiserState]
    """AdamW's state of each."""
    losses: tuple[float, ...]
    """Of each step done."""
    num_tokens: int
    """Tokens trained on."""


def binding_of(task: Task, *, first_batch: int) -> Digest:
    """What a checkpoint of a task is bound to: all that its training follows from, and nothing else.

    Neither the task's id nor the lease's epoch: who comes back after the lease is lost is given a new task, and where
    it has the same path, versions and position in the data its checkpoint is as good as before. Nor the number of
    steps, which may follow the worker's speed.
    """
    starts = [[start.module, start.blake3, start.train, start.steps_before] for start in task.modules]
    facts = [task.recipe_blake3, task.path, task.rank, first_batch, starts]
    return Digest(blake3(canonical_json(facts).encode()).hexdigest())


class InnerCheckpoint:
    """The file of one task.

    Args:
        path: Where, in a directory that there is.
        binding: Of the task, as ``binding_of`` gives it; only what was saved under the same is taken up.
        every_s: How often to save.
        clock: Monotonic seconds.
    """

    def __init__(self, path: Path, *, binding: Digest, every_s: float, clock: Callable[[], float]) -> None:
        self._path = path
        self._binding = binding
        self._every_s = every_s
        self._clock = clock
        self._due_s = clock() + every_s

    def due(self) -> bool:
        """Whether it is time to save."""
        return self._clock() >= self._due_s

    def save(self, state: InnerState) -> None:
        """Replace what was saved before; a failure is logged."""
        began_s = self._clock()
        tensors = _tensors(state)
        partial = self._path.with_name(f"{self._path.name}.partial")
        try:
            with storage_errors(partial):
                write_tensors(partial, tensors, {"binding": self._binding, "blake3": _digest(tensors)})
                partial.replace(self._path)
        except (StorageError, TensorFileError) as error:
            partial.unlink(missing_ok=True)
            logger.warning("no checkpoint within the task: %s", error)
        ended_s = self._clock()
        self._due_s = ended_s + max(self._every_s, (ended_s - began_s) / TIME_SHARE_MAX)

    def load(self, shapes: Shapes) -> InnerState | None:
        """What was saved of this task and fits ``shapes``, or None; says why a file is left aside."""
        if not self._path.exists():
            return None
        try:
            with TensorFile(self._path) as file:
                if file.header.metadata.get("binding") != self._binding:
                    logger.warning("%s is of another task and is left aside", self._path.name)
                    return None
                return _state(file, shapes)
        except TensorFileError as error:
            logger.warning("%s is left aside, the task starts from its beginning: %s", self._path.name, error)
            return None

    def remove(self) -> None:
        """Forget the task."""
        self._path.unlink(missing_ok=True)


def _tensors(state: InnerState) -> dict[str, npt.NDArray[Any]]:
    # Names are those of the path's tensors, of which no two modules have the same.
    tensors: dict[str, npt.NDArray[Any]] = {
        f"{_PARAMETER}/{name}": array
        for module in state.parameters.values()
        for name, array in module.items()
    }
    for optimiser in state.optimiser.values():
        tensors |= optimiser
    tensors["losses"] = np.array(state.losses, np.float64)
    tensors["num_tokens"] = np.array([state.num_tokens], np.int64)
    return tensors


def _digest(tensors: Mapping[str, npt.NDArray[Any]]) -> str:
    hasher = blake3(max_threads=blake3.AUTO)
    for name in sorted(tensors):
        hasher.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    return str(hasher.hexdigest())


def _state(file: TensorFile, shapes: Shapes) -> InnerState:
    expected = _expected(shapes)
    found = {spec.name: (spec.dtype, spec.shape) for spec in file.header.specs}
    num_steps = math.prod(found.get("losses", ("F64", (0,)))[1])
    if found != {**expected, "losses": ("F64", (num_steps,)), "num_tokens": ("I64", (1,))}:
        raise TensorFileError("it does not hold the tensors of this task")
    arrays = {name: file.array(name).copy() for name in found}
    if _digest(arrays) != file.header.metadata.get("blake3"):
        raise TensorFileError("it is damaged")
    return InnerState(
        parameters={
            key: {name: arrays[f"{_PARAMETER}/{name}"] for name in module} for key, module in shapes.items()
        },
        optimiser={
            key: {f"{part}/{name}": arrays[f"{part}/{name}"] for part in _OPTIMISER for name in module}
            for key, module in shapes.items()
        },
        losses=tuple(arrays["losses"].tolist()),
        num_tokens=int(arrays["num_tokens"][0]),
    )


def _expected(shapes: Shapes) -> dict[str, tuple[str, tuple[int, ...]]]:
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for module in shapes.values():
        for name, shape in module.items():
            expected |= {f"{part}/{name}": ("F32", shape) for part in (_PARAMETER, *_OPTIMISER[:2])}
            expected[f"step/{name}"] = ("F32", (1,))
    return expected
