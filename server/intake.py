"""Intake: the way of a submission, from the signed bytes that arrived to the receipt.

Four steps in this order: ``read`` and ``screen`` take long and hold no lock; ``first_receipt``, ``admit`` and
``accept`` decide, and want the state's lock held.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from weft.common.blobs import digest_of
from weft.common.codec import screen_update, seed_of
from weft.common.errors import ForgedUpdate, InputError, UpdateRejected, UsageError
from weft.common.ids import Digest, ModuleKey, WorkerId
from weft.common.manifest import Signed, parse_json
from weft.common.protocol import Purpose, Receipt, RoundState
from weft.common.settings import from_table
from weft.common.statements import STATEMENT_BYTES_MAX, UPDATE_TYPE, UpdateOfModule, UpdateStatement
from weft.server import rounds
from weft.server.admission import (
    AcceptedStatement,
    check_lease,
    check_rounds,
    check_statement,
    repeat_of,
    staleness,
    tokens_of,
)
from weft.server.assignment import Lease
from weft.server.backend import Caller
from weft.server.leasing import Leasing
from weft.server.merge.settings import Weights
from weft.server.paths import PathEvaluation, PathRecord, evaluated, not_measured
from weft.server.records import HoldingRecord
from weft.server.roster import Roster
from weft.server.rounds import Accept, Accepted, Keep, Round
from weft.server.run import Run
from weft.server.state import State

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A statement that its sender signed."""

    worker_id: WorkerId
    lease_token: str
    statement: Signed
    digest: Digest
    """Of the statement's payload."""
    said: UpdateStatement


