"""What a merge rule sees of the updates: one tile of each, clipped and trimmed.

Legend: W = updates, T = elements of a tile, n = elements of a sparse tile that are not zero.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from weft.common.modules import TensorSpec
from weft.server.merge import loops, nested
from weft.server.merge.statistics import Stretch, UpdateMeasure, trimmed, whole
from weft.server.merge.tiles import Float32, Float64, Indices, Scratch, Update


@dataclass(frozen=True, slots=True)
class Contributor:
    """An update and what it counts for."""

    update: Update
    measure: UpdateMeasure
    weight: float
    """Bounded and normalised."""
    clip: float
    """What it is multiplied by, at most 1."""
    specs: Mapping[str, TensorSpec]
    """Its own tensors: the module's, or nested slices of them."""

    def tile(self, spec: TensorSpec, start: int, stop: int, scratch: Scratch) -> Float32:
        """Elements of the module's tensor, trimmed, zero where the update has none."""
        cut = self.measure.cuts[spec.name]

        def read(begin: int, end: int) -> Float32:
            values = self.update.tile(spec.name, begin, end)
            return values if cut is None else cut.apply(values, begin, scratch)

        return nested.pad(spec, self.specs[spec.name], start, stop, read)

    def fisher_tile(self, spec: TensorSpec, start: int, stop: int) -> Float32:
        """The diagonal Fisher of the same elements."""

        def read(begin: int, end: int) -> Float32:
            return self.update.fisher_tile(spec.name, begin, end)

        return nested.pad(spec, self.specs[spec.name], start, stop, read)


Thin: TypeAlias = Callable[[Contributor, TensorSpec, int, int, Float32], Float32]
"""(update, tensor, start, stop, its trimmed tile) → that tile with more of it dropped, in an array of its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """One update's part of a tile."""

    contributor: Contributor
    """Whose."""
    weight: float
    """What it counts for in this tile."""
    clip: float
    """What its values are multiplied by, at most 1."""
    sent: Float32
    """As it was sent: [T], or [n] where ``indices`` says which."""
    indices: Indices | None
    """Places of ``sent`` in the tile, ascending; None when it has them all."""
    stretches: Sequence[Stretch]
    """What trimming keeps of a dense one, all of it in order; none of a sparse one."""

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is trimmed of it."""
        return all(stretch.keeps_all for stretch in self.stretches)

    @property
    def factor(self) -> float:
        """What is multiplied with what trimming keeps, in a weighted sum."""
        return self.weight * self.clip

    def kept(self, scratch: Scratch) -> Float32:
        """What trimming keeps, before clipping; not to be written to."""
        if self.keeps_all:
            return self.sent
        return trimmed(self.sent, self.stretches, scratch)

    def add_to(self, total_T: Float32, factor: float) -> None:
        """Add ``factor`` times what trimming keeps to ``total``."""
        factor32 = np.float32(factor)
        if self.indices is not None:
            loops.add_at(self.indices, self.sent, factor32, total_T)
        elif factor == 1 and self.keeps_all:  # which is mostly waiting for memory: comparing would show
            np.add(total_T, self.sent, out=total_T)
        else:
            for part, dropped, upto in self.stretches:
                loops.add(self.sent[part], dropped, upto, factor32, total_T[part])


@dataclass(frozen=True, slots=True)
class Movements:
    """A tile of every update, sorted by worker and task."""

    contributors: Sequence[Contributor]
    spec: TensorSpec
    start: int
    stop: int
    weights: Float64
    """Sum to 1, times what ``merge.rescale`` makes of them; float64 [W]."""
    scratch: Scratch
    """Arrays of the calling thread."""
    elements: Indices | None = None
    """The part of the tile that is meant; None: all of it."""
    thin: Thin | None = None
    """What a rule does to each tile before anything else; it makes sparse tiles dense."""

    @property
    def size(self) -> int:
        """T."""
        return self.stop - self.start if self.elements is None else len(self.elements)

    @property
    def weigh_alike(self) -> bool:
        """Whether all updates count the same."""
        return len(set(self.weights.tolist())) == 1

    def shared_factor(self) -> float | None:
        """The one factor that all rows have in a weighted sum; None where they differ."""
        factors = {w * each.clip for w, each in zip(self.weights.tolist(), self.contributors, strict=True)}
        return factors.pop() if len(factors) == 1 else None

    def rows(self) -> Iterator[Row]:
        """One update after the other: what a sum needs."""
        for contributor, weight in zip(self.contributors, self.weights.tolist(), strict=True):
            yield Row(contributor, weight, contributor.clip, *self._sent(contributor))

    def _sent(self, contributor: Contributor) -> tuple[Float32, Indices | None, Sequence[Stretch]]:
        """What it sent, where that lies, and what is still to be trimmed of it."""
        cut = contributor.measure.cuts[self.spec.name]
        plain = contributor.specs[self.spec.name].shape == self.spec.shape
        if self.elements is not None or self.thin is not None or not plain:
            return self._tile(contributor), None, whole(self.size)
        if cut is not None:
            sent_T = contributor.update.tile(self.spec.name, self.start, self.stop)
            return sent_T, None, cut.stretches(self.start, self.stop)
        sparse = contributor.update.sparse_tile(self.spec.name, self.start, self.stop)
        if sparse is not None:
            return sparse[1], sparse[0], ()
        return self._tile(contributor), None, whole(self.size)

    def stack(self) -> Float64:
        """All updates at once, float64 [W, T]: for rules that compare them with each other."""
        rows_WT = np.empty((len(self.contributors), self.size))
        for row_T, contributor in zip(rows_WT, self.contributors, strict=True):
            np.multiply(self._tile(contributor), contributor.clip, out=row_T, dtype=np.float64)
        return rows_WT

    def fisher(self) -> Float64:
        """Diagonal Fisher of the tile, float64 [W, T]; only for rules that declared to need it."""
        rows = [self._part(each.fisher_tile(self.spec, self.start, self.stop)) for each in self.contributors]
        return np.array(rows, np.float64)

    def fisher_means(self) -> Float64:
        """Mean Fisher of each update over the whole module, float64 [W]."""
        return np.array([each.measure.fisher_mean for each in self.contributors])

    def parts(self, factors_W: Float64) -> list[Movements]:
        """The parts of the tile that are owned by the same updates: usually one, all of it.

        Weights are renormalised over the owners, then multiplied by the owners' ``factors``.
        """
        ranks = [nested.own_rank(self.spec, each.specs[self.spec.name]) for each in self.contributors]
        if all(rank is None for rank in ranks):
            return [dataclasses.replace(self, weights=self.weights * factors_W)]
        return [
            dataclasses.replace(
                self,
                contributors=[self.contributors[owner] for owner in part.owners],
                weights=self.weights[part.owners]
                / math.fsum(self.weights[part.owners])
                * factors_W[part.owners],
                elements=part.elements,
            )
            for part in nested.slices(self.spec, ranks, self.start, self.stop)
        ]

    def _tile(self, contributor: Contributor) -> Float32:
        values_T = contributor.tile(self.spec, self.start, self.stop, self.scratch)
        if self.thin is not None:
            values_T = self.thin(contributor, self.spec, self.start, self.stop, values_T)
        return self._part(values_T)

    def _part(self, values_T: Float32) -> Float32:
        return values_T if self.elements is None else values_T[self.elements]
