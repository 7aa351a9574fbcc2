"""The picture that people watch: built from the coordinator's state, without changing it."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping

from weft.common.ids import ModuleKey, Path, WorkerId
from weft.common.protocol import (
    LossPoint,
    ModuleStatus,
    PathStatus,
    Purpose,
    RoundState,
    RoundStatus,
    RunStatus,
    WorkerState,
    WorkerStatus,
)
from weft.server.assignment import Lease, RunView
from weft.server.live import LEASE_S, REJECTIONS_MAX, Live
from weft.server.records import WorkerRecord
from weft.server.rounds import ENDED, Round, waiting_reason
from weft.server.run import Run


def run_statuses(runs: Iterable[tuple[Run, RunView]], leases: tuple[Lease, ...]) -> tuple[RunStatus, ...]:
    """Runs with their modules, current rounds and paths."""
    return tuple(_run_status(run, view, leases) for run, view in runs)


def worker_statuses(
    workers: Iterable[WorkerRecord],
    live: Mapping[WorkerId, Live],
    leases: tuple[Lease, ...],
    *,
    accepted: Mapping[WorkerId, int],
    now_s: float,
) -> tuple[WorkerStatus, ...]:
    """Those on the roster, by id; ``accepted`` counts the submissions of each."""
    return tuple(
        dataclasses.replace(
            _worker_status(worker, live.get(worker.worker_id), leases, now_s=now_s),
            num_updates=accepted.get(worker.worker_id, 0),
        )
        for worker in sorted(workers, key=lambda worker: worker.worker_id)
    )


def round_statuses(
    run: Run, view: RunView, leases: Iterable[Lease], *, module: str = ""
) -> tuple[RoundStatus, ...]:
    """Past and present rounds, by module, then number."""
    held = tuple(leases)
    return tuple(
        round_status(round_, view, held)
        for key in sorted(run.rounds)
        if not module or str(key) == module
        for round_ in run.rounds[key]
        if round_.number <= run.run_file.rounds.count
    )


def round_status(round_: Round, view: RunView, leases: tuple[Lease, ...]) -> RoundStatus:
    """One round, with the reason for its state."""
    policy, paths = view.policy, view.active_through(round_.module)
    num_paths = 1 if policy.asynchronous else max(1, len(paths))
    in_flight = sum(lease.trains(round_) for lease in leases)
    collecting = round_.state is RoundState.COLLECTING
    gate = round_.gate
    return RoundStatus(
        run_id=round_.run,
        module=str(round_.module),
        round_number=round_.number,
        base_version=round_.base_version,
        state=round_.state,
        reason=waiting_reason(round_, policy, in_flight, paths=paths) if collecting else round_.reason,
        num_updates=len(round_.updates),
        target=policy.buffer or policy.target * num_paths,
        quorum=policy.buffer or policy.quorum * num_paths,
        num_in_flight=in_flight,
        opened_at=round_.opened_at,
        ended_at=round_.ended_at,
        update_bytes=sum(update.size_bytes for update in round_.updates),
        loss_before=gate.loss_before if gate else None,
        loss_after=gate.loss_after if gate else None,
        loss_interval=gate.half_width if gate else None,
        contributors=tuple(sorted(round_.contributors)),
    )


def _run_status(run: Run, view: RunView, leases: tuple[Lease, ...]) -> RunStatus:
    updates = [update for rounds in run.rounds.values() for round_ in rounds for update in round_.updates]
    modules = tuple(_module_status(run, view, module, leases) for module in sorted(run.rounds))
    parameters = {module: run.schema(module).num_parameters for module in run.rounds}
    sent_bf16 = sum(
        2 * parameters[module] * len(round_.updates) for module in run.rounds for round_ in run.rounds[module]
    )
    waiting = [module.round.reason for module in modules if module.round.state not in ENDED][:8]
    return RunStatus(
        run_id=run.record.run,
        num_rounds=run.run_file.rounds.count,
        finished=view.finished,
        reason="finished" if view.finished else "; ".join(dict.fromkeys(waiting)),
        base_digest=run.recipe.base.digest,
        rule=run.run_file.rule_name,
        codec=run.recipe.codec.kind.value,
        modules=modules,
        bytes_up=sum(update.size_bytes for update in updates),
        bytes_down=run.traffic.bytes_down,
        bytes_up_bf16=sent_bf16,
        eta_s=_eta_s(run),
        paths=_path_statuses(run, view, leases) if run.recipe.topology.num_paths > 1 or run.paths else (),
    )


def _path_statuses(run: Run, view: RunView, leases: tuple[Lease, ...]) -> tuple[PathStatus, ...]:
    at_work: dict[Path, list[Lease]] = {}
    for lease in leases:
        if lease.run == run.record.run and lease.purpose is not Purpose.ROUTE:
            at_work.setdefault(lease.path, []).append(lease)
    return tuple(_path_status(run, view, path, at_work.get(path, [])) for path in run.recipe.topology.paths)


def _path_status(run: Run, view: RunView, path: Path, at_work: list[Lease]) -> PathStatus:
    record = run.paths.get(path)
    newest, best = (record.newest, record.best) if record else (None, None)
    current = [view.rounds[module] for module in path.modules]
    return PathStatus(
        path=str(path),
        state=_path_state(view, path, at_work),
        workers=tuple(sorted(lease.worker_id for lease in at_work)),
        num_in=sum(update.path == path for round_ in current for update in round_.updates),
        validation_loss=newest.loss if newest else None,
        best_loss=best.loss if best else None,
        best_versions=best.versions if best else (),
        num_sequences=sum(holding.sequences.get(str(path), 0) for holding in run.holdings.values())
        or run.num_documents(path),
    )


def _path_state(view: RunView, path: Path, at_work: list[Lease]) -> str:
    """One line for people."""
    if at_work:
        return ", ".join(sorted({lease.purpose.name.lower() for lease in at_work}))
    open_ = [
        view.rounds[module] for module in path.modules if view.rounds[module].number <= view.policy.count
    ]
    # Whoever left once a run was over is missed by nobody.
    over = not open_ and view.routes_locally and path not in view.stopped
    if not over and (reason := view.inactive.get(path)) is not None:
        return reason
    if not open_:
        return "has had its rounds"
    behind = [
        f"{round_.module} is {round_.state.name.lower()}"
        for round_ in open_
        if round_.state is not RoundState.COLLECTING or any(update.path == path for update in round_.updates)
    ]
    return f"waits: module {'; '.join(behind)}" if behind else "waits for a worker"


def _module_status(run: Run, view: RunView, module: ModuleKey, leases: tuple[Lease, ...]) -> ModuleStatus:
    rounds = run.rounds[module]
    newest = run.newest(module)
    shown = rounds[-1] if rounds[-1].number <= run.run_file.rounds.count else rounds[-2]
    return ModuleStatus(
        run_id=run.record.run,
        module=str(module),
        version=newest.version,
        num_parameters=run.schema(module).num_parameters,
        digest=newest.digest,
        round=round_status(shown, view, leases),
        losses=tuple(
            LossPoint(step=round_.number, loss=statistics.fmean(update.loss for update in round_.updates))
            for round_ in rounds
            if round_.updates
        ),
        heldout_losses=_heldout_losses(run, module),
    )


def _heldout_losses(run: Run, module: ModuleKey) -> tuple[LossPoint, ...]:
    """By version; the start's loss is the baseline that the first round was compared with."""
    first = next(
        (
            round_.gate.loss_before
            for round_ in run.rounds[module]
            if round_.gate and round_.base_version == 0
        ),
        None,
    )
    points = [] if first is None else [LossPoint(step=0, loss=first)]
    later = run.versions[module][1:]
    return (
        *points,
        *(
            LossPoint(step=item.version, loss=item.heldout_loss)
            for item in later
            if item.heldout_loss is not None
        ),
    )


