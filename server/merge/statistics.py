"""What is measured of every update before the rule (norms, trim thresholds, mean Fisher), and clipping.

Two norms bound an update. Its *parameter norm* is the plain L2 norm of its movement. Its *change norm* is how
far it moves what the module computes: for LoRA that of ΔW, through Gram matrices, since a large A beside a
small B hides from the first, and a large A that the update's own B cancels hides from the second while it
would meet other workers' B in the merge. An update is scaled so that neither exceeds the median of the round.

Legend: W = updates, N = elements of a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from weft.common.modules import Schema, TensorSpec
from weft.server.merge.settings import Clip, MergeSettings, Trim
from weft.server.merge.tiles import Float32, Update, spans

_BLOCK_ELEMENTS: Final = 1 << 16
"""Sums over a tensor are taken over blocks of this length, whatever the tile: their rounding is the same."""


@dataclass(frozen=True, slots=True)
class Cut:
    """What trimming keeps: magnitudes above ``threshold``, and those at it up to ``last_index``."""

    threshold: float
    last_index: int

    def apply(self, values_T: Float32, start: int) -> Float32:
        """Zero what is trimmed of the tile that begins at element ``start``."""
        magnitude_T = np.abs(values_T)
        threshold = np.float32(self.threshold)
        num_at_threshold = max(0, self.last_index + 1 - start)
        keep_T = np.greater_equal(magnitude_T, threshold)
        np.greater(magnitude_T[num_at_threshold:], threshold, out=keep_T[num_at_threshold:])
        return np.where(keep_T, values_T, np.float32(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeasure:
    """One tensor of one update, measured."""

    square_sum: float
    """Σ movement², float64."""
    fisher_sum: float
    """Σ Fisher; 0 unless the rule needs it."""
    num_kept: int
    """Elements that are not zero once trimmed."""
    cut: Cut | None
    """What trimming keeps; None when nothing is trimmed."""


def find_cut(values_N: Float32, trim: Trim) -> tuple[Cut, int]:
    """The cut that keeps a tensor's largest magnitudes, and how many of them are not zero.

    With ``keeps_ties`` as the authors of TIES: the threshold is the ⌊N density⌋ + 1 st largest magnitude and
    everything as large is kept. Without: exactly max(1, ⌊N density⌋) elements, the first of equal ones.
    """
    size = len(values_N)
    count = int(size * trim.density)
    if count == size:
        return Cut(0.0, size - 1), int(np.count_nonzero(values_N))
    count = count + 1 if trim.keeps_ties else max(1, count)
    partitioned_N = np.abs(values_N)
    partitioned_N.partition(size - count)
    threshold = partitioned_N[size - count]
    num_above = int(np.count_nonzero(partitioned_N[size - count :] > threshold))
    num_at = int(np.count_nonzero(partitioned_N == threshold))
    last_index = size - 1
    if not trim.keeps_ties and num_above + num_at > count:
        num_at = count - num_above
        last_index = int(np.flatnonzero(np.abs(values_N) == threshold)[num_at - 1])
    return Cut(float(threshold), last_index), num_above + (num_at if threshold > 0 else 0)


def measure_tensor(update: Update, spec: TensorSpec, *, trim: Trim | None, fisher: bool) -> TensorMeasure:
    """Measure one tensor of one update; reads it once, whole only if it has to be trimmed."""
    squares, fishers, num_kept = [], [], 0
    for start, stop in spans(spec.size, _BLOCK_ELEMENTS):
        values = update.tile(spec.name, start, stop)
        num_kept += int(np.count_nonzero(values))
        squares.append(float(np.square(values, dtype=np.float64).sum()))
        if fisher:
            fishers.append(float(update.fisher_tile(spec.name, start, stop).astype(np.float64).sum()))
    cut = None
    if trim is not None and not update.sparse:
        cut, num_kept = find_cut(update.tile(spec.name, 0, spec.size), trim)
    return TensorMeasure(
        square_sum=math.fsum(squares), fisher_sum=math.fsum(fishers), num_kept=num_kept, cut=cut
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateMeasure:
    """One update, measured."""

    parameter_norm: float
    """L2 norm of the movement."""
    change_norm: float
    """L2 norm of the movement of what the module computes: ΔW for LoRA, the weights themselves otherwise."""
    fisher_mean: float
    """Mean Fisher over the module; 0 unless the rule needs it."""
    kept: float
    """Share of elements that are not zero once trimmed."""
    cuts: Mapping[str, Cut | None]
    """What trimming keeps, by tensor."""


def update_measure(
    schema: Schema, tensors: Sequence[TensorMeasure], change_squares: Sequence[float], *, scaling: float
) -> UpdateMeasure:
    """Put together what was measured of an update.

    Args:
        schema: The module's tensors.
        tensors: One measure for each, in the order of ``schema``.
        change_squares: ‖B A − B₀ A₀‖² of each LoRA pair, in the order of ``schema.lora_pairs``.
        scaling: ΔW = scaling · B A.
    """
    factors = {name for pair in schema.lora_pairs for name in pair}
    named = list(zip(schema.tensors, tensors, strict=True))
    others = [measure.square_sum for spec, measure in named if spec.name not in factors]
    return UpdateMeasure(
        parameter_norm=math.sqrt(math.fsum(measure.square_sum for measure in tensors)),
        change_norm=math.sqrt(math.fsum([*others, *(scaling**2 * square for square in change_squares)])),
        fisher_mean=math.fsum(measure.fisher_sum for measure in tensors) / max(1, schema.num_parameters),
        kept=sum(measure.num_kept for measure in tensors) / max(1, schema.num_parameters),
        cuts={spec.name: measure.cut for spec, measure in named},
    )


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
