"""``weft merge``: a recipe becomes a plan, the plan a directory."""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from weft.common.errors import UsageError
from weft.common.ids import digest
from weft.server.merge.crew import ALONE, Crew, Threads, can_fork, one_thread_each, run_forked
from weft.server.merge.rule import Scope
from weft.server.merge.rules import RULES
from weft.server.merge.selection import BLOCK_ELEMENTS
from weft.server.merge.tiles import Float32
from weft.server.offline.adapters import plan_adapters
from weft.server.offline.checkpoints import plan_checkpoints
from weft.server.offline.inputs import BASE_FOLDER, Adapter, Checkpoint, open_checkpoint, open_input
from weft.server.offline.output import Done, Output, Shard, plan_shards
from weft.server.offline.plan import Plan
from weft.server.offline.recipe import Recipe
from weft.server.offline.units import Loss, Unit

MANIFEST: Final = "merge.json"
_SAMPLE_ELEMENTS: Final = 1 << 21
_SCRATCH_ARRAYS: Final = 24
"""Arrays of a tile's length that a thread holds, generously."""
_WHOLE_ARRAYS: Final = 8
"""Float64 arrays of a tensor's length that a rule of a wider scope holds beside one for each input, at most."""
_SPLIT_ELEMENTS: Final = 1 << 22
"""Units from this size on are shared by a crew."""
_GROUP_ELEMENTS: Final = 1 << 24
"""Smaller ones are handed out until they come to this many,"""
_GROUP_TURNS: Final = 4
"""and at least so many for each."""
_CANDIDATES: Final = 0.06
"""Share of a tensor that selecting a threshold gathers, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What does not change the result."""

    threads: int
    """How many work at once."""
    digests: bool
    """Hash every input tensor for the manifest."""
    device: str = "cpu"
    """cpu, or cuda for adapters."""
    durable: bool = True
    """Wait until the result is on the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a merge would take."""

    num_tensors: int
    """Of the result."""
    num_parameters: int
    """Of the result."""
    read_bytes: int
    """Of inputs, once."""
    write_bytes: int
    """Of the result."""
    memory_bytes: int
    """At its peak, beside the program itself and mapped files."""
    seconds: float
    """By measuring a part, files in memory."""
    notes: tuple[str, ...]
    """What a person should know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """How a merge went."""

    to: str
    """Where the result is."""
    num_tensors: int
    """Of the result."""
    num_parameters: int
    """Of the result."""
    num_resumed: int
    """Units that an earlier, broken off run had done."""
    truncation_error: float | None
    """‖ΔW − what the result computes‖ / ‖ΔW‖ over all layers of a merged adapter; None where nothing can be lost."""
    seconds: float
    """Wall time."""
    notes: tuple[str, ...]
    """What a person should know."""


def make_plan(recipe: Recipe, *, device: str) -> Plan:
    """Open everything and refuse what cannot be merged.

    Raises:
        InputError: An input is damaged, of no known kind, or does not fit the others.
        UsageError: Options do not go with the inputs.
    """
    inputs = [open_input(each.path, each.label) for each in recipe.inputs]
    base = None if recipe.base is None else open_checkpoint(recipe.base, "the base")
    adapters = [each for each in inputs if isinstance(each, Adapter)]
    models = [each for each in inputs if isinstance(each, Checkpoint)]
    if adapters and models:
        raise UsageError(
            f"{adapters[0].label} is an adapter and {models[0].label} a whole model",
            hint="merge adapters with adapters: peft's merge_and_unload makes a model of one",
        )
    if adapters:
        return plan_adapters(adapters, base, recipe, device=device)
    onto = None if recipe.onto is None else open_checkpoint(recipe.onto, "the new base")
    return plan_checkpoints(models, base, onto, recipe, device=device)


def merge(
    recipe: Recipe,
    plan: Plan,
    to: Path,
    options: Options,
    *,
    advance: Callable[[int], None],
    clock: Callable[[], float] = time.perf_counter,
) -> Result:
    """Write the result of a plan to a directory that does not exist yet.

    Args:
        recipe: What was asked for.
        plan: Of the recipe.
        to: Where the result appears, complete or not at all.
        options: Speed and digests.
        advance: Told how many bytes of the result were written or found written.
        clock: Seconds.

    Raises:
        InputError: A tensor holds NaN or infinity.
        StorageError: It cannot be written; what is done is kept for the next try.
        UsageError: ``to`` exists.
    """
    began = clock()
    written = _Written(options.threads, advance)
    with Output(
        to, _shards(recipe, plan), _identity(recipe, plan), advance=written.add, durable=options.durable
    ) as output:
        resumed = set(output.done)
        if resumed:
            names = (name for unit in plan.units if unit.name in resumed for name in unit.outputs)
            advance(sum(output.size_of(name) for name in names))
        remaining = [unit for unit in plan.units if unit.name not in resumed]
        _run(options, lambda crew: _merge_units(remaining, output, crew, written, digests=options.digests))
        error = _truncation_error(output.done.values())
        manifest = _manifest(recipe, plan, output.done, truncation_error=error)
        output.publish(
            {
                **plan.files,
                MANIFEST: json.dumps(manifest, indent=2).encode() + b"\n",
                "README.md": _card(recipe, plan).encode(),
            }
        )
    return Result(
        to=str(to),
        num_tensors=len(plan.all_specs),
        num_parameters=plan.num_parameters,
        num_resumed=len(resumed),
        truncation_error=error,
        seconds=clock() - began,
        notes=(*recipe.notes, *plan.notes),
    )


def estimate(
    recipe: Recipe, plan: Plan, options: Options, *, clock: Callable[[], float] = time.perf_counter
) -> Estimate:
    """What a merge would take, by merging a part of its largest unit of each kind into nothing."""
    kinds = {type(unit): [each for each in plan.units if type(each) is type(unit)] for unit in plan.units}
    merging = sum(_seconds(units, clock) for units in kinds.values())
    largest = max(plan.units, key=lambda unit: unit.num_elements)
    reads = {(label, name): weights for unit in plan.units for label, weights, name in unit.reads}
    read_bytes = sum(weights.raw(name).nbytes for (_, name), weights in reads.items())
    hashing = 0.0
    if options.digests:
        _, weights, name = largest.reads[0]
        began = clock()
        weights.digest(name)
        hashing = (clock() - began) * read_bytes / max(1, weights.raw(name).nbytes)
    return Estimate(
        num_tensors=len(plan.all_specs),
        num_parameters=plan.num_parameters,
        read_bytes=read_bytes,
        write_bytes=sum(shard.size_bytes for shard in _shards(recipe, plan)),
        memory_bytes=_memory(recipe, largest, options),
        seconds=(merging + hashing) / options.threads,
        notes=(*recipe.notes, *plan.notes),
    )


def _seconds(units: Sequence[Unit], clock: Callable[[], float]) -> float:
    """What units of one kind would take one after the other."""
    part = max(units, key=lambda unit: unit.num_elements).sample(_SAMPLE_ELEMENTS)
    with one_thread_each():
        part.merge(_Nowhere(), ALONE)  # warm: libraries start, pages come in
        began = clock()
        part.merge(_Nowhere(), ALONE)
        merged = clock()
    return (merged - began) * sum(unit.num_elements for unit in units) / max(1, part.num_elements)


def _shards(recipe: Recipe, plan: Plan) -> tuple[Shard, ...]:
    longest = recipe.shard_bytes_max
    if plan.library == "transformers":
        return plan_shards(plan.specs, stem=plan.stem, shard_bytes_max=longest)
    shards = plan_shards(plan.specs, stem=plan.stem, shard_bytes_max=sys.maxsize)  # PEFT reads one file
    if plan.base_specs:
        shards += plan_shards(plan.base_specs, stem=f"{BASE_FOLDER}/model", shard_bytes_max=longest)
    return shards


def _memory(recipe: Recipe, largest: Unit, options: Options) -> int:
    rows = 0 if recipe.uniform and RULES[recipe.uniform.settings.rule].row_by_row else 2 * len(recipe.inputs)
    tiles = options.threads * (_SCRATCH_ARRAYS + rows) * BLOCK_ELEMENTS * 4
    whole = 0
    if recipe.uniform and RULES[recipe.uniform.settings.rule].scope is not Scope.TILE:
        whole = (_WHOLE_ARRAYS + len(recipe.inputs)) * largest.num_elements * 8
    return tiles + int(options.threads * _CANDIDATES * largest.num_elements * 4) + whole


class _Nowhere:
    """Where the result of a sample goes."""

    def write(self, name: str, start: int, values: Float32) -> None:
        """Forget it."""

    def store(self, name: str, start: int, stored: npt.NDArray[Any]) -> None:
        """Forget it."""


class _Written:
    """Bytes written by all members of a crew, told to the one who asked by the first; some are written twice."""

    def __init__(self, size: int, advance: Callable[[int], None]) -> None:
        self._by_rank = multiprocessing.RawArray("q", size)
        self._advance, self._told = advance, 0
        self._lock = threading.Lock()
        self._begin, self._size = 0, 0
        self.rank = 0

    def begin(self, size: int) -> None:
        """Begin with something of ``size`` bytes."""
        self._begin, self._size, self._told = sum(self._by_rank), size, 0

    def finish(self) -> None:
        """It is written."""
        if self._told < self._size:
            self._advance(self._size - self._told)
            self._told = self._size

    def add(self, count: int) -> None:
        """Count some more."""
        with self._lock:
            self._by_rank[self.rank] += count
            now = min(sum(self._by_rank) - self._begin, self._size)
            if self.rank == 0 and now > self._told:
                self._advance(now - self._told)
                self._told = now


def _run(options: Options, program: Callable[[Crew], None]) -> None:
    """Run a program with as many as the options say: processes where they can be forked, else threads."""
    if options.threads > 1 and options.device == "cpu" and can_fork():
        run_forked(options.threads, program)
    else:
        program(Threads(options.threads))


def _merge_units(
    units: Sequence[Unit], output: Output, crew: Crew, written: _Written, *, digests: bool
) -> None:
    """Merge units and enter them into the journal. All members of a crew run this."""
    written.rank = crew.rank
    for group in _groups(units, crew.size):
        written.begin(sum(output.size_of(name) for unit in group for name in unit.outputs))
        if len(group) == 1 and group[0].splits:
            losses = [group[0].merge(output, crew)]
        else:
            losses = crew.map(lambda unit: unit.merge(output, ALONE), group)
        dones = _dones(group, losses, output, crew, digests=digests)
        if crew.rank == 0:
            written.finish()
            for unit, done in zip(group, dones, strict=True):
                output.finish_unit(unit.name, done)


def _groups(units: Sequence[Unit], size: int) -> Iterator[list[Unit]]:
    """Large units that a crew shares, and several others at a time, of which each takes its own."""
    group: list[Unit] = []
    for unit in units:
        if unit.splits and unit.num_elements >= _SPLIT_ELEMENTS:
            yield [unit]
            continue
        group.append(unit)
        if len(group) >= _GROUP_TURNS * size and sum(each.num_elements for each in group) >= _GROUP_ELEMENTS:
            yield group
            group = []
    if group:
        yield group


def _dones(
    units: Sequence[Unit], losses: Sequence[Loss], output: Output, crew: Crew, *, digests: bool
) -> list[Done]:
    """What the journal is to say of units, with BLAKE3 of what they have read and written, still in memory."""
    reads = [read for unit in units for read in unit.reads] if digests else []
    outputs = [name for unit in units for name in unit.outputs]
    # The largest first: nobody is to begin with it when all others are done.
    reads.sort(key=lambda read: -read[1].raw(read[2]).nbytes)
    read = dict(
        zip(
            ((label, name) for label, _, name in reads),
            crew.map(lambda read: read[1].digest(read[2]), reads),
            strict=True,
        )
    )
    stored = dict(zip(outputs, crew.map(output.digest, outputs), strict=True))
    dones = []
    for unit, loss in zip(units, losses, strict=True):
        inputs: dict[str, dict[str, str]] = {}
        for label, _, name in unit.reads if digests else ():
            inputs.setdefault(label, {})[name] = read[label, name]
        dones.append(
            Done(
                outputs={name: stored[name] for name in unit.outputs},
                inputs=inputs,
                lost_square_sum=loss.lost_square_sum,
                total_square_sum=loss.total_square_sum,
            )
        )
    return dones


def _truncation_error(units: Iterable[Done]) -> float | None:
    losses = [(done.lost_square_sum, done.total_square_sum) for done in units]
    total = sum(each for _, each in losses)
    return float(np.sqrt(sum(lost for lost, _ in losses) / total)) if total else None


def files_of(recipe: Recipe) -> list[tuple[str, int, int]]:
    """(path, bytes, time of change in ns) of all files that decide what a merge makes of the inputs."""
    directories = [each.path for each in recipe.inputs]
    directories += [each for each in (recipe.base, recipe.onto) if each is not None]
    return [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for directory in directories
        for pattern in ("*.safetensors", "*config.json")
        for path in sorted(directory.glob(pattern))
    ]


def _identity(recipe: Recipe, plan: Plan) -> str:
    """Digest of all that decides the result: the recipe, the program, and the inputs' files as they are now."""
    specs = [(spec.name, spec.dtype, spec.shape) for spec in plan.all_specs]
    units = [unit.name for unit in plan.units]
    said = [recipe.table, files_of(recipe), specs, units, importlib.metadata.version("weft")]
    return blake3(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _manifest(
    recipe: Recipe, plan: Plan, done: Mapping[str, Done], *, truncation_error: float | None
) -> dict[str, Any]:
    outputs = {name: value for unit in done.values() for name, value in unit.outputs.items()}
    inputs: dict[str, dict[str, str]] = {}
    for unit in done.values():
        for label, tensors in unit.inputs.items():
            inputs.setdefault(label, {}).update(tensors)
    return {
        "recipe": recipe.table,
        "notes": [*recipe.notes, *plan.notes],
        "truncation_error": truncation_error,
        "versions": {name: importlib.metadata.version(name) for name in ("weft", "torch", "numpy")},
        "inputs": {label: _content(tensors) for label, tensors in sorted(inputs.items())},
        "output": _content(outputs),
        "tensors": dict(sorted(outputs.items())),
    }


def _content(tensors: Mapping[str, str]) -> str:
    """One digest of a set of tensors, however files cut it: BLAKE3 of its sorted [name, digest] pairs as JSON."""
    listed = json.dumps(sorted(tensors.items()), separators=(",", ":"))
    return str(digest(blake3(listed.encode()).hexdigest()))


def _card(recipe: Recipe, plan: Plan) -> str:
    head = ["---", f"library_name: {plan.library}"]
    if "/" in plan.base_name and not plan.base_name.startswith((".", "/")):
        head.append(f"base_model: {plan.base_name}")
    inputs = [f"- `{each.label}`" for each in recipe.inputs]
    parts = [
        "\n".join([*head, "tags: [weft, merge]", "---"]),
        "# A merge",
        f"Merged with Weft. [{MANIFEST}]({MANIFEST}) has the recipe, and the digests of what went in and came out.",
        "## Inputs",
        "\n".join(inputs),
        "## Recipe",
        f"```json\n{json.dumps(_short(recipe.table), indent=2)}\n```",
    ]
    if notes := [f"- {note}" for note in (*recipe.notes, *plan.notes)]:
        parts += ["## Notes", "\n".join(notes)]
    return "\n\n".join(parts) + "\n"


def _short(table: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe without the trials of its search."""
    short = dict(table)
    if "search" in short:
        short["search"] = {key: value for key, value in short["search"].items() if key != "trials"}
    return short


def num_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
