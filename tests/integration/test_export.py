from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_recipe, tiny_tokenizer, write_tiny_base

from weft.common import export
from weft.common.base import pin_base
from weft.common.composition import ResidentBase, describe
from weft.common.errors import BaseModelError, DiskFull, StorageError, UsageError
from weft.common.export import create_base, model_card, write_hf, write_peft
from weft.common.ids import ModuleKey
from weft.common.initial import initial_module
from weft.common.modules import Kind, LoraSettings, Outside, Topology
from weft.common.recipe import Recipe, TaskKind, TaskSettings
from weft.common.sequences import Batch
from weft.common.tensors import FOREIGN, TensorFile, read_header

CPU = torch.device("cpu")
LABELLED = TaskSettings(kind=TaskKind.SEQUENCE_CLASSIFICATION, num_labels=3)
TOKENS = np.arange(24).reshape(2, 12) + 40
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


def make_run(base: Path, task: TaskSettings) -> tuple[Recipe, Tensors]:
    recipe = tiny_recipe(base, task=task, experts=(1, 1), lora=LoraSettings(rank=4, alpha=6.0, rslora=True))
    rng = np.random.default_rng(0)
    schemas = describe(base, recipe)
    specs = [spec for level in (0, 1) for spec in schemas[ModuleKey(level, 0)].tensors]
    return recipe, {spec.name: rng.normal(0, 0.1, spec.shape).astype(np.float32) for spec in specs}


def composed_logits(base: Path, recipe: Recipe, tensors: Tensors) -> np.ndarray:
    resident = ResidentBase.load(
        base, recipe.task, device=CPU, dtype=torch.float32, kind=recipe.topology.kind
    )
    labels = TOKENS if recipe.task.kind is TaskKind.CAUSAL_LM else np.zeros(2, np.int64)
    batch = Batch(tokens=TOKENS, labels=labels, lengths=np.array([12, 12]))
    with torch.inference_mode():
        return resident.compose(recipe, tensors).logits(batch).numpy()


def load(directory: Path, task: TaskSettings) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if task.kind is TaskKind.CAUSAL_LM:
        return AutoModelForCausalLM.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=task.num_labels)
    model.config.pad_token_id = 0
    return model


