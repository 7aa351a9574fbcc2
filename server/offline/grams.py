"""Second moments of the inputs of each layer, beside the weights of what is merged.

``grams.safetensors`` in the directory of an adapter or a model holds, for as many matrices [o, i] as one likes,
``<matrix>.gram``: XᵀX / n of the n inputs that the layer saw, float32 or float64 [i, i]; of a LoRA layer, under
the name of its A in an adapter's file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weft.common.errors import InputError
from weft.common.tensors import FOREIGN, TensorFile
from weft.server.merge.tiles import InputGrams, Update

GRAMS: Final = "grams.safetensors"
_SUFFIX: Final = ".gram"
_DTYPES: Final = {"F32", "F64"}


def open_grams(directories: Sequence[Path]) -> InputGrams:
    """The Grams of every input, by its place, which is what ``Movement`` calls it.

    Raises:
        InputError: One has none, or they are not square matrices of float32 or float64.
    """
    files = [_open(directory) for directory in directories]

    def gram(update: Update, name: str) -> npt.NDArray[Any] | None:
        file = files[int(update.worker_id)]
        return np.array(file.array(name + _SUFFIX)) if name + _SUFFIX in file.header.entries else None

    return gram


def _open(directory: Path) -> TensorFile:
    path = directory / GRAMS
    if not path.is_file():
        raise InputError(
            f"{directory} has no {GRAMS}, which the rule needs",
            hint="docs/merge-rules.md has how to write it",
        )
    file = TensorFile(path, FOREIGN)
    for spec in file.header.specs:
        square = len(spec.shape) == 2 and spec.shape[0] == spec.shape[1]
        if not (square and spec.dtype in _DTYPES and spec.name.endswith(_SUFFIX)):
            raise InputError(
                f"{path} holds {spec.name} as {spec.dtype} {list(spec.shape)}",
                hint=f"write <matrix>{_SUFFIX}, float32 or float64 [i, i]",
            )
    return file
