"""Streaming fragments (Streaming DiLoCo, arXiv 2501.18512): what a worker goes on with where not all is sent at once.

All modules of a path train and only those that the task names are sent. The worker's own parameters go on from task to
task; where another version was published since, the two are mixed. While an update is on its way the worker trains
ahead: these steps count towards the path's next task. If the update is dropped, they have not happened either.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping

from weft.client.kept import Ahead, Carried, PathState
from weft.client.trainer.fragments import mix
from weft.client.trainer.training import Trainer, TrainResult
from weft.common.errors import ComputeError
from weft.common.ids import ModuleKey
from weft.common.modules import Schema
from weft.common.protocol import ModuleStart
from weft.common.recipe import StreamingSettings
from weft.common.tensors import Float32Array

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Float32Array]


def take_up(
    state: PathState,
    start: Tensors,
    starts: Mapping[ModuleKey, ModuleStart],
    schemas: Mapping[ModuleKey, Schema],
    streaming: StreamingSettings,
) -> dict[str, Float32Array]:
    """The parameters that training begins from, where these are not the versions in ``start``."""
    found: dict[str, Float32Array] = {}
    for key, carried in state.carried.items():
        if key not in starts:
            continue
        names = [spec.name for spec in schemas[key].tensors]
        source = state.ahead.tensors if state.ahead else carried.tensors
        local = {name: source[name] for name in names}
        if carried.version != starts[key].blake3:
            local = mix(local, {name: start[name] for name in names}, streaming.mixing)
        found |= local
    return found


def to_carry(
    start: Tensors, result: TrainResult, starts: Mapping[ModuleKey, ModuleStart]
) -> dict[ModuleKey, Carried]:
    """What goes on in the path's next task, with the version that it has taken up."""
    return {
        key: Carried(
            tensors={name: start[name] + delta for name, delta in deltas.items()}, version=starts[key].blake3
        )
        for key, deltas in result.deltas.items()
    }


def trained(start: Tensors, deltas: Iterable[Tensors]) -> dict[str, Float32Array]:
    """All tensors of ``start``, moved by the deltas of those that were trained."""
    moved = {name: start[name] + delta for module in deltas for name, delta in module.items()}
    return {**start, **moved}


def train_ahead(
    trainer: Trainer,
    start: Tensors,
    steps_before: Mapping[ModuleKey, int],
    optimiser_states: Mapping[ModuleKey, Tensors],
    *,
    num_steps: int,
    first_batch: int,
    rank: int,
    is_over: Callable[[], bool],
) -> Ahead | None:
    """Train until ``is_over``, at least one step and ``num_steps`` at most.

    None when it fails: the next task will find out for itself.
    """
    try:
        result = trainer.train(
            start,
            steps_before,
            num_steps=num_steps,
            first_batch=first_batch,
            optimiser_states=optimiser_states,
            on_step=lambda _: is_over(),
            rank=rank,
        )
    except ComputeError as error:
        logger.info("nothing was trained ahead: %s", error)
        return None
    return Ahead(
        num_steps=result.num_steps,
        num_tokens=result.num_tokens,
        losses=result.losses,
        tensors=trained(start, result.deltas.values()),
        optimiser_states=result.optimiser_states,
    )


def with_ahead(result: TrainResult, ahead: Ahead | None) -> TrainResult:
    """A task's result, the steps that were done before it came among its own."""
    if ahead is None:
        return result
    losses = (*ahead.losses, *result.losses)
    return dataclasses.replace(
        result,
        losses=losses,
        num_steps=len(losses),
        num_tokens=ahead.num_tokens + result.num_tokens,
        num_examples=result.num_examples // result.num_steps * len(losses),
    )
