"""Linear, sparse and angular rules against float64 references written from their papers, and against peft."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.common.errors import EngineFailed, RunFileError
from weft.common.modules import Schema, TensorSpec
from weft.common.settings import from_table, to_table
from weft.server.merge import masks, sparse
from weft.server.merge.crew import Threads
from weft.server.merge.engine import MergeReport, merge_module
from weft.server.merge.rules import RULES
from weft.server.merge.settings import (
    BreadcrumbsParameters,
    Clip,
    DareParameters,
    DareTiesParameters,
    DellaParameters,
    LoraSpace,
    MagnitudeParameters,
    MergeRuleName,
    MergeSettings,
    ModelStockParameters,
    NegationParameters,
    Rescale,
    SlerpParameters,
    TaskArithmeticParameters,
    TiesConvention,
    TiesParameters,
)
from weft.server.merge.statistics import is_norm_enough
from weft.server.merge.tiles import Arrays, ArrayUpdate, Float32, Indices
from weft.server.outer import OuterSettings

Array = npt.NDArray[Any]
A, B = "q.lora_A.weight", "q.lora_B.weight"
FULL = Schema((TensorSpec("bias", "F32", (7,)), TensorSpec("weight", "F32", (13, 29))))
LORA = Schema((TensorSpec(A, "F32", (2, 9)), TensorSpec(B, "F32", (11, 2))))
WEIGHTS = [1.0, 2.0, 3.5]


def rule(name: MergeRuleName, parameters: Any = None, **more: Any) -> MergeSettings:
    tables = {} if parameters is None else {str(name): parameters}
    return MergeSettings(rule=name, clip=Clip.NONE, weight_multiple_max=1e9, **tables, **more)


def random_arrays(schema: Schema, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays({s.name: rng.standard_normal(s.shape).astype(np.float32) for s in schema.tensors})


def updates_of(schema: Schema, weights: Sequence[float] = WEIGHTS) -> list[ArrayUpdate]:
    return [
        ArrayUpdate(worker_id=f"w{index}", weight=weight, deltas=random_arrays(schema, index))
        for index, weight in enumerate(weights)
    ]


def merge(
    updates: Sequence[Any], schema: Schema, chosen: MergeSettings, **more: Any
) -> tuple[dict[str, Array], MergeReport]:
    sink, start = Arrays.zeros(schema), more.pop("start", Arrays.zeros(schema))
    report = merge_module(updates, start, schema, sink, settings=chosen, outer=OuterSettings(), **more)
    return dict(sink.arrays), report


def vector(
    rows: Sequence[Sequence[float]], chosen: MergeSettings, weights: Sequence[float] | None = None
) -> Array:
    updates = [
        ArrayUpdate(
            worker_id=f"w{i}",
            weight=weights[i] if weights else 1.0,
            deltas=Arrays({"v": np.array(row, np.float32)}),
        )
        for i, row in enumerate(rows)
    ]
    return merge(updates, Schema((TensorSpec("v", "F32", (len(rows[0]),)),)), chosen)[0]["v"]


def rows_of(updates: Sequence[ArrayUpdate], name: str = "weight") -> list[Array]:
    return [update.deltas.arrays[name].astype(np.float64) for update in updates]


def normal(weights: Sequence[float] = WEIGHTS) -> Array:
    return np.array(weights) / sum(weights)


def trimmed(row: Array, density: float) -> Array:
    count = max(1, int(density * row.size))
    smallest = np.sort(np.abs(row), axis=None)[-count]
    return np.where(np.abs(row) >= smallest, row, 0)


def close(found: Array, expected: Array) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_task_arithmetic_is_a_multiple_of_the_sum() -> None:
    updates = updates_of(FULL, [1, 1, 1])
    merged, _ = merge(updates, FULL, rule(MergeRuleName.TASK_ARITHMETIC, TaskArithmeticParameters(scale=0.4)))
    close(merged["weight"], 0.4 * np.sum(rows_of(updates), axis=0))


def test_task_arithmetic_is_what_peft_calls_it() -> None:
    from peft.utils import merge_utils

    updates = updates_of(FULL, [1, 1, 1])
    merged, _ = merge(updates, FULL, rule(MergeRuleName.TASK_ARITHMETIC, TaskArithmeticParameters(scale=0.4)))
    rows = [torch.from_numpy(update.deltas.arrays["weight"]) for update in updates]
    close(merged["weight"], merge_utils.task_arithmetic(rows, torch.full((3,), 0.4)).numpy())


def test_task_arithmetic_of_lora_is_of_the_product() -> None:
    # Rank 1 in a module of rank 2: the sum of two fits.
    updates, start = updates_of(LORA, [1, 1]), Arrays.zeros(LORA)
    start.arrays[A][:] = random_arrays(LORA, 9).arrays[A]
    for index, update in enumerate(updates):
        update.deltas.arrays[A][:] = 0
        update.deltas.arrays[B][:, 1 - index] = 0
    chosen = rule(MergeRuleName.TASK_ARITHMETIC, TaskArithmeticParameters(scale=0.4), lora=LoraSpace.EXACT)
    merged, _ = merge(updates, LORA, chosen, start=start)
    products = [update.deltas.arrays[B] @ start.arrays[A] for update in updates]
    close(merged[B] @ merged[A], 0.4 * (products[0] + products[1]))


@pytest.mark.parametrize("space", list(LoraSpace))
def test_negation_turns_the_product_around(space: LoraSpace) -> None:
    (update,) = updates_of(LORA, [1])
    chosen = rule(MergeRuleName.NEGATION, NegationParameters(scale=0.5), lora=space)
    merged, _ = merge([update], LORA, chosen)
    expected = -update.deltas.arrays[B] @ update.deltas.arrays[A]
    scale = 0.5 if space is LoraSpace.EXACT else 0.25  # factors: each is halved
    close(merged[B] @ merged[A], scale * expected)


def test_magnitude_is_the_mean_of_what_is_left() -> None:
    updates = updates_of(FULL)
    merged, _ = merge(updates, FULL, rule(MergeRuleName.MAGNITUDE, MagnitudeParameters(density=0.3)))
    expected = sum(w * trimmed(row, 0.3) for w, row in zip(normal(), rows_of(updates), strict=True))
    close(merged["weight"], expected)


def test_magnitude_is_what_peft_prunes() -> None:
    from peft.utils import merge_utils

    updates = updates_of(FULL)
    merged, _ = merge(updates, FULL, rule(MergeRuleName.MAGNITUDE, MagnitudeParameters(density=0.3)))
    rows = [torch.from_numpy(update.deltas.arrays["weight"]) for update in updates]
    close(merged["weight"], merge_utils.magnitude_prune(rows, torch.tensor(normal()), 0.3).numpy())


def reference_mergekit_ties(rows: Sequence[Array], weights: Array, density: float) -> Array:
    """Exactly max(1, ⌊dρ⌋) kept; sign of the weighted sum, ties +; divided by the agreeing weights."""
    weighted = np.array([w * trimmed(row, density) for w, row in zip(weights, rows, strict=True)])
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    agree = np.sign(weighted) == sign
    total = (agree * weights[:, None, None]).sum(0)
    return np.asarray((weighted * agree).sum(0) / np.where(total > 0, total, 1))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS, [0.2, 2.0, 0.3]])
def test_ties_of_mergekit_elects_by_weight(weights: list[float]) -> None:
    updates = updates_of(FULL, weights)
    ties = TiesParameters(convention=TiesConvention.MERGEKIT, density=0.5)
    merged, _ = merge(updates, FULL, rule(MergeRuleName.TIES, ties))
    close(merged["weight"], reference_mergekit_ties(rows_of(updates), normal(weights), 0.5))


@pytest.mark.parametrize("held", [0, 2, 16])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("weights", [[1.0] * 4, [2.0, 2.0, 1.0, 1.0]], ids=["equal", "weighted"])
def test_ties_of_masses_take_the_majority_sign_of_the_module(
    monkeypatch: pytest.MonkeyPatch, held: int, sign: int, weights: list[float]
) -> None:
    """However many a tile has: they are written one by one, or the tile is merged again."""
    monkeypatch.setattr(sparse, "_TIES_HELD", held)
    rng, tied = np.random.default_rng(7), [3, 4, 130, 131, 132, 133, 499]
    rows = rng.standard_normal((4, 500)).astype(np.float32) + np.float32(sign / 2)
    rows[:, tied] = np.array([[1], [-1], [2], [-2]], np.float32)
    updates = [
        ArrayUpdate(worker_id=f"w{n}", weight=weight, deltas=Arrays({"v": row}))
        for n, (row, weight) in enumerate(zip(rows, weights, strict=True))
    ]
    schema = Schema((TensorSpec("v", "F32", (500,)),))
    chosen = rule(MergeRuleName.TIES, TiesParameters(density=1))
    one_by_one, _ = merge(updates, schema, chosen, tile_elements=1)
    agreeing = (rows[:, tied] * sign > 0) * np.array(weights)[:, np.newaxis]
    close(one_by_one["v"][tied], np.average(rows[:, tied], axis=0, weights=agreeing))
    for tile_elements in (50, 128, 500):
        merged, _ = merge(updates, schema, chosen, tile_elements=tile_elements)
        np.testing.assert_array_equal(merged["v"], one_by_one["v"])


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS])
def test_ties_by_frequency_is_that_of_peft(weights: list[float]) -> None:
    from peft.utils import merge_utils

    updates = updates_of(FULL, weights)
    ties = TiesParameters(convention=TiesConvention.FREQUENCY, density=0.5)
    merged, _ = merge(updates, FULL, rule(MergeRuleName.TIES, ties))
    rows = [torch.from_numpy(update.deltas.arrays["weight"]) for update in updates]
    expected = merge_utils.ties(
        rows, torch.tensor(3 * normal(weights)), 0.5, majority_sign_method="frequency"
    )
    close(merged["weight"], expected.numpy())


@pytest.mark.parametrize(
    ("convention", "weights", "expected"),
    [
        (TiesConvention.PEFT, None, 3),
        (TiesConvention.FREQUENCY, None, -1),
        (TiesConvention.MERGEKIT, [1.0, 10.0, 10.0], -1),
        (TiesConvention.OFFICIAL, [1.0, 10.0, 10.0], 3),
    ],
)
def test_the_conventions_part_where_mass_count_and_weight_do(
    convention: TiesConvention, weights: list[float] | None, expected: float
) -> None:
    ties = TiesParameters(convention=convention, density=1)
    assert vector([[3], [-1], [-1]], rule(MergeRuleName.TIES, ties), weights) == pytest.approx([expected])


def test_sign_majority_votes_by_weight() -> None:
    votes = vector(
        [[3, 1, 0, 2], [-1, 1, 0, -2], [-1, -4, 2, 0]], rule(MergeRuleName.SIGN_MAJORITY), [1, 1, 1]
    )
    close(votes, np.array([-5 / 3, 2, 2 / 3, 0]))
    close(vector([[3], [-1]], rule(MergeRuleName.SIGN_MAJORITY), [2, 1]), np.array([7 / 3]))


def dropped(update: ArrayUpdate, name: str, density: float, seed: int = 0) -> Array:
    values = update.deltas.arrays[name]
    words = masks.chances(update, name, seed, 0, values.size).reshape(values.shape)
    share = round(density * 65536) / 65536
    return np.asarray(values * (words < share * 65536) / share, np.float64)


def test_dare_is_the_mean_of_what_chance_leaves_rescaled() -> None:
    updates = updates_of(FULL)
    merged, _ = merge(updates, FULL, rule(MergeRuleName.DARE, DareParameters(density=0.3, seed=5)))
    expected = sum(w * dropped(update, "weight", 0.3, 5) for w, update in zip(normal(), updates, strict=True))
    close(merged["weight"], expected)


def test_dare_ties_is_the_election_of_peft_among_what_chance_leaves() -> None:
    updates = updates_of(FULL, [1, 1, 1])
    merged, _ = merge(updates, FULL, rule(MergeRuleName.DARE_TIES, DareTiesParameters(density=0.6)))
    rows = np.array([dropped(update, "weight", 0.6) for update in updates])
    agree = np.sign(rows) == np.where(rows.sum(0) >= 0, 1, -1)
    close(merged["weight"], (rows * agree).sum(0) / np.maximum(agree.sum(0), 1))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS, [0.2, 2.0, 0.3]])
@pytest.mark.parametrize("convention", list(TiesConvention))
def test_without_averaging_what_agrees_is_added_up_by_weight(
    convention: TiesConvention, weights: list[float]
) -> None:
    updates = updates_of(FULL, weights)
    rows, each = rows_of(updates), normal(weights)
    votes = {
        TiesConvention.FREQUENCY: np.sum(np.sign(rows), axis=0),
        TiesConvention.MERGEKIT: sum(w * row for w, row in zip(each, rows, strict=True)),
    }.get(convention, np.sum(rows, axis=0))
    agree = np.sign(rows) == np.where(votes >= 0, 1, -1)
    expected = 1.5 * (each[:, None, None] * rows * agree).sum(0)
    for chosen in (
        rule(MergeRuleName.TIES, TiesParameters(convention=convention, density=1, average=False, scale=1.5)),
        rule(
            MergeRuleName.DARE_TIES,
            DareTiesParameters(convention=convention, density=1, average=False, scale=1.5),
        ),
    ):
        close(merge(updates, FULL, chosen)[0]["weight"], expected)


@pytest.mark.parametrize("convention", list(TiesConvention))
def test_dare_ties_without_dropping_is_ties_without_trimming(convention: TiesConvention) -> None:
    # Values of a coarse grid tie often, which the official convention resolves over the module.
    updates = updates_of(FULL, WEIGHTS)
    for update in updates:
        for values in update.deltas.arrays.values():
            values[:] = np.rint(values)
    dare = rule(MergeRuleName.DARE_TIES, DareTiesParameters(convention=convention, density=1))
    ties = rule(MergeRuleName.TIES, TiesParameters(convention=convention, density=1))
    one, other = (merge(updates, FULL, chosen)[0] for chosen in (dare, ties))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS])
def test_dare_that_drops_nothing_is_that_of_peft(weights: list[float]) -> None:
    from peft.utils import merge_utils

    updates = updates_of(FULL, weights)
    rows, each = [torch.from_numpy(u.deltas.arrays["weight"]) for u in updates], torch.tensor(normal(weights))
    merged, _ = merge(updates, FULL, rule(MergeRuleName.DARE, DareParameters(density=1)))
    with pytest.warns(UserWarning, match="density"):
        linear, ties = merge_utils.dare_linear(rows, each, 1.0), merge_utils.dare_ties(rows, 3 * each, 1.0)
    close(merged["weight"], linear.numpy())
    merged, _ = merge(updates, FULL, rule(MergeRuleName.DARE_TIES, DareTiesParameters(density=1)))
    close(merged["weight"], ties.numpy())


@pytest.mark.parametrize("name", [MergeRuleName.MAGNITUDE, MergeRuleName.BREADCRUMBS])
def test_what_a_codec_made_sparse_is_not_trimmed_again(name: MergeRuleName) -> None:
    row = np.zeros((1, 100), np.float32)
    row[0, ::4] = np.where(np.arange(25) % 2, 0.5, -0.5)
    updates = [ArrayUpdate(worker_id=worker, deltas=Arrays({"v": row[0]}), sparse=True) for worker in "ab"]
    parameters = {
        MergeRuleName.MAGNITUDE: MagnitudeParameters(density=0.1),
        MergeRuleName.BREADCRUMBS: BreadcrumbsParameters(density=0.1, outliers=0.1, scale=0.5),
    }[name]
    merged, _ = merge(updates, Schema((TensorSpec("v", "F32", (100,)),)), rule(name, parameters))
    np.testing.assert_array_equal(merged["v"], row[0])


def test_dare_keeps_the_mean_over_seeds() -> None:
    (update,) = updates_of(FULL, [1])
    density, seeds = 0.4, 400
    merged = [
        merge([update], FULL, rule(MergeRuleName.DARE, DareParameters(density=density, seed=seed)))[0][
            "weight"
        ]
        for seed in range(seeds)
    ]
    values = update.deltas.arrays["weight"]
    deviation = np.abs(values) * np.sqrt((1 - density) / density / seeds)
    assert (np.abs(np.mean(merged, axis=0) - values) < 5.5 * deviation).all()


def test_chances_depend_on_seed_tensor_and_update_and_on_no_cut() -> None:
    update, other = updates_of(FULL, [1, 1])
    whole = masks.chances(update, "weight", 0, 0, 1000)
    for start, stop in ((0, 1000), (1, 999), (16, 32), (123, 124), (17, 900)):
        np.testing.assert_array_equal(masks.chances(update, "weight", 0, start, stop), whole[start:stop])
    for changed in (
        masks.chances(update, "weight", 1, 0, 1000),
        masks.chances(update, "bias", 0, 0, 1000),
        masks.chances(other, "weight", 0, 0, 1000),
        masks.chances(dataclasses.replace(update, task_id="t"), "weight", 0, 0, 1000),
    ):
        assert np.mean(changed == whole) < 0.01
    # The stream itself is part of the format: another machine, or another language, has to find the same.
    assert whole[:4].tolist() == [50696, 28642, 34875, 17556]
    assert abs(masks.chances(update, "weight", 0, 0, 200_000).mean() / 65535 - 0.5) < 0.003


def test_della_drops_the_small_more_often() -> None:
    (update,) = updates_of(FULL, [1])
    parameters = DellaParameters(density=0.5, spread=0.3, seed=2)
    merged, _ = merge([update], FULL, rule(MergeRuleName.DELLA, parameters))
    values = update.deltas.arrays["weight"]
    ranks = np.argsort(np.argsort(np.abs(values), axis=1, kind="stable"), axis=1)
    words = np.maximum(1, np.rint((0.2 + 0.6 * ranks / 28) * 65536))
    chosen = masks.chances(update, "weight", 2, 0, values.size).reshape(values.shape) < words
    close(merged["weight"], np.where(chosen, values * 65536 / words, 0))


def test_breadcrumbs_leaves_out_the_largest_and_the_small() -> None:
    updates = updates_of(FULL, [1, 1])
    parameters = BreadcrumbsParameters(density=0.5, outliers=0.1, scale=0.2)
    merged, _ = merge(updates, FULL, rule(MergeRuleName.BREADCRUMBS, parameters))
    expected = np.zeros((13, 29))
    for row in rows_of(updates):
        order = np.argsort(-np.abs(row), axis=None)[int(0.1 * row.size) :][: int(0.5 * row.size)]
        kept = np.zeros(row.size)
        kept[order] = row.reshape(-1)[order]
        expected += 0.2 * kept.reshape(row.shape)
    close(merged["weight"], expected)


def test_slerp_keeps_the_length_of_two_as_long() -> None:
    merged = vector([[1, 0], [0, 1]], rule(MergeRuleName.SLERP))
    close(merged, np.array([1, 1]) / np.sqrt(2))
    close(vector([[1, 0], [0, 1]], rule(MergeRuleName.SLERP), [2, 1]), np.array([np.cos(np.pi / 6), 0.5]))
    close(vector([[1, 2], [2, 4]], rule(MergeRuleName.SLERP)), np.array([1.5, 3]))


def test_slerp_is_straight_beyond_the_cosine_that_it_is_told() -> None:
    rows, cosine = [[1.0, 0.0], [0.6, 0.8]], 0.6
    for straight_above, straight in ((cosine - 0.01, True), (cosine + 0.01, False)):
        chosen = rule(MergeRuleName.SLERP, SlerpParameters(straight_above=straight_above))
        merged = vector(rows, chosen)
        assert (np.linalg.norm(merged) < 0.95) == straight


def test_slerp_with_a_movement_of_zero_is_the_mean() -> None:
    close(vector([[0, 0], [2, 4]], rule(MergeRuleName.SLERP)), np.array([1, 2]))


def test_model_stock_of_movements_that_turn_from_each_other_does_not_move() -> None:
    rows = [[1, 0.1], [-1, 0.1]]
    close(vector(rows, rule(MergeRuleName.MODEL_STOCK)), np.zeros(2))
    cosine = -0.99 / 1.01
    expected = np.array([0, 0.1]) * 2 * cosine / (1 + cosine)
    close(vector(rows, rule(MergeRuleName.MODEL_STOCK, ModelStockParameters(clamp=False))), expected)
    opposite = vector([[1], [-1]], rule(MergeRuleName.MODEL_STOCK, ModelStockParameters(clamp=False)))
    close(opposite, np.zeros(1))


def test_slerp_of_more_than_two_is_refused() -> None:
    with pytest.raises(EngineFailed, match="two updates"):
        vector([[1], [2], [3]], rule(MergeRuleName.SLERP))


def test_model_stock_shortens_the_mean_by_disagreement() -> None:
    updates = updates_of(FULL, [1, 1, 1])
    for index, update in enumerate(updates):
        update.deltas.arrays["weight"][:] += 2 - index / 2
    merged, _ = merge(updates, FULL, rule(MergeRuleName.MODEL_STOCK))
    rows = [row.reshape(-1) for row in rows_of(updates)]
    cosines = [
        np.dot(rows[i], rows[j]) / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
        for i in range(3)
        for j in range(i)
    ]
    cosine = np.mean(cosines)
    close(merged["weight"].reshape(-1), 3 * cosine / (1 + 2 * cosine) * np.mean(rows, axis=0))
    close(vector([[1, 0], [0, 1]], rule(MergeRuleName.MODEL_STOCK)), np.zeros(2))


@dataclasses.dataclass(frozen=True)
class SparseUpdate:
    """An update that is only ever read as positions and values."""

    dense: ArrayUpdate
    sparse: bool = True
    rank: int | None = None
    norm: float | None = None

    @property
    def worker_id(self) -> str:
        return self.dense.worker_id

    @property
    def task_id(self) -> str:
        return self.dense.task_id

    @property
    def weight(self) -> float:
        return self.dense.weight

    def tile(self, name: str, start: int, stop: int) -> Float32:
        return self.dense.tile(name, start, stop)

    def sparse_tile(self, name: str, start: int, stop: int) -> tuple[Indices, Float32]:
        values = self.dense.tile(name, start, stop)
        indices = np.flatnonzero(values)
        return indices, values[indices]

    def fisher_tile(self, name: str, start: int, stop: int) -> Float32:
        raise AssertionError("no rule here needs it")


TERNARY_RULES = [
    MergeRuleName.MEAN,
    MergeRuleName.TASK_ARITHMETIC,
    MergeRuleName.TIES,
    MergeRuleName.SIGN_MAJORITY,
    MergeRuleName.MEDIAN,
    MergeRuleName.DARE,
    MergeRuleName.MULTI_KRUM,
]


@pytest.mark.parametrize("name", TERNARY_RULES)
@pytest.mark.parametrize("weights", [[1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]], ids=["equal", "weighted"])
def test_a_sparse_update_is_merged_as_if_it_were_dense(name: MergeRuleName, weights: list[float]) -> None:
    rng = np.random.default_rng(3)
    dense = []
    for update in updates_of(FULL, weights):
        for array in update.deltas.arrays.values():
            array[:] = rng.integers(-1, 2, array.shape) * np.float32(0.25 * rng.integers(1, 3))
        dense.append(dataclasses.replace(update, sparse=True))
    sparse = [SparseUpdate(update) for update in dense]
    one, other = (merge(each, FULL, rule(name))[0] for each in (dense, sparse))
    for key in one:
        close(other[key], one[key])


def test_nothing_is_measured_where_nothing_needs_it() -> None:
    _, report = merge(updates_of(FULL), FULL, rule(MergeRuleName.MEAN), norms=False)
    assert {(c.change_norm, c.parameter_norm, c.kept) for c in report.contributions} == {(None, None, None)}
    _, report = merge(updates_of(FULL), FULL, rule(MergeRuleName.TIES), norms=False)
    assert all(c.kept is not None and c.parameter_norm is None for c in report.contributions)
    _, report = merge(updates_of(FULL), FULL, MergeSettings(), norms=False)
    assert all(c.parameter_norm is not None for c in report.contributions)


@dataclasses.dataclass(frozen=True)
class CountedUpdate(SparseUpdate):
    """An update that counts how often it is read."""

    read: list[str] = dataclasses.field(default_factory=list)

    def tile(self, name: str, start: int, stop: int) -> Float32:
        self.read.append(name)
        return self.dense.tile(name, start, stop)

    def sparse_tile(self, name: str, start: int, stop: int) -> None:  # type: ignore[override]
        """None: it is dense."""


@pytest.mark.parametrize("schema", [FULL, LORA], ids=["full", "lora"])
def test_a_norm_that_is_known_spares_a_pass_and_changes_nothing(schema: Schema) -> None:
    settings = MergeSettings(lora=LoraSpace.FACTORS if schema is LORA else None)
    updates = updates_of(schema)
    expected, measured = merge(updates, schema, settings)
    norms = [each.parameter_norm for each in measured.contributions]
    known = [CountedUpdate(each, norm=norm) for each, norm in zip(updates, norms, strict=True)]
    unknown = [CountedUpdate(each) for each in updates]
    merged, report = merge(known, schema, settings)
    merge(unknown, schema, settings)
    for key in expected:
        np.testing.assert_array_equal(merged[key], expected[key])
    assert [c.change_norm for c in report.contributions] == pytest.approx(
        [c.change_norm for c in measured.contributions]
    )
    assert [c.kept for c in report.contributions] == [None] * len(known)
    assert len(unknown[0].read) - len(known[0].read) == len(schema.tensors)


def test_a_known_norm_is_not_enough_where_tensors_are_weighed_one_by_one() -> None:
    wrong = [dataclasses.replace(each, norm=1e9) for each in updates_of(FULL)]
    settings = MergeSettings(rescale=Rescale.RDA)
    (ours, _), (expected, _) = merge(wrong, FULL, settings), merge(updates_of(FULL), FULL, settings)
    np.testing.assert_array_equal(ours["weight"], expected["weight"])
    heads = Schema((*LORA.tensors, TensorSpec("score.weight", "F32", (2, 3))))
    assert not is_norm_enough(heads)
    assert is_norm_enough(LORA)
    assert is_norm_enough(FULL)


def test_norms_of_the_tiny_and_of_the_huge_are_right() -> None:
    for size in (1e-30, 1e30):
        row = np.full(1000, size, np.float32)
        update = ArrayUpdate(worker_id="w", deltas=Arrays({"v": row}))
        _, report = merge([update], Schema((TensorSpec("v", "F32", (1000,)),)), MergeSettings())
        assert report.contributions[0].parameter_norm == pytest.approx(size * 1000**0.5, rel=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, row in RULES.items()
        if not (row.needs_fisher or row.needs_grams or name is MergeRuleName.SLERP)
    ],
)
@settings(max_examples=5, deadline=None)
@given(
    order=st.permutations(range(7)),
    tile_elements=st.sampled_from([1, 7, 64]),
    threads=st.integers(1, 3),
    schema=st.sampled_from([FULL, LORA]),
)
def test_the_same_updates_give_the_same_bytes(
    name: MergeRuleName, order: list[int], tile_elements: int, threads: int, schema: Schema
) -> None:
    updates = updates_of(schema, [1, 2, 3, 4, 5, 6, 7.5])
    one, _ = merge(updates, schema, MergeSettings(rule=name))
    shuffled = [updates[index] for index in order]
    other, _ = merge(
        shuffled, schema, MergeSettings(rule=name), tile_elements=tile_elements, crew=Threads(threads)
    )
    assert [a.tobytes() for a in one.values()] == [a.tobytes() for a in other.values()]


@pytest.mark.parametrize("name", [MergeRuleName.SLERP, MergeRuleName.MODEL_STOCK])
@pytest.mark.parametrize("space", list(LoraSpace))
@pytest.mark.parametrize(("tile_elements", "threads"), [(1, 3), (7, 1), (64, 2)])
def test_two_updates_give_the_same_bytes_in_either_order(
    name: MergeRuleName, space: LoraSpace, tile_elements: int, threads: int
) -> None:
    updates, chosen = updates_of(LORA, [1, 2]), MergeSettings(rule=name, lora=space)
    one, _ = merge(updates, LORA, chosen)
    other, _ = merge(updates[::-1], LORA, chosen, tile_elements=tile_elements, crew=Threads(threads))
    assert [a.tobytes() for a in one.values()] == [a.tobytes() for a in other.values()]


@pytest.mark.parametrize("name", list(MergeRuleName))
def test_every_rule_can_be_asked_for_in_a_run_file(name: MergeRuleName) -> None:
    chosen = MergeSettings(rule=name)
    tables: dict[str, Any] = {str(name): chosen.parameters} if hasattr(chosen, name) else {}
    table = to_table(dataclasses.replace(chosen, **tables))
    assert from_table(MergeSettings, table).parameters == chosen.parameters
    assert RULES[name].paper.startswith("https://")


@pytest.mark.parametrize(
    "table",
    [
        {"rule": "task_arithmetic", "task_arithmetic": {"scale": 0.0}},
        {"rule": "negation", "negation": {"scale": -1.0}},
        {"rule": "magnitude", "magnitude": {"density": 2.0}},
        {"rule": "dare", "dare": {"density": 0.0}},
        {"rule": "dare_ties", "dare_ties": {"scale": 0.0}},
        {"rule": "della", "della": {"spread": 0.5}},
        {"rule": "breadcrumbs", "breadcrumbs": {"outliers": 0.95}},
        {"rule": "krum", "krum": {"share": 0.5}},
        {"rule": "geometric_median", "geometric_median": {"iterations": 0}},
        {"rule": "centred_clipping", "centred_clipping": {"radius": 0.0}},
        {"rule": "mean", "krum": {"share": 0.1}},
        {"rule": "krum", "bulyan": {"share": 0.1}},
    ],
)
def test_a_wrong_parameter_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises(RunFileError, match="merge"):
        from_table(MergeSettings, table, where="merge")


def test_the_documentation_has_a_line_for_every_rule_and_says_what_it_is() -> None:
    page = (Path(__file__).parents[2] / "docs" / "merge-rules.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| `(\w+)` \|.*\| (yes|no) \| (yes|no) \| (yes|no|in two rounds) \|$", page, re.MULTILINE
    )
    said = {name: (exact == "yes", robust == "yes", secure != "no") for name, exact, robust, secure in lines}
    assert said == {
        str(name): (LoraSpace.EXACT in row.spaces, row.robust, row.secure_aggregation)
        for name, row in RULES.items()
    }


@pytest.mark.parametrize("name", [name for name in MergeRuleName if hasattr(MergeSettings(), name)])
def test_the_documentation_has_the_defaults_of_every_table(name: MergeRuleName) -> None:
    page = (Path(__file__).parents[2] / "docs" / "merge-rules.md").read_text(encoding="utf-8")
    (line,) = [
        row for row in page.splitlines() if re.match(r"\| (`\w+`, )*`" + name + r"`(, `\w+`)* \| `\w+ =", row)
    ]
    said = dict(re.findall(r"`(\w+) = \"?([^`\"]+)\"?`", line))
    assert said == {
        key: str(value).replace("e-0", "e-").replace("True", "true").replace("False", "false")
        for key, value in to_table(MergeSettings(rule=name).parameters).items()
    }


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS])
@pytest.mark.parametrize(
    "chosen",
    [
        *(
            MergeSettings(rule=MergeRuleName(row.name), clip=Clip.NONE)
            for row in RULES.values()
            if row.keeps_nan
        ),
        *(rule(MergeRuleName.TIES, TiesParameters(convention=each, density=0.2)) for each in TiesConvention),
    ],
)
def test_what_is_not_finite_shows_in_the_result(
    chosen: MergeSettings, weights: list[float], value: float
) -> None:
    updates = updates_of(FULL, weights)
    for update in updates[:-1]:  # what one says, the others outvote
        update.deltas.arrays["weight"][1, 2] = -np.sign(value) if np.isinf(value) else 1.0
    updates[-1].deltas.arrays["weight"][1, 2] = value
    with np.errstate(invalid="ignore"):
        merged, _ = merge(updates, FULL, chosen, norms=False)
    assert not np.isfinite(merged["weight"][1, 2])
    assert np.isfinite(np.delete(merged["weight"].reshape(-1), merged["weight"].shape[1] + 2)).all()
