"""What fits into this worker's memory of a run: the LoRA rank, and how many of a path's modules at once.

A module that is trained takes sixteen bytes a parameter (itself, its gradient, AdamW's two moments), one that is only
composed takes four. Ranks come down before modules do: a slice of every module moves all of a path, and the merge
averages each slice over those that own it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from weft.client.device import needed_bytes
from weft.common.composition import Quantisation
from weft.common.ids import ModuleKey
from weft.common.modules import Kind, Schema, Topology
from weft.common.protocol import Limit, Task
from weft.common.recipe import Recipe

_TRAINED_BYTES: Final = 16
_COMPOSED_BYTES: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """What this worker can train of a run."""

    rank: int
    """Largest LoRA rank; 0 with full modules."""
    levels: int
    """Most modules of a path at once."""

    def limit(self, recipe: Recipe) -> Limit | None:
        """What to tell the coordinator; None when there is no limit."""
        whole = whole_of(recipe.topology)
        if self == whole:
            return None
        return Limit(
            run_id=recipe.run,
            rank_max=self.rank if self.rank < whole.rank else 0,
            levels_max=self.levels if self.levels < whole.levels else 0,
        )

    def allows(self, task: Task, topology: Topology) -> bool:
        """Whether a task is within it."""
        rank = task.rank or whole_of(topology).rank
        return rank <= self.rank and sum(start.train for start in task.modules) <= self.levels


def whole_of(topology: Topology) -> Ability:
    """No limit."""
    return Ability(rank=topology.lora.rank if topology.kind is Kind.LORA else 0, levels=len(topology.experts))


def least_of(topology: Topology) -> Ability:
    """The least that can be trained."""
    return Ability(rank=min(1, whole_of(topology).rank), levels=1)


def find_ability(
    topology: Topology, *, rank_max: int, needs: Callable[[Ability], int], available: int | None
) -> Ability | None:
    """The most that fits, or None when not even the least does.

    Args:
        topology: Of the run.
        rank_max: Largest LoRA rank that was asked for; 0 for any.
        needs: Bytes that training takes.
        available: Bytes that are free; None when that is not known.
    """
    candidates = _abilities(topology, rank_max)
    return next((one for one in candidates if available is None or needs(one) <= available), None)


def _abilities(topology: Topology, rank_max: int) -> Iterator[Ability]:
    whole = whole_of(topology)
    rank = min(whole.rank, rank_max or whole.rank)
    for levels in range(whole.levels, 0, -1):
        smaller = rank
        yield Ability(rank=smaller, levels=levels)
        while smaller > 1:
            smaller //= 2
            yield Ability(rank=smaller, levels=levels)


def training_bytes(
    base_dir: Path,
    recipe: Recipe,
    schemas: Mapping[ModuleKey, Schema],
    ability: Ability,
    *,
    dtype: torch.dtype,
    quantise: Quantisation,
    num_shares: int = 1,
) -> int:
    """Roughly what training takes at its peak, batches cut as small as they must be; of a base, its share."""
    is_full = recipe.topology.kind is Kind.FULL
    fixed = needed_bytes(
        base_dir,
        recipe,
        dtype=torch.float32 if is_full else dtype,
        quantise=quantise,
        num_shares=num_shares,
    )
    # The experts of a level are all of one size.
    sizes = sorted(
        (_size(schemas[ModuleKey(level, 0)], ability) for level in range(len(recipe.topology.experts))),
        reverse=True,
    )
    trained, composed = sum(sizes[: ability.levels]), sum(sizes[ability.levels :])
    own_bytes = _TRAINED_BYTES * trained + _COMPOSED_BYTES * composed
    # Full modules are the base's own weights, which are counted already.
    return fixed + own_bytes - (_COMPOSED_BYTES * (trained + composed) if is_full else 0)


def _size(schema: Schema, ability: Ability) -> int:
    return (schema.at_rank(ability.rank) if ability.rank else schema).num_parameters
