from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import TEXT, tiny_recipe, write_tiny_base

from weft.common.composition import Composed, ResidentBase, describe
from weft.common.errors import BaseModelError, DataError, OutOfMemory, UsageError
from weft.common.evaluation import evaluate, load_heldout
from weft.common.ids import ModuleKey, run_id
from weft.common.initial import initial_tensors
from weft.common.modules import LoraSettings, Schema, Topology
from weft.common.recipe import Recipe, TaskKind, TaskSettings
from weft.common.sequences import Batch

CPU = torch.device("cpu")
LABELLED = TaskSettings(kind=TaskKind.SEQUENCE_CLASSIFICATION, num_labels=3)
BATCH = Batch(
    tokens=np.arange(24).reshape(2, 12) + 40,
    labels=np.arange(24).reshape(2, 12) + 41,
    lengths=np.array([12, 12]),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
def resident(base: Path) -> ResidentBase:
    return ResidentBase.load(base, TaskSettings(), device=CPU, dtype=torch.float32)


def random_tensors(base: Path, recipe: Recipe, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    schemas = describe(base, recipe)
    path = [schemas[ModuleKey(level, 0)] for level in range(len(recipe.topology.experts))]
    return {
        spec.name: rng.normal(0, 0.1, spec.shape).astype(np.float32)
        for schema in path
        for spec in schema.tensors
    }


def logits(composed: Composed) -> np.ndarray:
    with torch.inference_mode():
        return composed.logits(BATCH).numpy()


def plain_logits(base: Path) -> np.ndarray:
    model = ResidentBase.load(base, TaskSettings(), device=CPU, dtype=torch.float32).model
    with torch.inference_mode():
        found: np.ndarray = model(torch.from_numpy(BATCH.tokens)).logits.numpy()
    return found


# -- description -----------------------------------------------------------------------------------------------


def test_one_level_holds_the_adapters_of_all_layers(base: Path) -> None:
    (schema,) = describe(base, tiny_recipe(base)).values()
    assert len(schema.lora_pairs) == 4 * 7
    shapes = {spec.name: spec.shape for spec in schema.tensors}
    assert shapes["model.layers.0.self_attn.k_proj.lora_A.weight"] == (4, 32)
    assert shapes["model.layers.0.self_attn.k_proj.lora_B.weight"] == (16, 4)


def test_levels_split_the_layers_and_experts_share_a_schema(base: Path) -> None:
    recipe = replace(tiny_recipe(base), topology=Topology(experts=(1, 2, 1), layers=(2, 1, 1)))
    schemas = describe(base, recipe)
    assert [str(key) for key in schemas] == ["0.0", "1.0", "1.1", "2.0"]
    assert schemas[ModuleKey(1, 0)] == schemas[ModuleKey(1, 1)]
    layers = [
        sorted({int(spec.name.split(".")[2]) for spec in schemas[ModuleKey(level, 0)].tensors})
        for level in range(3)
    ]
    assert layers == [[0, 1], [2], [3]]


def test_a_classifier_head_belongs_to_the_last_level(base: Path) -> None:
    schemas = describe(base, tiny_recipe(base, task=LABELLED, experts=(1, 1)))
    heads = {key: [s for s in schema.tensors if "lora" not in s.name] for key, schema in schemas.items()}
    assert heads[ModuleKey(0, 0)] == []
    assert [(spec.name, spec.shape) for spec in heads[ModuleKey(1, 0)]] == [("score.weight", (3, 32))]


def test_an_untied_output_layer_belongs_to_the_last_level(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base", num_layers=2, tied=False)
    recipe = tiny_recipe(
        base, experts=(1, 1), lora=LoraSettings(rank=2, target_modules=("q_proj", "lm_head"))
    )
    schemas = describe(base, recipe)
    names = [spec.name for spec in schemas[ModuleKey(1, 0)].tensors]
    assert "lm_head.lora_A.weight" in names


@pytest.mark.parametrize(
    ("targets", "cause", "hint"),
    [
        (("q_prj",), "no linear layer of the base is called q_prj", "did you mean q_proj"),
        (("q_proj", "c_attn"), "no linear layer of the base is called c_attn", "the base has down_proj"),
        (("embed_tokens",), "no linear layer of the base is called embed_tokens", "the base has"),
        (("lm_head",), "lm_head shares its weights with the token embedding", "take lm_head out"),
    ],
)
def test_targets_that_cannot_carry_an_adapter(
    base: Path, targets: tuple[str, ...], cause: str, hint: str
) -> None:
    with pytest.raises(BaseModelError, match=cause) as caught:
        describe(base, tiny_recipe(base, lora=LoraSettings(target_modules=targets)))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("experts", "cause", "hint"),
    [
        ((1,) * 5, "5 levels, which do not divide the base's 4 layers", "at most 4 levels"),
        ((1,) * 3, "3 levels, which do not divide the base's 4 layers", "topology.layers = "),
    ],
    ids=["too-many", "uneven"],
)
def test_a_grid_that_does_not_divide_the_layers_is_refused(
    base: Path, experts: tuple[int, ...], cause: str, hint: str
) -> None:
    with pytest.raises(BaseModelError, match=cause) as caught:
        describe(base, tiny_recipe(base, experts=experts))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ('{"model_type": "whisper"}', "whisper models have no class for causal-lm|whisper"),
        ('{"model_type": "clip"}', "clip models have no class for causal-lm"),
        ('{"model_type": "no-such-model"}', "transformers cannot read"),
        ('{"hidden_size": 8}', "transformers cannot read"),
    ],
    ids=["speech", "vision", "unknown", "no-type"],
)
def test_unsupported_model_classes_say_which_work(
    base: Path, tmp_path: Path, config: str, cause: str
) -> None:
    recipe = tiny_recipe(base)
    if "whisper" in config:
        recipe = replace(recipe, task=LABELLED)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(BaseModelError, match=cause) as caught:
        describe(tmp_path, recipe)
    assert "AutoModelForCausalLM" in caught.value.hint


