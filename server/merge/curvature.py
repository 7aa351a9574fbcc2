"""Rules that weigh by what the loss, or a layer's inputs, say about each parameter.

Those by inputs see a matrix whole: their functions are in ``whole``, and other tensors are averaged.

Legend: W = updates, T = elements of a tile.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from weft.server.merge.linear import mean
from weft.server.merge.movements import Movements
from weft.server.merge.rule import MergeRule, Scope
from weft.server.merge.settings import FisherParameters, MergeRuleName
from weft.server.merge.tiles import Float64, weighted_sum
from weft.server.merge.whole import least_squares, regmean


def fisher(movements: Movements, _survey: int, parameters: FisherParameters) -> Float64:
    """Mean weighted by the diagonal Fisher, bounded (arXiv 2111.09832, section 3).

    Each update's Fisher is divided by its own mean and bounded to [floor, cap]: workers state it themselves,
    and one that claims F → ∞ must not own the module. An update whose Fisher is zero everywhere counts as 1; a
    coordinate whose Fisher is zero counts as the floor, so that no coordinate is without weight.
    """
    fisher_WT, mean_W1 = movements.fisher(), movements.fisher_means()[:, np.newaxis]
    relative_WT = np.divide(fisher_WT, mean_W1, out=np.ones_like(fisher_WT), where=mean_W1 > 0)
    relative_WT = relative_WT.clip(parameters.floor, parameters.cap)
    weights_W = movements.weights
    return weighted_sum(movements.stack() * relative_WT, weights_W) / weighted_sum(relative_WT, weights_W)


ROWS: Final[tuple[MergeRule[Any], ...]] = (
    MergeRule(
        name=MergeRuleName.FISHER,
        title="Mean weighted by a bounded diagonal Fisher",
        paper="https://arxiv.org/abs/2111.09832",
        merge=fisher,
        needs_fisher=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.REGMEAN,
        title="RegMean: regression to each one's outputs on its inputs",
        paper="https://arxiv.org/abs/2212.09849",
        merge=mean,
        scope=Scope.MATRIX,
        whole=regmean,
        row_by_row=True,
        needs_grams=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.LEAST_SQUARES,
        title="Least squares over each one's inputs",
        paper="https://arxiv.org/abs/2305.18292",
        merge=mean,
        scope=Scope.MATRIX,
        whole=least_squares,
        row_by_row=True,
        needs_grams=True,
        secure_aggregation=True,
    ),
)
"""The curvature rows of ``RULES``."""
