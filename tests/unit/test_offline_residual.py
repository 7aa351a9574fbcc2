"""``weft merge --lora residual``: adapters factor by factor, and what that gets wrong in the base (FedEx)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tests.handmade import adapter_product, merge_inputs, write_adapter, write_model

from weft.common.errors import ComputeError, InputError, UsageError
from weft.server.merge.lora import Factors
from weft.server.merge.settings import Clip
from weft.server.offline import merging
from weft.server.offline.inputs import open_adapter
from weft.server.offline.layers import LayersSpec
from weft.server.offline.recipe import (
    Dtype,
    InputSpec,
    LoraMode,
    Recipe,
    RecipeFile,
    merge_settings,
    understand,
)
from weft.server.offline.residual import mean_factors
from weft.server.offline.scoring import CommandScorer
from weft.server.offline.search import Method, search
from weft.server.offline.sources import Weights

UP, DOWN = "model.layers.0.mlp.up", "model.layers.1.mlp.down"
SHAPES = {UP: (20, 8), DOWN: (8, 20)}
MEAN = merge_settings("mean", {})
Array = npt.NDArray[Any]
Pair = tuple[Array, Array]


def base_tensors(rng: np.random.Generator) -> dict[str, Array]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    shapes |= {"model.embed_tokens.weight": (5, 8), "model.norm.weight": (8,), "lm_head.weight": (5, 8)}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tensors[f"{UP}.weight"][0, :2] = 0.0, -0.0
    return tensors


def pair(rng: np.random.Generator, layer: str, rank: int) -> Pair:
    """A [r, i] and B [o, r], float32."""
    o, i = SHAPES[layer]
    return rng.standard_normal((rank, i)).astype(np.float32), rng.standard_normal((o, rank)).astype(
        np.float32
    )


def merge_residual(
    to: Path, base: Path, *inputs: Path, **options: Any
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The adapter and the base."""
    merged = merge_inputs(to, *inputs, base=str(base), lora=LoraMode.RESIDUAL, **options)
    return merged, load_file(to / "base/model.safetensors")