# -- version 0 -------------------------------------------------------------------------------------------------


def test_initial_tensors_change_nothing_and_are_equal_everywhere(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base)
    (schema,) = describe(base, recipe).values()
    tensors = initial_tensors(schema, seed=3)
    again = initial_tensors(Schema(schema.tensors[:2]), seed=3)
    first = schema.tensors[0].name
    np.testing.assert_array_equal(tensors[first], again[first])
    assert not np.array_equal(tensors[first], initial_tensors(schema, seed=4)[first])
    fan_in = schema.tensors[0].shape[1]
    assert np.abs(tensors[first]).max() <= 1 / np.sqrt(fan_in)
    assert tensors[first].std() == pytest.approx(1 / np.sqrt(3 * fan_in), rel=0.15)
    composed = logits(resident.compose(recipe, tensors))
    np.testing.assert_array_equal(composed, plain_logits(base))


def test_a_head_starts_small_and_its_bias_at_zero() -> None:
    from weft.common.modules import TensorSpec

    schema = Schema(
        (TensorSpec("classifier.bias", "F32", (3,)), TensorSpec("classifier.weight", "F32", (3, 64)))
    )
    tensors = initial_tensors(schema, seed=0)
    assert not tensors["classifier.bias"].any()
    assert tensors["classifier.weight"].std() == pytest.approx(0.02, rel=0.2)


# -- composing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_composing_adds_scaled_ba_to_the_weights(base: Path, resident: ResidentBase, rslora: bool) -> None:
    recipe = tiny_recipe(base, lora=LoraSettings(rank=4, alpha=8.0, rslora=rslora))
    tensors = random_tensors(base, recipe)
    composed = logits(resident.compose(recipe, tensors))
    plain = ResidentBase.load(base, TaskSettings(), device=CPU, dtype=torch.float32).model
    with torch.no_grad():
        for name in (name for name in tensors if name.endswith(".lora_A.weight")):
            layer = name.removesuffix(".lora_A.weight")
            change = recipe.topology.lora.scaling * tensors[f"{layer}.lora_B.weight"] @ tensors[name]
            plain.get_submodule(layer).weight += torch.from_numpy(change)
        expected = plain(torch.from_numpy(BATCH.tokens)).logits.numpy()
    np.testing.assert_allclose(composed, expected, atol=2e-5)


