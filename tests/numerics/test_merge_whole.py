"""Rules that see a tensor whole: references from their papers in float64, LoRA against dense ΔW, and properties."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
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
from weft.server.merge import spaces
from weft.server.merge.crew import Threads
from weft.server.merge.engine import MergeReport, merge_module
from weft.server.merge.rule import Scope
from weft.server.merge.rules import RULES
from weft.server.merge.settings import (
    Clip,
    IsoParameters,
    KnotsParameters,
    LeastSquaresParameters,
    LoraSpace,
    MergeRuleName,
    MergeSettings,
    PcbParameters,
    RegmeanParameters,
    TsvParameters,
)
from weft.server.merge.spaces import NEEDING_GRAMS, WEIGHING, lora_space
from weft.server.merge.tiles import Arrays, ArrayUpdate, Update
from weft.server.outer import OuterName, OuterSettings
from weft.server.runfile import parse_run_file

Array = npt.NDArray[Any]
A, B = "q.lora_A.weight", "q.lora_B.weight"
ROWS, COLUMNS, RANK = 12, 20, 3
MATRIX = Schema(
    (
        TensorSpec("bias", "F32", (7,)),
        TensorSpec("scalar", "F32", ()),
        TensorSpec("w", "F32", (ROWS, COLUMNS)),
    )
)
LORA = Schema(
    (
        TensorSpec("head", "F32", (4, 5)),
        TensorSpec(A, "F32", (RANK, COLUMNS)),
        TensorSpec(B, "F32", (ROWS, RANK)),
    )
)
WHOLE_RULES = [name for name, row in RULES.items() if row.scope is not Scope.TILE]
OF_MATRICES = [name for name in WHOLE_RULES if RULES[name].scope is Scope.MATRIX]
SPECTRAL = [MergeRuleName.KNOTS, MergeRuleName.TSV, MergeRuleName.ISO]
WEIGHTS = [1.0, 2.0, 3.5]


def chosen(name: MergeRuleName, parameters: Any = None, **more: Any) -> MergeSettings:
    tables = {} if parameters is None else {str(name): parameters}
    return MergeSettings(rule=name, clip=Clip.NONE, weight_multiple_max=1e9, **tables, **more)


def random_arrays(schema: Schema, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays({s.name: np.asarray(rng.standard_normal(s.shape), np.float32) for s in schema.tensors})


def updates_of(schema: Schema = MATRIX, weights: Sequence[float] = WEIGHTS) -> list[ArrayUpdate]:
    return [
        ArrayUpdate(worker_id=f"w{index:02d}", weight=weight, deltas=random_arrays(schema, index))
        for index, weight in enumerate(weights)
    ]


def gram_of(worker: str, num_inputs: int = 60, size: int = COLUMNS) -> Array:
    inputs = np.random.default_rng(int(worker[1:]) + 900).standard_normal((num_inputs, size))
    return np.asarray(inputs.T @ inputs / num_inputs, np.float32)


def grams(update: Update, name: str) -> Array | None:
    return gram_of(update.worker_id) if name in ("w", A) else None


def merge(
    updates: Sequence[ArrayUpdate],
    rules: MergeSettings,
    schema: Schema = MATRIX,
    *,
    start: Arrays | None = None,
    outer: OuterSettings | None = None,
    **more: Any,
) -> tuple[dict[str, Array], MergeReport]:
    sink = Arrays.zeros(schema)
    more.setdefault("input_grams", grams)
    report = merge_module(
        updates,
        start or Arrays.zeros(schema),
        schema,
        sink,
        settings=rules,
        outer=outer or OuterSettings(),
        **more,
    )
    return dict(sink.arrays), report


def rows_of(updates: Sequence[ArrayUpdate], name: str = "w") -> list[Array]:
    return [update.deltas.arrays[name].astype(np.float64) for update in updates]


def normal(weights: Sequence[float] = WEIGHTS) -> Array:
    return np.array(weights) / sum(weights)


def close(found: Array, expected: Array, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


# -- references, from the papers ---------------------------------------------------------------------------


def official_clamp(rows: Array, low: float, high: float) -> Array:
    size = rows.shape[1]
    ordered = np.sort(rows, axis=1)
    return np.clip(rows, ordered[:, [int(size * low)]], ordered[:, [int(size * (1 - high) - 1)]])


def official_normalise(rows: Array) -> Array:
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    return np.asarray((rows - low) / (high - low))


def reference_pcb(rows: Sequence[Array], weights: Array, density: float) -> Array:
    """The authors' function for equal weights, on one tensor."""
    checks = np.array([row.reshape(-1) for row in rows])
    sizes = official_clamp(np.abs(checks), 0.0001, 0.0001)
    intra = np.exp(len(checks) * official_normalise(sizes) ** 2)
    inter = np.tanh(checks * (len(checks) * weights[:, None] * checks).sum(axis=0))
    share = official_normalise(official_clamp(intra * inter, 1 - density, 0)) * weights[:, None]
    merged = (np.sign(checks) * sizes * share).sum(axis=0) / np.maximum(share.sum(axis=0), 1e-12)
    return np.asarray(merged.reshape(rows[0].shape))