class Intake:
    """Takes updates in, or refuses them without changing anything."""

    def __init__(self, state: State, leasing: Leasing, roster: Roster) -> None:
        self._state = state
        self._leasing = leasing
        self._roster = roster

    def read(self, caller: Caller, *, lease_token: str, statement: Signed) -> Submission:
        """Check the signature, and read what was signed; raises ForgedUpdate."""
        key = bytes.fromhex(self._roster.workers[caller.worker_id].public_key)
        if not statement.is_from(key, UPDATE_TYPE):
            raise ForgedUpdate("the statement is not signed by the key of the worker whose session this is")
        try:
            said = from_table(UpdateStatement, parse_json(statement.payload, STATEMENT_BYTES_MAX))
        except (InputError, UsageError, ValueError) as error:
            raise ForgedUpdate(f"the statement is malformed: {error}") from error
        return Submission(
            worker_id=caller.worker_id,
            lease_token=lease_token,
            statement=statement,
            digest=digest_of(statement.payload),
            said=said,
        )

    def first_receipt(self, submission: Submission) -> Receipt | None:
        """The receipt that the same submission got before; raises ConflictingUpdate, PermissionRefused."""
        said = submission.said
        first = repeat_of(
            submission.digest, said.task, said.epoch, submission.worker_id, self._state.accepted
        )
        if first is None:
            return None
        return Receipt(receipt_blake3=first.statement_digest, accepted_at=first.accepted_at)

    def admit(self, submission: Submission) -> tuple[Lease, Run]:
        """The lease that the submission is for; raises LeaseLost, RoundClosed, ForgedUpdate, PermissionRefused."""
        state = self._state
        lease = state.leases.get(submission.lease_token)
        if lease is not None and lease.worker_id == submission.worker_id:
            # A round that closed says more than the lease that went with it.
            run = state.runs[lease.run]
            check_rounds(lease, {module: run.current(module) for module in run.rounds}, run.run_file.rounds)
        lease = check_lease(lease, submission.worker_id, now_s=state.clock.monotonic())
        run = state.runs[lease.run]
        check_statement(submission.said, lease, recipe_digest=run.record.recipe_digest)
        return lease, run

    def screen(self, caller: Caller, lease: Lease, run: Run, submission: Submission) -> dict[str, float]:
        """The ingest gate; L2 norms by module. Raises UpdateRejected."""
        norms = {}
        for update in submission.said.updates:
            if not self._state.blobs.has(Digest(update.digest)):
                raise UpdateRejected(f"the update of module {update.module} was not uploaded")
            try:
                norms[update.module] = self._screen_module(caller, lease, run, update)
            except (UpdateRejected, InputError) as error:
                with self._state.lock:
                    live = self._state.seen(caller)
                    live.rejections[run.record.run] = live.rejections.get(run.record.run, 0) + 1
                logger.warning("update of %s for %s refused: %s", caller.worker_id, run.record.run, error)
                raise UpdateRejected(f"module {update.module}: {error.message}", hint=error.hint) from error
        return norms

    def _screen_module(self, caller: Caller, lease: Lease, run: Run, update: UpdateOfModule) -> float:
        module, blob = ModuleKey.parse(update.module), Digest(update.digest)
        path = self._state.blobs.path(blob)
        if self._is_copy(caller, run, blob):
            raise UpdateRejected(f"the update of module {module} is another worker's")
        if path.stat().st_size != update.size_bytes:
            raise UpdateRejected(f"the update of module {module} has another size than its statement says")
        return screen_update(
            path,
            run.schema(module).at_rank(lease.rank) if lease.rank else run.schema(module),
            run.codecs,
            wants_fisher=run.recipe.fisher.num_examples > 0,
            size_bytes_max=run.update_bytes_max(module),
            round_seed=seed_of(lease.run, update.module, dict(lease.rounds)[module]),
        ).norm

    def _is_copy(self, caller: Caller, run: Run, blob: Digest) -> bool:
        """Whether another worker handed the same bytes in: manifests name updates, and nobody may live off them."""
        if ("update", run.record.run) not in self._state.owners.get(blob, set()):
            return False
        updates = (
            update for rounds_ in run.rounds.values() for round_ in rounds_ for update in round_.updates
        )
        return any(
            update.update_digest == blob and update.worker_id != caller.worker_id for update in updates
        )

    def accept(self, lease: Lease, run: Run, submission: Submission, norms: dict[str, float]) -> Receipt:
        """Make the updates part of their rounds, durably; the lease has served its purpose."""
        state, said, now = self._state, submission.said, self._state.clock.now()
        accepted = AcceptedStatement(
            task_id=lease.task_id,
            epoch=lease.epoch,
            worker_id=lease.worker_id,
            statement_digest=submission.digest,
            accepted_at=now,
        )
        advanced = [
            self._advanced(lease, run, said, update, norm=norms[update.module], now=now)
            for update in said.updates
        ]
        path = self._evaluated(lease, run, said, now=now) if lease.purpose is Purpose.EVALUATE else None
        holding = _holding(lease, run, said) if lease.purpose is Purpose.ROUTE else None
        self._write(accepted, lease, submission, advanced, path=path, holding=holding)
        # Durable: from here on the receipt is true whatever happens.
        state.accepted[(lease.task_id, lease.epoch)] = accepted
        for round_ in advanced:
            run.rounds[round_.module][-1] = round_
            state.last_accept_s[(lease.run, round_.module)] = state.clock.monotonic()
        self._leasing.ended(lease)
        self._thank_backups(lease, run, advanced)
        if path is not None:
            run.paths[path.path] = path
        if holding is not None:
            run.take_holding(holding)
        state.live[lease.worker_id].since = now
        return Receipt(receipt_blake3=accepted.statement_digest, accepted_at=now)

    def _advanced(
        self,
        lease: Lease,
        run: Run,
        said: UpdateStatement,
        update: UpdateOfModule,
        *,
        norm: float,
        now: float,
    ) -> Round:
        inner, policy = run.recipe.inner, run.run_file.rounds
        tokens_asked = lease.num_steps * inner.batch_size * inner.sequence_length
        num_tokens = tokens_of(said.num_tokens, tokens_asked=tokens_asked)
        current = run.current(ModuleKey.parse(update.module))
        fresh = policy.staleness_weight(staleness(lease, current)) if policy.asynchronous else 1.0
        accepted = Accepted(
            worker_id=lease.worker_id,
            task_id=lease.task_id,
            epoch=lease.epoch,
            update_digest=Digest(update.digest),
            size_bytes=update.size_bytes,
            weight=fresh * self._weight(run, lease, num_tokens),
            num_tokens=num_tokens,
            num_steps=min(said.num_steps, lease.num_steps),
            norm=norm,
            loss=said.loss_last,
            duration_s=self._state.clock.monotonic() - lease.granted_s,
            accepted_at=now,
            experts=lease.path.experts,
            start_version=update.start_version,
            rank=lease.rank,
        )
        collecting = current.state is RoundState.COLLECTING
        return rounds.advance(current, Accept(accepted) if collecting else Keep(accepted), now)

    def _weight(self, run: Run, lease: Lease, num_tokens: int) -> float:
        match run.run_file.merge.weights:
            case Weights.TOKENS:
                return float(num_tokens)
            case Weights.SHARD:
                return max(1.0, run.path_size(lease.path, lease.worker_id))
            case Weights.EQUAL:
                return 1.0

    def _evaluated(self, lease: Lease, run: Run, said: UpdateStatement, *, now: float) -> PathRecord:
        """What is known of the lease's path once its evaluation counts."""
        record = run.paths.get(lease.path, PathRecord(run=lease.run, experts=lease.path.experts))
        source = run.source_of(lease.path, lease.worker_id)
        if said.validation_loss is None or not said.validation_labels:
            return not_measured(record, source)
        evaluation = PathEvaluation(
            versions=tuple(version for _, version in lease.starts),
            loss=said.validation_loss,
            num_labels=said.validation_labels,
            source=source,
            worker_id=lease.worker_id,
            at=now,
        )
        return evaluated(record, evaluation, run.run_file.paths)

    def _thank_backups(self, lease: Lease, run: Run, advanced: list[Round]) -> None:
        """Tell others at work on the path that its updates are in, as far as the round asked for them."""
        policy = run.run_file.rounds
        if policy.asynchronous:
            return
        for round_ in advanced:
            if sum(update.path == lease.path for update in round_.updates) >= policy.target:
                self._leasing.stop_all(round_, f"path {lease.path} has its updates", path=lease.path)

    def _write(
        self,
        accepted: AcceptedStatement,
        lease: Lease,
        submission: Submission,
        advanced: list[Round],
        *,
        path: PathRecord | None,
        holding: HoldingRecord | None,
    ) -> None:
        state, said, key = self._state, submission.said, f"{lease.task_id}/{lease.epoch}"
        with state.transaction():
            for round_ in advanced:
                state.write_round(round_)
            for update in said.updates:
                state.own(Digest(update.digest), "update", lease.run)
            state.ledger.put("accepted", key, accepted, run=lease.run)
            state.ledger.put_document("update", key, submission.statement, run=lease.run)
            state.ledger.delete("lease", lease.token)
            if path is not None:
                state.write_path(path)
            if holding is not None:
                state.write_holding(holding)
            state.log(lease.run, f"{lease.task_id} of {lease.worker_id} accepted: {_said(lease, said)}")


