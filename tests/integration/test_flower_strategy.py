"""Weft's rules in a Flower app, Flower's strategies in a Weft run: whole rounds, restarts, privacy."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.workflow.default_workflows import default_init_params_workflow
from flwr.serverapp import Grid, strategy
from flwr.serverapp.exception import AggregationError
from flwr.supercore.privacy_accounting import SamplingMethod
from flwr.supercore.task_identity import TaskIdentity
from tests.harness import Site, Worker, run_file

from weft.common.blobs import manifest_of
from weft.common.errors import RunFileError, UsageError
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, ModuleKey, ModuleRef
from weft.common.manifest import open_version
from weft.common.modules import Schema, TensorSpec
from weft.common.parcel import Parcel
from weft.common.records import to_records
from weft.common.tensors import float32_to_bf16, to_float32
from weft.server.engine_process import Jobs
from weft.server.flower import WeftStrategy
from weft.server.merge.engine import merge_module
from weft.server.merge.rules import RULES
from weft.server.merge.settings import MergeRuleName, MergeSettings
from weft.server.merge.tiles import Arrays, ArrayUpdate
from weft.server.outer import OuterSettings
from weft.server.verify import verify
from weft.server.versions import version_key

Floats = npt.NDArray[Any]
Train = Callable[[int, int, Mapping[str, Floats]], dict[str, Floats]]
"""(node, round, arrays received) → arrays trained."""
SHAPES: dict[str, tuple[int, ...]] = {
    "层/weight": (6, 5),
    "q.lora_A.weight": (2, 6),
    "q.lora_B.weight": (7, 2),
    "bias": (5,),
}
PLAIN = {"clip": "none", "lora": "factors"}


def start_arrays(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> dict[str, Floats]:
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.standard_normal(shape), np.float32) for name, shape in shapes.items()}


def movement(node: int, server_round: int, name: str, shape: tuple[int, ...]) -> Floats:
    rng = np.random.default_rng([node, server_round, len(name)])
    return np.asarray(0.1 * rng.standard_normal(shape), np.float32)


def trained(node: int, server_round: int, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
    """What a node makes of the arrays."""
    return {
        name: np.asarray(values + movement(node, server_round, name, values.shape), values.dtype)
        for name, values in arrays.items()
    }


def record_of(arrays: Mapping[str, Floats]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def arrays_of(record: ArrayRecord | None) -> dict[str, Floats]:
    assert record is not None
    return {name: array.numpy() for name, array in record.items()}


class LocalGrid(Grid):
    """Nodes that are functions of this process, each with the modifiers of its app."""

    def __init__(
        self,
        nodes: Sequence[int],
        train: Train = trained,
        *,
        mods: Sequence[Any] = (),
        weights: Mapping[int, float] | None = None,
        turn: int = 0,
    ) -> None:
        self.nodes = list(nodes)
        self.turn = turn
        """By how many places the replies are turned round."""
        app = ClientApp()

        @app.train(mods=list(mods))
        def answer(message: Message, context: Context) -> Message:
            (arrays,) = message.content.array_records.values()
            (config,) = message.content.config_records.values()
            node, number = context.node_id, config["server-round"]
            assert isinstance(number, int)
            metrics = MetricRecord({"num-examples": (weights or {}).get(node, 10), "loss": 1.0 / node})
            record = record_of(train(node, number, arrays_of(arrays)))
            return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)

        self.app = app

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = []
        for message in messages:
            node = message.metadata.dst_node_id
            context = Context(run_id=1, node_id=node, node_config={}, state=RecordDict(), run_config={})
            replies.append(self.app(message, context))
        replies.sort(key=lambda reply: reply.metadata.src_node_id)
        return replies[self.turn :] + replies[: self.turn]

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes

    def get_nodes(self) -> Any:
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are made by a task of Flower's; here there is none."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def run_app(
    chosen: strategy.Strategy,
    grid: LocalGrid,
    arrays: Mapping[str, Floats] | ArrayRecord,
    num_rounds: int = 2,
) -> ArrayRecord:
    record = arrays if isinstance(arrays, ArrayRecord) else record_of(arrays)
    return chosen.start(grid, record, num_rounds=num_rounds).arrays


def by_engine(
    chosen: MergeSettings,
    nodes: Sequence[int],
    number: int,
    start: Mapping[str, Floats],
    weights: Mapping[int, float],
) -> dict[str, Floats]:
    """One round by the engine itself."""
    schema = Schema(tuple(sorted(TensorSpec(name, "F32", values.shape) for name, values in start.items())))
    updates = [
        ArrayUpdate(
            worker_id=f"{node:020d}",
            weight=weights[node],
            deltas=Arrays(
                {
                    name: np.asarray(after - start[name])
                    for name, after in trained(node, number, start).items()
                }
            ),
        )
        for node in nodes
    ]
    sink = Arrays.zeros(schema)
    merge_module(updates, Arrays(start), schema, sink, settings=chosen, outer=OuterSettings())
    return {name: sink.arrays[name] for name in start}


def same(found: ArrayRecord | None, expected: Mapping[str, Floats]) -> None:
    """Names, order, dtypes and bits."""
    arrays = arrays_of(found)
    assert list(arrays) == list(expected)
    for name, values in expected.items():
        assert arrays[name].dtype == values.dtype
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)


def close(found: ArrayRecord | None, expected: ArrayRecord | None, rtol: float = 1e-5) -> None:
    arrays, others = arrays_of(found), arrays_of(expected)
    assert list(arrays) == list(others)
    for name, values in others.items():
        np.testing.assert_allclose(arrays[name], values, rtol=rtol, atol=1e-6, err_msg=name)


# ---- every rule in somebody else's app ---------------------------------------------------------------------------

NEEDING = [name for name, row in RULES.items() if row.needs_fisher or row.needs_grams]


@pytest.mark.parametrize("rule", [name for name in MergeRuleName if name not in NEEDING])
def test_every_rule_is_a_strategy(rule: MergeRuleName) -> None:
    nodes = [3, 8] if rule is MergeRuleName.SLERP else [3, 4, 8, 9, 12]
    weights = {node: 1.0 + node % 3 for node in nodes}
    chosen = WeftStrategy(rule.value, fraction_evaluate=0.0)
    found = run_app(chosen, LocalGrid(nodes, weights=weights), start_arrays(), num_rounds=1)
    same(found, by_engine(MergeSettings(rule=rule), nodes, 1, start_arrays(), weights))


@pytest.mark.parametrize("rule", NEEDING)
def test_rules_that_need_more_than_arrays_are_refused(rule: MergeRuleName) -> None:
    with pytest.raises(UsageError, match="needs more than arrays"):
        WeftStrategy(rule.value)


def test_parameters_and_the_order_of_replies() -> None:
    found = [
        run_app(
            WeftStrategy("ties", {"density": 0.4}, merge={"clip": "none"}, fraction_evaluate=0.0),
            LocalGrid([3, 4, 8], turn=turn),
            start_arrays(),
        )
        for turn in range(3)
    ]
    for other in found[1:]:
        same(other, arrays_of(found[0]))


@pytest.mark.parametrize("turn", [0, 2])
def test_the_plain_mean_is_flower_s(turn: int) -> None:
    weights = {1: 1.0, 2: 5.0, 3: 2.0}
    ours = WeftStrategy(merge=PLAIN, fraction_evaluate=0.0)
    close(
        run_app(ours, LocalGrid([1, 2, 3], weights=weights, turn=turn), start_arrays(), 3),
        run_app(
            strategy.FedAvg(fraction_evaluate=0.0), LocalGrid([1, 2, 3], weights=weights), start_arrays(), 3
        ),
    )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (WeftStrategy("median", merge=PLAIN), strategy.FedMedian()),
        (WeftStrategy("trimmed_mean", {"share": 0.2}, merge=PLAIN), strategy.FedTrimmedAvg(beta=0.2)),
        (WeftStrategy("krum", {"share": 0.2}, merge=PLAIN), strategy.Krum(num_malicious_nodes=1)),
        (
            WeftStrategy("multi_krum", {"share": 0.2}, merge=PLAIN),
            strategy.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=4),
        ),
    ],
    ids=["median", "trimmed_mean", "krum", "multi_krum"],
)
def test_robust_rules_are_flower_s(ours: WeftStrategy, theirs: strategy.FedAvg) -> None:
    found = []
    for chosen in (ours, theirs):
        chosen.fraction_evaluate = 0.0
        found.append(run_app(chosen, LocalGrid([1, 2, 3, 4, 5]), start_arrays()))
    close(found[0], found[1], rtol=1e-4)


def test_metrics_and_messages_are_those_of_fedavg() -> None:
    grid, sent = LocalGrid([1, 2, 3, 4], weights={1: 30.0}), record_of(start_arrays())
    few = WeftStrategy(fraction_train=0.5, min_train_nodes=2, fraction_evaluate=0.0)
    assert len(list(few.configure_train(1, sent, ConfigRecord(), grid))) == 2
    chosen = WeftStrategy(min_train_nodes=4, fraction_evaluate=0.0)
    replies = grid.send_and_receive(chosen.configure_train(1, sent, ConfigRecord(), grid))
    _, metrics = chosen.aggregate_train(1, replies)
    assert metrics is not None
    assert metrics["loss"] == pytest.approx((30 / 1 + 10 / 2 + 10 / 3 + 10 / 4) / 60)


def test_rounds_go_on_after_a_restart_with_the_outer_state() -> None:
    def fresh() -> WeftStrategy:
        return WeftStrategy(outer={"name": "nesterov", "learning_rate": 0.5}, fraction_evaluate=0.0)

    chosen, arrays, kept = fresh(), record_of(start_arrays()), ArrayRecord()
    assert chosen.outer_state() is None
    for number in (1, 2, 3):
        grid = LocalGrid([1, 2, 3])
        replies = grid.send_and_receive(chosen.configure_train(number, arrays, ConfigRecord(), grid))
        merged, _ = chosen.aggregate_train(number, replies)
        state = chosen.outer_state()
        assert merged is not None
        assert state is not None
        arrays, kept = merged, state
        chosen = fresh()
        chosen.restore(kept)
    same(arrays, arrays_of(run_app(fresh(), LocalGrid([1, 2, 3]), start_arrays(), 3)))
    assert float(kept["step"].numpy()[0]) == 3
    chosen.restore(record_of({"other": np.zeros(2, np.float32)}))
    with pytest.raises(AggregationError, match="of other arrays"):
        run_app(chosen, LocalGrid([1, 2, 3]), start_arrays())


# ---- arrays as apps have them ------------------------------------------------------------------------------------


def bf16(values: Floats, stored: str = "V2") -> Array:
    """Half of float32's bits, as a library with the dtype writes them, or as whole numbers."""
    bits = Array(float32_to_bf16(values).view(stored))
    return Array("bfloat16", values.shape, bits.stype, bits.data)