def logits_of(model: Any) -> Any:
    with torch.inference_mode():
        return model.eval()(input_ids=torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("task", [TaskSettings(), LABELLED], ids=["causal", "classification"])
def test_peft_loads_the_adapter_with_equal_logits(base: Path, tmp_path: Path, task: TaskSettings) -> None:
    from peft import PeftModel

    recipe, tensors = make_run(base, task)
    write_peft(tmp_path / "adapter", recipe, tensors, card="# it", base_name="org/tiny")
    model = PeftModel.from_pretrained(load(base, task), tmp_path / "adapter")
    expected = composed_logits(base, recipe, tensors)
    np.testing.assert_allclose(logits_of(model), expected, atol=1e-5)
    assert not np.allclose(expected, logits_of(load(base, task)), atol=1e-2)


def test_the_adapter_holds_what_peft_writes_and_no_path_of_this_machine(base: Path, tmp_path: Path) -> None:
    recipe, tensors = make_run(base, TaskSettings())
    to = tmp_path / "new" / "adapter"
    write_peft(to, recipe, tensors, card="# it", base_name="org/tiny", extra_files={"weft.json": b"{}"})
    assert sorted(path.name for path in to.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "weft.json",
    ]
    config = json.loads((to / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert str(tmp_path) not in (to / "adapter_config.json").read_text()
    assert [path.name for path in to.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("task", [TaskSettings(), LABELLED], ids=["causal", "classification"])
def test_the_merged_model_has_equal_logits_and_its_tokenizer(
    base: Path, tmp_path: Path, task: TaskSettings
) -> None:
    from transformers import AutoTokenizer

    recipe, tensors = make_run(base, task)
    write_hf(tmp_path / "model", base, recipe, tensors, card="# it")
    expected = composed_logits(base, recipe, tensors)
    np.testing.assert_allclose(logits_of(load(tmp_path / "model", task)), expected, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("over").input_ids
    assert str(base) not in (tmp_path / "model" / "config.json").read_text()


def full(recipe: Recipe, outside: Outside) -> Recipe:
    return replace(recipe, topology=Topology(kind=Kind.FULL, experts=(2, 2), outside=outside))


def path_of(base: Path, recipe: Recipe, scale: float) -> Tensors:
    """Version 0 of path 1.0, moved at random."""
    schemas = describe(base, recipe)
    rng = np.random.default_rng(0)
    return {
        name: (array + rng.normal(0, scale, array.shape)).astype(np.float32)
        for key in (ModuleKey(0, 1), ModuleKey(1, 0))
        for name, array in initial_module(base, recipe, schemas, key).items()
    }


@pytest.mark.parametrize("task", [TaskSettings(), LABELLED], ids=["causal", "classification"])
@pytest.mark.parametrize("outside", list(Outside))
def test_a_path_of_full_modules_is_a_model_with_equal_logits(
    base: Path, tmp_path: Path, task: TaskSettings, outside: Outside
) -> None:
    from transformers import AutoTokenizer

    recipe = full(tiny_recipe(base, task=task), outside)
    tensors = path_of(base, recipe, 0.05)
    write_hf(tmp_path / "model", base, recipe, tensors, card="# it", extra_files={"weft.json": b"{}"})
    expected = composed_logits(base, recipe, tensors)
    np.testing.assert_allclose(logits_of(load(tmp_path / "model", task)), expected, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("over").input_ids
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "weft.json"} <= names
    assert not (tmp_path / "model" / "adapter_config.json").exists()


def test_a_full_path_is_stored_in_the_bases_own_dtype(base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(base).to(torch.bfloat16).save_pretrained(half)
    shutil.copyfile(base / "tokenizer.json", half / "tokenizer.json")
    shutil.copyfile(base / "tokenizer_config.json", half / "tokenizer_config.json")
    recipe = full(tiny_recipe(half), Outside.FROZEN)
    write_hf(tmp_path / "model", half, recipe, path_of(half, recipe, 0.0), card="# it")
    before, after = (
        TensorFile(directory / "model.safetensors", FOREIGN) for directory in (half, tmp_path / "model")
    )
    assert before.header.entries.keys() == after.header.entries.keys()
    for name, entry in after.header.entries.items():
        assert entry.spec.dtype == "BF16"
        np.testing.assert_array_equal(after.array(name), before.array(name))


def test_full_modules_are_no_adapter(base: Path, tmp_path: Path) -> None:
    recipe = full(tiny_recipe(base), Outside.FROZEN)
    with pytest.raises(UsageError, match="full weights, which a PEFT adapter cannot hold") as caught:
        write_peft(tmp_path / "adapter", recipe, path_of(base, recipe, 0.0), card="", base_name="b")
    assert "--as hf" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


# -- a base from a configuration -------------------------------------------------------------------------------


def write_source(to: Path, architecture: str = "llama", **options: Any) -> Path:
    """A configuration and a tokenizer, no weights."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 300}
    if architecture != "gpt2":
        sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    ends = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    AutoConfig.for_model(architecture, **sizes, **ends, **options).save_pretrained(to)
    tiny_tokenizer().save_pretrained(to)
    return to


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_is_made_from_a_configuration(tmp_path: Path, architecture: str, tied: bool) -> None:
    source = write_source(tmp_path / "source", architecture, tie_word_embeddings=tied, initializer_range=0.1)
    create_base(source, tmp_path / "base", seed=1)
    pin = pin_base(tmp_path / "base")
    assert {file.name for file in pin.files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    resident = ResidentBase.load(tmp_path / "base", TaskSettings(), device=CPU, dtype=torch.float32)
    parameters = dict(resident.model.named_parameters())
    embedding = resident.model.get_input_embeddings().weight
    assert float(embedding.std()) == pytest.approx(0.1, rel=0.05)
    assert float(embedding.mean()) == pytest.approx(0, abs=0.01)
    vectors = {name: set(p.flatten().tolist()) for name, p in parameters.items() if p.ndim == 1}
    ones = {0.0} if architecture == "gemma" else {1.0}  # Gemma's norms multiply by one plus their weight
    assert all(values == ({0.0} if name.endswith("bias") else ones) for name, values in vectors.items())


def test_equal_seeds_make_equal_bytes_whatever_torchs_generator(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    pins: list[str] = []
    with torch.random.fork_rng(devices=[]):
        for name, seed in (("one", 3), ("two", 3), ("three", 4)):
            before = torch.random.get_rng_state()
            create_base(source, tmp_path / name, seed=seed)
            assert torch.equal(torch.random.get_rng_state(), before)
            torch.manual_seed(len(pins))
            pins.append(pin_base(tmp_path / name).digest)
    assert pins[0] == pins[1] != pins[2]


def test_weights_are_stored_as_the_configuration_says(tmp_path: Path) -> None:
    create_base(write_source(tmp_path / "source", dtype="bfloat16"), tmp_path / "base", seed=0)
    header = read_header(tmp_path / "base" / "model.safetensors", FOREIGN)
    assert {spec.dtype for spec in header.specs} == {"BF16"}


def test_a_source_without_a_tokenizer_or_configuration_is_refused(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    (source / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(BaseModelError, match=r"config\.json"):
        create_base(source, tmp_path / "base", seed=0)
    (tmp_path / "bare").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "bare" / "config.json")
    with pytest.raises(BaseModelError, match="has no tokenizer"):
        create_base(tmp_path / "bare", tmp_path / "base", seed=0)
    assert not (tmp_path / "base").exists()


# -- what all of them share ------------------------------------------------------------------------------------


def test_a_place_that_is_taken_is_refused_and_untouched(base: Path, tmp_path: Path) -> None:
    recipe, tensors = make_run(base, TaskSettings())
    (tmp_path / "kept").write_text("mine")
    for to in (tmp_path, tmp_path / "kept"):
        with pytest.raises(UsageError, match="is not empty"):
            write_peft(to, recipe, tensors, card="", base_name="b")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    write_peft(tmp_path / "empty", recipe, tensors, card="", base_name="b")
    assert (tmp_path / "empty" / "README.md").exists()


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.ENOSPC, DiskFull), (errno.EACCES, StorageError), (None, KeyboardInterrupt)],
    ids=["disk-full", "no-permission", "interrupted"],
)
def test_a_pull_that_breaks_off_leaves_nothing(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int | None,
    error: type[BaseException],
) -> None:
    def break_off(to: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
        to.write_bytes(b"half")
        raise KeyboardInterrupt if code is None else OSError(code, "injected")

    monkeypatch.setattr(export, "write_tensors", break_off)
    recipe, tensors = make_run(base, TaskSettings())
    with pytest.raises(error):
        write_peft(tmp_path / "adapter", recipe, tensors, card="", base_name="b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../escape", "README.md", "a/b"])
def test_extra_files_have_free_plain_names(base: Path, tmp_path: Path, name: str) -> None:
    recipe, tensors = make_run(base, TaskSettings())
    with pytest.raises(ValueError, match="not a free plain file name"):
        write_peft(tmp_path / "a", recipe, tensors, card="", base_name="b", extra_files={name: b""})


def test_the_card_says_what_it_is_how_to_load_it_and_where_it_comes_from(base: Path) -> None:
    recipe, _ = make_run(base, LABELLED)
    card = model_card(title="tiny v3", recipe=recipe, base_name="org/tiny", lineage=["version 3 of 0.0"])
    assert card.startswith("---\nlibrary_name: peft\n")
    assert 'from_pretrained("org/tiny", num_labels=3)' in card
    assert f"`{recipe.base.digest}`" in card
    assert "- version 3 of 0.0" in card
    merged = model_card(title="t", recipe=recipe, base_name="b", lineage=[], is_adapter=False)
    assert "library_name: transformers" in merged
    assert "PeftModel" not in merged