def reference_knots(rows: Sequence[Array], weights: Array, density: float) -> Array:
    """SVD of the updates side by side, TIES on the parts of V, back through U."""
    u, s, vh = np.linalg.svd(np.concatenate(rows, axis=1), full_matrices=False)
    u, s, vh = u[:, s > 1e-5], s[s > 1e-5], vh[s > 1e-5]
    parts = np.array([s[:, None] * part for part in np.split(vh, len(rows), axis=1)])
    for part in parts:
        k = part.size - int(part.size * density)
        if k:
            part[np.abs(part) < np.sort(np.abs(part), axis=None)[k - 1]] = 0
    sign = np.sign(parts.sum(axis=0))
    agree = (np.sign(parts) == sign) & (parts != 0)
    total = (agree * weights[:, None, None]).sum(axis=0)
    merged = (parts * agree * weights[:, None, None]).sum(axis=0) / np.where(total > 0, total, 1)
    return np.asarray(u @ merged)


def reference_tsv(rows: Sequence[Array], weights: Array) -> Array:
    """The main 1 / W of each one's singular triples but for rounding, whitened by an SVD of U and one of V."""
    kept = max(1, min(rows[0].shape) // len(rows))
    lefts, values, rights = [], [], []
    for row, weight in zip(rows, weights, strict=True):
        u, s, vh = np.linalg.svd(row, full_matrices=False)
        k = min(kept, int((s > 1e-6 * s[0]).sum()))
        lefts.append(u[:, :k])
        values.append(s[:k] * weight * len(rows))
        rights.append(vh[:k].T)
    white = []
    for stacked in (np.concatenate(lefts, axis=1), np.concatenate(rights, axis=1)):
        p, s, qh = np.linalg.svd(stacked, full_matrices=False)
        k = int((s > 1e-6 * s[0]).sum())  # updates that share a direction exactly leave no second one
        white.append(p[:, :k] @ qh[:k])
    return np.asarray(white[0] * np.concatenate(values) @ white[1].T)


def reference_iso(rows: Sequence[Array], weights: Array, rank: int | None = None) -> Array:
    total = len(rows) * sum(weight * row for weight, row in zip(weights, rows, strict=True))
    u, s, vh = np.linalg.svd(total, full_matrices=False)
    kept = rank or len(s)
    return np.asarray(s[:kept].mean() * u[:, :kept] @ vh[:kept])


def reference_least_squares(
    rows: Sequence[Array], weights: Array, grams_: Sequence[Array], *, ridge: float, off_diagonal: float = 1.0
) -> Array:
    """The normal equations, solved for the whole at once."""
    scaled = [
        w * (off_diagonal * g + (1 - off_diagonal) * np.diag(np.diag(g)))
        for w, g in zip(weights, grams_, strict=True)
    ]
    total = sum(scaled)
    pull = ridge * np.diag(np.diag(total))
    mean = sum(w * row for w, row in zip(weights, rows, strict=True))
    right = sum(row @ g for row, g in zip(rows, scaled, strict=True)) + mean @ pull
    return np.asarray(np.linalg.solve((total + pull).T, right.T).T)


Reference = Callable[[Sequence[Array], Array], Array]
THREE = [gram_of(f"w{index:02d}").astype(np.float64) for index in range(3)]
REFERENCES: Mapping[str, tuple[MergeSettings, Reference]] = {
    "knots": (chosen(MergeRuleName.KNOTS), lambda rows, w: reference_knots(rows, w, 1.0)),
    "knots-trimmed": (
        chosen(MergeRuleName.KNOTS, KnotsParameters(density=0.3, scale=1.5)),
        lambda rows, w: 1.5 * reference_knots(rows, w, 0.3),
    ),
    "tsv": (chosen(MergeRuleName.TSV), reference_tsv),
    "tsv-scaled": (
        chosen(MergeRuleName.TSV, TsvParameters(scale=0.7)),
        lambda rows, w: 0.7 * reference_tsv(rows, w),
    ),
    "iso": (
        chosen(MergeRuleName.ISO, IsoParameters(scale=0.4)),
        lambda rows, w: 0.4 * reference_iso(rows, w),
    ),
    "regmean": (
        chosen(MergeRuleName.REGMEAN, RegmeanParameters(off_diagonal=0.8)),
        lambda rows, w: reference_least_squares(rows, w, THREE, ridge=1e-5, off_diagonal=0.8),
    ),
    "least_squares": (
        chosen(MergeRuleName.LEAST_SQUARES, LeastSquaresParameters(ridge=0.1)),
        lambda rows, w: reference_least_squares(rows, w, THREE, ridge=0.1),
    ),
}


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("name", list(REFERENCES))
def test_a_matrix_is_merged_as_the_paper_says(name: str, weights: list[float]) -> None:
    rules, reference = REFERENCES[name]
    updates, start = updates_of(weights=weights), random_arrays(MATRIX, 9)
    merged, _ = merge(updates, rules, start=start)
    close(merged["w"], start.arrays["w"] + reference(rows_of(updates), normal(weights)), atol=5e-6)


@pytest.mark.parametrize("name", OF_MATRICES)
def test_what_is_no_matrix_is_averaged(name: MergeRuleName) -> None:
    updates = updates_of()
    table = {MergeRuleName.TSV: TsvParameters(scale=0.5)}.get(name)
    merged, _ = merge(updates, chosen(name, table))
    for tensor in ("bias", "scalar"):
        mean = sum(w * row for w, row in zip(normal(), rows_of(updates, tensor), strict=True))
        close(merged[tensor], (0.5 if table else 1.0) * mean)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("density", [0.1, 0.5])
def test_pcb_is_the_authors_function_on_a_tensor(density: float, weights: list[float]) -> None:
    # 10⁴ elements, where the share of outliers is a whole number and both count alike.
    schema = Schema((TensorSpec("w", "F32", (100, 100)),))
    updates = updates_of(schema, weights)
    merged, _ = merge(updates, chosen(MergeRuleName.PCB, PcbParameters(density=density, scale=1.2)), schema)
    close(merged["w"], 1.2 * reference_pcb(rows_of(updates), normal(weights), density))


@pytest.mark.parametrize("count", [2, 1000])
def test_pcb_does_not_overflow_and_knows_what_is_alike(count: int) -> None:
    schema = Schema((TensorSpec("w", "F32", (4,)),))
    row = Arrays({"w": np.array([2, -2, 2, 2], np.float32)})
    updates = [ArrayUpdate(worker_id=f"w{i:04d}", deltas=row) for i in range(count)]
    merged, _ = merge(updates, chosen(MergeRuleName.PCB), schema)
    close(merged["w"], row.arrays["w"])  # all magnitudes and all scores are equal: all count alike


def test_pcb_keeps_what_is_large_and_agrees() -> None:
    schema = Schema((TensorSpec("w", "F32", (4,)),))
    rows = [[0.9, 1.0, 0.1, 0], [0.8, -1.0, 0.1, 0]]
    updates = [
        ArrayUpdate(worker_id=f"w{i}", deltas=Arrays({"w": np.array(row, np.float32)}))
        for i, row in enumerate(rows)
    ]
    merged, _ = merge(updates, chosen(MergeRuleName.PCB, PcbParameters(density=0.25)), schema)
    close(merged["w"], np.array([0.85, 0, 0, 0]))


def test_pcb_of_factors_of_different_ranks_is_refused() -> None:
    updates = [
        dataclasses.replace(update, rank=2, deltas=random_arrays(LORA.at_rank(2), 5)) if index else update
        for index, update in enumerate(updates_of(LORA))
    ]
    with pytest.raises(EngineFailed, match="different ranks"):
        merge(updates, chosen(MergeRuleName.PCB), LORA)


def test_knots_on_updates_without_a_common_row_space_is_their_sum_of_agreement() -> None:
    # Columns that are orthogonal: no coordinate of the shared basis is contested, so each keeps its own.
    rows = [np.zeros((ROWS, COLUMNS)), np.zeros((ROWS, COLUMNS))]
    rows[0][0, 3], rows[1][1, 4] = 2.0, -3.0
    updates = [
        dataclasses.replace(update, deltas=Arrays({**update.deltas.arrays, "w": row.astype(np.float32)}))
        for update, row in zip(updates_of(weights=[1, 1]), rows, strict=True)
    ]
    close(merge(updates, chosen(MergeRuleName.KNOTS))[0]["w"], rows[0] + rows[1])


@pytest.mark.parametrize("name", list(REFERENCES))
def test_a_tall_matrix_is_merged_as_the_paper_says(name: str) -> None:
    schema = Schema((TensorSpec("w", "F32", (70, COLUMNS)),))
    rules, reference = REFERENCES[name]
    updates = updates_of(schema)
    close(merge(updates, rules, schema)[0]["w"], reference(rows_of(updates), normal()), atol=5e-6)


def test_equal_updates_come_back_from_tsv_cut_to_their_share() -> None:
    update = updates_of()[0]
    copies = [dataclasses.replace(update, task_id=str(number)) for number in range(4)]
    u, s, vh = np.linalg.svd(rows_of([update])[0], full_matrices=False)
    merged, _ = merge(copies, chosen(MergeRuleName.TSV))
    close(merged["w"], u[:, :3] * s[:3] @ vh[:3], atol=5e-6)


def test_tsv_of_more_updates_than_directions_keeps_one_of_each() -> None:
    updates = updates_of(weights=[1.0] * (ROWS + 2))
    merged, _ = merge(updates, chosen(MergeRuleName.TSV))
    close(merged["w"], reference_tsv(rows_of(updates), normal([1.0] * (ROWS + 2))), atol=2e-5)


def test_iso_has_a_flat_spectrum() -> None:
    values = np.linalg.svd(merge(updates_of(), chosen(MergeRuleName.ISO))[0]["w"], compute_uv=False)
    close(values, np.full(ROWS, values[0]))


def test_iso_leaves_out_directions_that_are_rounding() -> None:
    update = updates_of()[0]
    left, right = (
        np.random.default_rng(0).standard_normal((ROWS, 2)),
        np.random.default_rng(1).standard_normal((2, COLUMNS)),
    )
    update.deltas.arrays["w"][:] = left @ right
    values = np.linalg.svd(merge([update], chosen(MergeRuleName.ISO))[0]["w"], compute_uv=False)
    close(values, values[0] * (np.arange(ROWS) < 2), atol=1e-5)


# -- by inputs ---------------------------------------------------------------------------------------------


def test_least_squares_is_the_regression_on_everyone_s_data() -> None:
    """One linear model on all inputs together, each with its own worker's outputs."""
    updates, num = updates_of(weights=[1, 1, 1]), 60
    inputs = [np.random.default_rng(900 + i).standard_normal((num, COLUMNS)) for i in range(3)]
    outputs = [x @ row.T for x, row in zip(inputs, rows_of(updates), strict=True)]
    expected = np.linalg.lstsq(np.concatenate(inputs), np.concatenate(outputs), rcond=None)[0].T
    rules = chosen(MergeRuleName.LEAST_SQUARES, LeastSquaresParameters(ridge=1e-9))
    close(merge(updates, rules)[0]["w"], expected, rtol=1e-4, atol=1e-5)


def test_gradient_fusion_converges_to_least_squares() -> None:
    """Mix-of-Show (arXiv 2305.18292): LBFGS on Σ ‖(W_i − W) X_i‖², from the start."""
    updates = updates_of(weights=[1, 1, 1])
    inputs = [
        torch.from_numpy(np.random.default_rng(900 + i).standard_normal((60, COLUMNS))) for i in range(3)
    ]
    tuned = [torch.from_numpy(row) for row in rows_of(updates)]
    weight = torch.zeros(ROWS, COLUMNS, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight], max_iter=60, line_search_fn="strong_wolfe", tolerance_change=1e-16
    )

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = torch.stack(
            [((x @ (row - weight).T) ** 2).sum() / 60 for x, row in zip(inputs, tuned, strict=True)]
        ).sum()
        torch.autograd.backward(loss)
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    rules = chosen(MergeRuleName.LEAST_SQUARES, LeastSquaresParameters(ridge=1e-9))
    close(merge(updates, rules)[0]["w"], weight.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_regmean_of_diagonals_weighs_each_input_by_its_size() -> None:
    updates = updates_of(weights=[1, 1, 1])
    rules = chosen(MergeRuleName.REGMEAN, RegmeanParameters(off_diagonal=0.0, ridge=1e-12))
    shares = np.array([np.diag(gram) for gram in THREE])
    expected = sum(
        row * share for row, share in zip(rows_of(updates), shares / shares.sum(axis=0), strict=True)
    )
    close(merge(updates, rules)[0]["w"], expected)


@pytest.mark.parametrize("num_inputs", [0, 3])
def test_what_nobody_has_seen_keeps_the_mean(num_inputs: int) -> None:
    """(D − D̄) Λ is within the span of all inputs, so that 3 · 3 of 20 directions are decided and no others move."""
    updates = updates_of(weights=[1, 1, 1])
    inputs = [np.random.default_rng(i).standard_normal((num_inputs, COLUMNS)) for i in range(3)]

    def gram(update: Update, name: str) -> Array | None:
        seen = inputs[int(update.worker_id[1:])]
        return np.asarray(seen.T @ seen) if name == "w" else None

    merged, _ = merge(updates, chosen(MergeRuleName.LEAST_SQUARES), input_grams=gram)
    seen, mean = np.concatenate(inputs), np.mean(rows_of(updates), axis=0)
    unseen = np.linalg.svd(np.concatenate([seen, np.zeros((1, COLUMNS))]), full_matrices=True)[2][len(seen) :]
    close(
        (merged["w"] - mean) * np.square(seen).sum(axis=0) @ unseen.T,
        np.zeros((ROWS, len(unseen))),
        atol=1e-4,
    )
    for own, row in zip(inputs, rows_of(updates), strict=True):
        close(merged["w"] @ own.T, row @ own.T, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (np.ones((3, 3), np.float32), "3, 3"),
        (np.full((COLUMNS, COLUMNS), np.nan, np.float32), "not finite"),
        (-np.eye(COLUMNS, dtype=np.float32), "semi-definite"),
        (np.full((COLUMNS, COLUMNS), 2, np.float32) - np.eye(COLUMNS, dtype=np.float32), "semi-definite"),
    ],
    ids=["shape", "nan", "negative", "indefinite"],
)
def test_a_gram_that_is_none_is_refused(gram: Array, message: str) -> None:
    with pytest.raises(EngineFailed, match=message):
        merge(updates_of(), chosen(MergeRuleName.REGMEAN), input_grams=lambda _update, _name: gram)