@pytest.mark.parametrize("stored", ["V2", "u2"])
def test_bfloat16_goes_in_and_comes_out(stored: str) -> None:
    start = start_arrays({"w": (4, 3), "b": ()})
    halves = {name: to_float32(float32_to_bf16(values), "BF16") for name, values in start.items()}
    chosen = WeftStrategy(merge=PLAIN, fraction_train=0.0, fraction_evaluate=0.0)
    sent = ArrayRecord({name: bf16(values, stored) for name, values in start.items()})
    list(chosen.configure_train(1, sent, ConfigRecord(), LocalGrid([])))
    replies = [
        reply(node, ArrayRecord({name: bf16(values + node, stored) for name, values in halves.items()}))
        for node in (1, 2, 3)
    ]
    merged, _ = chosen.aggregate_train(1, replies)
    assert merged is not None
    for name, values in halves.items():
        array = merged[name]
        assert (array.dtype, array.shape) == ("bfloat16", values.shape)
        assert array.numpy().dtype == np.dtype(stored)
        found = to_float32(array.numpy().view(np.uint16), "BF16")
        np.testing.assert_allclose(found, values + 2, rtol=0.01)


def test_other_dtypes_come_back_as_they_were() -> None:
    start: dict[str, Floats] = {
        "half": np.ones(3, np.float16),
        "double": np.ones((2, 2)),
        "count": np.array(7, np.int64),
        "flags": np.array([True, False]),
        "empty": np.zeros((0, 3), np.float32),
        "conv.lora_A.weight": np.ones((2, 3, 1, 1), np.float32),
        "conv.lora_B.weight": np.ones((4, 2, 1, 1), np.float32),
        "alone.lora_B.weight": np.ones((4, 2), np.float32),
    }

    def train(node: int, _round: int, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
        moved = {
            name: (values + node).astype(values.dtype)
            for name, values in arrays.items()
            if values.dtype.kind != "b"
        }
        return moved | {"flags": np.array([node > 1, node > 2])}

    found = run_app(WeftStrategy(merge=PLAIN, fraction_evaluate=0.0), LocalGrid([1, 2, 3], train), start, 1)
    arrays = arrays_of(found)
    assert {name: values.dtype for name, values in arrays.items()} == {
        name: values.dtype for name, values in start.items()
    }
    assert arrays["count"] == 9
    assert arrays["flags"].tolist() == [True, False]
    for name in ("half", "double", "conv.lora_A.weight", "alone.lora_B.weight"):
        np.testing.assert_allclose(arrays[name], start[name] + 2, rtol=1e-3)


def test_arrays_without_any_float_are_their_rounded_mean() -> None:
    def train(node: int, _round: int, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
        return {name: values + node for name, values in arrays.items()}

    found = run_app(WeftStrategy(fraction_evaluate=0.0), LocalGrid([1, 2, 3], train), {"n": np.arange(3)}, 1)
    assert arrays_of(found)["n"].tolist() == [2, 3, 4]


def reply(
    node: int,
    arrays: ArrayRecord,
    metrics: Mapping[str, Any] | None = None,
    content: RecordDict | None = None,
) -> Message:
    """A reply that did not come from a message."""
    question = Message(RecordDict(), dst_node_id=node, message_type="train")
    own = MetricRecord(dict(metrics or {"num-examples": 1}))
    return Message(content or RecordDict({"arrays": arrays, "metrics": own}), reply_to=question)


def broken(start: Mapping[str, Floats]) -> Iterator[tuple[str, Message]]:
    """Replies that must not count, with what is said of them."""
    record, bad = record_of(start), np.full_like(start["bias"], np.nan)
    yield "not finite", reply(9, record_of({**start, "bias": bad}))
    yield "was sent as", reply(9, record_of({**start, "bias": np.zeros(6, np.float32)}))
    yield "was sent as", reply(9, record_of({**start, "bias": np.zeros(5, np.int64)}))
    yield "other names", reply(9, record_of({**start, "more": np.zeros(1, np.float32)}))
    yield "num-examples is None", reply(9, record, {"examples": 3})
    yield "num-examples is -1", reply(9, record, {"num-examples": -1.0})
    yield "num-examples is nan", reply(9, record, {"num-examples": float("nan")})
    yield "one ArrayRecord", reply(9, record, content=RecordDict({"arrays": record}))
    junk = Array("float32", (5,), "numpy.ndarray", b"no array at all")
    yield "cannot be read", reply(9, ArrayRecord({**record, "bias": junk}))
    made_up = Array("float32", (5,), "numpy.ndarray", Array(np.zeros(6, np.float32)).data)
    yield "was sent as", reply(9, ArrayRecord({**record, "bias": made_up}))


@pytest.mark.parametrize("index", range(10))
def test_a_reply_that_cannot_be_merged_is_left_out(index: int, caplog: pytest.LogCaptureFixture) -> None:
    start = start_arrays()
    said, message = list(broken(start))[index]
    honest = [reply(node, record_of(trained(node, 1, start))) for node in (1, 2)]
    failed = Message(Error(code=0, reason="out of memory"), reply_to=message)

    def merged(replies: list[Message]) -> ArrayRecord | None:
        chosen = WeftStrategy(fraction_train=0.0, fraction_evaluate=0.0)
        list(chosen.configure_train(1, record_of(start), ConfigRecord(), LocalGrid([])))
        return chosen.aggregate_train(1, replies)[0]

    same(merged([message, *honest, failed]), arrays_of(merged(honest)))
    assert "the reply of node 9 is left out" in caplog.text
    assert said in caplog.text
    assert merged([message]) is None
    assert merged([failed]) is None


def test_misuse_is_told() -> None:
    start = start_arrays()
    chosen = WeftStrategy(fraction_train=0.0, fraction_evaluate=0.0)
    answers = [reply(1, record_of(start)), reply(1, record_of(start))]
    with pytest.raises(AggregationError, match="call configure_train first"):
        chosen.aggregate_train(1, answers)
    list(chosen.configure_train(1, record_of(start), ConfigRecord(), LocalGrid([])))
    with pytest.raises(AggregationError, match="answered twice"):
        chosen.aggregate_train(1, answers)
    with pytest.raises(AggregationError, match="none with a weight"):
        chosen.aggregate_train(1, [reply(1, record_of(start), {"num-examples": 0})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "tees"}, "merge.rule"),
        ({"rule": "flower:FedYogi"}, "merge.rule"),
        ({"rule": "ties", "parameters": {"densty": 0.1}}, "densty"),
        ({"parameters": {"density": 0.1}}, "merge.mean"),
        ({"merge": {"clip": "median", "clop": 1}}, "clop"),
        ({"merge": {"rescale": "rda"}}, "rescale"),
        ({"merge": {"weights": "equal"}}, "weights"),
        ({"outer": "adam"}, "outer.name"),
        ({"rule": "ties", "merge": {"lora": "exact"}}, "exact"),
    ],
)
def test_what_is_unknown_is_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        WeftStrategy(**arguments)


