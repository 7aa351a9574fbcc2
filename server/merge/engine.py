"""The merge of one round of one module: measure, clip, rule, outer step.

A coordinate-wise rule needs O(W × tile) memory a thread, and tiles are the shorter the more updates there
are: memory does not grow with their number. While a trim threshold is looked for, a thread holds the elements of
one tensor that it may be, a sixteenth at most; ``lora = "exact"`` holds one layer's factors of all workers. Rules
of a wider scope (``whole``) hold a few float64 copies of one tensor, KnOTS one of every update, and of LoRA
(W + 1) r rows of it.

Legend: W = updates, T = elements of a tile, S = slots of the outer optimiser.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from weft.common.errors import EngineFailed
from weft.common.modules import Schema, TensorSpec
from weft.server.merge import lora, nested, rescale
from weft.server.merge.crew import ALONE, Crew, Threads, map_batches
from weft.server.merge.lora import Pair, pairs_of
from weft.server.merge.measuring import Contribution, contribution_of, contributors_of, in_order
from weft.server.merge.movements import Contributor, Movements
from weft.server.merge.rule import Merged, MergeRule, Otherwise, Scope
from weft.server.merge.rules import RULES
from weft.server.merge.selection import BLOCK_ELEMENTS
from weft.server.merge.settings import Clip, LoraSpace, MergeSettings, Rescale, RuleParameters
from weft.server.merge.spaces import lora_space
from weft.server.merge.tiles import OWN, WORKING_ELEMENTS, Float64, InputGrams, Sink, Tiles, Update, spans
from weft.server.merge.whole import Whole
from weft.server.outer import STEP, OuterSettings, first_slots, outer_step, slot_name

_GRAM_ELEMENTS: Final = 1 << 20
"""Inner products are summed over stretches of this length, whatever the number of threads."""
Tile: TypeAlias = tuple[TensorSpec, int, int]
"""A tensor, first element, one past the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterState:
    """What the outer optimiser keeps between rounds, laid out as ``weft.server.outer.outer_schema`` says."""

    before: Tiles | None
    """What the last round left; None in the first."""
    after: Sink
    """Where this round's goes; it counts once the version is published."""


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
class _Movement:
    """The merged movement of a tile."""

    values: Merged
    owned: npt.NDArray[np.bool_] | None
    """Which elements any update has; None: all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """Everything that the merge of a tile or a layer needs to know."""

    contributors: tuple[Contributor, ...]
    rule: MergeRule[Any]
    parameters: RuleParameters
    start: Tiles
    sink: Sink
    outer: OuterSettings
    outer_state: OuterState | None
    rounds: int
    """Rounds of the outer optimiser before this one."""
    input_grams: InputGrams | None
    """For rules that need them."""

    @property
    def weights(self) -> Float64:
        return np.array([each.weight for each in self.contributors])

    def movements(self, spec: TensorSpec, start: int, stop: int) -> Movements:
        return Movements(self.contributors, spec, start, stop, self.weights, OWN.scratch)

    def combine(self, tile: Tile, factors_W: Float64, merge: Callable[[Movements], Merged]) -> _Movement:
        """``merge`` of every part of a tile that the same updates own."""
        parts = self.movements(*tile).parts(factors_W)
        if len(parts) == 1 and parts[0].elements is None:
            return _Movement(merge(parts[0]), None)
        merged_T, owned_T = np.zeros(_length(tile)), np.zeros(_length(tile), np.bool_)
        for part in parts:
            merged_T[part.elements] = merge(part)
            owned_T[part.elements] = True
        return _Movement(merged_T, owned_T)

    def movement(self, tile: Tile, factors_W: Float64, *, survey: int) -> _Movement:
        """The merged movement of a tile."""
        return self.combine(tile, factors_W, lambda part: self.rule.merge(part, survey, self.parameters))

    def survey_tile(self, tile: Tile, factors_W: Float64) -> tuple[int, Otherwise | None]:
        """Count in a tile and write it as if the sum of all counts were positive; say where that matters."""
        survey, counts, others = self.rule.survey, list[int](), list[Otherwise]()
        assert survey is not None  # noqa: S101

        def count(part: Movements) -> Merged:
            found, merged_T, otherwise = survey(part, self.parameters)
            counts.append(found)
            if otherwise is not None:
                others.append(otherwise if part.elements is None else Otherwise(None))
            return merged_T

        self.write(tile, self.combine(tile, factors_W, count))
        return sum(counts), others[0] if others else None

    def rewrite(self, tile: Tile, changes: Mapping[int, float]) -> None:
        """Write single elements of a tile again, with another movement."""
        spec, start, _ = tile
        for place, value in changes.items():
            moved = _Movement(np.array([value], np.float32), None)
            self.write((spec, start + place, start + place + 1), moved)

    def write(self, tile: Tile, moved: _Movement) -> None:
        """Write a tile of the next version, and of the next outer state."""
        spec, start, stop = tile
        if self.outer_state is None:  # a plain step
            step_T = moved.values
            if self.outer.rate != 1:
                step_T = np.multiply(step_T, self.outer.rate, out=step_T)
        else:
            step_T = self._step(self.outer_state, tile, moved)
        version_T = OWN.scratch.take("version", stop - start, step_T.dtype.type)
        np.add(self.start.tile(spec.name, start, stop), step_T, out=version_T)
        self.sink.write(spec.name, start, version_T.astype(np.float32, copy=False))

    def _step(self, state: OuterState, tile: Tile, moved: _Movement) -> Float64:
        spec, start, stop = tile
        names = [slot_name(slot, spec.name) for slot in range(self.outer.num_slots)]
        if state.before is None:
            slots_ST = first_slots(self.outer, stop - start)
        else:
            slots_ST = np.array([state.before.tile(name, start, stop) for name in names], np.float64)
        movement_T = moved.values.astype(np.float64)
        step_T, next_ST = outer_step(movement_T, slots_ST, self.outer, rounds=self.rounds)
        if moved.owned is not None:
            step_T = np.where(moved.owned, step_T, 0.0)
            next_ST = np.where(moved.owned, next_ST, slots_ST)
        for name, values_T in zip(names, next_ST, strict=True):
            state.after.write(name, start, values_T.astype(np.float32))
        return step_T

    def merge_whole(self, spec: TensorSpec) -> None:
        """Write the next version of a tensor that the rule has to see whole."""

        def read(place: int) -> torch.Tensor:
            contributor = self.contributors[place]
            movement = lora.read_tensor(
                lambda start, stop: contributor.tile(spec, start, stop, OWN.scratch), spec
            )
            return movement.mul_(contributor.clip)

        moved = self._merge_whole(spec.name, spec.shape, read, rank_max=None)
        values = moved.reshape(-1).numpy()
        for start, stop in spans(spec.size, BLOCK_ELEMENTS):
            self.write((spec, start, stop), _Movement(values[start:stop], None))

    def merge_whole_layer(self, pair: Pair) -> lora.Recompressed:
        """Write the next version of a layer's LoRA factors, for a rule that has to see ΔW."""
        start, movements = self.layer(pair)
        changes = lora.Changes.of(start, movements)

        def read(place: int) -> torch.Tensor:
            return changes.in_basis(place).mul_(self.contributors[place].clip)

        rank = pair[0].shape[0]
        moved_mi = self._merge_whole(pair[0].name, changes.shape, read, rank_max=rank)
        shares = [self.outer.rate * each.weight * each.clip for each in self.contributors]
        done = changes.apply(self.outer.rate * moved_mi, shares)
        self.write_layer(pair, done.factors)
        return done

    def _merge_whole(
        self, name: str, shape: tuple[int, ...], read: Callable[[int], torch.Tensor], *, rank_max: int | None
    ) -> torch.Tensor:
        def gram(place: int) -> torch.Tensor | None:
            return None if self.input_grams is None else self._input_gram(place, name, shape[1])

        whole = Whole(weights=self.weights, shape=shape, read=read, gram=gram, rank_max=rank_max)
        assert self.rule.whole is not None  # noqa: S101
        return self.rule.whole(whole, self.parameters)

    def _input_gram(self, place: int, name: str, size: int) -> torch.Tensor | None:
        assert self.input_grams is not None  # noqa: S101
        update = self.contributors[place].update
        gram = self.input_grams(update, name)
        if gram is None:
            return None
        if gram.shape != (size, size) or not np.isfinite(gram).all():
            raise EngineFailed(
                f"the Gram of {update.worker_id} for {name} is {list(gram.shape)}, or not finite",
                hint=f"it has to be {size} × {size}: XᵀX of the layer's inputs, divided by their number",
            )
        return torch.from_numpy(gram.astype(np.float64))

    def layer(self, pair: Pair) -> tuple[lora.Factors, list[lora.Factors]]:
        """A layer's start and the movement of each update, of its own rank."""
        own = [tuple(each.specs[spec.name] for spec in pair) for each in self.contributors]
        movements = [
            lora.read_factors(each.update, *specs) for each, specs in zip(self.contributors, own, strict=True)
        ]
        return lora.read_factors(self.start, *pair), movements

    def coefficients(self, pair: Pair, factors_W: Float64) -> list[torch.Tensor]:
        """What multiplies the rank slices of each update's change of ΔW, float64 [its rank]."""
        assert self.rule.linear is not None  # noqa: S101
        ranks = np.array([each.specs[pair[0].name].shape[0] for each in self.contributors])
        owners_r = [int((ranks > rank).sum()) for rank in range(ranks.max())]
        multiple_r = np.array([self.rule.linear(count, self.parameters) for count in owners_r])
        shares = [
            share_r * multiple_r[: len(share_r)]
            for share_r in nested.shares(self.weights.tolist(), ranks.tolist())
        ]
        return [
            torch.from_numpy(share_r * (each.clip * factor))
            for share_r, each, factor in zip(shares, self.contributors, factors_W.tolist(), strict=True)
        ]

    def merge_pair(self, pair: Pair, factors_W: Float64) -> tuple[float, float]:
        """Write the next version of a layer's LoRA factors; say what that lost, ‖ΔW − B A‖², and of what, ‖ΔW‖²."""
        tile = self.rule.scope is Scope.TILE
        done = self.merge_layer(pair, factors_W) if tile else self.merge_whole_layer(pair)
        return done.lost_square_sum, done.total_square_sum

    def merge_layer(self, pair: Pair, factors_W: Float64) -> lora.Recompressed:
        """Write the next version of a layer's LoRA factors, merged as ΔW."""
        start, movements = self.layer(pair)
        coefficients = self.coefficients(pair, self.outer.rate * factors_W)
        done = lora.merge_pair(start, movements, coefficients)
        self.write_layer(pair, done.factors)
        return done

    def write_layer(self, pair: Pair, factors: lora.Factors) -> None:
        """Write a layer's LoRA factors."""
        for spec, factor in zip(pair, (factors.A_ri, factors.B_or), strict=True):
            self.sink.write(spec.name, 0, factor.reshape(-1).numpy().astype(np.float32))


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
    num_paths: int = 1,
    input_grams: InputGrams | None = None,
    norms: bool = True,
    tile_elements: int | None = None,
    crew: Crew = ALONE,
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
        outer_state: Given exactly when ``outer.num_slots`` is not 0.
        scaling: ΔW = scaling · B A; weighs LoRA layers against others in the norm.
        num_paths: How many different paths the updates are from; for ``rescale = "sqrt_paths"``.
        input_grams: Second moments of the inputs of each layer; for rules that need them.
        norms: Measure norms for the report even where neither clipping nor rescaling asks for them.
        tile_elements: Length of a tile: speed and memory, not the result. Unset: what the rule runs best with.
        crew: Who shares tiles and layers: speed and memory, not the result.
        clock: Seconds, for the report.

    Raises:
        EngineFailed: There are no updates, none has a weight, or the rule cannot do with what they bring.
        UsageError: The settings cannot be combined (``lora_space``).
        ValueError: An update appears twice, a weight is negative, or ``outer_state`` does not fit ``outer``.
    """
    ordered = in_order(updates)
    space = lora_space(settings, outer) if schema.lora_pairs else None
    rule = RULES[settings.rule]
    if rule.needs_grams and input_grams is None:
        raise EngineFailed(f"rule {rule.name} needs Grams of the inputs of each layer, and there are none")
    _check_state(outer, outer_state)
    measured = norms or settings.clip is not Clip.NONE or settings.rescale is Rescale.RDA
    times = [clock()]
    round_ = _Round(
        contributors=contributors_of(
            crew, ordered, start, schema, settings=settings, scaling=scaling, norms=measured
        ),
        rule=rule,
        parameters=settings.parameters,
        start=start,
        sink=sink,
        outer=outer,
        outer_state=outer_state,
        rounds=_rounds(outer_state),
        input_grams=input_grams if rule.needs_grams else None,
    )
    times.append(clock())
    pairs = pairs_of(schema) if space is LoraSpace.EXACT else []
    whole = _seen_whole(round_, schema, pairs)
    tiles = _tiles(schema, pairs, tile_elements or _tile_elements(round_, crew))
    tiles = [tile for tile in tiles if tile[0] not in whole]
    factors = _factors(crew, round_, schema, pairs, settings=settings, num_paths=num_paths)
    survey, tiles = _survey(crew, round_, tiles, factors)
    times.append(clock())
    losses = crew.map(lambda pair: round_.merge_pair(pair, factors[pair[0].name]), pairs)
    map_batches(crew, whole, round_.merge_whole, lambda spec: spec.size)

    def merge_tile(tile: Tile) -> None:
        round_.write(tile, round_.movement(tile, factors[tile[0].name], survey=survey))

    map_batches(crew, tiles, merge_tile, _length)
    times.append(clock())
    if outer_state is not None:
        outer_state.after.write(STEP, 0, np.array([round_.rounds + 1], np.float32))
    return _report(round_, space, losses, times, norms=measured)


def _seen_whole(round_: _Round, schema: Schema, pairs: Sequence[Pair]) -> list[TensorSpec]:
    """Tensors that the rule cannot merge tile by tile."""
    merged_elsewhere = {spec for pair in pairs for spec in pair}
    found = [
        spec for spec in schema.tensors if spec not in merged_elsewhere and _is_whole(spec, round_.rule.scope)
    ]
    if found:
        _check_ranks(round_, found)
    return found


def _is_whole(spec: TensorSpec, scope: Scope) -> bool:
    if scope is Scope.MATRIX:
        return len(spec.shape) == 2
    return scope is Scope.TENSOR and spec.size > 1


def _check_ranks(round_: _Round, specs: Sequence[TensorSpec]) -> None:
    """Raise EngineFailed where updates have tensors of different ranks."""
    shapes = {tuple(each.specs[spec.name].shape for spec in specs) for each in round_.contributors}
    if len(shapes) > 1:
        raise EngineFailed(
            f"updates of different ranks cannot be merged by {round_.rule.name}",
            hint='set merge.rule = "mean", or give all workers the same rank',
        )


def _check_state(outer: OuterSettings, outer_state: OuterState | None) -> None:
    if outer.num_slots and outer_state is None:
        raise ValueError(f"outer optimiser {outer.name} keeps a state and needs outer_state")
    if outer_state is not None and not outer.num_slots:
        raise ValueError(f"outer optimiser {outer.name} keeps no state: leave outer_state out")


def _rounds(outer_state: OuterState | None) -> int:
    if outer_state is None or outer_state.before is None:
        return 0
    return int(outer_state.before.tile(STEP, 0, 1)[0])


def _length(tile: Tile) -> int:
    return tile[2] - tile[1]


def _tile_elements(round_: _Round, crew: Crew) -> int:
    if round_.rule.row_by_row:
        # What an election keeps of each element fits a core's cache where tiles are half as long; but threads wait
        # for the interpreter between tiles.
        waits = isinstance(crew, Threads) and crew.size > 1
        return BLOCK_ELEMENTS if waits or round_.rule.survey is None else BLOCK_ELEMENTS // 2
    return max(1024, WORKING_ELEMENTS // len(round_.contributors))


def _tiles(schema: Schema, without: Sequence[Pair], tile_elements: int) -> list[Tile]:
    merged_elsewhere = {spec.name for pair in without for spec in pair}
    return [
        (spec, start, stop)
        for spec in schema.tensors
        if spec.name not in merged_elsewhere
        for start, stop in spans(spec.size, tile_elements)
    ]


def _survey(
    crew: Crew, round_: _Round, tiles: list[Tile], factors: Mapping[str, Float64]
) -> tuple[int, list[Tile]]:
    """What the rule counts over the module, and the tiles to be merged by that; all where it does not count."""
    if not round_.parameters.surveys or round_.rule.survey is None:
        return 0, tiles
    done = map_batches(crew, tiles, lambda tile: round_.survey_tile(tile, factors[tile[0].name]), _length)
    total = sum(count for count, _ in done)
    if total > 0:  # they were written as if it were
        return total, []
    others = [(tile, other) for tile, (_, other) in zip(tiles, done, strict=True) if other is not None]
    few = [(tile, other.changes) for tile, other in others if other.changes is not None]
    crew.map(lambda job: round_.rewrite(*job), few)
    return total, [tile for tile, other in others if other.changes is None]


def _factors(
    crew: Crew,
    round_: _Round,
    schema: Schema,
    pairs: Sequence[Pair],
    *,
    settings: MergeSettings,
    num_paths: int,
) -> dict[str, Float64]:
    """What ``merge.rescale``, or the rule's own choice, multiplies weights with, by tensor.

    For a layer merged as ΔW that is under the name of its A.
    """
    factor = math.sqrt(num_paths) if settings.rescale is Rescale.SQRT_PATHS else 1.0
    factors = {spec.name: np.full(len(round_.contributors), factor) for spec in schema.tensors}
    if round_.rule.choose is not None:
        grams = _grams(crew, round_, schema, pairs)
        chosen = round_.rule.choose(grams, round_.weights, round_.parameters)
        return factors | {name: weights_W / round_.weights for name, weights_W in chosen.items()}
    if settings.rescale is not Rescale.RDA:
        return factors

    def tensor(tile: Tile, units_W: Float64) -> float:
        return float(np.square(round_.movement(tile, units_W, survey=0).values, dtype=np.float64).sum())

    def layer(pair: Pair, units_W: Float64) -> float:
        return lora.combined_square_sum(*round_.layer(pair), round_.coefficients(pair, units_W))

    norms = {spec.name: rescale.tensor_norms(round_.contributors, spec.name) for spec in schema.tensors}
    norms |= {a.name: rescale.layer_norms(round_.contributors, (a.name, b.name)) for a, b in pairs}
    units = {name: rescale.units(norms_W) for name, norms_W in norms.items()}
    tiles = _tiles(schema, pairs, BLOCK_ELEMENTS)
    square_sums = dict(
        zip(
            (a.name for a, _ in pairs),
            crew.map(lambda pair: [layer(pair, units[pair[0].name])], pairs),
            strict=True,
        )
    )
    parts = map_batches(crew, tiles, lambda tile: tensor(tile, units[tile[0].name]), _length)
    for (spec, _, _), part in zip(tiles, parts, strict=True):
        square_sums.setdefault(spec.name, []).append(part)
    for name, own in square_sums.items():
        factors[name] = rescale.directional(round_.weights, norms[name], math.fsum(own))
    return factors


def _grams(crew: Crew, round_: _Round, schema: Schema, pairs: Sequence[Pair]) -> dict[str, Float64]:
    """Inner products of the clipped movements, tensor by tensor, of ΔW for layers merged as such."""
    _check_ranks(round_, schema.tensors)
    clips_W = np.array([each.clip for each in round_.contributors])

    length = max(1024, WORKING_ELEMENTS // len(clips_W))

    def tensor(tile: Tile) -> Float64:
        spec, start, stop = tile
        total_WW = np.zeros((len(clips_W), len(clips_W)))
        for at in range(start, stop, length):
            stack_WT = round_.movements(spec, at, min(at + length, stop)).stack()
            total_WW += stack_WT @ stack_WT.T
        return total_WW

    def layer(pair: Pair) -> Float64:
        return lora.change_gram(*round_.layer(pair)).numpy() * np.outer(clips_W, clips_W)

    tiles = _tiles(schema, pairs, _GRAM_ELEMENTS)
    grams = dict(zip((a.name for a, _ in pairs), crew.map(layer, pairs), strict=True))
    for (spec, _, _), gram_WW in zip(tiles, map_batches(crew, tiles, tensor, _length), strict=True):
        grams[spec.name] = grams[spec.name] + gram_WW if spec.name in grams else gram_WW
    return grams


def _report(
    round_: _Round,
    space: LoraSpace | None,
    losses: Sequence[tuple[float, float]],
    times: Sequence[float],
    *,
    norms: bool,
) -> MergeReport:
    lost, total = (math.fsum(each) for each in zip((0.0, 0.0), *losses, strict=True))
    return MergeReport(
        rule=round_.rule.name,
        lora=space,
        contributions=tuple(contribution_of(each, norms=norms) for each in round_.contributors),
        truncation_error=math.sqrt(lost / total) if total else 0.0,
        seconds=dict(zip(("measure", "survey", "merge"), np.diff(times).tolist(), strict=True)),
    )
