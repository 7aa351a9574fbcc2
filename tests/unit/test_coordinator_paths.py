"""A coordinator of several paths: shared modules, routing, evaluation, early stopping, asynchronous rounds."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import pytest
from tests.harness import DeferredEngine, Site, Worker, fake_job, memory_directory, routed, run_file

from weft.common.errors import (
    ForgedUpdate,
    InputError,
    NotFound,
    RoundClosed,
    RouterMismatch,
    RunFileError,
    UpdateTooStale,
)
from weft.common.ids import ModuleKey, Path
from weft.common.protocol import Limit, Purpose, Role, RoundState, Task
from weft.common.recipe import RoutingMode
from weft.common.statements import Holding
from weft.server.app import join_flags
from weft.server.backend import Caller

ONE = "count = 2\nquorum = 1\ntarget = 1"


def holding(path: str, num_sequences: int = 5) -> Holding:
    return Holding(path=path, num_documents=num_sequences, num_sequences=num_sequences)


@pytest.fixture
def directory() -> Iterator[FilePath]:
    made = memory_directory()
    yield made
    shutil.rmtree(made)


@pytest.fixture
def site(directory: FilePath) -> Site:
    return Site(directory / "site")


def given(site: Site, text: str = "", *, experts: tuple[int, ...] = (2, 2), rounds: str = ONE) -> None:
    sections = routed(site.directory, experts, mode="given")
    site.add_run(run_file(f"{text}\n{sections}", rounds=rounds))


def local(site: Site, text: str = "", *, experts: tuple[int, ...] = (2, 2), rounds: str = ONE) -> None:
    sections = routed(site.directory, experts)
    site.add_run(run_file(f"{text}\n{sections}", rounds=rounds))


def status_of(site: Site, path: str) -> Any:
    run = site.coordinator.get_status(site.operator, run_id="").runs[0]
    return next(item for item in run.paths if item.path == path)


def finish(site: Site, *workers: Worker) -> list[Task]:
    """Let workers take turns until there is nothing to do."""
    done = []
    for _ in range(200):
        idle = 0
        for worker in workers:
            answer = worker.poll()
            if answer.task is None:
                idle += 1
            else:
                worker.work(answer.task)
                done.append(answer.task)
        if idle == len(workers):
            return done
        site.coordinator.tick()
    raise AssertionError("it does not end")


# -- shared modules ------------------------------------------------------------------------------------------------


def test_one_worker_trains_a_grid_in_waves(site: Site) -> None:
    given(site)
    (worker,) = site.workers("a")
    tasks = finish(site, worker)
    waves = [task.path for task in tasks]
    assert (waves[:4], sorted(waves[4:])) == (["0.0", "0.1", "1.0", "1.1"], waves[:4])
    assert waves[4] == waves[3], "what it knows comes first"
    for rounds in site.run.rounds.values():
        assert [len(round_.updates) for round_ in rounds] == [2, 2, 0]
    assert worker.poll().finished


def test_every_task_names_the_shard_of_its_path(site: Site) -> None:
    given(site)
    (worker,) = site.workers("a")
    shards = {task.path: task.shard for task in finish(site, worker)}
    assert len({shard.blake3 for shard in shards.values() if shard}) == 4
    caller = Caller(worker_id=worker.caller.worker_id, role=Role.WORKER, runs=(), peer="")
    for shard in shards.values():
        assert shard is not None
        assert site.coordinator.get_blob(caller, blake3=shard.blake3).size_bytes == shard.size_bytes
        with pytest.raises(NotFound):
            site.coordinator.get_blob(dataclasses.replace(caller, role=Role.VIEWER), blake3=shard.blake3)


def test_a_straggler_delays_only_modules_that_it_shares(site: Site) -> None:
    given(site)
    slow, quick = site.workers("slow", "quick")
    assert slow.task().path == "0.0"
    assert sorted(task.path for task in finish(site, quick)) == ["0.1", "1.0", "1.1", "1.1"]
    assert {str(key): rounds[-1].number for key, rounds in site.run.rounds.items()} == {
        "0.0": 1,
        "0.1": 2,
        "1.0": 1,
        "1.1": 2,
    }


def test_who_is_faster_ends_the_task_of_a_backup(site: Site) -> None:
    given(site, rounds=f"{ONE}\nbackups = 1")
    a, *others, c = site.workers("a", "b1", "b2", "b3", "c")
    first = a.task()
    assert len({worker.task().path for worker in others} | {first.path}) == 4
    backup = c.task()
    assert (backup.path, backup.task_id != first.task_id) == (first.path, True)
    ready = a.ready(first)
    c.work(backup)
    with pytest.raises(RoundClosed, match=r"path 0\.0"):
        a.submit(first, ready)
    assert a.report(first).reason.startswith("path 0.0 has its updates")


def test_path_specific_levels_have_a_module_for_each_path(site: Site) -> None:
    given(site, experts=(2, 2, 0))
    (worker,) = site.workers("a")
    finish(site, worker)
    counts = {str(key): len(rounds[0].updates) for key, rounds in site.run.rounds.items()}
    assert counts == {"0.0": 2, "0.1": 2, "1.0": 2, "1.1": 2, "2.0": 1, "2.1": 1, "2.2": 1, "2.3": 1}


def test_a_shard_that_vanished_takes_its_path_out_and_nothing_else(site: Site) -> None:
    given(site)
    lost = site.run.shard(Path((0, 1)))
    assert lost is not None
    site.blobs.path(lost.blake3).unlink()
    (worker,) = site.workers("a")
    tasks = finish(site, worker)
    assert sorted(task.path for task in tasks) == ["0.0", "0.0", "1.0", "1.0", "1.1", "1.1"]
    assert "vanished" in status_of(site, "0.1").state
    assert worker.poll().finished


def test_weights_follow_the_data_behind_a_path(site: Site) -> None:
    local(site, '[merge]\nweights = "shard"', experts=(2,))
    (worker,) = site.workers("a")
    worker.holdings = (holding("0", 30), holding("1", 10))
    finish(site, worker)
    weights = {str(key): rounds[0].updates[0].weight for key, rounds in site.run.rounds.items()}
    assert weights == {"0.0": 30.0, "0.1": 10.0}


# -- local data ----------------------------------------------------------------------------------------------------


def test_a_worker_says_what_it_holds_and_gets_those_paths(site: Site) -> None:
    local(site)
    (worker,) = site.workers("a")
    worker.holdings = (holding("0.1"), holding("1.0", 0))
    task = worker.task()
    assert (task.purpose, task.modules, task.num_steps) == (Purpose.ROUTE, (), 0)
    assert task.router is not None
    tasks = finish(site, worker)
    assert [(task.purpose, task.path) for task in tasks[1:]] == [(Purpose.TRAIN, "0.1")] * 2
    assert worker.poll().finished
    assert "let one with such data join" in status_of(site, "1.1").state
    assert status_of(site, "0.1").num_sequences == 5


def test_a_path_that_nobody_holds_any_more_is_not_waited_for(site: Site) -> None:
    local(site, experts=(2,), rounds="count = 1\nquorum = 1\ntarget = 2\nstraggler_factor = 1000")
    a, b = site.workers("a", "b")
    a.holdings, b.holdings = (holding("0"),), (holding("0"), holding("1"))
    a.work(), b.work()
    assert (a.task().path, b.task().path) == ("0", "1")
    a.work(a.task())
    site.clock.advance(61)
    site.coordinator.tick()
    a.open_session()
    a.poll()
    assert status_of(site, "1").state.startswith("no worker that is here")


def test_what_is_held_survives_a_restart_but_not_another_router(site: Site) -> None:
    local(site)
    (worker,) = site.workers("a")
    worker.holdings = (holding("0.0"),)
    worker.work()
    site.restart()
    worker.open_session()
    assert worker.task().purpose is Purpose.TRAIN
    other = run_file(routed(site.directory, (2, 2), seed=1), rounds=ONE)
    assert site.coordinator.check_same(other)
    worker.site.coordinator.release_task(worker.caller, lease_token=worker.task().lease_token, reason="test")
    assert worker.task().purpose is Purpose.ROUTE


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"holdings": [{"path": "7.7", "num_documents": 1, "num_sequences": 1}]}, "path 7.7"),
        ({"validation_loss": 1.0}, "task to route"),
    ],
)
def test_what_does_not_belong_to_routing_is_forged(site: Site, changes: dict[str, Any], said: str) -> None:
    local(site)
    (worker,) = site.workers("a")
    task = worker.task()
    with pytest.raises(ForgedUpdate, match=said):
        worker.submit(task, worker.statement(task, {}, changes))
    assert not site.run.holdings


# -- evaluation ----------------------------------------------------------------------------------------------------


def test_paths_are_evaluated_and_the_best_versions_resolve(site: Site) -> None:
    given(site, "[paths]\nevaluate_every = 1", rounds="count = 3\nquorum = 1\ntarget = 1", experts=(2,))
    (worker,) = site.workers("a")
    losses = {0: 3.0, 1: 2.0, 2: 2.5, 3: 2.4}
    worker.validation_loss = lambda task: losses[task.modules[0].version]
    tasks = finish(site, worker)
    evaluated = [(task.path, task.modules[0].version) for task in tasks if task.purpose is Purpose.EVALUATE]
    assert sorted(evaluated) == [(path, version) for path in "01" for version in range(4)]
    assert (status_of(site, "0").validation_loss, status_of(site, "0").best_loss) == (2.4, 2.0)
    manifests = site.coordinator.resolve_module(site.operator, ref="alpha/path:0@best").manifests
    assert [b'"version":1' in item.payload for item in manifests] == [True]
    site.restart()
    assert status_of(site, "0").best_versions == (1,)


def test_a_path_is_evaluated_by_the_same_worker_while_it_is_here(site: Site) -> None:
    local(site, "[paths]\nevaluate_every = 1", experts=(2,), rounds="count = 3\nquorum = 1\ntarget = 1")
    a, b = site.workers("a", "b")
    for worker in (a, b):
        worker.holdings = (holding("0"), holding("1"))
    finish(site, a, b)
    for record in site.run.paths.values():
        assert len({item.worker_id for item in record.evaluations}) == 1


def test_what_holds_nothing_out_is_asked_once(site: Site) -> None:
    given(site, "[paths]\nevaluate_every = 1", experts=(2,))
    (worker,) = site.workers("a")
    worker.validation_loss = lambda task: None if task.path == "0" else 2.0
    tasks = finish(site, worker)
    asked = [task.path for task in tasks if task.purpose is Purpose.EVALUATE]
    assert (asked.count("0"), asked.count("1")) == (1, 3)
    assert worker.poll().finished


def test_a_path_that_learns_no_more_is_stopped(site: Site) -> None:
    text = "[paths]\nevaluate_every = 1\nearly_stop = 2"
    given(site, text, rounds="count = 9\nquorum = 1\ntarget = 1", experts=(2,))
    (worker,) = site.workers("a")
    worker.validation_loss = lambda task: 2.0 if task.path == "0" else 3.0 - task.modules[0].version / 10
    finish(site, worker)
    assert worker.poll().finished
    assert status_of(site, "0").state == "stopped early: 2 evaluations without a loss below 2.0000"
    assert [site.run.newest(ModuleKey(0, expert)).version for expert in (0, 1)] == [2, 9]


def test_best_needs_an_evaluation(site: Site) -> None:
    given(site)
    with pytest.raises(NotFound, match="was not evaluated"):
        site.coordinator.resolve_module(site.operator, ref="alpha/path:0.0@best")


# -- asynchronous rounds -------------------------------------------------------------------------------------------

BUFFER = "count = 4\nbuffer = 2\ntarget = 2\nstaleness_max = 1"


def test_an_asynchronous_round_takes_stale_updates_for_less(site: Site) -> None:
    site.add_run(run_file(rounds=BUFFER))
    slow, a, b = site.workers("slow", "a", "b")
    stale = slow.task()
    for worker in (a, a):
        worker.work()
    assert site.run.newest(ModuleKey(0, 0)).version == 1
    slow.work(stale)
    b.work()
    weights = [update.weight / update.num_tokens for update in site.run.rounds[ModuleKey(0, 0)][1].updates]
    assert sorted(weights) == [pytest.approx(0.5**0.5), 1.0]


def test_an_update_that_is_too_stale_is_refused_by_its_name(site: Site) -> None:
    site.add_run(run_file(rounds=BUFFER))
    slow, a = site.workers("slow", "a")
    stale = slow.task()
    for _ in range(4):
        a.work()
    with pytest.raises(UpdateTooStale, match="started 2 versions ago"):
        slow.work(stale)


def test_updates_that_come_while_merging_count_in_the_next_round(directory: FilePath) -> None:
    site = Site(directory / "site", make_engine=DeferredEngine)
    site.add_run(run_file(rounds=BUFFER))
    a, b = site.workers("a", "b")
    a.work(), b.work()
    assert site.current().state is RoundState.MERGING
    a.work()
    site.restart()
    a.open_session()
    b.open_session()
    site.coordinator.tick()
    assert isinstance(site.engine, DeferredEngine)
    site.engine.step()
    assert (site.current().number, len(site.current().updates)) == (2, 1)
    b.work()
    assert site.current().state is RoundState.MERGING


def test_steps_follow_the_speed_of_the_worker(site: Site) -> None:
    site.add_run(run_file(rounds=f"{ONE}\nsteps_by_speed = true"))
    slow, quick = site.workers("slow", "quick")
    for worker, speed in ((slow, 10.0), (quick, 40.0)):
        site.coordinator.state.seen(worker.caller).tokens_per_s = speed
    assert slow.task().num_steps == 1


def test_a_worker_of_small_memory_trains_a_slice(site: Site) -> None:
    given(site)
    (worker,) = site.workers("a")
    limits = (Limit(run_id="alpha", rank_max=1, levels_max=1),)
    answer = site.coordinator.poll_task(worker.caller, unable=(), tokens_per_s=0.0, limits=limits)
    assert answer.task is not None
    assert (answer.task.rank, sum(start.train for start in answer.task.modules)) == (1, 1)


# -- what does not fit together ------------------------------------------------------------------------------------


def test_a_router_of_other_paths_is_refused(site: Site) -> None:
    text = routed(site.directory, (2, 2)).replace("[2, 2]", "[2, 3]")
    with pytest.raises(RouterMismatch, match="4 paths"):
        site.add_run(run_file(text))
    assert not site.coordinator.runs


def test_shards_of_another_router_are_refused(site: Site) -> None:
    one, other = (routed(site.directory, (2, 2), mode="given", seed=seed) for seed in (0, 1))
    text = one.replace("shards0", "shards1")
    assert text != other
    with pytest.raises(RouterMismatch, match=r"routing\.shards were made with router"):
        site.add_run(run_file(text))


def test_a_shard_that_changed_is_refused(site: Site) -> None:
    text = routed(site.directory, (2, 2), mode="given")
    shard = site.directory / "shards0" / "path-0.0.jsonl"
    shard.write_bytes(shard.read_bytes().replace(b"text 0", b"text 9"))
    with pytest.raises(InputError, match="changed since"):
        site.add_run(run_file(text))


def test_another_topology_is_another_run(site: Site) -> None:
    given(site)
    other = run_file(
        routed(site.directory, (2, 2), mode="given", seed=2).replace("[2, 2]", "[4]"), rounds=ONE
    )
    with pytest.raises(RunFileError, match="exists with other settings"):
        site.coordinator.check_same(other)


def test_a_module_whose_merges_all_fail_stays_and_the_rest_goes_on(directory: FilePath) -> None:
    from weft.common.errors import EngineFailed

    def job(job: dict[str, Any]) -> dict[str, Any]:
        if "-0.1-" in job.get("candidate", ""):
            raise EngineFailed("no")
        return fake_job(job)

    site = Site(directory / "site", job=job)
    given(site)
    (worker,) = site.workers("a")
    finish(site, worker)
    versions = {str(key): site.run.newest(key).version for key in site.run.rounds}
    assert versions == {"0.0": 2, "0.1": 0, "1.0": 2, "1.1": 2}
    assert worker.poll().finished


@pytest.mark.parametrize(
    ("modes", "flags"),
    [
        ({RoutingMode.NONE}, " --data PATH"),
        ({RoutingMode.GIVEN}, ""),
        ({RoutingMode.GIVEN, RoutingMode.LOCAL}, " --data PATH"),
    ],
)
def test_the_join_line_asks_for_data_that_somebody_trains_on(modes: set[RoutingMode], flags: str) -> None:
    assert join_flags(modes, insecure=False) == flags
    assert join_flags(modes, insecure=True) == f"{flags} --insecure"
