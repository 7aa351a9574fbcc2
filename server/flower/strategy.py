"""Weft's merge rules as a strategy of Flower's, for apps that are not Weft's.

``WeftStrategy`` samples nodes, sends and evaluates as ``FedAvg`` does; what it makes of the replies is what a round
of Weft makes of its updates: a reply that does not fit or is not finite is left out, movements are clipped, merged by
the rule and taken over by the outer optimiser. The result depends on who answered what, not on the order of answers.

Names and shapes are the app's. Arrays of floating point are merged as float32 and come back in their own dtype,
bfloat16 (``Array.dtype`` says so, the data are its 16 bits) included; integers and booleans take the rounded mean.
All replies of a round are dense in memory. Tensors named ``….lora_A.weight`` and ``….lora_B.weight`` are LoRA
factors: linear rules merge their product, unless ``merge={"lora": "factors"}``.

Flower's differential privacy: modifiers of the client's side may stand before any rule, since what they promise holds
for each reply. Its wrappers that add noise on the server need a result that a client moves by at most its clipping
norm over their number: that is the plain mean of equal weights, and everything else is refused (``check_private``).
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

from weft.common.errors import EngineFailed, UsageError
from weft.common.modules import LORA_A, LORA_B, Schema, TensorSpec
from weft.common.settings import from_table
from weft.common.tensors import float32_to_bf16, to_float32
from weft.server.flower.limits import REFUSED
from weft.server.merge.crew import Threads
from weft.server.merge.engine import OuterState, merge_module
from weft.server.merge.rules import RULES
from weft.server.merge.settings import Clip, LoraSpace, MergeRuleName, MergeSettings
from weft.server.merge.spaces import lora_space
from weft.server.merge.tiles import Arrays, ArrayUpdate, Float32
from weft.server.outer import OuterName, OuterSettings, outer_schema

logger = logging.getLogger(__name__)

Values: TypeAlias = npt.NDArray[Any]
BFLOAT16: Final = "bfloat16"
_WRAPPERS: Final = (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)


@dataclass(frozen=True, slots=True)
class _Reply:
    """A reply that can be merged."""

    node_id: int
    content: RecordDict
    weight: float
    values: Mapping[str, Values]
    """Floating point as float32, all else as it came."""


class WeftStrategy(FedAvg):
    """A strategy that merges replies by one of Weft's rules."""

    def __init__(
        self,
        rule: str = "mean",
        parameters: Mapping[str, Any] | None = None,
        *,
        merge: Mapping[str, Any] | None = None,
        outer: str | Mapping[str, Any] | None = None,
        lora_scaling: float = 1.0,
        **sampling: Any,
    ) -> None:
        """Choose a rule.

        Args:
            rule: What ``merge.rule`` of a run file says, for example "ties".
            parameters: The rule's table, for example {"density": 0.2}.
            merge: Other keys of ``[merge]``: clip, clip_multiple, weight_multiple_max, lora.
            outer: The ``[outer]`` table, or its name alone; unset, the merged arrays are the next ones.
            lora_scaling: alpha / rank of LoRA factors; weighs their change against that of other arrays.
            sampling: The arguments of ``FedAvg``.

        Raises:
            UsageError: Unknown, or not for the replies of an app.
        """
        super().__init__(**sampling)
        own = {} if parameters is None else {rule: dict(parameters)}
        self.settings = from_table(MergeSettings, {**(merge or {}), "rule": rule, **own}, where="merge")
        self.outer = from_table(
            OuterSettings, {"name": outer} if isinstance(outer, str) else dict(outer or {}), where="outer"
        )
        self.lora_scaling = lora_scaling
        self._space = _check_settings(self.settings, self.outer)
        self._start: ArrayRecord | None = None
        self._slots: Arrays | None = None

    def summary(self) -> None:
        """Log the rule, then what ``FedAvg`` logs."""
        logger.info("merged by Weft's rule %s, outer optimiser %s", self.settings.rule, self.outer.name)
        super().summary()

    def outer_state(self) -> ArrayRecord | None:
        """What the outer optimiser keeps, for an app's own checkpoint; None before the first round, or without."""
        if self._slots is None:
            return None
        return ArrayRecord({name: Array(values) for name, values in self._slots.arrays.items()})

    def restore(self, outer_state: ArrayRecord) -> None:
        """Go on from what ``outer_state`` gave."""
        self._slots = Arrays({name: array.numpy().astype(np.float32) for name, array in outer_state.items()})

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send the arrays as ``FedAvg`` does, and remember them.

        Raises:
            UsageError: A wrapper that adds noise is around a rule or arrays that its noise does not cover.
        """
        if self._wrapper() is not None:
            check_private(self.settings, self.outer, self._space, arrays)
        self._start = arrays.copy()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the replies into the next arrays.

        Raises:
            AggregationError: Nothing was sent before, a node answered twice, or the merge failed.
            UsageError: A wrapper that adds noise meets weights that differ.
        """
        valid, _ = self._check_and_log_replies(replies, is_train=True, validate=False)
        if not valid:
            return None, None
        if self._start is None:
            raise AggregationError("there are no arrays to start from: call configure_train first")
        kept = self._screened(valid, self._start)
        if self._wrapper() is not None and not _even(kept, len(valid)):
            return None, None
        if not kept:
            return None, None
        merged = self._merged(kept, self._start)
        metrics = self.train_metrics_aggr_fn([reply.content for reply in kept], self.weighted_by_key)
        return merged, metrics

    def initialize_parameters(self, client_manager: object) -> NoReturn:
        """Refuse Flower's legacy workflows, which begin with this: secure aggregation is one."""
        raise UsageError(
            "WeftStrategy is for ServerApps that call its start(), not for Flower's legacy workflows;"
            f" SecAggPlusWorkflow, one of them, {REFUSED['SecAggPlusWorkflow']}",
            hint="use clientapp.mod.LocalDpMod where the server must not see updates",
        )

    def _screened(self, replies: Sequence[Message], start: ArrayRecord) -> list[_Reply]:
        """The replies that fit and are finite, by node."""
        kept: dict[int, _Reply] = {}
        for message in replies:
            node_id = message.metadata.src_node_id
            reply = _read_reply(message, start, self.weighted_by_key)
            if isinstance(reply, str):
                logger.warning("the reply of node %d is left out: %s", node_id, reply)
            elif node_id in kept:
                raise AggregationError(f"node {node_id} answered twice in one round")
            else:
                kept[node_id] = reply
        return [kept[node_id] for node_id in sorted(kept)]

    def _merged(self, replies: Sequence[_Reply], start: ArrayRecord) -> ArrayRecord:
        floats = {name: _values(array) for name, array in start.items() if _is_float(array)}
        names = _engine_names(floats)
        schema = Schema(
            tuple(sorted(TensorSpec(names[name], "F32", each.shape) for name, each in floats.items()))
        )
        held = Arrays({names[name]: np.ascontiguousarray(each) for name, each in floats.items()})
        updates = [
            ArrayUpdate(
                worker_id=f"{reply.node_id:020d}",
                weight=reply.weight,
                deltas=Arrays(
                    {names[name]: np.asarray(reply.values[name] - floats[name]) for name in floats}
                ),
            )
            for reply in replies
        ]
        sink, state = Arrays.zeros(schema), None
        if self.outer.num_slots:
            state = OuterState(
                before=self._before(schema), after=Arrays.zeros(outer_schema(schema, self.outer))
            )
        try:
            merge_module(
                updates,
                held,
                schema,
                sink,
                settings=self.settings,
                outer=self.outer,
                outer_state=state,
                scaling=self.lora_scaling,
                norms=False,
                crew=Threads(torch.get_num_threads()),
            )
        except EngineFailed as error:
            raise AggregationError(error.message) from error
        if state is not None and isinstance(state.after, Arrays):
            self._slots = state.after
        return ArrayRecord(
            {
                name: _array(sink.arrays[names[name]], array)
                if name in floats
                else Array(_mean_of_whole(name, replies))
                for name, array in start.items()
            }
        )

    def _before(self, schema: Schema) -> Arrays | None:
        """What the outer optimiser kept; raises AggregationError where it was of other arrays."""
        if self._slots is None:
            return None
        expected = {spec.name: spec.shape for spec in outer_schema(schema, self.outer).tensors}
        if {name: values.shape for name, values in self._slots.arrays.items()} != expected:
            raise AggregationError("the outer optimiser's state is of other arrays or another optimiser")
        return self._slots

    def _wrapper(self) -> object | None:
        """The privacy wrapper that is calling, which Flower does not tell a strategy: so the stack is asked."""
        frame = inspect.currentframe()
        while frame is not None:
            caller = frame.f_locals.get("self")
            if isinstance(caller, _WRAPPERS):
                return caller
            frame = frame.f_back
        return None