def test_summary_names_the_rule(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="weft")
    WeftStrategy("ties").summary()
    assert "rule ties" in caplog.text


# ---- differential privacy and secure aggregation -----------------------------------------------------------------

WRAPPERS: dict[str, tuple[Callable[[strategy.Strategy], strategy.Strategy], list[Any]]] = {
    "server fixed": (
        lambda inner: strategy.DifferentialPrivacyServerSideFixedClipping(inner, 0.5, 0.2, 4),
        [],
    ),
    "client fixed": (
        lambda inner: strategy.DifferentialPrivacyClientSideFixedClipping(inner, 0.5, 0.2, 4),
        [fixedclipping_mod],
    ),
    "server adaptive": (
        lambda inner: strategy.DifferentialPrivacyServerSideAdaptiveClipping(inner, 0.3, 4),
        [],
    ),
    "client adaptive": (
        lambda inner: strategy.DifferentialPrivacyClientSideAdaptiveClipping(inner, 0.3, 4),
        [adaptiveclipping_mod],
    ),
}


@pytest.fixture
def noise() -> Iterator[Callable[[], None]]:
    """Start Flower's noise, which is numpy's global generator, anew."""
    state = np.random.get_state()
    yield lambda: np.random.seed(5)
    np.random.set_state(state)


