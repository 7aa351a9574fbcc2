"""Rules by the angles between movements, tensor by tensor.

They need the inner products of the updates of each tensor, and come down to weights for it.

Legend: W = updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from weft.common.errors import EngineFailed
from weft.server.merge.linear import mean
from weft.server.merge.rule import Grams, MergeRule
from weft.server.merge.settings import MergeRuleName, RuleParameters
from weft.server.merge.tiles import Float64

_PARALLEL: Final = 1 - 1e-9
"""Cosines beyond this are of one line, where slerp is a straight line too."""


def slerp(grams: Grams, weights_W: Float64, _parameters: RuleParameters) -> Mapping[str, Float64]:
    """Along the great circle between two movements, tensor by tensor (Shoemake 1985).

    sin((1 − t) Ω) / sin Ω · v_1 + sin(t Ω) / sin Ω · v_2, t the second one's weight. Its length is between
    theirs where they are as long, which that of their mean is not.
    """
    if len(weights_W) > 2:
        raise EngineFailed(
            f"slerp merges two updates and there are {len(weights_W)}",
            hint='set merge.rule = "mean" or "model_stock", or quorum = 2',
        )
    if len(weights_W) == 1:
        return dict.fromkeys(grams, weights_W)
    return {name: _slerp(gram_WW, weights_W) for name, gram_WW in grams.items()}


def _slerp(gram_WW: Float64, weights_W: Float64) -> Float64:
    lengths = math.sqrt(gram_WW[0, 0] * gram_WW[1, 1])
    cosine = gram_WW[0, 1] / lengths if lengths else 1.0
    if abs(cosine) > _PARALLEL:
        return weights_W
    angle = math.acos(cosine)
    return np.asarray(np.sin(weights_W * angle) / math.sin(angle))


def model_stock(grams: Grams, weights_W: Float64, _parameters: RuleParameters) -> Mapping[str, Float64]:
    """The mean, shortened by how little the movements agree, tensor by tensor (arXiv 2403.19522, section 4).

    t = n cos θ / (1 + (n − 1) cos θ), cos θ the mean cosine of two movements, at least 0.
    """
    return {name: weights_W * _stock_ratio(gram_WW) for name, gram_WW in grams.items()}


def _stock_ratio(gram_WW: Float64) -> float:
    count = len(gram_WW)
    norms_W = np.sqrt(np.diag(gram_WW))
    lengths_WW = np.outer(norms_W, norms_W)
    cosines_WW = np.divide(gram_WW, lengths_WW, out=np.zeros_like(gram_WW), where=lengths_WW > 0)
    if count == 1:
        return 1.0
    cosine = max(0.0, float(cosines_WW[np.triu_indices(count, 1)].mean()))
    return count * cosine / (1 + (count - 1) * cosine)


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
)
"""The subspace rows of ``RULES``."""
