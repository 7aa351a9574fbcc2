"""Merging rank-16 adapters against ``peft``'s ``add_weighted_adapter``: time and memory.

    python benchmarks/merge_lora.py [--blocks N] [--counts 4 16] [--wide] [--write]

Ours is a whole merge, files to files (plan, merge, journal, sync, rename); peft's is ``add_weighted_adapter``
alone, its base and adapters loaded already. Each runs in a process of its own that says how long it took and by
how much anonymous memory grew at most, its forks' included; they take turns, once a repetition, and times are medians.
Weights are random. ``--wide`` adds layers of width 4096 merged from 4 adapters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lib.machine import setting
from lib.memory import watched
from merge import PACKAGES, Size, recipe_of, weft

from weft.common.tensors import TensorData, write_tensors
from weft.server.offline import merging
from weft.server.offline.recipe import LoraMode

RANK = 16


@dataclass(frozen=True, slots=True)
class Case:
    """One way to merge adapters, and what peft calls it."""

    label: str
    rule: str
    mode: LoraMode
    theirs: str


CASES = (
    Case("mean of A and of B", "mean", LoraMode.FACTORS, "linear"),
    Case("TIES of A and of B", "ties", LoraMode.FACTORS, "ties"),
    Case("DARE-TIES of A and of B", "dare_ties", LoraMode.FACTORS, "dare_ties"),
    Case("mean of ΔW, all ranks kept", "mean", LoraMode.STACK, "cat"),
    Case("mean of ΔW, to rank 16", "mean", LoraMode.EXACT, "svd"),
    Case("TIES of ΔW, to rank 16", "ties", LoraMode.DENSE, "ties_svd"),
)


def layers_of(size: Size, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of the layers that have an adapter, by name."""
    return {
        name.removesuffix(".weight"): (shape[0], shape[1])
        for name, shape in size.shapes.items()
        if name.split(".")[-2] in targets
    }


def write_adapter(to: Path, size: Size, targets: Sequence[str], seed: int) -> Path:
    to.mkdir()
    rng, tensors = np.random.default_rng(seed), dict[str, TensorData]()
    for name, (rows, columns) in layers_of(size, targets).items():
        for side, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
            values = rng.standard_normal(shape, np.float32) / np.float32(25)
            tensors[f"base_model.model.{name}.lora_{side}.weight"] = values
    write_tensors(to / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": RANK,
        "bias": "none",
        "target_modules": [*targets],
    }
    (to / "adapter_config.json").write_text(json.dumps(config))
    return to


# -- in a process of its own -------------------------------------------------------------------------------


def measured(action: Callable[[], object]) -> dict[str, float]:
    """Seconds, and the growth of memory in MiB."""
    with watched() as growth:
        begin = time.perf_counter()
        action()
        seconds = time.perf_counter() - begin
    return {"s": seconds, "mib": growth.mib}


def ours(adapters: Sequence[Path], case: Case, to: Path, threads: int) -> dict[str, float]:
    recipe = recipe_of(adapters, None, case.rule, case.mode)
    return measured(lambda: weft(recipe, to, threads, digests=False))


def theirs(adapters: Sequence[Path], case: Case, size: Size) -> dict[str, float]:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {key: value for key, value in size.config.items() if key != "architectures"}
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**config)), adapters[0], adapter_name="0")
    for number, path in enumerate(adapters[1:], 1):
        loaded.load_adapter(path, adapter_name=str(number))
    options = {"density": 0.2} if "ties" in case.theirs else {}
    options |= {"svd_rank": RANK} if "svd" in case.theirs else {}
    names = [str(number) for number in range(len(adapters))]
    weights = [1.0 / len(names)] * len(names)
    return measured(
        lambda: loaded.add_weighted_adapter(names, weights, "merged", combination_type=case.theirs, **options)
    )


def child(said: str) -> dict[str, float]:
    asked = json.loads(said)
    adapters = [Path(path) for path in asked["adapters"]]
    case = CASES[asked["case"]]
    if asked["theirs"]:
        return theirs(adapters, case, Size(**asked["size"]))
    return ours(adapters, case, Path(asked["to"]), asked["threads"])


def alone(**asked: object) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", __file__, "--child", json.dumps(asked)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


# -- tables ------------------------------------------------------------------------------------------------


def rows(
    label: str, adapters: Sequence[Path], size: Size, cases: Sequence[Case], arguments: argparse.Namespace
) -> list[str]:
    lines = []
    fields = {name: getattr(size, name) for name in Size.__slots__}
    paths = [str(path) for path in adapters]
    for case in cases:
        mine, peft = [], []
        for turn in range(arguments.repeats):
            asked = {
                "adapters": paths,
                "case": CASES.index(case),
                "size": fields,
                "threads": arguments.threads,
            }
            to = adapters[0].with_name(f"out-{adapters[0].name}-{CASES.index(case)}-{len(paths)}-{turn}")
            mine.append(alone(**asked, theirs=False, to=str(to)))
            peft.append(alone(**asked, theirs=True))
        seconds, their_s = (statistics.median(each["s"] for each in of) for of in (mine, peft))
        mib, their_mib = (statistics.median(each["mib"] for each in of) for of in (mine, peft))
        lines.append(
            f"| {label} | {case.label} | {seconds:.2f} | {mib:.0f} | `{case.theirs}` | {their_s:.2f} | "
            f"{their_mib:.0f} | {their_s / seconds:.1f} |"
        )
        sys.stderr.write(lines[-1] + "\n")
    return lines


def report(arguments: argparse.Namespace, work: Path) -> str:
    load_before = os.getloadavg()[0]
    size = Size(blocks=arguments.blocks, width=640, inner=1706, vocabulary=1000)
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    adapters = [write_adapter(work / f"a{n}", size, targets, n) for n in range(max(arguments.counts))]
    lines, modules = [], len(layers_of(size, targets))
    for count in arguments.counts:
        label = f"{count} × {modules} layers, width 640"
        lines += rows(label, adapters[:count], size, CASES, arguments)
    if arguments.wide:
        wide = Size(blocks=1, width=4096, inner=64, vocabulary=100)
        few = [write_adapter(work / f"w{n}", wide, ["q_proj", "k_proj"], n) for n in range(4)]
        lines += rows("4 × 2 layers, width 4096", few, wide, CASES[4:], arguments)
    return "\n".join(
        [
            "# Merging adapters",
            "",
            f"{setting(PACKAGES, load_before=load_before)} · {arguments.threads} processes",
            "",
            "Rank-16 adapters, files to files, against peft's `add_weighted_adapter` with everything loaded:",
            "",
            "| adapters | how | s | MiB | peft | s | MiB | × faster |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--blocks", type=int, default=12, help="of 7 layers each")
    parser.add_argument("--counts", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--wide", action="store_true", help="also layers of width 4096")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=merging.num_threads())
    parser.add_argument("--directory", type=Path, help="where to work; the best is a file system in memory")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/merge_lora.md")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        text = report(arguments, Path(directory))
    sys.stdout.write(text)
    if arguments.write:
        (Path(__file__).parent / "results" / "merge_lora.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