@pytest.mark.parametrize("name", list(WRAPPERS))
def test_privacy_wrappers_go_around_the_plain_mean(name: str, noise: Callable[[], None]) -> None:
    wrap, mods = WRAPPERS[name]
    found = []
    for inner in (WeftStrategy(merge=PLAIN, fraction_evaluate=0.0), strategy.FedAvg(fraction_evaluate=0.0)):
        noise()
        found.append(run_app(wrap(inner), LocalGrid([1, 2, 3, 4], mods=mods), start_arrays()))
    close(found[0], found[1])


@pytest.mark.parametrize("name", list(WRAPPERS))
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "ties", "merge": PLAIN}, "rule ties"),
        ({"rule": "median", "merge": PLAIN}, "rule median"),
        ({"merge": {"lora": "factors"}}, 'clip = "median"'),
        ({"merge": PLAIN, "outer": "nesterov"}, "outer optimiser nesterov"),
        ({"merge": PLAIN, "outer": {"learning_rate": 1.5}}, "rate 1.5"),
        ({"merge": {"clip": "none"}}, "LoRA merged as a product"),
    ],
)
def test_noise_that_does_not_cover_a_rule_is_refused(
    name: str, arguments: dict[str, Any], message: str
) -> None:
    wrap, mods = WRAPPERS[name]
    with pytest.raises(UsageError, match=message) as raised:
        run_app(wrap(WeftStrategy(**arguments)), LocalGrid([1, 2, 3, 4], mods=mods), start_arrays())
    assert "LocalDpMod" in raised.value.hint