def recipe_of(base: Path, *inputs: Path, **options: Any) -> Recipe:
    file = RecipeFile(
        inputs=tuple(InputSpec(path=str(path)) for path in inputs),
        base=str(base),
        lora=LoraMode.RESIDUAL,
        **{"merge": MEAN} | options,
    )
    return understand(file, resolve=Path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", base_tensors(np.random.default_rng(5)))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    rng = np.random.default_rng(6)
    return write_adapter(tmp_path / "one", {layer: pair(rng, layer, 2) for layer in SHAPES})


@pytest.fixture
def two(tmp_path: Path) -> Path:
    rng = np.random.default_rng(7)
    return write_adapter(tmp_path / "two", {layer: pair(rng, layer, 2) for layer in SHAPES})


# ---- what is computed --------------------------------------------------------------------------------------------


def test_factors_are_those_of_factors_and_the_base_has_what_they_get_wrong(
    base: Path, one: Path, two: Path, tmp_path: Path
) -> None:
    # The paper: mean A, mean B, and W0 + (mean of B A) - (mean B)(mean A), in float64.
    merged, changed = merge_residual(tmp_path / "out", base, one, two)
    apart = merge_inputs(tmp_path / "factors", one, two, lora=LoraMode.FACTORS)
    assert merged.keys() == apart.keys()
    for name, values in apart.items():
        np.testing.assert_allclose(merged[name], values, rtol=1e-6, atol=1e-7)
    held = load_file(base / "model.safetensors")
    for layer in SHAPES:
        a_wri, b_wor = (
            np.stack(
                [
                    load_file(path / "adapter_model.safetensors")[
                        f"base_model.model.{layer}.lora_{side}.weight"
                    ]
                    for path in (one, two)
                ]
            ).astype(np.float64)
            for side in "AB"
        )
        residual = (b_wor @ a_wri).mean(0) - b_wor.mean(0) @ a_wri.mean(0)
        assert np.linalg.norm(residual) > 1
        wanted = held[f"{layer}.weight"] + residual
        np.testing.assert_allclose(changed[f"{layer}.weight"], wanted, rtol=1e-6, atol=1e-6)


CLIENTS: Mapping[str, Any] = {
    "a": ({UP: 2, DOWN: 3}, {"lora_alpha": 7, "r": 2, "rank_pattern": {DOWN: 3}}),
    "b": ({UP: 4, DOWN: 4}, {"lora_alpha": 5, "use_rslora": True}),
    "c": ({UP: 1}, {"lora_alpha": 3, "alpha_pattern": {UP: 9}}),
}


def scaling(config: Mapping[str, Any], layer: str, rank: int) -> float:
    alpha = config.get("alpha_pattern", {}).get(layer, config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


@pytest.mark.parametrize(
    ("options", "kappas"),
    [
        ({"weights": (1.0, 1.0, 1.0)}, (1 / 3, 1 / 3, 1 / 3)),
        ({"weights": (1.0, 3.0, 0.5)}, (2 / 9, 6 / 9, 1 / 9)),
        ({"weights": (1.0, 0.0, 1.0)}, (1 / 2, 0.0, 1 / 2)),
        ({"expression": "2*a - b + c/2"}, (2.0, -1.0, 0.5)),
    ],
    ids=["equal", "weighted", "one-without-weight", "expression"],
)
def test_base_and_adapter_together_are_the_mean_of_the_products(
    options: dict[str, Any], kappas: tuple[float, ...], base: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(11)
    wanted = {
        layer: load_file(base / "model.safetensors")[f"{layer}.weight"].astype(np.float64) for layer in SHAPES
    }
    inputs = []
    for (name, (ranks, config)), kappa in zip(CLIENTS.items(), kappas, strict=True):
        factors = {layer: pair(rng, layer, rank) for layer, rank in ranks.items()}
        inputs.append(write_adapter(tmp_path / name, factors, **config))
        for layer, (a_ri, b_or) in factors.items():
            product = b_or.astype(np.float64) @ a_ri.astype(np.float64)
            wanted[layer] += kappa * scaling(config, layer, len(a_ri)) * product
    weights = options.pop("weights", (1.0, 1.0, 1.0))
    file = RecipeFile(
        inputs=tuple(
            InputSpec(path=str(path), weight=weight) for path, weight in zip(inputs, weights, strict=True)
        ),
        base=str(base),
        lora=LoraMode.RESIDUAL,
        **options,
    )
    recipe = understand(file, resolve=Path)
    result = merging.merge(
        recipe,
        merging.make_plan(recipe, device="cpu"),
        tmp_path / "out",
        merging.Options(threads=2, digests=True),
        advance=lambda _: None,
    )
    assert result.truncation_error is not None
    assert result.truncation_error < 1e-7
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    changed = load_file(tmp_path / "out/base/model.safetensors")
    for layer in SHAPES:
        assert merged[f"base_model.model.{layer}.lora_A.weight"].shape[0] == 4
        together = changed[f"{layer}.weight"] + adapter_product(merged, layer)
        error = np.linalg.norm(together - wanted[layer]) / np.linalg.norm(wanted[layer])
        assert error < 2e-7


@given(
    st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0.0, 0.3, 1.0, 2.5])), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=30, deadline=None)
def test_mean_factors_are_means_of_those_that_have_the_row(
    clients: list[tuple[int, float]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scaled = [
        Factors(*(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, r), (r, 3))))
        for r, _ in clients
    ]
    mean = mean_factors(scaled, [weight for _, weight in clients])
    for p in range(max(r for r, _ in clients)):
        rows = [
            (each.A_ri[p], each.B_or[:, p], w) for each, (r, w) in zip(scaled, clients, strict=True) if r > p
        ]
        total = sum(weight for *_, weight in rows)
        wanted = (
            sum((weight / total * row for row, _, weight in rows), torch.zeros(())) if total else rows[0][0]
        )
        torch.testing.assert_close(mean.A_ri[p], wanted, check_dtype=False)
        torch.testing.assert_close(mean.B_or[:, p], torch.stack([column for _, column, _ in rows]).sum(0))


