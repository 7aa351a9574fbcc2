"""What a round costs beside the training: a real coordinator and workers whose training takes no time.

    python benchmarks/round_overhead.py [--write] [--only "10 kB"] [--rounds N]

`weft serve` runs as it is, with TLS, over a tiny random base; each worker is a process that makes the client's own
calls: poll, download the version, encode an update of fresh values, upload, sign, submit, with a report at each
stage. A round is the time from one published version to the next. Beside it, in the same run: the same bytes as raw
unary gRPC in 2 MiB messages, four in flight, over TLS with the same options, as many client processes against one
server that keeps everything in memory. ``--write`` replaces benchmarks/results/round_overhead.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lib.idle_worker import PHASES
from lib.machine import setting
from lib.processes import children, environment, finish, peak_mb, started, wait_for
from lib.raw_grpc import raw_mb_s

from weft.common.tensors import write_tensors

WORKER = str(Path(__file__).parent / "lib" / "idle_worker.py")
RESULT = Path(__file__).parent / "results" / "round_overhead.md"
WEFT = ("-m", "weft.common.cli")


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """LoRA over a base whose update has about this many bytes."""

    label: str
    rank: int
    targets: tuple[str, ...]
    hidden: int = 2048
    intermediate: int = 5632
    layers: int = 22
    key_value_heads: int = 4
    """Of 32."""
    aim_s: float
    flower_s: str
    """Flower 1.42's deployment engine, as quoted in the issue; not measured here."""


ALL = ("q", "k", "v", "o", "gate", "up", "down")
SMALL = Size(
    label="10 kB", rank=5, targets=("q", "k", "v", "o"), hidden=64, intermediate=128, layers=1,
    key_value_heads=32, aim_s=0.3, flower_s="6 to 9",
)  # fmt: skip
MIDDLE = Size(label="10 MB", rank=18, targets=("q", "v"), aim_s=1.0, flower_s="8 to 11")
LARGE = Size(label="100 MB", rank=32, targets=ALL, aim_s=5.0, flower_s="16 to 24")
SIZES = {size.label: size for size in (SMALL, MIDDLE, LARGE)}
CASES = (("10 kB", 2, 24), ("10 MB", 2, 12), ("10 MB", 4, 12), ("10 MB", 8, 8), ("100 MB", 2, 6))
"""Size, workers, rounds measured (one more is run before them)."""


# ---- a run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One case."""

    size: Size
    num_workers: int
    rounds_s: list[float]
    phases_s: dict[str, float]
    """Median seconds of a worker's phases."""
    update_bytes: int
    raw_mb_s: float
    """Raw gRPC, of as many clients together."""
    serve_mb: float
    engine_mb: float

    @property
    def round_s(self) -> float:
        """Median."""
        return statistics.median(self.rounds_s)

    @property
    def moved_mb(self) -> float:
        """Up and down, by all workers, in one round."""
        return 2 * self.num_workers * self.update_bytes / 1e6

    @property
    def transfer_mb_s(self) -> float:
        """Of all workers together, while they fetch and upload."""
        return self.moved_mb / (self.phases_s["fetch"] + self.phases_s["upload"])


def write_base(to: Path, size: Size) -> None:
    """A Llama of the right shape; its weights are a stand-in, since nobody computes with them here."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=64,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=32,
        num_key_value_heads=size.key_value_heads,
    ).save_pretrained(to)
    write_tensors(to / "model.safetensors", {"model.norm.weight": np.ones(size.hidden, np.float32)})


def run_file(size: Size, num_workers: int, num_rounds: int) -> str:
    targets = ", ".join(f'"{name}_proj"' for name in size.targets)
    return f"""[run]
