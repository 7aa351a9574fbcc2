"""The run files in examples/ are accepted, and show what their names say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from weft.common.codec import CodecKind
from weft.common.recipe import TaskKind
from weft.server.merge.rules import lora_space
from weft.server.merge.settings import LoraSpace, MergeRuleName
from weft.server.runfile import RunFile, dump_run_file, load_run_file, parse_run_file

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("classification", "fisher", "lora", "shards", "ties")


def example(name: str) -> RunFile:
    return load_run_file(EXAMPLES / f"{name}.toml")


def test_every_example_is_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.toml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_a_run_file_named_like_its_file(name: str) -> None:
    run_file = example(name)
    assert run_file.name == name
    assert parse_run_file(dump_run_file(run_file)) == run_file


@pytest.mark.parametrize("name", NAMES)
def test_an_example_needs_no_files_beside_it(name: str) -> None:
    run_file = example(name)
    assert not Path(run_file.base.source).is_absolute()
    assert run_file.base.source.count("/") == 1
    assert not run_file.gate.heldout


@pytest.mark.parametrize("name", NAMES)
def test_an_example_begins_with_what_it_shows(name: str) -> None:
    lines = (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert lines[1].startswith("# ")


def test_what_is_commented_out_would_be_accepted_too() -> None:
    text = (EXAMPLES / "lora.toml").read_text(encoding="utf-8")
    table: dict[str, Any] = tomllib.loads(text.replace("# [gate]", "[gate]").replace("# heldout", "heldout"))
    assert table["gate"] == {"heldout": "heldout.jsonl"}
    assert parse_run_file(text.replace("# [gate]", "[gate]").replace("# heldout", "heldout")).gate.heldout


def test_plain_lora_is_one_module_merged_exactly() -> None:
    run_file = example("lora")
    assert len(run_file.topology.modules) == 1
    assert lora_space(run_file.merge, run_file.outer) is LoraSpace.EXACT


def test_shards_train_one_of_two_modules_at_a_time() -> None:
    run_file = example("shards")
    assert len(run_file.topology.modules) == 2
    assert run_file.topology.levels_per_task == 1
    assert lora_space(run_file.merge, run_file.outer) is LoraSpace.FACTORS


def test_ties_trims_and_sends_signs() -> None:
    run_file = example("ties")
    assert run_file.merge.rule is MergeRuleName.TIES
    assert run_file.codec.kind is CodecKind.TERNARY


def test_fisher_asks_workers_for_the_diagonal() -> None:
    assert example("fisher").fisher_examples == 128


def test_classification_has_labels() -> None:
    task = example("classification").task
    assert (task.kind, task.num_labels) == (TaskKind.SEQUENCE_CLASSIFICATION, 2)
