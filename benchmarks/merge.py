"""``weft merge`` against its limit, ``peft`` and ``mergekit``, on Llama-style checkpoints.

    python benchmarks/merge.py [--scale N] [--inputs 4 8] [--dtypes fp32 bf16] [--mergekit PYTHON] [--write]

The limit is one arithmetic mean pass over the mapped inputs, by tiles and with reused buffers, and one write of
a result's bytes to a new file. ``weft`` is timed as a whole merge in a process that has started (plan, merge,
journal, sync, rename), with and without hashing the inputs for the manifest, and once as the command from its
start. Each repetition of a merge is followed by one of the limit, and the ratios are medians of pairs, by wall
clock and by processor time of all processes: other work on the machine meets both alike. ``peft`` is
``peft.utils.merge_utils`` tensor by tensor without writing files; ``mergekit`` is its command in the interpreter that
is named; both are timed once, at the counts of ``--their-inputs``. Peak memory is the growth of anonymous pages of a
process of its own and its forks. Weights are random and differ from input to input: what selection costs hardly
depends on them. All of it is one run; times are medians.

``--scale 1`` is 134 million parameters (18 blocks of width 640); the default, 8, is an eighth of the blocks'
and the vocabulary's size and takes two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from lib.machine import setting

from weft.common.tensors import FOREIGN, Bf16, TensorData, TensorFile, float32_to_bf16, write_tensors
from weft.server.merge.tiles import spans
from weft.server.offline import merging
from weft.server.offline.recipe import InputSpec, LoraMode, Recipe, RecipeFile, merge_settings, understand

TILE = 1 << 17
PACKAGES = ("torch", "numpy", "peft", "safetensors")
RULES = {
    "mean": ("mean", {}),
    "ties": ("ties", {"density": 0.2}),
    "dare_ties": ("dare_ties", {"density": 0.2}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.2}),
}
MERGEKIT = {
    "mean": ("linear", {}),
    "ties": ("ties", {"density": 0.2}),
    "dare_ties": ("dare_ties", {"density": 0.2}),
    "breadcrumbs": ("breadcrumbs", {"density": 0.2}),
}


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama-style model."""

    blocks: int
    width: int
    inner: int
    vocabulary: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by name."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.width)}
        square, up = (self.width, self.width), (self.inner, self.width)
        for block in range(self.blocks):
            at = f"model.layers.{block}"
            shapes |= {f"{at}.self_attn.{name}_proj.weight": square for name in "qkvo"}
            shapes |= {f"{at}.mlp.{name}_proj.weight": up for name in ("gate", "up")}
            shapes[f"{at}.mlp.down_proj.weight"] = up[::-1]
            shapes |= {f"{at}.{name}_layernorm.weight": up[1:] for name in ("input", "post_attention")}
        return shapes | {"model.norm.weight": up[1:]}

    @property
    def millions(self) -> float:
        """Of parameters."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values()) / 1e6

    @property
    def config(self) -> dict[str, object]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": max(1, self.width // 64),
            "num_key_value_heads": max(1, self.width // 64),
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 2048,
        }


def size_of(scale: int) -> Size:
    return Size(blocks=max(2, 18 // scale), width=640, inner=1706, vocabulary=71_680 // scale)


def write_model(to: Path, size: Size, dtype: str, seed: int) -> Path:
    to.mkdir()
    rng = np.random.default_rng(seed)
    tensors: dict[str, TensorData] = {}
    for name, shape in size.shapes.items():
        values = np.multiply(rng.standard_normal(shape, np.float32), np.float32(0.02))
        tensors[name] = values if dtype == "fp32" else Bf16(float32_to_bf16(values))
    write_tensors(to / "model.safetensors", tensors, {"format": "pt"})
    config = size.config | {"dtype": "float32" if dtype == "fp32" else "bfloat16"}
    (to / "config.json").write_text(json.dumps(config))
    return to


# -- what is measured --------------------------------------------------------------------------------------


def median_s(action: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def one_pass(models: Sequence[Path], to: Path, threads: int) -> None:
    """The mean of all inputs, summed by tiles, written as float32 or bfloat16 of the inputs."""
    files = [TensorFile(model, FOREIGN) for model in models]
    specs = files[0].header.specs
    tiles = [(spec, *span) for spec in specs for span in spans(spec.size, TILE)]
    to.unlink(missing_ok=True)
    out = os.open(to, os.O_WRONLY | os.O_CREAT)
    begins = dict(zip((spec.name for spec in specs), _offsets(files[0]), strict=True))

    def batch(index: int) -> None:
        total = np.empty(TILE, np.float32)
        wide = np.empty(TILE, np.uint32)
        for spec, start, stop in tiles[index::threads]:
            part = total[: stop - start]
            part.fill(0)
            for file in files:
                values = file.array(spec.name).reshape(-1)[start:stop]
                if spec.dtype == "BF16":
                    values = np.left_shift(values, 16, out=wide[: stop - start], dtype=np.uint32).view(
                        np.float32
                    )
                np.add(part, values, out=part)
            np.multiply(part, np.float32(1 / len(files)), out=part)
            stored: npt.NDArray[np.generic] = part if spec.dtype == "F32" else float32_to_bf16(part)
            os.pwrite(out, stored.data, begins[spec.name] + start * stored.itemsize)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(batch, range(threads)))
    os.close(out)


def _offsets(file: TensorFile) -> Iterator[int]:
    return (entry.start for entry in file.header.entries.values())


def recipe_of(inputs: Sequence[Path], base: Path | None, rule: str, lora: LoraMode | None = None) -> Recipe:
    name, parameters = RULES[rule]
    file = RecipeFile(
        inputs=tuple(InputSpec(path=str(path), name=path.name) for path in inputs),
        base=str(base or ""),
        lora=lora,
        merge=merge_settings(name, parameters),
    )
    return understand(file, resolve=Path)


def weft(recipe: Recipe, to: Path, threads: int, *, digests: bool) -> None:
    plan = merging.make_plan(recipe, device="cpu")
    merging.merge(
        recipe, plan, to, merging.Options(threads=threads, digests=digests), advance=lambda _count: None
    )


def command_s(arguments: Sequence[str | Path], to: Path) -> float:
    begin = time.perf_counter()
    subprocess.run([str(each) for each in arguments], check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    shutil.rmtree(to)
    return seconds


def peft_rule(models: Sequence[Path], base: Path, rule: str) -> None:
    from peft.utils import merge_utils
    from safetensors import safe_open

    handles = [safe_open(path / "model.safetensors", framework="pt") for path in (*models, base)]
    *trained, start = (handle.__enter__() for handle in handles)
    for name in start.keys():  # noqa: SIM118 - it is no mapping
        rows = [handle.get_tensor(name) - start.get_tensor(name) for handle in trained]
        weights = torch.ones(len(rows))
        if rule == "ties":
            merge_utils.ties(rows, weights, 0.2)
        else:
            merge_utils.dare_ties(rows, weights, 0.2)


def mergekit_s(python: Path, models: Sequence[Path], base: Path, rule: str, to: Path) -> float:
    method, parameters = MERGEKIT[rule]
    entries = [{"model": str(path), "parameters": {"weight": 1.0, **parameters}} for path in models]
    config = {"merge_method": method, "models": entries}
    if method != "linear":
        config |= {"base_model": str(base), "parameters": {"normalize": True}}
    file = to.with_suffix(".yml")
    file.write_text(json.dumps(config))  # which is YAML
    return command_s([python, "-W", "ignore", "-m", "mergekit.scripts.run_yaml", file, to], to)


CHILD = """
import json, shutil, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import merge as bench
from lib.memory import watched
def run(inputs, base):
    recipe = bench.recipe_of([Path(each) for each in inputs], Path(base), {rule!r})
    bench.weft(recipe, Path({to!r}), {threads}, digests=True)
    shutil.rmtree({to!r})
