"""Leasing: who holds which task, from the grant to its end. Everything here wants the state's lock held."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable

from weft.common.ids import Path, RunId, TaskId, WorkerId
from weft.common.protocol import Limit, LossPoint, PollAnswer, ProgressAnswer, Purpose, Stage, Unable
from weft.server.admission import check_lease
from weft.server.assignment import Asker, Lease, Offer, choose, steps_for
from weft.server.backend import Caller
from weft.server.live import GAVE_BACK_S, LEASE_S, LOSSES_KEPT, REJECTIONS_MAX, Live
from weft.server.rounds import Round
from weft.server.run import Run
from weft.server.state import State
from weft.server.transfers import Transfers

logger = logging.getLogger(__name__)


class Leasing:
    """Grants, keeps and ends leases."""

    def __init__(self, state: State, transfers: Transfers, rng_bytes: Callable[[int], bytes]) -> None:
        self._state = state
        self._transfers = transfers
        self._rng_bytes = rng_bytes

    # ---- what workers ask ----------------------------------------------------------------------------------------

    def note(
        self,
        caller: Caller,
        *,
        unable: tuple[Unable, ...],
        tokens_per_s: float,
        limits: tuple[Limit, ...] = (),
    ) -> None:
        """Note what a worker that asks for a task says of itself."""
        live = self._state.seen(caller)
        live.tokens_per_s = tokens_per_s or live.tokens_per_s
        live.unable = {item.run_id: item.reason[:200] for item in unable[:100]}
        limits_now = {item.run_id: item for item in limits[:100]}
        # Who gave a task back since it was too large gets a smaller one at once.
        live.gave_back = {
            task: at_s
            for task, at_s in live.gave_back.items()
            if live.limits.get(task[0]) == limits_now.get(task[0])
        }
        live.limits = limits_now

    def poll(self, caller: Caller) -> PollAnswer:
        """A task, the caller's own when it holds a lease, or a reason to wait."""
        live = self._state.live[caller.worker_id]
        for lease in self._held_by(caller.worker_id):
            if not lease.stop_reason and _serves(live, lease.run):
                return self._answer(self._polled_again(lease))
            self.drop(lease, lease.stop_reason or "this worker gets no more tasks of the run")
        if self._state.draining:
            return PollAnswer(task=None, wait_reason="the coordinator is stopping", finished=False)
        mine = [run for name, run in self._state.runs.items() if caller.may_see(name) and _serves(live, name)]
        views = [self._state.view(run) for run in mine]
        choice = choose(self._asker(caller.worker_id, mine), views, tuple(self._state.leases.values()))
        if isinstance(choice, Offer):
            if self._has_lost_shard(choice):
                return self.poll(caller)
            return self._answer(self._grant(caller, choice))
        return PollAnswer(task=None, wait_reason=choice.reason, finished=choice.finished and not live.unable)

    def report(
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
        state = self._state
        live, now_s = state.seen(caller), state.clock.monotonic()
        lease = check_lease(state.leases.get(lease_token), caller.worker_id, now_s=now_s)
        if lease.stop_reason:
            self.drop(lease, lease.stop_reason)
            return ProgressAnswer(stop=True, reason=lease.stop_reason)
        moved = (stage.value, num_done) > (lease.stage.value, lease.num_done)
        if stage is not lease.stage:
            live.since = state.clock.now()
        progress_s = now_s if moved else lease.progress_s
        state.leases[lease_token] = dataclasses.replace(
            lease,
            stage=stage,
            num_done=num_done,
            num_total=num_total,
            progress_s=progress_s,
            expires_s=min(now_s + LEASE_S, progress_s + state.runs[lease.run].recipe.idle_s),
        )
        live.tokens_per_s = tokens_per_s or live.tokens_per_s
        live.losses = [*live.losses, *losses[:100]][-LOSSES_KEPT:]
        return ProgressAnswer(stop=False, reason="")

    def release(self, caller: Caller, *, lease_token: str, reason: str) -> None:
        """Give a lease back; one that is over already is no error."""
        self._state.seen(caller)
        lease = self._state.leases.get(lease_token)
        if lease is not None and lease.worker_id == caller.worker_id:
            live = self._state.live[caller.worker_id]
            live.gave_back[(lease.run, lease.path, lease.purpose)] = self._state.clock.monotonic()
            self.drop(lease, f"given back: {reason[:200]}")

    # ---- how leases end ------------------------------------------------------------------------------------------

    def drop(self, lease: Lease, reason: str) -> None:
        """End a lease, durably."""
        state = self._state
        with state.transaction():
            state.ledger.delete("lease", lease.token)
            state.log(lease.run, f"{lease.task_id} of {lease.worker_id} ended: {reason}")
        self.ended(lease)
        if lease.worker_id in state.live:
            state.live[lease.worker_id].since = state.clock.now()
        logger.info("%s of %s ended: %s", lease.task_id, lease.worker_id, reason)

    def drop_of(self, worker_id: str, reason: str) -> None:
        """End the leases of a worker."""
        for lease in self._held_by(worker_id):
            self.drop(lease, reason)

    def drop_expired(self) -> bool:
        """End the leases whose time is over; says whether there were any."""
        state, now_s = self._state, self._state.clock.monotonic()
        expired = [lease for lease in state.leases.values() if now_s >= lease.expires_s]
        for lease in expired:
            silent = now_s - lease.progress_s >= state.runs[lease.run].recipe.idle_s
            self.drop(lease, "no progress within the idle time" if silent else f"silent for {LEASE_S:.0f} s")
        return bool(expired)

    def ended(self, lease: Lease) -> None:
        """Take leave of a lease that the ledger has no more."""
        del self._state.leases[lease.token]
        self._transfers.forget(lease.token)

    def stop_all(self, round_: Round, reason: str, *, path: Path | None = None) -> None:
        """Tell the workers at work on a round, or on one path of it, at their next report, that it takes no more."""
        for lease in [lease for lease in self._state.leases.values() if lease.trains(round_)]:
            if path is None or lease.path == path:
                self.stop(lease, reason)

    def stop(self, lease: Lease, reason: str) -> None:
        """Tell the worker of a lease, at its next report, to drop the task."""
        self._state.leases[lease.token] = dataclasses.replace(lease, stop_reason=reason)

    # ---- how they begin ------------------------------------------------------------------------------------------

    def _grant(self, caller: Caller, offer: Offer) -> Lease:
        state = self._state
        run, now_s, epoch = state.runs[offer.run], state.clock.monotonic(), state.epoch + 1
        lease = Lease(
            task_id=TaskId(f"t-{epoch}"),
            run=offer.run,
            worker_id=caller.worker_id,
            token=self._rng_bytes(16).hex(),
            epoch=epoch,
            purpose=offer.purpose,
            path=offer.path,
            rounds=tuple((round_.module, round_.number) for round_ in offer.train),
            starts=()
            if offer.purpose is Purpose.ROUTE
            else tuple((module, run.newest(module).version) for module in offer.path.modules),
            num_steps=self._num_steps(run, caller.worker_id) if offer.purpose is Purpose.TRAIN else 0,
            rank=offer.rank,
            granted_s=now_s,
            expires_s=now_s + LEASE_S,
            progress_s=now_s,
        )
        with state.transaction():
            state.write_lease(lease)
            state.ledger.set_meta("epoch", str(epoch))
        state.epoch = epoch
        state.leases[lease.token] = lease
        live = state.live[caller.worker_id]
        live.since, live.losses = state.clock.now(), []
        if offer.purpose is Purpose.TRAIN:
            live.recent[offer.run] = offer.path
        state.notify()
        return lease

    def _asker(self, worker_id: WorkerId, runs: Iterable[Run]) -> Asker:
        live, now_s = self._state.live[worker_id], self._state.clock.monotonic()
        live.gave_back = {task: at_s for task, at_s in live.gave_back.items() if now_s - at_s < GAVE_BACK_S}
        return Asker(
            worker_id=worker_id,
            holds={run.record.run: run.holds[worker_id] for run in runs if worker_id in run.holds},
            limits=live.limits,
            recent=live.recent,
            gave_back=frozenset(live.gave_back),
        )

    def _has_lost_shard(self, offer: Offer) -> bool:
        """Whether the path's shard is gone; the run then goes on without the path."""
        run = self._state.runs[offer.run]
        shard = run.shard(offer.path)
        if offer.purpose is Purpose.ROUTE or shard is None or self._state.blobs.has(shard.blake3):
            return False
        run.lost_shards.add(offer.path)
        logger.error("%s: the shard of path %s vanished from the state directory", offer.run, offer.path)
        with self._state.transaction():
            self._state.log(
                offer.run, f"the shard of path {offer.path} vanished; the run goes on without the path"
            )
        return True

    def _num_steps(self, run: Run, worker_id: WorkerId) -> int:
        steps, live = run.recipe.inner.steps, self._state.live
        if not run.run_file.rounds.steps_by_speed:
            return steps
        speeds = [one.tokens_per_s for who, one in live.items() if self._state.is_present(who)]
        return steps_for(steps, speed=live[worker_id].tokens_per_s, fastest=max(speeds, default=0.0))

    def _polled_again(self, lease: Lease) -> Lease:
        """Who asks again does not know of its task, or lost what it had: progress counts from the start.

        Asking is a sign of life and no progress: the idle time goes on.
        """
        state = self._state
        ends_s = lease.progress_s + state.runs[lease.run].recipe.idle_s
        state.leases[lease.token] = dataclasses.replace(
            lease,
            stage=Stage.FETCHING,
            num_done=0,
            num_total=0,
            expires_s=min(state.clock.monotonic() + LEASE_S, ends_s),
        )
        return state.leases[lease.token]

    def _held_by(self, worker_id: str) -> list[Lease]:
        return [lease for lease in self._state.leases.values() if lease.worker_id == worker_id]

    def _answer(self, lease: Lease) -> PollAnswer:
        task = self._state.runs[lease.run].task(lease, lease_s=LEASE_S)
        return PollAnswer(task=task, wait_reason="", finished=False)


def _serves(live: Live, run: RunId) -> bool:
    return run not in live.unable and live.rejections.get(run, 0) < REJECTIONS_MAX
