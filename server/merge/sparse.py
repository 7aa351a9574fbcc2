"""Rules that trim, drop or elect, for modules trained on different tasks.

Legend: W = updates, T = elements of a tile.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from weft.common.modules import TensorSpec
from weft.server.merge import loops, masks
from weft.server.merge.linear import scaled_mean, weighted_mean
from weft.server.merge.movements import Contributor, Movements, Row, Thin
from weft.server.merge.rule import MergeRule, Otherwise, Scope
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
from weft.server.merge.tiles import Bytes, Counts, Float32, Scratch
from weft.server.merge.whole import pcb

_UINT8_MAX: Final = 255
_TIES_HELD: Final = 16
"""Of a tile: to write them one by one costs less than to merge all of it again."""


@dataclass(slots=True)
class SignedSums:
    """Sums of what is positive and of what is negative, coordinate by coordinate: all that an election needs."""

    positive: Float32
    """Σ factor · value over positive values, [T]."""
    negative: Float32
    """The same over negative ones, ≤ 0."""
    num_positive: Counts
    """How many values are positive, [T]."""
    num_negative: Counts
    """How many are negative."""

    @classmethod
    def zeros(cls, size: int, num_updates: int, scratch: Scratch) -> SignedSums:
        """Nothing added up yet."""
        # One byte a count is faster, and enough for nearly every round.
        kind: type[np.unsignedinteger[Any]] = np.uint8 if num_updates <= _UINT8_MAX else np.uint32
        return cls(
            scratch.zeros("positive", size, np.float32),
            scratch.zeros("negative", size, np.float32),
            scratch.zeros("num positive", size, kind),
            scratch.zeros("num negative", size, kind),
        )

    def add(self, row: Row, factor: float) -> None:
        """Add ``factor`` times what trimming keeps of a row."""
        factor32 = np.float32(factor)
        if row.indices is not None:
            by_sign = (self.positive, self.negative, self.num_positive, self.num_negative)
            loops.add_signed_at(row.indices, row.sent, factor32, *by_sign)
        for part, dropped, upto in row.stretches:
            loops.add_signed(
                row.sent[part],
                dropped,
                upto,
                factor32,
                self.positive[part],
                self.negative[part],
                self.num_positive[part],
                self.num_negative[part],
            )


def _signed_sums(movements: Movements) -> SignedSums:
    """Sums and counts of the clipped values, unweighted."""
    sums = SignedSums.zeros(movements.size, len(movements.contributors), movements.scratch)
    for row in movements.rows():
        sums.add(row, row.clip)
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
    elected_T = _elected(movements, sums, parameters, tie_is_positive=tie_is_positive)
    convention, averages, scale = parameters.convention, parameters.average, parameters.scale
    if movements.weigh_alike:
        merged_T = movements.scratch.take("merged", movements.size, np.float32)
        scale32 = np.float32(scale if averages else scale / len(movements.contributors))
        by_sign = (sums.positive, sums.negative, sums.num_positive, sums.num_negative)
        loops.choose(*by_sign, elected_T, averages, scale32, merged_T)
    else:
        by_weight = convention in (TiesConvention.OFFICIAL, TiesConvention.MERGEKIT)
        merged_T, shares_T = _weighted(movements, elected_T, by_weight=by_weight)
        if averages:
            np.divide(merged_T, shares_T, out=merged_T)
        np.multiply(merged_T, np.float32(scale), out=merged_T)
    if not movements.weigh_alike or convention is TiesConvention.FREQUENCY:
        # NaN agrees with nobody, and infinity may be outvoted: what is not finite has to show in the result.
        with np.errstate(invalid="ignore"):
            merged_T += (sums.positive + sums.negative) * np.float32(0)
    return merged_T


def _elected(
    movements: Movements, sums: SignedSums, parameters: TiesParameters, *, tie_is_positive: bool
) -> Bytes:
    """1 where the elected sign is +, [T]."""
    convention, elected_T = parameters.convention, movements.scratch.take("elected", movements.size, np.uint8)
    if convention is TiesConvention.FREQUENCY:
        np.greater_equal(sums.num_positive, sums.num_negative, out=elected_T.view(np.bool_))
    elif convention is TiesConvention.MERGEKIT and not movements.weigh_alike:
        np.greater_equal(weighted_mean(movements, 1.0), 0, out=elected_T.view(np.bool_))
    else:
        loops.elect(sums.positive, sums.negative, tie_is_positive, elected_T)
    return elected_T


def _weighted(movements: Movements, elected_T: Bytes, *, by_weight: bool) -> tuple[Float32, Float32]:
    """Weighted sum of what agrees, and what to divide it by: agreeing weights, or the share of updates; never 0."""
    total_T, shares_T = np.zeros(movements.size, np.float32), np.zeros(movements.size, np.float32)
    each = 1 / len(movements.contributors)
    for row in movements.rows():
        factor, share = np.float32(row.factor), np.float32(row.weight if by_weight else each)
        if row.indices is not None:
            loops.add_agreeing_at(row.indices, row.sent, factor, share, elected_T, total_T, shares_T)
        for part, dropped, upto in row.stretches:
            loops.add_agreeing(
                row.sent[part],
                dropped,
                upto,
                factor,
                share,
                elected_T[part],
                total_T[part],
                shares_T[part],
            )
    shares_T[shares_T == 0] = 1
    return total_T, shares_T


def sign_balance(movements: Movements, parameters: TiesParameters) -> tuple[int, Float32, Otherwise | None]:
    """Coordinates of positive mass less those of negative mass: its sign is the module's majority sign.

    It matters only where masses tie, which they hardly do but for those of bfloat16 and of codes.
    """
    sums = _signed_sums(movements)
    num_above, num_zero, num_tied = loops.balance(sums.positive, sums.negative, sums.num_positive)
    otherwise = _if_negative(movements, sums, parameters, num_tied) if num_tied else None
    merged_T = elect(movements, sums, parameters, tie_is_positive=True)
    return 2 * num_above + num_zero - movements.size, merged_T, otherwise


def _if_negative(
    movements: Movements, sums: SignedSums, parameters: TiesParameters, num_tied: int
) -> Otherwise:
    """What is merged where masses tie, and are not of zeros alone, if ties are negative."""
    if (
        num_tied > _TIES_HELD or not movements.weigh_alike
    ):  # else all updates would be read for a few elements
        return Otherwise(None)
    places = np.flatnonzero((sums.positive + sums.negative == 0) & (sums.num_positive > 0))
    merged = elect(movements, sums, parameters, tie_is_positive=False)[places]
    return Otherwise(dict(zip(places.tolist(), merged.tolist(), strict=True)))


def sign_majority(movements: Movements, _survey: int, _parameters: RuleParameters) -> Float32:
    """The sign that most weight votes for, times the weighted mean magnitude (signSGD, arXiv 1810.05291).

    A tie does not move. Of updates coded as signs the mean magnitude is the mean of their scales.
    """
    scratch, size = movements.scratch, movements.size
    votes_T, total_T = scratch.zeros("votes", size, np.float32), scratch.zeros("total", size, np.float32)
    for row in movements.rows():
        weight, factor, kept_T = np.float32(row.weight), np.float32(row.factor), row.kept(scratch)
        places = slice(None) if row.indices is None else row.indices
        votes_T[places] += np.sign(kept_T) * weight
        total_T[places] += np.abs(kept_T) * factor
    return np.multiply(np.sign(votes_T), total_T, out=total_T)


def dare(movements: Movements, _survey: int, parameters: DareParameters) -> Float32:
    """Drop elements by chance, divide the rest by the density, take the weighted mean (arXiv 2311.03099).

    A tiny tensor may lose all of an update. What a codec has made sparse is thinned too: the mean over seeds is
    what was sent, whatever it was.
    """
    thinned = dataclasses.replace(movements, thin=_dare(parameters, movements.scratch))
    return weighted_mean(thinned, parameters.scale)


def dare_ties(movements: Movements, survey: int, parameters: DareTiesParameters) -> Float32:
    """DARE, then the election and the average of TIES, without its trim: peft's unless told otherwise.

    Zeros, dropped or sent, agree with nobody. Not homogeneous in the density: what agrees is divided by how many
    it is, not by how many there are.
    """
    thinned = dataclasses.replace(movements, thin=_dare(parameters, movements.scratch))
    return ties(thinned, survey, parameters.election)


def dare_balance(
    movements: Movements, parameters: DareTiesParameters
) -> tuple[int, Float32, Otherwise | None]:
    """``sign_balance`` of what chance leaves."""
    return sign_balance(
        dataclasses.replace(movements, thin=_dare(parameters, movements.scratch)), parameters.election
    )


def _dare(parameters: DareParameters, scratch: Scratch) -> Thin:
    def thin(
        contributor: Contributor, spec: TensorSpec, start: int, _stop: int, values_T: Float32
    ) -> Float32:
        density, seed = parameters.density, parameters.seed
        return masks.dropped(contributor.update, spec, start, values_T, scratch, density=density, seed=seed)

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
