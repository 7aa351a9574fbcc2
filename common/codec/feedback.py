"""Error feedback: what a codec leaves out of one update is added to the next.

With residual e, delta d and codec C, the worker sends C(e + d) and keeps e ← e + d − C(e + d), so that
everything is sent in the end (Seide et al. 2014; Karimireddy et al., arXiv 1901.09847). With a decay β below 1
it sends C(βe + d): what is not sent is a momentum (DeMo, arXiv 2411.19870; SparseLoCo, arXiv 2508.15706), and
what was never sent fades. The residual belongs to one worker and one module: as many bytes as the module in
float32, kept with the worker's own state, never sent.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from weft.common.codec.update import UpdateFile
from weft.common.modules import Schema
from weft.common.tensors import Float32Array, check_arrays, open_module, write_module


class ErrorFeedback:
    """The residual of one module on one worker, zero at the start; ``decay`` is ``codec.residual_decay``."""

    def __init__(self, schema: Schema, *, decay: float = 1.0) -> None:
        self._schema = _in_float32(schema)
        self._decay = np.float32(decay)
        self._residual = {spec.name: np.zeros(spec.shape, np.float32) for spec in schema.tensors}

    @property
    def norm(self) -> float:
        """L2 norm of what is still to be sent, accumulated in float64."""
        return float(
            np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in self._residual.values()))
        )

    def apply(self, deltas: Mapping[str, Float32Array]) -> dict[str, Float32Array]:
        """New arrays: each delta plus its decayed residual; the residual itself is not changed."""
        check_arrays(deltas, self._schema)
        return {name: delta + self._decay * self._residual[name] for name, delta in deltas.items()}

    def keep(self, corrected: Mapping[str, Float32Array], sent: Path) -> None:
        """Keep what the update at ``sent`` left out of ``corrected``, the arrays that it was encoded from.

        Call it once the update was accepted: a refused one was not sent, and leaves the residual as it was.
        """
        check_arrays(corrected, self._schema)
        with UpdateFile(sent, self._schema) as update:
            for name, start, stop, values in update.tiles():
                flat = corrected[name].reshape(-1)
                np.subtract(flat[start:stop], values, out=self._residual[name].reshape(-1)[start:stop])

    def save(self, path: Path) -> None:
        """Replace the file at ``path`` by this residual, wholly or not at all."""
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            write_module(file, self._residual, self._schema)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, schema: Schema, *, decay: float = 1.0) -> ErrorFeedback:
        """Read a residual that was saved; raises TensorFileError when it is not one of this module."""
        feedback = cls(schema, decay=decay)
        with open_module(path, feedback._schema) as file:
            feedback._residual = {spec.name: file.array(spec.name).copy() for spec in schema.tensors}
        return feedback


def _in_float32(schema: Schema) -> Schema:
    return Schema(tuple(dataclasses.replace(spec, dtype="F32") for spec in schema.tensors))
