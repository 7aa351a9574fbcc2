"""The merges that are compared, as options of ``weft merge``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One merge of experts."""

    name: str
    """In tables."""
    kind: str
    """full or lora."""
    rule: str
    """--rule."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """--param."""
    lora: str = ""
    """--lora; unset: exact where the rule can, dense elsewhere."""
    rank: int = 0
    """--rank; 0: that of the experts."""
    tasks: tuple[str, ...] = ()
    """Experts of these alone; unset: of all."""

    @property
    def needs_grams(self) -> bool:
        """Whether the rule reads Grams beside the weights."""
        return self.rule in {"regmean", "least_squares"}

    @property
    def options(self) -> str:
        """What a person would type."""
        parameters = [f"--param {key}={value}" for key, value in self.parameters.items()]
        lora = [f"--lora {self.lora}"] if self.lora else []
        rank = [f"--rank {self.rank}"] if self.rank else []
        return " ".join([f"--rule {self.rule}", *parameters, *lora, *rank])


RULES: Final[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
    "mean": ("mean", {}),
    "ties": ("ties", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "tsv": ("tsv", {}),
    "breadcrumbs": ("breadcrumbs", {}),
    "dare": ("dare", {}),
    "iso": ("iso", {}),
    "knots": ("knots", {}),
    "pcb": ("pcb", {}),
    "magnitude": ("magnitude", {}),
    "della": ("della", {}),
    "dare_ties": ("dare_ties", {}),
    "model_stock": ("model_stock", {}),
    "geometric_median": ("geometric_median", {}),
    "sign_majority": ("sign_majority", {}),
    "median": ("median", {}),
    "regmean": ("regmean", {}),
    "least_squares": ("least_squares", {}),
    "ties peft": ("ties", {"convention": "peft"}),
}
"""By name in tables; both kinds, parameters by default."""
PAIRS: Final = (("language", "manual"), ("code", "archive"))
"""Of tasks, for rules of two models."""
FULL_RANK: Final = 32
"""Four experts of rank 8: what a merged adapter needs in order to lose nothing."""


def arms() -> Iterator[Arm]:
    """All of them, both kinds by turns."""
    for name, (rule, parameters) in RULES.items():
        for kind in ("full", "lora"):
            yield Arm(name=name, kind=kind, rule=rule, parameters=parameters)
    yield Arm(name="mean factors", kind="lora", rule="mean", lora="factors")
    yield Arm(name="mean stack", kind="lora", rule="mean", lora="stack")
    yield Arm(name="ties factors", kind="lora", rule="ties", lora="factors")
    yield Arm(name="ties rank 32", kind="lora", rule="ties", rank=FULL_RANK)
    yield Arm(name="breadcrumbs rank 32", kind="lora", rule="breadcrumbs", rank=FULL_RANK)
    for pair in PAIRS:
        for kind in ("full", "lora"):
            for rule in ("mean", "slerp"):
                yield Arm(name=f"{rule} {'+'.join(pair)}", kind=kind, rule=rule, tasks=pair)