def test_a_row_that_one_input_has_is_its_own(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    (a_ri, b_or), (other_a, other_b) = pair(rng, UP, 3), pair(rng, UP, 1)
    paths = [
        write_adapter(tmp_path / "a", {UP: (a_ri, b_or)}),
        write_adapter(tmp_path / "b", {UP: (other_a, other_b)}),
    ]
    merged, _ = merge_residual(tmp_path / "out", base, *paths)
    rows = merged[f"base_model.model.{UP}.lora_A.weight"]
    np.testing.assert_array_equal(rows[1:], a_ri[1:])
    np.testing.assert_allclose(rows[0], (a_ri[0] + other_a[0]) / 2, rtol=1e-6)


# ---- where there is no residual ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_same_a_leaves_the_base_alone(count: int, dtype: str, base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    shared = {layer: pair(rng, layer, 2)[0] for layer in SHAPES}
    paths = [
        write_adapter(
            tmp_path / str(n),
            {layer: (shared[layer], pair(rng, layer, 2)[1]) for layer in SHAPES},
            lora_alpha=3,
        )
        for n in range(count)
    ]
    if dtype == "BF16":
        kept = {name: each.bfloat16() for name, each in load_torch(base / "model.safetensors").items()}
        save_torch(kept, base / "model.safetensors", {"format": "pt"})
    merge_residual_only(tmp_path / "out", base, *paths)
    held, changed = (load_torch(path / "model.safetensors") for path in (base, tmp_path / "out/base"))
    assert held.keys() == changed.keys()
    for name, tensor in held.items():
        whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[tensor.dtype]
        assert torch.equal(changed[name].view(whole), tensor.view(whole)), name


def merge_residual_only(to: Path, base: Path, *inputs: Path, **options: Any) -> merging.Result:
    recipe = recipe_of(base, *inputs, **options)
    plan = merging.make_plan(recipe, device="cpu")
    return merging.merge(recipe, plan, to, merging.Options(threads=1, digests=True), advance=lambda _: None)


def test_tensors_that_no_adapter_touches_are_copied(base: Path, one: Path, two: Path, tmp_path: Path) -> None:
    held = load_file(base / "model.safetensors") | {"steps": np.arange(3)}
    held["model.rotary_emb.inv_freq"] = np.array([1.0, np.nan], np.float32)
    save_file(held, base / "model.safetensors")
    _, changed = merge_residual(tmp_path / "out", base, one, two)
    assert changed.keys() == held.keys()
    for name in held.keys() - {f"{layer}.weight" for layer in SHAPES}:
        assert changed[name].tobytes() == held[name].tobytes()


# ---- dtypes ------------------------------------------------------------------------------------------------------


def test_what_stored_factors_lose_is_in_the_base_too(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    paths = [write_adapter(tmp_path / name, {UP: pair(rng, UP, 2)}, lora_alpha=3) for name in "ab"]
    wanted = load_file(base / "model.safetensors")[f"{UP}.weight"].astype(np.float64)
    for path in paths:
        kept = {
            name: each.bfloat16() for name, each in load_torch(path / "adapter_model.safetensors").items()
        }
        save_torch(kept, path / "adapter_model.safetensors")
        a_ri, b_or = (kept[f"base_model.model.{UP}.lora_{side}.weight"].double() for side in "AB")
        wanted += 0.5 * 1.5 * (b_or @ a_ri).numpy()
    merge_residual_only(tmp_path / "out", base, *paths)
    factors = load_torch(tmp_path / "out/adapter_model.safetensors")
    assert {each.dtype for each in factors.values()} == {torch.bfloat16}
    a_ri, b_or = (factors[f"base_model.model.{UP}.lora_{side}.weight"].double() for side in "AB")
    together = load_file(tmp_path / "out/base/model.safetensors")[f"{UP}.weight"] + (b_or @ a_ri).numpy()
    np.testing.assert_allclose(together, wanted, rtol=1e-6, atol=1e-6)


def test_a_narrow_base_keeps_its_dtype_and_what_that_loses_is_said(
    base: Path, one: Path, two: Path, tmp_path: Path
) -> None:
    full = merge_residual(tmp_path / "full", base, one, two)[1]
    kept = {name: each.bfloat16() for name, each in load_torch(base / "model.safetensors").items()}
    save_torch(kept, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(
        json.dumps(json.loads((base / "config.json").read_text()) | {"dtype": "bfloat16"})
    )
    result = merge_residual_only(tmp_path / "out", base, one, two)
    exact = merge_residual_only(tmp_path / "wide", base, one, two, dtype=Dtype.FP32)
    stored, wide = (load_torch(tmp_path / name / "base/model.safetensors") for name in ("out", "wide"))
    assert {each.dtype for each in stored.values()} == {torch.bfloat16}
    assert {each.dtype for each in wide.values()} == {torch.float32}
    lost = total = 0.0
    for layer in SHAPES:
        lost += float((stored[f"{layer}.weight"].double() - wide[f"{layer}.weight"].double()).square().sum())
        factors = [load_torch(path / "adapter_model.safetensors") for path in (one, two)]
        delta = sum(adapter_product({k: v.numpy() for k, v in each.items()}, layer) for each in factors) / 2
        total += float(np.square(delta).sum())
    assert result.truncation_error == pytest.approx(math.sqrt(lost / total), rel=1e-3)
    assert 1e-4 < (result.truncation_error or 0) < 1e-2
    assert (exact.truncation_error or 0) < 1e-7
    assert any("BF16" in note and "--dtype fp32" in note for note in result.notes)
    assert not any("BF16" in note for note in exact.notes)
    for name, dtype in (("out", "bfloat16"), ("wide", "float32")):
        assert json.loads((tmp_path / name / "base/config.json").read_text())["dtype"] == dtype
    for name in ("model.norm.weight", "lm_head.weight"):
        assert torch.equal(stored[name], kept[name])
        assert torch.equal(wide[name], kept[name].float())
        assert full[name].dtype == np.float32


# ---- files -------------------------------------------------------------------------------------------------------


def test_the_result_is_an_adapter_and_a_model_beside_it(
    base: Path, one: Path, two: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "generation_config.json"):
        (base / name).write_text('{"model": {}}')
    (one / "tokenizer_config.json").write_text("{}")
    out = tmp_path / "out"
    merge_residual_only(out, base, one, two, shard_size="300")
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    shards = {name for name in files if "-of-" in name}
    assert files - shards == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base/config.json",
        "base/generation_config.json",
        "base/model.safetensors.index.json",
        "base/tokenizer.json",
        "merge.json",
        "tokenizer_config.json",
    }
    index = json.loads((out / "base/model.safetensors.index.json").read_text())
    held = load_file(base / "model.safetensors")
    assert index["weight_map"].keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in held.values())
    assert {f"base/{name}" for name in index["weight_map"].values()} == {
        s for s in shards if s.startswith("base/")
    }
    assert Weights(sorted((out / "base").glob("*.safetensors"))).specs.keys() == held.keys()
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "./base"
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    manifest = json.loads((out / "merge.json").read_text())
    assert manifest["recipe"]["lora"] == "residual"
    assert {"the base", "one", "two"} == manifest["inputs"].keys()
    assert f"{UP}.weight" in manifest["tensors"]
    card = (out / "README.md").read_text()
    assert "lora: residual, rank 2" in card
    assert "never onto base" in card


def test_bases_of_two_results_are_not_taken_for_one(base: Path, one: Path, two: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        merge_residual_only(tmp_path / name, base, one, two)
    assert open_adapter(tmp_path / "first", "first").base_name == str((tmp_path / "first/base").resolve())
    with pytest.raises(InputError, match="is for"):
        merge_inputs(tmp_path / "no", tmp_path / "first", tmp_path / "second")
    merge_inputs(tmp_path / "again", tmp_path / "first")
    config = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "first/base").resolve())


