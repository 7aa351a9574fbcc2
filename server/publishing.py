"""Publishing: what becomes of a round, from the reason to close it to its version or its rollback.

Merging and gating are jobs for the engine, whose results come back as events; a round found in MERGING or GATING
after a restart gets its job again, which gives the same bytes. Everything here wants the state's lock held.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from weft.common.errors import DiskFull, StorageError, WeftError
from weft.common.ids import ModuleKey, RunId
from weft.common.protocol import RoundState
from weft.server import gate, rounds
from weft.server.assignment import RunView
from weft.server.engine import Engine
from weft.server.jobs import gate_job, merge_job
from weft.server.leasing import Leasing
from weft.server.records import VersionRecord
from weft.server.rounds import Candidate, Close, Gated, GateResult, Merged, MergeFailed, Round
from weft.server.run import ContentOf, Run
from weft.server.state import State
from weft.server.versions import next_version

logger = logging.getLogger(__name__)


class Publishing:
    """Closes rounds, has them merged and judged, publishes their versions."""

    def __init__(self, state: State, leasing: Leasing, engine: Engine, *, scratch: Path) -> None:
        self._engine = engine
        self._state = state
        self._leasing = leasing
        self._scratch = scratch
        self._jobs: set[tuple[RunId, ModuleKey]] = set()

    @property
    def busy(self) -> bool:
        """Whether the engine works for a round."""
        return bool(self._jobs)

    # ---- what is due ---------------------------------------------------------------------------------------------

    def pump(self) -> bool:
        """Do what every round is due; says whether anything changed."""
        changed = False
        for run in self._state.runs.values():
            view = self._state.view(run)
            for module in run.rounds:
                changed |= self._pump(run, module, view)
        return changed

    def _pump(self, run: Run, module: ModuleKey, view: RunView) -> bool:
        round_ = run.current(module)
        if round_.state is RoundState.COLLECTING:
            return round_.number <= view.policy.count and self._close_if_due(run, round_, view)
        if (run.record.run, module) in self._jobs or round_.state not in (
            RoundState.MERGING,
            RoundState.GATING,
        ):
            return False
        self._start_job(run, round_)
        return True

    def _close_if_due(self, run: Run, round_: Round, view: RunView) -> bool:
        state, now_s = self._state, self._state.clock.monotonic()
        in_flight = [lease.in_flight(now_s) for lease in state.leases.values() if lease.trains(round_)]
        last_s = state.last_accept_s.get((run.record.run, round_.module), now_s)
        reason = rounds.close_reason(
            round_,
            view.policy,
            in_flight,
            paths=view.active_through(round_.module),
            since_last_s=now_s - last_s,
        )
        if reason is None:
            if round_.updates:
                # After a restart the time of the last update is not known: patience starts afresh.
                state.last_accept_s.setdefault((run.record.run, round_.module), now_s)
            return False
        closed = rounds.advance(round_, Close(reason), state.clock.now())
        state.replace_round(run, closed, f"round {round_.number} of {round_.module} closed: {reason}")
        if not view.policy.asynchronous:
            self._leasing.stop_all(round_, f"round {round_.number} closed: {reason}")
        self._pump(run, round_.module, view)
        return True

    # ---- the engine ----------------------------------------------------------------------------------------------

    def _start_job(self, run: Run, round_: Round) -> None:
        if round_.state is RoundState.GATING and not run.run_file.gate.heldout:
            self._gated(run, round_.module, gate.without_data())
            return
        job = (
            merge_job(run, round_, self._state.blobs, self._scratch)
            if round_.state is RoundState.MERGING
            else gate_job(run, round_, self._state.blobs)
        )
        self._jobs.add((run.record.run, round_.module))
        self._engine.submit(job).add_done_callback(lambda done: self._job_done(run, round_, done))

    def _job_done(self, run: Run, round_: Round, done: Future[dict[str, Any]]) -> None:
        """Take the engine's result; runs in the engine's thread, without the lock."""
        if done.cancelled():
            return
        candidate = None
        try:
            if round_.state is RoundState.MERGING and done.exception() is None:
                # Hashing and syncing what may be gigabytes: every report would wait for it under the lock.
                candidate = self._candidate(done.result())
        except (StorageError, OSError) as error:
            with self._state.lock:
                self._try_again(run, round_, error)
            return
        with self._state.lock:
            self._jobs.discard((run.record.run, round_.module))
            try:
                # Asynchronous rounds take updates for the next one meanwhile: what is current may be another object.
                self._take_result(run, run.current(round_.module), done, candidate)
            except StorageError as error:
                self._try_again(run, round_, error)
        self._state.notify()

    def _try_again(self, run: Run, round_: Round, error: Exception) -> None:
        """A full disk, most likely: the round is as it was, and the next tick gives its job again."""
        self._jobs.discard((run.record.run, round_.module))
        logger.error("%s/%s is tried again: %s", run.record.run, round_.module, error)

    def _candidate(self, result: dict[str, Any]) -> Candidate:
        """What the engine wrote, taken over into the blobs."""
        blobs = self._state.blobs
        content = blobs.add_file(Path(result["candidate"]), move=True)
        outer_state = result.get("outer_state")
        return Candidate(
            digest=content.blake3,
            size_bytes=content.size_bytes,
            sha256=self._state.content_of(content.blake3, size_bytes=content.size_bytes).sha256,
            outer_state=blobs.add_file(Path(outer_state), move=True).blake3 if outer_state else None,
            truncation_error=result.get("truncation_error"),
            clipped=tuple(result.get("clipped", ())),
        )

    def _take_result(
        self, run: Run, round_: Round, done: Future[dict[str, Any]], candidate: Candidate | None
    ) -> None:
        error = done.exception()
        if isinstance(error, WeftError):
            if not self._state.draining:
                self._job_failed(run, round_, error)
        elif error is not None:
            logger.error("engine job of %s/%s failed", run.record.run, round_.module, exc_info=error)
        elif candidate is not None:
            self._merged(run, round_, candidate)
        else:
            losses = done.result()["losses"]
            tolerance = run.run_file.gate.tolerance
            result = gate.decide(**losses, tolerance=tolerance) if losses else gate.without_documents()
            self._gated(run, round_.module, result)

    def _job_failed(self, run: Run, round_: Round, error: WeftError) -> None:
        if isinstance(error, DiskFull):
            # Says nothing about the updates: the round stays as it is, and the next tick tries again.
            logger.error("%s/%s waits for space: %s", run.record.run, round_.module, error)
        elif round_.state is RoundState.MERGING:
            failed = rounds.advance(round_, MergeFailed(error.message), self._state.clock.now())
            self._end_round(run, failed)
        else:
            self._gated(
                run,
                round_.module,
                GateResult(passed=False, reason=f"rolled back: the gate could not evaluate: {error.message}"),
            )

    def _merged(self, run: Run, round_: Round, candidate: Candidate) -> None:
        state = self._state
        merged = rounds.advance(round_, Merged(candidate), state.clock.now())
        state.replace_round(
            run, merged, f"round {round_.number} of {round_.module} merged {len(round_.updates)} update(s)"
        )
        self._pump(run, round_.module, state.view(run))

    # ---- the end of a round --------------------------------------------------------------------------------------

    def _gated(self, run: Run, module: ModuleKey, result: GateResult) -> None:
        self._end_round(run, rounds.advance(run.current(module), Gated(result), self._state.clock.now()))

    def _end_round(self, run: Run, ended: Round) -> None:
        """Publish or roll back: the version, its manifest and the next round become durable together."""
        state, now = self._state, self._state.clock.now()
        following = rounds.next_round(ended, now)
        with state.transaction():
            if ended.state is RoundState.PUBLISHED:
                version = self._publish(run, ended, now=now)
            state.write_round(ended)
            state.write_round(following)
            state.write_traffic(run)
            state.log(run.record.run, f"round {ended.number} of {ended.module}: {ended.reason}")
        if ended.state is RoundState.PUBLISHED:
            run.versions[ended.module].append(version)
        run.rounds[ended.module][-1:] = [ended, following]
        state.last_accept_s.pop((run.record.run, ended.module), None)
        if following.number > run.run_file.rounds.count:
            for lease in [lease for lease in state.leases.values() if lease.run == run.record.run]:
                if lease.rounds and all(
                    run.current(module).number > run.run_file.rounds.count for module, _ in lease.rounds
                ):
                    self._leasing.stop(lease, f"module {ended.module} has had its rounds")
        logger.info("%s round %d of %s: %s", run.record.run, ended.number, ended.module, ended.reason)
        if ended.candidate:
            # A published one has owners by now.
            for blob in ended.candidate.blobs:
                state.remove_unowned(blob)

    def _publish(self, run: Run, ended: Round, *, now: float) -> VersionRecord:
        assert ended.candidate is not None  # noqa: S101 - only a candidate can be published
        state = self._state
        made = ended.candidate
        content = ContentOf(digest=made.digest, size_bytes=made.size_bytes, sha256=made.sha256)
        version, document = next_version(run, ended, content, state.identity.signing_key, now=now)
        state.write_version(version, document)
        return version
