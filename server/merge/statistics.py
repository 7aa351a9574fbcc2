"""What is measured of every update before the rule (norms, trim thresholds, mean Fisher), and clipping.

Two norms bound an update. Its *parameter norm* is the plain L2 norm of its movement. Its *change norm* is how
far it moves what the module computes: for LoRA that of ΔW, through Gram matrices, since a large A beside a
small B hides from the first, and a large A that the update's own B cancels hides from the second while it
would meet other workers' B in the merge. An update is scaled so that neither exceeds the median of the round.

Legend: W = updates, N = elements of a tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from weft.common.modules import Schema, TensorSpec
from weft.server.merge import loops
from weft.server.merge.selection import BLOCK_ELEMENTS, Kth, Read, index_of_equal, kths_largest
from weft.server.merge.settings import Clip, MergeSettings, Trim
from weft.server.merge.tiles import Float32, Scratch, Update, spans

_SQUARES_MIN: Final = 1e-20
"""Float32 sums of squares below this have lost small ones."""


class Stretch(NamedTuple):
    """Elements of a tile of which the same magnitudes are kept."""

    part: slice
    """Which."""
    dropped: np.float32
    """Magnitudes up to this one are trimmed,"""
    upto: np.float32
    """and those above this one."""

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is trimmed."""
        return (self.dropped, self.upto) == _EVERYTHING


_EVERYTHING: Final = (np.float32(-1), np.float32(np.inf))


@dataclass(frozen=True, slots=True)
class Cut:
    """What trimming keeps: magnitudes above a threshold, and those at it up to ``last_index``."""

    bits: int
    """Of the smallest kept magnitude, as float32; at least 1, since zeros are never kept."""
    last_index: int
    """Of the last kept element that is as large as the threshold."""
    outliers: Cut | None = None
    """What is dropped of that: all that this one keeps."""

    @property
    def threshold(self) -> float:
        """The smallest kept magnitude."""
        return float(_float(self.bits))

    def stretches(self, start: int, stop: int) -> list[Stretch]:
        """Elements ``start:stop`` of the tensor, cut where the bounds of what is kept change."""
        cuts = (self,) if self.outliers is None else (self, self.outliers)
        inside = {cut.last_index + 1 - start for cut in cuts if start <= cut.last_index < stop - 1}
        edges = sorted({0, *inside, stop - start}) if inside else [0, stop - start]
        return [
            Stretch(
                slice(first, last),
                self._largest_dropped(start + first),
                _EVERYTHING[1] if self.outliers is None else self.outliers._largest_dropped(start + first),
            )
            for first, last in itertools.pairwise(edges)
        ]

    def _largest_dropped(self, index: int) -> np.float32:
        """Where element ``index`` is as large as this or smaller, it is dropped."""
        # What is larger than the float32 before the threshold is as large as the threshold.
        return _float(self.bits - (index <= self.last_index))

    def apply(self, values_T: Float32, start: int, scratch: Scratch) -> Float32:
        """The tile that begins at element ``start`` with zeros for what is trimmed, in scratch "trimmed"."""
        return trimmed(values_T, self.stretches(start, start + len(values_T)), scratch)


def trimmed(values_T: Float32, stretches: Sequence[Stretch], scratch: Scratch) -> Float32:
    """Zeros for what is trimmed, in scratch "trimmed"."""
    trimmed_T = scratch.take("trimmed", len(values_T), np.float32)
    for part, dropped, upto in stretches:
        loops.trim(values_T[part], dropped, upto, trimmed_T[part])
    return trimmed_T


def whole(size: int) -> list[Stretch]:
    """A tile of which everything is kept."""
    return [Stretch(slice(0, size), *_EVERYTHING)]