def test_heads_that_adapters_replace_stay_in_the_adapter(
    base: Path, one: Path, two: Path, tmp_path: Path
) -> None:
    for path, value in ((one, 1.0), (two, 3.0)):
        tensors = load_file(path / "adapter_model.safetensors")
        tensors["base_model.model.lm_head.weight"] = np.full((5, 8), value, np.float32)
        save_file(tensors, path / "adapter_model.safetensors")
    merged, changed = merge_residual(tmp_path / "out", base, one, two)
    np.testing.assert_array_equal(merged["base_model.model.lm_head.weight"], np.full((5, 8), 2.0))
    np.testing.assert_array_equal(
        changed["lm_head.weight"], load_file(base / "model.safetensors")["lm_head.weight"]
    )


def test_layers_can_be_taken_from_inputs_of_their_own(
    base: Path, one: Path, two: Path, tmp_path: Path
) -> None:
    layers = (LayersSpec(blocks="0", weights={"one": 1.0}),)
    merged, changed = merge_residual(tmp_path / "out", base, one, two, layers=layers)
    held = load_file(base / "model.safetensors")
    own = load_file(one / "adapter_model.safetensors")
    np.testing.assert_array_equal(changed[f"{UP}.weight"], held[f"{UP}.weight"])
    np.testing.assert_allclose(adapter_product(merged, UP), adapter_product(own, UP), rtol=1e-5, atol=1e-6)
    assert not np.array_equal(changed[f"{DOWN}.weight"], held[f"{DOWN}.weight"])


