"""Flower's strategies as merge rules: Flower's own classes and Weft's own rules are the oracles."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp import strategy as strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.common.errors import EngineFailed, RunFileError, UsageError
from weft.common.modules import Schema, TensorSpec
from weft.common.settings import from_table, to_table
from weft.server.flower.limits import REFUSED, STRATEGIES, FlowerSettings
from weft.server.flower.rules import _reply as reply_of
from weft.server.flower.rules import merge_with_flower
from weft.server.merge.engine import MergeReport, OuterState, merge_module
from weft.server.merge.settings import Clip, LoraSpace, MergeRuleName, MergeSettings, RobustParameters
from weft.server.merge.tiles import Arrays, ArrayUpdate
from weft.server.outer import OuterName, OuterSettings, outer_schema, outer_step, slots_schema
from weft.server.runfile import dump_run_file, parse_run_file, template

Floats = npt.NDArray[Any]
SCHEMA = Schema(
    (
        TensorSpec("a", "F32", (3, 4)),
        TensorSpec("q.lora_A.weight", "F32", (2, 5)),
        TensorSpec("q.lora_B.weight", "F32", (4, 2)),
        TensorSpec("scalar", "F32", ()),
    )
)
UNCLIPPED = MergeSettings(clip=Clip.NONE, weight_multiple_max=1e9, lora=LoraSpace.FACTORS)
HEAD = '[run]\nname = "alpha"\n[base]\nsource = "org/model"\n'
CASES: dict[str, dict[str, float]] = {
    "FedAvg": {},
    "FedAvgM": {"server_learning_rate": 0.7, "server_momentum": 0.8},
    "FedAdagrad": {"eta": 0.3},
    "FedAdam": {"eta": 0.05, "beta_1": 0.8, "beta_2": 0.95, "tau": 0.01},
    "FedYogi": {"eta": 0.05},
    "FedMedian": {},
    "FedTrimmedAvg": {"beta": 0.3},
    "Krum": {"num_malicious_nodes": 2},
    "MultiKrum": {"num_malicious_nodes": 1, "num_nodes_to_select": 4},
    "Bulyan": {"num_malicious_nodes": 1},
}
COUNT = 7


def random_arrays(seed: int, scale: float = 1.0, schema: Schema = SCHEMA) -> Arrays:
    rng = np.random.default_rng(seed)
    return Arrays(
        {
            spec.name: np.asarray(scale * rng.standard_normal(spec.shape), np.float32)
            for spec in schema.tensors
        }
    )


def updates_of(seed: int, count: int = COUNT, scale: float = 0.1) -> list[ArrayUpdate]:
    return [
        ArrayUpdate(
            worker_id=f"w{index}", weight=1.0 + index % 3, deltas=random_arrays(100 * seed + index, scale)
        )
        for index in range(count)
    ]


def flower(name: str, **parameters: float) -> FlowerSettings:
    return FlowerSettings(strategy=name, parameters=parameters)


def merge(
    chosen: FlowerSettings,
    updates: Sequence[ArrayUpdate],
    start: Arrays,
    before: Arrays | None = None,
    *,
    settings: MergeSettings = UNCLIPPED,
    outer: OuterSettings | None = None,
) -> tuple[Arrays, Arrays | None, MergeReport]:
    """The next version, and what is kept for the round after."""
    outer = outer or OuterSettings()
    sink, num_slots = Arrays.zeros(SCHEMA), len(chosen.row.slots) + outer.num_slots
    after = Arrays.zeros(slots_schema(SCHEMA, num_slots)) if num_slots else None
    report = merge_with_flower(
        updates,
        start,
        SCHEMA,
        sink,
        flower=chosen,
        settings=settings,
        outer=outer,
        outer_state=OuterState(before=before, after=after) if after else None,
    )
    return sink, after, report


def by_weft(
    updates: Sequence[ArrayUpdate], start: Arrays, rule: MergeRuleName, parameters: Any = None
) -> Arrays:
    own = {} if parameters is None else {rule.value: parameters}
    chosen = MergeSettings(rule=rule, clip=Clip.NONE, weight_multiple_max=1e9, lora=LoraSpace.FACTORS, **own)
    sink = Arrays.zeros(SCHEMA)
    merge_module(updates, start, SCHEMA, sink, settings=chosen, outer=OuterSettings())
    return sink


def close(found: Arrays, expected: Arrays, atol: float = 2e-6) -> None:
    for name, values in expected.arrays.items():
        np.testing.assert_allclose(found.arrays[name], values, rtol=1e-4, atol=atol, err_msg=name)


class FlowersOwn:
    """A strategy as Flower's app uses it: one object for all rounds, whole arrays rather than movements."""

    def __init__(self, chosen: FlowerSettings, start: Arrays) -> None:
        self.strategy = getattr(strategies, chosen.strategy)(**chosen.arguments)
        self.arrays = start
        self.rounds = 0

    def round(self, updates: Sequence[ArrayUpdate]) -> Arrays:
        self.rounds += 1
        record = ArrayRecord({name: Array(values) for name, values in self.arrays.arrays.items()})
        if isinstance(self.strategy, strategies.FedAvgM):
            self.strategy.current_arrays = self.strategy.current_arrays or record
        elif hasattr(self.strategy, "current_arrays"):
            self.strategy.current_arrays = {name: array.numpy() for name, array in record.items()}
        replies = [
            reply_of(
                index,
                {
                    name: np.asarray(values + each.deltas.arrays[name])
                    for name, values in self.arrays.arrays.items()
                },
                each.weight,
            )
            for index, each in enumerate(updates)
        ]
        gc.freeze()  # Bulyan collects garbage for every reply
        merged, _ = self.strategy.aggregate_train(self.rounds, replies)
        gc.unfreeze()
        self.arrays = Arrays({name: np.asarray(array.numpy(), np.float32) for name, array in merged.items()})
        return self.arrays


