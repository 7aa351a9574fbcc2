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
from weft.server.merge import nested
from weft.server.merge.statistics import UpdateMeasure
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
"""(update, tensor, start, stop, its trimmed tile) → that tile with more of it dropped, a new array."""


@dataclass(frozen=True, slots=True)
class Row:
    """One update's part of a tile."""

    contributor: Contributor
    """Whose."""
    weight: float
    """What it counts for in this tile."""
    clip: float
    """What its values are multiplied by, at most 1."""
    raw: Float32
    """Before clipping: [T], or [n] where ``indices`` says which."""
    indices: Indices | None
    """Places of ``raw`` in the tile, ascending; None when it has them all."""

    @property
    def values(self) -> Float32:
        """Clipped; not to be written to."""
        return self.raw if self.clip == 1 else self.raw * np.float32(self.clip)

    @property
    def factor(self) -> float:
        """What its raw values are multiplied by in a weighted sum."""
        return self.weight * self.clip

    def add_to(self, total_T: Float32, factor: float, scratch: Scratch) -> None:
        """Add ``factor`` times the raw values to ``total``."""
        if self.indices is not None:
            total_T[self.indices] += self.raw * np.float32(factor)
        elif factor == 1:
            np.add(total_T, self.raw, out=total_T)
        else:
            scaled = scratch.take("scaled", len(self.raw), np.float32)
            np.add(total_T, np.multiply(self.raw, np.float32(factor), out=scaled), out=total_T)


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

    def shared_factor(self) -> float | None:
        """The one factor that all rows have in a weighted sum; None where they differ."""
        factors = {w * each.clip for w, each in zip(self.weights.tolist(), self.contributors, strict=True)}
        return factors.pop() if len(factors) == 1 else None

    def rows(self) -> Iterator[Row]:
        """One update after the other: what a sum needs."""
        for contributor, weight in zip(self.contributors, self.weights.tolist(), strict=True):
            sparse = self._sparse(contributor)
            if sparse is None:
                yield Row(contributor, weight, contributor.clip, self._tile(contributor), None)
            else:
                yield Row(contributor, weight, contributor.clip, sparse[1], sparse[0])

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

    def _sparse(self, contributor: Contributor) -> tuple[Indices, Float32] | None:
        whole = (
            self.elements is None
            and self.thin is None
            and contributor.specs[self.spec.name].shape == self.spec.shape
        )
        if not whole or contributor.measure.cuts[self.spec.name] is not None:
            return None
        return contributor.update.sparse_tile(self.spec.name, self.start, self.stop)
