"""LoRA merged as ΔW, against dense float64 references and peft's ``cat``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.handmade import adapter_product, merge_inputs, write_adapter

from weft.common.modules import Schema, TensorSpec
from weft.server.merge import lora
from weft.server.merge.crew import Threads
from weft.server.merge.engine import MergeReport, merge_module
from weft.server.merge.settings import Clip, LoraSpace, MergeRuleName, MergeSettings
from weft.server.merge.tiles import Arrays, ArrayUpdate
from weft.server.offline.recipe import LoraMode, merge_settings
from weft.server.outer import OuterSettings

Array = npt.NDArray[Any]
OUT, IN, RANK = 24, 17, 4
A, B, HEAD = "q.lora_A.weight", "q.lora_B.weight", "score.weight"
SHAPES = {A: (RANK, IN), B: (OUT, RANK), HEAD: (2, 5)}
SCHEMA = Schema(tuple(TensorSpec(name, "F32", shape) for name, shape in SHAPES.items()))
EXACT = MergeSettings(clip=Clip.NONE, lora=LoraSpace.EXACT)
FACTORS = MergeSettings(clip=Clip.NONE, lora=LoraSpace.FACTORS)


def random_arrays(seed: int, size: float = 1.0) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays({s.name: (size * rng.standard_normal(s.shape)).astype(np.float32) for s in SCHEMA.tensors})


def version_zero(seed: int) -> Arrays:
    start = random_arrays(seed)
    start.arrays[B][:] = 0
    return start


def updates_of(count: int, *, size: float = 0.1, weights: Sequence[float] | None = None) -> list[ArrayUpdate]:
    return [
        ArrayUpdate(worker_id=f"w{i}", weight=weight, deltas=random_arrays(10 + i, size))
        for i, weight in enumerate(weights or [1.0] * count)
    ]


def without(update: ArrayUpdate, name: str) -> ArrayUpdate:
    deltas = {**update.deltas.arrays, name: np.zeros_like(update.deltas.arrays[name])}
    return dataclasses.replace(update, deltas=Arrays(deltas))


def trained(start: Arrays, update: ArrayUpdate, name: str) -> Array:
    return start.arrays[name].astype(np.float64) + update.deltas.arrays[name]


def product(start: Arrays, update: ArrayUpdate) -> Array:
    return np.asarray(trained(start, update, B) @ trained(start, update, A))


def truncated(dense: Array, rank: int) -> Array:
    u, s, v = np.linalg.svd(dense, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ v[:rank])


def merge(
    updates: Sequence[ArrayUpdate], start: Arrays, chosen: MergeSettings = EXACT, **more: Any
) -> tuple[dict[str, Array], MergeReport]:
    sink = Arrays.zeros(SCHEMA)
    outer = more.pop("outer", OuterSettings())
    report = merge_module(updates, start, SCHEMA, sink, settings=chosen, outer=outer, **more)
    return {name: array.astype(np.float64) for name, array in sink.arrays.items()}, report


def relative(found: Array, expected: Array) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("rate", [1.0, 0.5])
def test_the_merge_is_the_truncated_svd_of_the_dense_mean(count: int, rate: float) -> None:
    start, weights = random_arrays(1), [1.0 + i for i in range(count)]
    updates = updates_of(count, size=0.3, weights=weights)
    merged, report = merge(updates, start, outer=OuterSettings(learning_rate=rate))
    begin = start.arrays[B].astype(np.float64) @ start.arrays[A]
    change = np.average([product(start, u) - begin for u in updates], axis=0, weights=weights)
    dense = begin + rate * change
    best = truncated(dense, RANK)
    assert relative(merged[B] @ merged[A], best) < 1e-5
    assert report.truncation_error == pytest.approx(relative(best, dense), rel=1e-6)


def test_a_mean_that_fits_the_rank_is_exact() -> None:
    # Two workers of rank 2 each on disjoint rows of A: their mean has rank 4.
    start = version_zero(1)
    halves = []
    for index, update in enumerate(updates_of(2)):
        update.deltas.arrays[B][:, 2 * index : 2 * index + 2] = 0
        halves.append(update)
    merged, report = merge(halves, start)
    assert relative(merged[B] @ merged[A], np.mean([product(start, u) for u in halves], axis=0)) < 1e-6
    assert report.truncation_error < 1e-6


def test_the_merge_is_what_peft_cat_is() -> None:
    from peft import LoraConfig, get_peft_model

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = torch.nn.Linear(IN, OUT, bias=False)

    start, updates = random_arrays(1), updates_of(3)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["q"])
    model = get_peft_model(Layer(), config, adapter_name="w0")
    for name in ("w1", "w2"):
        model.add_adapter(name, config)
    layer: Any = model.base_model.model.q
    for update in updates:
        for factor, name in ((layer.lora_A, A), (layer.lora_B, B)):
            factor[update.worker_id].weight.data = torch.tensor(trained(start, update, name)).float()
    model.add_weighted_adapter(["w0", "w1", "w2"], [1 / 3] * 3, "mean", combination_type="cat")
    oracle = layer.get_delta_weight("mean").detach().numpy()
    merged, _ = merge(updates, start)
    assert relative(merged[B] @ merged[A], truncated(oracle, RANK)) < 1e-5


def test_averaged_factors_are_another_thing() -> None:
    start, updates = random_arrays(1), updates_of(4, size=0.5)
    dense = np.mean([product(start, u) for u in updates], axis=0)
    exact, plain = merge(updates, start)[0], merge(updates, start, FACTORS)[0]
    for name in (A, B):
        expected = np.mean([trained(start, u, name) for u in updates], axis=0)
        np.testing.assert_allclose(plain[name], expected, rtol=1e-6, atol=1e-7)
    assert relative(plain[B] @ plain[A], dense) > 1.05 * relative(exact[B] @ exact[A], dense)


@pytest.mark.parametrize("begin", [random_arrays(1), version_zero(1)], ids=["later", "version-0"])
def test_one_update_comes_back_factor_by_factor(begin: Arrays) -> None:
    (update,) = updates_of(1)
    merged, report = merge([update], begin)
    for name in (A, B):
        np.testing.assert_allclose(merged[name], trained(begin, update, name), atol=2e-6)
    assert report.truncation_error < 1e-7


def test_with_a_shared_frozen_a_the_merge_averages_b() -> None:
    start = version_zero(1)
    updates = [without(update, A) for update in updates_of(3)]
    merged, _ = merge(updates, start)
    np.testing.assert_allclose(merged[A], start.arrays[A], atol=1e-6)
    np.testing.assert_allclose(merged[B], np.mean([u.deltas.arrays[B] for u in updates], axis=0), atol=1e-6)


def test_where_nothing_was_learnt_a_stays_alive() -> None:
    start = version_zero(1)
    merged, report = merge([without(update, B) for update in updates_of(2)], start)
    np.testing.assert_array_equal(merged[B], 0)
    assert np.linalg.svd(merged[A], compute_uv=False).min() > 0.5
    assert report.truncation_error == 0


def test_a_change_of_rank_one_leaves_no_dead_direction() -> None:
    start = version_zero(1)
    (update,) = updates_of(1)
    update.deltas.arrays[B][:, 1:] = 0
    merged, _ = merge([update], start)
    assert relative(merged[B] @ merged[A], product(start, update)) < 1e-5
    assert np.linalg.norm(merged[A], axis=1).min() > 0.5


def test_heads_are_merged_coordinate_by_coordinate() -> None:
    start, updates = random_arrays(1), updates_of(3, weights=[1, 2, 3])
    expected = np.average([trained(start, u, HEAD) for u in updates], axis=0, weights=[1, 2, 3])
    for chosen in (EXACT, FACTORS):
        np.testing.assert_allclose(merge(updates, start, chosen)[0][HEAD], expected, rtol=1e-6)


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_the_change_norm_is_that_of_the_dense_change(scaling: float) -> None:
    start, (update,) = random_arrays(1), updates_of(1)
    _, report = merge([update], start, scaling=scaling)
    change = product(start, update) - start.arrays[B].astype(np.float64) @ start.arrays[A]
    expected = np.hypot(scaling * np.linalg.norm(change), np.linalg.norm(update.deltas.arrays[HEAD]))
    assert report.contributions[0].change_norm == pytest.approx(expected, rel=1e-7)
    flat = np.concatenate([a.reshape(-1) for a in update.deltas.arrays.values()])
    assert report.contributions[0].parameter_norm == pytest.approx(np.linalg.norm(flat), rel=1e-6)


@pytest.mark.parametrize("chosen", [LoraSpace.EXACT, LoraSpace.FACTORS])
def test_a_huge_a_that_its_own_b_cancels_is_clipped(chosen: LoraSpace) -> None:
    start, updates = random_arrays(1), updates_of(3)
    hiding = without(updates[1], HEAD)
    hiding.deltas.arrays[B][:] = -start.arrays[B]
    hiding.deltas.arrays[A][:] *= 1e6
    merged, report = merge([updates[0], hiding, updates[2]], start, MergeSettings(lora=chosen))
    assert report.contributions[1].clip_factor < 1e-4
    assert np.abs(merged[A]).max() < 5
    assert relative(merged[B] @ merged[A], start.arrays[B] @ start.arrays[A]) < 1


def test_clipping_scales_the_change_of_the_product() -> None:
    start = random_arrays(1)
    small, big = updates_of(2)
    big = dataclasses.replace(big, deltas=Arrays({n: 20 * a for n, a in big.deltas.arrays.items()}))
    merged, report = merge([small, big], start, MergeSettings(lora=LoraSpace.EXACT))
    begin = start.arrays[B].astype(np.float64) @ start.arrays[A]
    clips = [c.clip_factor for c in report.contributions]
    assert clips[0] == 1
    assert clips[1] < 0.06
    changes = [c * (product(start, u) - begin) for c, u in zip(clips, (small, big), strict=True)]
    assert relative(merged[B] @ merged[A], truncated(begin + np.mean(changes, axis=0), RANK)) < 1e-5


def tensors(seed: int, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    out=st.integers(1, 12),
    in_=st.integers(1, 12),
    stacked=st.integers(1, 30),
    rank=st.integers(1, 14),
    inner=st.integers(0, 6),
)
def test_recompression_is_the_best_of_its_rank_for_any_shape(
    seed: int, out: int, in_: int, stacked: int, rank: int, inner: int
) -> None:
    # Through ``inner`` the product has any rank from 0; rank may exceed both sides.
    left, mix, unmix, right, near = tensors(
        seed, (out, inner), (inner, stacked), (stacked, stacked), (stacked, in_), (rank, in_)
    )
    left_on, right_ni = left @ mix, unmix @ right
    done = lora.recompress(left_on, right_ni, near_ri=near)
    dense = (left_on @ right_ni).numpy()
    found = (done.factors.B_or @ done.factors.A_ri).numpy()
    assert done.factors.A_ri.shape == near.shape
    assert np.linalg.norm(found - truncated(dense, rank)) <= 1e-7 * max(1.0, float(np.linalg.norm(dense)))
    assert done.total_square_sum == pytest.approx(float(np.square(dense).sum()), rel=1e-9)


def test_recompression_does_not_depend_on_the_signs_of_the_stack() -> None:
    left, right, near = tensors(3, (20, 12), (12, 15), (4, 15))
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(6)
    one = lora.recompress(left, right, near_ri=near).factors
    other = lora.recompress(left * signs, right * signs[:, None], near_ri=near).factors
    torch.testing.assert_close(one.A_ri, other.A_ri, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(one.B_or, other.B_or, rtol=1e-9, atol=1e-11)


def test_a_zero_a_to_stay_near_still_gives_the_product() -> None:
    left, right = tensors(4, (9, 3), (3, 8))
    done = lora.recompress(left, right, near_ri=torch.zeros((4, 8), dtype=torch.float64))
    torch.testing.assert_close(done.factors.B_or @ done.factors.A_ri, left @ right)


def test_the_merge_leaves_the_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    merge(updates_of(2), random_arrays(1), crew=Threads(2))
    assert torch.get_num_threads() == before


LAYER = "model.layers.0.mlp"


def adapters(to: Path, ranks: Sequence[int], width: int) -> tuple[list[Path], list[Array]]:
    """Adapters with scalings of their own, and the ΔW that they stand for, float64."""
    rng, paths, dense = np.random.default_rng(2), [], []
    for index, rank in enumerate(ranks):
        a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rank, width), (width + 8, rank)))
        config = {"lora_alpha": 2 * rank, "use_rslora": bool(index % 2)}
        paths.append(write_adapter(to / f"in{index}", {LAYER: (a, b)}, **config))
        scaling = 2 * rank / (np.sqrt(rank) if index % 2 else rank)
        dense.append(scaling * (b.astype(np.float64) @ a))
    return paths, dense


MULTIPLES: dict[MergeRuleName, Callable[[int], float]] = {
    MergeRuleName.MEAN: lambda count: 1 / count,
    MergeRuleName.TASK_ARITHMETIC: lambda _count: 0.3,
    MergeRuleName.NEGATION: lambda count: -1 / count,
}


@pytest.mark.parametrize("mode", [LoraMode.EXACT, LoraMode.STACK])
@pytest.mark.parametrize("rule", list(MULTIPLES))
def test_what_fits_the_rank_is_exact_to_a_millionth(
    tmp_path: Path, rule: MergeRuleName, mode: LoraMode
) -> None:
    ranks = [2, 5, 3]
    paths, dense = adapters(tmp_path, ranks, 32)
    rank = sum(ranks) if mode is LoraMode.EXACT else 0
    merged = merge_inputs(tmp_path / "out", *paths, merge=merge_settings(rule, {}), lora=mode, rank=rank)
    assert relative(adapter_product(merged, LAYER), MULTIPLES[rule](3) * np.sum(dense, axis=0)) < 1e-6


@pytest.mark.parametrize(
    ("ranks", "width", "rank"),
    [([16] * 16, 64, 16), ([4, 8, 16], 96, 8), ([16] * 4, 48, 4)],
    ids=["stacked-beyond-width", "mixed", "down-to-a-quarter"],
)
def test_recompression_to_a_rank_is_the_truncated_svd_of_the_dense_sum(
    tmp_path: Path, ranks: list[int], width: int, rank: int
) -> None:
    paths, dense = adapters(tmp_path, ranks, width)
    merged = merge_inputs(tmp_path / "out", *paths, merge=merge_settings("mean", {}), rank=rank)
    assert relative(adapter_product(merged, LAYER), truncated(np.mean(dense, axis=0), rank)) < 1e-5
