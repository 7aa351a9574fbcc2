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
import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import Final

from weft.common.errors import BaseModelError, NotFound, UsageError
from weft.common.ids import ModuleKey, Path

LORA_A: Final = ".lora_A.weight"
LORA_B: Final = ".lora_B.weight"
EXPERTS_MAX: Final = 1024
PATHS_MAX: Final = 4096


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


class Outside(enum.StrEnum):
    """What becomes of tensors outside all transformer blocks when modules are full."""

    FROZEN = "frozen"
    TRAINED = "trained"


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Levels × experts of one kind over one base."""

    experts: tuple[int, ...] = (1,)
    """Number of experts per level, for example [4, 4]; 0: path-specific, an expert of its own for every path."""
    kind: Kind = Kind.LORA
    """``lora``: factors beside frozen weights; ``full``: the weights of the transformer blocks themselves."""
    layers: tuple[int, ...] = ()
    """Transformer blocks of each level, in order; empty shares them out equally."""
    outside: Outside = Outside.FROZEN
    """Kind full, embeddings, last norm and head: ``frozen`` keeps the base's and never sends them; ``trained``."""
    lora: LoraSettings = LoraSettings()
    """Used when kind is lora."""
    levels_per_task: int = 0
    """How many of a path's modules one task trains (LoRA shards); 0 trains all of them."""

    def __post_init__(self) -> None:
        if not self.experts or not all(0 <= count <= EXPERTS_MAX for count in self.experts):
            raise UsageError(
                f"topology.experts is {list(self.experts)}",
                hint=f"give 1 to {EXPERTS_MAX} experts for each level, for example [1]; 0 is path-specific",
            )
        if not any(self.experts):
            raise UsageError(
                f"topology.experts is {list(self.experts)}, and path-specific levels need a shared one beside them",
                hint="give at least one level a number of experts, for example [8, 0]",
            )
        if self.num_paths > PATHS_MAX:
            raise UsageError(
                f"topology.experts is {list(self.experts)}, which makes {self.num_paths} paths",
                hint=f"use experts whose product is at most {PATHS_MAX}",
            )
        if self.layers and (len(self.layers) != len(self.experts) or min(self.layers) < 1):
            raise UsageError(
                f"topology.layers is {list(self.layers)} for {len(self.experts)} level(s)",
                hint="give each level one number of transformer blocks, at least 1",
            )
        if self.outside is Outside.TRAINED and self.kind is Kind.LORA:
            raise UsageError(
                'topology.outside is "trained" and topology.kind is "lora"',
                hint='remove topology.outside, or set topology.kind = "full"',
            )
        if not 0 <= self.levels_per_task <= len(self.experts):
            raise UsageError(
                f"topology.levels_per_task is {self.levels_per_task} and there are {len(self.experts)} levels",
                hint="use 0 to train all levels of a path at once",
            )

    @property
    def num_paths(self) -> int:
        """P: the product of the shared levels' experts."""
        return math.prod(count for count in self.experts if count)

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts of each level, P where a level is path-specific."""
        return tuple(count or self.num_paths for count in self.experts)

    @property
    def modules(self) -> tuple[ModuleKey, ...]:
        """All modules, by level, then expert."""
        return tuple(
            ModuleKey(level, expert) for level, count in enumerate(self.counts) for expert in range(count)
        )

    @property
    def paths(self) -> tuple[Path, ...]:
        """All paths, in lexical order of their shared experts."""
        return _paths(self.experts)

    def paths_through(self, module: ModuleKey) -> tuple[Path, ...]:
        """The paths that share a module."""
        return tuple(path for path in self.paths if path.experts[module.level] == module.expert)

    def find_path(self, named: Path) -> Path:
        """The path that a person means: all its experts, or those of the shared levels; raises NotFound."""
        shared = [level for level, count in enumerate(self.experts) if count]
        for path in self.paths:
            if named in (path, Path(tuple(path.experts[level] for level in shared))):
                return path
        raise NotFound(f"there is no path {named}", hint=f"paths are {self.paths[0]} to {self.paths[-1]}")

    def level_of_blocks(self, num_blocks: int) -> tuple[int, ...]:
        """The level of each of a model's transformer blocks.

        Raises:
            BaseModelError: The grid does not divide the blocks, or ``layers`` are of another model.
        """
        num_levels = len(self.experts)
        if self.layers and sum(self.layers) != num_blocks:
            raise BaseModelError(
                f"topology.layers adds up to {sum(self.layers)} and the base has {num_blocks} layers",
                hint=f"give numbers that add up to {num_blocks}",
            )
        if not self.layers and num_blocks % num_levels:
            raise BaseModelError(
                f"topology.experts has {num_levels} levels, which do not divide the base's {num_blocks} layers",
                hint=f"set topology.layers = {_nearly_equal(num_blocks, num_levels)}"
                if num_blocks >= num_levels
                else f"use at most {num_blocks} levels",
            )
        layers = self.layers or (num_blocks // num_levels,) * num_levels
        return tuple(level for level, count in enumerate(layers) for _ in range(count))


@functools.cache
def _paths(experts: tuple[int, ...]) -> tuple[Path, ...]:
    shared = itertools.product(*(range(count) for count in experts if count))
    return tuple(
        Path(tuple(chosen.pop(0) if count else index for count in experts))
        for index, chosen in enumerate(map(list, shared))
    )


def _nearly_equal(total: int, parts: int) -> list[int]:
    return [total * (part + 1) // parts - total * part // parts for part in range(parts)]


def parse_experts(text: str) -> tuple[int, ...]:
    """Read ``4x4``; raises UsageError."""
    if not re.fullmatch(r"\d{1,4}(x\d{1,4})*", text):
        raise UsageError(
            f"{text!r} is not levels × experts", hint="write one number a level, for example 4x4"
        )
    return tuple(int(part) for part in text.split("x"))


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

    def at_rank(self, rank: int) -> Schema:
        """The nested slice of a LoRA module that a worker of a smaller rank trains: A[:rank] and B[:, :rank].

        Other tensors stay as they are; a rank at or above the module's own changes nothing.
        """
        return Schema(tuple(_at_rank(spec, rank) for spec in self.tensors))


def _at_rank(spec: TensorSpec, rank: int) -> TensorSpec:
    if spec.name.endswith(LORA_A):
        return TensorSpec(spec.name, spec.dtype, (min(rank, spec.shape[0]), spec.shape[1]))
    if spec.name.endswith(LORA_B):
        return TensorSpec(spec.name, spec.dtype, (spec.shape[0], min(rank, spec.shape[1])))
    return spec
