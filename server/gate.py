"""The gate: is a candidate good enough to be published?

A candidate is thrown away only when held-out data says, with 95 % confidence, that it is worse than the current
version by more than the tolerance. The difference is paired by sequence, so that the same hard sequences cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from weft.common.errors import UsageError
from weft.server.rounds import GateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class GateSettings:
    """Held-out evaluation before a version is published."""

    heldout: str = ""
    """File or directory in a training format, on the coordinator's machine; empty publishes without a gate."""
    tolerance: float = 0.0
    """How much worse a candidate may be, nats per token or per example."""
    num_sequences_max: int = 128
    """At most this many sequences are evaluated."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise UsageError(
                f"gate.tolerance is {self.tolerance}", hint="use 0 or more nats, for example 0.01"
            )
        if not 2 <= self.num_sequences_max <= 1_000_000:
            raise UsageError(f"gate.num_sequences_max is {self.num_sequences_max}", hint="use at least 2")


def decide(
    *, before: float, after: float, difference: float, half_width: float, num_sequences: int, tolerance: float
) -> GateResult:
    """Decide from losses in nats and the paired difference after − before with its 95 % half width."""
    interval = f"{difference:+.4f} ± {half_width:.4f} over {num_sequences} sequences"
    numbers = f"held-out loss {before:.4f} to {after:.4f} ({interval})"
    if math.isfinite(after) and not math.isfinite(before):
        reason = f"published: the current version's held-out loss is {before}, the candidate's {after:.4f}"
        return GateResult(passed=True, reason=reason, loss_after=after, num_sequences=num_sequences)
    if not all(math.isfinite(value) for value in (after, difference, half_width)):
        return GateResult(
            passed=False,
            reason=f"held-out loss is {after}",
            # The ledger takes no NaN.
            loss_before=before if math.isfinite(before) else None,
            num_sequences=num_sequences,
        )
    worse = difference - half_width > tolerance
    verdict = f"worse by more than {tolerance:g}: " if worse else ""
    return GateResult(
        passed=not worse,
        reason=f"{verdict}{numbers}",
        loss_before=before,
        loss_after=after,
        difference=difference,
        half_width=half_width,
        num_sequences=num_sequences,
    )


def without_documents() -> GateResult:
    """The result when the router sends no held-out document to any path of the module."""
    return GateResult(passed=True, reason="not judged: no held-out document belongs to a path of this module")


def without_data() -> GateResult:
    """The result when the operator named no held-out data."""
    return GateResult(passed=True, reason="not judged: the run file names no held-out data")
