from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_recipe, write_tiny_base

from weft.common import export
from weft.common.composition import ResidentBase, describe
from weft.common.errors import DiskFull, StorageError, UsageError
from weft.common.export import model_card, write_hf, write_peft
from weft.common.ids import ModuleKey
from weft.common.modules import LoraSettings
from weft.common.recipe import Recipe, TaskKind, TaskSettings
from weft.common.sequences import Batch

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
    resident = ResidentBase.load(base, recipe.task, device=CPU, dtype=torch.float32)
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
