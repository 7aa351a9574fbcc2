"""Loss against bytes sent: four workers on one dense module (DiLoCo), by codec, error feedback and H."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final

from benchmarks.quality.arms import DILOCO, Arm

from weft.common.codec import CodecKind, CodecSettings

INNER_STEPS: Final = (8, 48)
"""H: steps between two merges."""
CODECS: Final[Mapping[str, CodecSettings]] = {
    "fp32": CodecSettings(kind=CodecKind.FP32),
    "bf16": CodecSettings(kind=CodecKind.BF16),
    "int8": CodecSettings(kind=CodecKind.INT8),
    "int4": CodecSettings(kind=CodecKind.INT4),
    "sign": CodecSettings(kind=CodecKind.SIGN),
    "top-k 5 %, int8": CodecSettings(kind=CodecKind.TOPK, density=0.05),
    "ternary 20 %": CodecSettings(kind=CodecKind.TERNARY, density=0.2),
    "ternary 5 %": CodecSettings(kind=CodecKind.TERNARY, density=0.05),
    "ternary 1 %": CodecSettings(kind=CodecKind.TERNARY, density=0.01),
    "shared mask 5 %": CodecSettings(kind=CodecKind.SHARED_MASK, density=0.05),
}
"""By the name that the table has for them."""


def codec_arm(codec: CodecSettings, inner_steps: int, *, feedback: bool) -> Arm:
    """DiLoCo of four workers with Nesterov."""
    settings = dataclasses.replace(codec, error_feedback=feedback)
    return dataclasses.replace(DILOCO, shards=4, inner_steps=inner_steps, codec=settings)


def codec_name(codec: str, inner_steps: int, *, feedback: bool) -> str:
    """Of an arm."""
    return f"codec {codec}{' with feedback' if feedback else ''} H={inner_steps}".replace(" ", "-").replace(
        "%", "pc"
    )


CODEC_ARMS: Final[Mapping[str, Arm]] = {
    codec_name(name, inner_steps, feedback=feedback): codec_arm(codec, inner_steps, feedback=feedback)
    for name, codec in CODECS.items()
    for inner_steps in INNER_STEPS
    for feedback in (False, True)
    if not (feedback and codec.kind is CodecKind.FP32)
}
