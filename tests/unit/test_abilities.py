"""What of a run fits, and what the coordinator is told of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.client import abilities
from weft.client.abilities import Ability, find_ability, least_of, training_bytes, whole_of
from weft.common.ids import Digest, ModuleKey, RunId, TaskId, run_id
from weft.common.modules import Kind, LoraSettings, Schema, TensorSpec, Topology
from weft.common.protocol import Limit, ModuleStart, Task
from weft.common.recipe import BasePin, Recipe

LORA = Topology(experts=(2, 2), lora=LoraSettings(rank=8))
FULL = Topology(experts=(2, 2), kind=Kind.FULL)


def _needs(ability: Ability) -> int:
    return 100 + 10 * ability.levels * max(1, ability.rank)


@pytest.mark.parametrize(
    ("topology", "rank_max", "available", "expected"),
    [
        (LORA, 0, None, (8, 2)),
        (LORA, 0, 260, (8, 2)),
        (LORA, 0, 259, (4, 2)),
        (LORA, 0, 120, (1, 2)),
        (LORA, 0, 119, (1, 1)),
        (LORA, 0, 109, None),
        (LORA, 3, None, (3, 2)),
        (LORA, 3, 159, (1, 2)),
        (LORA, 64, None, (8, 2)),
        (FULL, 4, None, (0, 2)),
        (FULL, 0, 119, (0, 1)),
        (FULL, 0, 109, None),
    ],
)
def test_ranks_come_down_before_modules(
    topology: Topology, rank_max: int, available: int | None, expected: tuple[int, int] | None
) -> None:
    found = find_ability(topology, rank_max=rank_max, needs=_needs, available=available)
    assert (None if found is None else (found.rank, found.levels)) == expected


@given(st.integers(1, 64), st.integers(0, 64), st.integers(110, 2000))
def test_what_is_found_fits_and_the_least_is_always_looked_at(
    rank: int, rank_max: int, available: int
) -> None:
    topology = dataclasses.replace(LORA, lora=LoraSettings(rank=rank))
    found = find_ability(topology, rank_max=rank_max, needs=_needs, available=available)
    assert found is not None
    assert _needs(found) <= available
    assert least_of(topology).rank <= found.rank <= min(rank, rank_max or rank)


@pytest.mark.parametrize(
    ("ability", "limit"),
    [
        (Ability(rank=8, levels=2), None),
        (Ability(rank=4, levels=2), Limit(run_id="tiny", rank_max=4, levels_max=0)),
        (Ability(rank=8, levels=1), Limit(run_id="tiny", rank_max=0, levels_max=1)),
        (Ability(rank=1, levels=1), Limit(run_id="tiny", rank_max=1, levels_max=1)),
    ],
)
def test_only_what_is_less_than_the_whole_is_told(ability: Ability, limit: Limit | None) -> None:
    recipe = Recipe(run=run_id("tiny"), base=BasePin(digest=Digest("0" * 64)), topology=LORA)
    assert ability.limit(recipe) == limit
    assert (ability == whole_of(LORA)) == (limit is None)


@pytest.mark.parametrize(
    ("rank", "num_trained", "allowed"), [(0, 1, False), (4, 1, True), (4, 2, False), (2, 1, True)]
)
def test_a_task_is_allowed_within_the_ability(rank: int, num_trained: int, *, allowed: bool) -> None:
    starts = tuple(
        ModuleStart(
            module=f"{level}.0",
            version=0,
            blake3=Digest("0" * 64),
            size_bytes=1,
            train=level < num_trained,
            round_number=1,
            steps_before=0,
        )
        for level in range(2)
    )
    task = Task(
        task_id=TaskId("t-1"),
        run_id=RunId("tiny"),
        lease_token="lease",
        lease_epoch=1,
        lease_s=15.0,
        path="0.0",
        modules=starts,
        recipe_blake3=Digest("0" * 64),
        num_steps=4,
        update_bytes_max=1000,
        rank=rank,
    )
    assert Ability(rank=4, levels=1).allows(task, LORA) == allowed


@pytest.mark.parametrize(
    ("topology", "ability", "expected"),
    [
        (LORA, Ability(rank=8, levels=2), 1000 + 16 * (80 + 160)),
        (LORA, Ability(rank=8, levels=1), 1000 + 16 * 160 + 4 * 80),
        (LORA, Ability(rank=4, levels=1), 1000 + 16 * 80 + 4 * 40),
        (FULL, Ability(rank=0, levels=2), 1000 + 12 * (80 + 160)),
        (FULL, Ability(rank=0, levels=1), 1000 + 12 * 160),
    ],
)
def test_memory_counts_what_is_trained_four_times_as_much(
    monkeypatch: pytest.MonkeyPatch, topology: Topology, ability: Ability, expected: int
) -> None:
    monkeypatch.setattr(abilities, "needed_bytes", lambda *_, **__: 1000)
    recipe = Recipe(run=run_id("tiny"), base=BasePin(digest=Digest("0" * 64)), topology=topology)
    schemas = {
        ModuleKey(level, 0): Schema((TensorSpec(f"layer.{level}.lora_A.weight", "F32", (8, width)),))
        for level, width in enumerate((10, 20))
    }
    found = training_bytes(Path("base"), recipe, schemas, ability, dtype=torch.bfloat16, quantise="none")
    assert found == expected
