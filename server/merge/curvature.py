"""Rules that weigh by what the loss says about each parameter.

Legend: W = updates, T = elements of a tile.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from weft.server.merge.movements import Movements
from weft.server.merge.rule import MergeRule
from weft.server.merge.settings import FisherParameters, MergeRuleName
from weft.server.merge.tiles import Float64, weighted_sum


def fisher(movements: Movements, _survey: int, parameters: FisherParameters) -> Float64:
    """Mean weighted by the diagonal Fisher, bounded (arXiv 2111.09832, section 3).

    Each update's Fisher is divided by its own mean and bounded to [floor, cap]: workers state it themselves,
    and one that claims F → ∞ must not own the module. An update whose Fisher is zero everywhere counts as 1.
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
)
"""The curvature rows of ``RULES``."""
