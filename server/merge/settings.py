"""The ``[merge]`` table of a run file."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from weft.common.errors import UsageError


class MergeRuleName(enum.StrEnum):
    """The merge rules; ``weft.server.merge.rules.RULES`` has a row for each."""

    """The merge rules; ``weft.server.merge.rules.RULES`` has a row for each."""

    MEAN = "mean"
    TASK_ARITHMETIC = "task_arithmetic"
    NEGATION = "negation"
    MAGNITUDE = "magnitude"
    TIES = "ties"
    SIGN_MAJORITY = "sign_majority"
    DARE = "dare"
    DARE_TIES = "dare_ties"
    DELLA = "della"
    BREADCRUMBS = "breadcrumbs"
    FISHER = "fisher"
    MEDIAN = "median"
    TRIMMED_MEAN = "trimmed_mean"
    KRUM = "krum"
    MULTI_KRUM = "multi_krum"
    BULYAN = "bulyan"
    GEOMETRIC_MEDIAN = "geometric_median"
    CENTRED_CLIPPING = "centred_clipping"
    SLERP = "slerp"
    MODEL_STOCK = "model_stock"
    PCB = "pcb"
    KNOTS = "knots"
    TSV = "tsv"
    ISO = "iso"
    REGMEAN = "regmean"
    LEAST_SQUARES = "least_squares"


class Clip(enum.StrEnum):
    """How the norm of an update is bounded before the rule."""

    NONE = "none"
    MEDIAN = "median"


class LoraSpace(enum.StrEnum):
    """What a rule is applied to when the module is LoRA factors."""

    EXACT = "exact"
    FACTORS = "factors"


class Rescale(enum.StrEnum):
    """What makes up for movements that cancel each other in a mean."""

    NONE = "none"
    SQRT_PATHS = "sqrt_paths"
    RDA = "rda"


class Weights(enum.StrEnum):
    """What an update counts for."""

    TOKENS = "tokens"
    SHARD = "shard"
    EQUAL = "equal"


class TiesConvention(enum.StrEnum):
    """Whose TIES it is: the implementations differ in trim, sign ties and weights."""

    OFFICIAL = "official"
    PEFT = "peft"
    MERGEKIT = "mergekit"
    FREQUENCY = "frequency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trim:
    """Keep the largest magnitudes of each tensor of each update, as a rule asks for."""

    density: float
    """Share of elements to keep, 0 to 1."""
    keeps_ties: bool
    """Keep everything as large as the smallest kept value, rather than an exact number by lowest index."""
    outliers: float = 0.0
    """Share of elements, the very largest, that are dropped as well."""


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
class TaskArithmeticParameters(RuleParameters):
    """The ``[merge.task_arithmetic]`` table (arXiv 2212.04089)."""

    scale: float = 0.3
    """λ: what multiplies the sum of the movements; the more of them, the smaller it should be."""

    def __post_init__(self) -> None:
        check_number("merge.task_arithmetic.scale", self.scale, 1e-6, 100, "0.3")


@dataclass(frozen=True, slots=True, kw_only=True)
class NegationParameters(RuleParameters):
    """The ``[merge.negation]`` table (arXiv 2212.04089, section 3; for LoRA arXiv 2306.14870)."""

    scale: float = 1.0
    """How far to go the other way, in weighted means."""

    def __post_init__(self) -> None:
        check_number("merge.negation.scale", self.scale, 1e-6, 100, "1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class MagnitudeParameters(RuleParameters):
    """The ``[merge.magnitude]`` table: the weighted mean of trimmed movements."""

    density: float = 0.2
    """Share of each tensor's elements that trimming keeps; what a codec made sparse is not trimmed again."""

    def __post_init__(self) -> None:
        check_number("merge.magnitude.density", self.density, 1e-6, 1, "0.2")

    @property
    def trim(self) -> Trim:
        """Exactly so many, tensor by tensor."""
        return Trim(density=self.density, keeps_ties=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DareParameters(RuleParameters):
    """The ``[merge.dare]`` table (arXiv 2311.03099)."""

    density: float = 0.5
    """Share of elements that are kept, by chance, and divided by it."""
    seed: int = 0
    """With the update and the tensor, decides which."""
    scale: float = 1.0
    """What multiplies the merged movement."""

    def __post_init__(self) -> None:
        check_number("density of merge.dare or merge.dare_ties", self.density, 1e-3, 1, "0.5")
        check_number("scale of merge.dare or merge.dare_ties", self.scale, 1e-6, 100, "1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class DareTiesParameters(DareParameters):
    """The ``[merge.dare_ties]`` table: DARE, then the election of TIES, without its trim."""

    convention: TiesConvention = TiesConvention.PEFT
    """Whose election, as in ``[merge.ties]``."""
    average: bool = True
    """Divide the sum of what agrees; false leaves the weighted sum, as mergekit does by default."""

    @property
    def surveys(self) -> bool:
        """As of TIES."""
        return self.convention is TiesConvention.OFFICIAL

    @property
    def election(self) -> TiesParameters:
        """What is done with what chance has left."""
        return TiesParameters(convention=self.convention, average=self.average, scale=self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class DellaParameters(RuleParameters):
    """The ``[merge.della]`` table (arXiv 2406.11617)."""

    density: float = 0.5
    """Mean share of elements that are kept, by chance, each divided by its own chance."""
    spread: float = 0.15
    """ε: chances run from density − ε for a row's smallest magnitude to density + ε for its largest."""
    seed: int = 0
    """With the update and the tensor, decides which."""
    scale: float = 1.0
    """What multiplies the merged movement."""

    def __post_init__(self) -> None:
        check_number("merge.della.density", self.density, 1e-3, 1, "0.5")
        check_number("merge.della.spread", self.spread, 0, min(self.density - 1e-4, 1 - self.density), "0.15")
        check_number("merge.della.scale", self.scale, 1e-6, 100, "1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class BreadcrumbsParameters(RuleParameters):
    """The ``[merge.breadcrumbs]`` table (arXiv 2312.06795)."""

    density: float = 0.1
    """β: share of each tensor's elements that are kept: the largest but for the outliers."""
    outliers: float = 0.01
    """γ: share of elements, the very largest, that are dropped."""
    scale: float = 0.3
    """What multiplies the sum of the movements."""

    def __post_init__(self) -> None:
        check_number("merge.breadcrumbs.density", self.density, 1e-6, 1, "0.1")
        check_number("merge.breadcrumbs.outliers", self.outliers, 0, 1 - self.density, "0.01")
        check_number("merge.breadcrumbs.scale", self.scale, 1e-6, 100, "0.3")

    @property
    def trim(self) -> Trim:
        """Tensor by tensor."""
        return Trim(density=self.density, keeps_ties=False, outliers=self.outliers)


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustParameters(RuleParameters):
    """The table of a rule that is told how many updates may lie: trimmed_mean, krum, multi_krum and bulyan."""

    share: float = 0.2
    """Largest share of updates that may be arbitrary; rounded down, and to what the rule can bear."""

    def __post_init__(self) -> None:
        check_number("share of a robust merge rule", self.share, 0, 0.49, "0.2")


@dataclass(frozen=True, slots=True, kw_only=True)
class GeometricMedianParameters(RuleParameters):
    """The ``[merge.geometric_median]`` table (RFA, arXiv 1912.13445)."""

    iterations: int = 16
    """Steps of Weiszfeld's algorithm; each costs n² operations, not a pass."""
    smoothing: float = 1e-6
    """ν, in medians of the norms: distances below it count as it."""

    def __post_init__(self) -> None:
        check_number("merge.geometric_median.iterations", self.iterations, 1, 1000, "16")
        check_number("merge.geometric_median.smoothing", self.smoothing, 1e-12, 1, "1e-6")


@dataclass(frozen=True, slots=True, kw_only=True)
class CentredClippingParameters(RuleParameters):
    """The ``[merge.centred_clipping]`` table (arXiv 2012.10333)."""

    radius: float = 1.0
    """τ, in medians of the norms: how far from the centre an update pulls at most."""
    iterations: int = 3
    """Steps of the centre, which starts at no movement."""

    def __post_init__(self) -> None:
        check_number("merge.centred_clipping.radius", self.radius, 1e-6, 1e9, "1.0")
        check_number("merge.centred_clipping.iterations", self.iterations, 1, 1000, "3")


@dataclass(frozen=True, slots=True, kw_only=True)
class TiesParameters(RuleParameters):
    """The ``[merge.ties]`` table (TIES-Merging, arXiv 2306.01708)."""

    density: float = 0.2
    """Share of each tensor's elements that trimming keeps; what a codec made sparse is not trimmed again."""
    convention: TiesConvention = TiesConvention.OFFICIAL
    """official: the authors' trim and sign ties; peft, mergekit: as those; frequency: signs by count, as peft."""
    average: bool = True
    """Divide the sum of what agrees; false leaves the weighted sum, smaller by the weight that does not agree."""
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
class SlerpParameters(RuleParameters):
    """The ``[merge.slerp]`` table."""

    straight_above: float = 1 - 1e-9
    """Cosines beyond this, either way, are merged along a straight line; mergekit's is 0.9995."""

    def __post_init__(self) -> None:
        check_number("merge.slerp.straight_above", self.straight_above, 0, 1 - 1e-12, "0.9995")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStockParameters(RuleParameters):
    """The ``[merge.model_stock]`` table (arXiv 2403.19522)."""

    clamp: bool = True
    """Count a mean cosine below 0 as 0, and stay; false goes the other way, as mergekit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PcbParameters(RuleParameters):
    """The ``[merge.pcb]`` table (PCB-Merging, arXiv 2410.02396)."""

    density: float = 0.1
    """Share of each tensor's elements that an update keeps: those of the best scores."""
    scale: float = 1.0
    """What multiplies the merged movement."""

    def __post_init__(self) -> None:
        check_number("merge.pcb.density", self.density, 1e-6, 1, "0.1")
        check_number("merge.pcb.scale", self.scale, 1e-6, 100, "1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class KnotsParameters(RuleParameters):
    """The ``[merge.knots]`` table (KnOTS-TIES, arXiv 2410.19735)."""

    density: float = 1.0
    """Share of each update's coordinates in the shared basis that trimming keeps."""
    scale: float = 1.0
    """What multiplies the merged movement."""

    def __post_init__(self) -> None:
        check_number("merge.knots.density", self.density, 1e-6, 1, "1.0")
        check_number("merge.knots.scale", self.scale, 1e-6, 100, "1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TsvParameters(RuleParameters):
    """The ``[merge.tsv]`` table (TSV-M, arXiv 2412.00081)."""

    scale: float = 1.0
    """α: what multiplies the merged movement."""

    def __post_init__(self) -> None:
        check_number("merge.tsv.scale", self.scale, 1e-6, 100, "1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class IsoParameters(RuleParameters):
    """The ``[merge.iso]`` table (Iso-C, arXiv 2502.04959)."""

    scale: float = 1.0
    """α: what multiplies the merged movement."""

    def __post_init__(self) -> None:
        check_number("merge.iso.scale", self.scale, 1e-6, 100, "1.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastSquaresParameters(RuleParameters):
    """The ``[merge.least_squares]`` table."""

    ridge: float = 1e-5
    """How much the weighted mean counts, in mean squares of each input."""

    def __post_init__(self) -> None:
        check_number("ridge of merge.least_squares or merge.regmean", self.ridge, 1e-12, 1e6, "1e-5")


@dataclass(frozen=True, slots=True, kw_only=True)
class RegmeanParameters(LeastSquaresParameters):
    """The ``[merge.regmean]`` table (RegMean, arXiv 2212.09849)."""

    off_diagonal: float = 0.9
    """α: what multiplies a Gram matrix but for its diagonal."""

    def __post_init__(self) -> None:
        LeastSquaresParameters.__post_init__(self)
        check_number("merge.regmean.off_diagonal", self.off_diagonal, 0, 1, "0.9")


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
    """How the updates of a round become one movement; docs/merge-rules.md has them all."""
    clip: Clip = Clip.MEDIAN
    """median: no update moves further than clip_multiple times the median one; none: as it was sent."""
    clip_multiple: float = 1.0
    """Bound on the norm of an update, in medians of the round."""
    weight_multiple_max: float = 10.0
    """Bound on the weight of an update, in medians of the round, since workers state their own."""
    weights: Weights = Weights.TOKENS
    """tokens: what an update was trained on; shard: all the data of its path and worker; equal: each the same."""
    rescale: Rescale = Rescale.NONE
    """none; sqrt_paths: × √(paths merged); rda: as long as the mean movement. For rule mean, different paths."""
    lora: LoraSpace | None = None
    """exact: merge ΔW = BA; factors: merge A and B apart; unset: exact where rule and optimiser allow."""
    task_arithmetic: TaskArithmeticParameters | None = None
    """Parameters of rule task_arithmetic."""
    negation: NegationParameters | None = None
    """Parameters of rule negation."""
    magnitude: MagnitudeParameters | None = None
    """Parameters of rule magnitude."""
    ties: TiesParameters | None = None
    """Parameters of rule ties."""
    dare: DareParameters | None = None
    """Parameters of rule dare."""
    dare_ties: DareTiesParameters | None = None
    """Parameters of rule dare_ties."""
    della: DellaParameters | None = None
    """Parameters of rule della."""
    breadcrumbs: BreadcrumbsParameters | None = None
    """Parameters of rule breadcrumbs."""
    fisher: FisherParameters | None = None
    """Parameters of rule fisher."""
    trimmed_mean: RobustParameters | None = None
    """Parameters of rule trimmed_mean."""
    krum: RobustParameters | None = None
    """Parameters of rule krum."""
    multi_krum: RobustParameters | None = None
    """Parameters of rule multi_krum."""
    bulyan: RobustParameters | None = None
    """Parameters of rule bulyan."""
    geometric_median: GeometricMedianParameters | None = None
    """Parameters of rule geometric_median."""
    centred_clipping: CentredClippingParameters | None = None
    """Parameters of rule centred_clipping."""
    slerp: SlerpParameters | None = None
    """Parameters of rule slerp."""
    model_stock: ModelStockParameters | None = None
    """Parameters of rule model_stock."""
    pcb: PcbParameters | None = None
    """Parameters of rule pcb."""
    knots: KnotsParameters | None = None
    """Parameters of rule knots."""
    tsv: TsvParameters | None = None
    """Parameters of rule tsv."""
    iso: IsoParameters | None = None
    """Parameters of rule iso."""
    regmean: RegmeanParameters | None = None
    """Parameters of rule regmean."""
    least_squares: LeastSquaresParameters | None = None
    """Parameters of rule least_squares."""

    def __post_init__(self) -> None:
        check_number("merge.clip_multiple", self.clip_multiple, 0.01, 1e6, "1.0")
        check_number("merge.weight_multiple_max", self.weight_multiple_max, 1, 1e9, "10")
        if self.rescale is not Rescale.NONE and self.rule is not MergeRuleName.MEAN:
            raise UsageError(
                f'merge.rescale is "{self.rescale}" and merge.rule is "{self.rule}"',
                hint='set merge.rule = "mean", or remove merge.rescale',
            )
        for name in MergeRuleName:
            if name is not self.rule and getattr(self, name, None) is not None:
                raise UsageError(
                    f"merge.{name} is set and merge.rule is {self.rule.value!r}",
                    hint=f'set merge.rule = "{name}", or remove [merge.{name}]',
                )

    @property
    def parameters(self) -> RuleParameters:
        """The chosen rule's parameters, its defaults where the file says nothing."""
        chosen: RuleParameters | None = getattr(self, self.rule, None)
        return chosen if chosen is not None else DEFAULT_PARAMETERS[self.rule]


DEFAULT_PARAMETERS: Final[Mapping[MergeRuleName, RuleParameters]] = {
    MergeRuleName.MEAN: RuleParameters(),
    MergeRuleName.TASK_ARITHMETIC: TaskArithmeticParameters(),
    MergeRuleName.NEGATION: NegationParameters(),
    MergeRuleName.MAGNITUDE: MagnitudeParameters(),
    MergeRuleName.TIES: TiesParameters(),
    MergeRuleName.SIGN_MAJORITY: RuleParameters(),
    MergeRuleName.DARE: DareParameters(),
    MergeRuleName.DARE_TIES: DareTiesParameters(),
    MergeRuleName.DELLA: DellaParameters(),
    MergeRuleName.BREADCRUMBS: BreadcrumbsParameters(),
    MergeRuleName.FISHER: FisherParameters(),
    MergeRuleName.MEDIAN: RuleParameters(),
    MergeRuleName.TRIMMED_MEAN: RobustParameters(),
    MergeRuleName.KRUM: RobustParameters(),
    MergeRuleName.MULTI_KRUM: RobustParameters(),
    MergeRuleName.BULYAN: RobustParameters(),
    MergeRuleName.GEOMETRIC_MEDIAN: GeometricMedianParameters(),
    MergeRuleName.CENTRED_CLIPPING: CentredClippingParameters(),
    MergeRuleName.SLERP: SlerpParameters(),
    MergeRuleName.MODEL_STOCK: ModelStockParameters(),
    MergeRuleName.PCB: PcbParameters(),
    MergeRuleName.KNOTS: KnotsParameters(),
    MergeRuleName.TSV: TsvParameters(),
    MergeRuleName.ISO: IsoParameters(),
    MergeRuleName.REGMEAN: RegmeanParameters(),
    MergeRuleName.LEAST_SQUARES: LeastSquaresParameters(),
}
"""What a rule runs with when the run file has no table for it."""
