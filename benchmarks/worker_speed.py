"""A worker's tokens a second against the same loop without Weft, and the time from a task to its first step.

    python benchmarks/worker_speed.py [--write] [--pairs N] [--threads N] [--device cuda]

The other loop is written plainly with transformers, peft and torch.optim.AdamW: same base, same adapters, same
batches (made before the clock starts), same clipping, the loss read at every step. Both take turns, task by task,
and their losses are compared, so that it is known to be the same training. A task of Weft's trainer counts whole:
composing, the optimiser's state in and out, the deltas. On a GPU the base is of Llama's shape with about 1.1B random
weights, in bf16 and in 4 bits. ``--write`` replaces benchmarks/results/worker_speed.md, or worker_speed_cuda.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from lib.machine import setting
from lib.plain_loop import Plain
from lib.random_base import DEMO_BASE, write_base, write_text

from weft.client.data import TokenDataset, load_dataset
from weft.client.tasks.steps import read_module
from weft.client.trainer.training import StepReport, Trainer, TrainResult
from weft.common.base import pin_base
from weft.common.composition import Quantisation, ResidentBase, describe
from weft.common.ids import ModuleKey, run_id
from weft.common.initial import initial_tensors
from weft.common.modules import LoraSettings, Topology
from weft.common.recipe import InnerSettings, Recipe
from weft.common.tensors import Float32Array, write_module

RESULTS = Path(__file__).parent / "results"
KEY = ModuleKey(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is trained."""

    label: str
    shape: str
    """A row of ``random_base.SHAPES``; empty for the base that the demo ships."""
    inner: InnerSettings
    quantise: Quantisation = "none"