# ---- the table ---------------------------------------------------------------------------------------------------


def test_every_class_of_flower_s_is_taken_or_refused() -> None:
    known = set(STRATEGIES) | set(REFUSED)
    assert set(strategies.__all__) - {"Result", "Strategy"} <= known
    assert set(CASES) == set(STRATEGIES)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_parameters_and_defaults_are_those_of_the_class(name: str) -> None:
    taken = inspect.signature(getattr(strategies, name)).parameters
    meaningless = {*inspect.signature(strategies.FedAvg).parameters, "eta_l", "selection_rule"}
    rows = STRATEGIES[name].parameters
    assert set(taken) - meaningless == set(rows)
    for key, row in rows.items():
        assert taken[key].default == row.default
        assert type(taken[key].default) is type(row.default)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_slots_are_all_that_a_strategy_remembers(name: str) -> None:
    made = getattr(strategies, name)()
    empty = {key for key, value in vars(made).items() if value is None}
    # Adagrad's first moment has no decay: it is the last movement, and nothing is read from it.
    unused = {"m_t"} if name == "FedAdagrad" else set()
    assert empty - {"current_arrays"} - unused == set(STRATEGIES[name].slots)


def test_the_page_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "docs" / "flower-strategies.md").read_text(encoding="utf-8")
    found = {}
    for line in re.findall(r"^\| `(?:Fed|Krum|Multi|Bulyan)\w*` \|.*$", text, re.MULTILINE):
        name, parameters, kept, memory, _ = (cell.strip() for cell in line.strip("|").split("|"))
        defaults = dict(re.findall(r"`(\w+)` ([\d.]+)", parameters))
        found[name.strip("`")] = (defaults, tuple(re.findall(r"`(\w+)`", kept)), memory)
    assert found == {
        name: ({key: str(each.default) for key, each in row.parameters.items()}, row.slots, row.memory)
        for name, row in STRATEGIES.items()
    }
    assert all(name.split("Privacy")[0] in text for name in REFUSED if "SecAgg" not in name)
    assert "SecAgg+" in text