def _float(bits: int) -> np.float32:
    return np.int32(bits).view(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeasure:
    """One tensor of one update, measured."""

    square_sum: float
    """Σ movement²."""
    fisher_sum: float
    """Σ Fisher; 0 unless the rule needs it."""
    num_kept: int | None
    """Elements that are not zero once trimmed; None where nobody counted."""
    cut: Cut | None
    """What trimming keeps; None when nothing is trimmed."""


def find_cut(read: Read, size: int, trim: Trim, scratch: Scratch) -> tuple[Cut, int]:
    """The cut that keeps a tensor's largest magnitudes, and how many of them are not zero.

    With ``keeps_ties`` as the authors of TIES: the threshold is the ⌊N density⌋ + 1 st largest magnitude and
    everything as large is kept. Without: exactly max(1, ⌊N density⌋) elements, the first of equal ones.
    With ``outliers`` the ⌊N outliers⌋ largest are dropped, but never so many that fewer than asked for are left,
    and those that follow kept in their place.
    """
    count = int(size * trim.density)
    count = min(size, count + 1 if trim.keeps_ties else max(1, count))
    num_outliers = min(int(size * trim.outliers), size - count)
    counts = [count + num_outliers, *([num_outliers] if num_outliers else [])]
    ranked = list(zip(kths_largest(read, size, counts, scratch), counts, strict=True))
    cut, num_kept = _cut(read, size, *ranked[0], scratch, keeps_ties=trim.keeps_ties)
    if not num_outliers:
        return cut, num_kept
    outliers, num_dropped = _cut(read, size, *ranked[1], scratch, keeps_ties=False)
    return Cut(cut.bits, cut.last_index, outliers), num_kept - num_dropped


def _cut(
    read: Read, size: int, kth: Kth, count: int, scratch: Scratch, *, keeps_ties: bool
) -> tuple[Cut, int]:
    """The cut that keeps the ``count`` largest, of which ``kth`` is the last, and how many of them are not zero."""
    if kth.bits == 0:
        return Cut(1, size - 1), kth.num_above
    if keeps_ties or kth.num_above + kth.num_equal == count:
        return Cut(kth.bits, size - 1), kth.num_above + kth.num_equal
    number = count - kth.num_above
    if kth.equal is not None:
        return Cut(kth.bits, int(kth.equal[number - 1])), count
    return Cut(kth.bits, index_of_equal(read, size, kth.bits, number, scratch)), count


def measure_tensor(
    update: Update, spec: TensorSpec, scratch: Scratch, *, trim: Trim | None, fisher: bool, norms: bool
) -> TensorMeasure:
    """Measure one tensor of one update, in blocks; what is not asked for stays 0, or None."""
    square_sum, fisher_sum, cut = 0.0, 0.0, None
    num_kept: int | None = None
    if norms:
        square_sum, num_kept = _squares(update, spec, scratch)
    if fisher:
        sums = (update.fisher_tile(spec.name, *span).sum(dtype=np.float64) for span in _spans(spec))
        fisher_sum = math.fsum(map(float, sums))
    if trim is not None and not update.sparse:
        cut, num_kept = find_cut(lambda *span: update.tile(spec.name, *span), spec.size, trim, scratch)
    return TensorMeasure(square_sum=square_sum, fisher_sum=fisher_sum, num_kept=num_kept, cut=cut)


def _spans(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Sums over a tensor are taken over these blocks, whatever the tile: their rounding is the same."""
    return spans(spec.size, BLOCK_ELEMENTS)


def _squares(update: Update, spec: TensorSpec, scratch: Scratch) -> tuple[float, int]:
    """Σ movement² of a tensor, and how many elements are not zero."""
    squares, num_nonzero = [], 0
    for start, stop in _spans(spec):
        sparse = update.sparse_tile(spec.name, start, stop)
        values = update.tile(spec.name, start, stop) if sparse is None else sparse[1]
        flags = scratch.take("flags", len(values), np.bool_)
        count = int(np.count_nonzero(np.not_equal(values, 0, out=flags)))
        squares.append(square_sum(values, scratch) if count else 0.0)
        num_nonzero += count
    return math.fsum(squares), num_nonzero


def square_sum(values: Float32, scratch: Scratch) -> float:
    """Σ values² of a block: in float32, which is faster, unless that loses small ones or overflows."""
    with np.errstate(over="ignore", under="ignore"):
        total = float(np.add.reduce(np.square(values, out=scratch.take("squares", len(values), np.float32))))
    return total if _SQUARES_MIN < total < math.inf else float(np.square(values, dtype=np.float64).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMeasure:
    """One update, measured."""

    parameter_norm: float
    """L2 norm of the movement."""
    change_norm: float
    """L2 norm of the movement of what the module computes: ΔW for LoRA, the weights themselves otherwise."""
    fisher_mean: float
    """Mean Fisher over the module; 0 unless the rule needs it."""
    kept: float | None
    """Share of elements that are not zero once trimmed; None where nobody counted."""
    cuts: Mapping[str, Cut | None]
    """What trimming keeps, by tensor."""
    square_sums: Mapping[str, float]
    """Σ movement², by tensor."""
    change_squares: Mapping[tuple[str, str], float]
    """‖B A − B₀ A₀‖², by the names of the LoRA pair."""


def update_measure(
    schema: Schema,
    tensors: Sequence[TensorMeasure],
    change_squares: Sequence[float],
    *,
    scaling: float,
    norm: float | None = None,
) -> UpdateMeasure:
    """Put together what was measured of an update.

    Args:
        schema: The update's tensors: the module's, or nested slices of them.
        tensors: One measure for each, in the order of ``schema``.
        change_squares: ‖B A − B₀ A₀‖² of each LoRA pair, in the order of ``schema.lora_pairs``.
        scaling: ΔW = scaling · B A.
        norm: L2 norm of the movement, where square sums of tensors were not measured (``is_norm_enough``).
    """
    factors = {name for pair in schema.lora_pairs for name in pair}
    named = list(zip(schema.tensors, tensors, strict=True))
    squares = [measure.square_sum for measure in tensors] if norm is None else [norm**2]
    others = [measure.square_sum for spec, measure in named if spec.name not in factors]
    if norm is not None and not factors:
        others = squares
    counts = [measure.num_kept for measure in tensors if measure.num_kept is not None]
    return UpdateMeasure(
        parameter_norm=math.sqrt(math.fsum(squares)),
        change_norm=math.sqrt(math.fsum([*others, *(scaling**2 * square for square in change_squares)])),
        fisher_mean=math.fsum(measure.fisher_sum for measure in tensors) / max(1, schema.num_parameters),
        kept=sum(counts) / max(1, schema.num_parameters) if len(counts) == len(tensors) else None,
        cuts={spec.name: measure.cut for spec, measure in named},
        square_sums={spec.name: measure.square_sum for spec, measure in named},
        change_squares=dict(zip(schema.lora_pairs, change_squares, strict=True)),
    )


def is_norm_enough(schema: Schema) -> bool:
    """Whether the norm of a movement is all that clipping needs of its tensors.

    Beside LoRA factors, whose change norm comes from their products, there are no others; or there are no factors.
    """
    factors = {name for pair in schema.lora_pairs for name in pair}
    return not factors or all(spec.name in factors for spec in schema.tensors)


def lower_median(values: Sequence[float]) -> float:
    """The lower middle of the positive values; 0 when there is none.

    The lower one, so that of two workers the one who sends 10⁴ times as much does not set the bound; the
    positive ones, so that idle workers do not clip the others to nothing.
    """
    positive = sorted(value for value in values if value > 0)
    return positive[(len(positive) - 1) // 2] if positive else 0.0


def clip_factors(measures: Sequence[UpdateMeasure], settings: MergeSettings) -> tuple[float, ...]:
    """What each update is multiplied by, 0 < factor ≤ 1, so that neither of its norms exceeds the bound."""
    if settings.clip is Clip.NONE:
        return (1.0,) * len(measures)
    changes = [measure.change_norm for measure in measures]
    movements = [measure.parameter_norm for measure in measures]
    bound_change = settings.clip_multiple * lower_median(changes)
    bound_movement = settings.clip_multiple * lower_median(movements)
    return tuple(
        min(_factor(bound_change, change), _factor(bound_movement, movement))
        for change, movement in zip(changes, movements, strict=True)
    )


def _factor(bound: float, norm: float) -> float:
    # Rounded to float32, so that the last bits of another linear algebra library do not reach the result.
    return float(np.float32(bound / norm)) if norm > bound else 1.0


def normalised_weights(weights: Sequence[float], settings: MergeSettings) -> tuple[float, ...]:
    """Weights bounded to a multiple of their median, divided by their sum.

    Raises:
        ValueError: A weight is negative or not finite, or all are zero.
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite, not negative and not all zero: {list(weights)}")
    bound = settings.weight_multiple_max * lower_median(weights)
    bounded = [min(weight, bound) for weight in weights]
    total = math.fsum(bounded)
    return tuple(weight / total for weight in bounded)
