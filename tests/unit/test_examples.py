"""The run files in examples/ are accepted, and show what their names say."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from tests.commandline import check_line

from weft.common.codec import CodecKind
from weft.common.errors import RunFileError
from weft.common.modules import Kind
from weft.common.recipe import RoutingMode, TaskKind
from weft.common.routing.router import NUM_PREFIX_TOKENS
from weft.server.merge.settings import LoraSpace, MergeRuleName
from weft.server.merge.spaces import lora_space
from weft.server.runfile import RunFile, dump_run_file, load_run_file, parse_run_file

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("classification", "fisher", "lora", "shards", "ties")
ROUTED = ("dipaco", "dipaco-lora")
"""Those that start from a router, which is fitted first: each in a directory of its own."""


def example(name: str) -> RunFile:
    return load_run_file(EXAMPLES / f"{name}.toml")


def routed(name: str) -> RunFile:
    return parse_run_file((EXAMPLES / name / "run.toml").read_text(encoding="utf-8"))


def test_every_example_is_tested() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.toml")) == sorted(NAMES)
    assert sorted(path.parent.name for path in EXAMPLES.glob("*/*.toml")) == sorted(ROUTED)


@pytest.mark.parametrize("name", ROUTED)
def test_a_routed_example_is_a_run_file_named_like_its_directory(name: str) -> None:
    run_file = routed(name)
    assert run_file.name == name
    assert parse_run_file(dump_run_file(run_file)) == run_file
    assert run_file.task.prefix_tokens == NUM_PREFIX_TOKENS


@pytest.mark.parametrize("name", ROUTED)
def test_commands_in_a_routed_example_would_be_accepted_and_make_its_files(name: str) -> None:
    text = (EXAMPLES / name / "run.toml").read_text(encoding="utf-8")
    lines = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   weft ")]
    made = {words[words.index("--to") + 1] for words in map(str.split, lines)}
    routing = routed(name).routing
    assert made == {routing.router, routing.shards} - {""}
    for line in lines:
        check_line(line.split()[1:])


@pytest.mark.parametrize("name", ROUTED)
def test_a_routed_example_says_what_is_missing(name: str, tmp_path: Path) -> None:
    copied = tmp_path / "run.toml"
    copied.write_text((EXAMPLES / name / "run.toml").read_text(encoding="utf-8"))
    with pytest.raises(RunFileError) as caught:
        load_run_file(copied)
    assert "router.weft" in caught.value.message
    assert "weft route fit" in caught.value.hint


def test_dipaco_is_16_paths_of_whole_blocks_over_given_shards() -> None:
    run_file = routed("dipaco")
    assert (run_file.topology.num_paths, run_file.topology.kind) == (16, Kind.FULL)
    assert run_file.routing.mode is RoutingMode.GIVEN
    # SmolLM2-135M has 30 blocks, which its levels have to divide, and those of the variant in the comment too.
    assert set(run_file.topology.level_of_blocks(30)) == {0, 1}
    text = (EXAMPLES / "dipaco" / "run.toml").read_text(encoding="utf-8")
    variant = parse_run_file(text.replace("experts = [4, 4] ", "experts = [4, 4, 0] ")).topology
    assert variant.num_paths == 16
    assert set(variant.level_of_blocks(30)) == {0, 1, 2}


def test_dipaco_of_lora_is_16_paths_over_local_data() -> None:
    run_file = routed("dipaco-lora")
    assert (run_file.topology.num_paths, run_file.topology.kind) == (16, Kind.LORA)
    assert run_file.routing.mode is RoutingMode.LOCAL
    assert run_file.rounds.steps_by_speed


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
