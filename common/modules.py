"""Topology and schema: which modules a run has and which tensors a module holds.

The model's layers are split into contiguous **levels**; level l has K_l **experts**; a **module** is the
trainable tensors of one (level, expert); a **path** takes one expert per level (DiPaCo, arXiv 2403.10616,
section 2.3). Plain federated LoRA is one level with one expert.

Tensor names are those of the Hugging Face model with PEFT's suffix, without PEFT's ``base_model.model.``
prefix: ``model.layers.0.self_attn.q_proj.lora_A.weight`` [rank, in_features] and ``….lora_B.weight``
[out_features, rank]; ΔW = scaling · B A.
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from weft.common.errors import UsageError
from weft.common.ids import ModuleKey, Path

LORA_A: Final = ".lora_A.weight"
LORA_B: Final = ".lora_B.weight"


class Kind(enum.StrEnum):
    """What a module's tensors are."""

    LORA = "lora"
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """LoRA over the base's linear layers (arXiv 2106.09685)."""

    rank: int = 8
    """Inner dimension r of ΔW = scaling · B A."""
    alpha: float = 16.0
    """Scaling is alpha / rank, or alpha / sqrt(rank) with rslora."""
    rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Last parts of the names of the linear layers that carry an adapter."""

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 4096:
            raise UsageError(f"topology.lora.rank is {self.rank}", hint="use 1 to 4096, for example 8")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UsageError(
                f"topology.lora.alpha is {self.alpha}",
                hint="use a positive number, for example twice the rank",
            )
        if not self.target_modules:
            raise UsageError(
                "topology.lora.target_modules is empty", hint='name layers, for example ["q_proj", "v_proj"]'
            )

    @property
    def scaling(self) -> float:
        """What multiplies B A."""
        return self.alpha / math.sqrt(self.rank) if self.rslora else self.alpha / self.rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Levels × experts of one kind over one base."""

    experts: tuple[int, ...] = (1,)
    """Number of experts per level; its length is the number of levels."""
    kind: Kind = Kind.LORA
    """``lora``: factors beside frozen weights; ``full``: the weights themselves."""
    lora: LoraSettings = LoraSettings()
    """Used when kind is lora."""
    levels_per_task: int = 0
    """How many of a path's modules one task trains (LoRA shards); 0 trains all of them."""

    def __post_init__(self) -> None:
        if not self.experts or not all(1 <= count <= 1024 for count in self.experts):
            raise UsageError(
                f"topology.experts is {list(self.experts)}",
                hint="give 1 to 1024 experts for each level, for example [1]",
            )
        if not 0 <= self.levels_per_task <= len(self.experts):
            raise UsageError(
                f"topology.levels_per_task is {self.levels_per_task} and there are {len(self.experts)} levels",
                hint="use 0 to train all levels of a path at once",
            )

    @property
    def modules(self) -> tuple[ModuleKey, ...]:
        """All modules, by level, then expert."""
        return tuple(
            ModuleKey(level, expert) for level, count in enumerate(self.experts) for expert in range(count)
        )

    @property
    def paths(self) -> Iterator[Path]:
        """All paths, in lexical order."""
        return (Path(experts) for experts in itertools.product(*(range(count) for count in self.experts)))


def level_of_layer(layer: int, *, num_layers: int, num_levels: int) -> int:
    """The level of a transformer block when ``num_layers`` blocks are split into contiguous, nearly equal levels."""
    return layer * num_levels // num_layers


@dataclass(frozen=True, slots=True, order=True)
class TensorSpec:
    """Name, dtype (``F32`` or ``BF16``, as safetensors writes it) and shape of one tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Schema:
    """The tensors of a module, sorted by name; what every update of the module must match exactly."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        names = [spec.name for spec in self.tensors]
        if names != sorted(set(names)):
            raise ValueError("a schema lists each tensor once, sorted by name")

    @property
    def num_parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(spec.size for spec in self.tensors)

    @property
    def lora_pairs(self) -> tuple[tuple[str, str], ...]:
        """Names of (A, B) of each adapted layer, sorted."""
        return tuple(
            (spec.name, spec.name.removesuffix(LORA_A) + LORA_B)
            for spec in self.tensors
            if spec.name.endswith(LORA_A)
        )