@pytest.mark.parametrize(
    "array", [Array(np.asarray(np.float32(1))), Array(np.arange(3)), bf16(np.ones(3, np.float32))]
)
def test_arrays_that_flower_cannot_clip_are_refused(array: Array) -> None:
    wrap, _ = WRAPPERS["server fixed"]
    with pytest.raises(UsageError, match="cannot clip odd"):
        run_app(wrap(WeftStrategy(merge=PLAIN)), LocalGrid([1, 2, 3, 4]), ArrayRecord({"odd": array}))


def test_arrays_without_a_dimension_pass_flower_s_clipping() -> None:
    """Why they are refused: the clipped value is bound to a name that nobody reads."""
    from flwr.supercore.differential_privacy import compute_clip_model_update

    trained_arrays = [np.array(100.0, np.float32)]
    compute_clip_model_update(trained_arrays, [np.array(0.0, np.float32)], clipping_norm=1.0)
    assert trained_arrays == [100.0]


def test_noise_for_equal_clients_refuses_weights_that_differ() -> None:
    wrap, _ = WRAPPERS["server fixed"]
    grid = LocalGrid([1, 2, 3, 4], weights={1: 5.0})
    with pytest.raises(UsageError, match="their weights differ"):
        run_app(wrap(WeftStrategy(merge=PLAIN)), grid, start_arrays())