# ---- against Flower's own classes --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
def test_three_rounds_with_restarts_are_flower_s_own(name: str) -> None:
    chosen, start = flower(name, **CASES[name]), random_arrays(1)
    own, state = FlowersOwn(chosen, start), None
    for number in range(3):
        start, state, report = merge(chosen, updates_of(number + 2), start, state)
        close(start, own.round(updates_of(number + 2)), atol=2e-5)
    assert report.rule == f"flower:{name}"
    assert [each.worker_id for each in report.contributions] == [f"w{index}" for index in range(COUNT)]


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdagrad", "FedAdam", "FedYogi"])
def test_a_restart_changes_no_bit(name: str) -> None:
    """What is kept, as float32 files hold it, is what one object for all rounds would have gone on with."""
    chosen, zeros = flower(name, **CASES[name]), Arrays.zeros(SCHEMA)
    own, state = FlowersOwn(chosen, zeros), None
    for number in range(3):
        own.arrays = zeros  # Every round starts at 0, so that movements and arrays are the same bits.
        if isinstance(own.strategy, strategies.FedAvgM):
            own.strategy.current_arrays = None
        equal = [
            ArrayUpdate(worker_id=each.worker_id, deltas=each.deltas) for each in updates_of(number + 2, 4)
        ]
        found, state, _ = merge(chosen, equal, zeros, state)
        expected = own.round(equal)
        for spec in SCHEMA.tensors:
            np.testing.assert_array_equal(found.arrays[spec.name], expected.arrays[spec.name])


# ---- against Weft's rules ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "rule", "parameters"),
    [
        (flower("FedAvg"), MergeRuleName.MEAN, None),
        (flower("FedMedian"), MergeRuleName.MEDIAN, None),
        (flower("FedTrimmedAvg", beta=0.3), MergeRuleName.TRIMMED_MEAN, RobustParameters(share=0.3)),
        (flower("Krum", num_malicious_nodes=2), MergeRuleName.KRUM, RobustParameters(share=0.3)),
        (
            flower("MultiKrum", num_malicious_nodes=2, num_nodes_to_select=5),
            MergeRuleName.MULTI_KRUM,
            RobustParameters(share=0.3),
        ),
        (flower("Bulyan"), MergeRuleName.BULYAN, RobustParameters(share=0.0)),
    ],
    ids=["FedAvg", "FedMedian", "FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan"],
)
def test_where_definitions_coincide_results_do(
    chosen: FlowerSettings, rule: MergeRuleName, parameters: Any
) -> None:
    start, updates = random_arrays(1), updates_of(3)
    close(merge(chosen, updates, start)[0], by_weft(updates, start, rule, parameters))


def test_bulyan_of_flower_s_picks_by_the_first_scores() -> None:
    """The paper runs Krum again without each one that it picked; Flower takes the best of the first ranking."""
    differing = 0
    for seed in range(3, 13):
        start, updates = random_arrays(1), updates_of(seed, 11)
        found = merge(flower("Bulyan", num_malicious_nodes=2), updates, start)[0]
        paper = by_weft(updates, start, MergeRuleName.BULYAN, RobustParameters(share=0.2))
        differing += any(
            not np.allclose(found.arrays[name], values, atol=1e-6) for name, values in paper.arrays.items()
        )
    assert differing > 0


def steps(chosen: FlowerSettings, num_rounds: int) -> tuple[list[Floats], list[Floats]]:
    """The step of each round on tensor "a", and the mean movement of that round."""
    state, taken, means = None, [], []
    for number in range(num_rounds):
        updates = updates_of(number + 2)
        found, state, _ = merge(chosen, updates, Arrays.zeros(SCHEMA), state)
        taken.append(found.arrays["a"].reshape(-1).astype(np.float64))
        weights = [each.weight for each in updates]
        rows = [each.deltas.arrays["a"].reshape(-1) for each in updates]
        means.append(np.average(rows, axis=0, weights=weights))
    return taken, means