name = "overhead"
[base]
source = "base"
[topology.lora]
rank = {size.rank}
target_modules = [{targets}]
[inner]
steps = 1
batch_size = 1
sequence_length = 8
[rounds]
count = {num_rounds}
quorum = {num_workers}
target = {num_workers}
[merge]
rule = "mean"
lora = "factors"
[codec]
kind = "fp32"
"""


def measure(folder: Path, size: Size, num_workers: int, num_rounds: int) -> Measured:
    """Serve a run, let the workers do it, ask what it took; raw gRPC before and after."""
    write_base(folder / "base", size)
    (folder / "run.toml").write_text(run_file(size, num_workers, num_rounds + 1))
    names = [f"worker-{number}" for number in range(num_workers)]
    with contextlib.ExitStack() as stack:

        def start(name: str, *arguments: str) -> subprocess.Popen[bytes]:
            return stack.enter_context(started(*arguments, log=folder / f"{name}.log", home=folder / "home"))

        options = ["--state", str(folder / "state"), "--listen", "127.0.0.1:0", "--http", "off"]
        serve = start("serve", *WEFT, "serve", str(folder / "run.toml"), *options)
        address, token = wait_for(folder / "serve.log", r"weft join (\S+) (\S+)", serve).groups()
        for worker in [start(name, WORKER, address, token, str(folder / name)) for name in names]:
            finish(worker)
        rounds = listed_rounds(folder / "home")
        serve_mb, (engine_mb,) = peak_mb(serve.pid), [peak_mb(pid) for pid in children(serve.pid)]
    ended = [round_["ended_at"] for round_ in rounds if round_["ended_at"]]
    tasks = [json.loads(line) for name in names for line in (folder / f"{name}.log").read_text().splitlines()]
    update_bytes = tasks[0]["update_bytes"]
    return Measured(
        size=size,
        num_workers=num_workers,
        rounds_s=[after - before for before, after in itertools.pairwise(ended)],
        phases_s={phase: statistics.median(task[phase] for task in tasks[1:]) for phase in PHASES},
        update_bytes=update_bytes,
        raw_mb_s=statistics.mean(
            raw_mb_s(folder / f"raw-{number}", update_bytes, num_workers) for number in range(2)
        ),
        serve_mb=serve_mb,
        engine_mb=engine_mb,
    )


def listed_rounds(home: Path) -> list[dict[str, Any]]:
    command = [sys.executable, *WEFT, "rounds", "list", "--run", "overhead", "--json"]
    done = subprocess.run(command, env=environment(home), stdout=subprocess.PIPE, check=True)
    rounds: list[dict[str, Any]] = json.loads(done.stdout)
    return rounds


# ---- the page ----------------------------------------------------------------------------------------------------


def round_row(case: Measured) -> str:
    size, least, most = case.size, min(case.rounds_s), max(case.rounds_s)
    return (
        f"| {size.label} ({case.update_bytes:,} bytes) | {case.num_workers} | {len(case.rounds_s)} "
        f"| **{case.round_s:.2f}** ({least:.2f} to {most:.2f}) | {size.aim_s} | {size.flower_s} "
        f"| {case.serve_mb:.0f} | {case.engine_mb:.0f} |"
    )


def speed_row(case: Measured) -> str:
    return (
        f"| {case.size.label} | {case.num_workers} | {case.moved_mb:,.2f} | {case.moved_mb / case.round_s:,.1f} "
        f"| {case.transfer_mb_s:,.1f} | {case.raw_mb_s:,.1f} | {case.transfer_mb_s / case.raw_mb_s:.2f} |"
    )


def phase_row(case: Measured) -> str:
    cells = " | ".join(f"{1e3 * case.phases_s[phase]:,.0f}" for phase in PHASES)
    return f"| {case.size.label} | {case.num_workers} | {cells} |"


def table(cases: list[Measured], row: Callable[[Measured], str]) -> str:
    return "\n".join(map(row, cases))


def report(cases: list[Measured], *, load_before: float) -> str:
    return f"""# What a round costs beside the training

{setting(("weft", "grpcio", "numpy"), load_before=load_before)}

Workers that do not train, as processes on loopback over TLS; codec fp32, rule mean on the factors, no gate. LoRA over
a base of Llama's shape: {LARGE.layers} layers of width {LARGE.hidden:,} for the larger two. Seconds from one published
version to the next, median (least to most): fetch the version, encode, upload, submit, screen, merge, publish. The
aims are the project's own; Flower's figures are quoted below.

| update | workers | rounds | s a round | aim | Flower 1.42 | serve, peak MB | merge process, peak MB |
|---|--:|--:|--:|--:|--:|--:|--:|
{table(cases, round_row)}

Peak memory is resident (VmHWM) with mapped files, 10⁶ bytes. `weft serve` maps an update while it screens it and
holds what is in flight, at most four chunks of 2 MiB for each worker that is sending or fetching just then; it does
not hold updates. The merge process maps the updates of its round, which the kernel can drop, and holds torch.

MB/s are 10⁶ bytes a second, up and down, of all workers together: over the whole round; while workers fetch and
upload; and as raw unary gRPC of the same bytes in the same run, in 2 MiB messages, four in flight, over TLS with the
same options, as many client processes against one server process, with nothing checked, hashed or written.

| update | workers | MB moved a round | MB/s, round | MB/s, fetch and upload | MB/s, raw gRPC | fetch and upload ÷ raw |
|---|--:|--:|--:|--:|--:|--:|
{table(cases, speed_row)}

Where a worker's time goes, median milliseconds a task. Submit is the coordinator's screening; wait is for the other
workers, the merge, the publication and the next task:

| update | workers | fetch | encode | upload | submit | wait |
|---|--:|--:|--:|--:|--:|--:|
{table(cases, phase_row)}

Flower 1.42 was measured once, with its deployment engine and two SuperNodes, on a busy machine of two cores, without
TLS and with its database in memory: {", ".join(f"{size.flower_s} s at {size.label}" for size in SIZES.values())}, where
its server side took 1.1 GB. It starts a process for each message. That measurement is not repeated here.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"replace {RESULT.name}")
    parser.add_argument("--only", choices=SIZES, help="one size")
    parser.add_argument("--rounds", type=int, help="rounds to measure, in place of each case's own number")
    arguments = parser.parse_args()
    load_before, cases = os.getloadavg()[0], []
    for label, num_workers, num_rounds in CASES:
        if arguments.only in (None, label):
            with tempfile.TemporaryDirectory() as folder:
                cases.append(measure(Path(folder), SIZES[label], num_workers, arguments.rounds or num_rounds))
            print(*(row(cases[-1]) for row in (round_row, speed_row, phase_row)), sep="\n", flush=True)
    if arguments.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(report(cases, load_before=load_before))


if __name__ == "__main__":
    main()
