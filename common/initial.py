"""Version 0 of a module, a function of names, shapes and seed alone: equal for all experts and machines.

All workers start from the same A, which is what makes averages of factors meaningful.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from weft.common.modules import LORA_A, LORA_B, Schema, TensorSpec

Float32Array = npt.NDArray[np.float32]
_HEAD_STD: Final = 0.02
_KEY: Final = "weft initial tensor 1"


def initial_tensors(schema: Schema, *, seed: int) -> dict[str, Float32Array]:
    """The start of a module: float32 arrays by name.

    A is Kaiming-uniform as in PEFT (bound 1/√in_features) and B is zero, so that ΔW is zero; a classifier's
    weights are normal with standard deviation 0.02 and its biases zero.
    """
    return {spec.name: _initial(spec, seed) for spec in schema.tensors}


def _initial(spec: TensorSpec, seed: int) -> Float32Array:
    if spec.name.endswith(LORA_B) or len(spec.shape) < 2:
        return np.zeros(spec.shape, np.float32)
    key = blake3(f"{_KEY}\n{seed}\n{spec.name}".encode()).digest()[:16]
    philox = np.random.Philox(key=int.from_bytes(key, "little"))
    if spec.name.endswith(LORA_A):
        # From the raw counter output: the same bits in every version of numpy.
        uniform = (philox.random_raw(spec.size) >> np.uint64(40)).astype(np.float64) / 2**24
        values = (2 * uniform - 1) / np.sqrt(spec.shape[1])
    else:
        values = np.random.Generator(philox).standard_normal(spec.size) * _HEAD_STD
    initial: Float32Array = values.astype(np.float32).reshape(spec.shape)
    return initial
