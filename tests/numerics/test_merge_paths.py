"""Rescaling and nested ranks, against dense float64 references."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.common.errors import EngineFailed, UsageError
from weft.common.modules import Schema, TensorSpec
from weft.server.merge.crew import Threads
from weft.server.merge.engine import MergeReport, OuterState, merge_module
from weft.server.merge.rules import RULES
from weft.server.merge.settings import (
    Clip,
    LoraSpace,
    MergeRuleName,
    MergeSettings,
    Rescale,
    TiesConvention,
    TiesParameters,
)
from weft.server.merge.tiles import Arrays, ArrayUpdate
from weft.server.outer import OuterName, OuterSettings, outer_schema, slot_name

Array = npt.NDArray[Any]
OUT, IN, RANK = 11, 9, 4
A, B, HEAD = "q.lora_A.weight", "q.lora_B.weight", "score.weight"
SHAPES = {A: (RANK, IN), B: (OUT, RANK), HEAD: (2, 5)}
SCHEMA = Schema(tuple(TensorSpec(name, "F32", shape) for name, shape in SHAPES.items()))
WEIGHTS = [1.0, 2.0, 3.0, 4.5]
RANKS = [2, None, 1, 2]
SPACES = pytest.mark.parametrize("space", list(LoraSpace))


def plain(space: LoraSpace = LoraSpace.FACTORS, **more: Any) -> MergeSettings:
    return MergeSettings(clip=Clip.NONE, lora=space, **more)


def random_arrays(schema: Schema, seed: int, size: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays({s.name: (size * rng.standard_normal(s.shape)).astype(np.float32) for s in schema.tensors})


def updates_of(ranks: Sequence[int | None] = RANKS) -> list[ArrayUpdate]:
    return [
        ArrayUpdate(
            worker_id=f"w{index}",
            weight=WEIGHTS[index],
            rank=rank,
            deltas=random_arrays(SCHEMA.at_rank(rank or RANK), 10 + index, 0.1 + index / 10),
            fisher=Arrays(
                {
                    n: np.square(a)
                    for n, a in random_arrays(SCHEMA.at_rank(rank or RANK), 30 + index).arrays.items()
                }
            ),
        )
        for index, rank in enumerate(ranks)
    ]


def merge(
    updates: Sequence[ArrayUpdate], start: Arrays, chosen: MergeSettings, **more: Any
) -> tuple[dict[str, Array], MergeReport]:
    sink = Arrays.zeros(SCHEMA)
    outer = more.pop("outer", OuterSettings())
    report = merge_module(updates, start, SCHEMA, sink, settings=chosen, outer=outer, **more)
    return {name: array.astype(np.float64) for name, array in sink.arrays.items()}, report


def change(start: Arrays, update: ArrayUpdate) -> Array:
    """(B₀ + dB)(A₀ + dA) − B₀A₀ of the rank slices that the update owns."""
    r = update.rank or RANK
    b, a = (start.arrays[n].astype(np.float64) for n in (B, A))
    db, da = update.deltas.arrays[B], update.deltas.arrays[A]
    return np.asarray((b[:, :r] + db) @ (a[:r] + da) - b[:, :r] @ a[:r])


def truncated(dense: Array, rank: int) -> Array:
    u, s, v = np.linalg.svd(dense, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


def reference_rda(rows: Sequence[Array], weights: Sequence[float]) -> Array:
    norms = [np.linalg.norm(row) for row in rows]
    direction = np.average(
        [row / norm for row, norm in zip(rows, norms, strict=True)], axis=0, weights=weights
    )
    return np.asarray(np.average(norms, weights=weights) * direction / np.linalg.norm(direction))


def test_sqrt_paths_multiplies_the_mean_movement() -> None:
    start, updates = random_arrays(SCHEMA, 1), updates_of([None] * 4)
    for space in LoraSpace:
        once = merge(updates, start, plain(space))[0]
        twice = merge(updates, start, plain(space, rescale=Rescale.SQRT_PATHS), num_paths=4)[0]
        expected = start.arrays[HEAD] + 2 * (once[HEAD] - start.arrays[HEAD])
        np.testing.assert_allclose(twice[HEAD], expected, rtol=1e-5, atol=1e-6)


@SPACES
def test_sqrt_paths_of_one_path_is_the_mean(space: LoraSpace) -> None:
    start, updates = random_arrays(SCHEMA, 1), updates_of()
    once = merge(updates, start, plain(space))[0]
    scaled = merge(updates, start, plain(space, rescale=Rescale.SQRT_PATHS), num_paths=1)[0]
    np.testing.assert_array_equal(once[B], scaled[B])


def test_rda_is_the_mean_norm_along_the_mean_direction_tensor_by_tensor() -> None:
    start, updates = random_arrays(SCHEMA, 1), updates_of([None] * 4)
    merged, _ = merge(updates, start, plain(rescale=Rescale.RDA))
    for name in SHAPES:
        rows = [u.deltas.arrays[name].astype(np.float64) for u in updates]
        expected = start.arrays[name] + reference_rda(rows, WEIGHTS)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_rda_of_a_lora_layer_merged_as_its_product() -> None:
    start, updates = random_arrays(SCHEMA, 1), updates_of([None] * 4)
    merged, _ = merge(updates, start, plain(LoraSpace.EXACT, rescale=Rescale.RDA))
    begin = start.arrays[B].astype(np.float64) @ start.arrays[A]
    dense = begin + reference_rda([change(start, u) for u in updates], WEIGHTS)
    np.testing.assert_allclose(merged[B] @ merged[A], truncated(dense, RANK), rtol=1e-4, atol=1e-5)


def test_rda_where_nothing_moves_or_all_cancels_stays() -> None:
    start = random_arrays(SCHEMA, 1)
    there = updates_of([None])[0]
    back = dataclasses.replace(
        there, worker_id="back", deltas=Arrays({n: -a for n, a in there.deltas.arrays.items()})
    )
    still = ArrayUpdate(worker_id="still", deltas=Arrays.zeros(SCHEMA))
    merged, _ = merge([there, back, still], start, plain(rescale=Rescale.RDA))
    for name, values in start.arrays.items():
        np.testing.assert_allclose(merged[name], values, atol=1e-6)


@pytest.mark.parametrize("rule", [MergeRuleName.TIES, MergeRuleName.FISHER])
def test_rescaling_is_for_the_mean(rule: MergeRuleName) -> None:
    with pytest.raises(UsageError, match=r"merge\.rescale"):
        MergeSettings(rule=rule, rescale=Rescale.RDA)


def test_each_rank_slice_is_averaged_over_its_owners() -> None:
    start, updates = random_arrays(SCHEMA, 1), updates_of()
    merged, _ = merge(updates, start, plain())
    for p in range(RANK):
        owners = [u for u in updates if (u.rank or RANK) > p]
        weights = [u.weight for u in owners]
        row = np.average([u.deltas.arrays[A][p] for u in owners], axis=0, weights=weights)
        column = np.average([u.deltas.arrays[B][:, p] for u in owners], axis=0, weights=weights)
        np.testing.assert_allclose(merged[A][p], start.arrays[A][p] + row, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(merged[B][:, p], start.arrays[B][:, p] + column, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", [RANKS, [2, 1, 2, 1], [1, 1, 1, 1]], ids=["some", "half", "one"])
def test_the_exact_mean_of_nested_ranks_sums_over_owners(ranks: list[int | None]) -> None:
    start, updates = random_arrays(SCHEMA, 1), updates_of(ranks)
    merged, _ = merge(updates, start, plain(LoraSpace.EXACT))
    begin_b, begin_a = (start.arrays[n].astype(np.float64) for n in (B, A))
    dense = begin_b @ begin_a
    for p in range(RANK):
        owners = [u for u in updates if (u.rank or RANK) > p]
        for u in owners:
            share = u.weight / sum(o.weight for o in owners)
            b, a = begin_b[:, p] + u.deltas.arrays[B][:, p], begin_a[p] + u.deltas.arrays[A][p]
            dense = dense + share * (np.outer(b, a) - np.outer(begin_b[:, p], begin_a[p]))
    np.testing.assert_allclose(merged[B] @ merged[A], truncated(dense, RANK), rtol=1e-4, atol=1e-5)


@SPACES
@pytest.mark.parametrize("rule", [name for name, row in RULES.items() if not row.needs_grams])
def test_all_of_the_full_rank_is_no_rank_at_all(space: LoraSpace, rule: MergeRuleName) -> None:
    spaces = RULES[rule].spaces
    chosen = space if space in spaces else next(iter(spaces))
    start, updates = random_arrays(SCHEMA, 1), updates_of([None] * (2 if rule is MergeRuleName.SLERP else 4))
    said = [dataclasses.replace(update, rank=RANK) for update in updates]
    one, other = (merge(each, start, MergeSettings(rule=rule, lora=chosen))[0] for each in (updates, said))
    for name in SHAPES:
        np.testing.assert_array_equal(one[name], other[name])


def test_what_nobody_owns_does_not_move() -> None:
    start, updates = random_arrays(SCHEMA, 1), updates_of([2, 1, 2, 1])
    merged, _ = merge(updates, start, plain())
    np.testing.assert_array_equal(merged[A][2:], start.arrays[A][2:])
    np.testing.assert_array_equal(merged[B][:, 2:], start.arrays[B][:, 2:])


def test_an_outer_optimiser_leaves_alone_what_nobody_owns() -> None:
    outer = OuterSettings(name=OuterName.NESTEROV)
    start, before = random_arrays(SCHEMA, 1), random_arrays(outer_schema(SCHEMA, outer), 2)
    before.arrays["step"][:] = 3
    after = Arrays.zeros(outer_schema(SCHEMA, outer))
    merged, _ = merge(
        updates_of([2, 1, 2, 1]),
        start,
        plain(),
        outer=outer,
        outer_state=OuterState(before=before, after=after),
    )
    np.testing.assert_array_equal(merged[A][2:], start.arrays[A][2:])
    np.testing.assert_array_equal(after.arrays[slot_name(0, A)][2:], before.arrays[slot_name(0, A)][2:])
    assert not np.array_equal(after.arrays[slot_name(0, A)][:2], before.arrays[slot_name(0, A)][:2])
    assert after.arrays["step"] == [4]


def test_ties_elects_among_owners_and_trims_what_an_update_has() -> None:
    start, updates = Arrays.zeros(SCHEMA), updates_of()
    ties = TiesParameters(convention=TiesConvention.PEFT, density=0.5)
    merged, report = merge(updates, start, plain(rule=MergeRuleName.TIES, ties=ties))
    sizes = [np.sort(np.abs(u.deltas.arrays[A]), axis=None) for u in updates]
    kept = [size[size.size - size.size // 2] for size in sizes]
    for p in range(RANK):
        rows, weights = [], []
        for u, at_least in zip(updates, kept, strict=True):
            if (u.rank or RANK) > p:
                row = u.deltas.arrays[A][p].astype(np.float64)
                rows.append(np.where(np.abs(row) >= at_least, row, 0))
                weights.append(u.weight)
        normal = np.array(weights) / sum(weights)
        sign = np.where(np.sum(rows, axis=0) >= 0, 1, -1)
        agree = np.array([np.where(np.sign(row) == sign, row, 0) for row in rows])
        count = np.maximum((agree != 0).sum(0), 1) / len(rows)
        np.testing.assert_allclose(
            merged[A][p], (agree * normal[:, None]).sum(0) / count, rtol=1e-5, atol=1e-7
        )
    assert [c.kept for c in report.contributions] == pytest.approx([0.5] * 4, abs=0.06)


def test_clipping_measures_the_change_of_what_an_update_has() -> None:
    start, updates = random_arrays(SCHEMA, 1), updates_of()
    _, report = merge(updates, start, MergeSettings(lora=LoraSpace.EXACT), scaling=2.0)
    for update, contribution in zip(updates, report.contributions, strict=True):
        expected = np.hypot(
            2 * np.linalg.norm(change(start, update)), np.linalg.norm(update.deltas.arrays[HEAD])
        )
        assert contribution.change_norm == pytest.approx(expected, rel=1e-6)
    assert min(c.clip_factor for c in report.contributions) < 1


@pytest.mark.parametrize(
    "chosen",
    [
        MergeSettings(lora=LoraSpace.FACTORS),
        MergeSettings(lora=LoraSpace.EXACT),
        MergeSettings(lora=LoraSpace.FACTORS, rescale=Rescale.RDA),
        MergeSettings(lora=LoraSpace.EXACT, rescale=Rescale.RDA),
        MergeSettings(rule=MergeRuleName.TIES),
        MergeSettings(rule=MergeRuleName.FISHER),
        MergeSettings(rule=MergeRuleName.DARE),
        MergeSettings(rule=MergeRuleName.DELLA),
        MergeSettings(rule=MergeRuleName.MEDIAN),
        MergeSettings(rule=MergeRuleName.TASK_ARITHMETIC),
    ],
)
@settings(max_examples=6, deadline=None)
@given(order=st.permutations(range(4)), tile_elements=st.sampled_from([1, 5, 64]), threads=st.integers(1, 3))
def test_the_same_updates_give_the_same_bytes(
    chosen: MergeSettings, order: list[int], tile_elements: int, threads: int
) -> None:
    start, updates = random_arrays(SCHEMA, 1), updates_of()
    one, _ = merge(updates, start, chosen)
    shuffled = [updates[index] for index in order]
    other, _ = merge(shuffled, start, chosen, tile_elements=tile_elements, crew=Threads(threads))
    assert [a.tobytes() for a in one.values()] == [a.tobytes() for a in other.values()]


@pytest.mark.parametrize("rule", [rule for rule in MergeRuleName if RULES[rule].choose is not None])
def test_distances_of_updates_of_different_ranks_are_refused(rule: MergeRuleName) -> None:
    with pytest.raises(EngineFailed, match="different ranks"):
        merge(updates_of(), random_arrays(SCHEMA, 1), MergeSettings(rule=rule))


def test_a_smaller_rank_of_something_else_is_a_value_error() -> None:
    update = dataclasses.replace(updates_of([2])[0], rank=None)
    with pytest.raises(ValueError, match="broadcast"):
        merge([update], random_arrays(SCHEMA, 1), plain())