def test_yogi_is_weft_s_with_a_second_moment_that_starts_at_zero() -> None:
    taken, means = steps(flower("FedYogi", eta=0.05), 4)
    ours, slots = OuterSettings(name=OuterName.FEDYOGI, learning_rate=0.05), np.zeros((2, 12))
    for step, mean in zip(taken, means, strict=True):
        expected, slots = outer_step(mean, slots, ours)
        np.testing.assert_allclose(step, expected, rtol=1e-4, atol=1e-6)


def test_adam_is_weft_s_with_bias_correction_a_round_ahead() -> None:
    taken, means = steps(flower("FedAdam", eta=0.05), 4)
    slots = np.zeros((2, 12))
    for number, (step, mean) in enumerate(zip(taken, means, strict=True), 1):
        rate = 0.05 * np.sqrt(1 - 0.99 ** (number + 1)) / (1 - 0.9 ** (number + 1))
        ours = OuterSettings(name=OuterName.FEDADAM, learning_rate=float(rate))
        expected, slots = outer_step(mean, slots, ours)
        np.testing.assert_allclose(step, expected, rtol=1e-4, atol=1e-6)


def test_adagrad_divides_by_the_root_of_all_squares() -> None:
    taken, means = steps(flower("FedAdagrad", eta=0.3), 3)
    total = np.zeros(12)
    for step, mean in zip(taken, means, strict=True):
        total += mean**2
        np.testing.assert_allclose(step, 0.3 * mean / (np.sqrt(total) + 1e-3), rtol=1e-4, atol=1e-6)


def test_momentum_is_the_heavy_ball() -> None:
    """m ← μ m + d, step η m: ``torch.optim.SGD(nesterov=False)`` on −d."""
    taken, means = steps(flower("FedAvgM", server_learning_rate=0.7, server_momentum=0.8), 4)
    momentum = np.zeros(12)
    for step, mean in zip(taken, means, strict=True):
        momentum = 0.8 * momentum + mean
        np.testing.assert_allclose(step, 0.7 * momentum, rtol=1e-4, atol=1e-6)


def test_without_momentum_and_with_rate_1_nothing_is_remembered() -> None:
    found, state, _ = merge(flower("FedAvgM"), updates_of(2), random_arrays(1))
    close(found, by_weft(updates_of(2), random_arrays(1), MergeRuleName.MEAN))
    assert state is not None
    assert not any(values.any() for name, values in state.arrays.items() if name != "step")


# ---- in a round --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(CASES))
@settings(max_examples=5)
@given(order=st.permutations(range(COUNT)))
def test_the_order_of_arrival_changes_no_bit(name: str, order: list[int]) -> None:
    updates, start = updates_of(3), random_arrays(1)
    expected = merge(flower(name, **CASES[name]), updates, start)[0]
    found = merge(flower(name, **CASES[name]), [updates[index] for index in order], start)[0]
    for key, values in expected.arrays.items():
        np.testing.assert_array_equal(found.arrays[key], values)


def test_updates_are_clipped_first() -> None:
    updates = updates_of(3)
    loud = [*updates[:-1], ArrayUpdate(worker_id="w6", deltas=random_arrays(306, 1e4))]
    found, _, report = merge(flower("FedAvg"), loud, Arrays.zeros(SCHEMA), settings=MergeSettings())
    assert max(float(np.abs(values).max()) for values in found.arrays.values()) < 1
    assert [each.worker_id for each in report.contributions if each.clip_factor < 1e-3] == ["w6"]