# ---- refused before any work -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"base": ""}, "lora residual changes the base, and none is given"),
        ({"rank": 4}, "the base takes the rest"),
        ({"merge": merge_settings("ties", {})}, "rule ties is no mean"),
        ({"merge": merge_settings("task_arithmetic", {})}, "rule task_arithmetic is no mean"),
        ({"merge": merge_settings("tsv", {})}, "use --lora exact|by its factors"),
        ({"merge": dataclasses.replace(MEAN, clip=Clip.MEDIAN)}, "clipping is no mean"),
    ],
)
def test_options_that_it_does_not_go_with(
    options: dict[str, Any], said: str, base: Path, one: Path, two: Path, tmp_path: Path
) -> None:
    options = {"base": str(base), "lora": LoraMode.RESIDUAL} | options
    with pytest.raises(UsageError, match=said):
        merge_inputs(tmp_path / "out", one, two, **options)
    assert not list(tmp_path.glob("out*"))


def without_up(tensors: dict[str, Array]) -> dict[str, Array]:
    return {name: each for name, each in tensors.items() if name != f"{UP}.weight"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_up, rf"the base has no {UP}\.weight"),
        (
            lambda t: t | {f"{UP}.weight": t[f"{UP}.weight"].T.copy()},
            r"as \[20, 8\], and the base holds F32 \[8, 20\]",
        ),
        (lambda t: t | {f"{UP}.weight": np.ones((20, 8), np.int8)}, "the base holds I8"),
        (
            lambda t: t | {"base_model.model.x": np.ones(1, np.float32)},
            "base_model.model.x, which is an adapter's",
        ),
    ],
    ids=["missing", "shape", "integers", "an-adapter"],
)
def test_bases_that_do_not_fit(
    change: Any, said: str, base: Path, one: Path, two: Path, tmp_path: Path
) -> None:
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors")
    with pytest.raises(InputError, match=said):
        merge_residual(tmp_path / "out", base, one, two)
    assert not list(tmp_path.glob("out*"))


def test_a_head_that_is_the_embedding_is_not_adapted_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = write_model(tmp_path / "base", base_tensors(rng), tie_word_embeddings=True)
    head = write_adapter(
        tmp_path / "head", {"lm_head": (rng.standard_normal((2, 8)), rng.standard_normal((5, 2)))}
    )
    with pytest.raises(InputError, match="adapt lm_head, which the base shares with its embeddings"):
        merge_residual(tmp_path / "out", base, head)


