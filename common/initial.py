"""Version 0 of a module, the same for all experts of a level and on all machines.

LoRA factors are a function of names, shapes and seed alone: all workers start from the same A, which is what
makes averages of factors meaningful. Full modules start as the base's own weights (DiPaCo, arXiv 2403.10616,
section 2.6: all paths start from the same pretrained model).

What is drawn at random comes from a counter-based generator, one stream a tensor, and from exact arithmetic: the
same bytes whatever the machine, the order of the tensors and the version of numpy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from weft.common.base import base_tensors
from weft.common.ids import ModuleKey
from weft.common.modules import LORA_A, LORA_B, Kind, Schema, TensorSpec
from weft.common.recipe import Recipe

Float32Array = npt.NDArray[np.float32]
_HEAD_STD: Final = 0.02
_KEY: Final = "weft initial tensor 1"
_NUM_UNIFORMS: Final = 12
"""So many uniform numbers of variance 1/12 have a sum of variance 1."""
_SLICE: Final = 1 << 18
"""Values drawn in one go, which is part of what the values are."""


def initial_module(
    base_dir: Path, recipe: Recipe, schemas: Mapping[ModuleKey, Schema], key: ModuleKey
) -> dict[str, Float32Array]:
    """The start of a run's module: float32 arrays by name. All experts of a level start equal.

    A full module is read from the base's files, of which only its own tensors are touched; a classifier's head is
    new and starts as under LoRA.

    Raises:
        BaseModelError: The base's files do not hold a tensor of the module.
        TensorFileError: A weight file is damaged.
    """
    schema = schemas[key]
    if recipe.topology.kind is Kind.LORA:
        return initial_tensors(schema, seed=recipe.inner.seed)
    new = _heads(schema) if recipe.task.num_labels else frozenset()
    taken = [spec for spec in schema.tensors if spec not in new]
    drawn = Schema(tuple(spec for spec in schema.tensors if spec in new))
    return base_tensors(base_dir, taken) | initial_tensors(drawn, seed=recipe.inner.seed)


def initial_tensors(schema: Schema, *, seed: int) -> dict[str, Float32Array]:
    """The start of LoRA factors and of heads: float32 arrays by name.

    A is Kaiming-uniform as in PEFT (bound 1/√in_features) and B is zero, so that ΔW is zero; a classifier's
    weights are normal with standard deviation 0.02 and its biases zero.
    """
    return {spec.name: _initial(spec, seed) for spec in schema.tensors}


def normal_tensor(spec: TensorSpec, *, seed: int, std: float) -> Float32Array:
    """Normally distributed values around 0 in the tensor's shape, float32.

    Each is the sum of twelve uniform 16-bit numbers, which are added as integers and so give the same bytes
    everywhere; its variance is exact to 1e-9, its excess kurtosis is -0.1, and it stays within six ``std``.
    """
    philox = _generator(spec, seed)
    values = np.empty(spec.size, np.float32)
    for start in range(0, spec.size, _SLICE):
        part = values[start : start + _SLICE]
        raw = philox.random_raw(part.size * _NUM_UNIFORMS // 4).astype("<u8", copy=False)
        sums = raw.view("<u2").reshape(_NUM_UNIFORMS, -1).sum(0, dtype=np.uint32)
        part[:] = (sums - _NUM_UNIFORMS * 0xFFFF / 2) / 2**16 * std
    return values.reshape(spec.shape)


def _heads(schema: Schema) -> frozenset[TensorSpec]:
    """Tensors outside the base model, whose blocks' names all begin alike, as ``model`` in ``model.layers.0``."""
    parts = Counter(spec.name.partition(".")[0] for spec in schema.tensors)
    ((base_model, _),) = parts.most_common(1)
    return frozenset(spec for spec in schema.tensors if spec.name.partition(".")[0] != base_model)


def _initial(spec: TensorSpec, seed: int) -> Float32Array:
    if spec.name.endswith(LORA_B) or len(spec.shape) < 2:
        return np.zeros(spec.shape, np.float32)
    if not spec.name.endswith(LORA_A):
        return normal_tensor(spec, seed=seed, std=_HEAD_STD)
    uniform = (_generator(spec, seed).random_raw(spec.size) >> np.uint64(40)).astype(np.float64) / 2**24
    values = (2 * uniform - 1) / np.sqrt(spec.shape[1])
    initial: Float32Array = values.astype(np.float32).reshape(spec.shape)
    return initial


def _generator(spec: TensorSpec, seed: int) -> np.random.Philox:
    # Its raw output alone is used, which is the same in every version of numpy.
    key = blake3(f"{_KEY}\n{seed}\n{spec.name}".encode()).digest()[:16]
    return np.random.Philox(key=int.from_bytes(key, "little"))
