"""Measure the codecs: bits a parameter against the entropy bound, bytes of an update, and speed on one core.

    python benchmarks/codec.py [--write]

The module is LoRA of rank 16 on all linear layers of a Llama-shaped base of about 1B parameters; its deltas are
independent Gaussians, which is the worst case for a lossless stage, and its Fisher their squares. Speeds count the
float32 bytes of the module, best of five. ``--write`` replaces benchmarks/results/codec.md.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from weft.common.codec import (
    CodecKind,
    CodecSettings,
    UpdateFile,
    encode_update,
    screen_update,
    update_bytes_max,
)
from weft.common.modules import Schema, TensorSpec
from weft.common.tensors import Float32Array

RESULT = Path(__file__).parent / "results" / "codec.md"
NUM_LAYERS, HIDDEN, KEY_VALUE, INTERMEDIATE, RANK = 22, 2048, 256, 5632, 16
LINEAR_LAYERS = {
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
}
CASES = [
    (CodecSettings(kind=CodecKind.FP32), False),
    (CodecSettings(kind=CodecKind.BF16), False),
    *((CodecSettings(kind=CodecKind.TERNARY, density=density), False) for density in (0.01, 0.05, 0.1, 0.2)),
    (CodecSettings(kind=CodecKind.TERNARY, density=0.05), True),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured of one codec."""

    codec: CodecSettings
    fisher: bool
    bits_per_parameter: float
    size_bytes: int
    encode_s: float
    screen_s: float
    decode_s: float


def lora_schema() -> Schema:
    def specs() -> Iterator[TensorSpec]:
        for layer in range(NUM_LAYERS):
            for name, (rows, columns) in LINEAR_LAYERS.items():
                prefix = f"model.layers.{layer}.{name}"
                yield TensorSpec(f"{prefix}.lora_A.weight", "F32", (RANK, columns))
                yield TensorSpec(f"{prefix}.lora_B.weight", "F32", (rows, RANK))

    return Schema(tuple(sorted(specs())))


def best_s(action: Callable[[], object], repeats: int = 5) -> float:
    def once() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    return min(once() for _ in range(repeats))


def entropy_bits(density: float) -> float:
    """H(p) + p: positions of independent kept values, and their signs."""
    return density - density * math.log2(density) - (1 - density) * math.log2(1 - density)


def measure(
    path: Path, schema: Schema, deltas: dict[str, Float32Array], codec: CodecSettings, *, fisher: bool
) -> Row:
    squares = {name: array * array for name, array in deltas.items()} if fisher else None
    quota = update_bytes_max(schema, codec, fisher=fisher)
    encode_s = best_s(lambda: encode_update(path, schema, deltas, codec, fisher=squares))
    screen_s = best_s(lambda: screen_update(path, schema, codec, wants_fisher=fisher, size_bytes_max=quota))
    encoded = encode_update(path, schema, deltas, codec, fisher=squares)
    return Row(
        codec=codec,
        fisher=fisher,
        bits_per_parameter=encoded.bits_per_parameter,
        size_bytes=encoded.size_bytes,
        encode_s=encode_s,
        screen_s=screen_s,
        decode_s=best_s(lambda: decode(path, schema, fisher=fisher)),
    )


def decode(path: Path, schema: Schema, *, fisher: bool) -> None:
    """Read every tile once, into one buffer, as a merge would."""
    buffer = np.empty(max(spec.size for spec in schema.tensors), np.float32)
    with UpdateFile(path, schema) as update:
        for name, start, stop, values in update.tiles():
            buffer[: stop - start] = values
            if fisher:
                buffer[: stop - start] = update.fisher_tile(name, start, stop)


def render(rows: list[Row], schema: Schema, copy_s: float) -> str:
    dense_mb = 4 * schema.num_parameters / 1e6
    lines = [
        "| codec | bits/parameter | entropy bound | above it | update | of bf16 | encode | screen | decode |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        name = row.codec.kind.value + (
            f" {row.codec.density:.0%}" if row.codec.kind is CodecKind.TERNARY else ""
        )
        bound = entropy_bits(row.codec.density) if row.codec.kind is CodecKind.TERNARY else None
        against = f"{bound:.4f} | {row.bits_per_parameter / bound - 1:+.1%}" if bound else "· | ·"
        speeds = " | ".join(f"{dense_mb / s:,.0f} MB/s" for s in (row.encode_s, row.screen_s, row.decode_s))
        lines.append(
            f"| {name}{' + Fisher' if row.fisher else ''} | {row.bits_per_parameter:.4f} | {against} "
            f"| {row.size_bytes / 1e6:.3f} MB | {row.size_bytes / (2 * schema.num_parameters):.1%} | {speeds} |"
        )
    copy = f"Copying the same float32 bytes in memory, in the same run: {dense_mb / copy_s:,.0f} MB/s."
    return "\n".join([*lines, "", copy])


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return f"{os.cpu_count()} cores, {model}, numpy {np.__version__}"


def report(table: str, schema: Schema) -> str:
    return f"""# Codecs

Written by `python benchmarks/codec.py --write` on {datetime.now(UTC):%Y-%m-%d}; {machine()}.
One core is used; load average of the machine at the end {os.getloadavg()[0]:.1f}.

LoRA rank {RANK} on all linear layers of a Llama-shaped base with {NUM_LAYERS} layers of width {HIDDEN}:
{len(schema.tensors)} tensors, {schema.num_parameters:,} parameters. Gaussian deltas, the worst case for a lossless
stage; the Fisher is their squares. Speeds count the module's float32 bytes and include the file; best of five.
bits/parameter is of the delta's section, exactly; the update is the whole file.

{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"replace {RESULT.name}")
    write = parser.parse_args().write
    schema, generator = lora_schema(), np.random.default_rng(0)
    deltas = {spec.name: generator.standard_normal(spec.shape, dtype=np.float32) for spec in schema.tensors}
    row = np.concatenate([array.reshape(-1) for array in deltas.values()])
    target = np.empty_like(row)
    copy_s = best_s(lambda: np.copyto(target, row))
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            measure(Path(folder) / "update", schema, deltas, codec, fisher=fisher) for codec, fisher in CASES
        ]
    table = render(rows, schema, copy_s)
    print(table)
    if write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(report(table, schema))


if __name__ == "__main__":
    main()