def test_transposed_bases_are_refused(base: Path, tmp_path: Path) -> None:
    odd = write_adapter(tmp_path / "odd", {UP: pair(np.random.default_rng(0), UP, 2)}, fan_in_fan_out=True)
    with pytest.raises(InputError, match="odd has fan_in_fan_out"):
        merge_residual(tmp_path / "out", base, odd)


def test_a_base_that_is_not_finite(base: Path, one: Path, two: Path, tmp_path: Path) -> None:
    held = load_file(base / "model.safetensors")
    held[f"{DOWN}.weight"][1, 2] = np.nan
    save_file(held, base / "model.safetensors")
    with pytest.raises(ComputeError, match=rf"the merged {DOWN}\.weight is not finite"):
        merge_residual(tmp_path / "out", base, one, two)


def test_no_gpu_and_no_search(base: Path, one: Path, two: Path, tmp_path: Path) -> None:
    recipe = recipe_of(base, one, two)
    with pytest.raises(UsageError, match="runs on the CPU"):
        merging.make_plan(recipe, device="cuda")
    scorer = CommandScorer("true {model}", higher_is_better=True)
    with pytest.raises(UsageError, match="would write the whole base"):
        search(
            recipe, tmp_path / "out", scorer, merging.Options(threads=1, digests=False), method=Method.GREEDY
        )


# ---- long merges -------------------------------------------------------------------------------------------------


def test_broken_off_it_goes_on_where_it_was(
    base: Path, one: Path, two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "_GROUP_ELEMENTS", 1)
    monkeypatch.setattr(merging, "_GROUP_TURNS", 1)
    recipe = recipe_of(base, one, two)
    plan = merging.make_plan(recipe, device="cpu")
    assert len(plan.units) == 5
    options = merging.Options(threads=1, digests=True)
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 7:  # the third unit: two layers have three tensors each
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging.merge(recipe, plan, tmp_path / "out", options, advance=stop)
    assert not (tmp_path / "out").exists()
    told: list[int] = []
    result = merging.merge(recipe, plan, tmp_path / "out", options, advance=told.append)
    assert result.num_resumed == 2
    assert sum(told) == sum(spec.size * 4 for spec in plan.all_specs)
    whole = tmp_path / "whole"
    merging.merge(recipe, plan, whole, dataclasses.replace(options, threads=2), advance=lambda _: None)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert Path("base/model.safetensors") in files
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_base_is_read_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    o, i = 600, 1000
    weight = rng.standard_normal((o, i)).astype(np.float32)
    base = write_model(tmp_path / "base", {"fc.weight": weight})
    factors = [(rng.standard_normal((2, i)), rng.standard_normal((o, 2))) for _ in range(2)]
    paths = [write_adapter(tmp_path / name, {"fc": each}) for name, each in zip("ab", factors, strict=True)]
    longest = 0
    tile = Weights.tile

    def counted(self: Weights, name: str, start: int, stop: int) -> Any:
        nonlocal longest
        longest = max(longest, stop - start)
        return tile(self, name, start, stop)

    monkeypatch.setattr(Weights, "tile", counted)
    merged, changed = merge_residual(tmp_path / "out", base, *paths)
    assert 0 < longest <= 1 << 16
    wanted = weight + sum(b_or.astype(np.float32) @ a_ri.astype(np.float32) for a_ri, b_or in factors) / 2
    np.testing.assert_allclose(changed["fc.weight"] + adapter_product(merged, "fc"), wanted, atol=2e-5)


def test_an_estimate_counts_the_base(base: Path, one: Path, two: Path) -> None:
    recipe = recipe_of(base, one, two)
    found = merging.estimate(
        recipe, merging.make_plan(recipe, device="cpu"), merging.Options(threads=1, digests=False)
    )
    size = sum(each.size for each in load_file(base / "model.safetensors").values())
    factors = sum(2 * sum(shape) for shape in SHAPES.values())
    assert found.num_parameters == size + factors
    assert found.read_bytes == 4 * (size + 2 * factors)
    assert found.write_bytes > 4 * found.num_parameters
    assert found.seconds > 0
