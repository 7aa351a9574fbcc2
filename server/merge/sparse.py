"""Rules that trim, drop or elect, for modules trained on different tasks.

Legend: W = updates, T = elements of a tile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from weft.common.modules import TensorSpec
from weft.server.merge import masks
from weft.server.merge.linear import scaled_mean, weighted_mean
from weft.server.merge.movements import Contributor, Movements, Row, Thin
from weft.server.merge.rule import MergeRule, Scope
from weft.server.merge.settings import (
    BreadcrumbsParameters,
    DareParameters,
    DareTiesParameters,
    DellaParameters,
    MergeRuleName,
    RuleParameters,
    TiesConvention,
    TiesParameters,
)
from weft.server.merge.tiles import Float32, Indices, Scratch, readable
from weft.server.merge.whole import pcb

Counts: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

_UINT8_MAX: Final = 255


@dataclass(slots=True)
class SignedSums:
    """Sums of what is positive and of what is negative, coordinate by coordinate: all that an election needs."""

    sums: Float32
    """Σ factor · value over positive values [T], then over negative ones [T]."""
    counts: Counts
    """How many values are positive [T], then how many are negative [T]."""

    @classmethod
    def zeros(cls, size: int, num_updates: int, scratch: Scratch) -> SignedSums:
        """Nothing added up yet."""
        # One byte a count is four times as fast, and enough for nearly every round.
        kind: type[np.unsignedinteger[Any]] = np.uint8 if num_updates <= _UINT8_MAX else np.uint32
        return cls(
            scratch.zeros("signed sums", 2 * size, np.float32), scratch.zeros("signed counts", 2 * size, kind)
        )

    @property
    def positive(self) -> Float32:
        """Σ factor · value over positive values, [T]."""
        return self.sums[: len(self.sums) // 2]

    @property
    def negative(self) -> Float32:
        """The same over negative ones, ≤ 0."""
        return self.sums[len(self.sums) // 2 :]

    @property
    def num_positive(self) -> Counts:
        """How many values are positive, [T]."""
        return self.counts[: len(self.counts) // 2]

    @property
    def num_negative(self) -> Counts:
        """How many are negative."""
        return self.counts[len(self.counts) // 2 :]

    def add(self, row: Row, factor: float, scratch: Scratch) -> None:
        """Add ``factor`` times the raw values of a row."""
        if row.indices is not None:
            self._add_sparse(row.indices, row.raw * np.float32(factor))
            return
        values = readable(row.raw, scratch)
        if factor != 1:
            scaled = torch.from_numpy(scratch.take("scaled", len(values), np.float32))
            values = torch.mul(values, float(np.float32(factor)), out=scaled)
        raw, flags = values.numpy(), scratch.take("flags", len(values), np.bool_)
        part = torch.from_numpy(scratch.take("part", len(values), np.float32))
        torch.from_numpy(self.positive).add_(torch.clamp_min(values, 0, out=part))
        _count(self.num_positive, np.greater(raw, 0, out=flags))
        torch.from_numpy(self.negative).add_(torch.clamp_max(values, 0, out=part))
        _count(self.num_negative, np.less(raw, 0, out=flags))

    def _add_sparse(self, indices: Indices, values: Float32) -> None:
        places = indices + (values < 0) * (len(self.sums) // 2)
        self.sums[places] += values
        self.counts[places] += values != 0


def _count(counts: Counts, flags: npt.NDArray[np.bool_]) -> None:
    np.add(counts, flags.view(np.uint8), out=counts)


def _signed_sums(movements: Movements) -> SignedSums:
    """Sums and counts of the clipped values, unweighted."""
    sums = SignedSums.zeros(movements.size, len(movements.contributors), movements.scratch)
    for row in movements.rows():
        sums.add(row, row.clip, movements.scratch)
    return sums


def ties(movements: Movements, survey: int, parameters: TiesParameters) -> Float32:
    """TIES on trimmed movements: elect a sign, average what agrees with it (arXiv 2306.01708, section 3).

    | convention | the sign is that of | a tie is | the average divides by |
    |---|---|---|---|
    | official | the sum | the majority sign of the module, − if that ties too | agreeing weights |
    | peft | the sum | + | the share of updates that agree, weights stay in the numerator |
    | mergekit | the weighted sum | + | agreeing weights |
    | frequency | the sum of signs | + | as peft |

    With equal weights all but the last are the same where no masses tie. A tensor keeps at least one element,
    however tiny, and what a codec has made sparse is not trimmed again. Zeros agree with nobody. Without
    ``average`` nothing is divided, and all are the weighted sum of what agrees.
    """
    tie_is_positive = survey > 0 or parameters.convention is not TiesConvention.OFFICIAL
    return elect(movements, _signed_sums(movements), parameters, tie_is_positive=tie_is_positive)


def elect(
    movements: Movements, sums: SignedSums, parameters: TiesParameters, *, tie_is_positive: bool
) -> Float32:
    """The average of what has the elected sign, or its weighted sum."""
    scratch, size, convention = movements.scratch, movements.size, parameters.convention
    elected_T = scratch.take("elected", size, np.bool_)
    equal = len(set(movements.weights.tolist())) == 1
    if convention is TiesConvention.FREQUENCY:
        np.greater_equal(sums.num_positive, sums.num_negative, out=elected_T)
    elif convention is TiesConvention.MERGEKIT and not equal:
        np.greater_equal(weighted_mean(movements, 1.0), 0, out=elected_T)
    else:
        mass_T = np.add(sums.positive, sums.negative, out=scratch.take("mass", size, np.float32))
        (np.greater_equal if tie_is_positive else np.greater)(mass_T, 0, out=elected_T)
    if equal:
        chosen_T, counts_T = _choose(sums, elected_T, scratch)
    else:
        by_weight = convention in (TiesConvention.OFFICIAL, TiesConvention.MERGEKIT)
        chosen_T, counts_T = _weighted(movements, elected_T, by_weight=by_weight)
    if not equal or convention is TiesConvention.FREQUENCY:
        # NaN agrees with nobody, and infinity may be outvoted: what is not finite has to show in the result.
        with np.errstate(invalid="ignore"):
            chosen_T += (sums.positive + sums.negative) * np.float32(0)
    scale = parameters.scale
    if parameters.average:
        np.divide(chosen_T, counts_T, out=chosen_T)
    elif equal:
        scale /= len(movements.contributors)
    return chosen_T if scale == 1 else np.multiply(chosen_T, np.float32(scale), out=chosen_T)


def _choose(sums: SignedSums, elected_T: npt.NDArray[np.bool_], scratch: Scratch) -> tuple[Float32, Float32]:
    """Sum and count of what has the elected sign, where counts are at least 1."""
    # Bits of the positive sum where the sign is +, of the negative one elsewhere: np.where is ten times slower.
    mask_T = np.negative(
        elected_T.view(np.int8), dtype=np.int32, out=scratch.take("part", len(elected_T), np.int32)
    )
    chosen_T = np.bitwise_xor(
        sums.positive.view(np.int32),
        sums.negative.view(np.int32),
        out=scratch.take("chosen", len(elected_T), np.int32),
    )
    np.bitwise_and(chosen_T, mask_T, out=chosen_T)
    np.bitwise_xor(chosen_T, sums.negative.view(np.int32), out=chosen_T)
    counts_T = np.subtract(sums.num_positive, sums.num_negative, out=sums.num_positive)
    np.multiply(counts_T, elected_T.view(np.uint8), out=counts_T)
    np.add(counts_T, sums.num_negative, out=counts_T)
    np.maximum(counts_T, 1, out=counts_T)
    divisor_T = scratch.take("divisor", len(elected_T), np.float32)
    np.copyto(divisor_T, counts_T)
    return chosen_T.view(np.float32), divisor_T


def _weighted(
    movements: Movements, elected_T: npt.NDArray[np.bool_], *, by_weight: bool
) -> tuple[Float32, Float32]:
    """Weighted sum of what agrees, and what to divide it by: agreeing weights, or the share of updates; never 0."""
    chosen_T, counts_T = np.zeros(movements.size, np.float32), np.zeros(movements.size, np.float32)
    positive_T = np.where(elected_T, np.float32(1), np.float32(-1))
    each = 1 / len(movements.contributors)
    for row in movements.rows():
        if row.indices is None:
            agreeing_T = row.values * positive_T > 0
            with np.errstate(invalid="ignore"):  # infinity that disagrees
                chosen_T += row.raw * agreeing_T * np.float32(row.factor)
            counts_T += agreeing_T * np.float32(row.weight if by_weight else each)
        else:
            agreeing = row.raw * positive_T[row.indices] > 0
            places = row.indices[agreeing]
            chosen_T[places] += row.raw[agreeing] * np.float32(row.factor)
            counts_T[places] += np.float32(row.weight if by_weight else each)
    counts_T[counts_T == 0] = 1
    return chosen_T, counts_T


def sign_balance(movements: Movements, parameters: TiesParameters) -> tuple[int, Float32, bool]:
    """Coordinates of positive mass less those of negative mass: its sign is the module's majority sign.

    It matters only where masses tie, which they hardly do but for those of bfloat16.
    """
    sums, flags = _signed_sums(movements), movements.scratch.take("flags", movements.size, np.bool_)
    mass_T = np.add(
        sums.positive, sums.negative, out=movements.scratch.take("mass", movements.size, np.float32)
    )
    num_positive = int(np.count_nonzero(np.greater(mass_T, 0, out=flags)))
    num_zero = int(np.count_nonzero(np.equal(mass_T, 0, out=flags)))
    balance = 2 * num_positive + num_zero - movements.size
    # Where masses tie and are not of zeros alone.
    is_tied = bool(num_zero and np.any(sums.num_positive * flags.view(np.uint8)))
    return balance, elect(movements, sums, parameters, tie_is_positive=True), is_tied


def sign_majority(movements: Movements, _survey: int, _parameters: RuleParameters) -> Float32:
    """The sign that most weight votes for, times the weighted mean magnitude (signSGD, arXiv 1810.05291).

    A tie does not move. Of updates coded as signs the mean magnitude is the mean of their scales.
    """
    scratch, size = movements.scratch, movements.size
    votes_T, total_T = scratch.zeros("votes", size, np.float32), scratch.zeros("total", size, np.float32)
    for row in movements.rows():
        weight, factor = np.float32(row.weight), np.float32(row.factor)
        if row.indices is None:
            votes_T += np.sign(row.raw) * weight
            total_T += np.abs(row.raw) * factor
        else:
            votes_T[row.indices] += np.sign(row.raw) * weight
            total_T[row.indices] += np.abs(row.raw) * factor
    return np.multiply(np.sign(votes_T), total_T, out=total_T)


def dare(movements: Movements, _survey: int, parameters: DareParameters) -> Float32:
    """Drop elements by chance, divide the rest by the density, take the weighted mean (arXiv 2311.03099).

    A tiny tensor may lose all of an update. What a codec has made sparse is thinned too: the mean over seeds is
    what was sent, whatever it was.
    """
    thinned = dataclasses.replace(movements, thin=_dare(parameters))
    return weighted_mean(thinned, parameters.scale)


def dare_ties(movements: Movements, survey: int, parameters: DareTiesParameters) -> Float32:
    """DARE, then the election and the average of TIES, without its trim: peft's unless told otherwise.

    Zeros, dropped or sent, agree with nobody. Not homogeneous in the density: what agrees is divided by how many
    it is, not by how many there are.
    """
    thinned = dataclasses.replace(movements, thin=_dare(parameters))
    return ties(thinned, survey, parameters.election)


def dare_balance(movements: Movements, parameters: DareTiesParameters) -> tuple[int, Float32, bool]:
    """``sign_balance`` of what chance leaves."""
    return sign_balance(dataclasses.replace(movements, thin=_dare(parameters)), parameters.election)


def _dare(parameters: DareParameters) -> Thin:
    def thin(
        contributor: Contributor, spec: TensorSpec, start: int, _stop: int, values_T: Float32
    ) -> Float32:
        density, seed = parameters.density, parameters.seed
        return masks.dropped(contributor.update, spec, start, values_T, density=density, seed=seed)

    return thin


def della(movements: Movements, _survey: int, parameters: DellaParameters) -> Float32:
    """Drop small elements of a row more often than large ones, divide each by its chance (arXiv 2406.11617).

    The chance to stay runs linearly from density − ε for a row's smallest magnitude to density + ε for its
    largest, the earlier of equal ones smaller. A tensor without rows is one row.
    """
    return weighted_mean(dataclasses.replace(movements, thin=_della(parameters)), parameters.scale)


def _della(parameters: DellaParameters) -> Thin:
    def thin(
        contributor: Contributor, spec: TensorSpec, start: int, _stop: int, values_T: Float32
    ) -> Float32:
        return masks.dropped_by_rank(
            contributor.update,
            spec,
            start,
            values_T,
            lambda first, last: contributor.tile(spec, first, last, Scratch()),
            density=parameters.density,
            spread=parameters.spread,
            seed=parameters.seed,
        )

    return thin


def breadcrumbs(movements: Movements, _survey: int, parameters: BreadcrumbsParameters) -> Float32:
    """The sum of movements without their outliers and without what is small (arXiv 2312.06795, section 3).

    Tensor by tensor, as mergekit; the authors' code trims row by row. Of equal magnitudes the first stay; a tensor
    of fewer than 1 / outliers elements loses none as an outlier and keeps at least one. What a codec has made
    sparse is neither trimmed nor rid of outliers.
    """
    return weighted_mean(movements, parameters.scale * len(movements.contributors))


ROWS: Final[tuple[MergeRule[Any], ...]] = (
    MergeRule(
        name=MergeRuleName.TIES,
        title="TIES: trim, elect a sign, average what agrees",
        paper="https://arxiv.org/abs/2306.01708",
        merge=ties,
        survey=sign_balance,
        keeps_nan=True,
        row_by_row=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.SIGN_MAJORITY,
        title="The majority's sign, the mean's size",
        paper="https://arxiv.org/abs/1810.05291",
        merge=sign_majority,
        row_by_row=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.DARE,
        title="DARE: drop by chance, rescale, average",
        paper="https://arxiv.org/abs/2311.03099",
        merge=dare,
        row_by_row=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.DARE_TIES,
        title="DARE, then the election of TIES",
        paper="https://arxiv.org/abs/2311.03099",
        merge=dare_ties,
        survey=dare_balance,
        row_by_row=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.DELLA,
        title="DELLA: drop by chance, small magnitudes more often",
        paper="https://arxiv.org/abs/2406.11617",
        merge=della,
        row_by_row=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.BREADCRUMBS,
        title="Model breadcrumbs: neither outliers nor what is small",
        paper="https://arxiv.org/abs/2312.06795",
        merge=breadcrumbs,
        row_by_row=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.PCB,
        title="PCB: balance what parameters compete for",
        paper="https://arxiv.org/abs/2410.02396",
        merge=scaled_mean,
        scope=Scope.TENSOR,
        whole=pcb,
        row_by_row=True,
    ),
)
"""The sparse rows of ``RULES``."""
