"""The merge rules: updates → one movement, tile by tile.

A rule is a row of ``RULES``. Its function sees the movements of a tile after clipping and trimming, float64
[W, T], sorted by worker, weights that sum to one, and what it declared to need; it returns float64 [T]. It
adds up over workers with ``weighted_sum`` only, so that the result does not depend on how the module was cut.

Legend: W = updates, T = elements of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

import numpy as np

from weft.common.errors import UsageError
from weft.server.merge.settings import (
    FisherParameters,
    LoraSpace,
    MergeRuleName,
    MergeSettings,
    RuleParameters,
    TiesConvention,
    TiesParameters,
)
from weft.server.merge.tiles import Float64, weighted_sum
from weft.server.outer import OuterSettings

P = TypeVar("P", bound=RuleParameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What a rule may know beyond the movements of its tile."""

    fisher: Float64 | None = None
    """Diagonal Fisher of the tile, float64 [W, T]; None unless the rule needs it."""
    fisher_mean: Float64 | None = None
    """Mean Fisher of each update over the whole module, float64 [W]; None unless the rule needs it."""
    survey: int = 0
    """Sum of the rule's ``survey`` over all tiles of the module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRule(Generic[P]):
    """One row of ``RULES``."""

    name: str
    """What ``merge.rule`` says."""
    title: str
    """One line for people."""
    paper: str
    """Where it is defined."""
    merge: Callable[[Float64, Float64, Statistics, P], Float64]
    """(movements [W, T], weights [W] that sum to 1, statistics, parameters) → [T]."""
    survey: Callable[[Float64], int] | None = None
    """A whole number of a tile's movements [W, T], added up over the module if the parameters say so."""
    needs_fisher: bool = False
    """Workers send the diagonal Fisher beside the update."""
    robust: bool = False
    """Bounded under a minority of arbitrary updates even without clipping."""
    secure_aggregation: bool = False
    """Can be computed from sums over workers alone."""
    spaces: frozenset[LoraSpace] = frozenset({LoraSpace.FACTORS})
    """EXACT only for rules that are linear in the updates: others would need a dense ΔW."""


def mean(
    movements_WT: Float64, weights_W: Float64, _statistics: Statistics, _parameters: RuleParameters
) -> Float64:
    """Weighted mean (FedAvg, arXiv 1602.05629, section 2)."""
    return weighted_sum(movements_WT, weights_W)


def ties(
    movements_WT: Float64, weights_W: Float64, statistics: Statistics, parameters: TiesParameters
) -> Float64:
    """TIES on trimmed movements: elect a sign, average what agrees with it (arXiv 2306.01708, section 3).

    Signs are elected by unweighted mass under both conventions. A tie takes the majority sign of the module
    (official; negative if that is a tie too) or + (peft). The average divides by the agreeing weights
    (official: with equal weights that is the paper's count) or by the count of agreeing workers (peft).
    """
    official = parameters.convention is TiesConvention.OFFICIAL
    mass_T = _mass(movements_WT)
    positive_on_tie = statistics.survey > 0 if official else True
    sign_T = np.where(mass_T >= 0 if positive_on_tie else mass_T > 0, 1.0, -1.0)
    agreeing_WT = np.maximum(movements_WT * sign_T, 0.0)
    counts_W = weights_W if official else np.full_like(weights_W, 1 / len(weights_W))
    merged_T = weighted_sum(agreeing_WT, weights_W)
    kept_T = weighted_sum(agreeing_WT > 0, counts_W)
    np.divide(merged_T, kept_T, out=merged_T, where=kept_T > 0)
    return parameters.scale * sign_T * merged_T


def _mass(movements_WT: Float64) -> Float64:
    return weighted_sum(movements_WT, np.ones(len(movements_WT)))


def sign_balance(movements_WT: Float64) -> int:
    """Coordinates of positive mass less those of negative mass: its sign is the module's majority sign."""
    return int(np.sign(_mass(movements_WT)).sum())


def fisher(
    movements_WT: Float64, weights_W: Float64, statistics: Statistics, parameters: FisherParameters
) -> Float64:
    """Mean weighted by the diagonal Fisher, bounded (arXiv 2111.09832, section 3).

    Each update's Fisher is divided by its own mean and bounded to [floor, cap]: workers state it themselves,
    and one that claims F → ∞ must not own the module. An update whose Fisher is zero everywhere counts as 1.
    """
    assert statistics.fisher is not None  # noqa: S101
    assert statistics.fisher_mean is not None  # noqa: S101
    mean_W1 = statistics.fisher_mean[:, np.newaxis]
    relative_WT = np.divide(
        statistics.fisher, mean_W1, out=np.ones_like(movements_WT), where=mean_W1 > 0
    ).clip(parameters.floor, parameters.cap)
    return weighted_sum(movements_WT * relative_WT, weights_W) / weighted_sum(relative_WT, weights_W)


RULES: Final[Mapping[MergeRuleName, MergeRule[Any]]] = {
    MergeRuleName.MEAN: MergeRule(
        name=MergeRuleName.MEAN,
        title="Weighted mean",
        paper="https://arxiv.org/abs/1602.05629",
        merge=mean,
        secure_aggregation=True,
        spaces=frozenset(LoraSpace),
    ),
    MergeRuleName.TIES: MergeRule(
        name=MergeRuleName.TIES,
        title="TIES: trim, elect a sign, average what agrees",
        paper="https://arxiv.org/abs/2306.01708",
        merge=ties,
        survey=sign_balance,
        secure_aggregation=True,
    ),
    MergeRuleName.FISHER: MergeRule(
        name=MergeRuleName.FISHER,
        title="Mean weighted by a bounded diagonal Fisher",
        paper="https://arxiv.org/abs/2111.09832",
        merge=fisher,
        needs_fisher=True,
        secure_aggregation=True,
    ),
}


def lora_space(settings: MergeSettings, outer: OuterSettings) -> LoraSpace:
    """Where LoRA factors are merged under these settings.

    Raises:
        UsageError: ``merge.lora = "exact"`` with a rule or an outer optimiser that cannot work on ΔW.
    """
    linear = LoraSpace.EXACT in RULES[settings.rule].spaces
    if settings.lora is None:
        return LoraSpace.EXACT if linear and not outer.has_momentum else LoraSpace.FACTORS
    if settings.lora is LoraSpace.EXACT and not linear:
        raise UsageError(
            f'merge.lora is "exact" and merge.rule is "{settings.rule}", which is not linear in the updates',
            hint='set merge.lora = "factors", or merge.rule = "mean": others need a dense ΔW of every worker',
        )
    if settings.lora is LoraSpace.EXACT and outer.has_momentum:
        raise UsageError(
            f'merge.lora is "exact" and outer.name is "{outer.name}", whose momentum has no bounded rank',
            hint='set merge.lora = "factors", or outer.name = "sgd"',
        )
    return settings.lora