def _eta_s(run: Run) -> float | None:
    """Mean duration of the rounds so far × rounds to come, of the module that is furthest behind."""
    durations = [
        # The wall clock may have been set back in between.
        max(0.0, round_.ended_at - round_.opened_at)
        for rounds in run.rounds.values()
        for round_ in rounds
        if round_.ended_at is not None
    ]
    if not durations:
        return None
    to_come = max(run.run_file.rounds.count - rounds[-1].number + 1 for rounds in run.rounds.values())
    return max(0, to_come) * statistics.fmean(durations)


def _worker_status(
    worker: WorkerRecord, live: Live | None, leases: tuple[Lease, ...], *, now_s: float
) -> WorkerStatus:
    lease = next((lease for lease in leases if lease.worker_id == worker.worker_id), None)
    return WorkerStatus(
        worker_id=worker.worker_id,
        display_name=worker.display_name,
        state=_worker_state(worker, live, lease, now_s=now_s),
        role=worker.role,
        device=worker.device,
        tokens_per_s=live.tokens_per_s if live else 0.0,
        run_id=lease.run if lease else "",
        task_id=lease.task_id if lease else "",
        stage=lease.stage if lease else None,
        num_done=lease.num_done if lease else 0,
        num_total=lease.num_total if lease else 0,
        since=live.since if live else worker.joined_at,
        seen_at=live.seen_at if live else None,
        loss=live.losses[-1].loss if live and live.losses else None,
        bytes_up=live.bytes_up if live else 0,
        bytes_down=live.bytes_down if live else 0,
        note=_note(live),
    )


def _worker_state(
    worker: WorkerRecord, live: Live | None, lease: Lease | None, *, now_s: float
) -> WorkerState:
    if worker.revoked:
        return WorkerState.REVOKED
    if not worker.approved:
        return WorkerState.PENDING
    if live is None or now_s - live.seen_s > 2 * LEASE_S + 30:
        return WorkerState.LOST
    return WorkerState.IDLE if lease is None else WorkerState.WORKING


def _note(live: Live | None) -> str:
    if live is None:
        return ""
    unable = [f"{run}: {reason}" for run, reason in sorted(live.unable.items())]
    refused = [
        f"{run}: {count} updates refused"
        for run, count in sorted(live.rejections.items())
        if count >= REJECTIONS_MAX
    ]
    return "; ".join([*unable, *refused])