ON_CPU = (
    Case(label="the demo's base, 2M, float32", shape="", inner=InnerSettings(steps=10)),
    Case(label="30M, float32", shape="30M", inner=InnerSettings(steps=3)),
)
ON_CUDA = (
    Case(label="1.1B, bf16", shape="1.1B", inner=InnerSettings(steps=50, sequence_length=1024)),
    Case(
        label="1.1B, 4-bit",
        shape="1.1B",
        inner=InnerSettings(steps=50, sequence_length=1024),
        quantise="4bit",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where it is trained."""

    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen base."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class WithWeft:
    """The worker's trainer, as the worker uses it."""

    def __init__(self, base: Path, recipe: Recipe, case: Case, place: Place) -> None:
        self.resident = ResidentBase.load(
            base, recipe.task, device=place.device, dtype=place.dtype, quantise=case.quantise
        )
        self.recipe = recipe
        self.schema = describe(base, recipe)[KEY]
        self.start = initial_tensors(self.schema, seed=0)
        self.states: dict[ModuleKey, dict[str, Float32Array]] = {}
        self.num_batches = 0

    def use(self, data: TokenDataset) -> None:
        """Train on this."""
        self.trainer = Trainer(self.resident, self.recipe, data, clock=time.monotonic)

    def task(self, num_steps: int) -> TrainResult:
        """One task, of which nothing is kept."""
        return self.trainer.train(
            self.start,
            {KEY: self.num_batches},
            num_steps=num_steps,
            first_batch=self.num_batches,
            optimiser_states=self.states,
            on_step=go_on,
        )

    def run(self, num_steps: int) -> tuple[float, ...]:
        """One task, and what the worker does with its result."""
        result = self.task(num_steps)
        self.start = {name: self.start[name] + delta for name, delta in result.deltas[KEY].items()}
        self.states |= result.optimiser_states
        self.num_batches += result.num_steps
        return result.losses

    def first_step_s(self, version: Path) -> float:
        """From a fetched version to the end of the first step, on a base that is resident."""
        write_module(version, self.start, self.schema)
        begin_s = time.perf_counter()
        self.start = read_module(version, self.schema)
        self.task(1)
        return time.perf_counter() - begin_s


def go_on(_: StepReport) -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskTime:
    """What a task took."""

    wall_s: float
    cpu_s: float
    """Of the process, all threads together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two tasks of the same length, one after the other."""

    weft: TaskTime
    plain: TaskTime


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One case."""

    case: Case
    pairs: list[Pair]
    first_step_s: float
    load_s: float
    memory_gb: tuple[float, float]
    """Peak on the device of Weft's and of the plain loop; 0 on a CPU."""
    loss_difference: float
    """Largest relative difference of the losses of the first tasks."""


def measure(folder: Path, case: Case, place: Place, num_pairs: int) -> Measured:
    base = write_base(folder / "base", case.shape) if case.shape else DEMO_BASE
    topology, inner = Topology(lora=LoraSettings(rank=16, alpha=32.0)), case.inner
    recipe = Recipe(run=run_id("speed"), base=pin_base(base), topology=topology, inner=inner, num_rounds=1000)
    begin_s = time.perf_counter()
    weft = WithWeft(base, recipe, case, place)
    load_s = time.perf_counter() - begin_s
    data = load_dataset(write_text(folder / "text.txt"), weft.resident.tokenizer, recipe, worker="w")
    weft.use(data)
    start = weft.start
    losses, weft_gb = alone(weft, inner.steps, place)
    plain = Plain(base, recipe, device=place.device, dtype=place.dtype, quantise=case.quantise)
    plain.begin_at(start)
    plain.use(data, inner.steps * (num_pairs + 2))
    both_losses = list(zip(losses, plain.run(inner.steps), strict=True))
    pairs = take_turns(weft, plain, inner.steps, place, num_pairs)
    first_step_s = statistics.median(weft.first_step_s(folder / f"version-{number}") for number in range(5))
    del weft
    gc.collect()
    return Measured(
        case=case,
        pairs=pairs,
        first_step_s=first_step_s,
        load_s=load_s,
        memory_gb=(weft_gb, alone(plain, inner.steps, place)[1]),
        loss_difference=max(abs(of_weft / of_plain - 1) for of_weft, of_plain in both_losses),
    )


def alone(side: WithWeft | Plain, num_steps: int, place: Place) -> tuple[tuple[float, ...], float]:
    """Losses of a task, and the device's peak memory meanwhile in 10⁹ bytes (0 on a CPU)."""
    if place.device.type != "cuda":
        return side.run(num_steps), 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return side.run(num_steps), torch.cuda.max_memory_allocated() / 1e9


def take_turns(weft: WithWeft, plain: Plain, num_steps: int, place: Place, num_pairs: int) -> list[Pair]:
    """Time both, pair by pair; who begins changes, so that neither always has the quieter machine."""
    pairs = []
    for number in range(num_pairs):
        if number % 2:
            of_weft = time_of(weft, num_steps, place)
            pairs.append(Pair(weft=of_weft, plain=time_of(plain, num_steps, place)))
        else:
            of_plain = time_of(plain, num_steps, place)
            pairs.append(Pair(weft=time_of(weft, num_steps, place), plain=of_plain))
    return pairs


def time_of(side: WithWeft | Plain, num_steps: int, place: Place) -> TaskTime:
    place.wait()
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    side.run(num_steps)
    place.wait()
    return TaskTime(wall_s=time.perf_counter() - begin_s, cpu_s=time.process_time() - begin_cpu_s)


# ---- the page ----------------------------------------------------------------------------------------------------


def row(case: Measured) -> str:
    inner, median = case.case.inner, statistics.median
    num_tokens = inner.steps * inner.batch_size * inner.sequence_length
    weft_s = median(pair.weft.wall_s for pair in case.pairs)
    plain_s = median(pair.plain.wall_s for pair in case.pairs)
    ratios = [pair.plain.wall_s / pair.weft.wall_s for pair in case.pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    of_cpu = median(pair.plain.cpu_s / pair.weft.cpu_s for pair in case.pairs)
    memory = " / ".join(f"{gb:.1f} GB" for gb in case.memory_gb) if all(case.memory_gb) else "·"
    return (
        f"| {case.case.label} | {inner.batch_size} × {inner.sequence_length} "
        f"| {num_tokens / weft_s:,.0f} | {num_tokens / plain_s:,.0f} "
        f"| **{median(ratios):.3f}** ({low:.3f} to {high:.3f}, {len(ratios)} pairs) | {of_cpu:.3f} "
        f"| {case.loss_difference:.0e} | {case.first_step_s:.2f} s | {plain_s / inner.steps:.2f} s "
        f"| {case.load_s:.1f} s | {memory} |"
    )


def report(cases: list[Measured], *, on_cuda: bool, load_before: float) -> str:
    packages = ("weft", "torch", "transformers", "peft")
    device = f"{torch.cuda.get_device_name()}" if on_cuda else f"CPU, {torch.get_num_threads()} thread(s)"
    rows, steps = [row(case) for case in cases], " and ".join(str(case.case.inner.steps) for case in cases)
    if not on_cuda:
        rows += [f"| {case.label}, on a GPU | {elsewhere()} | | | | | | | | | |" for case in ON_CUDA]
    return f"""# A worker's speed

{setting(packages, load_before=load_before)}

{device}. LoRA of rank 16 on all linear layers, AdamW; random weights but for the demo's base. Tokens a second of a
whole task (median) with Weft's trainer and with the same loop written plainly. The two take turns; the ratio is the
median over pairs (quartiles), the aim 0.98. Above 1 it says how noisy the machine is, since the loops do the same:
the losses of the first task differ relatively by what the table says. Beside it the same ratio of CPU seconds, which
other work on the machine moves less. Tasks have {steps} steps: what Weft does once a task counts in full. The first
step is from a fetched version on disk to its end, with the base resident; then
what a step takes, and what loading the base takes, once a process. Memory is the peak on the device, Weft's and the
plain loop's.

| base | batch | Weft, tok/s | plain, tok/s | ratio | of CPU time | losses differ | 1st step | a step | load | memory |
|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|
{chr(10).join(rows)}
"""


def elsewhere() -> str:
    """Where the figures of a GPU are."""
    return "see worker_speed_cuda.md" if (RESULTS / "worker_speed_cuda.md").exists() else "not measured"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="replace the result's page")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--pairs", type=int, default=30, help="pairs of tasks, at least 2 (default: 30)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the CPU (default: all)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    on_cuda, load_before, cases = arguments.device == "cuda", os.getloadavg()[0], []
    for case in ON_CUDA if on_cuda else ON_CPU:
        with tempfile.TemporaryDirectory() as folder:
            place = Place(device=torch.device(arguments.device, 0) if on_cuda else torch.device("cpu"))
            cases.append(measure(Path(folder), case, place, arguments.pairs))
        print(row(cases[-1]), flush=True)
    if arguments.write:
        name = "worker_speed_cuda.md" if on_cuda else "worker_speed.md"
        (RESULTS / name).write_text(report(cases, on_cuda=on_cuda, load_before=load_before))


if __name__ == "__main__":
    main()
