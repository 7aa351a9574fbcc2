"""Which codec a run uses."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from weft.common.errors import UsageError


class CodecKind(enum.StrEnum):
    """How the numbers of an update are written."""

    FP32 = "fp32"
    BF16 = "bf16"
    TERNARY = "ternary"


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecSettings:
    """How a worker encodes an update."""

    kind: CodecKind = CodecKind.BF16
    """fp32 (exact, 32 bits a parameter), bf16 (16 bits), or ternary (signs of the largest, below one bit)."""
    density: float = 0.05
    """Share of each tensor's values that ternary keeps; above 0, at most 1."""
    error_feedback: bool = True
    """What a codec leaves out is kept on the worker and added to its next update of the module."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise UsageError(
                f"codec.density is {self.density}", hint="use more than 0 and at most 1, for example 0.05"
            )

    @property
    def keeps_residual(self) -> bool:
        """Whether a worker has to hold back what this codec leaves out."""
        return self.error_feedback and self.kind is not CodecKind.FP32