def test_a_gram_that_only_some_have_is_refused() -> None:
    def some(update: Update, name: str) -> Array | None:
        return grams(update, name) if update.worker_id == "w01" else None

    with pytest.raises(EngineFailed, match="others have none"):
        merge(updates_of(), chosen(MergeRuleName.REGMEAN), input_grams=some)
    with pytest.raises(EngineFailed, match="needs Grams"):
        merge(updates_of(), chosen(MergeRuleName.REGMEAN), input_grams=None)


def test_the_grams_of_the_documentation_are_those_of_the_inputs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "merge-rules.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(example, "docs/merge-rules.md", "exec"), namespace)  # noqa: S102
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    rng = np.random.default_rng(0)
    batches = [{"input": torch.from_numpy(rng.random((rows, 5, 3), np.float32))} for rows in (4, 2)]
    found = namespace["grams"](model, batches)
    inputs = torch.cat([batch["input"].reshape(-1, 3) for batch in batches]).numpy()
    assert set(found) == {"0.weight.gram", "2.weight.gram"}
    close(found["0.weight.gram"].numpy(), inputs.T @ inputs / 30)


# -- LoRA --------------------------------------------------------------------------------------------------


def dense_changes(start: Arrays, updates: Sequence[ArrayUpdate]) -> list[Array]:
    changes = []
    for update in updates:
        rank = update.rank or RANK
        b, a = start.arrays[B][:, :rank].astype(np.float64), start.arrays[A][:rank].astype(np.float64)
        changes.append((b + update.deltas.arrays[B]) @ (a + update.deltas.arrays[A]) - b @ a)
    return changes