def test_a_strategy_without_a_state_goes_with_any_outer_optimiser() -> None:
    outer, start = OuterSettings(name=OuterName.NESTEROV), random_arrays(1)
    expected, kept = Arrays.zeros(SCHEMA), Arrays.zeros(outer_schema(SCHEMA, outer))
    merge_module(
        updates_of(3),
        start,
        SCHEMA,
        expected,
        settings=UNCLIPPED,
        outer=outer,
        outer_state=OuterState(before=None, after=kept),
    )
    found, state, _ = merge(flower("FedAvg"), updates_of(3), start, outer=outer)
    close(found, expected)
    assert state is not None
    close(state, kept)


def test_too_few_updates_for_the_liars_that_are_expected() -> None:
    with pytest.raises(EngineFailed, match=r"needs 7 updates .* has 6") as raised:
        merge(flower("Bulyan", num_malicious_nodes=1), updates_of(3, 6), random_arrays(1))
    assert "rounds.quorum = 7" in raised.value.hint


def test_updates_of_different_ranks_are_refused() -> None:
    narrow = ArrayUpdate(worker_id="x", rank=1, deltas=random_arrays(9, schema=SCHEMA.at_rank(1)))
    with pytest.raises(EngineFailed, match="different ranks"):
        merge(flower("FedAvg"), [*updates_of(3), narrow], random_arrays(1))


def test_a_step_that_is_not_finite_is_refused() -> None:
    updates = updates_of(3, 2, scale=1e37)
    with pytest.raises(EngineFailed, match=r"flower:FedAvgM made .* infinite"), np.errstate(over="ignore"):
        merge(flower("FedAvgM", server_learning_rate=100.0), updates, random_arrays(1))


def test_flower_s_own_errors_become_the_engine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.serverapp.exception import AggregationError

    def fail(*_: Any) -> None:
        raise AggregationError("no luck")

    monkeypatch.setattr(strategies.FedAvg, "aggregate_train", fail)
    with pytest.raises(EngineFailed, match="flower:FedAvg: no luck"):
        merge(flower("FedAvg"), updates_of(3), random_arrays(1))


def test_nothing_from_a_strategy_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies.FedAvg, "aggregate_train", lambda *_: (None, None))
    with pytest.raises(EngineFailed, match="made nothing of 7 updates"):
        merge(flower("FedAvg"), updates_of(3), random_arrays(1))


# ---- the run file ------------------------------------------------------------------------------------------------


def test_a_run_file_names_a_strategy_and_its_parameters() -> None:
    text = '[merge]\nrule = "flower:FedYogi"\nclip_multiple = 2.0\n[merge."flower:FedYogi"]\neta = 0.02\n'
    run_file = parse_run_file(HEAD + text)
    assert run_file.rule_name == "flower:FedYogi"
    assert run_file.flower is not None
    assert run_file.flower.arguments == {"eta": 0.02, "beta_1": 0.9, "beta_2": 0.99, "tau": 1e-3}
    assert run_file.merging.clip_multiple == 2.0
    assert parse_run_file(dump_run_file(run_file)) == run_file
    assert '[merge."flower:FedYogi"]' in dump_run_file(run_file)
    assert from_table(FlowerSettings, to_table(run_file.flower)) == run_file.flower