run({tiny!r}, {tiny_base!r})
with watched() as growth:
    run({inputs!r}, {base!r})
print(json.dumps(growth.mib))
"""


@dataclass(frozen=True, slots=True)
class Timed:
    """Medians of a few repetitions."""

    wall_s: float
    cpu_s: float
    limit_s: float
    """Wall time of the limit beside it."""
    wall_ratio: float
    """Against the limit."""
    cpu_ratio: float

    @property
    def cells(self) -> str:
        """As columns of a table."""
        return f"{self.wall_s:.2f} | {self.cpu_s:.2f} | {self.wall_ratio:.1f} | {self.cpu_ratio:.1f}"


def clocks(action: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall clock and of all processors."""
    wall, cpu = time.perf_counter(), _cpu_s()
    action()
    return time.perf_counter() - wall, _cpu_s() - cpu


def _cpu_s() -> float:
    """Of this process and of those that it has started and that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def timed(
    recipe: Recipe, to: Path, models: Sequence[Path], arguments: argparse.Namespace, *, digests: bool = False
) -> Timed:
    """A whole merge, and the limit of the same inputs after each repetition."""
    files, ours, limits = [model / "model.safetensors" for model in models], [], []
    for _ in range(arguments.repeats):
        ours.append(clocks(lambda: weft(recipe, to, arguments.threads, digests=digests)))
        shutil.rmtree(to)
        limits.append(clocks(lambda: one_pass(files, to.with_name("mean.bin"), arguments.threads)))
    pairs = [(own[0] / limit[0], own[1] / limit[1]) for own, limit in zip(ours, limits, strict=True)]
    wall_s, cpu_s = map(statistics.median, zip(*ours, strict=True))
    return Timed(
        wall_s,
        cpu_s,
        statistics.median(limit[0] for limit in limits),
        *map(statistics.median, zip(*pairs, strict=True)),
    )


def bare_s(recipe: Recipe, to: Path, threads: int, arguments: argparse.Namespace) -> float:
    """Median seconds of a whole merge, inputs not hashed."""
    times = []
    for _ in range(arguments.repeats):
        times.append(clocks(lambda: weft(recipe, to, threads, digests=False))[0])
        shutil.rmtree(to)
    return statistics.median(times)


def peak_mib(
    rule: str, inputs: Sequence[Path], base: Path, tiny: Sequence[Path], to: Path, threads: int
) -> float:
    """Growth of anonymous memory of a process that has merged something small before, and of its forks, in MiB."""
    code = CHILD.format(
        here=str(Path(__file__).parent),
        rule=rule,
        threads=threads,
        to=str(to),
        inputs=[str(path) for path in inputs],
        base=str(base),
        tiny=[str(path) for path in tiny[1:]],
        tiny_base=str(tiny[0]),
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    return float(json.loads(done.stdout))


# -- tables ------------------------------------------------------------------------------------------------


def checkpoint_rows(arguments: argparse.Namespace, work: Path, dtype: str) -> list[str]:
    size = size_of(arguments.scale)
    base = write_model(work / f"{dtype}-base", size, dtype, 0)
    models = [write_model(work / f"{dtype}-{n}", size, dtype, n + 1) for n in range(max(arguments.inputs))]
    rows = []
    for count in arguments.inputs:
        chosen, to = models[:count], work / "out"
        gigabytes = sum((model / "model.safetensors").stat().st_size for model in chosen) / 1e9
        label = f"{count} × {dtype}, {gigabytes:.2f} GB"
        limits = []
        for rule in arguments.rules:
            recipe = recipe_of(chosen, None if rule == "mean" else base, rule)
            bare = timed(recipe, to, chosen, arguments)
            whole = timed(recipe, to, chosen, arguments, digests=True)
            limits += [bare.limit_s, whole.limit_s]
            theirs = count in arguments.their_inputs
            peft = _peft(chosen, base, rule) if arguments.peft and theirs else None
            kit = (
                mergekit_s(arguments.mergekit, chosen, base, rule, to)
                if arguments.mergekit and theirs
                else None
            )
            rows.append(
                f"| {label} | {rule} | {bare.cells} | {_times(peft, bare.wall_s)} | {_times(kit, bare.wall_s)} |"
            )
            rows.append(f"| {label} | {rule}, inputs hashed | {whole.cells} | | |")
        rows.append(
            f"| {label} | the limit: one mean pass, one write | {statistics.median(limits):.2f} | | 1 | 1 | | |"
        )
    for path in (base, *models):
        shutil.rmtree(path)
    return rows


def _peft(models: Sequence[Path], base: Path, rule: str) -> float | None:
    return median_s(lambda: peft_rule(models, base, rule), 1) if rule in ("ties", "dare_ties") else None


def _times(theirs: float | None, ours: float) -> str:
    return "" if theirs is None else f"{theirs:.1f} s, {theirs / ours:.0f} ×"


def thread_rows(arguments: argparse.Namespace, work: Path) -> list[str]:
    size = size_of(arguments.scale)
    base = write_model(work / "base", size, "fp32", 0)
    models = [write_model(work / f"m{n}", size, "fp32", n + 1) for n in range(min(arguments.inputs))]
    rows = []
    for rule in arguments.rules:
        recipe = recipe_of(models, None if rule == "mean" else base, rule)
        times = [bare_s(recipe, work / "out", n, arguments) for n in range(1, arguments.threads + 1)]
        rows.append(f"| {rule} | " + " | ".join(f"{seconds:.2f}" for seconds in times) + " |")
    program = [Path(sys.executable).with_name("weft"), "merge", *models, "--to", work / "out"]
    rows.append(
        f"| the command, mean | {command_s(program, work / 'out'):.2f} |" + " |" * (arguments.threads - 1)
    )
    for path in (base, *models):
        shutil.rmtree(path)
    return rows


def memory_rows(arguments: argparse.Namespace, work: Path) -> list[str]:
    size = size_of(
        max(arguments.scale, 8)
    )  # tiles have a size of their own: what is flat is flat at an eighth
    tiny = [write_model(work / f"t{n}", Size(2, 40, 64, 100), "fp32", n) for n in range(3)]
    base, model = (write_model(work / name, size, "fp32", seed) for seed, name in enumerate(("mb", "mm")))
    links = []
    for number in range(32):  # one file under many names: the merge does not know
        link = work / f"l{number}"
        link.symlink_to(model)
        links.append(link)
    rows = []
    for rule in arguments.rules:
        peaks = [
            peak_mib(rule, links[:count], base, tiny, work / "out", arguments.threads) for count in (2, 8, 32)
        ]
        rows.append(f"| {rule} | " + " | ".join(f"{peak:.0f}" for peak in peaks) + " |")
    return rows


def report(arguments: argparse.Namespace, work: Path) -> str:
    load_before, millions = os.getloadavg()[0], size_of(arguments.scale).millions
    checkpoints = [row for dtype in arguments.dtypes for row in checkpoint_rows(arguments, work, dtype)]
    threads = "".join(f" {n} |" for n in range(1, arguments.threads + 1))
    lines = [
        "# Offline merging",
        "",
        f"{setting(PACKAGES, load_before=load_before)} · {arguments.threads} processes",
        "",
        f"Checkpoints of {millions:.0f} million parameters, density 0.2. peft and mergekit beside the unhashed merge.",
        "",
        "| inputs | how | s | CPU s | × limit | × limit, CPU | peft | mergekit |",
        "|---|---|---|---|---|---|---|---|",
        *checkpoints,
        "",
        f"Seconds by processes ({min(arguments.inputs)} × fp32), and the whole command from its start:",
        "",
        f"| what |{threads}",
        "|---|" + "---|" * arguments.threads,
        *thread_rows(arguments, work),
        "",
        "Peak growth of anonymous memory, MiB (an eighth of the size at most; the same file under many names):",
        "",
        "| rule | 2 inputs | 8 inputs | 32 inputs |",
        "|---|---|---|---|",
        *memory_rows(arguments, work),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scale", type=int, default=8, help="1 is 134 million parameters, 8 an eighth of it")
    parser.add_argument("--inputs", type=int, nargs="+", default=[4])
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=merging.num_threads())
    parser.add_argument("--mergekit", type=Path, help="an interpreter that has mergekit")
    parser.add_argument(
        "--their-inputs", type=int, nargs="+", default=[4], help="where peft and mergekit run"
    )
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    parser.add_argument("--directory", type=Path, help="where to work; the best is a file system in memory")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/merge-SIZE.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        work = Path(directory)
        text = report(arguments, work)
    sys.stdout.write(text)
    if arguments.write:
        page = Path(__file__).parent / "results" / f"merge-{size_of(arguments.scale).millions:.0f}M.md"
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