def test_noise_for_four_is_not_published_for_three() -> None:
    def train(node: int, number: int, arrays: Mapping[str, Floats]) -> dict[str, Floats]:
        return (
            {name: np.full_like(each, np.inf) for name, each in arrays.items()}
            if node == 4
            else trained(node, number, arrays)
        )

    wrap, _ = WRAPPERS["client fixed"]
    chosen = wrap(WeftStrategy(merge=PLAIN, fraction_evaluate=0.0))
    found = run_app(chosen, LocalGrid([1, 2, 3, 4], train), start_arrays(), 1)
    assert not found


def test_flower_s_accountant_asks_for_flower_s_own_mean() -> None:
    config = SimpleNamespace(sampling_method=SamplingMethod.NO_AMPLIFICATION)
    accountant: Any = SimpleNamespace(config=config)
    with pytest.raises(ValueError, match=r"using FedAvg\.aggregate_train"):
        strategy.DifferentialPrivacyServerSideFixedClipping(
            WeftStrategy(merge=PLAIN), 0.5, 0.2, 4, accountant=accountant
        )


@pytest.mark.parametrize("rule", ["mean", "ties", "median"])
def test_noise_on_the_clients_goes_with_every_rule(rule: str, noise: Callable[[], None]) -> None:
    noise()
    mod = LocalDpMod(clipping_norm=0.01, sensitivity=1e-6, epsilon=10.0, delta=1e-5)
    found = run_app(
        WeftStrategy(rule, fraction_evaluate=0.0), LocalGrid([1, 2, 3], mods=[mod]), start_arrays(), 1
    )
    moved = [arrays_of(found)[name] - values for name, values in start_arrays().items()]
    assert 0 < np.sqrt(sum(float(np.square(values).sum()) for values in moved)) < 0.05


def test_secure_aggregation_of_flower_s_is_refused_by_name() -> None:
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    legacy = LegacyContext(context, strategy=WeftStrategy())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"SecAggPlusWorkflow.* 28 bits"):
        default_init_params_workflow(LocalGrid([1]), legacy)


@pytest.mark.parametrize(
    "mod",
    [
        LocalDpMod(clipping_norm=1.0, sensitivity=1.0, epsilon=1.0, delta=1e-5),
        fixedclipping_mod,
        adaptiveclipping_mod,
    ],
    ids=["local", "fixed", "adaptive"],
)
def test_modifiers_answer_a_task_of_weft_s_with_an_error(mod: Any) -> None:
    """They would change what a worker has encoded and signed; they find no arrays that they know instead."""

    def parcel(name: str, data: bytes) -> RecordDict:
        return to_records(
            Parcel(documents={name: b"x"}, blobs={Digest(hashlib.sha256(data).hexdigest()): data})
        )

    app = ClientApp()

    @app.train(mods=[mod])
    def answer(message: Message, context: Context) -> Message:
        return Message(parcel("SubmitUpdate", b"an encoded update"), reply_to=message)

    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    task = Message(parcel("PollTask", b"a version"), dst_node_id=1, message_type="train")
    assert app(task, context).has_error()


