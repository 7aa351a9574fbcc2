"""Layers taken from inputs of their own: tables of a recipe, and mergekit's passthrough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.handmade import (
    LAYER,
    adapter_product,
    block_tensors,
    merge_inputs,
    merge_recipe,
    write_adapter,
    write_model,
)

from weft.common.errors import RunFileError, UsageError
from weft.common.settings import from_table
from weft.server.offline.layers import LayersSpec, parse_blocks
from weft.server.offline.mergekit import load_mergekit
from weft.server.offline.recipe import LoraMode, merge_settings

SWAP = (
    {"blocks": "0, 3", "weights": {"german": 1.0}},
    {"blocks": "1", "weights": {"german": 1.0, "math": 3.0}},
    {"tensors": ["embed_tokens"], "weights": {}},
)


def tables(*layers: dict[str, Any]) -> tuple[LayersSpec, ...]:
    return tuple(from_table(LayersSpec, table) for table in layers)


def write_three(tmp_path: Path) -> tuple[dict[str, Any], list[Path]]:
    rng = np.random.default_rng(0)
    tensors = {name: block_tensors(rng, num_blocks=4) for name in ("base", "german", "math")}
    paths = [write_model(tmp_path / name, each) for name, each in tensors.items()]
    return tensors, paths


@pytest.mark.parametrize(
    ("text", "spans"),
    [("", ()), ("3", (range(3, 4),)), (" 0-3 , 28 - 31", (range(4), range(28, 32)))],
)
def test_blocks_are_read(text: str, spans: tuple[range, ...]) -> None:
    assert parse_blocks(text) == spans


@pytest.mark.parametrize("text", ["3-1", "a", "1,,2", "-3", "0-99999999"])
def test_what_names_no_blocks_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="names no blocks"):
        parse_blocks(text)


def test_a_table_is_about_its_blocks_and_names() -> None:
    spec = LayersSpec(blocks="1-2", tensors=("q_proj", "mlp"))
    assert spec.fits("model.layers.2.q_proj.weight")
    assert spec.fits("model.layers.1.mlp")
    assert not spec.fits("model.layers.1.k_proj.weight")
    assert not spec.fits("model.layers.3.q_proj.weight")
    assert not spec.fits("mlp_head.weight")


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "neither blocks nor tensors"),
        ({"blocks": "1", "weights": {"a": -1}}, "weight of a in layers is -1"),
        ({"blocks": "1", "weights": {"a": 0}}, "all weights"),
    ],
)
def test_a_table_without_sense_is_refused(table: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tables(table)


def test_swapped_layers_are_bit_for_bit_those_of_their_models(tmp_path: Path) -> None:
    tensors, (base, german, math) = write_three(tmp_path)
    merged = merge_inputs(tmp_path / "out", german, math, base=str(base), layers=tables(*SWAP))
    for block in (0, 3):
        np.testing.assert_array_equal(merged[LAYER.format(block)], tensors["german"][LAYER.format(block)])
    embedding = "model.embed_tokens.weight"
    np.testing.assert_array_equal(merged[embedding], tensors["base"][embedding])
    between, rest = LAYER.format(1), LAYER.format(2)
    wanted = 0.25 * tensors["german"][between] + 0.75 * tensors["math"][between]
    np.testing.assert_allclose(merged[between], wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        merged[rest], (tensors["german"][rest] + tensors["math"][rest]) / 2, rtol=1e-6, atol=1e-6
    )


def test_the_other_layers_follow_the_rule(tmp_path: Path) -> None:
    tensors, (base, german, math) = write_three(tmp_path)
    settings = merge_settings("sign_majority", {})
    options: dict[str, Any] = {"base": str(base), "merge": settings}
    plain = merge_inputs(tmp_path / "plain", german, math, **options)
    merged = merge_inputs(tmp_path / "out", german, math, layers=tables(SWAP[0]), **options)
    np.testing.assert_array_equal(merged[LAYER.format(1)], plain[LAYER.format(1)])
    np.testing.assert_array_equal(merged[LAYER.format(0)], tensors["german"][LAYER.format(0)])


@pytest.mark.parametrize(
    ("layers", "options", "said"),
    [
        ({"blocks": "4", "weights": {"math": 1}}, {}, "name block 4, and the models have 4"),
        ({"blocks": "1", "weights": {"maths": 1}}, {}, "weigh maths, which is no input"),
        ({"blocks": "1"}, {}, "no base to measure"),
        ({"blocks": "1"}, {"base": "base", "onto": "base"}, "onto adds movements"),
        (
            {"blocks": "1", "weights": {"math": 1}},
            {"base": "base", "merge": merge_settings("krum", {})},
            "krum weighs whole models",
        ),
    ],
)
def test_layers_that_do_not_fit_are_refused(
    tmp_path: Path, layers: dict[str, Any], options: dict[str, Any], said: str
) -> None:
    _, (_, german, math) = write_three(tmp_path)
    paths = {key: str(tmp_path / value) for key, value in options.items() if isinstance(value, str)}
    with pytest.raises(UsageError, match=said):
        merge_inputs(tmp_path / "out", german, math, layers=tables(layers), **options | paths)


@pytest.mark.parametrize("mode", [LoraMode.EXACT, LoraMode.DENSE, LoraMode.STACK])
def test_layers_of_adapters_keep_their_product(tmp_path: Path, mode: LoraMode) -> None:
    rng = np.random.default_rng(1)
    names = [f"model.layers.{block}.fc" for block in range(3)]
    factors = {
        label: {name: (rng.standard_normal((2, 8)), rng.standard_normal((6, 2))) for name in names}
        for label in ("german", "math")
    }
    paths = [write_adapter(tmp_path / label, pairs) for label, pairs in factors.items()]
    swap = tables({"blocks": "0", "weights": {"german": 1}}, {"blocks": "2", "weights": {}})
    merged = merge_inputs(tmp_path / "out", *paths, layers=swap, lora=mode)
    a_ri, b_or = factors["german"][names[0]]
    np.testing.assert_allclose(adapter_product(merged, names[0]), b_or @ a_ri, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(adapter_product(merged, names[2]), 0, atol=1e-7)


def test_factors_apart_cannot_be_swapped(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    pair = {"layers.0.fc": (rng.standard_normal((2, 8)), rng.standard_normal((6, 2)))}
    paths = [write_adapter(tmp_path / name, pair) for name in "ab"]
    with pytest.raises(UsageError, match="layers are taken one by one"):
        merge_inputs(
            tmp_path / "out",
            *paths,
            lora=LoraMode.FACTORS,
            layers=tables({"blocks": "0", "weights": {"a": 1}}),
        )


# -- mergekit's passthrough ----------------------------------------------------------------------------------


def write_yaml(to: Path, *slices: tuple[Path, int, int], extra: str = "") -> Path:
    lines = ["merge_method: passthrough", "slices:"]
    for path, start, stop in slices:
        lines += ["- sources:", f"  - model: {path}", f"    layer_range: [{start}, {stop}]"]
    to.write_text("\n".join([*lines, extra, ""]))
    return to


def test_passthrough_takes_layers_where_they_are(tmp_path: Path) -> None:
    tensors, (base, german, math) = write_three(tmp_path)
    slices = [(german, 0, 1), (math, 1, 3), (german, 3, 4)]
    recipe = load_mergekit(write_yaml(tmp_path / "swap.yml", *slices), resolve=Path)
    merged = merge_recipe(recipe, tmp_path / "out")
    from_math = {LAYER.format(1), LAYER.format(2)}
    for name, values in merged.items():
        source = "math" if name in from_math else "german"
        np.testing.assert_array_equal(values, tensors[source][name])
    assert base.exists()


def test_passthrough_takes_the_ends_from_the_first_and_the_last_slice(tmp_path: Path) -> None:
    tensors, (_, german, math) = write_three(tmp_path)
    recipe = load_mergekit(write_yaml(tmp_path / "swap.yml", (german, 0, 2), (math, 2, 4)), resolve=Path)
    merged = merge_recipe(recipe, tmp_path / "out")
    for name, source in (("model.embed_tokens.weight", "german"), ("lm_head.weight", "math")):
        np.testing.assert_array_equal(merged[name], tensors[source][name])


def test_passthrough_scales(tmp_path: Path) -> None:
    tensors, (_, german, math) = write_three(tmp_path)
    scale = "parameters: {scale: [{filter: layers.1., value: -2.0}, {value: 1.0}]}"
    file = write_yaml(tmp_path / "swap.yml", (german, 0, 2), (math, 2, 4), extra=scale)
    merged = merge_recipe(load_mergekit(file, resolve=Path), tmp_path / "out")
    np.testing.assert_array_equal(merged[LAYER.format(1)], -2 * tensors["german"][LAYER.format(1)])
    np.testing.assert_array_equal(merged[LAYER.format(2)], tensors["math"][LAYER.format(2)])


@pytest.mark.parametrize(
    ("slices", "extra", "said"),
    [
        ([("german", 0, 3), ("math", 1, 4)], "", "layers 1 to 4 of .*math would become 3 to 6"),
        ([("german", 0, 3)], "", "slices end at layer 3 and the models have 4"),
        ([("german", 1, 4)], "", "layers 1 to 4"),
        ([("german", 0, 0)], "", "no layer_range"),
        ([("german", 0, 4)], "parameters: {scale: [1.0, 2.0]}", "has a gradient"),
        ([("german", 0, 4)], "parameters: {weight: 1.0}", "parameter weight is not understood"),
    ],
)
def test_a_stack_of_another_shape_is_refused(
    tmp_path: Path, slices: list[tuple[str, int, int]], extra: str, said: str
) -> None:
    write_three(tmp_path)
    places = [(tmp_path / name, start, stop) for name, start, stop in slices]
    file = write_yaml(tmp_path / "swap.yml", *places, extra=extra)
    with pytest.raises(RunFileError, match=said):
        merge_recipe(load_mergekit(file, resolve=Path), tmp_path / "out")
