"""The merge of one round of one module: measure, clip, rule, outer step.

A coordinate-wise rule needs O(W × tile) memory a thread, and tiles are the shorter the more updates there
are: memory does not grow with their number. While trim thresholds are found, a thread holds one tensor of one
update; ``lora = "exact"`` holds one layer's factors of all workers.

Legend: W = updates, T = elements of a tile.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from weft.common.errors import EngineFailed
from weft.common.modules import Schema, TensorSpec
from weft.server.merge import lora
from weft.server.merge.rules import RULES, MergeRule, Statistics, lora_space
from weft.server.merge.settings import LoraSpace, MergeSettings, RuleParameters
from weft.server.merge.statistics import (
    TensorMeasure,
    UpdateMeasure,
    clip_factors,
    measure_tensor,
    normalised_weights,
    update_measure,
)
from weft.server.merge.tiles import WORKING_ELEMENTS, Float64, Sink, Tiles, Update, spans
from weft.server.outer import OuterSettings, outer_step


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterState:
    """The outer optimiser's momentum: one tensor of float32 for each of the module's."""

    momentum: Tiles | None
    """What the last round left; None in the first."""
    next_momentum: Sink
    """Where this round's goes; it counts once the version is published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """What one update was worth in a merge."""

    worker_id: str
    """Who sent it."""
    task_id: str
    """For which task."""
    weight: float
    """Bounded and normalised: the weights of a merge sum to 1."""
    clip_factor: float
    """What it was multiplied by, at most 1."""
    change_norm: float
    """Norm of the movement of what the module computes, before clipping."""
    parameter_norm: float
    """Norm of the movement of its parameters, before clipping."""
    kept: float
    """Share of its elements that are not zero after trimming."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """How a merge went."""

    rule: str
    """The merge rule."""
    lora: LoraSpace | None
    """Where LoRA factors were merged; None for a module without them."""
    contributions: tuple[Contribution, ...]
    """One for each update, sorted by worker and task."""
    truncation_error: float
    """‖ΔW − recompressed‖ / ‖ΔW‖ over all layers; 0 unless merged as exact."""
    seconds: Mapping[str, float]
    """Wall time by phase: measure, survey, merge."""


@dataclass(frozen=True, slots=True)
class _Contributor:
    """An update and what it counts for."""

    update: Update
    measure: UpdateMeasure
    weight: float
    clip: float

    def movement(self, name: str, start: int, stop: int, out_T: Float64) -> None:
        """Put a tile of the update, trimmed and clipped, into ``out``."""
        values_T = self.update.tile(name, start, stop)
        cut = self.measure.cuts[name]
        trimmed_T = values_T if cut is None else cut.apply(values_T, start)
        np.multiply(trimmed_T, self.clip, out=out_T, dtype=np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """Everything that the merge of a tile or a layer needs to know."""

    contributors: tuple[_Contributor, ...]
    rule: MergeRule[Any]
    parameters: RuleParameters
    start: Tiles
    sink: Sink
    outer: OuterSettings
    outer_state: OuterState | None

    def movements(self, name: str, start: int, stop: int) -> Float64:
        """The tile of every update, trimmed and clipped, float64 [W, T]."""
        movements_WT = np.empty((len(self.contributors), stop - start))
        for row_T, contributor in zip(movements_WT, self.contributors, strict=True):
            contributor.movement(name, start, stop, row_T)
        return movements_WT

    def statistics(self, name: str, start: int, stop: int, *, survey: int) -> Statistics:
        """What the rule asked for beside the movements."""
        if not self.rule.needs_fisher:
            return Statistics(survey=survey)
        tiles = [each.update.fisher_tile(name, start, stop) for each in self.contributors]
        means = [each.measure.fisher_mean for each in self.contributors]
        return Statistics(fisher=np.array(tiles, np.float64), fisher_mean=np.array(means), survey=survey)

    def merge_tile(self, name: str, start: int, stop: int, *, survey: int) -> None:
        """Write a tile of the next version, and of the next momentum."""
        weights_W = np.array([each.weight for each in self.contributors])
        statistics = self.statistics(name, start, stop, survey=survey)
        movement_T = self.rule.merge(
            self.movements(name, start, stop), weights_W, statistics, self.parameters
        )
        momentum = self.outer_state.momentum if self.outer_state else None
        momentum_T = (
            np.zeros(stop - start)
            if momentum is None
            else momentum.tile(name, start, stop).astype(np.float64)
        )
        step_T, next_T = outer_step(movement_T, momentum_T, self.outer)
        self.sink.write(name, start, (self.start.tile(name, start, stop) + step_T).astype(np.float32))
        if self.outer_state is not None:
            self.outer_state.next_momentum.write(name, start, next_T.astype(np.float32))

    def merge_layer(self, a_spec: TensorSpec, b_spec: TensorSpec) -> lora.Recompressed:
        """Write the next version of a layer's LoRA factors, merged as ΔW."""
        coefficients = [self.outer.rate * each.weight * each.clip for each in self.contributors]
        movements = [lora.read_factors(each.update, a_spec, b_spec) for each in self.contributors]
        done = lora.merge_pair(lora.read_factors(self.start, a_spec, b_spec), movements, coefficients)
        for spec, factor in ((a_spec, done.factors.A_ri), (b_spec, done.factors.B_or)):
            self.sink.write(spec.name, 0, factor.reshape(-1).numpy().astype(np.float32))
        return done


