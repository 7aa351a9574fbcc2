"""Flower's strategies in the place of a merge rule.

A strategy gets the movements of a round's updates, measured and clipped as for every rule, as if the module's start
were 0: what it returns is the step. All of them give the same step from any start but for rounding, which is smaller
here: Krum's distances, in float32, do not have to be found below the square of the weights. LoRA factors are arrays
like others, as Flower's users have them.

A strategy that keeps something between rounds is made anew in each and given back what it kept, from the file in
which an outer optimiser's state would lie: a restart changes no bit, and a version is recomputed from what is stored.

All updates are dense in memory: as float32, W times the module, and up to three times that while a strategy stacks
or sorts them.

Legend: W = updates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.app.message import make_message
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import FedAvg, FedAvgM

from weft.common.errors import EngineFailed
from weft.common.modules import Schema, TensorSpec
from weft.server.flower.limits import FlowerSettings
from weft.server.merge.crew import ALONE, Crew
from weft.server.merge.engine import MergeReport, OuterState, merge_module
from weft.server.merge.measuring import measure_updates
from weft.server.merge.movements import Contributor
from weft.server.merge.settings import Clip, LoraSpace, MergeSettings
from weft.server.merge.tiles import Arrays, ArrayUpdate, Float32, Scratch, Sink, Tiles, Update
from weft.server.outer import STEP, OuterSettings, slot_name

WEIGHT: Final = "num-examples"
"""Key under which Flower's strategies look for the weight of a reply."""


def merge_with_flower(
    updates: Sequence[Update],
    start: Tiles,
    schema: Schema,
    sink: Sink,
    *,
    flower: FlowerSettings,
    settings: MergeSettings,
    outer: OuterSettings,
    outer_state: OuterState | None = None,
    scaling: float = 1.0,
    crew: Crew = ALONE,
    clock: Callable[[], float] = time.perf_counter,
) -> MergeReport:
    """Merge ``updates`` into the next version of a module by a strategy of Flower's.

    Args:
        updates: Screened updates: they fit ``schema`` and are finite. Any order.
        start: The version that they started from.
        schema: The module's tensors.
        sink: Receives every element of the next version, float32.
        flower: The strategy.
        settings: The ``[merge]`` table but for its rule: clipping and bounds of weights.
        outer: The ``[outer]`` table; plain steps of rate 1 where the strategy keeps a state.
        outer_state: Given exactly when the strategy or ``outer`` keeps a state.
        scaling: ΔW = scaling · B A; weighs LoRA layers against others in the norm.
        crew: Who shares the work beside the strategy's own: speed, not the result.
        clock: Seconds, for the report.

    Raises:
        EngineFailed: There are no updates or too few, their ranks differ, or the strategy fails.
    """
    times = [clock()]
    contributors, contributions = measure_updates(
        updates, start, schema, settings=settings, scaling=scaling, crew=crew
    )
    _check(contributors, schema, flower)
    times.append(clock())
    own = outer_state if flower.row.slots else None
    before = own.before if own else None
    step, kept = aggregate(
        schema,
        _movements(contributors, schema),
        [each.weight for each in contributors],
        flower,
        slots=None if before is None else _read_slots(before, schema, flower),
        rounds=0 if before is None else int(before.tile(STEP, 0, 1)[0]),
    )
    if own is not None:
        _write_slots(own, kept, schema)
    times.append(clock())
    done = merge_module(
        [ArrayUpdate(worker_id=flower.name, deltas=Arrays(step))],
        start,
        schema,
        sink,
        settings=MergeSettings(clip=Clip.NONE, lora=LoraSpace.FACTORS),
        outer=outer,
        outer_state=outer_state if own is None else None,
        norms=False,
        crew=crew,
        clock=clock,
    )
    times.append(clock())
    return dataclasses.replace(
        done,
        rule=flower.name,
        contributions=contributions,
        seconds=dict(zip(("measure", "survey", "merge"), np.diff(times).tolist(), strict=True)),
    )


