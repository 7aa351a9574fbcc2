"""Rules that are a multiple of the weighted mean.

They see one update after the other, and LoRA factors can be merged as the product that they stand for.

Legend: W = updates, T = elements of a tile.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np

from weft.common.modules import LORA_A
from weft.server.merge.movements import Movements
from weft.server.merge.rule import MergeRule
from weft.server.merge.settings import (
    MagnitudeParameters,
    MergeRuleName,
    NegationParameters,
    RuleParameters,
    TaskArithmeticParameters,
)
from weft.server.merge.tiles import Float32


class Scaled(Protocol):
    """Parameters with a scale."""

    @property
    def scale(self) -> float:
        """What multiplies the merged movement."""
        ...


def weighted_mean(movements: Movements, multiple: float) -> Float32:
    """``multiple`` · Σ weight · value, added up in float32 in the order of updates."""
    total_T = movements.scratch.zeros("total", movements.size, np.float32)
    shared = movements.shared_factor()
    for row in movements.rows():
        row.add_to(total_T, row.factor if shared is None else 1.0)
    multiple *= 1.0 if shared is None else shared
    return total_T if multiple == 1 else np.multiply(total_T, np.float32(multiple), out=total_T)


def mean(movements: Movements, _survey: int, _parameters: RuleParameters) -> Float32:
    """Weighted mean (FedAvg, arXiv 1602.05629, section 2)."""
    return weighted_mean(movements, 1.0)


def scaled_mean(movements: Movements, _survey: int, parameters: Scaled) -> Float32:
    """The weighted mean times the ``scale`` of the parameters."""
    return weighted_mean(movements, parameters.scale)


def task_arithmetic(movements: Movements, _survey: int, parameters: TaskArithmeticParameters) -> Float32:
    """λ Σ τ_i (arXiv 2212.04089, section 4); weights that differ shift the sum, and do not shrink it."""
    return weighted_mean(movements, parameters.scale * len(movements.contributors))


def negation(movements: Movements, _survey: int, parameters: NegationParameters) -> Float32:
    """Away from what was learnt: −λ Σ w_i τ_i (arXiv 2212.04089, section 3).

    Of LoRA factors only B changes its sign (arXiv 2306.14870): were both negated, B A would stay as it is.
    """
    sign = 1.0 if movements.spec.name.endswith(LORA_A) else -1.0
    return weighted_mean(movements, sign * parameters.scale)


def magnitude(movements: Movements, _survey: int, _parameters: MagnitudeParameters) -> Float32:
    """Weighted mean of movements trimmed to their largest magnitudes (TIES without its election).

    Exactly max(1, ⌊N · density⌋) elements of a tensor stay, the first of equal ones; zeros are never counted as
    kept. What a codec has made sparse is not trimmed again.
    """
    return weighted_mean(movements, 1.0)


def _task_arithmetic_multiple(count: int, parameters: TaskArithmeticParameters) -> float:
    return parameters.scale * count


def _negation_multiple(_count: int, parameters: NegationParameters) -> float:
    return -parameters.scale


ROWS: Final[tuple[MergeRule[Any], ...]] = (
    MergeRule(
        name=MergeRuleName.MEAN,
        title="Weighted mean",
        paper="https://arxiv.org/abs/1602.05629",
        merge=mean,
        linear=lambda _count, _parameters: 1.0,
        keeps_nan=True,
        row_by_row=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.TASK_ARITHMETIC,
        title="Task arithmetic: a multiple of the sum",
        paper="https://arxiv.org/abs/2212.04089",
        merge=task_arithmetic,
        linear=_task_arithmetic_multiple,
        keeps_nan=True,
        row_by_row=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.NEGATION,
        title="Negation: away from what was learnt",
        paper="https://arxiv.org/abs/2212.04089",
        merge=negation,
        linear=_negation_multiple,
        keeps_nan=True,
        row_by_row=True,
        secure_aggregation=True,
    ),
    MergeRule(
        name=MergeRuleName.MAGNITUDE,
        title="Mean of the largest magnitudes",
        paper="https://arxiv.org/abs/2306.01708",
        merge=magnitude,
        keeps_nan=True,
        row_by_row=True,
        secure_aggregation=True,
    ),
)
"""The linear rows of ``RULES``."""
