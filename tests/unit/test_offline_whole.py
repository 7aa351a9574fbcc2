"""Rules that see a matrix whole, offline: adapters against their dense products, and Grams from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file
from tests.handmade import LAYER, adapter_product, block_tensors, merge_inputs, write_adapter, write_model

from weft.common.errors import InputError, UsageError
from weft.server.offline.grams import GRAMS
from weft.server.offline.recipe import LoraMode, merge_settings

Array = npt.NDArray[Any]
NAME = "model.layers.0.mlp"
ROWS, COLUMNS = 7, 6


def adapters(to: Path, *, ranks: tuple[int, int] = (1, 2)) -> tuple[list[Path], list[Array]]:
    """Two adapters, the second of ΔW = 2 B A, and what they stand for."""
    rng, paths, dense = np.random.default_rng(0), [], []
    for index, rank in enumerate(ranks):
        a, b = rng.standard_normal((rank, COLUMNS)), rng.standard_normal((ROWS, rank))
        paths.append(write_adapter(to / f"in{index}", {NAME: (a, b)}, lora_alpha=rank * (index + 1)))
        dense.append((index + 1) * np.asarray(b.astype(np.float32) @ a.astype(np.float32), np.float64))
    return paths, dense


def write_grams(path: Path, seed: int, name: str, size: int, dtype: Any = np.float32) -> Array:
    inputs = np.random.default_rng(seed).standard_normal((30, size))
    gram = (inputs.T @ inputs / 30).astype(dtype)
    save_file({f"{name}.gram": gram}, path / GRAMS)
    return np.asarray(gram, np.float64)


def orthonormal(matrix: Array) -> Array:
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return np.asarray(u @ vh)


def test_tsv_of_adapters_is_that_of_their_products(tmp_path: Path) -> None:
    paths, dense = adapters(tmp_path)
    merged = merge_inputs(tmp_path / "out", *paths, merge=merge_settings("tsv", {}), rank=3)
    triples = [np.linalg.svd(each, full_matrices=False) for each in dense]
    left = orthonormal(np.concatenate([triples[0][0][:, :1], triples[1][0][:, :2]], axis=1))
    right = orthonormal(np.concatenate([triples[0][2][:1].T, triples[1][2][:2].T], axis=1))
    values = np.concatenate([triples[0][1][:1], triples[1][1][:2]])
    np.testing.assert_allclose(adapter_product(merged, NAME), left * values @ right.T, rtol=1e-5, atol=1e-5)


def test_iso_of_adapters_fills_the_rank_it_is_given(tmp_path: Path) -> None:
    paths, dense = adapters(tmp_path)
    merged = merge_inputs(tmp_path / "out", *paths, merge=merge_settings("iso", {"scale": 0.5}), rank=2)
    u, s, vh = np.linalg.svd(sum(dense), full_matrices=False)
    expected = 0.5 * s[:2].mean() * u[:, :2] @ vh[:2]
    np.testing.assert_allclose(adapter_product(merged, NAME), expected, rtol=1e-5, atol=1e-5)


def test_regmean_of_adapters_takes_grams_by_the_name_of_a(tmp_path: Path) -> None:
    paths, dense = adapters(tmp_path)
    a_name = f"base_model.model.{NAME}.lora_A.weight"
    grams = [write_grams(path, index, a_name, COLUMNS) for index, path in enumerate(paths)]
    settings = merge_settings("regmean", {"off_diagonal": 0.5, "ridge": 1e-12})
    merged = merge_inputs(tmp_path / "out", *paths, merge=settings, rank=3)
    scaled = [0.5 * gram + 0.5 * np.diag(np.diag(gram)) for gram in grams]
    expected = sum(d @ g for d, g in zip(dense, scaled, strict=True)) @ np.linalg.inv(sum(scaled))
    np.testing.assert_allclose(adapter_product(merged, NAME), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_least_squares_of_models_with_and_without_their_base_is_the_same(tmp_path: Path, dtype: Any) -> None:
    rng = np.random.default_rng(3)
    base, *tuned = (block_tensors(rng) for _ in range(3))
    paths = [write_model(tmp_path / f"in{index}", tensors) for index, tensors in enumerate(tuned)]
    name = LAYER.format(1)
    grams = [write_grams(path, index, name, 3, dtype) for index, path in enumerate(paths)]
    settings = merge_settings("least_squares", {"ridge": 1e-12})
    written = write_model(tmp_path / "base", base)
    results = [
        merge_inputs(tmp_path / f"out{len(more)}", *paths, merge=settings, **more)
        for more in ({}, {"base": str(written)})
    ]
    right = sum(each[name].astype(np.float64) @ gram for each, gram in zip(tuned, grams, strict=True))
    expected = right @ np.linalg.inv(sum(grams))
    for merged in results:
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-5)
        mean = (tuned[0]["lm_head.weight"] + tuned[1]["lm_head.weight"]) / 2  # has no Gram
        np.testing.assert_allclose(merged["lm_head.weight"], mean, rtol=1e-6, atol=1e-6)


def test_inputs_without_grams_are_refused(tmp_path: Path) -> None:
    paths, _ = adapters(tmp_path)
    with pytest.raises(InputError, match=GRAMS):
        merge_inputs(tmp_path / "out", *paths, merge=merge_settings("regmean", {}))


@pytest.mark.parametrize(
    ("name", "gram"),
    [
        ("w.gram", np.eye(3, dtype=np.int32)),
        ("w.gram", np.ones((2, 3), np.float32)),
        ("w", np.eye(3, dtype=np.float32)),
    ],
    ids=["integers", "oblong", "name"],
)
def test_files_that_hold_no_grams_are_refused(tmp_path: Path, name: str, gram: Array) -> None:
    paths, _ = adapters(tmp_path)
    for path in paths:
        save_file({name: gram}, path / GRAMS)
    with pytest.raises(InputError, match=f"holds {name} as"):
        merge_inputs(tmp_path / "out", *paths, merge=merge_settings("regmean", {}))


@pytest.mark.parametrize("mode", [LoraMode.DENSE, LoraMode.FACTORS, LoraMode.STACK])
def test_rules_of_matrices_merge_adapters_exactly_or_not_at_all(tmp_path: Path, mode: LoraMode) -> None:
    paths, _ = adapters(tmp_path)
    with pytest.raises(UsageError, match="by its factors"):
        merge_inputs(tmp_path / "out", *paths, merge=merge_settings("knots", {}), lora=mode)


def test_knots_of_one_adapter_is_the_adapter(tmp_path: Path) -> None:
    paths, dense = adapters(tmp_path)
    merged = merge_inputs(tmp_path / "out", paths[1], merge=merge_settings("knots", {}))
    np.testing.assert_allclose(adapter_product(merged, NAME), dense[1], rtol=1e-5, atol=1e-5)
