"""The ``[merge]`` table of a run file."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from weft.common.errors import UsageError


class MergeRuleName(enum.StrEnum):
    """The merge rules; ``weft.server.merge.rules.RULES`` has a row for each."""

    """The merge rules; ``weft.server.merge.rules.RULES`` has a row for each."""

    MEAN = "mean"
    TIES = "ties"
    FISHER = "fisher"


class Clip(enum.StrEnum):
    """How the norm of an update is bounded before the rule."""

    NONE = "none"
    MEDIAN = "median"


class LoraSpace(enum.StrEnum):
    """What a rule is applied to when the module is LoRA factors."""

    EXACT = "exact"
    FACTORS = "factors"


class TiesConvention(enum.StrEnum):
    """Whose TIES it is: the implementations differ in trim, sign ties and weights."""

    OFFICIAL = "official"
    PEFT = "peft"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trim:
    """Keep the largest magnitudes of each tensor of each update, as a rule asks for."""

    density: float
    """Share of elements to keep, 0 to 1."""
    keeps_ties: bool
    """Keep everything as large as the smallest kept value, rather than an exact number by lowest index."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleParameters:
    """A rule's own settings; this one is for rules that have none."""

    @property
    def trim(self) -> Trim | None:
        """How updates are trimmed before the rule sees them; None leaves them as they are."""
        return None

    @property
    def surveys(self) -> bool:
        """Whether the rule's ``survey`` is added up over the module first."""
        return False


def check_number(key: str, value: float, low: float, high: float, example: str) -> None:
    """Raise UsageError naming ``key`` unless ``value`` is finite and within ``low`` to ``high``."""
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{key} is {value}", hint=f"use {low:g} to {high:g}, for example {example}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TiesParameters(RuleParameters):
    """The ``[merge.ties]`` table (TIES-Merging, arXiv 2306.01708)."""

    density: float = 0.2
    """Share of each tensor's elements that trimming keeps; what a codec made sparse is not trimmed again."""
    convention: TiesConvention = TiesConvention.OFFICIAL
    """official: the authors' trim and sign ties; peft: as peft.utils.merge_utils."""
    scale: float = 1.0
    """λ: what multiplies the merged movement."""

    def __post_init__(self) -> None:
        check_number("merge.ties.density", self.density, 1e-6, 1, "0.2")
        check_number("merge.ties.scale", self.scale, 1e-6, 100, "1.0")

    @property
    def trim(self) -> Trim:
        """Section 3.1 of the paper, tensor by tensor."""
        return Trim(density=self.density, keeps_ties=self.convention is TiesConvention.OFFICIAL)

    @property
    def surveys(self) -> bool:
        """The authors resolve sign ties by the majority over all coordinates."""
        return self.convention is TiesConvention.OFFICIAL


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherParameters(RuleParameters):
    """The ``[merge.fisher]`` table (Fisher-weighted averaging, arXiv 2111.09832)."""

    floor: float = 0.1
    """Smallest Fisher that counts, relative to the mean Fisher of its update."""
    cap: float = 10.0
    """Largest Fisher that counts, relative to the mean Fisher of its update."""

    def __post_init__(self) -> None:
        check_number("merge.fisher.floor", self.floor, 1e-9, 1, "0.1")
        check_number("merge.fisher.cap", self.cap, 1, 1e9, "10")


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSettings:
    """How a round's updates become one movement."""

    rule: MergeRuleName = MergeRuleName.MEAN
    """mean, ties or fisher."""
    clip: Clip = Clip.MEDIAN
    """median: no update moves further than clip_multiple times the median one; none: as it was sent."""
    clip_multiple: float = 1.0
    """Bound on the norm of an update, in medians of the round."""
    weight_multiple_max: float = 10.0
    """Bound on the weight of an update, in medians of the round, since workers state their own."""
    lora: LoraSpace | None = None
    """exact: merge ΔW = BA; factors: merge A and B apart; unset: exact where rule and optimiser allow."""
    ties: TiesParameters | None = None
    """Parameters of rule ties."""
    fisher: FisherParameters | None = None
    """Parameters of rule fisher."""

    def __post_init__(self) -> None:
        check_number("merge.clip_multiple", self.clip_multiple, 0.01, 1e6, "1.0")
        check_number("merge.weight_multiple_max", self.weight_multiple_max, 1, 1e9, "10")
        for name in (MergeRuleName.TIES, MergeRuleName.FISHER):
            if getattr(self, name) is not None and self.rule is not name:
                raise UsageError(
                    f"merge.{name} is set and merge.rule is {self.rule.value!r}",
                    hint=f'set merge.rule = "{name}", or remove [merge.{name}]',
                )

    @property
    def parameters(self) -> RuleParameters:
        """The chosen rule's parameters, its defaults where the file says nothing."""
        chosen: RuleParameters | None = getattr(self, self.rule, None)
        return chosen if chosen is not None else DEFAULT_PARAMETERS[self.rule]


DEFAULT_PARAMETERS: dict[MergeRuleName, RuleParameters] = {
    MergeRuleName.MEAN: RuleParameters(),
    MergeRuleName.TIES: TiesParameters(),
    MergeRuleName.FISHER: FisherParameters(),
}
"""What a rule runs with when the run file has no table for it."""
