"""Which codec a run uses."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from weft.common.errors import UsageError


class CodecKind(enum.StrEnum):
    """How the numbers of an update are written."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    SIGN = "sign"
    TOPK = "topk"
    TERNARY = "ternary"
    SHARED_MASK = "shared-mask"


class ValueKind(enum.StrEnum):
    """How one value that a codec keeps is written."""

    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"
    SIGN = "sign"


CHOOSES_VALUES: Final = frozenset({CodecKind.TOPK, CodecKind.SHARED_MASK})
"""Kinds that leave open how a kept value is written."""
KEEPS_A_SHARE: Final = CHOOSES_VALUES | {CodecKind.TERNARY}
"""Kinds that keep some of the values."""
_VALUES: Final = {
    CodecKind.BF16: ValueKind.BF16,
    CodecKind.INT8: ValueKind.INT8,
    CodecKind.INT4: ValueKind.INT4,
    CodecKind.SIGN: ValueKind.SIGN,
    CodecKind.TERNARY: ValueKind.SIGN,
}
_SCALE_ELEMENTS: Final = {ValueKind.INT8: 256, ValueKind.INT4: 256}
"""Elements that share a scale where every value is kept; where few are, sixteen times as many do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecSettings:
    """How a worker encodes an update."""

    kind: CodecKind = CodecKind.BF16
    """fp32 (exact, 32 bits a parameter), bf16 (11), int8 (7.5), int4 (3.4), sign (1); topk, ternary (signs of the
    largest) and shared-mask (the same random positions for all workers) keep a share and send nothing of the rest."""
    density: float = 0.05
    """Share of each tensor's values that topk, ternary and shared-mask keep; above 0, at most 1."""
    values: ValueKind = ValueKind.INT8
    """How topk and shared-mask write a value that they keep: bf16, int8, int4 or sign."""
    scale_elements: int | None = None
    """Consecutive elements of a tensor that share one scale, 0 for a whole tensor. Without it: 256 for int8 and int4,
    4096 where only a share is kept, a whole tensor for signs."""
    stochastic_rounding: bool = False
    """Round bf16, int8 and int4 values up or down at random, right on average, instead of to the nearest."""
    error_feedback: bool = True
    """What a codec leaves out is kept on the worker and added to its next update of the module."""
    residual_decay: float = 1.0
    """What is kept is multiplied by this before it is added: above 0, at most 1; below 1 it acts as momentum (0.95 in
    SparseLoCo)."""

    def __post_init__(self) -> None:
        _check_share("codec.density", self.density, "0.05")
        _check_share("codec.residual_decay", self.residual_decay, "0.95")
        if self.scale_elements is not None and not (
            self.scale_elements == 0 or 16 <= self.scale_elements <= 1 << 30
        ):
            raise UsageError(
                f"codec.scale_elements is {self.scale_elements}",
                hint="use 0 for one scale a tensor, or at least 16, for example 256",
            )
        if self.stochastic_rounding and self.value_kind in {None, ValueKind.SIGN}:
            raise UsageError(
                f"codec.stochastic_rounding has nothing to round with kind {self.kind.value}",
                hint="use kind bf16, int8 or int4, or topk or shared-mask with such values",
            )

    @property
    def value_kind(self) -> ValueKind | None:
        """How a value is written; None for float32, which is left as it is."""
        return self.values if self.kind in CHOOSES_VALUES else _VALUES.get(self.kind)

    @property
    def elements_per_scale(self) -> int:
        """Elements that share a scale; 0 for a whole tensor."""
        if self.scale_elements is not None:
            return self.scale_elements
        dense = _SCALE_ELEMENTS.get(self.value_kind, 0) if self.value_kind else 0
        return 16 * dense if self.kind in KEEPS_A_SHARE else dense

    @property
    def keeps_residual(self) -> bool:
        """Whether a worker has to hold back what this codec leaves out."""
        return self.error_feedback and self.kind is not CodecKind.FP32


def _check_share(key: str, value: float, example: str) -> None:
    if not 0 < value <= 1:
        raise UsageError(f"{key} is {value}", hint=f"use more than 0 and at most 1, for example {example}")
