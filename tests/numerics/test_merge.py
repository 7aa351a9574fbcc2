"""The merge rules against float64 references written from the papers, live oracles, and properties."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.common.errors import EngineFailed, RunFileError, UsageError
from weft.common.modules import Schema, TensorSpec
from weft.common.settings import from_table, to_table
from weft.server.merge import rules
from weft.server.merge.crew import ALONE, Crew, Threads, can_fork, run_forked
from weft.server.merge.engine import MergeReport, OuterState, merge_module
from weft.server.merge.rule import Scope
from weft.server.merge.rules import RULES
from weft.server.merge.settings import (
    DEFAULT_PARAMETERS,
    BreadcrumbsParameters,
    Clip,
    DareParameters,
    DareTiesParameters,
    DellaParameters,
    FisherParameters,
    LoraSpace,
    MergeRuleName,
    MergeSettings,
    Rescale,
    TaskArithmeticParameters,
    TiesConvention,
    TiesParameters,
    Trim,
)
from weft.server.merge.spaces import lora_space
from weft.server.merge.statistics import find_cut, lower_median
from weft.server.merge.tiles import Arrays, ArrayUpdate, Scratch, Update
from weft.server.outer import OuterName, OuterSettings, outer_schema

Array = npt.NDArray[Any]
SGD = OuterSettings()
NESTEROV = OuterSettings(name=OuterName.NESTEROV)
FULL = Schema((TensorSpec("bias", "F32", (7,)), TensorSpec("weight", "F32", (13, 29))))
LORA = Schema(
    (
        TensorSpec("head", "F32", (3, 5)),
        TensorSpec("q.lora_A.weight", "F32", (2, 9)),
        TensorSpec("q.lora_B.weight", "F32", (11, 2)),
    )
)


def unclipped(rule: MergeRuleName = MergeRuleName.MEAN, **more: Any) -> MergeSettings:
    return MergeSettings(rule=rule, clip=Clip.NONE, weight_multiple_max=1e9, **more)


def ties_settings(convention: TiesConvention, density: float = 0.2, scale: float = 1.0) -> MergeSettings:
    return unclipped(
        MergeRuleName.TIES, ties=TiesParameters(convention=convention, density=density, scale=scale)
    )


def random_arrays(schema: Schema, seed: int, size: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays({s.name: (size * rng.standard_normal(s.shape)).astype(np.float32) for s in schema.tensors})


def updates_of(
    schema: Schema, count: int, *, weights: Sequence[float] | None = None, seed: int = 0
) -> list[ArrayUpdate]:
    return [
        ArrayUpdate(
            worker_id=f"w{index:02d}",
            weight=weights[index] if weights else 1.0,
            deltas=random_arrays(schema, 100 * seed + index, 0.1),
            fisher=Arrays(
                {n: np.square(a) for n, a in random_arrays(schema, 100 * seed + 50 + index).arrays.items()}
            ),
        )
        for index in range(count)
    ]


def vector_update(values: Sequence[float], worker: str = "w", **more: Any) -> ArrayUpdate:
    return ArrayUpdate(worker_id=worker, deltas=Arrays({"v": np.array(values, np.float32)}), **more)


def vector_merge(updates: Sequence[ArrayUpdate], chosen: MergeSettings) -> Array:
    size = updates[0].deltas.arrays["v"].size
    return merge(updates, Schema((TensorSpec("v", "F32", (size,)),)), chosen)[0]["v"]


def input_grams(schema: Schema) -> Callable[[Update, str], Array]:
    """Grams of random inputs, others for every update and tensor."""
    widths = {spec.name: spec.shape[-1] for spec in schema.tensors}

    def gram(update: Update, name: str) -> Array:
        seed = zlib.crc32(f"{update.worker_id}/{name}".encode())
        inputs = np.random.default_rng(seed).standard_normal((50, widths[name])).astype(np.float32)
        return np.asarray(inputs.T @ inputs / 50)

    return gram


def merge(
    updates: Sequence[ArrayUpdate],
    schema: Schema,
    chosen: MergeSettings,
    *,
    outer: OuterSettings = SGD,
    start: Arrays | None = None,
    **more: Any,
) -> tuple[dict[str, Array], MergeReport]:
    sink = Arrays.zeros(schema)
    begin = start or Arrays.zeros(schema)
    if RULES[chosen.rule].needs_grams:
        more.setdefault("input_grams", input_grams(schema))
    report = merge_module(updates, begin, schema, sink, settings=chosen, outer=outer, **more)
    return dict(sink.arrays), report


def stacked(updates: Sequence[ArrayUpdate], name: str) -> Array:
    return np.array([u.deltas.arrays[name].reshape(-1) for u in updates], np.float64)


def reference_trim_official(row: Array, density: float) -> Array:
    k = row.size - int(row.size * density)
    return row if k == 0 else np.where(np.abs(row) >= np.sort(np.abs(row))[k - 1], row, 0)


def reference_ties_official(rows: dict[str, Array], density: float) -> dict[str, Array]:
    trimmed = {n: np.array([reference_trim_official(r, density) for r in x]) for n, x in rows.items()}
    signs = {n: np.sign(x.sum(0)) for n, x in trimmed.items()}
    majority = np.sign(sum(s.sum() for s in signs.values()))
    merged = {}
    for name, x in trimmed.items():
        sign = np.where(signs[name] == 0, majority, signs[name])
        chosen = np.where(np.where(sign > 0, x > 0, x < 0), x, 0)
        merged[name] = chosen.sum(0) / np.maximum((chosen != 0).sum(0), 1)
    return merged


def test_every_rule_name_has_a_row_and_parameters() -> None:
    assert set(RULES) == set(MergeRuleName) == set(DEFAULT_PARAMETERS)
    assert all(row.name == name for name, row in RULES.items())


def test_mean_is_the_weighted_mean() -> None:
    updates = updates_of(FULL, 5, weights=[1, 2, 3, 4, 0.5])
    merged, report = merge(updates, FULL, unclipped(), start=random_arrays(FULL, 9))
    for name, start in random_arrays(FULL, 9).arrays.items():
        expected = start.reshape(-1) + np.average(stacked(updates, name), axis=0, weights=[1, 2, 3, 4, 0.5])
        np.testing.assert_allclose(merged[name].reshape(-1), expected, rtol=1e-6, atol=1e-7)
    assert [c.weight for c in report.contributions] == pytest.approx([w / 10.5 for w in (1, 2, 3, 4, 0.5)])


WHOLE: dict[MergeRuleName, Any] = {
    MergeRuleName.TASK_ARITHMETIC: TaskArithmeticParameters(scale=1),
    MergeRuleName.DARE: DareParameters(density=1),
    MergeRuleName.DARE_TIES: DareTiesParameters(density=1),
    MergeRuleName.DELLA: DellaParameters(density=1, spread=0),
    MergeRuleName.BREADCRUMBS: BreadcrumbsParameters(scale=1),
}
"""Parameters that neither drop nor scale anything, of rules whose defaults do."""
SUMS = {MergeRuleName.TASK_ARITHMETIC, MergeRuleName.BREADCRUMBS, MergeRuleName.ISO}
"""Rules whose result grows with the number of updates."""
CHOOSY = {MergeRuleName.PCB, MergeRuleName.ISO, MergeRuleName.TSV}
"""Rules that leave out, or make other things of, a part of each update whatever their parameters."""


def whole(rule: MergeRuleName) -> MergeSettings:
    return MergeSettings(rule=rule, **({rule: WHOLE[rule]} if rule in WHOLE else {}))


@pytest.mark.parametrize("rule", sorted(set(MergeRuleName) - CHOOSY | {MergeRuleName.TSV}))
def test_one_contributor_without_trimming_is_the_identity(rule: MergeRuleName) -> None:
    update, start = updates_of(FULL, 1)[0], random_arrays(FULL, 9)
    merged, _ = merge([dataclasses.replace(update, sparse=True)], FULL, whole(rule), start=start)
    sign = -1 if rule is MergeRuleName.NEGATION else 1
    # Linear algebra rounds; sums of one do not.
    rtol, atol = (0, 0) if RULES[rule].scope is Scope.TILE else (1e-6, 1e-7)
    for name, values in start.arrays.items():
        expected = values + sign * update.deltas.arrays[name]
        np.testing.assert_allclose(merged[name], expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("rule", sorted(set(MergeRuleName) - CHOOSY - SUMS))
def test_duplicates_merge_to_themselves(rule: MergeRuleName) -> None:
    update = dataclasses.replace(updates_of(FULL, 1)[0], sparse=True)
    copies = [dataclasses.replace(update, task_id=str(number)) for number in range(2)]
    merged, _ = merge(copies, FULL, whole(rule))
    sign = -1 if rule is MergeRuleName.NEGATION else 1
    np.testing.assert_allclose(merged["weight"], sign * update.deltas.arrays["weight"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("rule", list(MergeRuleName))
def test_no_movement_leaves_the_start(rule: MergeRuleName) -> None:
    still = [ArrayUpdate(worker_id=w, deltas=Arrays.zeros(LORA), fisher=Arrays.zeros(LORA)) for w in "ab"]
    start = random_arrays(LORA, 3)
    merged, _ = merge(still, LORA, MergeSettings(rule=rule), start=start)
    for name, values in start.arrays.items():
        np.testing.assert_allclose(merged[name], values, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("clip", list(Clip))
@pytest.mark.parametrize(
    ("rule", "factor"),
    # PCB's tanh bends: only turning leaves it alike.
    [(r, f) for r in MergeRuleName for f in (-1.0, 2.0, -0.125) if r is not MergeRuleName.PCB or f == -1],
)
def test_turned_and_stretched_updates_give_the_turned_and_stretched_merge(
    rule: MergeRuleName, factor: float, clip: Clip
) -> None:
    updates = updates_of(FULL, 2 if rule is MergeRuleName.SLERP else 4)
    other = [
        dataclasses.replace(u, deltas=Arrays({n: np.float32(factor) * a for n, a in u.deltas.arrays.items()}))
        for u in updates
    ]
    chosen = MergeSettings(rule=rule, clip=clip)
    one, turned = merge(updates, FULL, chosen)[0], merge(other, FULL, chosen)[0]
    # Powers of two round nothing; linear algebra does not promise as much.
    rtol, atol = (0.0, 0.0) if RULES[rule].scope is Scope.TILE else (1e-5, 1e-6)
    for name in one:
        np.testing.assert_allclose(turned[name], np.float32(factor) * one[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("chosen", "outer", "schema"),
    [
        (MergeSettings(), SGD, FULL),
        (MergeSettings(), NESTEROV, FULL),
        (MergeSettings(rule=MergeRuleName.TIES), SGD, FULL),
        (MergeSettings(rule=MergeRuleName.TIES), SGD, LORA),
        (ties_settings(TiesConvention.PEFT), NESTEROV, LORA),
        (MergeSettings(rule=MergeRuleName.FISHER), SGD, LORA),
        (MergeSettings(lora=LoraSpace.EXACT), SGD, LORA),
        (MergeSettings(lora=LoraSpace.FACTORS), SGD, LORA),
    ],
)
@settings(max_examples=8, deadline=None)
@given(
    order=st.permutations(range(9)),
    tile_elements=st.sampled_from([1, 2, 7, 64, 1000]),
    threads=st.integers(1, 3),
)
def test_the_same_updates_give_the_same_bytes(
    chosen: MergeSettings,
    outer: OuterSettings,
    schema: Schema,
    order: list[int],
    tile_elements: int,
    threads: int,
) -> None:
    updates = updates_of(schema, 9, weights=[1, 2, 3, 4, 5, 6, 7, 8, 9.5])
    start = random_arrays(schema, 7)
    held = random_arrays(outer_schema(schema, outer), 8) if outer.num_slots else None

    def bytes_of(given_updates: Sequence[ArrayUpdate], **more: Any) -> list[bytes]:
        after = Arrays.zeros(outer_schema(schema, outer)) if outer.num_slots else None
        state = OuterState(before=held, after=after) if after else None
        merged, _ = merge(given_updates, schema, chosen, outer=outer, start=start, outer_state=state, **more)
        return [a.tobytes() for a in (*merged.values(), *(after.arrays.values() if after else ()))]

    shuffled = [updates[index] for index in order]
    assert bytes_of(shuffled, tile_elements=tile_elements, crew=Threads(threads)) == bytes_of(updates)


def distinct(seed: int, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Different magnitudes on a grid of 2⁻¹², so that float32 sums are exact in any order."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    values = (rng.permutation(size) + 1) * rng.choice([-1, 1], size) / 4096
    return np.asarray(values.reshape(shape), np.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("density", [0.1, 0.2, 0.5])
def test_ties_of_peft_is_peft_bit_for_bit(count: int, density: float) -> None:
    from peft.utils import merge_utils

    updates = [
        ArrayUpdate(
            worker_id=f"w{index}",
            deltas=Arrays({s.name: distinct(31 * index + count, s.shape) for s in FULL.tensors}),
        )
        for index in range(count)
    ]
    merged, _ = merge(updates, FULL, ties_settings(TiesConvention.PEFT, density))
    name = "weight"
    expected = merge_utils.ties(
        [torch.from_numpy(u.deltas.arrays[name]) for u in updates], torch.ones(count), density
    )
    np.testing.assert_array_equal(merged[name], expected.numpy())


def test_ties_of_peft_puts_weights_in_the_numerator_only() -> None:
    from peft.utils import merge_utils

    weights = [0.5, 1.0, 1.5]
    updates = updates_of(FULL, 3, weights=weights)
    merged, _ = merge(updates, FULL, ties_settings(TiesConvention.PEFT))
    rows = [torch.from_numpy(u.deltas.arrays["weight"]) for u in updates]
    expected = merge_utils.ties(rows, torch.tensor(weights), 0.2).numpy()
    np.testing.assert_allclose(merged["weight"], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_official_ties_is_the_authors_algorithm_tensor_by_tensor(density: float, seed: int) -> None:
    # Values from a coarse grid make equal magnitudes and sign ties common.
    rng = np.random.default_rng(seed)
    updates = [
        ArrayUpdate(
            worker_id=f"w{index}",
            deltas=Arrays(
                {s.name: (rng.integers(-6, 7, s.shape) / 4).astype(np.float32) for s in FULL.tensors}
            ),
        )
        for index in range(4)
    ]
    merged, _ = merge(updates, FULL, ties_settings(TiesConvention.OFFICIAL, density))
    expected = reference_ties_official({s.name: stacked(updates, s.name) for s in FULL.tensors}, density)
    for name, values in expected.items():
        np.testing.assert_allclose(merged[name].reshape(-1), values, rtol=1e-6)


@pytest.mark.parametrize(
    ("convention", "rest", "expected"),
    [
        (TiesConvention.PEFT, [-1, -1], 1),
        (TiesConvention.OFFICIAL, [-1, -1], -1),
        (TiesConvention.OFFICIAL, [2, 2], 1),
        (TiesConvention.OFFICIAL, [1, -1], -1),
    ],
    ids=["peft-plus", "majority-minus", "majority-plus", "no-majority-is-minus"],
)
def test_a_sign_tie(convention: TiesConvention, rest: list[float], expected: float) -> None:
    updates = [vector_update([1, *rest], "a"), vector_update([-1, *rest], "b")]
    assert vector_merge(updates, ties_settings(convention, 1.0))[0] == expected


def test_zeros_do_not_count_in_the_disjoint_mean() -> None:
    updates = [vector_update(row, worker) for row, worker in (([4, 0], "a"), ([2, 0], "b"), ([0, 0], "c"))]
    np.testing.assert_array_equal(vector_merge(updates, ties_settings(TiesConvention.OFFICIAL, 1.0)), [3, 0])


def test_ties_scale_multiplies_the_movement() -> None:
    updates = updates_of(FULL, 3)
    once, twice = (merge(updates, FULL, ties_settings(TiesConvention.PEFT, 0.2, s))[0] for s in (1.0, 2.0))
    np.testing.assert_array_equal(2 * once["weight"], twice["weight"])


@pytest.mark.parametrize("convention", list(TiesConvention))
def test_what_a_codec_made_sparse_is_not_trimmed_again(convention: TiesConvention) -> None:
    row = np.zeros(100)
    row[::4] = np.where(np.arange(25) % 2, 0.5, -0.5)  # ternary: every magnitude is the same
    updates = [vector_update(row.tolist(), worker, sparse=True) for worker in "ab"]
    np.testing.assert_array_equal(vector_merge(updates, ties_settings(convention, 0.1)), row)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=40),
    density=st.floats(0.01, 1),
    at=st.integers(0, 40),
)
def test_a_cut_keeps_the_largest_whatever_the_tile(values: list[int], density: float, at: int) -> None:
    row, scratch = np.array(values, np.float32), Scratch()
    cut, num_kept = find_cut(
        lambda *span: row[slice(*span)], row.size, Trim(density=density, keeps_ties=False), scratch
    )
    halves = [cut.apply(row[:at], 0, scratch).copy(), cut.apply(row[at:], at, scratch).copy()]
    kept = cut.apply(row, 0, scratch)
    np.testing.assert_array_equal(np.concatenate(halves), kept)
    first = sorted(range(row.size), key=lambda i: (-abs(row[i]), i))[: max(1, int(row.size * density))]
    np.testing.assert_array_equal(np.flatnonzero(kept), sorted(i for i in first if row[i]))
    assert num_kept == np.count_nonzero(kept)


def test_a_tiny_tensor_keeps_one_value() -> None:
    assert vector_merge([vector_update([1, -3, 2, 0])], ties_settings(TiesConvention.PEFT, 0.2)).tolist() == [
        0,
        -3,
        0,
        0,
    ]


def test_the_report_says_what_was_kept() -> None:
    _, report = merge(
        [vector_update(range(100))],
        Schema((TensorSpec("v", "F32", (100,)),)),
        ties_settings(TiesConvention.PEFT),
    )
    assert report.contributions[0].kept == 0.2


def test_fisher_weighs_by_the_bounded_diagonal() -> None:
    updates = updates_of(FULL, 4, weights=[1, 2, 3, 4])
    merged, _ = merge(updates, FULL, unclipped(MergeRuleName.FISHER))
    fishers = [u.fisher.arrays for u in updates if u.fisher]
    means = [np.concatenate([a.reshape(-1) for a in f.values()]).astype(np.float64).mean() for f in fishers]
    for name in ("bias", "weight"):
        bounded = np.array(
            [
                w * np.clip(f[name].astype(np.float64) / m, 0.1, 10).reshape(-1)
                for w, f, m in zip((1, 2, 3, 4), fishers, means, strict=True)
            ]
        )
        expected = (bounded * stacked(updates, name)).sum(0) / bounded.sum(0)
        np.testing.assert_allclose(merged[name].reshape(-1), expected, rtol=1e-6, atol=1e-8)


def test_equal_fishers_are_the_mean() -> None:
    fisher = Arrays({n: np.abs(a) for n, a in random_arrays(FULL, 5).arrays.items()})
    updates = [dataclasses.replace(u, fisher=fisher) for u in updates_of(FULL, 3, weights=[1, 2, 3])]
    weighted, _ = merge(updates, FULL, unclipped(MergeRuleName.FISHER))
    plain, _ = merge(updates, FULL, unclipped())
    np.testing.assert_allclose(weighted["weight"], plain["weight"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("claim", [1e-30, 1e30], ids=["tiny", "huge"])
def test_the_scale_of_a_fisher_does_not_matter(claim: float) -> None:
    updates = updates_of(FULL, 3)
    fisher = updates[0].fisher
    assert fisher is not None
    scaled = Arrays({n: (a * claim).astype(np.float32) for n, a in fisher.arrays.items()})
    liar = dataclasses.replace(updates[0], fisher=scaled)
    honest, _ = merge(updates, FULL, unclipped(MergeRuleName.FISHER))
    claimed, _ = merge([liar, *updates[1:]], FULL, unclipped(MergeRuleName.FISHER))
    np.testing.assert_allclose(claimed["weight"], honest["weight"], rtol=1e-4, atol=1e-7)


def test_no_fisher_owns_a_coordinate_beyond_cap_over_floor() -> None:
    spike = Arrays({"v": np.array([1e30] + [0] * 99, np.float32)})
    flat = Arrays({"v": np.ones(100, np.float32)})
    updates = [
        vector_update([1] * 100, "a", fisher=spike),
        vector_update([0] * 100, "b", fisher=flat),
    ]
    merged = vector_merge(updates, unclipped(MergeRuleName.FISHER))
    np.testing.assert_allclose(merged[[0, 1]], [10 / 11, 0.1 / 1.1], rtol=1e-6)


@pytest.mark.parametrize(
    "rule", [r for r in MergeRuleName if r not in (MergeRuleName.SLERP, MergeRuleName.MODEL_STOCK)]
)
@pytest.mark.parametrize("schema", [FULL, LORA], ids=["full", "lora"])
def test_one_update_of_ten_thousand_times_the_size_moves_no_more_than_the_others(
    rule: MergeRuleName, schema: Schema
) -> None:
    updates, start = updates_of(schema, 5), random_arrays(schema, 6)
    big = Arrays({n: (a * 1e4).astype(np.float32) for n, a in updates[2].deltas.arrays.items()})
    hostile = [*updates[:2], dataclasses.replace(updates[2], deltas=big), *updates[3:]]
    merged, report = merge(hostile, schema, MergeSettings(rule=rule), start=start)
    honest, _ = merge(updates, schema, MergeSettings(rule=rule), start=start)
    assert report.contributions[2].clip_factor < 2e-4
    for name, values in start.arrays.items():
        moved, meant = (np.linalg.norm(m[name] - values) for m in (merged, honest))
        assert moved < 3 * meant


def test_clipping_brings_every_norm_to_the_lower_median() -> None:
    updates = [vector_update([size, 0], f"w{size}") for size in (1, 2, 3, 40)]
    _, report = merge(updates, Schema((TensorSpec("v", "F32", (2,)),)), MergeSettings())
    assert [c.clip_factor for c in report.contributions] == pytest.approx([1, 1, 2 / 3, 2 / 40], rel=1e-7)
    assert [c.parameter_norm for c in report.contributions] == [1, 2, 3, 40]


def test_lower_median_ignores_idle_workers() -> None:
    assert lower_median([0, 0, 0, 5, 7]) == 5
    assert lower_median([0, 0]) == 0


def test_a_stated_weight_is_bounded() -> None:
    updates = [vector_update([1], "a"), vector_update([1], "b"), vector_update([1], "c", weight=1e12)]
    _, report = merge(updates, Schema((TensorSpec("v", "F32", (1,)),)), MergeSettings())
    assert [c.weight for c in report.contributions] == pytest.approx([1 / 12, 1 / 12, 10 / 12])


def test_updates_without_weight_do_not_count() -> None:
    updates = [vector_update([1, 1], "a"), vector_update([9, 9], "b", weight=0.0)]
    np.testing.assert_array_equal(vector_merge(updates, ties_settings(TiesConvention.OFFICIAL, 1.0)), [1, 1])


@pytest.mark.parametrize("updates", [[], [vector_update([1], weight=0.0)]], ids=["none", "weightless"])
def test_nothing_to_merge_is_an_error(updates: list[ArrayUpdate]) -> None:
    with pytest.raises(EngineFailed, match="nothing to merge"):
        merge(updates, Schema((TensorSpec("v", "F32", (1,)),)), MergeSettings())


@pytest.mark.parametrize(
    ("updates", "outer", "message"),
    [
        ([vector_update([1]), vector_update([1])], SGD, "twice"),
        ([vector_update([1], weight=-1.0)], SGD, "weights"),
        ([vector_update([1], weight=float("nan"))], SGD, "weights"),
        ([vector_update([1])], NESTEROV, "outer_state"),
    ],
    ids=["twice", "negative", "nan", "stateless"],
)
def test_misuse_is_a_value_error(updates: list[ArrayUpdate], outer: OuterSettings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge(updates, Schema((TensorSpec("v", "F32", (1,)),)), MergeSettings(), outer=outer)


def test_a_state_for_an_optimiser_without_one_is_a_value_error() -> None:
    state = OuterState(before=None, after=Arrays.zeros(FULL))
    with pytest.raises(ValueError, match="no state"):
        merge(updates_of(FULL, 1), FULL, MergeSettings(), outer_state=state)


def test_arrays_must_be_float32_in_c_order() -> None:
    with pytest.raises(ValueError, match="float32"):
        Arrays({"v": np.zeros(2)})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="C order"):
        Arrays({"v": np.zeros((2, 3), np.float32).T})


def test_a_fisher_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no Fisher"):
        vector_merge([vector_update([1])], MergeSettings(rule=MergeRuleName.FISHER))


def test_a_memory_mapped_sink_holds_the_version(tmp_path: Path) -> None:
    sink = Arrays({"v": np.memmap(tmp_path / "v", np.float32, "w+", shape=(4, 5))})
    schema = Schema((TensorSpec("v", "F32", (4, 5)),))
    update = ArrayUpdate(worker_id="w", deltas=random_arrays(schema, 1))
    merge_module(
        [update], Arrays.zeros(schema), schema, sink, settings=MergeSettings(), outer=SGD, tile_elements=3
    )
    np.testing.assert_array_equal(sink.arrays["v"], update.deltas.arrays["v"])


def test_nesterov_over_rounds_is_torch_sgd() -> None:
    schema = Schema((TensorSpec("v", "F32", (50,)),))
    weights = random_arrays(schema, 1)
    parameter = torch.nn.Parameter(torch.tensor(weights.arrays["v"], dtype=torch.float64))
    oracle = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    held: Arrays | None = None
    for round_number in range(4):
        update = ArrayUpdate(worker_id="w", deltas=random_arrays(schema, 10 + round_number))
        after = Arrays.zeros(outer_schema(schema, NESTEROV))
        state = OuterState(before=held, after=after)
        merged, _ = merge([update], schema, MergeSettings(), outer=NESTEROV, start=weights, outer_state=state)
        weights, held = Arrays(merged), after
        assert after.arrays["step"] == [round_number + 1]
        parameter.grad = -torch.tensor(update.deltas.arrays["v"], dtype=torch.float64)
        oracle.step()
    np.testing.assert_allclose(weights.arrays["v"], parameter.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"rule": "tys"}, "merge.rule"),
        ({"rule": "ties", "ties": {"density": 0.0}}, "merge.ties.density"),
        ({"rule": "ties", "ties": {"scale": -1.0}}, "merge.ties.scale"),
        ({"rule": "ties", "ties": {"convention": "mine"}}, "merge.ties.convention"),
        ({"rule": "fisher", "fisher": {"floor": 2.0}}, "merge.fisher.floor"),
        ({"rule": "fisher", "fisher": {"cap": 0.5}}, "merge.fisher.cap"),
        ({"clip_multiple": 0.0}, "merge.clip_multiple"),
        ({"weight_multiple_max": 0.5}, "merge.weight_multiple_max"),
        ({"rule": "mean", "ties": {"density": 0.1}}, "merge.ties"),
        ({"rule": "ties", "fisher": {}}, "merge.fisher"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(table: dict[str, Any], key: str) -> None:
    with pytest.raises(RunFileError, match=re.escape(key)):
        from_table(MergeSettings, table, where="merge")


def test_settings_survive_a_table() -> None:
    chosen = MergeSettings(rule=MergeRuleName.FISHER, lora=LoraSpace.FACTORS, fisher=FisherParameters(cap=5))
    assert from_table(MergeSettings, to_table(chosen)) == chosen
    assert from_table(MergeSettings, to_table(MergeSettings())) == MergeSettings()


@pytest.mark.parametrize(
    ("rule", "outer", "space"),
    [
        (MergeRuleName.MEAN, SGD, LoraSpace.EXACT),
        (MergeRuleName.MEAN, NESTEROV, LoraSpace.FACTORS),
        (MergeRuleName.TIES, SGD, LoraSpace.FACTORS),
        (MergeRuleName.FISHER, SGD, LoraSpace.FACTORS),
    ],
)
def test_lora_space_when_the_file_says_nothing(
    rule: MergeRuleName, outer: OuterSettings, space: LoraSpace
) -> None:
    assert lora_space(MergeSettings(rule=rule), outer) is space


@pytest.mark.parametrize(
    ("rule", "outer", "keys"),
    [
        (MergeRuleName.TIES, SGD, ("merge.lora", "merge.rule")),
        (MergeRuleName.FISHER, SGD, ("merge.lora", "merge.rule")),
        (MergeRuleName.MEAN, NESTEROV, ("merge.lora", "outer.name")),
    ],
)
def test_exact_is_refused_where_it_cannot_be(
    rule: MergeRuleName, outer: OuterSettings, keys: tuple[str, str]
) -> None:
    with pytest.raises(UsageError) as caught:
        lora_space(MergeSettings(rule=rule, lora=LoraSpace.EXACT), outer)
    assert all(key in caught.value.message for key in keys)


def test_the_example_of_the_documentation_is_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "extend.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", page.split("## A merge rule")[1], re.DOTALL)[0]
    assert example.count("\n") <= 12
    namespace: dict[str, Any] = {}
    exec(compile(example, "docs/extend.md", "exec"), namespace)  # noqa: S102
    monkeypatch.setitem(rules.RULES, MergeRuleName.MEAN, namespace["MIDRANGE"])
    updates = updates_of(FULL, 5)
    merged, _ = merge(updates, FULL, unclipped())
    rows = stacked(updates, "weight")
    expected = ((rows.min(axis=0) + rows.max(axis=0)) / 2).astype(np.float32)
    np.testing.assert_array_equal(merged["weight"].reshape(-1), expected)


@pytest.mark.skipif(not can_fork(), reason="processes are not forked here")
@pytest.mark.parametrize(
    ("chosen", "outer", "schema"),
    [
        (MergeSettings(), NESTEROV, FULL),
        (MergeSettings(rule=MergeRuleName.TIES), SGD, LORA),
        (MergeSettings(rule=MergeRuleName.KRUM), SGD, FULL),
        (MergeSettings(rule=MergeRuleName.TSV), SGD, LORA),
        (MergeSettings(lora=LoraSpace.EXACT, rescale=Rescale.RDA), SGD, LORA),
    ],
)
def test_forked_processes_give_the_same_bytes(
    chosen: MergeSettings, outer: OuterSettings, schema: Schema
) -> None:
    updates, start = updates_of(schema, 6, weights=[1, 2, 3, 4, 5, 6.5]), random_arrays(schema, 7)

    def merged_by(run: Callable[[Callable[[Crew], MergeReport]], MergeReport]) -> tuple[list[bytes], Any]:
        sink, state = Arrays.shared(schema), None
        after = Arrays.shared(outer_schema(schema, outer)) if outer.num_slots else Arrays({})
        if outer.num_slots:
            state = OuterState(before=None, after=after)
        report = run(
            lambda crew: merge_module(
                updates, start, schema, sink, settings=chosen, outer=outer, outer_state=state, crew=crew
            )
        )
        arrays = (*sink.arrays.values(), *after.arrays.values())
        return [each.tobytes() for each in arrays], (report.contributions, report.truncation_error)

    alone = merged_by(lambda program: program(ALONE))
    assert any(any(each) for each in alone[0])
    assert merged_by(lambda program: run_forked(3, program)) == alone
