"""A run in memory, and what is derived from it: views for the pure functions, tasks, manifests.

Owned by the coordinator, which replaces the frozen values in it after the ledger took them.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version as package_version
from typing import Any, Final

from weft.common.codec import CodecSettings, update_bytes_max
from weft.common.errors import CorruptState, NotFound
from weft.common.ids import Digest, ModuleKey, ModuleRef, Path, WorkerId
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
from weft.common.protocol import BlobRef, ModuleStart, Task
from weft.common.recipe import Recipe, RoutingMode
from weft.common.settings import to_table
from weft.server.assignment import Lease
from weft.server.paths import PathRecord
from weft.server.records import HoldingRecord, RoutingRecord, RunRecord, Traffic, VersionRecord
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
    paths: dict[Path, PathRecord] = field(default_factory=dict)
    """Those that were evaluated."""
    routing: RoutingRecord | None = None
    holdings: dict[WorkerId, HoldingRecord] = field(default_factory=dict)
    """Of the router in use; ``take_holding`` adds to it."""
    holds: dict[WorkerId, frozenset[Path]] = field(default_factory=dict)
    """Paths that a worker has at least a batch of sequences for."""
    lost_shards: set[Path] = field(default_factory=set)
    """Paths whose shard was found missing since the start."""

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

    def take_holding(self, holding: HoldingRecord) -> None:
        """Take up what a worker said that it holds."""
        enough = self.recipe.inner.batch_size
        self.holdings[holding.worker_id] = holding
        self.holds[holding.worker_id] = frozenset(
            Path.parse(path) for path, count in holding.sequences.items() if count >= enough
        )

    def shard_missing(self, path: Path) -> str:
        """Why a path has no shard; empty when it has one."""
        shard = self.routing.shards.get(str(path)) if self.routing else None
        if path in self.lost_shards:
            return "its shard vanished from the coordinator's state: serve again with routing.shards in place"
        if shard is None:
            return "its shard is empty: fit the router again, or weft route reseed"
        return ""

    def path_size(self, path: Path, worker_id: WorkerId) -> float:
        """What an update of a path counts by the data behind it: |D_i|, in documents or in the worker's sequences."""
        if self.recipe.routing.mode is RoutingMode.GIVEN and self.routing is not None:
            shard = self.routing.shards.get(str(path))
            return float(shard.num_documents) if shard else 0.0
        holding = self.holdings.get(worker_id)
        return float(holding.sequences.get(str(path), 0)) if holding else 0.0

    def schema(self, module: ModuleKey) -> Schema:
        """The tensors of a module."""
        return self.record.schema(module)

    def update_bytes_max(self, module: ModuleKey) -> int:
        """Quota of one update of a module."""
        return update_bytes_max(self.schema(module), self.codecs, fisher=self.recipe.fisher.num_examples > 0)

    @property
    def codecs(self) -> tuple[CodecSettings, ...]:
        """What an update may be written with."""
        return self.recipe.codecs

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
            update_bytes_max=max((self.update_bytes_max(module) for module in trained), default=0),
            purpose=lease.purpose,
            router=self._router(),
            shard=self.shard(lease.path),
            rank=lease.rank,
        )

    def _router(self) -> BlobRef | None:
        """What workers route their own documents with."""
        if self.recipe.routing.mode is not RoutingMode.LOCAL:
            return None
        return self.router

    @property
    def router(self) -> BlobRef | None:
        """The router in use."""
        if self.routing is None or self.routing.router is None:
            return None
        return BlobRef(blake3=self.routing.router, size_bytes=self.routing.router_bytes)

    def num_documents(self, path: Path) -> int:
        """Documents of a path's shard; 0 where the workers have them."""
        shard = self.routing.shards.get(str(path)) if self.routing else None
        return shard.num_documents if shard else 0

    def source_of(self, path: Path, worker_id: WorkerId) -> str:
        """Whose held-out data an evaluation of a path by a worker is on."""
        shard = self.shard(path)
        return shard.blake3 if shard else worker_id

    def shard(self, path: Path) -> BlobRef | None:
        """A path's documents, where the coordinator gives the data."""
        shard = self.routing.shards.get(str(path)) if self.routing else None
        return BlobRef(blake3=shard.digest, size_bytes=shard.size_bytes) if shard else None

    def resolve(self, ref: ModuleRef) -> list[VersionRecord]:
        """The versions that a reference names, by level; raises NotFound."""
        modules: tuple[ModuleKey, ...]
        if ref.path is not None:
            path = self.recipe.topology.find_path(ref.path)
            if ref.best:
                return self._best(path)
            modules = path.modules
        elif ref.module is not None:
            if ref.module not in self.versions:
                raise NotFound(
                    f"{self.record.run} has no module {ref.module}",
                    hint=f"weft modules list --run {self.record.run}",
                )
            modules = (ref.module,)
        else:
            modules = self.recipe.topology.modules
        return [
            self.newest(module) if ref.version is None else self.at(module, ref.version) for module in modules
        ]

    def _best(self, path: Path) -> list[VersionRecord]:
        record = self.paths.get(path)
        if record is None or record.best is None:
            raise NotFound(
                f"path {path} of {self.record.run} was not evaluated",
                hint="set paths.evaluate_every = 1 in the run file, or pull the newest without @best",
            )
        return [
            self.at(module, version)
            for module, version in zip(path.modules, record.best.versions, strict=True)
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
    flower = run.run_file.flower
    parameters |= flower.arguments if flower else to_table(run.run_file.merge.parameters)
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
                tokens=update.num_tokens,
                norm=update.norm,
            )
            for update in round_.updates
        ),
        merge=MergeStep(rule=run.run_file.rule_name, parameters=parameters),
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
