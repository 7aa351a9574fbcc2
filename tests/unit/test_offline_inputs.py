"""What ``weft merge`` reads: every dtype, every refusal before any work, and never more than a tile at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch
from tests.handmade import LAYER, adapter_product, block_tensors, merge_inputs, write_adapter, write_model

from weft.common.errors import (
    BaseModelError,
    ComputeError,
    InputError,
    RunFileError,
    TensorFileError,
    UsageError,
)
from weft.common.tensors import FOREIGN, float8_to_float32, read_header
from weft.server.merge.crew import can_fork
from weft.server.merge.selection import BLOCK_ELEMENTS
from weft.server.merge.settings import Clip
from weft.server.merge.tiles import WORKING_ELEMENTS
from weft.server.offline import merging
from weft.server.offline.inputs import block_of, open_adapter, open_checkpoint, split_label
from weft.server.offline.recipe import (
    Dtype,
    InputSpec,
    LoraMode,
    RecipeFile,
    load_recipe,
    merge_settings,
    parse_size,
    understand,
)
from weft.server.offline.sources import Weights

NAME = LAYER.format(0)
Array = npt.NDArray[Any]
TIES = merge_settings("ties", {})
CLIPPED = dataclasses.replace(merge_settings("mean", {}), clip=Clip.MEDIAN)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return write_model(tmp_path / "one", block_tensors(np.random.default_rng(1)))


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write_model(tmp_path / "two", block_tensors(np.random.default_rng(2)))


def change(model: Path, **tensors: Array | None) -> None:
    """Replace, add or (None) remove tensors of a model by name, dots written as ``__``."""
    held = load_file(model / "model.safetensors")
    for key, value in tensors.items():
        name = key.replace("__", ".")
        held.pop(name, None)
        if value is not None:
            held[name] = value
    save_file(held, model / "model.safetensors")


def configure(directory: Path, file: str = "config.json", **keys: Any) -> None:
    said = json.loads((directory / file).read_text())
    (directory / file).write_text(json.dumps(said | keys))


# ---- dtypes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"), [("F8_E4M3", torch.float8_e4m3fn), ("F8_E5M2", torch.float8_e5m2)]
)
def test_eight_bit_floats_are_those_of_torch(name: str, dtype: torch.dtype) -> None:
    bits = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(bits).view(dtype).float().numpy()
    np.testing.assert_array_equal(float8_to_float32(bits, name), wanted)


def test_eight_bit_floats_are_not_exchanged(tmp_path: Path) -> None:
    save_torch({"a": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors", FOREIGN).specs[0].dtype == "F8_E4M3"
    with pytest.raises(TensorFileError, match="a dtype that is not read here"):
        read_header(tmp_path / "a.safetensors")


def test_eight_bit_floats_are_merged_and_kept_as_bfloat16(one: Path, two: Path, tmp_path: Path) -> None:
    for model, dtype in ((one, torch.float8_e4m3fn), (two, torch.float8_e5m2)):
        tensors = load_torch(model / "model.safetensors")
        save_torch({key: each.to(dtype) for key, each in tensors.items()}, model / "model.safetensors")
        configure(model, dtype=str(dtype).removeprefix("torch."))
    merge = understand(RecipeFile(inputs=(InputSpec(path=str(one)), InputSpec(path=str(two)))), resolve=Path)
    plan = merging.make_plan(merge, device="cpu")
    assert any("eight-bit" in note for note in plan.notes)
    merging.merge(
        merge, plan, tmp_path / "out", merging.Options(threads=1, digests=True), advance=lambda _: None
    )
    merged, first, second = (load_torch(path / "model.safetensors") for path in (tmp_path / "out", one, two))
    assert torch.equal(merged[NAME], ((first[NAME].float() + second[NAME].float()) / 2).bfloat16())
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_eight_bit_floats_with_scales_are_refused(one: Path) -> None:
    tensors = load_torch(one / "model.safetensors")
    tensors[NAME] = tensors[NAME].to(torch.float8_e4m3fn)
    for scale in ("weight_scale", "weight_scale_inv", "input_scale"):
        path = one / "model.safetensors"
        save_torch({**tensors, NAME.replace("weight", scale): torch.ones(1)}, path)
        with pytest.raises(InputError, match=f"{scale}, which scales them"):
            open_checkpoint(one, "one")
    configure(one, quantization_config={"quant_method": "fp8"})
    with pytest.raises(BaseModelError, match="quantised"):
        open_checkpoint(one, "one")


@pytest.mark.parametrize("dtype", ["F64", "F16", "BF16"])
def test_other_floats(dtype: str, one: Path, two: Path, tmp_path: Path) -> None:
    kind = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    for model in (one, two):
        tensors = load_torch(model / "model.safetensors")
        save_torch({key: each.to(kind) for key, each in tensors.items()}, model / "model.safetensors")
    merge_inputs(tmp_path / "fp32", one, two, dtype=Dtype.FP32)
    recipe = understand(RecipeFile(inputs=(InputSpec(path=str(one)), InputSpec(path=str(two)))), resolve=Path)
    plan = merging.make_plan(recipe, device="cpu")
    merging.merge(
        recipe, plan, tmp_path / "out", merging.Options(threads=2, digests=False), advance=lambda _: None
    )
    first, second, full, kept = (
        load_torch(path / "model.safetensors")[NAME]
        for path in (one, two, tmp_path / "fp32", tmp_path / "out")
    )
    assert torch.equal(full, (first.float() + second.float()) / 2)
    assert torch.equal(kept, full.to(torch.float32 if dtype == "F64" else kind))


def test_whole_numbers_are_copied_if_they_are_the_same(one: Path, two: Path, tmp_path: Path) -> None:
    for model in (one, two):
        change(model, model__counts=np.arange(5), model__mask=np.array([True, False]))
    merged = merge_inputs(tmp_path / "out", one, two)
    np.testing.assert_array_equal(merged["model.counts"], np.arange(5))
    assert merged["model.counts"].dtype == np.int64
    change(two, model__counts=np.arange(5)[::-1].copy())
    with pytest.raises(InputError, match=r"different model\.counts, which is I64"):
        merge_inputs(tmp_path / "no", one, two)
    change(two, model__counts=np.arange(5.0))
    with pytest.raises(InputError, match=r"two holds model\.counts as F64 and one as I64"):
        merge_inputs(tmp_path / "no", one, two)


def test_buffers_that_models_make_themselves_are_left_out(one: Path, two: Path, tmp_path: Path) -> None:
    change(one, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(2, np.float32))
    assert not [name for name in merge_inputs(tmp_path / "out", one, two) if "inv_freq" in name]


# ---- what does not fit together ----------------------------------------------------------------------------------


Break = Callable[[Path, Path], object]
BROKEN: dict[str, tuple[Break, str]] = {
    "missing": (lambda _, two: change(two, lm_head__weight=None), "two lacks lm_head.weight, which one has"),
    "extra": (lambda _, two: change(two, odd=np.ones(2, np.float32)), "two has odd, which one lacks"),
    "shape": (
        lambda _, two: change(two, **{NAME.replace(".", "__"): np.ones((4, 4), np.float32)}),
        r"\[4, 4\]",
    ),
    "architecture": (lambda _, two: configure(two, model_type="mistral"), "model_type mistral"),
    "depth": (lambda _, two: configure(two, num_hidden_layers=4), "num_hidden_layers 4"),
    "tied": (lambda _, two: configure(two, tie_word_embeddings=True), "shares its output layer"),
    "no config": (lambda _, two: (two / "config.json").unlink(), "config.json"),
    "config": (lambda _, two: (two / "config.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda _, two: (two / "model.safetensors").unlink(), "safetensors"),
    "damaged": (lambda _, two: (two / "model.safetensors").write_bytes(b"\0" * 20), "."),
}


@pytest.mark.parametrize("how", BROKEN)
def test_models_that_do_not_fit_are_refused_before_any_work(
    how: str, one: Path, two: Path, tmp_path: Path
) -> None:
    breaking, said = BROKEN[how]
    breaking(one, two)
    with pytest.raises((InputError, BaseModelError, TensorFileError), match=said):
        merge_inputs(tmp_path / "out", one, two)
    assert not list(tmp_path.glob("out*"))


def test_a_tensor_in_two_files(one: Path) -> None:
    tensors = load_file(one / "model.safetensors")
    (one / "model.safetensors").unlink()
    for number in (1, 2):
        save_file(tensors, one / f"model-0000{number}-of-00002.safetensors")
    weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
    weight_map[NAME] = "model-00002-of-00002.safetensors"
    (one / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(TensorFileError, match="another file of the directory holds too"):
        open_checkpoint(one, "one")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(value: float, one: Path, two: Path, tmp_path: Path) -> None:
    bad = load_file(two / "model.safetensors")[NAME]
    bad[1, 2] = value
    change(two, **{NAME.replace(".", "__"): bad})
    with pytest.raises(TensorFileError, match=rf"two holds (NaN|infinity) in {NAME}, element 5"):
        merge_inputs(tmp_path / "ties", one, two, base=str(one), merge=TIES)
    with pytest.raises(TensorFileError, match=rf"two holds (NaN|infinity) in {NAME}, element 5"):
        merge_inputs(tmp_path / "mean", one, two)
    assert not (tmp_path / "mean").exists()


def test_options_for_adapters_are_not_for_models(one: Path, two: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lora and rank are for adapters"):
        merge_inputs(tmp_path / "out", one, two, rank=4)
    with pytest.raises(UsageError, match="is an adapter and one a whole model"):
        merge_inputs(tmp_path / "out", one, write_adapter(tmp_path / "adapter", factors()))


def test_another_tokenizer_is_noted(one: Path, two: Path) -> None:
    for model, word in ((one, "a"), (two, "b")):
        (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {word: 0}}}))
    recipe = understand(RecipeFile(inputs=(InputSpec(path=str(one)), InputSpec(path=str(two)))), resolve=Path)
    assert merging.make_plan(recipe, device="cpu").notes == (
        "two has another tokenizer than one, whose is kept",
    )


def test_a_large_piece_is_measured_by_a_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_SAMPLE_ELEMENTS", 1000)
    path = write_model(
        tmp_path / "big", block_tensors(np.random.default_rng(0), num_blocks=1, rows=100, cols=50)
    )
    recipe = understand(RecipeFile(inputs=(InputSpec(path=str(path)),)), resolve=Path)
    ticks = iter([0.0, 2.0])
    found = merging.estimate(
        recipe,
        merging.make_plan(recipe, device="cpu"),
        merging.Options(threads=1, digests=False),
        clock=lambda: next(ticks),
    )
    assert found.seconds == pytest.approx(2.0 * (100 * 50 + 2 * 5 * 50) / 1000)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[merge]\nlora = 'exact'", "merge.lora is for rounds"),
        ("merge = 3", "merge"),
        ("rank = -1", "rank is -1"),
        ("shard_size = 'large'", "is not a size"),
        ("odd = 1", "odd"),
        ("[[inputs]]\npath = 3", "path"),
        ("rank = ", "cannot read"),
    ],
)
def test_recipes_that_cannot_be_meant(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    with pytest.raises((RunFileError, UsageError), match=said):
        load_recipe(tmp_path / "recipe.toml")


def test_parameters_of_a_rule_that_has_none() -> None:
    with pytest.raises(UsageError, match="rule mean has no parameters: density"):
        merge_settings("mean", {"density": 1})
    with pytest.raises(RunFileError, match="densitty"):
        merge_settings("ties", {"densitty": 1})


def test_a_range_that_is_too_small_for_the_result(one: Path, two: Path, tmp_path: Path) -> None:
    change(two, **{NAME.replace(".", "__"): np.full((4, 3), 3e5, np.float32)})
    with pytest.raises(ComputeError, match="not finite as F16"):
        merge_inputs(tmp_path / "out", one, two, dtype=Dtype.FP16)


# ---- adapters ----------------------------------------------------------------------------------------------------


def factors(rank: int = 2, rows: int = 4, cols: int = 3) -> dict[str, tuple[Array, Array]]:
    rng = np.random.default_rng(rank)
    return {"model.layers.0.mlp": (rng.standard_normal((rank, cols)), rng.standard_normal((rows, rank)))}


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"layer_replication": [[0, 1]]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [1]},
        {"target_parameters": ["mlp.experts"]},
        {"trainable_token_indices": [1]},
        {"kasa_config": {"beta": 1}},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 1}},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"bias": "lora_only"},
        {"peft_type": "IA3"},
        {"r": 3},
        {"rank_pattern": {"mlp": 5}},
    ],
)
def test_adapters_that_are_something_else_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    write_adapter(tmp_path / "odd", factors(), **config)
    with pytest.raises(InputError, match=r"IA3|says|has |began as") as refused:
        open_adapter(tmp_path / "odd", "odd")
    assert refused.value.hint


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 6}, 3.0),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5),
        ({"lora_alpha": 6, "alpha_pattern": {"mlp": 8}}, 4.0),
        ({"lora_alpha": 6, "alpha_pattern": {"attn": 8}}, 3.0),
        ({"lora_alpha": 6, "r": 9, "rank_pattern": {r"layers\.0\.mlp": 2}}, 3.0),
        ({"lora_alpha": 6, "alpha_pattern": {r"model.layers.\d.mlp": 1, "mlp": 8}}, 0.5),
    ],
)
def test_scaling_of_a_layer(config: dict[str, Any], scaling: float, tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", factors(), **config)
    assert open_adapter(tmp_path / "a", "a").layers["model.layers.0.mlp"].scaling == pytest.approx(scaling)


def test_factors_that_do_not_belong_together(tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "a", factors()) / "adapter_model.safetensors"
    tensors = load_file(path)
    a, b = sorted(tensors)
    save_file({a: tensors[a]}, path)
    with pytest.raises(InputError, match="no B that fits"):
        open_adapter(tmp_path / "a", "a")
    save_file({a: tensors[a], b: np.ones((4, 5), np.float32)}, path)
    with pytest.raises(InputError, match="no B that fits"):
        open_adapter(tmp_path / "a", "a")
    save_file({"odd.weight": tensors[a]}, path)
    with pytest.raises(InputError, match="adapts no layer"):
        open_adapter(tmp_path / "a", "a")
    path.unlink()
    with pytest.raises(InputError, match="has no adapter_model"):
        open_adapter(tmp_path / "a", "a")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora": LoraMode.EXACT, "merge": TIES}, "not linear"),
        ({"lora": LoraMode.STACK, "merge": TIES}, "not linear"),
        ({"lora": LoraMode.STACK, "rank": 4}, "sum of the inputs"),
        ({"lora": LoraMode.FACTORS}, "different layers or ranks"),
        ({"lora": LoraMode.STACK, "merge": merge_settings("krum", {})}, "weighs by distances or norms"),
        ({"lora": LoraMode.STACK, "merge": CLIPPED}, "weighs by distances or norms"),
        ({"merge": CLIPPED, "rank": 1}, "at least the inputs' rank"),
        ({"lora": LoraMode.DENSE, "merge": merge_settings("krum", {})}, "weighs whole adapters"),
        ({"merge": merge_settings("krum", {}), "rank": 1}, "at least the inputs' rank"),
        ({"onto": "x", "base": "x"}, "onto is for models"),
    ],
)
def test_modes_and_rules_that_do_not_go_together(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", factors(2))
    two = write_adapter(tmp_path / "two", factors(3))
    write_model(tmp_path / "x", block_tensors(np.random.default_rng(0)))
    options = {key: str(tmp_path / value) if value == "x" else value for key, value in options.items()}
    with pytest.raises(UsageError, match=said):
        merge_inputs(tmp_path / "out", one, two, **options)


def test_layers_of_another_shape(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", factors(2))
    two = write_adapter(tmp_path / "two", factors(2, rows=5))
    with pytest.raises(InputError, match=r"as \[4, 3\] and two as \[5, 3\]"):
        merge_inputs(tmp_path / "out", one, two)


def add_heads(directory: Path, value: float, name: str = "base_model.model.lm_head.weight") -> Path:
    path = directory / "adapter_model.safetensors"
    save_file({**load_file(path), name: np.full((5, 3), value, np.float32)}, path)
    return directory


def test_modules_to_save_are_merged_as_movements_from_the_base(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", block_tensors(np.random.default_rng(0)))
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    one = add_heads(write_adapter(tmp_path / "one", factors(2)), 1.0)
    two = add_heads(write_adapter(tmp_path / "two", factors(3)), 3.0)
    name = "base_model.model.lm_head.weight"
    assert np.all(merge_inputs(tmp_path / "mean", one, two)[name] == 2)
    rule = merge_settings("task_arithmetic", {"scale": 1.0})
    with pytest.raises(UsageError, match=r"needs the base's"):
        merge_inputs(tmp_path / "no", one, two, merge=rule)
    merged = merge_inputs(tmp_path / "sum", one, two, merge=rule, base=str(base))[name]
    np.testing.assert_allclose(merged, head + (1 - head) + (3 - head), atol=1e-6)
    bare = write_adapter(tmp_path / "bare", factors(2))
    with pytest.raises(InputError, match=r"bare lacks base_model\.model\.lm_head\.weight"):
        merge_inputs(tmp_path / "no", one, bare)
    save_file(
        {**load_file(bare / "adapter_model.safetensors"), name: np.ones((5, 2), np.float32)},
        bare / "adapter_model.safetensors",
    )
    with pytest.raises(InputError, match=r"F32 \[5, 2\], unlike the others"):
        merge_inputs(tmp_path / "no", one, bare)


@pytest.mark.parametrize("rule", ["mean", "ties", "krum"])
def test_an_adapter_that_is_not_finite_is_named(rule: str, tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", factors(2))
    ((name, (a, b)),) = factors(2).items()
    b[1, 1] = np.nan
    two = write_adapter(tmp_path / "two", {name: (a, b)})
    with pytest.raises(TensorFileError, match=r"two holds NaN in .*lora_B\.weight, element 3"):
        merge_inputs(tmp_path / "out", one, two, merge=merge_settings(rule, {}))


def test_rules_by_distance_count_layers_that_an_adapter_lacks_as_zero(tmp_path: Path) -> None:
    layer, other = "model.layers.0.mlp", "model.layers.1.mlp"
    pair = factors(2)[layer]
    near = [write_adapter(tmp_path / f"near{n}", {layer: pair}) for n in range(3)]
    far = write_adapter(tmp_path / "far", {layer: pair, other: pair})
    merged = merge_inputs(tmp_path / "out", *near, far, merge=merge_settings("krum", {}))
    np.testing.assert_allclose(adapter_product(merged, layer), pair[1] @ pair[0], atol=1e-5)
    assert not adapter_product(merged, other).any()


def test_clipping_of_adapters_is_by_the_norm_of_their_product(tmp_path: Path) -> None:
    paths = [write_adapter(tmp_path / str(rank), factors(rank)) for rank in (1, 2, 3)]
    products = [
        adapter_product(merge_inputs(tmp_path / f"own{path.name}", path), NAME[:-7]) for path in paths
    ]
    norms = [float(np.linalg.norm(each)) for each in products]
    clipped = [each * min(1.0, np.median(norms) / norm) for each, norm in zip(products, norms, strict=True)]
    assert len(set(norms)) == 3
    merged = merge_inputs(tmp_path / "out", *paths, merge=CLIPPED)
    np.testing.assert_allclose(adapter_product(merged, NAME[:-7]), sum(clipped) / 3, atol=1e-5)


def test_factors_of_one_kind_of_layer_only(tmp_path: Path) -> None:
    one = write_adapter(tmp_path / "one", factors(2))
    two = write_adapter(tmp_path / "two", factors(2), fan_in_fan_out=True)
    with pytest.raises(InputError, match="differ in fan_in_fan_out"):
        merge_inputs(tmp_path / "out", one, two)


# ---- what was asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("./a", ("a", "./a", None)),
        ("dir/a/", ("a", "dir/a/", None)),
        ("./a:0.5", ("a", "./a", 0.5)),
        ("name=./a:2", ("name", "./a", 2.0)),
        ("org/model", ("model", "org/model", None)),
    ],
)
def test_name_directory_and_weight(text: str, wanted: tuple[str, str, float | None]) -> None:
    assert split_label(text) == wanted


def test_a_directory_that_looks_like_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a:0.5", "b=c"):
        (tmp_path / name).mkdir()
        assert split_label(name) == (name, name, None)
    for text in ("a:x", "a:nan", "a:inf"):
        with pytest.raises(UsageError, match="weight"):
            split_label(text)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (RecipeFile(), "nothing to merge"),
        (RecipeFile(inputs=(InputSpec(path="a"), InputSpec(path="x/a"))), "two inputs are called a"),
        (RecipeFile(inputs=(InputSpec(path="a", weight=-1.0),)), "weight of a is -1"),
        (RecipeFile(inputs=(InputSpec(path="a", weight=0.0),)), "all weights are 0"),
        (RecipeFile(inputs=(InputSpec(path="a"),), onto="b"), "onto needs the base"),
        (RecipeFile(inputs=(InputSpec(path="a"),), merge=merge_settings("fisher", {})), "needs a Fisher"),
        (RecipeFile(inputs=(InputSpec(path="a"),), merge=merge_settings("slerp", {})), "and there are 1"),
    ],
)
def test_what_cannot_be_meant(file: RecipeFile, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        understand(file, resolve=Path)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500M", 5 * 10**8), ("1.5 kb", 1500), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5XB", "0", "-1GB", "0.1"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("name", "block"),
    [("model.layers.12.mlp.x", 12), ("h.3.attn", 3), ("model.norm.weight", None), ("0.x", 0)],
)
def test_block_of_a_tensor(name: str, block: int | None) -> None:
    assert block_of(name) == block


# ---- memory, order -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["mean", "ties", "breadcrumbs", "dare", "median", "model_stock"])
def test_never_more_than_a_tile_of_an_input_is_read_at_once(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = 0
    tile = Weights.tile

    def counted(self: Weights, name: str, start: int, stop: int) -> Any:
        nonlocal longest
        longest = max(longest, stop - start)
        return tile(self, name, start, stop)

    monkeypatch.setattr(Weights, "tile", counted)
    rng = np.random.default_rng(0)
    shape = {"num_blocks": 1, "rows": 600, "cols": 1000}
    paths = [write_model(tmp_path / str(number), block_tensors(rng, **shape)) for number in range(5)]
    assert 4 * BLOCK_ELEMENTS < 600_000
    for count in (2, 4):
        longest = 0
        options = {"base": str(paths[0]), "merge": merge_settings(rule, {})}
        merge_inputs(tmp_path / f"out{count}", *paths[1 : 1 + count], **options)
        assert 0 < longest <= max(BLOCK_ELEMENTS, WORKING_ELEMENTS // count)


@pytest.mark.parametrize("forked", [True, False])
@pytest.mark.parametrize("rule", ["ties", "dare_ties", "krum", "tsv"])
def test_threads_and_processes_change_no_byte(
    rule: str, forked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some units are shared by all, some are handed out.
    monkeypatch.setattr(merging, "_SPLIT_ELEMENTS", 100_000)
    monkeypatch.setattr(merging, "can_fork", lambda: forked and can_fork())
    rng = np.random.default_rng(0)
    paths = [write_model(tmp_path / str(n), block_tensors(rng, rows=200, cols=700)) for n in range(4)]
    file = RecipeFile(
        inputs=tuple(InputSpec(path=str(path)) for path in paths[1:]),
        base=str(paths[0]),
        merge=merge_settings(rule, {}),
    )
    recipe = understand(file, resolve=Path)
    for threads in (1, 4):
        plan = merging.make_plan(recipe, device="cpu")
        options = merging.Options(threads=threads, digests=True)
        told: list[int] = []
        merging.merge(recipe, plan, tmp_path / f"out{threads}", options, advance=told.append)
        assert sum(told) == sum(spec.size * 4 for spec in plan.specs)
    for name in ("model.safetensors", "merge.json"):
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out4" / name).read_bytes()


def test_a_weight_of_zero_is_as_if_it_were_not_there(one: Path, two: Path, tmp_path: Path) -> None:
    inputs = (InputSpec(path=str(one)), InputSpec(path=str(two), weight=0.0))
    merged = merge_inputs(tmp_path / "alone", one)
    recipe = understand(RecipeFile(inputs=inputs), resolve=Path)
    plan = merging.make_plan(recipe, device="cpu")
    merging.merge(
        recipe, plan, tmp_path / "out", merging.Options(threads=1, digests=False), advance=lambda _: None
    )
    for name, values in load_file(tmp_path / "out/model.safetensors").items():
        np.testing.assert_array_equal(values, merged[name])
