"""The merge process: ``python -m weft.server.engine_process``, JSON lines in, JSON lines out.

Jobs: ``prepare`` (schemas and version 0 of a run's modules), ``merge`` (a round's candidate), ``gate`` (held-out
losses before and after). It reads files that were screened and writes files that the coordinator takes over; it
decides nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from weft.common.codec import UpdateFile
from weft.common.composition import ResidentBase, describe
from weft.common.errors import EngineFailed, WeftError
from weft.common.evaluation import (
    Evaluation,
    evaluate,
    load_heldout,
    paired_difference,
    route_heldout,
    together,
)
from weft.common.export import create_base
from weft.common.ids import ModuleKey
from weft.common.ids import Path as ModulePath
from weft.common.initial import initial_module
from weft.common.modules import Schema, TensorSpec, Topology
from weft.common.recipe import Recipe
from weft.common.routing import check_router, read_router
from weft.common.sequences import Sequences
from weft.common.settings import from_table, to_table
from weft.common.tensors import Float32Array, open_module, write_module
from weft.server.flower.limits import FlowerSettings
from weft.server.merge.crew import Crew, Threads, can_fork, run_forked
from weft.server.merge.engine import MergeReport, OuterState, merge_module
from weft.server.merge.settings import MergeSettings
from weft.server.merge.tiles import Arrays, Indices
from weft.server.outer import OuterSettings, slots_schema

Job = Mapping[str, Any]
Result = dict[str, Any]
_FORKED_ELEMENTS: Final = 1 << 24
"""Elements of all updates from which on forking, some ten milliseconds, is worth it."""


@dataclass(frozen=True, slots=True)
class _FileUpdate:
    """A screened update file with what the ledger knows of it."""

    worker_id: str
    task_id: str
    weight: float
    rank: int | None
    norm: float
    file: UpdateFile

    @property
    def sparse(self) -> bool:
        return self.file.sparse

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        return self.file.tile(name, start, stop)

    def sparse_tile(self, name: str, start: int, stop: int) -> tuple[Indices, Float32Array] | None:
        return self.file.sparse_tile(name, start, stop) if self.file.sparse else None

    def fisher_tile(self, name: str, start: int, stop: int) -> Float32Array:
        return self.file.fisher_tile(name, start, stop)


class Jobs:
    """What the process can do; holds the base that gating needs."""

    def __init__(self) -> None:
        self._bases: dict[str, ResidentBase] = {}
        self._heldout: tuple[str, dict[ModulePath, Sequences]] = ("", {})
        """What was routed last, by what it was routed from."""

    def run(self, job: Job) -> Result:
        """Do one job; raises WeftError."""
        return self._JOBS[job["job"]](self, job)

    def prepare(self, job: Job) -> Result:
        """Schemas of a run's modules, and version 0 of each in a file, which the experts of a level share."""
        recipe = from_table(Recipe, job["recipe"])
        base, to = Path(job["base"]), Path(job["to"])
        if job["router"]:
            check_router(read_router(Path(job["router"])), recipe)
        if job["heldout"]:
            # Held-out data that cannot be read is refused now, not at the end of the first round.
            load_heldout(Path(job["heldout"]), self._base(base, recipe).tokenizer, recipe)
        schemas = describe(base, recipe)
        files: dict[int, Path] = {}
        for module, schema in schemas.items():
            if module.level not in files:
                files[module.level] = to / f"{recipe.run}-{module.level}-0.module"
                write_module(files[module.level], initial_module(base, recipe, schemas, module), schema)
        return {
            "schemas": {str(module): to_table(schema.tensors) for module, schema in schemas.items()},
            "files": {str(module): str(files[module.level]) for module in schemas},
        }

    def create_base(self, job: Job) -> Result:
        """A base with new weights from a configuration and a tokenizer."""
        create_base(Path(job["source"]), Path(job["to"]), seed=job["seed"])
        return {}

    def merge(self, job: Job) -> Result:
        """A round's candidate; see ``weft.server.merge.engine``."""
        schema = _schema(job["schema"])
        scaling = from_table(Topology, job["topology"]).lora.scaling
        outer = from_table(OuterSettings, job["outer"])
        result: Result = {"candidate": job["candidate"]}
        with ExitStack() as stack:
            start = stack.enter_context(open_module(Path(job["start"]), schema))
            updates = [
                _FileUpdate(
                    worker_id=item["worker_id"],
                    task_id=item["task_id"],
                    weight=item["weight"],
                    rank=item["rank"] or None,
                    norm=item["norm"],
                    file=stack.enter_context(
                        UpdateFile(
                            Path(item["path"]), schema.at_rank(item["rank"]) if item["rank"] else schema
                        )
                    ),
                )
                for item in job["updates"]
            ]
            candidate, state = Arrays.shared(schema), None
            flower = from_table(FlowerSettings, job["flower"]) if job["flower"] else None
            num_slots = outer.num_slots + (len(flower.row.slots) if flower else 0)
            if num_slots:
                state_schema, before = slots_schema(schema, num_slots), job["outer_state"]
                held = stack.enter_context(open_module(Path(before), state_schema)) if before else None
                following = Arrays.shared(state_schema)
                state = OuterState(before=held, after=following)
            shared: dict[str, Any] = {
                "settings": from_table(MergeSettings, job["merge"]),
                "outer": outer,
                "outer_state": state,
                "scaling": scaling,
            }
            if flower is None:

                def merge(crew: Crew) -> MergeReport:
                    return merge_module(
                        updates, start, schema, candidate, num_paths=job["num_paths"], crew=crew, **shared
                    )

                report = _by_all(merge, len(updates) * sum(spec.size for spec in schema.tensors))
            else:
                # Flower is an extra, and takes half a second to import.
                from weft.server.flower.rules import merge_with_flower

                crew = Threads(torch.get_num_threads())
                report = merge_with_flower(
                    updates, start, schema, candidate, flower=flower, crew=crew, **shared
                )
        write_module(Path(job["candidate"]), candidate.arrays, schema)
        if state is not None:
            write_module(Path(job["outer_state_to"]), following.arrays, state_schema)
            result["outer_state"] = job["outer_state_to"]
        return result | _summary(report)

    def gate(self, job: Job) -> Result:
        """Held-out losses before and after a module changes, on the paths that share it."""
        recipe, module = from_table(Recipe, job["recipe"]), ModuleKey.parse(job["module"])
        schemas = {ModuleKey.parse(key): _schema(value) for key, value in job["schemas"].items()}
        base = self._base(Path(job["base"]), recipe)
        routed = self._routed(job, base, recipe)
        paths = [path for path in map(ModulePath.parse, job["paths"]) if path in routed]
        if not paths:
            return {"losses": None}
        num_max = max(2, job["num_sequences_max"] // len(paths))
        results: tuple[list[Evaluation], list[Evaluation]] = ([], [])
        for path in paths:
            sequences = routed[path].spread(num_max)
            for evaluations, changed in zip(results, ({}, {str(module): job["candidate"]}), strict=True):
                files = {key: Path((job["files"] | changed)[str(key)]) for key in path.modules}
                tensors: dict[str, Float32Array] = {}
                for key, file in files.items():
                    tensors |= read_module(file, schemas[key])
                evaluations.append(evaluate(base.compose(recipe, tensors), sequences))
        before, after = map(together, results)
        difference, half_width = paired_difference(before, after)
        losses = {
            "before": before.loss,
            "after": after.loss,
            "difference": difference,
            "half_width": half_width,
            "num_sequences": len(before.losses),
        }
        return {"losses": losses}

    def _routed(self, job: Job, base: ResidentBase, recipe: Recipe) -> dict[ModulePath, Sequences]:
        """Held-out sequences of each path that has at least two."""
        heldout, router = Path(job["heldout"]), job["router"]
        source = f"{heldout}\n{router}\n{recipe.base.digest}"
        if self._heldout[0] != source:
            if router is None:
                sequences = {
                    path: load_heldout(heldout, base.tokenizer, recipe) for path in recipe.topology.paths
                }
            else:
                sequences = route_heldout(heldout, base, read_router(Path(router)), recipe)
            self._heldout = (source, sequences)
        return self._heldout[1]

    def _base(self, directory: Path, recipe: Recipe) -> ResidentBase:
        kind = recipe.topology.kind
        key = f"{recipe.base.digest}/{recipe.task}/{kind}"
        if key not in self._bases:
            on_gpu = torch.cuda.is_available()
            device = torch.device("cuda" if on_gpu else "cpu")
            dtype = torch.bfloat16 if on_gpu else torch.float32
            self._bases = {
                key: ResidentBase.load(directory, recipe.task, device=device, dtype=dtype, kind=kind)
            }
        return self._bases[key]

    _JOBS: Final[Mapping[str, Callable[[Jobs, Job], Result]]] = {
        "create_base": create_base,
        "prepare": prepare,
        "merge": merge,
        "gate": gate,
    }


def read_module(path: Path, schema: Schema) -> dict[str, Float32Array]:
    """All tensors of a module file, float32, in memory."""
    with open_module(path, schema) as file:
        return {spec.name: np.array(file.array(spec.name)) for spec in schema.tensors}


def _by_all(merge: Callable[[Crew], MergeReport], num_elements: int) -> MergeReport:
    """Merge with a process for each core where there is enough to do, else with threads; both come to the same."""
    num_cores = torch.get_num_threads()
    if num_cores > 1 and num_elements >= _FORKED_ELEMENTS and can_fork():
        return run_forked(num_cores, merge)
    return merge(Threads(num_cores))


def _schema(table: Any) -> Schema:
    return Schema(tuple(TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in table))


def _summary(report: MergeReport) -> Result:
    clipped = sorted({item.worker_id for item in report.contributions if item.clip_factor < 1})
    return {
        "truncation_error": report.truncation_error,
        "clipped": clipped,
        "contributions": to_table(report.contributions),
        "seconds": dict(report.seconds),
    }


@contextlib.contextmanager
def _own_stdout() -> Iterator[int]:
    """Keep standard output for replies: whatever a library prints goes to standard error."""
    replies = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        yield replies
    finally:
        os.close(replies)


def main() -> None:
    """Serve jobs from standard input until it ends."""
    jobs = Jobs()
    with _own_stdout() as replies, os.fdopen(os.dup(replies), "wb", buffering=0) as out:
        for line in sys.stdin.buffer:
            out.write(json.dumps(_reply(jobs, json.loads(line))).encode() + b"\n")


def _reply(jobs: Jobs, job: Job) -> Result:
    try:
        return jobs.run(job)
    except WeftError as error:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    except (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        # One bad job must not cost the resident base; the coordinator decides what the failure means.
        return {"error": EngineFailed.__name__, "message": f"{type(error).__name__}: {error}", "hint": ""}


if __name__ == "__main__":
    main()