def _holding(lease: Lease, run: Run, said: UpdateStatement) -> HoldingRecord:
    """What the worker holds, as the ledger keeps it; paths that the run has not are refused."""
    assert run.router is not None  # noqa: S101 - documents are routed with one
    paths = {str(path) for path in run.recipe.topology.paths}
    if unknown := [item.path for item in said.holdings if item.path not in paths]:
        raise ForgedUpdate(f"the statement names path {unknown[0]}, which the run has not")
    return HoldingRecord(
        run=lease.run,
        worker_id=lease.worker_id,
        router=run.router.blake3,
        sequences={item.path: item.num_sequences for item in said.holdings},
        documents={item.path: item.num_documents for item in said.holdings},
    )


def _said(lease: Lease, said: UpdateStatement) -> str:
    """What a submission came to, for people."""
    match lease.purpose:
        case Purpose.TRAIN:
            return f"path {lease.path}, loss {said.loss_last:.4f}"
        case Purpose.EVALUATE:
            if said.validation_loss is None:
                return f"path {lease.path}, of which nothing is held out"
            return f"path {lease.path}, validation loss {said.validation_loss:.4f}"
        case Purpose.ROUTE:
            num_documents = sum(item.num_documents for item in said.holdings)
            return f"{num_documents} documents for {len(said.holdings)} path(s)"
