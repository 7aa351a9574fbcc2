"""Rules by angles and singular vectors, tensor by tensor.

Those by angles need the inner products of the updates of each tensor, and come down to weights for it. Those by
singular vectors see a matrix whole: their functions are in ``whole``.

Legend: W = updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from weft.common.errors import EngineFailed
from weft.server.merge.linear import mean, scaled_mean
from weft.server.merge.rule import Grams, MergeRule, Scope
from weft.server.merge.settings import MergeRuleName, ModelStockParameters, RuleParameters, SlerpParameters
from weft.server.merge.tiles import Float64
from weft.server.merge.whole import iso, knots, tsv

_VANISHING: Final = 1e-6
"""Denominators below this are rounding."""


def slerp(grams: Grams, weights_W: Float64, parameters: SlerpParameters) -> Mapping[str, Float64]:
    """Along the great circle between two movements, tensor by tensor (Shoemake 1985).

    sin((1 − t) Ω) / sin Ω · v_1 + sin(t Ω) / sin Ω · v_2, t the second one's weight. Its length is between
    theirs where they are as long, which that of their mean is not. Where they are parallel, opposite, or one is
    zero, there is no circle: it is the weighted mean.
    """
    if len(weights_W) > 2:
        raise EngineFailed(
            f"slerp merges two updates and there are {len(weights_W)}",
            hint='set merge.rule = "mean" or "model_stock", or quorum = 2',
        )
    if len(weights_W) == 1:
        return dict.fromkeys(grams, weights_W)
    return {
        name: _slerp(gram_WW, weights_W, straight_above=parameters.straight_above)
        for name, gram_WW in grams.items()
    }


def _slerp(gram_WW: Float64, weights_W: Float64, *, straight_above: float) -> Float64:
    lengths = math.sqrt(gram_WW[0, 0] * gram_WW[1, 1])
    cosine = gram_WW[0, 1] / lengths if lengths else 1.0
    if abs(cosine) > straight_above:
        return weights_W
    angle = math.acos(cosine)
    return np.asarray(np.sin(weights_W * angle) / math.sin(angle))


def model_stock(grams: Grams, weights_W: Float64, parameters: ModelStockParameters) -> Mapping[str, Float64]:
    """The mean, shortened by how little the movements agree, tensor by tensor (arXiv 2403.19522, section 4).

    t = n cos θ / (1 + (n − 1) cos θ), cos θ the mean cosine of two movements, that with a movement of zero
    being 0. Where movements turn from each other on the whole, the tensor stays as it is; without ``clamp`` it
    goes the other way, as mergekit's, and stays where the denominator vanishes.
    """
    return {
        name: weights_W * _stock_ratio(gram_WW, clamp=parameters.clamp) for name, gram_WW in grams.items()
    }


def _stock_ratio(gram_WW: Float64, *, clamp: bool) -> float:
    count = len(gram_WW)
    norms_W = np.sqrt(np.diag(gram_WW))
    lengths_WW = np.outer(norms_W, norms_W)
    cosines_WW = np.divide(gram_WW, lengths_WW, out=np.zeros_like(gram_WW), where=lengths_WW > 0)
    if count == 1:
        return 1.0
    cosine = float(cosines_WW[np.triu_indices(count, 1)].mean())
    denominator = 1 + (count - 1) * cosine
    if abs(denominator) < _VANISHING or (clamp and cosine < 0):
        return 0.0
    return count * cosine / denominator


def _one(_count: int, _parameters: RuleParameters) -> float:
    return 1.0


ROWS: Final[tuple[MergeRule[Any], ...]] = (
    MergeRule(
        name=MergeRuleName.SLERP,
        title="Spherical interpolation of two",
        paper="https://dl.acm.org/doi/10.1145/325165.325242",
        merge=mean,
        choose=slerp,
        linear=_one,
        row_by_row=True,
    ),
    MergeRule(
        name=MergeRuleName.MODEL_STOCK,
        title="Model stock: the mean, shortened by disagreement",
        paper="https://arxiv.org/abs/2403.19522",
        merge=mean,
        choose=model_stock,
        linear=_one,
        row_by_row=True,
    ),
    MergeRule(
        name=MergeRuleName.KNOTS,
        title="KnOTS: TIES in a basis that all updates share",
        paper="https://arxiv.org/abs/2410.19735",
        merge=scaled_mean,
        scope=Scope.MATRIX,
        whole=knots,
        row_by_row=True,
    ),
    MergeRule(
        name=MergeRuleName.TSV,
        title="TSV-M: main singular vectors of each, whitened",
        paper="https://arxiv.org/abs/2412.00081",
        merge=scaled_mean,
        scope=Scope.MATRIX,
        whole=tsv,
        row_by_row=True,
    ),
    MergeRule(
        name=MergeRuleName.ISO,
        title="Iso-C: the sum with a flat spectrum",
        paper="https://arxiv.org/abs/2502.04959",
        merge=scaled_mean,
        scope=Scope.MATRIX,
        whole=iso,
        row_by_row=True,
        secure_aggregation=True,
    ),
)
"""The subspace rows of ``RULES``."""