def test_runs_take_turns_on_one_resident_base(base: Path, resident: ResidentBase) -> None:
    narrow = tiny_recipe(base, lora=LoraSettings(rank=2, target_modules=("q_proj",)))
    wide = tiny_recipe(base, lora=LoraSettings(rank=8, alpha=4.0))
    weights = resident.model.get_input_embeddings().weight.data_ptr()
    seen = []
    for recipe in (narrow, wide, narrow, wide):
        composed = resident.compose(recipe, random_tensors(base, recipe))
        assert composed.parameters.keys() == random_tensors(base, recipe).keys()
        seen.append(logits(composed))
    np.testing.assert_array_equal(seen[0], seen[2])
    np.testing.assert_array_equal(seen[1], seen[3])
    assert not np.allclose(seen[0], seen[1])
    assert resident.model.get_input_embeddings().weight.data_ptr() == weights


def test_an_unfit_second_run_is_refused_and_the_first_goes_on(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base)
    before = logits(resident.compose(recipe, random_tensors(base, recipe)))
    unfit = tiny_recipe(base, lora=LoraSettings(target_modules=("base_layer",)))
    with pytest.raises(BaseModelError, match="base_layer"):
        resident.compose(unfit, {})
    np.testing.assert_array_equal(logits(resident.compose(recipe, random_tensors(base, recipe))), before)


def test_tensors_go_in_and_out_unchanged(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base, experts=(1, 1))
    tensors = random_tensors(base, recipe)
    found = resident.compose(recipe, tensors).tensors()
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        np.testing.assert_array_equal(found[name], array)


def test_only_the_modules_of_a_task_get_gradients(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base, experts=(1, 1))
    composed = resident.compose(recipe, random_tensors(base, recipe))
    key = ModuleKey(1, 0)
    assert composed.trainable([key])[key].keys() == {s.name for s in describe(base, recipe)[key].tensors}
    torch.autograd.backward(composed.losses(BATCH).sum())
    with_gradient = {name for name, p in resident.model.named_parameters() if p.grad is not None}
    assert all(".layers.2." in name or ".layers.3." in name for name in with_gradient)
    assert len(with_gradient) == 2 * 7 * 2


def test_wrong_tensors_are_refused(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base)
    tensors = random_tensors(base, recipe)
    name = next(iter(tensors))
    with pytest.raises(ValueError, match="1 tensors are missing or unknown"):
        resident.compose(recipe, {key: value for key, value in tensors.items() if key != name})
    with pytest.raises(ValueError, match="has shape"):
        resident.compose(recipe, {**tensors, name: tensors[name][:1]})
    with pytest.raises(ValueError, match="the base was loaded for"):
        resident.compose(replace(recipe, task=LABELLED), tensors)


def test_a_low_precision_base_keeps_its_adapters_in_float32(base: Path) -> None:
    resident = ResidentBase.load(base, TaskSettings(), device=CPU, dtype=torch.bfloat16)
    recipe = tiny_recipe(base)
    composed = resident.compose(recipe, random_tensors(base, recipe))
    assert resident.model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in composed.parameters.values()} == {torch.float32}
    composed.trainable([ModuleKey(0, 0)])
    losses = composed.losses(BATCH)
    torch.autograd.backward(losses.sum())
    assert losses.dtype == torch.float32
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in composed.parameters.values())


def test_classification_ignores_padding(base: Path) -> None:
    resident = ResidentBase.load(base, LABELLED, device=CPU, dtype=torch.float32)
    recipe = tiny_recipe(base, task=LABELLED)
    composed = resident.compose(recipe, random_tensors(base, recipe))
    short = Batch(tokens=np.array([[50, 51, 52]]), labels=np.array([1]), lengths=np.array([3]))
    padded = replace(short, tokens=np.array([[50, 51, 52, 0, 0]]))
    with torch.inference_mode():
        np.testing.assert_allclose(composed.logits(short), composed.logits(padded), atol=1e-6)
        assert composed.losses(short).shape == (1,)


def test_4bit_needs_cuda(base: Path) -> None:
    with pytest.raises(UsageError, match="4bit needs CUDA and the device is cpu"):
        ResidentBase.load(base, TaskSettings(), device=CPU, dtype=torch.float32, quantise="4bit")


