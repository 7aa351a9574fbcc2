"""Modules of kind full: the weights of transformer blocks, described, started, composed and exchanged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_recipe, tiny_tokenizer, write_tiny_base

from weft.common.composition import Composed, ResidentBase, describe
from weft.common.errors import BaseModelError, UsageError
from weft.common.ids import ModuleKey
from weft.common.initial import initial_module
from weft.common.modules import Kind, Outside, Topology
from weft.common.recipe import Recipe, TaskKind, TaskSettings
from weft.common.sequences import Batch

CPU = torch.device("cpu")
LABELLED = TaskSettings(kind=TaskKind.SEQUENCE_CLASSIFICATION, num_labels=3)
TOKENS = np.arange(24).reshape(2, 12) + 40
BATCH = Batch(tokens=TOKENS, labels=TOKENS + 1, lengths=np.array([12, 12]))
Tensors = dict[str, np.ndarray]
SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 300}


def full_recipe(base: Path, **topology: Any) -> Recipe:
    options = {"experts": (2, 2)} | topology
    return replace(tiny_recipe(base), topology=Topology(kind=Kind.FULL, **options))


def write_model(to: Path, architecture: str) -> Path:
    """A base of two blocks of another architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    options = dict(SMALL)
    if architecture == "opt":
        options |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
    elif architecture not in {"gpt2", "gpt_neox"}:
        options |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(architecture, bos_token_id=None, eos_token_id=0, pad_token_id=0, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoModelForCausalLM.from_config(config).save_pretrained(to)
    tiny_tokenizer().save_pretrained(to)
    return to


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def resident(base: Path) -> ResidentBase:
    return load(base)


def load(base: Path, task: TaskSettings | None = None, kind: Kind = Kind.FULL) -> ResidentBase:
    return ResidentBase.load(base, task or TaskSettings(), device=CPU, dtype=torch.float32, kind=kind)


def start(base: Path, recipe: Recipe, *experts: int) -> Tensors:
    """Version 0 of a path."""
    schemas = describe(base, recipe)
    tensors: Tensors = {}
    for level, expert in enumerate(experts or (0,) * len(recipe.topology.experts)):
        tensors |= initial_module(base, recipe, schemas, ModuleKey(level, expert))
    return tensors


def moved(tensors: Tensors, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        name: (array + rng.normal(0, 0.05, array.shape)).astype(np.float32) for name, array in tensors.items()
    }


def logits(composed: Composed) -> np.ndarray:
    with torch.inference_mode():
        return composed.logits(BATCH).numpy()


def plain_logits(base: Path) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(base).eval()
        found: np.ndarray = model(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
    return found


# -- description -----------------------------------------------------------------------------------------------


def test_a_module_is_the_blocks_of_its_level_by_their_names_in_the_model(base: Path) -> None:
    schemas = describe(base, full_recipe(base, experts=(2, 0), layers=(3, 1)))
    assert [str(key) for key in schemas] == ["0.0", "0.1", "1.0", "1.1"]
    blocks = [{spec.name.split(".")[2] for spec in schemas[ModuleKey(level, 1)].tensors} for level in (0, 1)]
    assert blocks == [{"0", "1", "2"}, {"3"}]
    shapes = {spec.name: spec.shape for spec in schemas[ModuleKey(1, 0)].tensors}
    assert len(shapes) == 9
    assert shapes["model.layers.3.self_attn.q_proj.weight"] == (32, 32)
    assert shapes["model.layers.3.input_layernorm.weight"] == (32,)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_embeddings_belong_to_the_first_level_and_the_rest_to_the_last(
    tmp_path: Path, tied: bool
) -> None:
    base = write_tiny_base(tmp_path / "base", num_layers=2, tied=tied)
    schemas = describe(base, full_recipe(base, outside=Outside.TRAINED))
    outside = [
        [spec.name for spec in schemas[ModuleKey(level, 0)].tensors if ".layers." not in spec.name]
        for level in (0, 1)
    ]
    head = [] if tied else ["lm_head.weight"]
    assert outside == [["model.embed_tokens.weight"], [*head, "model.norm.weight"]]


def test_a_new_head_belongs_to_the_last_level_whatever_is_frozen(base: Path) -> None:
    recipe = replace(full_recipe(base), task=LABELLED)
    schemas = describe(base, recipe)
    names = [{spec.name for spec in schemas[ModuleKey(level, 0)].tensors} for level in (0, 1)]
    assert "score.weight" in names[1] - names[0]
    tensors = start(base, recipe)
    assert tensors["score.weight"].std() == pytest.approx(0.02, rel=0.3)
    composed = load(base, LABELLED).compose(recipe, tensors)
    assert logits(composed).shape == (2, 3)


def test_a_grid_that_does_not_divide_the_layers_is_refused(base: Path) -> None:
    with pytest.raises(BaseModelError, match="3 levels, which do not divide the base's 4 layers"):
        describe(base, full_recipe(base, experts=(2, 2, 2)))


def test_a_model_without_one_list_of_blocks_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base", "gpt2")
    config = (base / "config.json").read_text()
    # An encoder beside a decoder of as many blocks.
    config = (
        '{"model_type": "bart", "encoder_layers": 2, "decoder_layers": 2, "d_model": 16, "vocab_size": 9}'
    )
    (base / "config.json").write_text(config)
    recipe = replace(full_recipe(base, experts=(1, 1)), task=LABELLED)
    with pytest.raises(BaseModelError, match="bart models have 2 lists of 2 transformer blocks") as caught:
        describe(base, recipe)
    assert "lora" in caught.value.hint


# -- version 0 and composing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("outside", list(Outside))
def test_version_0_is_the_base(tmp_path: Path, architecture: str, outside: Outside) -> None:
    base = write_model(tmp_path / "base", architecture)
    recipe = full_recipe(base, experts=(2, 3), outside=outside)
    composed = load(base).compose(recipe, start(base, recipe, 1, 2))
    np.testing.assert_array_equal(logits(composed), plain_logits(base))
    assert set(composed.levels.values()) == {0, 1}
    kept = [n for n in dict(composed.resident.model.named_parameters()) if n not in composed.parameters]
    assert bool(kept) == (outside is Outside.FROZEN)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_half_precision_starts_exactly_and_trains_in_float32(tmp_path: Path, stored: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    base = write_tiny_base(tmp_path / "base", num_layers=2)
    AutoModelForCausalLM.from_pretrained(base).to(stored).save_pretrained(base)
    recipe = full_recipe(base)
    resident = ResidentBase.load(base, TaskSettings(), device=CPU, dtype=torch.bfloat16, kind=Kind.FULL)
    before = {name: p.detach().clone() for name, p in resident.model.named_parameters()}
    composed = resident.compose(recipe, start(base, recipe))
    assert {parameter.dtype for parameter in resident.model.parameters()} == {torch.float32}
    for name, parameter in composed.parameters.items():
        assert torch.equal(parameter, before[name])
    key = ModuleKey(1, 0)
    composed.trainable([key])
    torch.autograd.backward(composed.losses(BATCH).sum())
    gradients = {name for name, p in resident.model.named_parameters() if p.grad is not None}
    assert gradients == {name for name, level in composed.levels.items() if level == key.level}
    assert composed.logits(BATCH).dtype == torch.bfloat16


def test_weights_saved_without_a_head_are_found_by_their_shorter_names(tmp_path: Path) -> None:
    from transformers import AutoModel

    base = write_tiny_base(tmp_path / "base", num_layers=2)
    expected = plain_logits(base)
    AutoModel.from_pretrained(base).save_pretrained(base)
    recipe = full_recipe(base, outside=Outside.TRAINED)
    np.testing.assert_allclose(logits(load(base).compose(recipe, start(base, recipe))), expected, atol=1e-6)


def test_weights_that_are_missing_or_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base = write_tiny_base(tmp_path / "base", num_layers=2)
    recipe = full_recipe(base)
    name, weights = "model.layers.1.mlp.up_proj.weight", load_file(base / "model.safetensors")
    save_file(weights | {name: weights[name].T.copy()}, base / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"up_proj\.weight as F32 \[32, 48\].*\[48, 32\]"):
        start(base, recipe)
    save_file(weights | {name: weights[name].astype(np.int32)}, base / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"up_proj\.weight as I32"):
        start(base, recipe)
    del weights[name]
    save_file(weights, base / "model.safetensors")
    with pytest.raises(BaseModelError, match=rf"do not hold {name}"):
        start(base, recipe)


def test_composing_puts_the_paths_weights_in(base: Path, resident: ResidentBase) -> None:
    from transformers import AutoModelForCausalLM

    recipe = full_recipe(base)
    tensors = moved(start(base, recipe), seed=1)
    composed = resident.compose(recipe, tensors)
    expected = AutoModelForCausalLM.from_pretrained(base).eval()
    state = expected.state_dict() | {name: torch.from_numpy(array) for name, array in tensors.items()}
    expected.load_state_dict(state)
    with torch.inference_mode():
        wanted = expected(torch.from_numpy(TOKENS), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(logits(composed), wanted)
    found = composed.tensors()
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_what_does_not_fit_is_refused(base: Path, resident: ResidentBase) -> None:
    recipe = full_recipe(base)
    tensors = start(base, recipe)
    name = next(iter(tensors))
    with pytest.raises(ValueError, match="1 tensors are missing or unknown"):
        resident.compose(recipe, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match="has shape"):
        resident.compose(recipe, {**tensors, name: tensors[name][:1]})
    with pytest.raises(ValueError, match="no rank"):
        resident.compose(recipe, tensors, rank=2)
    with pytest.raises(ValueError, match=r"loaded for .*full, not for .*lora"):
        resident.compose(tiny_recipe(base), tensors)
    with pytest.raises(UsageError, match="4bit stores weights that cannot be trained"):
        ResidentBase.load(
            base, TaskSettings(), device=CPU, dtype=torch.float32, kind=Kind.FULL, quantise="4bit"
        )


# -- slots and features ----------------------------------------------------------------------------------------


def test_runs_take_turns_and_leave_nothing_of_each_other(base: Path, resident: ResidentBase) -> None:
    whole, frozen = full_recipe(base, outside=Outside.TRAINED), full_recipe(base)
    alone = logits(load(base).compose(frozen, moved(start(base, frozen), seed=2)))
    resident.compose(whole, moved(start(base, whole), seed=1))
    after = logits(resident.compose(frozen, moved(start(base, frozen), seed=2)))
    np.testing.assert_array_equal(after, alone)


def test_slots_keep_their_paths_and_share_modules(base: Path, resident: ResidentBase) -> None:
    recipe = full_recipe(base)
    plain = start(base, recipe)
    left, right = moved(plain, seed=1), moved(plain, seed=2)
    # The first level is the same module, given as the same arrays.
    right |= {name: array for name, array in left.items() if int(name.split(".")[2]) < 2}
    seen = [logits(resident.compose(recipe, left, slot="left"))]
    seen.append(logits(resident.compose(recipe, right, slot="right")))
    resident.compose(recipe, plain)
    for slot, expected in (("left", seen[0]), ("right", seen[1]), ("left", seen[0]), ("left", seen[0])):
        np.testing.assert_array_equal(logits(resident.activate(recipe, slot)), expected)
    resident.drop("left")
    with pytest.raises(ValueError, match="nothing of tiny was composed as 'left'"):
        resident.activate(recipe, "left")
    np.testing.assert_array_equal(logits(resident.activate(recipe, "right")), seen[1])


def test_what_is_trained_in_a_slot_is_found_there_again(base: Path, resident: ResidentBase) -> None:
    recipe = full_recipe(base)
    tensors = start(base, recipe)
    before = {name: array.copy() for name, array in tensors.items()}
    composed = resident.compose(recipe, tensors, slot="trained")
    key = ModuleKey(1, 0)
    with torch.no_grad():
        for parameter in composed.trainable([key])[key].values():
            parameter.add_(0.1)
    composed.trainable([])
    trained = logits(composed)
    resident.compose(recipe, tensors, slot="start")
    np.testing.assert_array_equal(logits(resident.activate(recipe, "start")), plain_logits(base))
    np.testing.assert_array_equal(logits(resident.activate(recipe, "trained")), trained)
    assert all(np.array_equal(tensors[name], before[name]) for name in tensors)


def test_an_unnamed_path_keeps_nothing_of_what_it_was_given(base: Path, resident: ResidentBase) -> None:
    import gc
    import weakref

    recipe = full_recipe(base)
    tensors = start(base, recipe)
    given = [weakref.ref(array) for array in tensors.values()]
    resident.compose(recipe, tensors)
    del tensors
    gc.collect()
    assert not any(reference() is not None for reference in given)


@pytest.mark.parametrize("outside", list(Outside))
def test_features_are_those_of_the_base_whatever_is_composed(base: Path, outside: Outside) -> None:
    recipe = full_recipe(base, outside=outside)
    lengths = np.array([12, 7])
    resident = load(base)
    bare = resident.features(TOKENS, lengths)
    np.testing.assert_array_equal(bare, load(base, kind=Kind.LORA).features(TOKENS, lengths))
    composed = resident.compose(recipe, moved(start(base, recipe), seed=1), slot="path")
    before = logits(composed)
    for _ in range(2):
        np.testing.assert_array_equal(resident.features(TOKENS, lengths), bare)
    np.testing.assert_array_equal(logits(composed), before)
    resident.drop("path")
    np.testing.assert_array_equal(resident.features(TOKENS, lengths), bare)


def test_features_of_a_classifier_are_those_of_its_base_model(base: Path) -> None:
    recipe = replace(full_recipe(base), task=LABELLED)
    resident = load(base, LABELLED)
    resident.compose(recipe, moved(start(base, recipe), seed=1))
    lengths = np.array([12, 12])
    np.testing.assert_array_equal(
        resident.features(TOKENS, lengths), load(base, kind=Kind.LORA).features(TOKENS, lengths)
    )
