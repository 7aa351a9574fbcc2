"""Write the test vectors of docs/update-format.md: one update of each codec, and what it decodes to.

    python tests/vectors/generate.py

``vectors.json`` holds the schema, the delta and the Fisher that went in, and for every file its codec and the
values that come out; arrays are float32, little-endian, in hexadecimal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from weft.common.codec import CodecKind, CodecSettings, UpdateFile, ValueKind, encode_update
from weft.common.modules import Schema, TensorSpec
from weft.common.settings import to_table
from weft.common.tensors import Float32Array

FOLDER = Path(__file__).parent
ROUND_SEED = 0x0123_4567_89AB_CDEF
SCHEMA = Schema(
    (TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F32", (600,)), TensorSpec("c", "F32", (2,)))
)
CASES = {
    "fp32": CodecSettings(kind=CodecKind.FP32),
    "bf16": CodecSettings(kind=CodecKind.BF16),
    "int8": CodecSettings(kind=CodecKind.INT8),
    "int4": CodecSettings(kind=CodecKind.INT4, scale_elements=100),
    "sign": CodecSettings(kind=CodecKind.SIGN),
    "topk": CodecSettings(kind=CodecKind.TOPK, density=0.05, values=ValueKind.INT4, scale_elements=100),
    "ternary": CodecSettings(kind=CodecKind.TERNARY, density=0.004),
    "shared-mask": CodecSettings(kind=CodecKind.SHARED_MASK, density=0.1, values=ValueKind.BF16),
}


def module() -> tuple[dict[str, Float32Array], dict[str, Float32Array]]:
    """Delta and Fisher: a few exact values, ties, zeros, a long gap, and numbers of many sizes."""
    a = np.array([[0.5, -1, 0.25], [0, 1, -0.5]], np.float32)
    steps = np.arange(600, dtype=np.float32)
    b = (steps * 37 % 101 - 50) / np.float32(64) * np.float32(2) ** -(steps % 7)
    b[[1, 599]] = [-2, 4]
    c = np.zeros(2, np.float32)
    fisher = np.array([[1, 0.5, 0.25], [0, 3, 1e-3]], np.float32)
    return {"a": a, "b": b, "c": c}, {"a": fisher, "b": b * b, "c": c}


def decode(path: Path) -> dict[str, Any]:
    """Delta and Fisher of an update as ``vectors.json`` holds them."""
    with UpdateFile(path, SCHEMA) as update:
        result: dict[str, Any] = {
            "delta": {spec.name: _text(update.tile(spec.name, 0, spec.size)) for spec in SCHEMA.tensors}
        }
        if update.has_fisher:
            result["fisher"] = {
                spec.name: _text(update.fisher_tile(spec.name, 0, spec.size)) for spec in SCHEMA.tensors
            }
    return result


def write(folder: Path) -> dict[str, Any]:
    """Write every file; returns what goes into ``vectors.json``."""
    delta, fisher = module()
    updates = {}
    for name, codec in CASES.items():
        path = folder / f"{name}.update"
        statistics = fisher if codec.kind is CodecKind.FP32 else None
        encode_update(path, SCHEMA, delta, codec, fisher=statistics, round_seed=ROUND_SEED)
        updates[path.name] = {"codec": to_table(codec), "decoded": decode(path)}
    given = {"delta": delta, "fisher": fisher}
    return {
        "schema": to_table(SCHEMA.tensors),
        "round_seed": str(ROUND_SEED),
        "given": {
            what: {name: _text(array) for name, array in arrays.items()} for what, arrays in given.items()
        },
        "updates": updates,
    }


def _text(array: Float32Array) -> str:
    return array.astype("<f4").tobytes().hex()


if __name__ == "__main__":
    (FOLDER / "vectors.json").write_text(json.dumps(write(FOLDER), indent=1) + "\n")
