"""The coordinator: one shell around the pure rounds, assignment and admission.

Each call takes the lock, asks a pure function, writes what it said to the ledger in one transaction, and only then
replaces the state in memory and replies. Merging and gating are jobs for the engine, whose results come back as
events; a round found in MERGING or GATING after a restart gets its job again, which gives the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from blake3 import blake3

from weft.common.blobs import FILES, BlobStore, chunk_bytes, digest_of, manifest_of, storage_errors
from weft.common.codec import screen_update
from weft.common.errors import (
    CorruptState,
    DiskFull,
    ForgedUpdate,
    InputError,
    NotFound,
    RunFileError,
    StorageError,
    UpdateRejected,
    UsageError,
    WeftError,
)
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.ids import Digest, ModuleKey, ModuleRef, RunId, TaskId, WorkerId, digest
from weft.common.ids import Path as ModulePath
from weft.common.manifest import Signed, canonical_json, parse_json, sign_version
from weft.common.protocol import (
    CHUNK_BYTES,
    BlobManifest,
    Joined,
    LossPoint,
    Missing,
    PollAnswer,
    ProgressAnswer,
    Receipt,
    ResolvedModule,
    Role,
    RoundState,
    RoundStatus,
    Session,
    Stage,
    Status,
    TokenStatus,
    Unable,
)
from weft.common.recipe import RECIPE_TYPE, BasePin, Recipe
from weft.common.settings import from_table, to_table
from weft.common.statements import STATEMENT_BYTES_MAX, UPDATE_TYPE, UpdateStatement
from weft.server import gate, rounds
from weft.server.admission import (
    AcceptedStatement,
    check_lease,
    check_rounds,
    check_statement,
    repeat_of,
    weight_of,
)
from weft.server.assignment import Lease, Offer, choose
from weft.server.backend import Caller, Changes
from weft.server.engine import Engine
from weft.server.live import LEASE_S, LOSSES_KEPT, REJECTIONS_MAX, UPLOADS_PER_MODULE, Live
from weft.server.records import LeaseRecord, RunRecord, TensorRecord, Traffic, VersionRecord
from weft.server.roster import Clock, Roster
from weft.server.rounds import (
    Accept,
    Accepted,
    Candidate,
    Close,
    Gated,
    GateResult,
    Merged,
    MergeFailed,
    Round,
)
from weft.server.run import ContentOf, Run, check_complete, first_manifest, next_manifest, steps_after
from weft.server.runfile import RunFile, dump_run_file, parse_run_file
from weft.server.status import round_statuses, run_statuses, worker_statuses
from weft.server.store.ledger import Ledger

logger = logging.getLogger(__name__)


class Coordinator:
    """Serves runs. Every public method may be called from any thread."""

    def __init__(
        self,
        *,
        name: str,
        ledger: Ledger,
        blobs: BlobStore,
        scratch: Path,
        identity: CoordinatorIdentity,
        roster: Roster,
        engine: Engine,
        clock: Clock,
        rng_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self.name = name
        self.roster = roster
        self.started_at = clock.now()
        self.changed = Changes()
        self.work = Changes()
        self._ledger = ledger
        self._blobs = blobs
        self._scratch = scratch
        self._identity = identity
        self._engine = engine
        self._clock = clock
        self._rng_bytes = rng_bytes
        self._lock = threading.RLock()
        self._draining = False
        self._jobs: set[tuple[RunId, ModuleKey]] = set()
        self._external: dict[Digest, tuple[Path, BlobManifest | None]] = {}
        self._uploads: dict[Digest, set[str]] = {}
        self._owning: list[tuple[Digest, tuple[str, str]]] = []
        self._last_accept_s: dict[tuple[RunId, ModuleKey], float] = {}
        self.live: dict[WorkerId, Live] = {}
        self.runs: dict[RunId, Run] = {}
        self.leases: dict[str, Lease] = {}
        self._load()

    # ---- start and stop ------------------------------------------------------------------------------------------

    def _load(self) -> None:
        """Rebuild everything from the ledger; leases are armed for a full term, since silence was ours."""
        ledger, now_s = self._ledger, self._clock.monotonic()
        recipes = ledger.documents("recipe")
        traffic = ledger.all("traffic", Traffic)
        for key, record in ledger.all("run", RunRecord).items():
            if key not in recipes:
                raise CorruptState(f"the ledger lacks the recipe of run {key}")
            self.runs[record.run] = self._open_run(record, recipes[key], traffic.get(key, Traffic()))
        for version in ledger.all("version", VersionRecord).values():
            self._loaded(version.run).versions.setdefault(version.module, []).append(version)
        for round_ in ledger.all("round", Round).values():
            self._loaded(round_.run).rounds.setdefault(round_.module, []).append(round_)
        for run in self.runs.values():
            check_complete(run)
        self._accepted = {
            (value.task_id, value.epoch): value
            for value in ledger.all("accepted", AcceptedStatement).values()
        }
        for lease in ledger.all("lease", LeaseRecord).values():
            self.leases[lease.token] = _armed(lease, now_s)
        self._owners = {Digest(blob): owners for blob, owners in ledger.blob_owners().items()}
        self._epoch = int(ledger.meta("epoch") or 0)
        if not self.leases:
            # Nobody can be in the middle of an upload: what nothing names is left over from a crash.
            candidates = {
                blob
                for run in self.runs.values()
                for round_ in _current(run)
                if round_.candidate
                for blob in round_.candidate.blobs
            }
            self._blobs.sweep(candidates | set(self._owners))

    def _loaded(self, name: RunId) -> Run:
        if name not in self.runs:
            raise CorruptState(f"the ledger lacks run {name}, of which it has versions or rounds")
        return self.runs[name]

    def _open_run(self, record: RunRecord, signed: Signed, traffic: Traffic) -> Run:
        payload = signed.open(self._identity.signing_key.public, RECIPE_TYPE)
        recipe = from_table(Recipe, parse_json(payload, STATEMENT_BYTES_MAX))
        for file in recipe.base.files:
            self._external[Digest(file.digest)] = (Path(record.base_directory) / file.name, None)
        run_file = parse_run_file(record.run_file)
        return Run(
            record=record,
            run_file=run_file,
            recipe=recipe,
            recipe_signed=signed,
            rounds={},
            versions={},
            traffic=traffic,
        )

    def check_same(self, run_file: RunFile) -> bool:
        """Whether this run exists already with the same settings; what only the coordinator needs may differ.

        Raises:
            RunFileError: It exists with other settings that workers follow.
        """
        run = self.runs.get(run_file.name)
        if run is None:
            return False
        same = dataclasses.replace(run.run_file, rounds=run_file.rounds, gate=run_file.gate) == run_file
        if not same or run_file.rounds.count != run.run_file.rounds.count:
            changed = _changed(to_table(run.run_file), to_table(run_file))
            raise RunFileError(
                f"run {run_file.name} exists with other settings: {', '.join(changed)}",
                hint="give the new run another run.name, or put the old values back",
            )
        with self._lock:
            record = dataclasses.replace(run.record, run_file=dump_run_file(run_file))
            with self._ledger.transaction():
                self._ledger.put("run", record.run, record, run=record.run)
            run.record, run.run_file = record, run_file
        return True

    def add_run(
        self, run_file: RunFile, base: BasePin, base_directory: Path, prepared: dict[str, Any]
    ) -> None:
        """Start a run: sign its recipe, publish version 0 of every module, open the first rounds.

        Args:
            run_file: What the operator asked for.
            base: The pinned base.
            base_directory: Where its files lie; they are served from there.
            prepared: The engine's answer to a ``prepare`` job: schemas and files of version 0, by module.
        """
        now = self._clock.now()
        recipe = run_file.recipe(base)
        payload = canonical_json(to_table(recipe))
        signed = Signed.sign(self._identity.signing_key, RECIPE_TYPE, payload)
        schemas = {
            key: tuple(from_table(TensorRecord, item) for item in schema)
            for key, schema in prepared["schemas"].items()
        }
        record = RunRecord(
            run=run_file.name,
            run_file=dump_run_file(run_file),
            base_directory=str(base_directory),
            recipe_digest=_blake3(payload),
            schemas=schemas,
            created_at=now,
        )
        run = self._open_run(record, signed, Traffic())
        with self._lock, self._transaction():
            for module in recipe.topology.modules:
                content = self._take_file(Path(prepared["files"][str(module)]))
                document = sign_version(
                    first_manifest(record, recipe, module, content, now=now), self._identity.signing_key
                )
                version = _version(run, module, 0, content, document, now=now)
                run.versions[module] = [version]
                run.rounds[module] = [
                    Round(run=record.run, module=module, number=1, base_version=0, opened_at=now)
                ]
                self._write_version(version, document)
                self._write_round(run.rounds[module][0])
            for file in base.files:
                self._own(Digest(file.digest), "base", record.run)
            self._ledger.put("run", record.run, record, run=record.run)
            self._ledger.put_document("recipe", record.run, signed, run=record.run)
            self._ledger.log(now, record.run, f"run started over base {base.digest[:12]}")
        self.runs[record.run] = run
        self._notify()

    def drain(self) -> None:
        """Hand out no more tasks."""
        with self._lock:
            self._draining = True
        self._notify()

    @property
    def busy(self) -> bool:
        """Whether the engine works for a round."""
        return bool(self._jobs)

    def close(self) -> None:
        """Write what was only counted, and close the ledger."""
        with self._lock:
            with self._ledger.transaction():
                for run in self.runs.values():
                    self._ledger.put("traffic", run.record.run, run.traffic, run=run.record.run)
            self._ledger.close()

    # ---- who -----------------------------------------------------------------------------------------------------

    def authenticate(self, session_token: str) -> Caller:
        """Who holds the session; raises SessionExpired."""
        with self._lock:
            return self.roster.authenticate(session_token)

    def join(self, peer: str, *, token_id: str, statement: Signed, proof: bytes) -> Joined:
        """Put somebody on the roster; raises TokenRefused, TooManyAttempts."""
        with self._lock:
            joined = self.roster.join(peer, token_id=token_id, statement=statement, proof=proof)
        self.changed.notify()
        return joined

    def start_session(self, peer: str, *, worker_id: str) -> bytes:
        """A nonce to sign; raises NotFound."""
        with self._lock:
            return self.roster.start_session(worker_id=worker_id)

    def open_session(self, peer: str, *, worker_id: str, statement: Signed) -> Session:
        """Open a session; raises SessionExpired, ApprovalPending, PermissionRefused."""
        with self._lock:
            return self.roster.open_session(peer, worker_id=worker_id, statement=statement)

    def create_token(self, caller: Caller, **wanted: Any) -> str:
        """Make a token to hand out."""
        with self._lock:
            for run in wanted["runs"]:
                self._run(caller, run)
            return self.roster.create_token(**wanted)

    def list_tokens(self, caller: Caller) -> tuple[TokenStatus, ...]:
        """All tokens."""
        with self._lock:
            return self.roster.tokens()

    def revoke_token(self, caller: Caller, *, token_id: str) -> None:
        """Take a token back; raises NotFound."""
        with self._lock:
            self.roster.revoke_token(token_id=token_id)

    def approve_worker(self, caller: Caller, *, worker_id: str) -> None:
        """Let a worker in; raises NotFound."""
        with self._lock:
            self.roster.approve(worker_id=worker_id)
        self._notify()

    def revoke_worker(self, caller: Caller, *, worker_id: str) -> None:
        """Shut a worker out; its leases end at once. Raises NotFound."""
        with self._lock:
            self.roster.revoke(worker_id=worker_id)
            for lease in [lease for lease in self.leases.values() if lease.worker_id == worker_id]:
                self._drop(lease, "the worker was revoked")
        self._notify()

    # ---- work ----------------------------------------------------------------------------------------------------

    def poll_task(
        self, caller: Caller, *, unable: tuple[Unable, ...], tokens_per_s: float, **_: float
    ) -> PollAnswer:
        """A task, the caller's own when it holds a lease, or a reason to wait."""
        with self._lock:
            live = self._seen(caller)
            live.tokens_per_s = tokens_per_s or live.tokens_per_s
            live.unable = {item.run_id: item.reason[:200] for item in unable[:100]}
            self._tick()
            for lease in [lease for lease in self.leases.values() if lease.worker_id == caller.worker_id]:
                if not lease.stop_reason and self._serves(live, lease.run):
                    return self._answer(self._polled_again(lease))
                self._drop(lease, lease.stop_reason or "this worker gets no more tasks of the run")
            if self._draining:
                return PollAnswer(task=None, wait_reason="the coordinator is stopping", finished=False)
            views = [
                run.view
                for name, run in self.runs.items()
                if caller.may_see(name) and self._serves(live, name)
            ]
            choice = choose(caller.worker_id, views, tuple(self.leases.values()))
            if isinstance(choice, Offer):
                return self._answer(self._grant(caller, choice))
            return PollAnswer(
                task=None, wait_reason=choice.reason, finished=choice.finished and not live.unable
            )

    def _polled_again(self, lease: Lease) -> Lease:
        """Who asks again does not know of its task, or lost what it had: progress counts from the start.

        Asking is a sign of life and no progress: the idle time goes on.
        """
        ends_s = lease.progress_s + self.runs[lease.run].recipe.idle_s
        self.leases[lease.token] = dataclasses.replace(
            lease,
            stage=Stage.FETCHING,
            num_done=0,
            num_total=0,
            expires_s=min(self._clock.monotonic() + LEASE_S, ends_s),
        )
        return self.leases[lease.token]

    def report_progress(
        self,
        caller: Caller,
        *,
        lease_token: str,
        stage: Stage,
        num_done: int,
        num_total: int,
        tokens_per_s: float,
        losses: tuple[LossPoint, ...],
    ) -> ProgressAnswer:
        """Keep the lease; raises LeaseLost, PermissionRefused."""
        with self._lock:
            live, now_s = self._seen(caller), self._clock.monotonic()
            lease = check_lease(self.leases.get(lease_token), caller.worker_id, now_s=now_s)
            if lease.stop_reason:
                self._drop(lease, lease.stop_reason)
                return ProgressAnswer(stop=True, reason=lease.stop_reason)
            moved = (stage.value, num_done) > (lease.stage.value, lease.num_done)
            if stage is not lease.stage:
                live.since = self._clock.now()
            progress_s = now_s if moved else lease.progress_s
            self.leases[lease_token] = dataclasses.replace(
                lease,
                stage=stage,
                num_done=num_done,
                num_total=num_total,
                progress_s=progress_s,
                expires_s=min(now_s + LEASE_S, progress_s + self.runs[lease.run].recipe.idle_s),
            )
            live.tokens_per_s = tokens_per_s or live.tokens_per_s
            live.losses = [*live.losses, *losses[:100]][-LOSSES_KEPT:]
        self.changed.notify()
        return ProgressAnswer(stop=False, reason="")

    def release_task(self, caller: Caller, *, lease_token: str, reason: str) -> None:
        """Give a lease back; one that is over already is no error."""
        with self._lock:
            self._seen(caller)
            lease = self.leases.get(lease_token)
            if lease is not None and lease.worker_id == caller.worker_id:
                self._drop(lease, f"given back: {reason[:200]}")
        self._notify()

    def submit_update(self, caller: Caller, *, lease_token: str, statement: Signed) -> Receipt:
        """Accept the updates of a task, durably, or refuse them without changing anything.

        Raises:
            ForgedUpdate: The signature or a field is wrong.
            ConflictingUpdate: Another payload was accepted for this task and epoch.
            LeaseLost: The lease is over.
            RoundClosed: A round no longer collects.
            UpdateRejected: An update fails the ingest gate.
        """
        said = self._verified(caller, statement)
        statement_digest = _blake3(statement.payload)
        with self._lock:
            self._seen(caller)
            first = repeat_of(statement_digest, said.task, said.epoch, caller.worker_id, self._accepted)
            if first is not None:
                return Receipt(receipt_blake3=first.statement_digest, accepted_at=first.accepted_at)
            lease, run = self._admitted(caller, lease_token, said)
        norms = self._screen(caller, run, said)
        with self._lock:
            # Screening takes long: the lease may have ended, or the same statement may have come twice.
            first = repeat_of(statement_digest, said.task, said.epoch, caller.worker_id, self._accepted)
            if first is not None:
                return Receipt(receipt_blake3=first.statement_digest, accepted_at=first.accepted_at)
            lease, run = self._admitted(caller, lease_token, said)
            receipt = self._accept(lease, run, said, statement, norms)
            self._tick()
        self._notify()
        return receipt

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def find_missing(self, caller: Caller, *, lease_token: str, blob: BlobManifest) -> Missing:
        """Declare an update's blob; raises LeaseLost, UpdateRejected over the quota."""
        lease = self._leased(caller, lease_token)
        quota = max(self.runs[lease.run].update_bytes_max(module) for module, _ in lease.rounds)
        if blob.size_bytes > quota:
            raise UpdateRejected(f"an update of {blob.size_bytes} bytes, where at most {quota} are possible")
        with self._lock:
            self._declare(lease, blob.blake3)
        return self._blobs.begin(blob, bytes_max=quota)

    def _declare(self, lease: Lease, blob: Digest) -> None:
        declared = sum(lease.token in tokens for tokens in self._uploads.values())
        tokens = self._uploads.get(blob, set())
        if lease.token not in tokens and declared >= UPLOADS_PER_MODULE * len(lease.rounds):
            raise UpdateRejected(
                f"task {lease.task_id} has {declared} uploads already", hint="ask for another task"
            )
        self._uploads[blob] = tokens | {lease.token}

    def put_chunk(self, caller: Caller, *, lease_token: str, blake3: Digest, index: int, data: bytes) -> None:
        """Take a chunk; raises LeaseLost, NotFound, CorruptState."""
        lease = self._leased(caller, lease_token)
        self._blobs.put_chunk(blake3, index, data)
        with self._lock:
            self._seen(caller).bytes_up += len(data)
            run = self.runs[lease.run]
            run.traffic = dataclasses.replace(run.traffic, bytes_up=run.traffic.bytes_up + len(data))

    def commit_blob(self, caller: Caller, *, lease_token: str, blake3: Digest) -> None:
        """Make a blob durable; raises LeaseLost, NotFound, CorruptState."""
        self._leased(caller, lease_token)
        self._blobs.commit(blake3)

    def get_blob(self, caller: Caller, *, blake3: Digest) -> BlobManifest:
        """What a blob consists of; raises NotFound also for blobs that the caller may not read."""
        self._readable(caller, blake3)
        external = self._external.get(blake3)
        if external is None:
            return self._blobs.manifest(blake3)
        path, manifest = external
        if manifest is None:
            manifest = manifest_of(path)
            self._external[blake3] = (path, manifest)
        if manifest.blake3 != blake3:
            raise _base_changed(path)
        return manifest

    def get_chunk(self, caller: Caller, *, blake3: Digest, index: int) -> bytes:
        """A chunk; raises NotFound also for blobs that the caller may not read."""
        run = self._readable(caller, blake3)
        external = self._external.get(blake3)
        data = (
            self._blobs.read_chunk(blake3, index)
            if external is None
            else self._external_chunk(caller, blake3, index)
        )
        with self._lock:
            self._seen(caller).bytes_down += len(data)
            if run is not None:
                run.traffic = dataclasses.replace(run.traffic, bytes_down=run.traffic.bytes_down + len(data))
        return data

    # ---- published modules ---------------------------------------------------------------------------------------

    def get_recipe(self, caller: Caller, *, run_id: str) -> Signed:
        """A run's signed recipe; raises NotFound."""
        with self._lock:
            return self._run(caller, run_id).recipe_signed

    def resolve_module(self, caller: Caller, *, ref: str) -> ResolvedModule:
        """The signed manifests of a module or path; raises NotFound."""
        with self._lock:
            wanted = ModuleRef.parse(ref)
            run = self._run(caller, wanted.run)
            manifests = tuple(self._manifest(version) for version in run.resolve(wanted))
            return ResolvedModule(
                recipe=run.recipe_signed,
                manifests=manifests,
                coordinator_public_key=self._identity.signing_key.public,
                endorsement=self._identity.endorse_signing_key(),
            )

    def list_versions(self, caller: Caller, *, run_id: str, module: str) -> tuple[Signed, ...]:
        """A module's lineage, or all modules'; raises NotFound."""
        with self._lock:
            run = self._run(caller, run_id)
            keys = [key for key in sorted(run.versions) if not module or str(key) == module]
            if not keys:
                raise NotFound(f"{run_id} has no module {module}", hint=f"weft modules list --run {run_id}")
            return tuple(self._manifest(version) for key in keys for version in run.versions[key])

    def _manifest(self, version: VersionRecord) -> Signed:
        return self._ledger.document("version", version_key(version))

    # ---- status --------------------------------------------------------------------------------------------------

    def get_status(self, caller: Caller, *, run_id: str) -> Status:
        """Everything the caller may see, or one run of it; raises NotFound."""
        with self._lock:
            if run_id:
                self._run(caller, run_id)
            runs = [
                run
                for name, run in sorted(self.runs.items())
                if caller.may_see(name) and run_id in ("", name)
            ]
            return Status(
                coordinator=self.name,
                started_at=self.started_at,
                taken_at=self._clock.now(),
                runs=run_statuses(runs, tuple(self.leases.values())),
                workers=worker_statuses(
                    [
                        worker
                        for worker in self.roster.workers.values()
                        if not run_id or worker.may_see(run_id)
                    ],
                    self.live,
                    tuple(self.leases.values()),
                    now_s=self._clock.monotonic(),
                ),
            )

    def watch_run(self, caller: Caller, *, run_id: str) -> Status:
        """The status now; the service asks again after each change."""
        return self.get_status(caller, run_id=run_id)

    def list_rounds(self, caller: Caller, *, run_id: str, module: str) -> tuple[RoundStatus, ...]:
        """Past and present rounds; raises NotFound."""
        with self._lock:
            return round_statuses(self._run(caller, run_id), tuple(self.leases.values()), module=module)

    # ---- time ----------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let time act: leases end, rounds close, jobs start. Call it about once a second."""
        with self._lock:
            changed = self._tick()
        if changed:
            self._notify()

    def _tick(self) -> bool:
        now_s = self._clock.monotonic()
        expired = [lease for lease in self.leases.values() if now_s >= lease.expires_s]
        for lease in expired:
            silent = now_s - lease.progress_s >= self.runs[lease.run].recipe.idle_s
            self._drop(lease, "no progress within the idle time" if silent else f"silent for {LEASE_S:.0f} s")
        changed = bool(expired)
        for run in self.runs.values():
            for module in run.rounds:
                changed |= self._pump(run, module)
        return changed

    def _pump(self, run: Run, module: ModuleKey) -> bool:
        """Do what a round is due; says whether anything changed."""
        round_ = run.current(module)
        if round_.state is RoundState.COLLECTING:
            return self._close_if_due(run, round_)
        if (run.record.run, module) in self._jobs or round_.state not in (
            RoundState.MERGING,
            RoundState.GATING,
        ):
            return False
        self._start_job(run, round_)
        return True

    def _close_if_due(self, run: Run, round_: Round) -> bool:
        now_s = self._clock.monotonic()
        in_flight = [lease.in_flight(now_s) for lease in self.leases.values() if lease.trains(round_)]
        last_s = self._last_accept_s.get((run.record.run, round_.module), now_s)
        reason = rounds.close_reason(round_, run.run_file.rounds, in_flight, since_last_s=now_s - last_s)
        if reason is None:
            if round_.updates:
                # After a restart the time of the last update is not known: patience starts afresh.
                self._last_accept_s.setdefault((run.record.run, round_.module), now_s)
            return False
        closed = rounds.advance(round_, Close(reason), self._clock.now())
        self._replace_round(run, closed, f"round {round_.number} of {round_.module} closed: {reason}")
        for lease in [lease for lease in self.leases.values() if lease.trains(round_)]:
            self.leases[lease.token] = dataclasses.replace(
                lease, stop_reason=f"round {round_.number} closed: {reason}"
            )
        self._pump(run, round_.module)
        return True

    # ---- merging and gating --------------------------------------------------------------------------------------

    def _start_job(self, run: Run, round_: Round) -> None:
        if round_.state is RoundState.GATING and not run.run_file.gate.heldout:
            self._gated(run, round_, gate.without_data())
            return
        job = (
            merge_job(run, round_, self._blobs, self._scratch)
            if round_.state is RoundState.MERGING
            else self._gate_job(run, round_)
        )
        self._jobs.add((run.record.run, round_.module))
        self._engine.submit(job).add_done_callback(lambda done: self._job_done(run, round_, done))

    def _job_done(self, run: Run, round_: Round, done: Future[dict[str, Any]]) -> None:
        """Take the engine's result; runs in the engine's thread."""
        if done.cancelled():
            return
        with self._lock:
            self._jobs.discard((run.record.run, round_.module))
            try:
                self._take_result(run, round_, done)
            except StorageError as error:
                # A full disk, most likely: the round is as it was, and the next tick gives its job again.
                logger.error("%s/%s is tried again: %s", run.record.run, round_.module, error)
        self._notify()

    def _take_result(self, run: Run, round_: Round, done: Future[dict[str, Any]]) -> None:
        error = done.exception()
        if isinstance(error, WeftError):
            if not self._draining:
                self._job_failed(run, round_, error)
        elif error is not None:
            logger.error("engine job of %s/%s failed", run.record.run, round_.module, exc_info=error)
        elif round_.state is RoundState.MERGING:
            self._merged(run, round_, done.result())
        else:
            result = gate.decide(**done.result()["losses"], tolerance=run.run_file.gate.tolerance)
            self._gated(run, round_, result)

    def _job_failed(self, run: Run, round_: Round, error: WeftError) -> None:
        if isinstance(error, DiskFull):
            # Says nothing about the updates: the round stays as it is, and the next tick tries again.
            logger.error("%s/%s waits for space: %s", run.record.run, round_.module, error)
        elif round_.state is RoundState.MERGING:
            failed = rounds.advance(round_, MergeFailed(error.message), self._clock.now())
            self._end_round(run, failed)
        else:
            self._gated(
                run,
                round_,
                GateResult(passed=False, reason=f"rolled back: the gate could not evaluate: {error.message}"),
            )

    def _merged(self, run: Run, round_: Round, result: dict[str, Any]) -> None:
        content = self._take_file(Path(result["candidate"]))
        state = self._take_file(Path(result["outer_state"])).digest if result.get("outer_state") else None
        candidate = Candidate(
            digest=content.digest,
            size_bytes=content.size_bytes,
            outer_state=state,
            truncation_error=result.get("truncation_error"),
            clipped=tuple(result.get("clipped", ())),
        )
        merged = rounds.advance(round_, Merged(candidate), self._clock.now())
        self._replace_round(
            run, merged, f"round {round_.number} of {round_.module} merged {len(round_.updates)} update(s)"
        )
        self._pump(run, round_.module)

    def _gate_job(self, run: Run, round_: Round) -> dict[str, Any]:
        assert round_.candidate is not None  # noqa: S101 - the table says so
        path = next(path for path in run.recipe.topology.paths if round_.module in path.modules)
        before = {str(module): str(self._blobs.path(run.newest(module).digest)) for module in path.modules}
        after = before | {str(round_.module): str(self._blobs.path(round_.candidate.digest))}
        return {
            "job": "gate",
            "base": run.record.base_directory,
            "recipe": to_table(run.recipe),
            "schemas": {str(module): to_table(run.record.schemas[str(module)]) for module in path.modules},
            "before": before,
            "after": after,
            "heldout": run.run_file.gate.heldout,
            "num_sequences_max": run.run_file.gate.num_sequences_max,
        }

    def _gated(self, run: Run, round_: Round, result: GateResult) -> None:
        self._end_round(run, rounds.advance(round_, Gated(result), self._clock.now()))

    def _end_round(self, run: Run, ended: Round) -> None:
        """Publish or roll back: the version, its manifest and the next round become durable together."""
        now = self._clock.now()
        following = rounds.next_round(ended, now)
        with self._transaction():
            if ended.state is RoundState.PUBLISHED:
                version = self._publish(run, ended, now=now)
            self._write_round(ended)
            self._write_round(following)
            self._ledger.put("traffic", run.record.run, run.traffic, run=run.record.run)
            self._ledger.log(now, run.record.run, f"round {ended.number} of {ended.module}: {ended.reason}")
        if ended.state is RoundState.PUBLISHED:
            run.versions[ended.module].append(version)
        run.rounds[ended.module][-1:] = [ended, following]
        self._last_accept_s.pop((run.record.run, ended.module), None)
        logger.info("%s round %d of %s: %s", run.record.run, ended.number, ended.module, ended.reason)
        if ended.candidate:
            # A published one has owners by now.
            for blob in ended.candidate.blobs:
                self._remove_unowned(blob)

    def _publish(self, run: Run, ended: Round, *, now: float) -> VersionRecord:
        assert ended.candidate is not None  # noqa: S101 - only a candidate can be published
        assert ended.gate is not None  # noqa: S101
        path = self._blobs.path(ended.candidate.digest)
        content = ContentOf(
            digest=ended.candidate.digest, size_bytes=ended.candidate.size_bytes, sha256=_sha256(path)
        )
        manifest = next_manifest(run, ended, ended.gate, content, now=now)
        document = sign_version(manifest, self._identity.signing_key)
        version = _version(run, ended.module, ended.base_version + 1, content, document, now=now, ended=ended)
        self._write_version(version, document)
        if version.outer_state is not None:
            self._own(version.outer_state, "outer", run.record.run)
        return version

    def _notify(self) -> None:
        """Wake watchers, and polls that may find work now."""
        self.changed.notify()
        self.work.notify()

    # ---- leases --------------------------------------------------------------------------------------------------

    def _grant(self, caller: Caller, offer: Offer) -> Lease:
        run, now_s = self.runs[offer.run], self._clock.monotonic()
        epoch = self._epoch + 1
        starts = tuple((module, run.newest(module).version) for module in offer.path.modules)
        lease = Lease(
            task_id=TaskId(f"t-{epoch}"),
            run=offer.run,
            worker_id=caller.worker_id,
            token=self._rng_bytes(16).hex(),
            epoch=epoch,
            path=offer.path,
            rounds=tuple((round_.module, round_.number) for round_ in offer.train),
            starts=starts,
            num_steps=run.recipe.inner.steps,
            granted_s=now_s,
            expires_s=now_s + LEASE_S,
            progress_s=now_s,
        )
        with self._ledger.transaction():
            self._ledger.put("lease", lease.token, _record(lease), run=lease.run)
            self._ledger.set_meta("epoch", str(epoch))
        self._epoch = epoch
        self.leases[lease.token] = lease
        live = self.live[caller.worker_id]
        live.since, live.losses = self._clock.now(), []
        self._notify()
        return lease

    def _drop(self, lease: Lease, reason: str) -> None:
        with self._ledger.transaction():
            self._ledger.delete("lease", lease.token)
            self._ledger.log(
                self._clock.now(), lease.run, f"{lease.task_id} of {lease.worker_id} ended: {reason}"
            )
        del self.leases[lease.token]
        self._forget_uploads(lease.token)
        if lease.worker_id in self.live:
            self.live[lease.worker_id].since = self._clock.now()
        logger.info("%s of %s ended: %s", lease.task_id, lease.worker_id, reason)

    def _forget_uploads(self, lease_token: str) -> None:
        """Remove what was uploaded under a lease and belongs to no accepted update."""
        for blob, tokens in list(self._uploads.items()):
            tokens.discard(lease_token)
            if not tokens:
                del self._uploads[blob]
                self._remove_unowned(blob)

    def _remove_unowned(self, blob: Digest) -> None:
        if blob in self._owners:
            return
        try:
            self._blobs.remove(blob)
        except StorageError as error:
            # It costs space until the next start sweeps; what was decided must not fail over it.
            logger.warning("could not remove blob %s: %s", blob, error)

    def _leased(self, caller: Caller, lease_token: str) -> Lease:
        with self._lock:
            return check_lease(self.leases.get(lease_token), caller.worker_id, now_s=self._clock.monotonic())

    def _answer(self, lease: Lease) -> PollAnswer:
        return PollAnswer(
            task=self.runs[lease.run].task(lease, lease_s=LEASE_S), wait_reason="", finished=False
        )

    def _seen(self, caller: Caller) -> Live:
        now, now_s = self._clock.now(), self._clock.monotonic()
        live = self.live.setdefault(caller.worker_id, Live(seen_s=now_s, seen_at=now, since=now))
        live.seen_s, live.seen_at = now_s, now
        return live

    def _serves(self, live: Live, run: RunId) -> bool:
        return run not in live.unable and live.rejections.get(run, 0) < REJECTIONS_MAX

    # ---- submissions ---------------------------------------------------------------------------------------------

    def _verified(self, caller: Caller, statement: Signed) -> UpdateStatement:
        key = bytes.fromhex(self.roster.workers[caller.worker_id].public_key)
        if not statement.is_from(key, UPDATE_TYPE):
            raise ForgedUpdate("the statement is not signed by the key of the worker whose session this is")
        try:
            return from_table(UpdateStatement, parse_json(statement.payload, STATEMENT_BYTES_MAX))
        except (InputError, UsageError, ValueError) as error:
            raise ForgedUpdate(f"the statement is malformed: {error}") from error

    def _admitted(self, caller: Caller, lease_token: str, said: UpdateStatement) -> tuple[Lease, Run]:
        lease = self.leases.get(lease_token)
        if lease is not None and lease.worker_id == caller.worker_id:
            # A round that closed says more than the lease that went with it.
            run = self.runs[lease.run]
            check_rounds(lease, {module: run.current(module) for module in run.rounds})
        lease = check_lease(lease, caller.worker_id, now_s=self._clock.monotonic())
        check_statement(said, lease, recipe_digest=self.runs[lease.run].record.recipe_digest)
        return lease, self.runs[lease.run]

    def _screen(self, caller: Caller, run: Run, said: UpdateStatement) -> dict[str, float]:
        """The ingest gate; norms by module. Raises UpdateRejected."""
        norms = {}
        for update in said.updates:
            module = ModuleKey.parse(update.module)
            blob = Digest(update.digest)
            if not self._blobs.has(blob):
                raise UpdateRejected(f"the update of module {module} was not uploaded")
            path = self._blobs.path(blob)
            try:
                if self._is_copy(caller, run, blob):
                    raise UpdateRejected(f"the update of module {module} is another worker's")
                if path.stat().st_size != update.size_bytes:
                    raise UpdateRejected(
                        f"the update of module {module} has another size than its statement says"
                    )
                screened = screen_update(
                    path,
                    run.schema(module),
                    run.recipe.codec,
                    wants_fisher=run.recipe.fisher.num_examples > 0,
                    size_bytes_max=run.update_bytes_max(module),
                )
            except (UpdateRejected, InputError) as error:
                with self._lock:
                    live = self._seen(caller)
                    live.rejections[run.record.run] = live.rejections.get(run.record.run, 0) + 1
                logger.warning("update of %s for %s refused: %s", caller.worker_id, run.record.run, error)
                raise UpdateRejected(f"module {module}: {error.message}", hint=error.hint) from error
            norms[update.module] = screened.norm
        return norms

    def _is_copy(self, caller: Caller, run: Run, blob: Digest) -> bool:
        """Whether another worker handed the same bytes in: manifests name updates, and nobody may live off them."""
        if ("update", run.record.run) not in self._owners.get(blob, set()):
            return False
        updates = (update for rounds_ in run.rounds.values() for round_ in rounds_ for update in round_.updates)
        return any(update.update_digest == blob and update.worker_id != caller.worker_id for update in updates)

    def _accept(
        self, lease: Lease, run: Run, said: UpdateStatement, statement: Signed, norms: dict[str, float]
    ) -> Receipt:
        now, now_s = self._clock.now(), self._clock.monotonic()
        inner = run.recipe.inner
        weight = weight_of(
            said.num_tokens, tokens_asked=lease.num_steps * inner.batch_size * inner.sequence_length
        )
        accepted = AcceptedStatement(
            task_id=lease.task_id,
            epoch=lease.epoch,
            worker_id=lease.worker_id,
            statement_digest=_blake3(statement.payload),
            accepted_at=now,
        )
        advanced = []
        for update in said.updates:
            event = Accept(
                Accepted(
                    worker_id=lease.worker_id,
                    task_id=lease.task_id,
                    epoch=lease.epoch,
                    update_digest=Digest(update.digest),
                    size_bytes=update.size_bytes,
                    weight=weight,
                    num_steps=min(said.num_steps, lease.num_steps),
                    norm=norms[update.module],
                    loss=said.loss_last,
                    duration_s=now_s - lease.granted_s,
                    accepted_at=now,
                )
            )
            advanced.append(rounds.advance(run.current(ModuleKey.parse(update.module)), event, now))
        key = f"{lease.task_id}/{lease.epoch}"
        with self._transaction():
            for round_ in advanced:
                self._write_round(round_)
            for update in said.updates:
                self._own(Digest(update.digest), "update", lease.run)
            self._ledger.put("accepted", key, accepted, run=lease.run)
            self._ledger.put_document("update", key, statement, run=lease.run)
            self._ledger.delete("lease", lease.token)
            self._ledger.log(
                now, lease.run, f"{lease.task_id} of {lease.worker_id} accepted, loss {said.loss_last:.4f}"
            )
        # Durable: from here on the receipt is true whatever happens.
        self._accepted[(lease.task_id, lease.epoch)] = accepted
        del self.leases[lease.token]
        for round_ in advanced:
            run.rounds[round_.module][-1] = round_
            self._last_accept_s[(lease.run, round_.module)] = now_s
        self._forget_uploads(lease.token)
        live = self.live[lease.worker_id]
        live.num_updates, live.since = live.num_updates + 1, now
        return Receipt(receipt_blake3=accepted.statement_digest, accepted_at=now)

    # ---- reading and writing -------------------------------------------------------------------------------------

    def _run(self, caller: Caller, name: str) -> Run:
        run = self.runs.get(RunId(name))
        if run is None or not caller.may_see(name):
            known = ", ".join(sorted(known for known in self.runs if caller.may_see(known)))
            raise NotFound(f"there is no run {name[:40]} here", hint=f"runs here: {known}" if known else "")
        return run

    def _readable(self, caller: Caller, blob: Digest) -> Run | None:
        """The run that the blob is read for; workers and viewers may read bases and versions of their runs."""
        with self._lock:
            owners = self._owners.get(blob, set())
            if caller.role is Role.ADMIN and owners:
                return self.runs.get(RunId(min(owners)[1]))
            for kind, run in sorted(owners):
                if kind in ("base", "version") and caller.may_see(run):
                    return self.runs[RunId(run)]
        raise NotFound(f"there is no blob {blob[:12]} here")

    def _external_chunk(self, caller: Caller, blob: Digest, index: int) -> bytes:
        path, manifest = self._external[blob][0], self.get_blob(caller, blake3=blob)
        if not 0 <= index < len(manifest.chunk_blake3):
            raise NotFound(f"blob {blob[:12]} has no chunk {index}")
        with storage_errors(path):
            data = FILES.read_at(path, index * CHUNK_BYTES, chunk_bytes(manifest, index))
        if digest_of(data) != manifest.chunk_blake3[index]:
            raise _base_changed(path)
        return data

    def _take_file(self, path: Path) -> ContentOf:
        sha256 = _sha256(path)
        blob = self._blobs.add_file(path, move=True)
        return ContentOf(digest=blob.blake3, size_bytes=blob.size_bytes, sha256=sha256)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """A ledger transaction in which blobs may get owners: in memory too once it is durable, and not before."""
        self._owning.clear()
        with self._ledger.transaction():
            yield
        for blob, owner in self._owning:
            self._owners.setdefault(blob, set()).add(owner)

    def _own(self, blob: Digest, kind: str, run: RunId) -> None:
        self._ledger.own_blob(blob, kind, run)
        self._owning.append((blob, (kind, run)))

    def _write_version(self, version: VersionRecord, document: Signed) -> None:
        key = version_key(version)
        self._ledger.put("version", key, version, run=version.run)
        self._ledger.put_document("version", key, document, run=version.run)
        self._own(version.digest, "version", version.run)

    def _write_round(self, round_: Round) -> None:
        self._ledger.put("round", f"{round_.run}/{round_.module}/{round_.number:08d}", round_, run=round_.run)

    def _replace_round(self, run: Run, round_: Round, text: str) -> None:
        with self._ledger.transaction():
            self._write_round(round_)
            self._ledger.log(self._clock.now(), run.record.run, text)
        run.rounds[round_.module][-1] = round_
        logger.info("%s %s", run.record.run, text)


