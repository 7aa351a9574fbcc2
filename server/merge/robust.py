"""Rules that a minority of arbitrary updates cannot take over.

Two kinds. Coordinate-wise ones look at all updates of a tile at once. Those by distance need nothing but the
inner products of the updates, one n × n matrix from one streamed pass, and come down to weights: the pass
that follows is a weighted mean. For LoRA merged as ΔW the inner products are those of B A, from its factors.
Stated weights do not count where a rule is about single updates (median, trimmed mean, Krum, Bulyan).

Updates that are sparse make coordinate medians 0 nearly everywhere, and workers with different data look
like liars to every one of these. Ties go to the update that comes first, by worker and task. An update that did not
move is an update like others.

Legend: W = updates, T = elements of a tile, f = updates that may be arbitrary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from weft.server.merge.linear import mean
from weft.server.merge.movements import Movements
from weft.server.merge.rule import Grams, MergeRule
from weft.server.merge.settings import (
    CentredClippingParameters,
    GeometricMedianParameters,
    MergeRuleName,
    RobustParameters,
    RuleParameters,
)
from weft.server.merge.statistics import lower_median
from weft.server.merge.tiles import Float64

# -- coordinate by coordinate ------------------------------------------------------------------------------


def median(movements: Movements, _survey: int, _parameters: RuleParameters) -> Float64:
    """Coordinate-wise median; of an even number the mean of the middle two (arXiv 1803.01498)."""
    stack_WT = np.sort(movements.stack(), axis=0)
    low, high = (len(stack_WT) - 1) // 2, len(stack_WT) // 2
    return np.asarray((stack_WT[low] + stack_WT[high]) / 2)


def trimmed_mean(movements: Movements, _survey: int, parameters: RobustParameters) -> Float64:
    """Mean without the f smallest and the f largest values of each coordinate (arXiv 1803.01498)."""
    stack_WT = np.sort(movements.stack(), axis=0)
    num_cut = min(int(parameters.share * len(stack_WT)), (len(stack_WT) - 1) // 2)
    return _mean(stack_WT[num_cut : len(stack_WT) - num_cut])


def _mean(rows_WT: Float64) -> Float64:
    # Row by row: numpy's own sum would choose its order by the tile's length.
    total_T: Float64 = rows_WT[0].copy()
    for row_T in rows_WT[1:]:
        total_T += row_T
    total_T /= len(rows_WT)
    return total_T


# -- by distance -------------------------------------------------------------------------------------------


def _whole(grams: Grams) -> Float64:
    """Inner products over the whole module, [W, W]."""
    return np.asarray(sum(grams[name] for name in sorted(grams)))


def _everywhere(grams: Grams, weights_W: Float64) -> Mapping[str, Float64]:
    return dict.fromkeys(grams, weights_W)


def square_distances(gram_WW: Float64) -> Float64:
    """‖v_i − v_j‖², [W, W], exactly 0 on the diagonal."""
    squares_W = np.diag(gram_WW)
    distances_WW = np.maximum(squares_W[:, np.newaxis] + squares_W - 2 * gram_WW, 0.0)
    np.fill_diagonal(distances_WW, 0.0)
    return distances_WW


def krum_scores(distances_WW: Float64, num_bad: int) -> Float64:
    """Σ of the squared distances to the n − f − 2 nearest others, at least one of them, [W]."""
    count = len(distances_WW)
    others_WW = np.sort(distances_WW + np.diag(np.full(count, np.inf)), axis=1)
    return np.asarray(others_WW[:, : max(1, count - num_bad - 2)].sum(axis=1))


def _num_bad(count: int, share: float, *, per: int) -> int:
    """f: the share of updates, at most what n ≥ per · f + 3 allows."""
    return max(0, min(int(share * count), (count - 3) // per))


def krum(grams: Grams, weights_W: Float64, parameters: RobustParameters) -> Mapping[str, Float64]:
    """The one update that is nearest to its n − f − 2 neighbours (arXiv 1703.02757), the first of equal ones."""
    distances_WW = square_distances(_whole(grams))
    if len(weights_W) == 1:
        return _everywhere(grams, weights_W)
    scores_W = krum_scores(distances_WW, _num_bad(len(weights_W), parameters.share, per=2))
    return _everywhere(grams, np.eye(len(weights_W))[int(np.argmin(scores_W))])


def multi_krum(grams: Grams, weights_W: Float64, parameters: RobustParameters) -> Mapping[str, Float64]:
    """The weighted mean of the n − f updates of the best Krum scores (arXiv 1703.02757, section 4)."""
    count = len(weights_W)
    if count == 1:
        return _everywhere(grams, weights_W)
    num_bad = _num_bad(count, parameters.share, per=2)
    scores_W = krum_scores(square_distances(_whole(grams)), num_bad)
    best = np.argsort(scores_W, kind="stable")[: count - num_bad]
    chosen_W = np.zeros(count)
    chosen_W[best] = weights_W[best] / math.fsum(weights_W[best].tolist())
    return _everywhere(grams, chosen_W)


def bulyan_choice(grams: Grams, weights_W: Float64, parameters: RobustParameters) -> Mapping[str, Float64]:
    """The n − 2f updates that Krum picks one after the other, with equal weights (arXiv 1802.07927)."""
    count = len(weights_W)
    num_bad = _num_bad(count, parameters.share, per=4)
    left, chosen = list(range(count)), list[int]()
    distances_WW = square_distances(_whole(grams))
    while len(chosen) < count - 2 * num_bad:
        scores = krum_scores(distances_WW[np.ix_(left, left)], num_bad) if len(left) > 1 else np.zeros(1)
        chosen.append(left.pop(int(np.argmin(scores))))
    weights = np.zeros(count)
    weights[chosen] = 1 / len(chosen)
    return _everywhere(grams, weights)


def bulyan(movements: Movements, _survey: int, parameters: RobustParameters) -> Float64:
    """Of the chosen updates, the mean of the n − 4f values of each coordinate nearest to its median."""
    num_bad = _num_bad(len(movements.contributors), parameters.share, per=4)
    stack_WT = np.sort(movements.stack()[movements.weights > 0], axis=0)
    middle_T = (stack_WT[(len(stack_WT) - 1) // 2] + stack_WT[len(stack_WT) // 2]) / 2
    nearest_WT = np.argsort(np.abs(stack_WT - middle_T), axis=0, kind="stable")
    kept = max(1, len(stack_WT) - 2 * num_bad)
    return _mean(np.take_along_axis(stack_WT, nearest_WT[:kept], axis=0))


def _square_distance_to(gram_WW: Float64, centre_W: Float64) -> Float64:
    """‖v_k − Σ c_i v_i‖², [W]."""
    toward_W = gram_WW @ centre_W
    return np.asarray(np.maximum(np.diag(gram_WW) - 2 * toward_W + centre_W @ toward_W, 0.0))


def _median_norm(gram_WW: Float64) -> float:
    return lower_median(np.sqrt(np.diag(gram_WW)).tolist())


def geometric_median(
    grams: Grams, weights_W: Float64, parameters: GeometricMedianParameters
) -> Mapping[str, Float64]:
    """The point of the least weighted distance to all updates, by smoothed Weiszfeld from their mean (RFA).

    Its steps are weights: β_k = α_k / max(ν, ‖v_k − z‖), z = Σ β_k v_k / Σ β_k (arXiv 1912.13445, algorithm 2).
    """
    gram_WW, centre_W = _whole(grams), weights_W
    floor = parameters.smoothing * _median_norm(gram_WW)
    if floor == 0:
        return _everywhere(grams, weights_W)
    for _ in range(parameters.iterations):
        pull_W = weights_W / np.maximum(np.sqrt(_square_distance_to(gram_WW, centre_W)), floor)
        centre_W = pull_W / pull_W.sum()
    return _everywhere(grams, centre_W)


def centred_clipping(
    grams: Grams, weights_W: Float64, parameters: CentredClippingParameters
) -> Mapping[str, Float64]:
    """V ← v + Σ w_i (v_i − v) min(1, τ / ‖v_i − v‖), from v = 0 (arXiv 2012.10333, algorithm 2)."""
    gram_WW = _whole(grams)
    radius = parameters.radius * _median_norm(gram_WW)
    centre_W = np.zeros_like(weights_W)
    for _ in range(parameters.iterations):
        distance_W = np.sqrt(_square_distance_to(gram_WW, centre_W))
        shorten_W = np.divide(radius, distance_W, out=np.ones_like(distance_W), where=distance_W > radius)
        pull_W = weights_W * shorten_W
        centre_W = centre_W * (1 - pull_W.sum()) + pull_W
    return _everywhere(grams, centre_W)


def _one(_count: int, _parameters: RuleParameters) -> float:
    return 1.0


ROWS: Final[tuple[MergeRule[Any], ...]] = (
    MergeRule(
        name=MergeRuleName.MEDIAN,
        title="Coordinate-wise median",
        paper="https://arxiv.org/abs/1803.01498",
        merge=median,
        robust=True,
    ),
    MergeRule(
        name=MergeRuleName.TRIMMED_MEAN,
        title="Mean without the extremes of each coordinate",
        paper="https://arxiv.org/abs/1803.01498",
        merge=trimmed_mean,
        robust=True,
    ),
    MergeRule(
        name=MergeRuleName.KRUM,
        title="Krum: the update nearest to its neighbours",
        paper="https://arxiv.org/abs/1703.02757",
        merge=mean,
        choose=krum,
        linear=_one,
        row_by_row=True,
        robust=True,
    ),
    MergeRule(
        name=MergeRuleName.MULTI_KRUM,
        title="Multi-Krum: the mean of those nearest to their neighbours",
        paper="https://arxiv.org/abs/1703.02757",
        merge=mean,
        choose=multi_krum,
        linear=_one,
        row_by_row=True,
        robust=True,
    ),
    MergeRule(
        name=MergeRuleName.BULYAN,
        title="Bulyan: Krum's choice, then a trimmed mean",
        paper="https://arxiv.org/abs/1802.07927",
        merge=bulyan,
        choose=bulyan_choice,
        robust=True,
    ),
    MergeRule(
        name=MergeRuleName.GEOMETRIC_MEDIAN,
        title="Geometric median (RFA)",
        paper="https://arxiv.org/abs/1912.13445",
        merge=mean,
        choose=geometric_median,
        linear=_one,
        row_by_row=True,
        robust=True,
    ),
    MergeRule(
        name=MergeRuleName.CENTRED_CLIPPING,
        title="Centred clipping",
        paper="https://arxiv.org/abs/2012.10333",
        merge=mean,
        choose=centred_clipping,
        linear=_one,
        row_by_row=True,
        robust=True,
    ),
)
"""The robust rows of ``RULES``."""
