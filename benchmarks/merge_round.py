"""Merge speed and memory, as ratios within one run.

    python benchmarks/merge_round.py [--write]

Speed: bytes of updates merged per second, beside one arithmetic pass over the same bytes from memory (a
float32 sum on as many threads as there are processes) and beside ``peft.utils.merge_utils`` tensor by tensor; with
clipping, as in a round, where norms were measured as updates arrived, and without, as offline. Sparse: 64 ternary
updates, decoded from their files and merged, beside one read of those files. Memory: peak allocation of the merge
itself in one process at 2, 8 and 64 updates, inputs and result excluded. Weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from weft.common.codec import CodecKind, CodecSettings, UpdateFile, encode_update, screen_update
from weft.common.modules import Schema, TensorSpec
from weft.server.merge.crew import ALONE, Crew, run_forked
from weft.server.merge.engine import merge_module
from weft.server.merge.settings import (
    Clip,
    LoraSpace,
    MergeRuleName,
    MergeSettings,
    TiesConvention,
    TiesParameters,
)
from weft.server.merge.tiles import WORKING_ELEMENTS, Arrays, ArrayUpdate, Float32, Indices, Update, spans
from weft.server.outer import OuterSettings

TERNARY = CodecSettings(kind=CodecKind.TERNARY, density=0.05)
PEFT_TIES = TiesParameters(convention=TiesConvention.PEFT)
CASES = {
    "mean, unclipped": MergeSettings(lora=LoraSpace.FACTORS, clip=Clip.NONE),
    "ties (official), unclipped": MergeSettings(rule=MergeRuleName.TIES, clip=Clip.NONE),
    "ties (peft), unclipped": MergeSettings(rule=MergeRuleName.TIES, ties=PEFT_TIES, clip=Clip.NONE),
    "dare_ties, unclipped": MergeSettings(rule=MergeRuleName.DARE_TIES, clip=Clip.NONE),
    "breadcrumbs, unclipped": MergeSettings(rule=MergeRuleName.BREADCRUMBS, clip=Clip.NONE),
    "mean": MergeSettings(lora=LoraSpace.FACTORS),
    "ties (official)": MergeSettings(rule=MergeRuleName.TIES),
    "ties (peft)": MergeSettings(rule=MergeRuleName.TIES, ties=PEFT_TIES),
    "fisher": MergeSettings(rule=MergeRuleName.FISHER),
    "median": MergeSettings(rule=MergeRuleName.MEDIAN),
    "geometric_median": MergeSettings(rule=MergeRuleName.GEOMETRIC_MEDIAN, lora=LoraSpace.FACTORS),
    "mean, exact ΔW": MergeSettings(lora=LoraSpace.EXACT),
}


def lora_schema(*, layers: int = 12, width: int = 768, inner: int = 2048, rank: int = 16) -> Schema:
    shapes = dict.fromkeys("qkvo", (width, width)) | {
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
    }
    specs = [
        TensorSpec(f"{layer:02d}.{name}.{side}.weight", "F32", shape)
        for layer in range(layers)
        for name, (rows, columns) in shapes.items()
        for side, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank)))
    ]
    return Schema(tuple(sorted(specs)))


def full_schema() -> Schema:
    return Schema(tuple(TensorSpec(f"{number:02d}", "F32", (2048, 1024)) for number in range(8)))


def random_arrays(schema: Schema, rng: np.random.Generator) -> Arrays:
    return Arrays({s.name: rng.standard_normal(s.shape, np.float32) for s in schema.tensors})


def updates_of(schema: Schema, count: int, rng: np.random.Generator) -> list[ArrayUpdate]:
    fisher = random_arrays(schema, rng)
    for array in fisher.arrays.values():
        np.square(array, out=array)
    all_deltas = [random_arrays(schema, rng) for _ in range(count)]
    return [
        ArrayUpdate(worker_id=f"{n:02d}", deltas=deltas, fisher=fisher, norm=norm_of(deltas))
        for n, deltas in enumerate(all_deltas)
    ]


def norm_of(deltas: Arrays) -> float:
    return math.sqrt(sum(float(np.vdot(array, array)) for array in deltas.arrays.values()))


def best_s(action: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return min(times)


def read_once(updates: Sequence[ArrayUpdate], schema: Schema, threads: int) -> None:
    def one(tile: tuple[str, int, int]) -> None:
        name, start, stop = tile
        total = updates[0].tile(name, start, stop).copy()
        for update in updates[1:]:
            total += update.tile(name, start, stop)

    tiles = [
        (s.name, *span) for s in schema.tensors for span in spans(s.size, WORKING_ELEMENTS // len(updates))
    ]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, tiles))


def peft_ties(updates: Sequence[ArrayUpdate], schema: Schema) -> None:
    from peft.utils import merge_utils

    for spec in schema.tensors:
        rows = [torch.from_numpy(update.deltas.arrays[spec.name]) for update in updates]
        merge_utils.ties(rows, torch.ones(len(rows)), 0.2)


def merge(
    updates: Sequence[Update], start: Arrays, schema: Schema, case: str, processes: int, sink: Arrays
) -> None:
    def program(crew: Crew) -> None:
        merge_module(
            updates,
            start,
            schema,
            sink,
            settings=CASES[case],
            outer=OuterSettings(),
            crew=crew,
            norms=False,
        )

    if processes > 1:
        run_forked(processes, program)
    else:
        program(ALONE)


def speed_rows(label: str, schema: Schema, count: int, cases: Sequence[str], threads: int) -> list[str]:
    rng = np.random.default_rng(0)
    updates, start, sink = updates_of(schema, count, rng), random_arrays(schema, rng), Arrays.shared(schema)
    gigabytes = count * schema.num_parameters * 4 / 1e9
    read_s = best_s(lambda: read_once(updates, schema, threads))
    results = {"one pass over the bytes": read_s}
    for case in cases:
        results[case] = best_s(partial(merge, updates, start, schema, case, threads, sink))
    results["peft ties"] = best_s(lambda: peft_ties(updates, schema))
    return [
        f"| {label}, {count} updates, {gigabytes:.2f} GB | {name} | {seconds:.3f} | {gigabytes / seconds:.2f} | "
        f"{seconds / read_s:.1f} | {results['peft ties'] / seconds:.1f} |"
        for name, seconds in results.items()
    ]


def memory_rows(cases: Sequence[str]) -> list[str]:
    schema, rng = full_schema(), np.random.default_rng(0)
    (update,) = updates_of(schema, 1, rng)
    start, sink = random_arrays(schema, rng), Arrays.zeros(schema)
    rows = []
    for case in cases:
        peaks = []
        for count in (2, 8, 64):
            # The same arrays under other names: the merge does not know, and inputs take no room.
            updates = [
                ArrayUpdate(worker_id=f"{n:02d}", deltas=update.deltas, fisher=update.fisher)
                for n in range(count)
            ]
            tracemalloc.start()
            merge(updates, start, schema, case, 1, sink)
            peaks.append(tracemalloc.get_traced_memory()[1] / 2**20)
            tracemalloc.stop()
        rows.append(f"| {case} | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |")
    return rows


@dataclass(frozen=True, slots=True)
class FileUpdate:
    """An update file under a name."""

    worker_id: str
    file: UpdateFile
    norm: float
    task_id: str = ""
    weight: float = 1.0
    rank: int | None = None
    sparse: bool = True

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """Elements of the movement."""
        return self.file.tile(name, start, stop)

    def sparse_tile(self, name: str, start: int, stop: int) -> tuple[Indices, Float32]:
        """The same, where it is not zero."""
        return self.file.sparse_tile(name, start, stop)

    def fisher_tile(self, name: str, start: int, stop: int) -> Float32:
        """Elements of the Fisher."""
        return self.file.fisher_tile(name, start, stop)


def sparse_rows(count: int, threads: int) -> list[str]:
    """A round of updates in their files, 96 MiB each were they dense."""
    schema = Schema(tuple(TensorSpec(f"{number:02d}", "F32", (1024, 1024)) for number in range(24)))
    start, sink = Arrays.zeros(schema), Arrays.shared(schema)
    rows = []
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        # Four different files under many names: their size is read, and decoded, once a name.
        paths = [Path(directory) / str(number) for number in range(4)]
        for number, path in enumerate(paths):
            arrays = random_arrays(schema, np.random.default_rng(number)).arrays
            encode_update(path, schema, arrays, TERNARY)
        norms = [
            screen_update(path, schema, [TERNARY], wants_fisher=False, size_bytes_max=10**8).norm
            for path in paths
        ]
        megabytes = sum(paths[n % 4].stat().st_size for n in range(count)) / 1e6
        read_s = best_s(lambda: [paths[n % 4].read_bytes() for n in range(count)])
        rows.append(f"| read the files, {megabytes:.0f} MB | {read_s:.3f} | {1e3 * read_s / count:.2f} | |")

        def updates() -> list[FileUpdate]:
            files = [stack.enter_context(UpdateFile(paths[n % 4], schema)) for n in range(count)]
            return [FileUpdate(f"{n:02d}", file, norms[n % 4]) for n, file in enumerate(files)]

        def decode(updates: Sequence[FileUpdate]) -> None:
            tiles = [(spec.name, *span) for spec in schema.tensors for span in spans(spec.size, 1 << 16)]
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda each: [each.sparse_tile(*tile) for tile in tiles], updates))

        fresh = updates()
        begin = time.perf_counter()
        decode(fresh)
        seconds = time.perf_counter() - begin
        rows.append(f"| decode them | {seconds:.2f} | {1e3 * seconds / count:.1f} | |")
        for name in ("mean, unclipped", "ties (official), unclipped", "mean"):
            fresh = updates()
            begin = time.perf_counter()
            merge(fresh, start, schema, name, threads, sink)
            seconds = time.perf_counter() - begin
            tracemalloc.start()  # which slows down: a run of its own
            merge(updates(), start, schema, name, 1, sink)
            peak = tracemalloc.get_traced_memory()[1] / 2**20
            tracemalloc.stop()
            rows.append(f"| {name} | {seconds:.2f} | {1e3 * seconds / count:.1f} | {peak:.0f} |")
    return rows


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def report(threads: int) -> str:
    coordinate_wise = [case for case in CASES if "exact" not in case]
    setting = (
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d} · {os.cpu_count()} cores, {processor()}, "
        f"load {os.getloadavg()[0]:.1f} at the start · torch {torch.__version__}, numpy {np.__version__} · "
        f"{threads} processes · `python benchmarks/merge_round.py --write`"
    )
    memory = (
        f"Peak MiB allocated by the merge of {full_schema().num_parameters / 1e6:.1f} M parameters "
        f"(64 MiB an update; inputs and result excluded), in one process:"
    )
    lines = [
        "# Merging a round",
        "",
        setting,
        "",
        "| what | how | s | GB/s of updates | × one pass | × faster than peft ties |",
        "|---|---|---|---|---|---|",
        *speed_rows("LoRA r=16, 84 layers", lora_schema(), 16, list(CASES), threads),
        *speed_rows("full, 16.8 M parameters", full_schema(), 8, coordinate_wise, threads),
        "",
        memory,
        "",
        "| rule | 2 updates | 8 updates | 64 updates |",
        "|---|---|---|---|",
        *memory_rows(coordinate_wise),
        "",
        "64 ternary updates of density 0.05 of 25.2 M parameters, from their files, decoded and merged:",
        "",
        "| what | s | ms an update | peak MiB |",
        "|---|---|---|---|",
        *sparse_rows(64, threads),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/merge_round.md")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    text = report(arguments.threads)
    print(text)
    if arguments.write:
        target = Path(__file__).parent / "results" / "merge_round.md"
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
