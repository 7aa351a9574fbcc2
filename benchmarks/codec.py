"""Measure the codecs: bits a parameter against the entropy bound, bytes of an update, and speed on one core.

    python benchmarks/codec.py [--write]

The module is LoRA of rank 16 on all linear layers of a Llama-shaped base of about 1B parameters; its deltas are
independent Gaussians, which is the worst case for a lossless stage, and its Fisher their squares. Speeds count the
float32 bytes of the module, best of five. The bound is H(p) for the positions kept at density p, the entropy of the
codes that are written (their histogram over the module), and scales as they are. ``--write`` replaces
benchmarks/results/codec.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from weft.common.codec import (
    CODECS,
    CodecKind,
    CodecSettings,
    UpdateFile,
    ValueKind,
    encode_update,
    screen_update,
    update_bytes_max,
)
from weft.common.codec.blocks import Pieces, Row
from weft.common.codec.composed import Composed
from weft.common.codec.section import Coding
from weft.common.codec.settings import CHOOSES_VALUES, KEEPS_A_SHARE
from weft.common.codec.values import VALUES
from weft.common.modules import Schema, TensorSpec
from weft.common.tensors import Float32Array, TensorFile

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
    *(CodecSettings(kind=kind) for kind in (CodecKind.FP32, CodecKind.BF16, CodecKind.INT8, CodecKind.INT4)),
    CodecSettings(kind=CodecKind.INT4, scale_elements=128, stochastic_rounding=True),
    CodecSettings(kind=CodecKind.SIGN),
    *(CodecSettings(kind=CodecKind.TERNARY, density=density) for density in (0.01, 0.05, 0.1, 0.2)),
    *(CodecSettings(kind=CodecKind.TOPK, density=0.02, values=values) for values in ValueKind),
    CodecSettings(kind=CodecKind.SHARED_MASK, density=0.05),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was measured of one codec."""

    name: str
    bits_per_parameter: float
    bound: float | None
    size_bytes: int
    encode_s: float
    screen_s: float
    decode_s: float
    sparse_s: float | None


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


def name_of(codec: CodecSettings) -> str:
    parts = [codec.kind.value]
    if codec.kind in KEEPS_A_SHARE:
        parts.append(f"{codec.density:.0%}")
    if codec.kind in CHOOSES_VALUES:
        parts.append(codec.values.value)
    if codec.stochastic_rounding:
        parts.append("stochastic")
    if codec.scale_elements:
        parts.append(f"1/{codec.scale_elements}")
    return " ".join(parts)


def entropy_bits(counts: npt.NDArray[Any]) -> float:
    """Of a histogram, bits a symbol."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def bound_bits(path: Path, schema: Schema, codec: CodecSettings) -> float | None:
    """Bits a parameter below which no lossless stage comes that knows no more than densities and histograms."""
    row_codec = CODECS[codec.kind]
    if codec.value_kind is None or not isinstance(row_codec, Composed):
        return None
    coder, counts = VALUES[codec.value_kind], np.zeros(1 << 16, np.int64)
    row = Row(schema, row_codec.positions.block_size)
    with TensorFile(path) as file:
        positions = row_codec.positions.open("delta", file, row, Coding(settings=codec))
        pieces = Pieces("values", file.array("delta#value_bytes"), file.array("delta#values"))
        for block, size in enumerate(row.block_sizes().tolist()):
            where = positions.positions(block)
            codes = coder.unpack(pieces[block], size if where is None else where.size)
            counts += np.bincount(codes, minlength=1 << 16)
        scales = 16 * file.array("delta#scales").size if coder.scaled else 0
    share = float(counts.sum()) / schema.num_parameters
    written = "delta#gaps" in row_codec.expected("delta", schema, codec)
    chosen = entropy_bits(np.array([share, 1 - share])) if written else 0
    return chosen + share * entropy_bits(counts) + scales / schema.num_parameters


def measure(path: Path, schema: Schema, deltas: dict[str, Float32Array], codec: CodecSettings) -> Measured:
    encoded = encode_update(path, schema, deltas, codec)
    quota = update_bytes_max(schema, [codec], fisher=False)
    return Measured(
        name=name_of(codec),
        bits_per_parameter=encoded.bits_per_parameter,
        bound=bound_bits(path, schema, codec),
        size_bytes=encoded.size_bytes,
        encode_s=best_s(lambda: encode_update(path, schema, deltas, codec)),
        screen_s=best_s(
            lambda: screen_update(path, schema, [codec], wants_fisher=False, size_bytes_max=quota)
        ),
        decode_s=best_s(lambda: decode(path, schema)),
        sparse_s=best_s(lambda: decode_sparse(path, schema)) if CODECS[codec.kind].sparse else None,
    )


def decode(path: Path, schema: Schema) -> None:
    """Read every tile once, into one buffer, as a merge would."""
    buffer = np.empty(max(spec.size for spec in schema.tensors), np.float32)
    with UpdateFile(path, schema) as update:
        for _, start, stop, values in update.tiles():
            buffer[: stop - start] = values


def decode_sparse(path: Path, schema: Schema) -> None:
    with UpdateFile(path, schema) as update:
        for spec in schema.tensors:
            update.sparse_tile(spec.name, 0, spec.size)


def measure_fisher(path: Path, schema: Schema, deltas: dict[str, Float32Array]) -> str:
    """What a Fisher adds to an update in one byte a value, before zstd."""
    squares = {name: array * array for name, array in deltas.items()}
    codec = CodecSettings(kind=CodecKind.TERNARY)
    alone = encode_update(path, schema, deltas, codec).size_bytes
    added = encode_update(path, schema, deltas, codec, fisher=squares).size_bytes - alone
    return f"A Fisher beside the delta adds {8 * added / schema.num_parameters:.2f} bits a parameter."


def render(rows: list[Measured], schema: Schema, copy_s: float) -> str:
    dense_mb = 4 * schema.num_parameters / 1e6
    lines = [
        "| codec | bits/parameter | bound | above it | update | of bf16 | encode | screen | decode | decode sparsely |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        against = f"{row.bound:.4f} | {row.bits_per_parameter / row.bound - 1:+.2%}" if row.bound else "· | ·"
        seconds = (row.encode_s, row.screen_s, row.decode_s, row.sparse_s)
        speeds = " | ".join(f"{dense_mb / s:,.0f} MB/s" if s else "·" for s in seconds)
        lines.append(
            f"| {row.name} | {row.bits_per_parameter:.4f} | {against} "
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
bits/parameter is of the delta's section, exactly; the update is the whole file. The bound is H(p) for the positions
kept at density p, plus the entropy of the codes that are written, plus scales as they are; `1/128` is one scale for
128 elements.

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
        path = Path(folder) / "update"
        rows = [measure(path, schema, deltas, codec) for codec in CASES]
        fisher = measure_fisher(path, schema, deltas)
    table = f"{render(rows, schema, copy_s)} {fisher}"
    print(table)
    if write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(report(table, schema))


if __name__ == "__main__":
    main()