def _current(run: Run) -> list[Round]:
    return [rounds_[-1] for rounds_ in run.rounds.values()]


def merge_job(run: Run, round_: Round, blobs: BlobStore, scratch: Path) -> dict[str, Any]:
    """The engine's job that merges a round; the same round always gives the same job."""
    start = run.at(round_.module, round_.base_version)
    name = f"{run.record.run}-{round_.module}-{round_.number}"
    return {
        "job": "merge",
        "schema": to_table(run.record.schemas[str(round_.module)]),
        "topology": to_table(run.recipe.topology),
        "start": str(blobs.path(start.digest)),
        "outer_state": str(blobs.path(start.outer_state)) if start.outer_state else None,
        "updates": [
            {
                "path": str(blobs.path(update.update_digest)),
                "worker_id": update.worker_id,
                "task_id": update.task_id,
                "weight": update.weight,
            }
            for update in round_.updates
        ],
        "merge": to_table(run.run_file.merge),
        "outer": to_table(run.run_file.outer),
        "candidate": str(scratch / f"{name}.module"),
        "outer_state_to": str(scratch / f"{name}.outer"),
    }


def _version(
    run: Run,
    module: ModuleKey,
    number: int,
    content: ContentOf,
    document: Signed,
    *,
    now: float,
    ended: Round | None = None,
) -> VersionRecord:
    return VersionRecord(
        run=run.record.run,
        module=module,
        version=number,
        digest=content.digest,
        size_bytes=content.size_bytes,
        manifest_digest=_blake3(document.payload),
        round_number=ended.number if ended else 0,
        num_steps=steps_after(run, ended) if ended else 0,
        outer_state=ended.candidate.outer_state if ended and ended.candidate else None,
        heldout_loss=ended.gate.loss_after if ended and ended.gate else None,
        published_at=now,
    )


def version_key(version: VersionRecord) -> str:
    """How the ledger names a version and its manifest."""
    return f"{version.run}/{version.module}/{version.version:08d}"


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
        granted_s=now_s,
        expires_s=now_s + LEASE_S,
        progress_s=now_s,
    )


def _base_changed(path: Path) -> StorageError:
    return StorageError(
        f"the base's file {path.name} changed on the coordinator since the run started",
        hint=f"put the old {path} back",
    )


def _changed(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    changed = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += _changed(before, after, f"{prefix}{key}.")
        elif before != after:
            changed.append(f"{prefix}{key}")
    return changed


def _blake3(data: bytes) -> Digest:
    return digest(blake3(data).hexdigest())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
