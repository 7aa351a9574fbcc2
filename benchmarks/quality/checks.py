"""The checks: what the papers found, against what the arms came to, paired by seed."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Results = Mapping[tuple[str, int], Mapping[str, Any]]
"""By arm and seed."""
_T_975: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Quantiles of Student's t by degrees of freedom."""
WITHIN: Final = 0.05
"""Nats that count as a few per cent: 5 % of perplexity."""


class Expected(enum.Enum):
    """What a difference of losses should be."""

    LOWER = "< 0"
    HIGHER = "> 0"
    SMALL = "≈ 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The loss of ``first`` less that of ``second``."""

    number: str
    """Of the check."""
    claim: str
    """What is expected, in words."""
    source: str
    """Who found it."""
    first: tuple[str, ...]
    """Arm, and the keys of its result down to a loss."""
    second: tuple[str, ...]
    """The same."""
    expected: Expected
    """Sign of first − second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a check came to."""

    check: Check
    """Which."""
    mean: float
    """Mean difference in nats a token."""
    half_width: float
    """Of the 95 % t interval."""
    num_seeds: int
    """Pairs."""

    @property
    def has_expected_sign(self) -> bool:
        """Whether the mean is on the expected side, the interval aside."""
        if self.check.expected is Expected.SMALL:
            return abs(self.mean) <= WITHIN
        return (self.mean > 0) == (self.check.expected is Expected.HIGHER)

    @property
    def verdict(self) -> str:
        """confirmed, not shown (the interval allows both) or opposite."""
        low, high = self.mean - self.half_width, self.mean + self.half_width
        if self.check.expected is Expected.SMALL:
            if low >= -WITHIN and high <= WITHIN:
                return "confirmed"
            return "opposite" if low > WITHIN or high < -WITHIN else "not shown"
        sign = 1 if self.check.expected is Expected.HIGHER else -1
        if low > 0 or high < 0:
            return "confirmed" if sign * self.mean > 0 else "opposite"
        return "not shown"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % t interval; infinite for one value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, _T_975[len(values) - 1] * math.sqrt(variance / len(values))


def measure(check: Check, results: Results) -> Measured | None:
    """The check over all seeds that have both arms; None without any."""
    differences = [
        _value(results, check.first, seed) - _value(results, check.second, seed)
        for seed in seeds_of(results, check.first[0], check.second[0])
    ]
    if not differences:
        return None
    mean, half_width = interval(differences)
    return Measured(check=check, mean=mean, half_width=half_width, num_seeds=len(differences))


def seeds_of(results: Results, *names: str) -> list[int]:
    """Seeds for which all of these arms were run."""
    return sorted(set.intersection(*({seed for known, seed in results if known == name} for name in names)))


def gap_closed(result: Mapping[str, Any]) -> float:
    """Share of the way from the pre-trained base's loss to the entropy floor."""
    begin, floor = result["loss_before"], result["floor"]
    return float((begin - result["loss"]) / (begin - floor))


def _value(results: Results, where: Sequence[str], seed: int) -> float:
    found: Any = results[where[0], seed]
    for key in where[1:]:
        found = found[key]
    return float(found)


def _compare(
    number: str, claim: str, source: str, first: str, second: str, expected: Expected = Expected.LOWER
) -> Check:
    return Check(
        number=number,
        claim=claim,
        source=source,
        first=(first, "loss"),
        second=(second, "loss"),
        expected=expected,
    )


def _rerouting(every: int, than: int) -> Check:
    return Check(
        number="6",
        claim=f"drifting documents: the path chosen every {every} tokens beats every {than}",
        source="DiPaCo T3",
        first=("discriminative", "reroute", str(every)),
        second=("discriminative", "reroute", str(than)),
        expected=Expected.LOWER,
    )


def _early(arm: str, words: str) -> Check:
    return Check(
        number="7",
        claim=f"little data, {words}: each path's best version beats its last",
        source="DiPaCo T3, §2.7",
        first=(arm, "loss_best"),
        second=(arm, "loss"),
        expected=Expected.LOWER,
    )


