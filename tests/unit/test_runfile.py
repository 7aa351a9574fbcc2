"""The run file: read as a whole, refused by name, written back exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.common.errors import RunFileError, UsageError
from weft.common.ids import Digest
from weft.common.modules import Kind
from weft.common.recipe import BasePin
from weft.common.settings import to_table
from weft.server.merge.settings import FisherParameters, MergeRuleName, TiesParameters
from weft.server.runfile import (
    RUN_FILE_BYTES_MAX,
    BaseSection,
    RunFile,
    RunSection,
    StatisticsSection,
    dump_run_file,
    load_run_file,
    parse_run_file,
    template,
)

HEAD = '[run]\nname = "alpha"\n[base]\nsource = "org/model"\n'
DEFAULT = RunFile(run=RunSection(name="alpha"), base=BaseSection(source="org/model"))
PIN = BasePin(digest=Digest("0" * 64))


def test_two_keys_make_a_run() -> None:
    run_file = parse_run_file(HEAD)
    assert run_file == DEFAULT
    assert run_file.name == "alpha"
    assert run_file.recipe(PIN).num_rounds == run_file.rounds.count


@pytest.mark.parametrize(
    ("more", "key", "hint"),
    [
        ("[round]\ncount = 3", "round", "did you mean rounds?"),
        ("[rounds]\ncuont = 3", "rounds.cuont", "rounds.count"),
        ("[topology.lora]\nrnk = 3", "topology.lora.rnk", "topology.lora.rank"),
        ("[merge]\ntie.density = 0.2", "merge.tie", "merge.ties"),
        ("[inner]\nlearning_rte = 1.0", "inner.learning_rte", "inner.learning_rate"),
        ("[gate]\nheld_out = 'x'", "gate.held_out", "gate.heldout"),
        ("[rounds]\ncount = 3.0", "rounds.count", ""),
        ("[rounds]\ncount = '3'", "rounds.count", ""),
        ("[rounds]\ncount = true", "rounds.count", ""),
        ("[rounds]\ncount = 0", "rounds.count", "10"),
        ("[rounds]\ncount = -1", "rounds.count", "10"),
        ("[rounds]\nquorum = 3\ntarget = 2", "rounds.target", "set rounds.target to 3"),
        ("[rounds]\nquorum = 0", "rounds.quorum", ""),
        ("[rounds]\nstraggler_factor = -1", "rounds.straggler_factor", "0.5"),
        ("[rounds]\nstraggler_factor = nan", "rounds.straggler_factor", "0.5"),
        ("[topology]\nexperts = [2]", "topology.experts", "weft route fit"),
        ("[topology]\nkind = 'full'\n[merge]\nlora = 'factors'", "merge.lora", "remove"),
        ("[topology]\noutside = 'trained'", "topology.outside", "full"),
        ("[topology]\nexperts = [2, 0]\nlayers = [1]", "topology.layers", ""),
        ("[topology]\nexperts = [1024, 1024]", "1048576 paths", "4096"),
        ("[task]\nprefix_tokens = 128", "task.prefix_tokens", "inner.sequence_length"),
        ("[rounds]\nbuffer = 4\nbackups = 1", "rounds.backups", "rounds.buffer = 0"),
        ("[rounds]\nbuffer = 4\n[merge]\nlora = 'exact'", "merge.lora", "factors"),
        ("[rounds]\npaths_quorum = 0.0", "rounds.paths_quorum", "0.8"),
        ("[rounds]\nstaleness_power = -1.0", "rounds.staleness_power", ""),
        ("[streaming]\nmixing = 0.5", "topology.levels_per_task", "levels_per_task = 1"),
        ("[streaming]\nmixing = 1.5", "streaming.mixing", ""),
        ("[paths]\nevaluate_every = 1", "paths.evaluate_every", "gate.heldout"),
        ("[paths]\nearly_stop = 2", "paths.early_stop", "evaluate_every"),
        ("[routing]\nmode = 'local'", "routing.router", "weft route fit"),
        ("[routing]\nrouter = 'r'", "routing.router", "routing.mode"),
        ("[routing]\nmode = 'given'\nrouter = 'r'", "routing.shards", "weft route shard"),
        ("[routing]\nmode = 'local'\nrouter = 'r'\nshards = 's'", "routing.shards", ""),
        ("[slow_uplink]\nbelow_mbit_s = 0.0\n[slow_uplink.codec]\nkind = 'bf16'", "slow_uplink", "20"),
        ("[topology]\nexperts = []", "topology.experts", ""),
        ("[topology]\nexperts = [0]", "topology.experts", ""),
        ("[topology]\nexperts = [1, 1]\nlevels_per_task = 3", "topology.levels_per_task", "0"),
        ("[topology.lora]\nrank = 0", "topology.lora.rank", ""),
        ("[topology.lora]\nalpha = inf", "topology.lora.alpha", ""),
        ("[topology.lora]\ntarget_modules = []", "topology.lora.target_modules", ""),
        ("[topology.lora]\ntarget_modules = 'q_proj'", "topology.lora.target_modules", ""),
        ("[statistics]\nfisher_examples = 8", "statistics.fisher_examples", 'merge.rule = "fisher"'),
        ("[merge]\nrule = 'fisher'\n[statistics]\nfisher_examples = 0", "statistics.fisher_examples", ""),
        ("[merge]\nrule = 'tis'", "merge.rule", "'ties'"),
        ("[merge]\nrule = 'mean'\n[merge.ties]\ndensity = 0.1", "merge.ties", "merge.rule"),
        ("[merge]\nrule = 'ties'\n[merge.fisher]\nfloor = 0.1", "merge.fisher", "merge.rule"),
        ("[merge]\nrule = 'ties'\nlora = 'exact'", "merge.lora", "factors"),
        ("[merge]\nlora = 'exact'\n[outer]\nname = 'nesterov'", "merge.lora", "sgd"),
        ("[merge]\nclip_multiple = 0", "merge.clip_multiple", ""),
        ("[merge]\nrule = 'ties'\n[merge.ties]\ndensity = 2", "merge.ties.density", ""),
        ("[outer]\nmomentum = 0.9", "outer.momentum", "nesterov"),
        ("[outer]\nlearning_rate = 0", "outer.learning_rate", ""),
        ("[outer]\nname = 'nesterov'\nmomentum = 1.0", "outer.momentum", ""),
        ("[codec]\nkind = 'int7'", "codec.kind", ""),
        ("[codec]\ndensity = 0.0", "codec.density", ""),
        ("[task]\nkind = 'sequence-classification'", "task.num_labels", ""),
        ("[task]\nnum_labels = 3", "task.num_labels", "sequence-classification"),
        ("[inner]\nsteps = 0", "inner.steps", "50"),
        ("[inner]\nbeta1 = 1.0", "inner.beta1", ""),
        ("[inner]\nseed = -1", "inner.seed", ""),
        ("[gate]\ntolerance = -1.0", "gate.tolerance", ""),
        ("[gate]\nnum_sequences_max = 1", "gate.num_sequences_max", ""),
    ],
)
def test_what_cannot_work_is_refused_by_the_key_that_is_wrong(more: str, key: str, hint: str) -> None:
    with pytest.raises(RunFileError) as refused:
        parse_run_file(HEAD + more)
    assert key in refused.value.message
    assert hint in refused.value.hint
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('[base]\nsource = "x"', "run"),
        ('[run]\nname = "alpha"', "base"),
        ("[run]\n[base]\nsource = 'x'", "run.name"),
        ("[run]\nname = 'a'\n[base]", "base.source"),
        ("[run]\nname = 'a'\n[base]\nsource = ' '", "base.source"),
        ("[run]\nname = 'Alpha'\n[base]\nsource = 'x'", "'Alpha'"),
        ("[run]\nname = 'a'\nidle_s = 0\n[base]\nsource = 'x'", "run.idle_s"),
        ("[run]\nname = 'a'\nidle_s = nan\n[base]\nsource = 'x'", "run.idle_s"),
        ("run = 5\n[base]\nsource = 'x'", "run"),
        ("[[run]]\nname = 'a'\n[base]\nsource = 'x'", "run"),
        ("", "run"),
        ("[run", "not TOML"),
        ("x = " + "9" * 5000, "not TOML"),
        ("x = " + "[" * 5000, "not TOML"),
        (HEAD + "[rounds]\ncount = " + "9" * 400, "rounds.count"),
        (HEAD + "[inner]\nlearning_rate = " + "9" * 400, "inner.learning_rate"),
        (HEAD + "[inner]\nlearning_rate = 1979-05-27", "inner.learning_rate"),
    ],
)
def test_what_is_no_run_is_refused(text: str, key: str) -> None:
    with pytest.raises(RunFileError, match=re.escape(key)):
        parse_run_file(text)


def test_a_template_is_the_defaults_with_every_key() -> None:
    text = template(name="alpha", source="org/model", digest="0" * 64)
    assert parse_run_file(text) == dataclasses.replace(
        DEFAULT, base=BaseSection(source="org/model", digest="0" * 64)
    )
    assert all(line.startswith(("#", "[")) or " = " in line or not line for line in text.splitlines())
    assert tomllib.loads(text) == {
        key: value for key, value in to_table(parse_run_file(text)).items() if key != "statistics"
    }


def test_a_templates_commented_tables_work_when_they_are_taken_in() -> None:
    text = template(name="alpha", source="org/model")
    for table, rule in (("merge.ties", "ties"), ("merge.fisher", "fisher"), ("statistics", "fisher")):
        start = text.index(f"# [{table}]")
        end = text.find("\n\n", start)
        lines = text[start : None if end < 0 else end].splitlines()
        taken = "\n".join(line.removeprefix("# ") for line in lines if re.match(r"# (\[|\w+ = )", line))
        run_file = parse_run_file(text.replace('rule = "mean"', f'rule = "{rule}"') + "\n" + taken)
        assert run_file.merge.rule is MergeRuleName(rule)
        assert run_file.merge.ties in (None, TiesParameters())
        assert run_file.merge.fisher in (None, FisherParameters())
        assert run_file.statistics in (None, StatisticsSection())


WHOLE = """
[run]
name = "all-of-it"
idle_s = 33.25
[base]
source = 'a "b" \\\\ c'
revision = "π"
[task]
kind = "sequence-classification"
num_labels = 3
[topology]
experts = [1, 1]
levels_per_task = 1
[topology.lora]
rank = 4
alpha = 1e-3
rslora = true
target_modules = ["q_proj"]
[inner]
learning_rate = 1e-9
schedule = "cosine"
[rounds]
count = 3
quorum = 2
target = 5
straggler_factor = 0.1
[merge]
rule = "fisher"
lora = "factors"
[merge.fisher]
floor = 0.123456789012345
[outer]
name = "nesterov"
learning_rate = 0.7
[codec]
kind = "ternary"
density = 0.07
[statistics]
fisher_examples = 8
[gate]
tolerance = 1e-05
"""


@pytest.mark.parametrize("text", [HEAD, WHOLE, template(name="alpha", source="x")])
def test_what_is_written_out_reads_back_the_same(text: str) -> None:
    run_file = parse_run_file(text)
    assert parse_run_file(dump_run_file(run_file)) == run_file
    assert dump_run_file(parse_run_file(dump_run_file(run_file))) == dump_run_file(run_file)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20), st.floats(5, 86400))
def test_any_text_and_number_is_written_out_as_it_is(text: str, idle_s: float) -> None:
    if not text.strip():
        return
    run_file = dataclasses.replace(
        DEFAULT, base=BaseSection(source=text, revision=text), run=RunSection(name="a", idle_s=idle_s)
    )
    assert parse_run_file(dump_run_file(run_file)) == run_file


SECTIONS = sorted(RunFile.__dataclass_fields__)
KEYS = sorted(
    {key for section in SECTIONS for key in to_table(parse_run_file(WHOLE)).get(section, {})}
    | {"lora", "ties", "other"}
)
SCALARS = (
    st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(
        ["ties", "fisher", "exact", "nesterov", "sgd", "lora", "full", "ternary", "", "/", "a\x00b"]
    )
    | st.text(max_size=5)
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=2)
    | st.dictionaries(st.sampled_from(KEYS), SCALARS | st.lists(SCALARS, max_size=2), max_size=2)
)


@settings(max_examples=300)
@given(
    st.dictionaries(
        st.sampled_from(SECTIONS), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3), max_size=3
    )
)
def test_a_changed_run_file_reads_or_is_refused(changes: dict[str, dict[str, Any]]) -> None:
    from weft.common.settings import from_table

    table = to_table(DEFAULT)
    for section, values in changes.items():
        table[section] = table.get(section, {}) | values
    with contextlib.suppress(UsageError):
        run_file = from_table(RunFile, table)
        assert parse_run_file(dump_run_file(run_file)) == run_file
        run_file.recipe(PIN)


@settings(max_examples=200)
@given(st.text(st.characters(codec="utf-8"), max_size=60) | st.binary(max_size=60))
def test_any_bytes_in_a_file_read_or_are_refused(
    tmp_path_factory: pytest.TempPathFactory, more: str | bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(HEAD.encode() + (more.encode() if isinstance(more, str) else more))
    with contextlib.suppress(UsageError):
        load_run_file(path)


# ---- files -----------------------------------------------------------------------------------------------------------


def write(directory: Path, text: str) -> Path:
    path = directory / "run.toml"
    path.write_text(text)
    return path


def test_relative_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "heldout.txt").write_text("x")
    text = '[run]\nname = "a"\n[base]\nsource = "model"\n[gate]\nheldout = "heldout.txt"'
    run_file = load_run_file(write(tmp_path, text))
    assert run_file.base.source == str(tmp_path / "model")
    assert run_file.gate.heldout == str(tmp_path / "heldout.txt")


def test_a_hub_id_stays_one(tmp_path: Path) -> None:
    assert load_run_file(write(tmp_path, HEAD)).base.source == "org/model"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "[gate]\nheldout = 'nothing.txt'", "gate.heldout: there is no"),
        (HEAD.replace("org/model", "./" + "x" * 5000), "cannot be a path"),
        (HEAD.replace("org/model", "./a\\u0000b"), "cannot be a path"),
        (HEAD + '[gate]\nheldout = "a\\u0000b"', "cannot be a path"),
        (HEAD + "[rounds]\ncount = 0", "rounds.count"),
    ],
)
def test_a_file_that_cannot_be_served_names_itself_and_the_cause(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RunFileError) as refused:
        load_run_file(path)
    assert str(path) in refused.value.message
    assert message in refused.value.message


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "latin1").write_bytes(b"# \xe9")
    (tmp_path / "large").write_bytes(b"#" * (RUN_FILE_BYTES_MAX + 1))
    for name, message in (
        ("missing", "No such file"),
        (".", "directory"),
        ("latin1", "UTF-8"),
        ("large", "larger"),
    ):
        with pytest.raises(RunFileError, match=message):
            load_run_file(tmp_path / name)


def test_the_recipe_is_what_the_file_says() -> None:
    run_file = parse_run_file(WHOLE)
    recipe = run_file.recipe(PIN)
    assert (recipe.run, recipe.num_rounds, recipe.idle_s, recipe.fisher.num_examples) == (
        "all-of-it",
        3,
        33.25,
        8,
    )
    assert recipe.topology.kind is Kind.LORA
    assert parse_run_file(HEAD).fisher_examples == 0
    assert parse_run_file(HEAD + "[merge]\nrule = 'fisher'").fisher_examples == 64
