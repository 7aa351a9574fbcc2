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
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from lib.machine import setting
from lib.processes import children, environment, finish, peak_mb, started, wait_for
from lib.raw_grpc import raw_mb_s

from weft.client.home import KEY, Access
from weft.client.join import connect, greet, register
from weft.client.transport import Transport
from weft.common.codec import CodecKind, CodecSettings, encode_update
from weft.common.identity.token import JoinToken
from weft.common.ids import WorkerId
from weft.common.manifest import Signed, canonical_json
from weft.common.modules import Schema
from weft.common.protocol import Stage, Task
from weft.common.settings import to_table
from weft.common.statements import UPDATE_TYPE, UpdateOfModule, UpdateStatement
from weft.common.tensors import read_header, write_tensors

RESULT = Path(__file__).parent / "results" / "round_overhead.md"
IDLE_S = 120.0
WEFT = ("-m", "weft.common.cli")
PHASES = ("fetch", "encode", "upload", "submit", "wait")


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
CASES = (("10 kB", 2, 24), ("10 MB", 2, 12), ("10 MB", 4, 12), ("100 MB", 2, 6))
"""Size, workers, rounds measured (one more is run before them)."""


# ---- a worker that does not train --------------------------------------------------------------------------------


def work(address: str, token_text: str, directory: Path) -> None:
    """Join, do tasks until the run is finished, and print the seconds of each phase as a line of JSON a task."""
    token = JoinToken.parse(token_text)
    ca_pem = greet(address, token, insecure=False, now=datetime.now(UTC))
    member = register(directory, address, token, ca_pem=ca_pem, name=directory.name, device="does not train")
    access = Access(member=member, key_file=directory / KEY)
    worker = NoOp(access, directory)
    with connect(access) as transport:
        asked_s = time.perf_counter()
        while not (answer := transport.poll_task(wait_s=20.0)).finished:
            if answer.task is not None:
                waited_s = time.perf_counter() - asked_s
                print(json.dumps(worker.do(transport, answer.task) | {"wait": waited_s}), flush=True)
                asked_s = time.perf_counter()


class NoOp:
    """The steps of a worker around a training that takes no time."""

    def __init__(self, access: Access, directory: Path) -> None:
        self._key, self._worker_id = access.key(), WorkerId(access.member.worker_id)
        self._directory = directory
        self._rng = np.random.default_rng(int.from_bytes(self._key.public[:8], "big"))
        self._deltas: dict[str, Any] = {}

    def do(self, transport: Transport, task: Task) -> dict[str, float]:
        """One task; returns the seconds of its phases."""
        begin_s = time.perf_counter()
        (start,) = task.modules
        self._report(transport, task, Stage.FETCHING)
        version = transport.download(
            start.blake3, self._directory / "version", idle_s=IDLE_S, size_bytes=start.size_bytes
        )
        fetched_s = time.perf_counter()
        self._report(transport, task, Stage.ENCODING)
        update = self._encode(task, Schema(tuple(sorted(read_header(version).specs))))
        encoded_s = time.perf_counter()
        self._report(transport, task, Stage.SENDING)
        blob = transport.upload(update, task.lease_token, idle_s=IDLE_S)
        sent_s = time.perf_counter()
        said = UpdateOfModule(
            module=start.module, start_version=start.version, digest=blob.blake3, size_bytes=blob.size_bytes
        )
        transport.submit_update(lease_token=task.lease_token, statement=self._statement(task, said))
        moments = [begin_s, fetched_s, encoded_s, sent_s, time.perf_counter()]
        seconds = [end - begin for begin, end in itertools.pairwise(moments)]
        return dict(zip(PHASES, seconds, strict=False)) | {"update_bytes": blob.size_bytes}

    def _report(self, transport: Transport, task: Task, stage: Stage) -> None:
        transport.report_progress(lease_token=task.lease_token, stage=stage, num_done=0, num_total=1)

    def _encode(self, task: Task, schema: Schema) -> Path:
        """An update that no other worker and no other round has."""
        if not self._deltas:
            self._deltas = {
                spec.name: self._rng.standard_normal(spec.shape, np.float32) for spec in schema.tensors
            }
        for array in self._deltas.values():
            array *= np.float32(0.99)
        path = self._directory / "update"
        encode_update(path, schema, self._deltas, CodecSettings(kind=CodecKind.FP32))
        return path

    def _statement(self, task: Task, update: UpdateOfModule) -> Signed:
        statement = UpdateStatement(
            run=task.run_id,
            task=task.task_id,
            worker=self._worker_id,
            epoch=task.lease_epoch,
            recipe=task.recipe_blake3,
            updates=(update,),
            num_steps=1,
            num_tokens=8,
            loss_first=1.0,
            loss_last=1.0,
        )
        return Signed.sign(self._key, UPDATE_TYPE, canonical_json(to_table(statement)))


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
    def moved_mb(self) -> float:
        """Up and down, by all workers, in one round."""
        return 2 * self.num_workers * self.update_bytes / 1e6

    @property
    def moving_mb_s(self) -> float:
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
        for worker in [start(name, __file__, "--work", address, token, str(folder / name)) for name in names]:
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
    size, median_s = case.size, statistics.median(case.rounds_s)
    in_round = case.moved_mb / median_s
    return (
        f"| {size.label} ({case.update_bytes:,} bytes) | {case.num_workers} | {len(case.rounds_s)} "
        f"| **{median_s:.2f}** ({min(case.rounds_s):.2f} to {max(case.rounds_s):.2f}) | {size.aim_s} "
        f"| {size.flower_s} | {in_round:,.1f} | {case.moving_mb_s:,.1f} | {case.raw_mb_s:,.1f} "
        f"| {case.moving_mb_s / case.raw_mb_s:.2f} | {case.serve_mb:.0f} | {case.engine_mb:.0f} |"
    )


