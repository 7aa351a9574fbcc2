"""What people watch: every state with its reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.harness import DeferredEngine, Site, Worker, bare, fake_job, memory_directory, run_file

from weft.common.errors import EngineFailed, NotFound
from weft.common.protocol import LossPoint, RoundState, RoundStatus, Stage, Status, WorkerState, WorkerStatus
from weft.common.settings import to_table


@pytest.fixture
def open_site() -> Iterator[Callable[..., Site]]:
    directory = memory_directory()
    sites: list[Site] = []

    def make(rounds: str = "count = 2\nquorum = 2\ntarget = 3", **more: Any) -> Site:
        site = Site(directory / f"s{len(sites)}", **more)
        site.add_run(run_file(rounds=rounds))
        sites.append(site)
        return site

    yield make
    for site in sites:
        site.crash()
    shutil.rmtree(directory)


def status(site: Site, run_id: str = "") -> Status:
    found: Status = bare(site.coordinator.get_status(site.operator, run_id=run_id))
    return found


def round_of(site: Site) -> RoundStatus:
    return status(site).runs[0].modules[0].round


def worker_of(site: Site, worker: Worker) -> WorkerStatus:
    return next(item for item in status(site).workers if item.worker_id == worker.worker_id)


def test_a_collecting_round_says_what_it_waits_for(open_site: Callable[..., Site]) -> None:
    site = open_site()
    said = [round_of(site).reason]
    a, b = site.workers("a", "b")
    task = a.task()
    said.append(round_of(site).reason)
    a.work(task)
    said.append(round_of(site).reason)
    b.work()
    said.append(round_of(site).reason)
    assert said == [
        "0 of 2 updates for a quorum; no worker at work",
        "0 of 2 updates for a quorum; 1 worker(s) at work",
        "1 of 2 updates for a quorum; no worker at work",
        "0 of 2 updates for a quorum; no worker at work",
    ]
    assert status(site).runs[0].reason == said[-1]


def test_a_merging_round_says_why_it_closed(open_site: Callable[..., Site]) -> None:
    site = open_site("count = 1\nquorum = 1\ntarget = 1", make_engine=DeferredEngine)
    (a,) = site.workers("a")
    a.work()
    shown = round_of(site)
    assert (shown.state, shown.reason) == (RoundState.MERGING, "target: 1 of 1 updates")
    site.engine.step()  # type: ignore[attr-defined]
    run = status(site).runs[0]
    assert run.finished
    assert run.reason == "finished"
    assert run.modules[0].round.state is RoundState.PUBLISHED
    assert "no held-out data" in run.modules[0].round.reason
    assert run.modules[0].version == 1
    assert run.eta_s == 0


def test_a_rolled_back_round_stays_to_be_seen(open_site: Callable[..., Site]) -> None:
    def failing(job: dict[str, Any]) -> dict[str, Any]:
        raise EngineFailed("no memory")

    site = open_site("count = 1\nquorum = 1\ntarget = 1", job=failing)
    site.workers("a")[0].work()
    (shown,) = bare(site.coordinator.list_rounds(site.operator, run_id="alpha", module=""))
    assert (shown.state, shown.reason) == (RoundState.ROLLED_BACK, "merge failed: no memory")
    assert shown.num_updates == 1
    assert status(site).runs[0].modules[0].version == 0


def test_workers_are_shown_with_what_they_do(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, b = site.workers("a", "b")
    late = Worker(site, "late")
    late.join(site.token(needs_approval=True))
    task = a.task()
    site.coordinator.report_progress(
        a.caller,
        lease_token=task.lease_token,
        stage=Stage.TRAINING,
        num_done=3,
        num_total=4,
        tokens_per_s=12.5,
        losses=(LossPoint(step=1, loss=4.0), LossPoint(step=3, loss=3.5)),
    )
    shown = worker_of(site, a)
    assert (shown.state, shown.stage, shown.num_done, shown.num_total) == (
        WorkerState.WORKING,
        Stage.TRAINING,
        3,
        4,
    )
    assert (shown.loss, shown.tokens_per_s, shown.task_id, shown.run_id) == (3.5, 12.5, task.task_id, "alpha")
    b.poll()
    site.coordinator.release_task(b.caller, lease_token=b.task().lease_token, reason="enough")
    assert worker_of(site, b).state is WorkerState.IDLE
    assert worker_of(site, late).state is WorkerState.PENDING
    site.clock.advance(61)
    site.coordinator.tick()
    assert worker_of(site, a).state is WorkerState.LOST
    site.coordinator.revoke_worker(site.operator, worker_id=b.worker_id)
    assert worker_of(site, b).state is WorkerState.REVOKED


def test_curves_bytes_and_the_time_to_come(open_site: Callable[..., Site]) -> None:
    site = open_site("count = 3\nquorum = 1\ntarget = 1")
    (a,) = site.workers("a")
    for _ in range(2):
        task = a.task()
        site.clock.advance(10)
        a.work(task)
    run = status(site, "alpha").runs[0]
    assert [point.step for point in run.modules[0].losses] == [1, 2]
    assert [point.loss for point in run.modules[0].losses] == [2.5, 2.5]
    assert run.eta_s == pytest.approx(10.0)
    assert run.bytes_up == sum(
        item.size_bytes for rounds in site.run.rounds.values() for r in rounds for item in r.updates
    )
    assert run.bytes_up_bf16 == 2 * 2 * (2 * 8 + 6 * 2)
    assert worker_of(site, a).num_updates == 2


def test_a_clock_set_back_gives_no_negative_time(open_site: Callable[..., Site]) -> None:
    site = open_site("count = 3\nquorum = 1\ntarget = 1")
    (a,) = site.workers("a")
    task = a.task()
    site.clock.jump(-86_400)
    a.work(task)
    assert status(site).runs[0].eta_s == 0


def test_held_out_losses_start_with_the_start(open_site: Callable[..., Site]) -> None:
    directory = memory_directory()
    (directory / "heldout.txt").write_text("x")
    site = Site(directory / "s", job=fake_job)
    site.add_run(
        run_file(
            f'[gate]\nheldout = "{directory / "heldout.txt"}"', rounds="count = 2\nquorum = 1\ntarget = 1"
        )
    )
    site.workers("a")[0].work()
    module = status(site).runs[0].modules[0]
    assert [(point.step, point.loss) for point in module.heldout_losses] == [(0, 2.0), (1, 1.9)]
    (first, _) = bare(site.coordinator.list_rounds(site.operator, run_id="alpha", module="0.0"))
    assert (first.loss_before, first.loss_after, first.loss_interval) == (2.0, 1.9, 0.05)
    site.crash()
    shutil.rmtree(directory)


def test_a_round_that_nobody_asked_for_is_not_found(open_site: Callable[..., Site]) -> None:
    site = open_site()
    with pytest.raises(NotFound):
        site.coordinator.list_rounds(site.operator, run_id="beta", module="")
    with pytest.raises(NotFound):
        site.coordinator.list_versions(site.operator, run_id="alpha", module="9.9")


def test_looking_changes_nothing_and_can_be_written_down(open_site: Callable[..., Site]) -> None:
    site = open_site()
    a, _ = site.workers("a", "b")
    a.work()
    first = status(site)
    assert status(site) == first
    json.dumps(to_table(first), allow_nan=False)
