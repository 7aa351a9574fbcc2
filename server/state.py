"""The coordinator's state: in memory what the ledger holds, and what is known only while this process lives.

Whoever reads more than one value or changes any holds ``lock``. A change is written to the ledger in one
transaction first, and only then replaces what is in memory: what fails to become durable has not happened.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

from weft.common.blobs import BlobStore
from weft.common.errors import CorruptState, NotFound, StorageError
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.ids import Digest, ModuleKey, RunId, TaskId, WorkerId
from weft.common.ids import Path as ModulePath
from weft.common.manifest import Signed, parse_json
from weft.common.recipe import RECIPE_TYPE, Recipe
from weft.common.settings import from_table
from weft.common.statements import STATEMENT_BYTES_MAX
from weft.server.activity import run_view
from weft.server.admission import AcceptedStatement
from weft.server.assignment import Lease, RunView
from weft.server.backend import Caller, Changes
from weft.server.live import LEASE_S, PRESENT_S, Live
from weft.server.paths import PathRecord
from weft.server.records import (
    HoldingRecord,
    LeaseRecord,
    RoutingRecord,
    RunRecord,
    Traffic,
    VersionRecord,
)
from weft.server.roster import Clock
from weft.server.rounds import Round
from weft.server.run import ContentOf, Run, check_complete
from weft.server.runfile import parse_run_file
from weft.server.store.ledger import Ledger
from weft.server.versions import version_key

logger = logging.getLogger(__name__)


class State:
    """What the coordinator knows, and the ways in which it becomes durable."""

    def __init__(
        self, *, ledger: Ledger, blobs: BlobStore, identity: CoordinatorIdentity, clock: Clock
    ) -> None:
        """Load everything from the ledger; raises CorruptState."""
        self.ledger = ledger
        self.blobs = blobs
        self.identity = identity
        self.clock = clock
        self.lock = threading.RLock()
        """Reentrant: an engine may answer in the thread that asked."""
        self.changed = Changes()
        """Notified whenever the status is another."""
        self.work = Changes()
        """Notified whenever a poll that found no task may find one."""
        self.draining = False
        self.started_s = clock.monotonic()
        self.live: dict[WorkerId, Live] = {}
        self.last_accept_s: dict[tuple[RunId, ModuleKey], float] = {}
        """When the current round of a module last took an update, monotonic clock."""
        self.runs: dict[RunId, Run] = {}
        self.base_files: dict[Digest, Path] = {}
        """Where the bases' files lie; they are served from there."""
        self.leases: dict[str, Lease] = {}
        """By token."""
        self.accepted: dict[tuple[TaskId, int], AcceptedStatement] = {}
        """By task and epoch."""
        self.owners: dict[Digest, set[tuple[str, str]]] = {}
        """(kind, run) pairs that a blob is kept for."""
        self.epoch = int(ledger.meta("epoch") or 0)
        """Of the newest lease."""
        self._owning: list[tuple[Digest, tuple[str, str]]] = []
        self._load_runs()
        self._load_tasks()
        self._sweep()

    # ---- loading -------------------------------------------------------------------------------------------------

    def _load_runs(self) -> None:
        recipes = self.ledger.documents("recipe")
        traffic = self.ledger.all("traffic", Traffic)
        for key, record in self.ledger.all("run", RunRecord).items():
            if key not in recipes:
                raise CorruptState(f"the ledger lacks the recipe of run {key}")
            self.runs[record.run] = self.open_run(record, recipes[key], traffic.get(key, Traffic()))
        for version in self.ledger.all("version", VersionRecord).values():
            self._loaded(version.run).versions.setdefault(version.module, []).append(version)
        for round_ in self.ledger.all("round", Round).values():
            self._loaded(round_.run).rounds.setdefault(round_.module, []).append(round_)
        for path in self.ledger.all("path", PathRecord).values():
            self._loaded(path.run).paths[path.path] = path
        for routing in self.ledger.all("routing", RoutingRecord).values():
            self._loaded(routing.run).routing = routing
        for holding in self.ledger.all("holding", HoldingRecord).values():
            run = self._loaded(holding.run)
            if run.routing is not None and holding.router == run.routing.router:
                run.take_holding(holding)
        for run in self.runs.values():
            check_complete(run)

    def _loaded(self, name: RunId) -> Run:
        if name not in self.runs:
            raise CorruptState(f"the ledger lacks run {name}, of which it has versions or rounds")
        return self.runs[name]

    def _load_tasks(self) -> None:
        """Leases are armed for a full term, since silence was ours."""
        for accepted in self.ledger.all("accepted", AcceptedStatement).values():
            self.accepted[(accepted.task_id, accepted.epoch)] = accepted
        for lease in self.ledger.all("lease", LeaseRecord).values():
            self.leases[lease.token] = _armed(lease, self.clock.monotonic())
        self.owners.update((Digest(blob), owners) for blob, owners in self.ledger.blob_owners().items())

    def _sweep(self) -> None:
        """Remove what a crash left over; under a lease somebody may be in the middle of an upload."""
        if self.leases:
            return
        current = [rounds[-1] for run in self.runs.values() for rounds in run.rounds.values()]
        candidates = {blob for round_ in current if round_.candidate for blob in round_.candidate.blobs}
        self.blobs.sweep(candidates | set(self.owners))

    def open_run(self, record: RunRecord, signed: Signed, traffic: Traffic) -> Run:
        """A run without rounds and versions, from its signed recipe; its base's files are served from now on."""
        payload = signed.open(self.identity.signing_key.public, RECIPE_TYPE)
        recipe = from_table(Recipe, parse_json(payload, STATEMENT_BYTES_MAX))
        for file in recipe.base.files:
            self.base_files[Digest(file.digest)] = Path(record.base_directory) / file.name
        return Run(
            record=record,
            run_file=parse_run_file(record.run_file),
            recipe=recipe,
            recipe_signed=signed,
            rounds={},
            versions={},
            traffic=traffic,
        )

    def close(self) -> None:
        """Write what was only counted, and close the ledger."""
        with self.transaction():
            for run in self.runs.values():
                self.write_traffic(run)
        self.ledger.close()

    # ---- who asks ------------------------------------------------------------------------------------------------

    def visible_run(self, caller: Caller, name: str) -> Run:
        """A run that the caller may see; raises NotFound."""
        run = self.runs.get(RunId(name))
        if run is None or not caller.may_see(name):
            known = ", ".join(sorted(known for known in self.runs if caller.may_see(known)))
            raise NotFound(f"there is no run {name[:40]} here", hint=f"runs here: {known}" if known else "")
        return run

    def seen(self, caller: Caller) -> Live:
        """Note a sign of life."""
        now, now_s = self.clock.now(), self.clock.monotonic()
        live = self.live.setdefault(caller.worker_id, Live(seen_s=now_s, seen_at=now, since=now))
        live.seen_s, live.seen_at = now_s, now
        return live

    def is_present(self, worker_id: WorkerId) -> bool:
        """Whether a worker was heard of lately; after a start everybody is, for as long as that takes."""
        live, now_s = self.live.get(worker_id), self.clock.monotonic()
        seen_s = self.started_s if live is None else live.seen_s
        return now_s - seen_s < PRESENT_S

    def view(self, run: Run) -> RunView:
        """What assignment, closing and the status need of a run."""
        return run_view(run, self.is_present)

    def notify(self) -> None:
        """Wake watchers, and polls that may find work now; needs no lock."""
        self.changed.notify()
        self.work.notify()

    # ---- writing -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """A ledger transaction in which blobs may get owners: in memory too once it is durable, and not before."""
        self._owning.clear()
        with self.ledger.transaction():
            yield
        for blob, owner in self._owning:
            self.owners.setdefault(blob, set()).add(owner)

    def own(self, blob: Digest, kind: str, run: RunId) -> None:
        """Say what a blob is for; within a transaction."""
        self.ledger.own_blob(blob, kind, run)
        self._owning.append((blob, (kind, run)))

    def write_version(self, version: VersionRecord, document: Signed) -> None:
        """Write a version, its manifest and its blobs' owner; within a transaction."""
        key = version_key(version)
        self.ledger.put("version", key, version, run=version.run)
        self.ledger.put_document("version", key, document, run=version.run)
        self.own(version.digest, "version", version.run)
        if version.outer_state is not None:
            self.own(version.outer_state, "outer", version.run)

    def write_round(self, round_: Round) -> None:
        """Write a round; within a transaction."""
        self.ledger.put("round", f"{round_.run}/{round_.module}/{round_.number:08d}", round_, run=round_.run)

    def write_lease(self, lease: Lease) -> None:
        """Write a lease; within a transaction."""
        self.ledger.put("lease", lease.token, _record(lease), run=lease.run)

    def write_path(self, record: PathRecord) -> None:
        """Write what is known of a path; within a transaction."""
        self.ledger.put("path", f"{record.run}/{record.path}", record, run=record.run)

    def write_holding(self, record: HoldingRecord) -> None:
        """Write what a worker holds; within a transaction."""
        self.ledger.put("holding", f"{record.run}/{record.worker_id}", record, run=record.run)

    def write_traffic(self, run: Run) -> None:
        """Write what a run has moved; within a transaction."""
        self.ledger.put("traffic", run.record.run, run.traffic, run=run.record.run)

    def log(self, run: RunId, text: str) -> None:
        """Append a line to the journal; within a transaction."""
        self.ledger.log(self.clock.now(), run, text)

    def replace_round(self, run: Run, round_: Round, text: str) -> None:
        """Make a module's current round another, durably; ``text`` says why."""
        with self.transaction():
            self.write_round(round_)
            self.log(run.record.run, text)
        run.rounds[round_.module][-1] = round_
        logger.info("%s %s", run.record.run, text)

    # ---- blobs ---------------------------------------------------------------------------------------------------

    def content_of(self, blob: Digest, *, size_bytes: int) -> ContentOf:
        """What a manifest says of a blob that is here."""
        # SHA-256 is for other programs that read a manifest, and takes longer than all else here: without the lock.
        return ContentOf(digest=blob, size_bytes=size_bytes, sha256=_sha256(self.blobs.path(blob)))

    def remove_unowned(self, blob: Digest) -> None:
        """Remove a blob that nothing is kept for."""
        if blob in self.owners:
            return
        try:
            self.blobs.remove(blob)
        except StorageError as error:
            # It costs space until the next start sweeps; what was decided must not fail over it.
            logger.warning("could not remove blob %s: %s", blob, error)


def _record(lease: Lease) -> LeaseRecord:
    return LeaseRecord(
        task_id=lease.task_id,
        run=lease.run,
        worker_id=lease.worker_id,
        token=lease.token,
        epoch=lease.epoch,
        experts=lease.path.experts,
        rounds={str(module): number for module, number in lease.rounds},
        starts={str(module): version for module, version in lease.starts},
        num_steps=lease.num_steps,
        purpose=lease.purpose,
        rank=lease.rank,
    )


def _armed(record: LeaseRecord, now_s: float) -> Lease:
    return Lease(
        task_id=record.task_id,
        run=record.run,
        worker_id=record.worker_id,
        token=record.token,
        epoch=record.epoch,
        path=ModulePath(record.experts),
        rounds=tuple((ModuleKey.parse(module), number) for module, number in sorted(record.rounds.items())),
        starts=tuple((ModuleKey.parse(module), version) for module, version in sorted(record.starts.items())),
        num_steps=record.num_steps,
        purpose=record.purpose,
        rank=record.rank,
        granted_s=now_s,
        expires_s=now_s + LEASE_S,
        progress_s=now_s,
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