def truncated(matrix: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray((u[:, :rank] * s[:rank]) @ vh[:rank])


LORA_REFERENCES: Mapping[str, tuple[MergeSettings, Reference]] = {
    **REFERENCES,
    "iso": (
        chosen(MergeRuleName.ISO, IsoParameters(scale=0.4)),
        lambda rows, w: 0.4 * reference_iso(rows, w, RANK),
    ),
}


@pytest.mark.parametrize("ranks", [(None, None, None), (2, None, 1)], ids=["same", "nested"])
@pytest.mark.parametrize("name", list(LORA_REFERENCES))
def test_of_lora_the_factors_give_what_the_dense_matrix_would(
    name: str, ranks: tuple[int | None, ...]
) -> None:
    rules, reference = LORA_REFERENCES[name]
    start = random_arrays(LORA, 9)
    updates = [
        dataclasses.replace(update, rank=rank, deltas=random_arrays(LORA.at_rank(rank), 30 + index))
        if rank
        else update
        for index, (update, rank) in enumerate(zip(updates_of(LORA), ranks, strict=True))
    ]
    outer = OuterSettings(learning_rate=0.5)
    merged, report = merge(updates, rules, LORA, start=start, outer=outer)
    expected = start.arrays[B].astype(np.float64) @ start.arrays[A]
    expected += 0.5 * reference(dense_changes(start, updates), normal())
    close(
        merged[B].astype(np.float64) @ merged[A],
        truncated(expected, RANK),
        rtol=1e-5,
        atol=1e-5 * np.abs(expected).max(),
    )
    lost = np.linalg.norm(expected - truncated(expected, RANK)) / np.linalg.norm(expected)
    assert report.truncation_error == pytest.approx(lost, rel=1e-5)
    assert report.lora is LoraSpace.EXACT


@pytest.mark.parametrize("name", OF_MATRICES)
def test_the_first_round_of_lora_leaves_a_finite_module(name: MergeRuleName) -> None:
    start = random_arrays(LORA, 9)
    start.arrays[B][:] = 0
    merged, _ = merge(updates_of(LORA), chosen(name), LORA, start=start)
    assert all(np.isfinite(values).all() for values in merged.values())
    assert np.linalg.matrix_rank(merged[A]) == RANK


@pytest.mark.parametrize("name", sorted(set(OF_MATRICES) - {MergeRuleName.ISO}))
def test_one_update_of_lora_comes_back(name: MergeRuleName) -> None:
    start, (update,) = random_arrays(LORA, 9), updates_of(LORA, [1])
    merged, _ = merge([update], chosen(name), LORA, start=start)
    for factor in (A, B):
        close(merged[factor], start.arrays[factor] + update.deltas.arrays[factor], atol=2e-5)


# -- properties --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", list(Clip))
@pytest.mark.parametrize("name", WHOLE_RULES)
@settings(max_examples=4, deadline=None)
@given(
    order=st.permutations(range(5)),
    tile_elements=st.sampled_from([1, 7, 64]),
    threads=st.integers(1, 3),
    schema=st.sampled_from([MATRIX, LORA]),
)
def test_the_same_updates_give_the_same_bytes(
    name: MergeRuleName, clip: Clip, order: list[int], tile_elements: int, threads: int, schema: Schema
) -> None:
    updates, start = updates_of(schema, [1, 2, 3, 4, 5.5]), random_arrays(schema, 7)
    rules = MergeSettings(rule=name, clip=clip)
    one, _ = merge(updates, rules, schema, start=start)
    shuffled = [updates[index] for index in order]
    other, _ = merge(shuffled, rules, schema, start=start, tile_elements=tile_elements, crew=Threads(threads))
    assert [a.tobytes() for a in one.values()] == [a.tobytes() for a in other.values()]


@pytest.mark.parametrize("factor", [-1.0, 2.0])
@pytest.mark.parametrize("name", OF_MATRICES)
def test_scaled_updates_give_the_scaled_merge(name: MergeRuleName, factor: float) -> None:
    updates = updates_of()
    scaled = [
        dataclasses.replace(u, deltas=Arrays({n: np.float32(factor) * a for n, a in u.deltas.arrays.items()}))
        for u in updates
    ]
    one, other = merge(updates, chosen(name))[0], merge(scaled, chosen(name))[0]
    close(other["w"], factor * one["w"], atol=5e-6)


def test_negated_updates_give_the_negated_pcb() -> None:
    updates = updates_of()
    negated = [
        dataclasses.replace(u, deltas=Arrays({n: -a for n, a in u.deltas.arrays.items()})) for u in updates
    ]
    one, other = (merge(each, chosen(MergeRuleName.PCB))[0]["w"] for each in (updates, negated))
    np.testing.assert_array_equal(one, -other)


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_worker_that_stayed_still_brings_no_direction(name: MergeRuleName) -> None:
    updates = updates_of(weights=[1, 1])
    still = ArrayUpdate(worker_id="w09", deltas=Arrays.zeros(MATRIX))
    merged, _ = merge([*updates, still], chosen(name))
    assert np.isfinite(merged["w"]).all()
    assert np.linalg.norm(merged["w"]) > 0


@pytest.mark.parametrize("name", WHOLE_RULES)
def test_an_outer_optimiser_takes_what_a_matrix_moved(name: MergeRuleName) -> None:
    updates = updates_of()
    once, half = (
        merge(updates, chosen(name), outer=OuterSettings(learning_rate=rate))[0] for rate in (1.0, 0.5)
    )
    close(once["w"], 2 * half["w"])


def test_every_row_that_is_no_tile_has_a_function() -> None:
    assert {name for name, row in RULES.items() if row.whole} == set(WHOLE_RULES)


def test_what_the_coordinator_knows_of_the_rules_is_so() -> None:
    assert {name for name, row in RULES.items() if row.linear} == WEIGHING
    assert set(OF_MATRICES) == spaces.OF_MATRICES
    assert {name for name, row in RULES.items() if row.needs_grams} == NEEDING_GRAMS


# -- what is refused ---------------------------------------------------------------------------------------

RUN = """
[base]
source = "base"
[run]
name = "run"
[topology]
kind = "{kind}"
[merge]
rule = "{rule}"
{more}
"""


@pytest.mark.parametrize("name", [name for name, row in RULES.items() if row.needs_grams])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_refuses_what_needs_grams(name: MergeRuleName, kind: str) -> None:
    with pytest.raises(RunFileError, match=f"{name}.*Grams"):
        parse_run_file(RUN.format(kind=kind, rule=name, more=""))


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_run_of_lora_takes_rules_of_matrices_as_far_as_they_go(name: MergeRuleName) -> None:
    assert parse_run_file(RUN.format(kind="lora", rule=name, more="")).merge.rule is name
    nesterov = '[outer]\nname = "nesterov"'
    assert parse_run_file(RUN.format(kind="full", rule=name, more=nesterov)).merge.rule is name
    for more, message in (
        (nesterov, "outer.name"),
        ('lora = "factors"', "matrix ΔW"),
        ("[rounds]\nbuffer = 2", "asynchronous"),
    ):
        with pytest.raises((RunFileError, UsageError), match=message):
            parse_run_file(RUN.format(kind="lora", rule=name, more=more))


@pytest.mark.parametrize("name", SPECTRAL)
def test_rules_of_matrices_merge_lora_as_the_product(name: MergeRuleName) -> None:
    assert lora_space(MergeSettings(rule=name), OuterSettings()) is LoraSpace.EXACT
    with pytest.raises(UsageError, match="momentum"):
        lora_space(MergeSettings(rule=name), OuterSettings(name=OuterName.NESTEROV))