def check_private(
    settings: MergeSettings, outer: OuterSettings, space: LoraSpace, arrays: Mapping[str, Array]
) -> None:
    """Refuse what the noise of Flower's wrappers does not cover: it is that of a mean of n equal clients.

    Raises:
        UsageError: One client can move the result by more than its clipping norm / n.
    """
    layers = any(name.endswith(LORA_A) for name in _engine_names(arrays).values())
    causes = {
        f"rule {settings.rule.value}, whose result one client can move further": settings.rule
        is not MergeRuleName.MEAN,
        'clip = "median", which depends on the other clients': settings.clip is not Clip.NONE,
        f"outer optimiser {outer.name.value} with rate {outer.rate:g}, which makes steps longer": outer.name
        is not OuterName.SGD
        or outer.rate > 1,
        "LoRA merged as a product": layers and space is LoraSpace.EXACT,
    }
    for cause, holds in causes.items():
        if holds:
            raise UsageError(
                f"Flower's noise on the server is for the mean of equal clients, not for {cause}",
                hint='use WeftStrategy(rule="mean", merge={"clip": "none", "lora": "factors"}), or LocalDpMod on'
                " the clients, which goes with every rule",
            )
    for name, array in arrays.items():
        if array.dtype == BFLOAT16 or not _is_float(array) or not array.shape:
            raise UsageError(
                f"Flower's wrappers cannot clip {name}, of dtype {array.dtype} and shape {array.shape}",
                hint="they clip floating point with a dimension: keep other arrays out of what clients send",
            )


