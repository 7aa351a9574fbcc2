"""The pieces that a merge is made of: each is merged whole, and done once.

Legend: T = elements of a tile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, Self

import numpy as np
import numpy.typing as npt

from weft.common.errors import ComputeError, UsageError
from weft.common.modules import Schema, TensorSpec
from weft.server.merge.crew import Crew
from weft.server.merge.engine import MergeReport, merge_module
from weft.server.merge.masks import dropped, dropped_by_rank
from weft.server.merge.rules import RULES
from weft.server.merge.settings import Clip, Trim
from weft.server.merge.statistics import Cut, find_cut
from weft.server.merge.tiles import OWN, Float32, Sink, Tiles, Update, spans
from weft.server.offline.recipe import Choice, Drop, Thinning
from weft.server.offline.sources import (
    Movement,
    Recent,
    Thin,
    Thinned,
    Weights,
    Zeros,
    is_finite,
    not_finite,
)
from weft.server.outer import OuterSettings


class Store(Sink, Protocol):
    """Where results go: float32 that is rounded, or elements as they are."""

    def store(self, name: str, start: int, stored: npt.NDArray[Any]) -> None:
        """Store elements that have the dtype of the file already."""
        ...


@dataclass(frozen=True, slots=True)
class Loss:
    """What recompression to a rank cost."""

    lost_square_sum: float = 0.0
    """‖ΔW − B A‖²."""
    total_square_sum: float = 0.0
    """‖ΔW‖²."""


class Unit(Protocol):
    """A piece of a merge."""

    @property
    def name(self) -> str:
        """What the journal calls it."""
        ...

    @property
    def outputs(self) -> tuple[str, ...]:
        """Tensors of the result that it writes, all of each."""
        ...

    @property
    def reads(self) -> tuple[tuple[str, Weights, str], ...]:
        """(input, its tensors, name of one) of all that it reads."""
        ...

    @property
    def num_elements(self) -> int:
        """Elements that it merges, of one input: what its time is in proportion to."""
        ...

    @property
    def splits(self) -> bool:
        """Whether processes can share it: then all that its jobs write goes to the store."""
        ...

    def merge(self, store: Store, crew: Crew) -> Loss:
        """Write every element of its outputs."""
        ...

    def sample(self, num_elements: int) -> Unit:
        """A unit that merges a part of it, of about so many elements, to see how long it takes."""
        ...


class Undivided:
    """A unit that is one job, such as a layer of an adapter."""

    __slots__ = ()

    def sample(self, num_elements: int) -> Self:
        """All of it."""
        return self

    @property
    def splits(self) -> bool:
        """No."""
        return False


@dataclass(frozen=True, slots=True)
class Source:
    """An input, as units read it."""

    label: str
    """What it is called."""
    weights: Weights
    """Its tensors."""
    names: Mapping[str, str]
    """Its names for tensors where they differ from the result's."""

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """Elements ``start:stop`` of a tensor by the result's name, float32 [T]."""
        return self.weights.tile(self.names.get(name, name), start, stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """Tensors merged coordinate by coordinate, or weighed by their distances: one call of the engine."""

    name: str
    """Its first tensor's."""
    specs: tuple[TensorSpec, ...]
    """What is merged, by the result's names."""
    sources: tuple[Source, ...]
    """The inputs."""
    base: Source | None
    """What movements are measured from; None: whole weights are merged."""
    onto: Source | None
    """What the merged movement is added to; None: to zero."""
    choice: Choice
    """How."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return tuple(spec.name for spec in self.specs)

    @property
    def num_elements(self) -> int:
        """Of all its tensors."""
        return sum(spec.size for spec in self.specs)

    @property
    def reads(self) -> tuple[tuple[str, Weights, str], ...]:
        """Its tensors, in every input that counts, the base, and what they are added to."""
        counting = (each for each, weight in zip(self.sources, self.choice.weights, strict=True) if weight)
        read = [*counting, *(each for each in (self.base, self.onto) if each is not None)]
        unique = {source.label: source for source in read}
        return tuple(
            (label, source.weights, source.names.get(spec.name, spec.name))
            for label, source in unique.items()
            for spec in self.specs
        )

    @property
    def splits(self) -> bool:
        """It is merged tile by tile, straight into the store."""
        return True

    def merge(self, store: Store, crew: Crew) -> Loss:
        """Write every element of its tensors."""
        base = _recent(self.base)
        if self.onto is None:
            start: Tiles = Zeros()
        else:
            start = base if base is not None and self.onto is self.base else Recent(self.onto)
        if not any(self.choice.weights):
            return copy_start(self.specs, start, store)
        movements = [
            Movement(source, label=source.label, place=place, weight=weight, base=base, checked=self._checks)
            for place, (source, weight) in enumerate(zip(self.sources, self.choice.weights, strict=True))
        ]
        try:
            merge_coordinates(movements, start, Schema(self.specs), store, choice=self.choice, crew=crew)
        except ComputeError:
            self._check_inputs()
            raise
        return Loss()

    @property
    def _checks(self) -> bool:
        """Whether NaN could get lost on the way; else it shows in the result, which is checked."""
        settings = self.choice.settings
        rule = RULES[settings.rule]
        weighed = rule.choose is not None or settings.clip is not Clip.NONE
        return not rule.keeps_nan or weighed or self.choice.thinnings is not None

    def _check_inputs(self) -> None:
        """Say which input is not finite, if one is not: the result is not."""
        for source, weight in zip(self.sources, self.choice.weights, strict=True):
            for spec in self.specs if weight else ():
                for begin, stop in spans(spec.size, _COPY_ELEMENTS):
                    values = source.tile(spec.name, begin, stop)
                    if not is_finite(values):
                        raise not_finite(source.label, spec.name, begin, values)

    def sample(self, num_elements: int) -> Unit:
        """The first rows of its largest tensor."""
        largest = max(self.specs, key=lambda spec: spec.size)
        shape = largest.shape
        if largest.size > num_elements and shape:
            rows = max(1, num_elements * shape[0] // largest.size)
            shape = (rows, *shape[1:])
        return dataclasses.replace(self, specs=(TensorSpec(largest.name, "F32", shape),))


def merge_coordinates(
    updates: Sequence[Update],
    start: Tiles,
    schema: Schema,
    sink: Sink,
    *,
    choice: Choice,
    crew: Crew,
) -> MergeReport:
    """Merge movements with the engine; a choice's own thinnings come first."""
    if choice.thinnings is not None:
        updates = _thinned(updates, choice.thinnings, schema, crew)
    return merge_module(
        updates,
        start,
        schema,
        sink,
        settings=choice.settings,
        outer=OuterSettings(learning_rate=choice.multiple),
        input_grams=choice.input_grams,
        norms=False,
        crew=crew,
    )


def _recent(source: Source | None) -> Recent | None:
    return None if source is None else Recent(source)


def _thinned(
    updates: Sequence[Update], thinnings: Sequence[Thinning], schema: Schema, crew: Crew
) -> list[Update]:
    """Each update as its own thinning leaves it, with thresholds found."""
    trims = [
        (update, spec, thinning)
        for update, thinning in zip(updates, thinnings, strict=True)
        if isinstance(thinning, Trim)
        for spec in schema.tensors
    ]
    cuts = iter(crew.map(lambda job: _cut(*job), trims))
    thinned: list[Update] = []
    for update, thinning in zip(updates, thinnings, strict=True):
        thins: dict[str, Thin] = {}
        for spec in schema.tensors if thinning is not None else ():
            thins[spec.name] = (
                _chance(update, spec, thinning) if isinstance(thinning, Drop) else _largest(next(cuts))
            )
        thinned.append(Thinned(update, thins))
    return thinned


def _cut(update: Update, spec: TensorSpec, trim: Trim) -> Cut:
    return find_cut(partial(update.tile, spec.name), spec.size, trim, OWN.scratch)[0]


def _largest(cut: Cut) -> Thin:
    return lambda values, start: cut.apply(values, start, OWN.scratch)


def _chance(update: Update, spec: TensorSpec, drop: Drop) -> Thin:
    read = partial(update.tile, spec.name)

    def thin(values: Float32, start: int) -> Float32:
        if drop.spread is None:
            return dropped(update, spec, start, values, OWN.scratch, density=drop.density, seed=drop.seed)
        chances = {"density": drop.density, "spread": drop.spread}
        return dropped_by_rank(update, spec, start, values, read, **chances, seed=drop.seed)

    return thin


def copy_start(specs: Sequence[TensorSpec], start: Tiles, sink: Sink) -> Loss:
    """Write what movements would be added to, where none counts."""
    for spec in specs:
        for first, stop in spans(spec.size, _COPY_ELEMENTS):
            sink.write(spec.name, first, np.array(start.tile(spec.name, first, stop)))
    return Loss()


_COPY_ELEMENTS: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """A tensor that is the same in every input, such as an integer buffer."""

    name: str
    """In the result."""
    sources: tuple[Source, ...]
    """All that hold it."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Itself."""
        return (self.name,)

    @property
    def num_elements(self) -> int:
        """Of the tensor: they are copied."""
        return self.sources[0].weights.specs[self.name].size

    @property
    def reads(self) -> tuple[tuple[str, Weights, str], ...]:
        """It, in every input."""
        return tuple((source.label, source.weights, self.name) for source in self.sources)

    @property
    def splits(self) -> bool:
        """It is one job."""
        return False

    def merge(self, store: Store, crew: Crew) -> Loss:
        """Write it as it is."""
        store.store(self.name, 0, self.sources[0].weights.raw(self.name))
        return Loss()

    def sample(self, num_elements: int) -> Unit:
        """Itself."""
        return self


def refuse_device(device: str, rule: str) -> None:
    """Raise UsageError unless the device is the CPU, where coordinate-wise rules run."""
    if device != "cpu":
        raise UsageError(
            f"rule {rule} on these inputs runs on the CPU; {device} is for adapters as exact, stack or dense",
            hint="remove --device",
        )
