"""mergekit's YAML gives what mergekit gives: committed results, and live where WEFT_MERGEKIT names its Python."""

from __future__ import annotations

import copy
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml  # type: ignore[import-untyped,unused-ignore]
from tests.vectors.mergekit import make

from weft.common.errors import RunFileError, UsageError, WeftError
from weft.server.offline import merging
from weft.server.offline.inputs import open_checkpoint
from weft.server.offline.mergekit import METHODS, Place, evaluate, load_mergekit
from weft.server.offline.recipe import Recipe

VECTORS = Path(make.__file__).with_name("vectors.safetensors")
CASES: Mapping[str, Any] = yaml.safe_load(make.CASES.read_text())
EXACT = ("ties-equal", "passthrough")
"""Where both do the same operations in the same order."""
PINNED = ("task_arithmetic-bf16", "dare_linear-chance")
"""Where they differ, in the way that a test of its own says."""
ROUNDING = 1e-6
"""Four times the spacing of float32 at 3, about the largest in the vectors; models moved by 10⁴ times as much."""

Vectors = dict[str, make.Vector]


@pytest.fixture(scope="module", params=["committed", "live"])
def vectors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vectors:
    if request.param == "committed":
        return make.load(VECTORS)
    python = os.environ.get("WEFT_MERGEKIT")
    if not python:
        pytest.skip("WEFT_MERGEKIT names no interpreter that has mergekit")
    to = tmp_path_factory.mktemp("live") / "vectors.safetensors"
    subprocess.run([python, make.__file__, str(to)], check=True, capture_output=True, timeout=100)
    return make.load(to)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed ones."""
    models = tmp_path_factory.mktemp("models")
    make.write_models(models, make.load(VECTORS))
    return models


@pytest.fixture(scope="module")
def directory(vectors: Vectors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    make.write_models(directory, vectors)
    return directory


def understood(directory: Path, case: Mapping[str, Any], name: str = "case") -> Recipe:
    path = directory / f"{name}.yml"
    path.write_text(yaml.safe_dump(dict(case)))
    return load_mergekit(path, resolve=lambda text: directory / text)


def merged(directory: Path, case: Mapping[str, Any], to: Path) -> make.Vector:
    recipe = understood(directory, case, to.name)
    plan = merging.make_plan(recipe, device="cpu")
    merging.merge(recipe, plan, to, merging.Options(threads=1, digests=False), advance=lambda count: None)
    weights = open_checkpoint(to, "the result").weights
    tiles = (weights.tile(name, 0, int(np.prod(shape))).copy() for name, shape in make.SHAPES.items())
    return np.concatenate([*tiles])


def test_every_method_has_a_case() -> None:
    assert {case["merge_method"] for case in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("name", [name for name in CASES if name not in PINNED])
def test_result_is_that_of_mergekit(name: str, vectors: Vectors, directory: Path, tmp_path: Path) -> None:
    own, theirs = merged(directory, CASES[name], tmp_path / name), vectors[f"merged.{name}"]
    np.testing.assert_allclose(own, theirs, rtol=0, atol=0 if name in EXACT else ROUNDING)
    if name.startswith(("ties", "breadcrumbs")):  # what was dropped by all is the base's, to the bit
        assert np.array_equal(own == vectors["base"], theirs == vectors["base"])


def test_bfloat16_is_how_results_are_stored_and_not_how_they_are_computed(
    vectors: Vectors, directory: Path, tmp_path: Path
) -> None:
    case = CASES["task_arithmetic-bf16"]
    own, theirs = merged(directory, case, tmp_path / "own"), vectors["merged.task_arithmetic-bf16"]
    exact = merged(directory, {**case, "dtype": "float32"}, tmp_path / "exact")
    half_a_step = np.abs(exact) * 2.0**-8
    assert np.all(np.abs(own - exact) <= half_a_step)
    assert np.any(np.abs(theirs - exact) > half_a_step)  # they round every operand
    assert np.abs(theirs - exact).max() < 0.03


def test_what_chance_leaves_is_divided_by_the_chance_and_not_by_what_it_left(
    vectors: Vectors, directory: Path, tmp_path: Path
) -> None:
    moved = vectors["m0"].astype(np.float64) - vectors["base"]
    own = merged(directory, CASES["dare_linear-chance"], tmp_path / "own") - vectors["base"].astype(
        np.float64
    )
    kept = own != 0
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(own[kept], 2 * moved[kept], atol=1e-6)
    # mergekit makes each tensor as long as it was, in the sum of magnitudes: its factor is not 2 but near it.
    theirs = vectors["merged.dare_linear-chance"].astype(np.float64) - vectors["base"]
    for name, part in make.split(theirs.astype(np.float32)).items():
        size = np.abs(make.split(moved.astype(np.float32))[name]).sum()
        np.testing.assert_allclose(np.abs(part).sum(), size, rtol=1e-4)


def test_chance_is_the_same_every_time_and_another_for_each_input(models: Path, tmp_path: Path) -> None:
    parameters = {"density": 0.5, "weight": 1.0}
    case = {
        **CASES["dare_linear-chance"],
        "parameters": parameters,
        "models": [{"model": "m0"}, {"model": "m1"}],
    }
    one = merged(models, case, tmp_path / "one")
    assert np.array_equal(one, merged(models, case, tmp_path / "two"))
    base = merged(models, {**case, "parameters": {"density": 0.5, "weight": 0.0}}, tmp_path / "base")
    assert 0.65 < (one != base).mean() < 0.85  # 1 − ½ · ½: both masks were one, it would be ½


@pytest.mark.parametrize("method", ["dare_ties", "della", "della_linear"])
def test_methods_of_chance_drop_some_and_keep_the_mean(method: str, models: Path, tmp_path: Path) -> None:
    case = {**CASES[method], "parameters": {"weight": 0.5, "density": 0.7, "epsilon": 0.2}}
    case["models"] = [{"model": "m0"}, {"model": "m0"}] if method == "dare_ties" else [{"model": "m0"}]
    if method == "dare_ties":
        del case["parameters"]["epsilon"]
        case["models"][1] = {"model": "./m0"}
    own = merged(models, case, tmp_path / "own")
    base, m0 = (open_checkpoint(models / name, name).weights for name in ("base", "m0"))
    start = np.concatenate([base.tile(name, 0, int(np.prod(s))) for name, s in make.SHAPES.items()])
    end = np.concatenate([m0.tile(name, 0, int(np.prod(s))) for name, s in make.SHAPES.items()])
    moved, whole = (own - start).astype(np.float64), (end - start).astype(np.float64)
    assert 0.02 < (moved == 0).mean() < 0.4
    share = 1.0 if method != "della_linear" else 0.5
    assert moved @ whole / (whole @ whole) == pytest.approx(share, abs=0.15)


# ---- the language ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "tensor", "value"),
    [
        (0.5, "model.norm.weight", 0.5),
        ([0.0, 1.0], "model.layers.0.x", 0.0),
        ([0.0, 1.0], "model.layers.1.x", 0.25),
        ([0.0, 0.5, 1.0], "model.layers.3.x", 0.75),
        ([0.0, 1.0], "model.norm.weight", 0.0),
        ([], "model.layers.1.x", None),
        ([True, False], "model.layers.1.x", True),
        ({"filter": "mlp", "value": 2}, "model.layers.1.mlp.x", 2),
        ({"filter": "mlp", "value": 2}, "model.layers.1.attn.x", None),
        ([{"filter": "mlp", "value": [0, 4]}, {"value": 9}], "model.layers.1.mlp.x", 1),
        ([{"filter": "mlp", "value": [0, 4]}, {"value": 9}], "model.layers.1.attn.x", 9),
        ([{"filter": "*", "value": 7}, {"filter": "mlp", "value": 9}], "model.layers.1.mlp.x", 7),
    ],
)
def test_value_of_a_parameter(setting: Any, tensor: str, value: Any) -> None:
    assert evaluate(setting, Place(tensor, 5)) == value


def test_own_parameters_go_before_shared_ones(models: Path) -> None:
    case = {
        **CASES["ties"],
        "parameters": {"weight": 3.0, "density": 0.4},
        "models": [
            {"model": "m0", "parameters": {"weight": [{"filter": "mlp", "value": 5.0}]}},
            {"model": "m1"},
        ],
    }
    recipe = understood(models, case)
    assert recipe.choose("model.layers.0.mlp.x", 3).weights == (5.0, 3.0)
    assert recipe.choose("model.layers.0.attn.x", 3).weights == (3.0, 3.0)


LINEAR = CASES["linear"]
TIES = CASES["ties"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ({**LINEAR, "merge_method": "karcher"}, "merge_method karcher"),
        ({**LINEAR, "chat_template": "auto"}, "chat_template"),
        ({**LINEAR, "parameters": {"sparsity": 1}}, "sparsity"),
        ({**LINEAR, "tokenizer_source": "union"}, "tokenizer_source"),
        ({**LINEAR, "dtype": "int8"}, "dtype is int8"),
        ({**LINEAR, "base_model": "base"}, "none of its models"),
        ({**LINEAR, "models": [{"model": "m0"}]}, "m0 has no weight"),
        ({**LINEAR, "models": ["m0"]}, "is not a model"),
        (
            {**LINEAR, "models": [{"model": "m0+adapter", "parameters": {"weight": 1}}]},
            "not a model by itself",
        ),
        ({key: value for key, value in LINEAR.items() if key != "models"}, "either models or slices"),
        ({key: value for key, value in TIES.items() if key != "base_model"}, "ties needs base_model"),
        ({**TIES, "parameters": {"rescale": True}}, "rescale is True"),
        ({**TIES, "models": [{"model": "m0", "parameters": {"weight": -1, "density": 0.5}}]}, "negative"),
        ({**CASES["dare_linear"], "parameters": {"rescale": False, "weight": 1}}, "rescale is False"),
        ({**CASES["della"], "parameters": {"density": 0.9, "epsilon": 0.2}}, "no chances"),
        ({**CASES["model_stock"], "parameters": {"filter_wise": True}}, "filter_wise"),
        ({**CASES["model_stock"], "models": [{"model": "m0"}]}, "two models or more"),
        ({**CASES["slerp"], "parameters": {}}, "t of slerp is missing"),
        ({**CASES["slerp"], "models": [{"model": "m0"}, {"model": "m1"}]}, "slerp takes two"),
        ({**LINEAR, "models": []}, "nothing to merge"),
    ],
)
def test_what_differs_is_refused_by_name(case: Mapping[str, Any], said: str, models: Path) -> None:
    with pytest.raises((RunFileError, UsageError), match=said) as refused:
        merging.make_plan(understood(models, case), device="cpu")
    assert isinstance(refused.value, WeftError)


ODD: list[Any] = [
    None,
    5,
    "x",
    [],
    {},
    [1],
    {"a": 1},
    True,
    [["a"]],
    [{}],
    [{"filter": 3, "value": 1}],
    float("nan"),
]
PLACES: list[tuple[str, tuple[Any, ...]]] = [
    *(
        ("ties", place)
        for place in [("models",), ("models", 0), ("models", 0, "model"), ("models", 0, "parameters")]
    ),
    *(("ties", ("models", 0, "parameters", name)) for name in ("weight", "density")),
    *(("ties", place) for place in [("merge_method",), ("base_model",), ("dtype",), ("parameters",)]),
    *(
        ("slerp-slices", place)
        for place in [("slices",), ("slices", 0), ("slices", 0, "sources"), ("parameters", "t")]
    ),
    *(("slerp-slices", ("slices", 0, "sources", 0, key)) for key in ("model", "layer_range", "parameters")),
    *(
        ("passthrough", place)
        for place in [("slices", 0), ("slices", 0, "sources"), ("slices", 1, "sources", 0)]
    ),
]


@pytest.mark.parametrize(("name", "place"), PLACES)
def test_nonsense_is_refused_and_never_a_crash(name: str, place: tuple[Any, ...], models: Path) -> None:
    refused = 0
    for value in ODD:
        case = copy.deepcopy(CASES[name])
        inner = case
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
        try:
            merging.make_plan(understood(models, case), device="cpu")
        except WeftError:
            refused += 1
    assert refused > len(ODD) // 2


@pytest.mark.parametrize("stop", [2, 4])
def test_slices_of_another_depth_are_refused(stop: int, models: Path) -> None:
    for name in ("slerp-slices", "passthrough"):
        case = copy.deepcopy(CASES[name])
        for source in case["slices"][-1]["sources"]:
            source["layer_range"][1] = stop
        with pytest.raises(RunFileError, match=f"the slices end at layer {stop} and the models have 3"):
            merging.make_plan(understood(models, case), device="cpu")


@pytest.mark.parametrize("text", ["- a\n", "merge_method: [", "\xff"])
def test_a_file_that_is_no_merge(text: str, tmp_path: Path) -> None:
    (tmp_path / "merge.yml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RunFileError):
        load_mergekit(tmp_path / "merge.yml", resolve=Path)


def test_density_zero_adds_nothing(models: Path, tmp_path: Path) -> None:
    case = {
        **CASES["breadcrumbs"],
        "parameters": {"density": 0.0, "weight": 1.0},
        "models": [{"model": "m0"}],
    }
    assert np.array_equal(merged(models, case, tmp_path / "own"), make.load(VECTORS)["base"])