def aggregate(
    schema: Schema,
    movements: Iterable[Mapping[str, Float32]],
    weights: Sequence[float],
    flower: FlowerSettings,
    *,
    slots: Sequence[Mapping[str, Float32]] | None,
    rounds: int,
) -> tuple[dict[str, Float32], list[dict[str, Float32]]]:
    """The step that a strategy takes, and what it keeps.

    Args:
        schema: The module's tensors.
        movements: One for each update, in an order that does not depend on their arrival.
        weights: Of each update.
        flower: The strategy.
        slots: What it kept in the last round, in the order of its row; None in the first round.
        rounds: How many rounds there were before this one.

    Returns:
        The step by tensor, float32, and the slots, float32.

    Raises:
        EngineFailed: The strategy fails, or its step is not finite.
    """
    strategy = _strategy(flower, schema, slots)
    replies = [_reply(*each) for each in zip(range(len(weights)), movements, weights, strict=True)]
    try:
        with _quiet():
            arrays, _ = strategy.aggregate_train(rounds + 1, replies)
    except AppExitException as error:
        raise EngineFailed(f"{flower.name}: {error}") from error
    if arrays is None:
        raise EngineFailed(f"{flower.name} made nothing of {len(replies)} updates")
    step = {name: array.numpy().astype(np.float32) for name, array in arrays.items()}
    for name, values in step.items():
        if not np.isfinite(values).all():
            raise EngineFailed(f"{flower.name} made {name} infinite", hint="lower its learning rate")
    return step, [_kept(strategy, slot, schema) for slot in flower.row.slots]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower from saying every round what the report says, and from walking through all objects.

    Bulyan collects garbage for every reply: that takes as long as the process holds much, such as a base.
    """
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.WARNING)
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logger.setLevel(level)


def _check(contributors: Sequence[Contributor], schema: Schema, flower: FlowerSettings) -> None:
    for each in contributors:
        if any(each.specs[spec.name].shape != spec.shape for spec in schema.tensors):
            raise EngineFailed(
                f"updates of different ranks cannot be merged by {flower.name}",
                hint='set merge.rule = "mean", or give all workers the same rank',
            )
    if len(contributors) < flower.num_updates_min:
        raise EngineFailed(
            f"{flower.name} needs {flower.num_updates_min} updates for its num_malicious_nodes, this round has"
            f" {len(contributors)}",
            hint=f"set rounds.quorum = {flower.num_updates_min}",
        )


def _movements(contributors: Sequence[Contributor], schema: Schema) -> Iterator[dict[str, Float32]]:
    """The clipped movements, dense, one update at a time."""
    scratch = Scratch()

    def movement(each: Contributor, spec: TensorSpec) -> Float32:
        values = each.tile(spec, 0, spec.size, scratch) * np.float32(each.clip)
        return values.reshape(spec.shape)

    return ({spec.name: movement(each, spec) for spec in schema.tensors} for each in contributors)


def _reply(index: int, arrays: Mapping[str, Float32], weight: float) -> Message:
    """What a node of Flower's would have answered."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(values) for name, values in arrays.items()}),
            "metrics": MetricRecord({WEIGHT: weight}),
        }
    )
    metadata = Metadata(
        run_id=0,
        message_id=str(index),
        src_node_id=index + 1,
        dst_node_id=0,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type=MessageType.TRAIN,
    )
    return make_message(metadata, content)


def _strategy(
    flower: FlowerSettings, schema: Schema, slots: Sequence[Mapping[str, Float32]] | None
) -> FedAvg:
    """The strategy as it would be after its last round, at a start of 0."""
    made = cast("FedAvg", getattr(strategies, flower.strategy)(**flower.arguments))
    if not flower.row.slots:
        return made
    state: dict[str, Any] = dict(zip(flower.row.slots, slots or (), strict=slots is not None))
    zeros = {spec.name: np.zeros(spec.shape, np.float32) for spec in schema.tensors}
    if isinstance(made, FedAvgM):
        made.current_arrays = ArrayRecord({name: Array(values) for name, values in zeros.items()})
        state = {slot: list(values.values()) for slot, values in state.items()}
    else:
        state["current_arrays"] = zeros
    for attribute, value in state.items():
        setattr(made, attribute, value)
    return made


def _kept(strategy: FedAvg, slot: str, schema: Schema) -> dict[str, Float32]:
    """What a strategy has in one of its slots; zeros where these parameters leave it unused."""
    kept = getattr(strategy, slot)
    if kept is None:
        return {spec.name: np.zeros(spec.shape, np.float32) for spec in schema.tensors}
    values = [kept[spec.name] for spec in schema.tensors] if isinstance(kept, Mapping) else kept
    # Without a dimension, Flower's arithmetic leaves a scalar.
    pairs = zip(schema.tensors, values, strict=True)
    return {spec.name: np.asarray(value, np.float32) for spec, value in pairs}


def _read_slots(before: Tiles, schema: Schema, flower: FlowerSettings) -> list[dict[str, Float32]]:
    return [
        {
            spec.name: before.tile(slot_name(slot, spec.name), 0, spec.size).reshape(spec.shape)
            for spec in schema.tensors
        }
        for slot in range(len(flower.row.slots))
    ]


def _write_slots(state: OuterState, kept: Sequence[Mapping[str, Float32]], schema: Schema) -> None:
    for slot, values in enumerate(kept):
        for spec in schema.tensors:
            state.after.write(slot_name(slot, spec.name), 0, values[spec.name].reshape(-1))
    rounds = 0 if state.before is None else int(state.before.tile(STEP, 0, 1)[0])
    state.after.write(STEP, 0, np.array([rounds + 1], np.float32))