def test_a_base_with_damaged_weights_is_refused(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base", num_layers=1)
    (base / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(BaseModelError, match="cannot load"):
        ResidentBase.load(base, TaskSettings(), device=CPU, dtype=torch.float32)


def test_a_base_that_lacks_weights_is_not_filled_up_at_random(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    base = write_tiny_base(tmp_path / "base", num_layers=1)
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseModelError, match=r"files lack model\.norm\.weight"):
        ResidentBase.load(base, TaskSettings(), device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    "text", ["CUDA out of memory. Tried", "DefaultCPUAllocator: can't allocate memory: you tried"]
)
def test_a_device_out_of_memory_is_told_apart_from_bugs(text: str) -> None:
    from weft.common.composition import memory_errors

    with pytest.raises(OutOfMemory, match="while training"), memory_errors("training"):
        raise RuntimeError(text)
    with pytest.raises(RuntimeError, match="shapes"), memory_errors("training"):
        raise RuntimeError("shapes cannot be multiplied")


# -- ranks, slots, features ------------------------------------------------------------------------------------


def at_rank(tensors: dict[str, np.ndarray], rank: int, *, padded: bool = False) -> dict[str, np.ndarray]:
    """The leading ``rank`` components of every pair of factors; the others zero or cut off."""
    cut = {}
    for name, array in tensors.items():
        kept = array.copy() if padded else array
        if name.endswith(".lora_A.weight"):
            kept = kept * (np.arange(len(kept)) < rank)[:, None] if padded else kept[:rank]
        elif name.endswith(".lora_B.weight"):
            kept = kept * (np.arange(kept.shape[1]) < rank) if padded else kept[:, :rank]
        cut[name] = kept.astype(np.float32)
    return cut


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_a_narrow_rank_means_what_the_whole_rank_with_zeros_means(
    base: Path, resident: ResidentBase, rank: int, rslora: bool
) -> None:
    recipe = tiny_recipe(base, lora=LoraSettings(rank=4, alpha=6.0, rslora=rslora))
    tensors = random_tensors(base, recipe)
    narrow = at_rank(tensors, rank)
    schema = next(iter(describe(base, recipe).values())).at_rank(rank)
    assert {spec.name: spec.shape for spec in schema.tensors} == {n: a.shape for n, a in narrow.items()}
    composed = resident.compose(recipe, narrow, rank=rank)
    assert {name: parameter.shape for name, parameter in composed.parameters.items()} == {
        name: array.shape for name, array in narrow.items()
    }
    expected = logits(resident.compose(recipe, at_rank(tensors, rank, padded=True)))
    np.testing.assert_allclose(
        logits(resident.compose(recipe, narrow, rank=rank)), expected, rtol=1e-5, atol=1e-5
    )


def test_slots_keep_their_paths_and_switch_without_loading(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base)
    left, right = random_tensors(base, recipe, seed=1), random_tensors(base, recipe, seed=2)
    seen = [
        logits(resident.compose(recipe, tensors, slot=slot))
        for slot, tensors in (("left", left), ("right", right))
    ]
    logits(resident.compose(recipe, random_tensors(base, recipe, seed=3)))
    held = {name: p.data_ptr() for name, p in resident.activate(recipe, "left").parameters.items()}
    np.testing.assert_array_equal(logits(resident.activate(recipe, "right")), seen[1])
    again = resident.activate(recipe, "left")
    np.testing.assert_array_equal(logits(again), seen[0])
    assert {name: p.data_ptr() for name, p in again.parameters.items()} == held


def test_a_slot_is_replaced_by_what_is_composed_into_it(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base)
    tensors = random_tensors(base, recipe)
    resident.compose(recipe, tensors, slot="path")
    other = replace(recipe, run=run_id("other"))
    resident.compose(other, at_rank(tensors, 2), slot="path", rank=2)
    with pytest.raises(ValueError, match="nothing of tiny was composed as 'path'"):
        resident.activate(recipe, "path")
    assert resident.activate(other, "path").tensors().keys() == tensors.keys()
    adapters = {n.split(".")[-2] for n, _ in resident.model.named_parameters() if "lora_A" in n}
    assert len(adapters) == 1


def test_dropped_slots_are_gone_and_others_stay(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base)
    for slot in ("one", "two"):
        resident.compose(recipe, random_tensors(base, recipe, seed=len(slot)), slot=slot)
    resident.drop("two")
    with pytest.raises(ValueError, match="nothing of tiny was composed as 'two'"):
        resident.activate(recipe, "two")
    one = logits(resident.activate(recipe, "one"))
    resident.drop("one")
    resident.drop("never there")
    assert not [name for name, _ in resident.model.named_parameters() if "lora" in name]
    again = resident.compose(recipe, random_tensors(base, recipe, seed=3), slot="one")
    np.testing.assert_array_equal(logits(again), one)


def test_a_path_that_is_no_longer_on_the_base_says_so(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base)
    first = resident.compose(recipe, random_tensors(base, recipe), slot="first")
    resident.compose(recipe, random_tensors(base, recipe), slot="second")
    for use in (lambda: first.logits(BATCH), first.tensors, lambda: first.trainable([ModuleKey(0, 0)])):
        with pytest.raises(ValueError, match="another path was put onto the base"):
            use()
    second = resident.activate(recipe, "second")
    resident.drop("second")
    with pytest.raises(ValueError, match="another path was put onto the base"):
        second.tensors()


def test_features_are_means_of_the_bare_bases_last_hidden_state(base: Path, resident: ResidentBase) -> None:
    recipe = tiny_recipe(base, experts=(1, 1))
    lengths = np.array([12, 5])
    with torch.inference_mode():
        hidden = resident.model.model(torch.from_numpy(BATCH.tokens)).last_hidden_state.numpy()
    expected = np.stack([hidden[row, :length].mean(0) for row, length in enumerate(lengths)])
    bare = resident.features(BATCH.tokens, lengths)
    assert bare.dtype == np.float32
    assert bare.shape == (2, 32)
    np.testing.assert_allclose(bare, expected, atol=1e-6)
    composed = resident.compose(recipe, random_tensors(base, recipe), slot="path")
    composed.trainable([ModuleKey(1, 0)])
    trained = {name: parameter.requires_grad for name, parameter in composed.parameters.items()}
    before = logits(composed)
    np.testing.assert_array_equal(resident.features(BATCH.tokens, lengths), bare)
    np.testing.assert_array_equal(logits(composed), before)
    assert {name: parameter.requires_grad for name, parameter in composed.parameters.items()} == trained
    resident.compose(recipe, random_tensors(base, recipe, seed=1))
    resident.activate(recipe, "path")
    resident.drop("path")
    np.testing.assert_array_equal(resident.features(BATCH.tokens, lengths), bare)


def test_features_do_not_depend_on_neighbours_or_padding(resident: ResidentBase) -> None:
    tokens = np.random.default_rng(0).integers(0, 300, (7, 32))
    lengths = np.array([32, 1, 17, 32, 5, 31, 2])
    together = resident.features(tokens, lengths)
    for row, length in enumerate(lengths):
        alone = resident.features(tokens[row : row + 1, :length], lengths[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


@pytest.mark.parametrize("lengths", [[12, 0], [12, 13]])
def test_features_need_tokens(resident: ResidentBase, lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="lengths are"):
        resident.features(BATCH.tokens, np.array(lengths))


# -- evaluation ------------------------------------------------------------------------------------------------


def test_evaluation_is_the_losses_of_plain_transformers(
    base: Path, resident: ResidentBase, tmp_path: Path
) -> None:
    (tmp_path / "heldout.txt").write_text(TEXT)
    recipe = tiny_recipe(base)
    composed = resident.compose(recipe, random_tensors(base, recipe))
    sequences = load_heldout(tmp_path / "heldout.txt", resident.tokenizer, recipe)
    found = evaluate(composed, sequences, batch_size=3)
    assert sequences.num_bytes.sum() == len(TEXT.encode())
    with torch.inference_mode():
        tokens = torch.from_numpy(sequences.tokens[:1].astype(np.int64))
        out = resident.model(tokens).logits.log_softmax(-1)[0]
    expected = -sum(float(out[i, label]) for i, label in enumerate(sequences.labels[0]))
    assert found.losses[0] == pytest.approx(expected, rel=1e-5)
    assert found.num_labels[0] == 16
    whole = evaluate(composed, sequences, batch_size=64)
    np.testing.assert_allclose(whole.losses, found.losses, rtol=1e-5)
    assert found.bits_per_byte == pytest.approx(found.losses.sum() / np.log(2) / len(TEXT))


def test_heldout_text_that_allows_no_interval_is_refused(
    base: Path, resident: ResidentBase, tmp_path: Path
) -> None:
    (tmp_path / "heldout.txt").write_text("over")
    with pytest.raises(DataError, match="at least 2 are needed"):
        load_heldout(tmp_path / "heldout.txt", resident.tokenizer, tiny_recipe(base))