T1, T2, T5 = "DiPaCo T1", "DiPaCo T2", "DiPaCo T5"
FULL_CHECKS: Final = (
    _compare("1", "4×4 (discriminative) beats dense, same steps and inference cost", T1, "discriminative", "dense"),
    _compare("2", "4×4 (discriminative) beats DiLoCo of 16, same tokens", T1, "discriminative", "diloco"),
    _compare("3a", "plenty of data: 16 separate paths beat 4×4", T2, "flat", "given"),
    _compare("3b", "little data: 16 separate paths lose to 4×4", T2, "small-flat", "small-grid", Expected.HIGHER),
    _compare("4a", "discriminative beats product k-means", T5, "discriminative", "product"),
    _compare("4b", "product k-means beats k-means", T5, "product", "kmeans"),
    _compare("4c", "k-means beats random routing", T5, "kmeans", "random"),
    _compare("5a", "Nesterov 0.7/0.9 beats averaging", "DiLoCo Fig. 6", "shard-none", "averaging"),
    _compare("5b", "averaging beats Adam untuned", "DiLoCo Fig. 6", "averaging", "adam"),
    _rerouting(32, 64),
    _rerouting(16, 32),
    _rerouting(8, 16),
    _early("small-flat", "16 separate paths"),
    _early("small-grid", "4×4"),
    _compare("8", "H = 8: within 5 % of every step", "DiPaCo §4.5", "given", "every-step", Expected.SMALL),
    _compare("9", "half of the updates lost: within 5 %", "DiLoCo Fig. 8", "dropped", "given", Expected.SMALL),
    _compare("C1", "control: random routing does not beat DiLoCo of 16", "design", "random", "diloco", Expected.HIGHER),
    _compare(
        "C2", "control: one domain, 4×4 is as good as DiLoCo of 16", "design",
        "one-domain-grid", "one-domain-diloco", Expected.SMALL,
    ),
    _compare(
        "C3", "control: one domain, 4×4 gains nothing over dense", "design",
        "one-domain-grid", "one-domain-dense", Expected.SMALL,
    ),
)  # fmt: skip
"""Kind full: the ten checks, but for the ablation, and the controls."""


def _ablation(prefix: str) -> tuple[Check, ...]:
    return tuple(
        _compare("10", claim, "new", prefix + first, prefix + second)
        for claim, first, second in (
            ("√paths beats none, weights by shard", "given", "shard-none"),
            ("RDA beats none, weights by shard", "shard-rda", "shard-none"),
            ("RDA beats √paths, weights by shard", "shard-rda", "given"),
            ("weights by shard beat equal ones, √paths", "given", "equal-sqrt_paths"),
        )
    )


ABLATION_CHECKS: Final = (
    *_ablation(""),
    _compare("10", "√paths beats none, equal weights", "new", "equal-sqrt_paths", "equal-none"),
    _compare("10", "weights by shard beat equal ones, no rescaling", "new", "shard-none", "equal-none"),
)
"""Check 10 for kind full."""
NEW = "new"
LORA_CHECKS: Final = (
    _compare("L1", "4×4 (given) beats dense", NEW, "lora-given", "lora-dense"),
    _compare("L2", "4×4 (given) beats DiLoCo of 16, same tokens", NEW, "lora-given", "lora-diloco"),
    _compare("L3", "plenty of data: 16 separate adapters beat 4×4", NEW, "lora-flat", "lora-given"),
    _compare("L4a", "given domains beat product k-means", NEW, "lora-given", "lora-product"),
    _compare("L4c", "product k-means beats random routing", NEW, "lora-product", "lora-random"),
    _compare("L5", "Nesterov 0.7/0.9 beats averaging (ΔW merged exactly)", NEW, "lora-shard-none", "lora-averaging"),
    _compare("L5b", "averages of ΔW beat averages of factors", NEW, "lora-averaging", "lora-factors"),
    _compare("L6", "averaging: 4×4 (given) beats dense", NEW, "lora-averaging", "lora-dense"),
    _compare("L7", "averaging: 4×4 (given) beats DiLoCo of 16", NEW, "lora-averaging", "lora-averaging-diloco"),
    _compare("L9a", "half of the updates lost: within 5 %", NEW, "lora-dropped", "lora-given", Expected.SMALL),
    _compare(
        "L9b", "averaging, half of the updates lost: within 5 %", NEW,
        "lora-averaging-dropped", "lora-averaging", Expected.SMALL,
    ),
    *_ablation("lora-"),
)  # fmt: skip
"""Kind lora; nobody has published these."""
SHORT_CHECKS: Final = (
    _compare("1", "4×4 beats dense, same steps and inference cost", T1, "given", "dense"),
    _compare("C1", "control: random routing loses the gain", "design", "random", "given", Expected.HIGHER),
    *(check for check in FULL_CHECKS if check.number == "C3"),
)
"""The largest effects, for a few minutes."""
