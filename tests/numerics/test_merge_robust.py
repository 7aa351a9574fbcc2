"""Robust rules: references from their papers, what a minority of liars achieves, and inner products of ΔW."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from weft.common.modules import Schema, TensorSpec
from weft.server.merge import robust
from weft.server.merge.engine import merge_module
from weft.server.merge.rules import RULES
from weft.server.merge.settings import (
    CentredClippingParameters,
    Clip,
    GeometricMedianParameters,
    LoraSpace,
    MergeRuleName,
    MergeSettings,
    RobustParameters,
)
from weft.server.merge.tiles import Arrays, ArrayUpdate
from weft.server.outer import OuterSettings

Array = npt.NDArray[Any]
A, B, HEAD = "q.lora_A.weight", "q.lora_B.weight", "score"
LORA = Schema((TensorSpec(A, "F32", (3, 9)), TensorSpec(B, "F32", (11, 3)), TensorSpec(HEAD, "F32", (4,))))
ROBUST = [name for name, row in RULES.items() if row.robust]
BY_DISTANCE = [name for name in ROBUST if RULES[name].choose is not None]


def settings_of(name: MergeRuleName, parameters: Any = None, clip: Clip = Clip.NONE) -> MergeSettings:
    return MergeSettings(
        rule=name,
        clip=clip,
        weight_multiple_max=1e9,
        **({} if parameters is None else {str(name): parameters}),
    )


def merge_rows(rows: Array, chosen: MergeSettings, weights: Sequence[float] | None = None) -> Array:
    """Rows [W, N] as two tensors, so that distances have to be added over them."""
    cut = rows.shape[1] // 2
    schema = Schema((TensorSpec("a", "F32", (cut,)), TensorSpec("b", "F32", (rows.shape[1] - cut,))))
    updates = [
        ArrayUpdate(
            worker_id=f"w{index:02d}",
            weight=weights[index] if weights else 1.0,
            deltas=Arrays({"a": row[:cut].astype(np.float32), "b": row[cut:].astype(np.float32)}),
        )
        for index, row in enumerate(rows)
    ]
    sink = Arrays.zeros(schema)
    merge_module(updates, Arrays.zeros(schema), schema, sink, settings=chosen, outer=OuterSettings())
    return np.concatenate([sink.arrays["a"], sink.arrays["b"]]).astype(np.float64)


def random_rows(count: int, size: int = 30, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((count, size)).astype(np.float32).astype(np.float64)


def close(found: Array, expected: Array, rtol: float = 1e-5) -> None:
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-6)


def reference_krum_scores(rows: Array, f: int) -> Array:
    scores = []
    for i in range(len(rows)):
        others = sorted(float(np.square(rows[i] - rows[j]).sum()) for j in range(len(rows)) if j != i)
        scores.append(sum(others[: max(1, len(rows) - f - 2)]))
    return np.array(scores)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_median_is_numpy_s(count: int) -> None:
    rows = random_rows(count)
    close(merge_rows(rows, settings_of(MergeRuleName.MEDIAN)), np.median(rows, axis=0))


@pytest.mark.parametrize(
    ("count", "share", "cut"), [(5, 0.2, 1), (5, 0.45, 2), (10, 0.25, 2), (2, 0.4, 0), (1, 0.4, 0)]
)
def test_trimmed_mean_leaves_out_the_extremes(count: int, share: float, cut: int) -> None:
    rows = random_rows(count)
    merged = merge_rows(rows, settings_of(MergeRuleName.TRIMMED_MEAN, RobustParameters(share=share)))
    close(merged, np.sort(rows, axis=0)[cut : count - cut].mean(axis=0))


@pytest.mark.parametrize(("count", "f"), [(3, 0), (5, 1), (9, 3), (2, 0)])
def test_krum_takes_the_one_nearest_to_its_neighbours(count: int, f: int) -> None:
    rows = random_rows(count)
    merged = merge_rows(rows, settings_of(MergeRuleName.KRUM, RobustParameters(share=0.4)))
    close(merged, rows[int(np.argmin(reference_krum_scores(rows, f)))])


def test_multi_krum_averages_the_best_by_weight() -> None:
    rows, weights = random_rows(9), [1.0, 2, 3, 4, 5, 6, 7, 8, 9]
    merged = merge_rows(rows, settings_of(MergeRuleName.MULTI_KRUM, RobustParameters(share=0.4)), weights)
    best = np.argsort(reference_krum_scores(rows, 3))[:6]
    close(merged, np.average(rows[best], axis=0, weights=np.array(weights)[best]))


def test_bulyan_is_algorithm_2_of_the_paper() -> None:
    rows, f = random_rows(11), 2
    left, chosen = list(range(11)), list[int]()
    while len(chosen) < 11 - 2 * f:
        scores = reference_krum_scores(rows[left], f)
        chosen.append(left.pop(int(np.argmin(scores))))
    values = rows[chosen]
    middle = np.median(values, axis=0)
    nearest = np.argsort(np.abs(values - middle), axis=0)[: len(chosen) - 2 * f]
    expected = np.take_along_axis(values, nearest, axis=0).mean(axis=0)
    close(merge_rows(rows, settings_of(MergeRuleName.BULYAN, RobustParameters(share=0.2))), expected)


def test_geometric_median_is_weiszfeld_in_the_open() -> None:
    rows, weights = random_rows(6), np.array([1.0, 2, 3, 1, 1, 2])
    parameters = GeometricMedianParameters(iterations=7)
    merged = merge_rows(rows, settings_of(MergeRuleName.GEOMETRIC_MEDIAN, parameters), weights.tolist())
    z = np.average(rows, axis=0, weights=weights)
    for _ in range(7):
        beta = weights / np.linalg.norm(rows - z, axis=1)
        z = np.average(rows, axis=0, weights=beta)
    close(merged, z)


def test_geometric_median_of_a_line_is_its_median() -> None:
    rows = np.outer([0.0, 1.0, 10.0], np.ones(4))
    merged = merge_rows(
        rows, settings_of(MergeRuleName.GEOMETRIC_MEDIAN, GeometricMedianParameters(iterations=300))
    )
    np.testing.assert_allclose(merged, np.ones(4), atol=1e-3)


def test_centred_clipping_is_algorithm_2_of_the_paper() -> None:
    rows, weights = random_rows(6), np.array([1.0, 2, 3, 1, 1, 2])
    parameters = CentredClippingParameters(radius=0.7, iterations=4)
    merged = merge_rows(rows, settings_of(MergeRuleName.CENTRED_CLIPPING, parameters), weights.tolist())
    tau = 0.7 * np.sort(np.linalg.norm(rows, axis=1))[2]
    v = np.zeros(30)
    for _ in range(4):
        away = rows - v
        shorten = np.minimum(1, tau / np.linalg.norm(away, axis=1))
        v = v + np.average(away * shorten[:, None], axis=0, weights=weights)
    close(merged, v)


def test_a_wide_radius_is_the_mean() -> None:
    rows = random_rows(5)
    parameters = CentredClippingParameters(radius=1e6)
    close(merge_rows(rows, settings_of(MergeRuleName.CENTRED_CLIPPING, parameters)), rows.mean(axis=0))


HONEST, LIARS, SIZE = 8, 2, 200
ATTACKS: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "sign-flip": lambda honest, _: np.tile(-honest.mean(0), (LIARS, 1)),
    "flip-times-ten": lambda honest, _: np.tile(-10 * honest.mean(0), (LIARS, 1)),
    "noise": lambda _, rng: 30 * rng.standard_normal((LIARS, SIZE)),
    "little-is-enough": lambda honest, _: np.tile(honest.mean(0) - 1.5 * honest.std(0), (LIARS, 1)),
    "inner-product": lambda honest, _: np.tile(-2 * honest.mean(0), (LIARS, 1)),
    "ten-thousand": lambda honest, _: np.concatenate([1e4 * honest[:1], -1e4 * honest[1:2]]),
}


@pytest.mark.parametrize("attack", list(ATTACKS))
@pytest.mark.parametrize("name", ROBUST)
def test_a_fifth_of_liars_moves_the_result_little(name: MergeRuleName, attack: str) -> None:
    rng = np.random.default_rng(1)
    honest = rng.standard_normal(SIZE) + 0.5 * rng.standard_normal((HONEST, SIZE))
    rows = np.concatenate([honest, ATTACKS[attack](honest, rng)])
    merged = merge_rows(rows, settings_of(name))
    # Further from the honest mean than that is from nothing would be worse than no round at all.
    assert np.linalg.norm(merged - honest.mean(0)) < 0.85 * np.linalg.norm(honest.mean(0))
    assert merged @ honest.mean(0) > 0


def lora_updates(count: int) -> list[ArrayUpdate]:
    rng = np.random.default_rng(4)
    return [
        ArrayUpdate(
            worker_id=f"w{index}",
            weight=1.0 + index,
            deltas=Arrays(
                {s.name: (0.5 * rng.standard_normal(s.shape)).astype(np.float32) for s in LORA.tensors}
            ),
        )
        for index in range(count)
    ]


def dense_change(start: Arrays, update: ArrayUpdate) -> Array:
    b, a = start.arrays[B].astype(np.float64), start.arrays[A].astype(np.float64)
    return np.asarray((b + update.deltas.arrays[B]) @ (a + update.deltas.arrays[A]) - b @ a)


@pytest.mark.parametrize("name", [name for name in BY_DISTANCE if LoraSpace.EXACT in RULES[name].spaces])
def test_distances_of_lora_updates_are_those_of_the_product(name: MergeRuleName) -> None:
    rng = np.random.default_rng(5)
    start = Arrays({s.name: rng.standard_normal(s.shape).astype(np.float32) for s in LORA.tensors})
    updates = lora_updates(6)
    chosen = dataclasses.replace(settings_of(name), lora=LoraSpace.EXACT)
    sink = Arrays.zeros(LORA)
    merge_module(updates, start, LORA, sink, settings=chosen, outer=OuterSettings())
    rows = np.array(
        [np.concatenate([dense_change(start, u).reshape(-1), u.deltas.arrays[HEAD]]) for u in updates]
    )
    choose = RULES[name].choose
    assert choose is not None
    weights = np.array([u.weight for u in updates])
    share = choose({"all": rows @ rows.T}, weights / weights.sum(), chosen.parameters)["all"]
    dense = start.arrays[B].astype(np.float64) @ start.arrays[A] + (share @ rows)[:-4].reshape(11, 9)
    u, s, v = np.linalg.svd(dense, full_matrices=False)
    close(sink.arrays[B].astype(np.float64) @ sink.arrays[A], (u[:, :3] * s[:3]) @ v[:3], rtol=1e-4)
    close(sink.arrays[HEAD], start.arrays[HEAD] + (share @ rows)[-4:])


@pytest.mark.parametrize("name", BY_DISTANCE)
def test_equal_updates_are_no_one_s_outlier(name: MergeRuleName) -> None:
    row = random_rows(1)[0]
    close(merge_rows(np.tile(row, (7, 1)), settings_of(name)), row)


def test_distances_are_those_between_rows() -> None:
    rows = random_rows(5)
    expected = np.square(rows[:, None] - rows[None]).sum(-1)
    close(robust.square_distances(rows @ rows.T), expected)
