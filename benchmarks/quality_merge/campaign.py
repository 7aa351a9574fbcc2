"""Experts, merges of them, and what both are worth; all kept as files, so that a run goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from benchmarks.quality_merge.arms import Arm
from benchmarks.quality_merge.encoder import (
    Head,
    Split,
    State,
    accuracy,
    fetch_base,
    fit_head,
    load_encoder,
    moved,
    movement,
    tokenise,
    train,
    write_grams,
)
from benchmarks.quality_merge.tasks import TASKS, Example, Sizes, fetch, make_task, package_names

from weft.server.offline.merging import Options, make_plan, merge
from weft.server.offline.recipe import InputSpec, LoraMode, RecipeFile, merge_settings, understand

SCALES: Final = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Multiples of a merged movement that validation chooses from."""
EXPERT, MULTITASK, FLOOR = "expert", "multitask", "floor"

Accuracies = dict[str, float]
"""By task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an arm came to on one seed."""

    arm: str
    kind: str
    seed: int
    default: Accuracies
    """On the test split, as merged."""
    tuned: Accuracies
    """The same with the scale that validation chose."""
    scale: float
    """That scale."""


class Seed:
    """Everything of one seed: splits, heads, experts."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.base = fetch_base(folder / "models")
        self.encoder = load_encoder(self.base)
        self._state: State = {name: value.clone() for name, value in self.encoder.state_dict().items()}

    @cached_property
    def splits(self) -> dict[str, dict[str, Split]]:
        """By task and split."""
        drawn = {
            name: make_task(name, examples_of(name, self.folder), Sizes(), seed=self.seed) for name in TASKS
        }
        return {
            name: {split: tokenise(examples, self.base) for split, examples in task.splits.items()}
            for name, task in drawn.items()
        }

    @cached_property
    def heads(self) -> dict[str, Head]:
        """By task, of the untouched encoder."""
        self.encoder.load_state_dict(self._state)
        return {name: fit_head(self.encoder, splits["train"]) for name, splits in self.splits.items()}

    def expert(self, kind: str, names: Sequence[str]) -> Path:
        """The directory of an expert in these tasks; trains it the first time."""
        label = names[0] if len(names) == 1 else MULTITASK
        directory = self.folder / "experts" / f"seed{self.seed}-{kind}-{label}"
        if not directory.exists():
            partial = directory.with_suffix(".partial")
            parts = [(self.heads[name], self.splits[name]["train"]) for name in names]
            # Each expert's LoRA starts from an A of its own.
            train(self.base, kind, parts, partial, seed=self.seed * 100 + list(TASKS).index(names[0]))
            partial.rename(directory)
            print(f"trained {directory.name}", flush=True)
        return directory

    def grams(self, kind: str, name: str) -> None:
        """Have the Grams of an expert's inputs beside its weights, of every third of its training texts."""
        directory = self.expert(kind, [name])
        if not (directory / "grams.safetensors").exists():
            split = self.splits[name]["train"]
            write_grams(directory, self.base, split.rows(slice(0, len(split), 3)))

    def accuracies(self, movement_: State, scale: float, *, split: str, names: Iterable[str]) -> Accuracies:
        """Accuracy in each task of base + scale · movement."""
        self.encoder.load_state_dict(moved(self._state, movement_, scale))
        return {name: accuracy(self.encoder, self.heads[name], self.splits[name][split]) for name in names}

    def judge(self, arm: str, kind: str, movement_: State, names: Sequence[str]) -> Result:
        """Test accuracies as merged, and with the scale that is best on average over the validation splits."""
        validated = {
            scale: sum(self.accuracies(movement_, scale, split="validation", names=names).values())
            for scale in SCALES
        }
        # Of equal ones the nearest to what the rule says by default.
        scale = max(validated, key=lambda each: (validated[each], -abs(each - 1)))
        default = self.accuracies(movement_, 1.0, split="test", names=names)
        tuned = default if scale == 1 else self.accuracies(movement_, scale, split="test", names=names)
        return Result(arm=arm, kind=kind, seed=self.seed, default=default, tuned=tuned, scale=scale)


def examples_of(name: str, folder: Path) -> list[Example]:
    """A task's examples, read from the packages the first time."""
    file = folder / "examples" / f"{name}.json"
    if not file.exists():
        packages = fetch(package_names(), folder / "packages")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([asdict(each) for each in TASKS[name](packages)]))
    return [Example(**each) for each in json.loads(file.read_text())]


def run_merge(arm: Arm, inputs: Sequence[Path], base: Path, to: Path) -> None:
    """What ``weft merge`` does with the arm's options."""
    file = RecipeFile(
        inputs=tuple(InputSpec(path=str(each)) for each in inputs),
        base=str(base) if arm.kind == "full" else "",
        lora=LoraMode(arm.lora) if arm.lora else None,
        rank=arm.rank,
        merge=merge_settings(arm.rule, arm.parameters),
    )
    recipe = understand(file, resolve=Path)
    plan = make_plan(recipe, device="cpu")
    merge(recipe, plan, to, Options(threads=1, digests=False), advance=lambda _: None)


def run_arm(arm: Arm, seed: Seed) -> None:
    """Merge the arm's experts and judge the result; kept as a file."""
    file = _file(seed, arm.kind, arm.name)
    if file.exists():
        return
    names = list(arm.tasks or TASKS)
    to = seed.folder / f"merged-{seed.seed}-{arm.kind}"
    for left in (to, to.with_name(f"{to.name}.partial")):
        shutil.rmtree(left, ignore_errors=True)
    if arm.needs_grams:
        for name in names:
            seed.grams(arm.kind, name)
    run_merge(arm, [seed.expert(arm.kind, [name]) for name in names], seed.base, to)
    _keep(seed.judge(arm.name, arm.kind, movement(to, seed.base), names), file)
    shutil.rmtree(to)


def run_references(kind: str, seed: Seed, *, multitask: bool) -> None:
    """The untouched encoder, the experts each in its own task, and one model trained on all tasks."""
    names = list(TASKS)
    wanted = {FLOOR: [names], EXPERT: [[name] for name in names]} | (
        {MULTITASK: [names]} if multitask else {}
    )
    for arm, groups in wanted.items():
        file = _file(seed, kind, arm)
        if not file.exists():
            reached: Accuracies = {}
            for group in groups:
                moved_by = {} if arm == FLOOR else movement(seed.expert(kind, group), seed.base)
                reached |= seed.accuracies(moved_by, 1.0, split="test", names=group)
            _keep(Result(arm=arm, kind=kind, seed=seed.seed, default=reached, tuned=reached, scale=1.0), file)


def _file(seed: Seed, kind: str, arm: str) -> Path:
    return seed.folder / "results" / f"seed{seed.seed}-{kind}-{arm.replace(' ', '_')}.json"


def _keep(result: Result, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(result)))
    partial.rename(file)
    mean = sum(result.default.values()) / len(result.default)
    print(f"seed {result.seed} {result.kind} {result.arm}: {mean:.3f}, scale {result.scale:g}", flush=True)


def kept(folder: Path) -> list[Result]:
    """All results in the cache."""
    return [Result(**json.loads(file.read_text())) for file in sorted((folder / "results").glob("*.json"))]