# ---- Flower's strategies in a run --------------------------------------------------------------------------------

MERGE = '[merge]\nrule = "flower:FedYogi"\n[merge."flower:FedYogi"]\neta = 0.05\n'


def restart(site: Site, members: Sequence[Worker]) -> None:
    """Crash, start again, and let the workers come back."""
    site.restart()
    for member in members:
        member.open_session()


def trained_run(directory: Path, *, restarts: bool) -> Site:
    """Three rounds of two workers; with a crash before each submission and after each round."""
    site = Site(directory, job=Jobs().run)
    site.add_run(run_file(MERGE))
    members = site.workers("a", "b")
    for _ in range(3):
        for member in members:
            task = member.task()
            ready = member.ready(task)
            if restarts:
                restart(site, members)
            member.submit(task, ready)
        if restarts:
            restart(site, members)
    return site


def test_a_run_by_yogi_survives_restarts_and_is_recomputed(tmp_path: Path) -> None:
    sites = [trained_run(tmp_path / name, restarts=name == "often") for name in ("once", "often")]
    module = ModuleKey(0, 0)
    versions = [site.run.versions[module] for site in sites]
    assert [version.digest for version in versions[0]] == [version.digest for version in versions[1]]
    assert [version.version for version in versions[0]] == [0, 1, 2, 3]
    assert len({version.outer_state for version in versions[0][1:]}) == 3
    site = sites[1]
    key = SigningKey.load(site.directory / "keys" / "signing.pem").public
    manifest = open_version(site.ledger.document("version", version_key(versions[1][3])), key)
    assert manifest.merge is not None
    assert manifest.merge.rule == "flower:FedYogi"
    assert manifest.merge.parameters["eta"] == 0.05
    assert manifest.merge.parameters["beta_1"] == 0.9
    for each in sites:
        each.crash()
    state = tmp_path / "state"
    state.mkdir(mode=0o700)
    shutil.copy(site.directory / "ledger.sqlite", state / "ledger.db")
    shutil.copytree(site.directory / "blobs", state / "blobs")
    shutil.copytree(site.directory / "keys", state / "identity")
    for number in (1, 2, 3):
        (found,) = verify(state, ModuleRef.parse(f"alpha@{number}"), site.engine)
        assert found.rule == "flower:FedYogi"
        assert found.digest == manifest_of(site.blobs.path(versions[1][number].digest)).blake3


def test_a_run_file_with_parameters_of_another_class_never_starts() -> None:
    with pytest.raises(RunFileError, match="beta_1"):
        run_file('[merge]\nrule = "flower:FedAdagrad"\n[merge."flower:FedAdagrad"]\nbeta_1 = 0.5\n')


APP = """
import json, sys
import numpy as np
from flwr.app import Array, ArrayRecord, MetricRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.simulation import run_simulation
from weft.server.flower import WeftStrategy

client, server = ClientApp(), ServerApp()

@client.train()
def train(message, context):
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    moved = ArrayRecord({name: Array(values + 1 + context.node_id % 2) for name, values in arrays.items()})
    return Message(RecordDict({"arrays": moved, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

@server.main()
def main(grid, context):
    chosen = WeftStrategy("ties", {"density": 1.0}, fraction_evaluate=0.0)
    start = ArrayRecord({"w": Array(np.zeros((2, 3), np.float32))})
    arrays = chosen.start(grid, start, num_rounds=2).arrays
    with open(sys.argv[1], "w") as file:
        json.dump(arrays["w"].numpy().tolist(), file)

run_simulation(server, client, num_supernodes=2, backend_config={"client_resources": {"num_cpus": 1}})
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_flower_s_simulation_runs_an_app_with_it(tmp_path: Path) -> None:
    """The app as a user writes it; starting Ray takes most of the time."""
    (tmp_path / "app.py").write_text(APP)
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run(
        [sys.executable, "app.py", "out.json"], cwd=tmp_path, env=os.environ | quiet, check=True, timeout=200
    )
    found = np.array(json.loads((tmp_path / "out.json").read_text()))
    assert found.shape == (2, 3)
    assert 2 <= found.min() <= found.max() <= 4
