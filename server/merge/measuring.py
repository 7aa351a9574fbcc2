"""What is known of updates before the rule: measured, weighed, clipped, in the order that they are merged in."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from weft.common.errors import EngineFailed
from weft.common.modules import Schema, TensorSpec
from weft.server.merge import lora
from weft.server.merge.crew import ALONE, Crew, map_batches
from weft.server.merge.lora import Pair, pairs_of
from weft.server.merge.movements import Contributor
from weft.server.merge.rules import RULES
from weft.server.merge.settings import MergeSettings, Rescale
from weft.server.merge.statistics import (
    TensorMeasure,
    UpdateMeasure,
    clip_factors,
    is_norm_enough,
    measure_tensor,
    normalised_weights,
    update_measure,
)
from weft.server.merge.tiles import OWN, Tiles, Update


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
    change_norm: float | None
    """Norm of the movement of what the module computes, before clipping; None when it was not measured."""
    parameter_norm: float | None
    """Norm of the movement of its parameters, before clipping; None when it was not measured."""
    kept: float | None
    """Share of its elements that are not zero after trimming; None when nobody counted."""


def contributors_of(
    crew: Crew,
    updates: Sequence[Update],
    start: Tiles,
    schema: Schema,
    *,
    settings: MergeSettings,
    scaling: float,
    norms: bool,
) -> tuple[Contributor, ...]:
    """Updates ``in_order`` as the rule meets them; the other arguments are those of ``merge_module``."""
    schemas = [schema if each.rank is None else schema.at_rank(each.rank) for each in updates]
    measures = _measure(
        crew, updates, start, schema, schemas, settings=settings, scaling=scaling, norms=norms
    )
    weights = normalised_weights([update.weight for update in updates], settings)
    clips = clip_factors(measures, settings)
    specs = [{spec.name: spec for spec in each.tensors} for each in schemas]
    return tuple(Contributor(*row) for row in zip(updates, measures, weights, clips, specs, strict=True))


def measure_updates(
    updates: Sequence[Update],
    start: Tiles,
    schema: Schema,
    *,
    settings: MergeSettings,
    scaling: float = 1.0,
    crew: Crew = ALONE,
) -> tuple[tuple[Contributor, ...], tuple[Contribution, ...]]:
    """What a merge knows of its updates before the rule, sorted as it merges them, and how it reports them.

    The arguments are those of ``merge_module``, which raises the same errors.
    """
    contributors = contributors_of(
        crew, in_order(updates), start, schema, settings=settings, scaling=scaling, norms=True
    )
    return contributors, tuple(contribution_of(each, norms=True) for each in contributors)


def in_order(updates: Sequence[Update]) -> tuple[Update, ...]:
    """Those with a weight, in the one order that they are added up in, whatever order they came in."""
    counting = (update for update in updates if update.weight != 0)
    ordered = tuple(sorted(counting, key=lambda update: (update.worker_id, update.task_id)))
    if not ordered:
        raise EngineFailed(f"{len(updates)} updates, none with a weight: there is nothing to merge")
    if len({(update.worker_id, update.task_id) for update in ordered}) < len(ordered):
        raise ValueError("an update appears twice")
    return ordered


def _measure(
    crew: Crew,
    updates: Sequence[Update],
    start: Tiles,
    schema: Schema,
    schemas: Sequence[Schema],
    *,
    settings: MergeSettings,
    scaling: float,
    norms: bool,
) -> tuple[UpdateMeasure, ...]:
    trim, fisher = settings.parameters.trim, RULES[settings.rule].needs_fisher
    # What was measured when an update came in spares a pass over it now.
    knows = settings.rescale is not Rescale.RDA and is_norm_enough(schema)
    known = [each.norm if knows else None for each in updates]

    def tensor(job: tuple[int, TensorSpec]) -> TensorMeasure:
        index, spec = job
        unknown = norms and known[index] is None
        return measure_tensor(updates[index], spec, OWN.scratch, trim=trim, fisher=fisher, norms=unknown)

    def changes(pair: Pair) -> list[float]:
        at = {name: index for index, (name, _) in enumerate(schema.lora_pairs)}[pair[0].name]
        moved = (
            lora.read_factors(each, *pairs_of(of)[at]) for each, of in zip(updates, schemas, strict=True)
        )
        return lora.change_square_sums(lora.read_factors(start, *pair), moved)

    jobs = [(index, spec) for index, of in enumerate(schemas) for spec in of.tensors]
    measures = iter(map_batches(crew, jobs, tensor, lambda job: job[1].size))
    layers = crew.map(changes, pairs_of(schema)) if norms else []
    moved = zip(*layers, strict=True) if layers else itertools.repeat((0.0,) * len(schema.lora_pairs))
    return tuple(
        update_measure(of, [next(measures) for _ in of.tensors], each, scaling=scaling, norm=norm)
        for of, norm, each in zip(schemas, known, moved, strict=False)
    )


def contribution_of(contributor: Contributor, *, norms: bool) -> Contribution:
    """As it is reported."""
    measure = contributor.measure
    return Contribution(
        worker_id=contributor.update.worker_id,
        task_id=contributor.update.task_id,
        weight=contributor.weight,
        clip_factor=contributor.clip,
        change_norm=measure.change_norm if norms else None,
        parameter_norm=measure.parameter_norm if norms else None,
        kept=measure.kept,
    )