def test_a_strategy_without_a_table_has_flower_s_defaults() -> None:
    run_file = parse_run_file(HEAD + '[merge]\nrule = "flower:FedMedian"')
    assert run_file.flower == flower("FedMedian")
    assert parse_run_file(dump_run_file(run_file)) == run_file
    assert "flower" not in template(name="alpha", source="base")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('rule = "flower:FedYogy"', "'flower:FedYogy'", "did you mean flower:FedYogi?"),
        ('rule = "flower:x"', "'flower:x'", "flower:Bulyan"),
        ('rule = "flower:FedProx"', "training on the workers", "flower:FedAvg"),
        ('rule = "flower:QFedAvg"', "training loss", "flower:FedAvg"),
        ('rule = "flower:FedXgbBagging"', "XGBoost", "flower:FedAvg"),
        ('rule = "flower:DifferentialPrivacyServerSideFixedClipping"', "noise", "flower:FedAvg"),
        ('rule = "flower:SecAggPlusWorkflow"', "28 bits", "flower:FedAvg"),
        ('rule = "flower:SecAgg+"', "28 bits", "flower:FedAvg"),
        ('rule = "ties"\n[merge."flower:FedYogi"]', 'merge."flower:FedYogi" is set', "remove"),
        ('[merge."flower:FedYogi"]', 'merge."flower:FedYogi" is set', "remove"),
        ('rule = "flower:FedYogi"\n[merge."flower:FedAdam"]', "'flower:FedYogi'", "remove"),
        ('rule = "flower:FedYogi"\n[merge."flower:FedYogi"]\netta = 1.0', "etta", "eta, beta_1"),
        ('rule = "flower:FedAvg"\n[merge."flower:FedAvg"]\nfraction_train = 1.0', "fraction_train", "remove"),
        ('rule = "flower:FedYogi"\n[merge."flower:FedYogi"]\neta = 0.0', "eta is 0", "0.01"),
        ('rule = "flower:FedYogi"\n[merge."flower:FedYogi"]\neta = nan', "eta is nan", "0.01"),
        ('rule = "flower:FedYogi"\n[merge."flower:FedYogi"]\neta = "x"', "eta", ""),
        ('rule = "flower:Krum"\n[merge."flower:Krum"]\nnum_malicious_nodes = 1.5', "1.5", "a whole number"),
        ('rule = "flower:FedYogi"\n"flower:FedYogi" = 3', "flower", ""),
        ('rule = "flower:FedAvg"\nlora = "exact"', "merge.lora", "factors"),
        ('rule = "flower:FedAvg"\nrescale = "sqrt_paths"', "merge.rescale", "mean"),
        ('rule = "flower:FedAvg"\n[merge.ties]', "merge.ties", ""),
        ('rule = "flower:FedYogi"\n[outer]\nname = "nesterov"', "outer optimiser of its own", "[outer]"),
        ('rule = "flower:FedAvgM"\n[outer]\nlearning_rate = 0.5', "learning rate 0.5", "[outer]"),
        (
            'rule = "flower:Bulyan"\n"flower:Bulyan".num_malicious_nodes = 1\n[rounds]\nquorum = 3\ntarget = 9',
            "needs 7 updates",
            "rounds.quorum",
        ),
        (
            'rule = "flower:Krum"\n[merge."flower:Krum"]\nnum_malicious_nodes = 1\n[rounds]\nbuffer = 4',
            "needs 5 updates",
            "rounds.buffer",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(text: str, message: str, hint: str) -> None:
    with pytest.raises(RunFileError) as raised:
        parse_run_file(f"{HEAD}[merge]\n{text}")
    assert message in raised.value.message
    assert hint in raised.value.hint


def test_the_inner_form_of_the_table_is_nobody_s_to_write() -> None:
    with pytest.raises(RunFileError, match="unknown key flower"):
        parse_run_file(HEAD + '[flower]\nstrategy = "FedAvg"')


def test_without_the_extra_the_run_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunFileError, match="not installed") as raised:
        parse_run_file(HEAD + '[merge]\nrule = "flower:FedAvg"')
    assert raised.value.hint == "pip install 'weft[flower]'"
    import weft.server.flower

    with pytest.raises(UsageError, match="WeftStrategy needs Flower"):
        _ = weft.server.flower.WeftStrategy
    with pytest.raises(AttributeError):
        _ = weft.server.flower.Nothing


def test_reading_a_run_file_imports_no_flower() -> None:
    text = HEAD + '[merge]\nrule = "flower:FedYogi"'
    program = (
        "import sys; from weft.server.runfile import parse_run_file;"
        f"assert parse_run_file({text!r}).flower; print('flwr' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