def phase_row(case: Measured) -> str:
    cells = " | ".join(f"{1e3 * case.phases_s[phase]:,.0f}" for phase in PHASES)
    return f"| {case.size.label} | {case.num_workers} | {cells} |"


def report(cases: list[Measured], command: str, *, load_before: float) -> str:
    rows, phases = "\n".join(map(round_row, cases)), "\n".join(map(phase_row, cases))
    return f"""# What a round costs beside the training

{setting(command, ("weft", "grpcio", "numpy"), load_before=load_before)}

Workers that do not train, on loopback, TLS; codec fp32, rule mean on the factors, no gate. Seconds from one published
version to the next, median (least to most): fetch the version, encode, upload, submit, screen, merge, publish. MB/s
are 10⁶ bytes a second, up and down, of all workers together: within the whole round; while workers fetch and upload;
and raw unary gRPC of the same bytes in the same run, with nothing hashed, checked or written. Peak memory is resident
(VmHWM), mapped files included, of `weft serve` and of its merge process, which holds torch.

| update | workers | rounds | s a round | aim | Flower 1.42 | MB/s, round | MB/s, moving | MB/s, raw | moving ÷ raw | serve, peak MB | merge process, peak MB |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
{rows}

Flower 1.42's figures are quoted, not measured here: its deployment engine with two SuperNodes on a like machine,
without TLS and with its database in memory, 1.1 GB of server-side memory at 100 MB.

Where a worker's time goes, median milliseconds a task. Waiting is for the others, for the coordinator to screen the
last update, merge and publish, and for the next task:

| update | workers | fetch | encode | upload | submit | wait |
|---|--:|--:|--:|--:|--:|--:|
{phases}
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"replace {RESULT.name}")
    parser.add_argument("--only", choices=SIZES, help="one size")
    parser.add_argument("--rounds", type=int, help="rounds to measure, instead of 24, 12, 12 and 6")
    parser.add_argument("--work", nargs=3, metavar=("ADDRESS", "TOKEN", "DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        address, token, directory = arguments.work
        work(address, token, Path(directory))
        return
    load_before, cases = os.getloadavg()[0], []
    for label, num_workers, num_rounds in CASES:
        if arguments.only in (None, label):
            with tempfile.TemporaryDirectory() as folder:
                cases.append(measure(Path(folder), SIZES[label], num_workers, arguments.rounds or num_rounds))
            print(round_row(cases[-1]), phase_row(cases[-1]), sep="\n", flush=True)
    if arguments.write:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(
            report(cases, "python benchmarks/round_overhead.py --write", load_before=load_before)
        )


if __name__ == "__main__":
    main()