def _check_settings(settings: MergeSettings, outer: OuterSettings) -> LoraSpace:
    """Where LoRA is merged; raises UsageError for what an app's replies do not carry."""
    row = RULES[settings.rule]
    if row.needs_fisher or row.needs_grams:
        raise UsageError(
            f"rule {settings.rule.value} needs more than arrays: {'Fisher' if row.needs_fisher else 'Gram matrices'}",
            hint="Flower's replies carry one ArrayRecord: choose another rule, or use a Weft run",
        )
    fixed = {"rescale": MergeSettings().rescale, "weights": MergeSettings().weights}
    for key, default in fixed.items():
        if getattr(settings, key) is not default:
            raise UsageError(
                f"merge.{key} has no meaning in an app", hint="weighted_by_key names what a reply counts for"
            )
    return lora_space(settings, outer)


def _even(kept: Sequence[_Reply], num_replies: int) -> bool:
    """Whether a noisy wrapper may publish the mean; raises UsageError where weights make it another."""
    if len({reply.weight for reply in kept}) > 1:
        raise UsageError(
            "Flower's noise on the server is for the mean of equal clients, and their weights differ",
            hint='let every client send the same "num-examples"',
        )
    if len(kept) < num_replies:
        logger.warning(
            "no aggregation: Flower's noise is for %d replies, %d can be used", num_replies, len(kept)
        )
    return len(kept) == num_replies


def _read_reply(message: Message, start: ArrayRecord, weighted_by: str) -> _Reply | str:
    """A reply, or why it cannot be merged."""
    content = message.content
    if len(content.array_records) != 1 or len(content.metric_records) != 1:
        return "it must carry one ArrayRecord and one MetricRecord"
    (arrays,), (metrics,) = content.array_records.values(), content.metric_records.values()
    weight = metrics.get(weighted_by)
    if not isinstance(weight, int | float) or not (math.isfinite(weight) and weight >= 0):
        return f"its {weighted_by} is {weight!r}"
    if set(arrays) != set(start):
        return "its arrays have other names than those sent"
    try:
        values = {name: _values(array) for name, array in arrays.items()}
    except (EOFError, OSError, TypeError, ValueError) as error:
        return f"an array cannot be read: {error}"
    for name, array in values.items():
        sent = start[name]
        if array.shape != tuple(sent.shape) or (array.dtype.kind == "f") != _is_float(sent):
            return f"{name} is {array.dtype} {array.shape} and was sent as {sent.dtype} {sent.shape}"
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            return f"{name} is not finite"
    return _Reply(message.metadata.src_node_id, content, float(weight), values)


def _is_float(array: Array) -> bool:
    return array.dtype == BFLOAT16 or np.dtype(array.dtype).kind == "f"


def _values(array: Array) -> Values:
    """Floating point as float32, all else as it is."""
    values = array.numpy()
    if array.dtype == BFLOAT16:
        return to_float32(values.view(np.uint16), "BF16")
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _array(values: Float32, like: Array) -> Array:
    """``values`` in the dtype of ``like``."""
    if like.dtype != BFLOAT16:
        return Array(np.asarray(values, np.dtype(like.dtype)))
    bits = Array(float32_to_bf16(values).view(like.numpy().dtype))
    return Array(BFLOAT16, like.shape, like.stype, bits.data)


def _mean_of_whole(name: str, replies: Sequence[_Reply]) -> Values:
    """The weighted mean of integers or booleans, rounded to one of them."""
    stack = np.stack([reply.values[name] for reply in replies])
    mean = np.average(stack.astype(np.float64), axis=0, weights=[reply.weight for reply in replies])
    return np.asarray(np.rint(mean).astype(stack.dtype))


def _engine_names(shapes: Mapping[str, Values] | Mapping[str, Array]) -> dict[str, str]:
    """What the engine calls each array: it takes some names for LoRA factors, which only matrices in pairs are."""

    def is_factor(name: str) -> bool:
        stem = name.removesuffix(LORA_A).removesuffix(LORA_B)
        pair = [shapes[stem + suffix].shape for suffix in (LORA_A, LORA_B) if stem + suffix in shapes]
        return [len(shape) for shape in pair] == [2, 2] and pair[0][0] == pair[1][1]

    return {
        name: f"{name}~" if name.endswith((LORA_A, LORA_B)) and not is_factor(name) else name
        for name in shapes
    }