def merge_module(
    updates: Sequence[Update],
    start: Tiles,
    schema: Schema,
    sink: Sink,
    *,
    settings: MergeSettings,
    outer: OuterSettings,
    outer_state: OuterState | None = None,
    scaling: float = 1.0,
    tile_elements: int | None = None,
    threads: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> MergeReport:
    """Merge ``updates`` into the next version of a module.

    Args:
        updates: Screened updates: they fit ``schema`` and are finite. Any order.
        start: The version that they started from.
        schema: The module's tensors.
        sink: Receives every element of the next version, float32.
        settings: The ``[merge]`` table.
        outer: The ``[outer]`` table.
        outer_state: Given exactly when ``outer.has_momentum``.
        scaling: ΔW = scaling · B A; weighs LoRA layers against others in the norm.
        tile_elements: Length of a tile: speed and memory, not the result. Unset: shorter for more updates.
        threads: Tiles and layers merged at once: speed and memory, not the result.
        clock: Seconds, for the report.

    Raises:
        EngineFailed: There are no updates, or none has a weight.
        UsageError: The settings cannot be combined (``lora_space``).
        ValueError: An update appears twice, a weight is negative, or ``outer_state`` does not fit ``outer``.
    """
    ordered = _ordered(updates)
    space = lora_space(settings, outer)
    _check_state(outer, outer_state)
    times = [clock()]
    with _pool(threads) as pool:
        round_ = _Round(
            contributors=_contributors(pool, ordered, start, schema, settings=settings, scaling=scaling),
            rule=RULES[settings.rule],
            parameters=settings.parameters,
            start=start,
            sink=sink,
            outer=outer,
            outer_state=outer_state,
        )
        times.append(clock())
        exact = _pairs(schema) if space is LoraSpace.EXACT else []
        tiles = _tiles(schema, exact, tile_elements or max(1024, WORKING_ELEMENTS // len(ordered)))
        survey = _survey(pool, round_, tiles)
        times.append(clock())
        layers = list(pool.map(lambda pair: round_.merge_layer(*pair), exact))
        list(pool.map(lambda tile: round_.merge_tile(*tile, survey=survey), tiles))
        times.append(clock())
    return _report(round_, space if schema.lora_pairs else None, layers, times)


def _check_state(outer: OuterSettings, outer_state: OuterState | None) -> None:
    if outer.has_momentum and outer_state is None:
        raise ValueError(f"outer optimiser {outer.name} keeps a momentum and needs outer_state")
    if outer_state is not None and not outer.has_momentum:
        raise ValueError(f"outer optimiser {outer.name} keeps no momentum: leave outer_state out")


def _ordered(updates: Sequence[Update]) -> tuple[Update, ...]:
    """Those with a weight, in the one order that they are added up in, whatever order they came in."""
    counting = (update for update in updates if update.weight != 0)
    ordered = tuple(sorted(counting, key=lambda update: (update.worker_id, update.task_id)))
    if not ordered:
        raise EngineFailed(f"{len(updates)} updates, none with a weight: there is nothing to merge")
    if len({(update.worker_id, update.task_id) for update in ordered}) < len(ordered):
        raise ValueError("an update appears twice")
    return ordered


@contextlib.contextmanager
def _pool(threads: int) -> Iterator[Executor]:
    """Threads that do their linear algebra alone: libraries round differently by how they split the work."""
    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _pairs(schema: Schema) -> list[tuple[TensorSpec, TensorSpec]]:
    specs = {spec.name: spec for spec in schema.tensors}
    return [(specs[a_name], specs[b_name]) for a_name, b_name in schema.lora_pairs]


def _contributors(
    pool: Executor,
    updates: Sequence[Update],
    start: Tiles,
    schema: Schema,
    *,
    settings: MergeSettings,
    scaling: float,
) -> tuple[_Contributor, ...]:
    measures = _measure(pool, updates, start, schema, settings=settings, scaling=scaling)
    weights = normalised_weights([update.weight for update in updates], settings)
    clips = clip_factors(measures, settings)
    return tuple(_Contributor(*row) for row in zip(updates, measures, weights, clips, strict=True))


def _measure(
    pool: Executor,
    updates: Sequence[Update],
    start: Tiles,
    schema: Schema,
    *,
    settings: MergeSettings,
    scaling: float,
) -> tuple[UpdateMeasure, ...]:
    trim, fisher = settings.parameters.trim, RULES[settings.rule].needs_fisher

    def tensor(update: Update, spec: TensorSpec) -> TensorMeasure:
        return measure_tensor(update, spec, trim=trim, fisher=fisher)

    def change(update: Update, pair: tuple[TensorSpec, TensorSpec]) -> float:
        return lora.change_square_sum(lora.read_factors(start, *pair), lora.read_factors(update, *pair))

    pairs = _pairs(schema)
    tensors = [[pool.submit(tensor, update, spec) for spec in schema.tensors] for update in updates]
    changes = [[pool.submit(change, update, pair) for pair in pairs] for update in updates]
    return tuple(
        update_measure(
            schema, [job.result() for job in own], [job.result() for job in moved], scaling=scaling
        )
        for own, moved in zip(tensors, changes, strict=True)
    )


def _tiles(
    schema: Schema, without: Sequence[tuple[TensorSpec, TensorSpec]], tile_elements: int
) -> list[tuple[str, int, int]]:
    merged_elsewhere = {spec.name for pair in without for spec in pair}
    return [
        (spec.name, start, stop)
        for spec in schema.tensors
        if spec.name not in merged_elsewhere
        for start, stop in spans(spec.size, tile_elements)
    ]


def _survey(pool: Executor, round_: _Round, tiles: Sequence[tuple[str, int, int]]) -> int:
    survey = round_.rule.survey
    if not round_.parameters.surveys or survey is None:
        return 0
    return sum(pool.map(lambda tile: survey(round_.movements(*tile)), tiles))


def _report(
    round_: _Round, space: LoraSpace | None, layers: Sequence[lora.Recompressed], times: Sequence[float]
) -> MergeReport:
    lost = math.fsum(layer.lost_square_sum for layer in layers)
    total = math.fsum(layer.total_square_sum for layer in layers)
    return MergeReport(
        rule=round_.rule.name,
        lora=space,
        contributions=tuple(_contribution(each) for each in round_.contributors),
        truncation_error=math.sqrt(lost / total) if total else 0.0,
        seconds=dict(zip(("measure", "survey", "merge"), np.diff(times).tolist(), strict=True)),
    )


def _contribution(contributor: _Contributor) -> Contribution:
    return Contribution(
        worker_id=contributor.update.worker_id,
        task_id=contributor.update.task_id,
        weight=contributor.weight,
        clip_factor=contributor.clip,
        change_norm=contributor.measure.change_norm,
        parameter_norm=contributor.measure.parameter_norm,
        kept=contributor.measure.kept,
    )
