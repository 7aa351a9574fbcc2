"""A run in memory, and what is derived from it: views for the pure functions, tasks, manifests.

Owned by the coordinator, which replaces the frozen values in it after the ledger took them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from typing import Any, Final

from weft.common.codec import update_bytes_max
from weft.common.errors import CorruptState, NotFound
from weft.common.ids import Digest, ModuleKey, ModuleRef
from weft.common.manifest import (
    Contributor,
    Gate,
    GateOutcome,
    Measurement,
    MergeStep,
    OuterStep,
    Parent,
    Signed,
    VersionManifest,
    schema_digest,
)
from weft.common.modules import Schema
from weft.common.protocol import ModuleStart, Task
from weft.common.recipe import Recipe
from weft.common.settings import to_table
from weft.server.assignment import Lease, RunView
from weft.server.records import RunRecord, Traffic, VersionRecord
from weft.server.rounds import ENDED, GateResult, Round
from weft.server.runfile import RunFile

CODE_VERSION: Final = package_version("weft")


@dataclass(slots=True, kw_only=True)
class Run:
    """One run."""

    record: RunRecord
    run_file: RunFile
    recipe: Recipe
    recipe_signed: Signed
    rounds: dict[ModuleKey, list[Round]]
    """By module, in order; the last one is current."""
    versions: dict[ModuleKey, list[VersionRecord]]
    """By module; the index is the version."""
    traffic: Traffic

    def current(self, module: ModuleKey) -> Round:
        """The round that is, or the one after the last when the module has had all."""
        return self.rounds[module][-1]

    def newest(self, module: ModuleKey) -> VersionRecord:
        """The newest published version."""
        return self.versions[module][-1]

    def at(self, module: ModuleKey, version: int) -> VersionRecord:
        """A published version; raises NotFound."""
        versions = self.versions.get(module, [])
        if not 0 <= version < len(versions):
            newest = len(versions) - 1
            raise NotFound(
                f"{self.record.run}/{module} has no version {version}",
                hint=f"the newest is @{newest}" if versions else "",
            )
        return versions[version]

    @property
    def view(self) -> RunView:
        """What assignment needs."""
        current = {module: rounds[-1] for module, rounds in self.rounds.items()}
        return RunView(
            run=self.record.run, topology=self.recipe.topology, policy=self.run_file.rounds, rounds=current
        )

    def schema(self, module: ModuleKey) -> Schema:
        """The tensors of a module."""
        return self.record.schema(module)

    def update_bytes_max(self, module: ModuleKey) -> int:
        """Quota of one update of a module."""
        return update_bytes_max(
            self.schema(module), self.recipe.codec, fisher=self.recipe.fisher.num_examples > 0
        )

    def task(self, lease: Lease, *, lease_s: float) -> Task:
        """The task that goes with a lease."""
        trained = dict(lease.rounds)
        starts = []
        for module, version in lease.starts:
            start = self.at(module, version)
            starts.append(
                ModuleStart(
                    module=str(module),
                    version=version,
                    blake3=start.digest,
                    size_bytes=start.size_bytes,
                    train=module in trained,
                    round_number=trained.get(module, 0),
                    steps_before=start.num_steps,
                )
            )
        return Task(
            task_id=lease.task_id,
            run_id=lease.run,
            lease_token=lease.token,
            lease_epoch=lease.epoch,
            lease_s=lease_s,
            path=str(lease.path),
            modules=tuple(starts),
            recipe_blake3=self.record.recipe_digest,
            num_steps=lease.num_steps,
            update_bytes_max=max(self.update_bytes_max(module) for module in trained),
        )

    def resolve(self, ref: ModuleRef) -> list[VersionRecord]:
        """The versions that a reference names, by level; raises NotFound."""
        if ref.path is not None:
            if ref.path not in set(self.recipe.topology.paths):
                raise NotFound(
                    f"{self.record.run} has no path {ref.path}",
                    hint=f"weft modules list --run {self.record.run}",
                )
            modules = ref.path.modules
        elif ref.module is not None:
            if ref.module not in self.versions:
                raise NotFound(
                    f"{self.record.run} has no module {ref.module}",
                    hint=f"weft modules list --run {self.record.run}",
                )
            modules = (ref.module,)
        else:
            modules = next(self.recipe.topology.paths).modules
        return [
            self.newest(module) if ref.version is None else self.at(module, ref.version) for module in modules
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentOf:
    """The file of a version."""

    digest: Digest
    size_bytes: int
    sha256: str


def first_manifest(
    run: RunRecord, recipe: Recipe, module: ModuleKey, content: ContentOf, *, now: float
) -> VersionManifest:
    """The manifest of version 0."""
    return VersionManifest(
        run=run.run,
        module=module,
        version=0,
        parents=(),
        contributors=(),
        merge=None,
        outer=None,
        gate=Gate(outcome=GateOutcome.SKIPPED, reason="the start is not judged"),
        round_number=0,
        **_common(run, recipe, module, content, now=now),
    )


def next_manifest(
    run: Run, round_: Round, result: GateResult, content: ContentOf, *, now: float
) -> VersionManifest:
    """The manifest of the version that a round made."""
    parent = run.at(round_.module, round_.base_version)
    settings = to_table(run.run_file.merge)
    parameters = {
        key: value for key, value in settings.items() if key != "rule" and not isinstance(value, dict)
    }
    parameters |= to_table(run.run_file.merge.parameters)
    return VersionManifest(
        run=run.record.run,
        module=round_.module,
        version=round_.base_version + 1,
        parents=(Parent(version=parent.version, manifest_digest=parent.manifest_digest),),
        contributors=tuple(
            Contributor(
                worker_id=update.worker_id,
                task_id=update.task_id,
                update_digest=update.update_digest,
                weight=update.weight,
                steps=update.num_steps,
                tokens=int(update.weight),
                norm=update.norm,
            )
            for update in round_.updates
        ),
        merge=MergeStep(rule=run.run_file.merge.rule.value, parameters=parameters),
        outer=OuterStep(
            name=run.run_file.outer.name.value,
            parameters={"learning_rate": run.run_file.outer.rate, "momentum": run.run_file.outer.decay},
        ),
        gate=_gate(result, run.run_file.gate.tolerance),
        round_number=round_.number,
        **_common(run.record, run.recipe, round_.module, content, now=now),
    )


def _common(
    run: RunRecord, recipe: Recipe, module: ModuleKey, content: ContentOf, *, now: float
) -> dict[str, Any]:
    return {
        "base_digest": recipe.base.digest,
        "schema_digest": schema_digest(run.schema(module)),
        "content_digest": content.digest,
        "content_bytes": content.size_bytes,
        "content_sha256": content.sha256,
        "kind": recipe.topology.kind,
        "settings": to_table(recipe.topology.lora),
        "code_version": CODE_VERSION,
        "created": datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _gate(result: GateResult, tolerance: float) -> Gate:
    outcome = GateOutcome.PASSED if result.num_sequences else GateOutcome.SKIPPED
    if not result.passed:
        outcome = GateOutcome.FAILED
    if result.loss_before is None or result.loss_after is None or result.half_width is None:
        return Gate(outcome=outcome, reason=result.reason)
    difference = result.difference
    measurement = Measurement(
        metric="loss",
        baseline=result.loss_before,
        candidate=result.loss_after,
        difference=difference,
        interval=(difference - result.half_width, difference + result.half_width),
        tolerance=tolerance,
        num_examples=result.num_sequences,
    )
    return Gate(outcome=outcome, reason=result.reason, measurement=measurement)


def steps_after(run: Run, round_: Round) -> int:
    """Optimiser steps in the history of the version that a round makes: its parent's, plus the updates' mean."""
    before = run.at(round_.module, round_.base_version).num_steps
    return before + round(statistics.mean(update.num_steps for update in round_.updates))


def check_complete(run: Run) -> None:
    """Every module must have its versions 0 to n and a current round; raises CorruptState naming what is missing."""
    for module in run.recipe.topology.modules:
        numbers = [version.version for version in run.versions.get(module, [])]
        if not numbers or numbers != list(range(len(numbers))):
            raise CorruptState(f"the ledger lacks versions of {run.record.run}/{module}: it has {numbers}")
        rounds = run.rounds.get(module, [])
        if not rounds or any(round_.state not in ENDED for round_ in rounds[:-1]):
            raise CorruptState(f"the ledger's rounds of {run.record.run}/{module} do not fit together")
