"""The coordinator: what the service may ask, each call under the lock and told to those who wait for changes.

Its rooms know the rest: ``state`` what is known and durable, ``starting`` runs, ``leasing`` tasks, ``transfers``
bytes, ``intake`` submissions, ``publishing`` rounds and their merges.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from weft.common.blobs import BlobStore
from weft.common.errors import NotFound
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.ids import Digest, ModuleRef
from weft.common.manifest import Signed
from weft.common.protocol import (
    BlobManifest,
    Joined,
    Limit,
    LossPoint,
    Missing,
    PollAnswer,
    ProgressAnswer,
    Receipt,
    ResolvedModule,
    RoundStatus,
    Session,
    Stage,
    Status,
    TokenStatus,
    Unable,
)
from weft.common.recipe import BasePin
from weft.server import starting
from weft.server.backend import Caller
from weft.server.engine import Engine
from weft.server.intake import Intake
from weft.server.leasing import Leasing
from weft.server.publishing import Publishing
from weft.server.records import VersionRecord
from weft.server.roster import OPERATOR, Clock, Roster
from weft.server.runfile import RunFile
from weft.server.state import State
from weft.server.status import round_statuses, run_statuses, worker_statuses
from weft.server.store.ledger import Ledger
from weft.server.transfers import Transfers
from weft.server.versions import version_key


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
        """Load everything from the ledger; raises CorruptState."""
        self.name = name
        self.started_at = clock.now()
        self.roster = roster
        self.state = State(ledger=ledger, blobs=blobs, identity=identity, clock=clock)
        self.runs = self.state.runs
        self.leases = self.state.leases
        self.changed = self.state.changed
        self.work = self.state.work
        self._transfers = Transfers(self.state)
        self._leasing = Leasing(self.state, self._transfers, rng_bytes)
        self._publishing = Publishing(self.state, self._leasing, engine, scratch=scratch)
        self._intake = Intake(self.state, self._leasing, roster)
        self._lock = self.state.lock

    # ---- start and stop ------------------------------------------------------------------------------------------

    def check_same(self, run_file: RunFile) -> bool:
        """Whether this run exists already with the same settings; raises RunFileError when it has others."""
        return starting.check_same(self.state, run_file)

    def add_run(
        self, run_file: RunFile, base: BasePin, base_directory: Path, prepared: dict[str, Any]
    ) -> None:
        """Start a run; see ``starting.add_run``."""
        starting.add_run(self.state, run_file, base, base_directory, prepared)
        self.state.notify()

    def drain(self) -> None:
        """Hand out no more tasks."""
        with self._lock:
            self.state.draining = True
        self.state.notify()

    @property
    def busy(self) -> bool:
        """Whether the engine works for a round."""
        return self._publishing.busy

    def tick(self) -> None:
        """Let time act: leases end, rounds close, jobs start. Call it about once a second."""
        with self._lock:
            changed = self._tick()
        if changed:
            self.state.notify()

    def _tick(self) -> bool:
        expired = self._leasing.drop_expired()
        return self._publishing.pump() or expired

    def close(self) -> None:
        """Write what was only counted, and close the ledger."""
        with self._lock:
            self.state.close()

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
                self.state.visible_run(caller, run)
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
        self.state.notify()

    def revoke_worker(self, caller: Caller, *, worker_id: str) -> None:
        """Shut a worker out; its leases end at once. Raises NotFound."""
        with self._lock:
            self.roster.revoke(worker_id=worker_id)
            self._leasing.drop_of(worker_id, "the worker was revoked")
        self.state.notify()

    # ---- work ----------------------------------------------------------------------------------------------------

    def poll_task(
        self,
        caller: Caller,
        *,
        unable: tuple[Unable, ...],
        tokens_per_s: float,
        limits: tuple[Limit, ...] = (),
        **_: float,
    ) -> PollAnswer:
        """A task, the caller's own when it holds a lease, or a reason to wait."""
        with self._lock:
            self._leasing.note(caller, unable=unable, tokens_per_s=tokens_per_s, limits=limits)
            self._tick()
            return self._leasing.poll(caller)

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
            answer = self._leasing.report(
                caller,
                lease_token=lease_token,
                stage=stage,
                num_done=num_done,
                num_total=num_total,
                tokens_per_s=tokens_per_s,
                losses=losses,
            )
        if not answer.stop:
            self.changed.notify()
        return answer

    def release_task(self, caller: Caller, *, lease_token: str, reason: str) -> None:
        """Give a lease back; one that is over already is no error."""
        with self._lock:
            self._leasing.release(caller, lease_token=lease_token, reason=reason)
        self.state.notify()

    def submit_update(self, caller: Caller, *, lease_token: str, statement: Signed) -> Receipt:
        """Accept the updates of a task, durably, or refuse them without changing anything.

        Raises:
            ForgedUpdate: The signature or a field is wrong.
            ConflictingUpdate: Another payload was accepted for this task and epoch.
            LeaseLost: The lease is over.
            RoundClosed: A round no longer collects.
            UpdateRejected: An update fails the ingest gate.
        """
        submission = self._intake.read(caller, lease_token=lease_token, statement=statement)
        with self._lock:
            self.state.seen(caller)
            if (first := self._intake.first_receipt(submission)) is not None:
                return first
            lease, run = self._intake.admit(submission)
        norms = self._intake.screen(caller, lease, run, submission)
        with self._lock:
            # Screening takes long: the lease may have ended, or the same statement may have come twice.
            if (first := self._intake.first_receipt(submission)) is not None:
                return first
            lease, run = self._intake.admit(submission)
            receipt = self._intake.accept(lease, run, submission, norms)
            self._tick()
        self.state.notify()
        return receipt

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def find_missing(self, caller: Caller, *, lease_token: str, blob: BlobManifest) -> Missing:
        """Declare an update's blob; raises LeaseLost, UpdateRejected over the quota."""
        return self._transfers.find_missing(caller, lease_token=lease_token, blob=blob)

    def put_chunk(self, caller: Caller, *, lease_token: str, blake3: Digest, index: int, data: bytes) -> None:
        """Take a chunk; raises LeaseLost, NotFound, CorruptState."""
        self._transfers.put_chunk(caller, lease_token=lease_token, blake3=blake3, index=index, data=data)

    def commit_blob(self, caller: Caller, *, lease_token: str, blake3: Digest) -> None:
        """Make a blob durable; raises LeaseLost, NotFound, CorruptState."""
        self._transfers.commit_blob(caller, lease_token=lease_token, blake3=blake3)

    def get_blob(self, caller: Caller, *, blake3: Digest) -> BlobManifest:
        """What a blob consists of; raises NotFound also for blobs that the caller may not read."""
        return self._transfers.get_blob(caller, blake3=blake3)

    def get_chunk(self, caller: Caller, *, blake3: Digest, index: int) -> bytes:
        """A chunk; raises NotFound also for blobs that the caller may not read."""
        return self._transfers.get_chunk(caller, blake3=blake3, index=index)

    # ---- published modules ---------------------------------------------------------------------------------------

    def get_recipe(self, caller: Caller, *, run_id: str) -> Signed:
        """A run's signed recipe; raises NotFound."""
        with self._lock:
            return self.state.visible_run(caller, run_id).recipe_signed

    def resolve_module(self, caller: Caller, *, ref: str) -> ResolvedModule:
        """The signed manifests of a module or path; raises NotFound."""
        with self._lock:
            wanted = ModuleRef.parse(ref)
            run = self.state.visible_run(caller, wanted.run)
            manifests = tuple(self._manifest(version) for version in run.resolve(wanted))
            return ResolvedModule(
                recipe=run.recipe_signed,
                manifests=manifests,
                coordinator_public_key=self.state.identity.signing_key.public,
                endorsement=self.state.identity.endorse_signing_key(),
                router=run.router,
            )

    def list_versions(self, caller: Caller, *, run_id: str, module: str) -> tuple[Signed, ...]:
        """A module's lineage, or all modules'; raises NotFound."""
        with self._lock:
            run = self.state.visible_run(caller, run_id)
            keys = [key for key in sorted(run.versions) if not module or str(key) == module]
            if not keys:
                raise NotFound(f"{run_id} has no module {module}", hint=f"weft modules list --run {run_id}")
            return tuple(self._manifest(version) for key in keys for version in run.versions[key])

    def _manifest(self, version: VersionRecord) -> Signed:
        return self.state.ledger.document("version", version_key(version))

    # ---- status --------------------------------------------------------------------------------------------------

    def get_status(self, caller: Caller, *, run_id: str) -> Status:
        """Everything the caller may see, or one run of it; raises NotFound."""
        with self._lock:
            if run_id:
                self.state.visible_run(caller, run_id)
            runs = [
                run
                for name, run in sorted(self.runs.items())
                if caller.may_see(name) and run_id in ("", name)
            ]
            # The operator's own key works for nobody and need not be watched.
            workers = [
                worker
                for worker in self.roster.workers.values()
                if worker.worker_id != OPERATOR and (not run_id or worker.may_see(run_id))
            ]
            accepted = Counter(item.worker_id for item in self.state.accepted.values())
            leases, clock = tuple(self.leases.values()), self.state.clock
            return Status(
                coordinator=self.name,
                started_at=self.started_at,
                taken_at=clock.now(),
                runs=run_statuses([(run, self.state.view(run)) for run in runs], leases),
                workers=worker_statuses(
                    workers, self.state.live, leases, accepted=accepted, now_s=clock.monotonic()
                ),
            )

    def watch_run(self, caller: Caller, *, run_id: str) -> Status:
        """The status now; the service asks again after each change."""
        return self.get_status(caller, run_id=run_id)

    def list_rounds(self, caller: Caller, *, run_id: str, module: str) -> tuple[RoundStatus, ...]:
        """Past and present rounds; raises NotFound."""
        with self._lock:
            run = self.state.visible_run(caller, run_id)
            view = self.state.view(run)
            return round_statuses(run, view, tuple(self.leases.values()), module=module)
