"""Which task a worker gets, and why it gets none."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.harness import accepted_update as update

from weft.common.ids import ModuleKey, Path, RunId, TaskId, WorkerId
from weft.common.modules import Topology
from weft.common.protocol import Limit, Purpose, RoundState, Stage
from weft.server.assignment import Asker, Lease, Offer, RunView, Wait, steps_for
from weft.server.assignment import choose as choose_for
from weft.server.rounds import Round, RoundPolicy


def view(
    name: str = "r",
    *,
    experts: tuple[int, ...] = (1,),
    per_task: int = 0,
    number: int = 1,
    count: int = 3,
    target: int = 2,
) -> RunView:
    topology = Topology(experts=experts, levels_per_task=per_task)
    rounds = {
        module: Round(run=RunId(name), module=module, number=number, base_version=number - 1, opened_at=0.0)
        for module in topology.modules
    }
    policy = RoundPolicy(count=count, quorum=1, target=target)
    return RunView(
        run=RunId(name), topology=topology, policy=policy, rounds=rounds, active=frozenset(topology.paths)
    )


def changed(run: RunView, module: ModuleKey, **changes: object) -> RunView:
    return dataclasses.replace(
        run,
        rounds={**run.rounds, module: dataclasses.replace(run.rounds[module], **changes)},  # type: ignore[arg-type]
    )


def leased(worker: str, offer: Offer, number: int = 1) -> Lease:
    return Lease(
        task_id=TaskId(f"t-{worker}-{number}"),
        run=offer.run,
        worker_id=WorkerId(worker),
        token=f"{worker}{number}",
        epoch=number,
        path=offer.path,
        rounds=tuple((round_.module, round_.number) for round_ in offer.train),
        starts=tuple((module, 0) for module in offer.path.modules),
        num_steps=4,
        granted_s=0.0,
        expires_s=15.0,
        progress_s=0.0,
    )


def choose(worker: WorkerId, runs: Sequence[RunView], leases: Sequence[Lease]) -> Offer | Wait:
    return choose_for(Asker(worker_id=worker), runs, leases)


def offer_of(choice: Offer | Wait) -> Offer:
    assert isinstance(choice, Offer), choice
    return choice


def wait_of(choice: Offer | Wait) -> Wait:
    assert isinstance(choice, Wait), choice
    return choice


A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")
M0, M1 = ModuleKey(0, 0), ModuleKey(1, 0)


def test_a_round_asks_for_as_many_workers_as_its_target() -> None:
    run = view(target=2)
    leases: list[Lease] = []
    for worker in (A, B):
        leases.append(leased(worker, offer_of(choose(worker, [run], leases))))
    wait = wait_of(choose(C, [run], leases))
    assert wait.reason == "r: its rounds have all the workers they ask for, or this one's update already"
    assert not wait.finished


def test_who_is_in_the_round_waits_for_the_next() -> None:
    run = changed(view(), M0, updates=(update("a"),))
    assert isinstance(choose(A, [run], []), Wait)
    assert offer_of(choose(B, [run], [])).train[0].number == 1


def test_a_merging_round_is_waited_for_by_name() -> None:
    for state in (RoundState.MERGING, RoundState.GATING):
        wait = wait_of(choose(A, [changed(view(), M0, state=state)], []))
        assert wait.reason == f"r: module 0.0 is {state.name.lower()}"


def test_a_path_with_a_merging_module_is_waited_for_though_another_collects() -> None:
    run = changed(view(experts=(1, 1), per_task=1), M0, state=RoundState.MERGING)
    assert wait_of(choose(A, [run], [])).reason == "r: module 0.0 is merging"


def test_a_module_that_has_had_its_rounds_holds_up_no_other() -> None:
    run = changed(view(experts=(1, 1)), M0, number=4)
    offer = offer_of(choose(A, [run], []))
    assert [round_.module for round_ in offer.train] == [M1]
    assert offer.path == Path((0, 0))


def test_shards_train_one_level_and_spread_over_both() -> None:
    run = view(experts=(1, 1), per_task=1, target=1)
    first = offer_of(choose(A, [run], []))
    second = offer_of(choose(B, [run], [leased("a", first)]))
    assert [[round_.module for round_ in offer.train] for offer in (first, second)] == [[M0], [M1]]
    assert isinstance(choose(C, [run], [leased("a", first), leased("b", second)]), Wait)


def test_without_shards_a_task_trains_its_whole_path() -> None:
    offer = offer_of(choose(A, [view(experts=(1, 1, 1))], []))
    assert [round_.module.level for round_ in offer.train] == [0, 1, 2]


def test_paths_fill_in_waves() -> None:
    run = view(experts=(2,), target=3)
    leases: list[Lease] = []
    paths = []
    for number in range(6):
        offer = offer_of(choose(WorkerId(f"w{number}"), [run], leases))
        paths.append(offer.path.experts)
        leases.append(leased(f"w{number}", offer))
    assert paths == [(0,), (1,)] * 3


def test_the_run_that_is_furthest_behind_comes_first() -> None:
    ahead, behind = view("ahead", number=3), view("behind", number=1)
    assert offer_of(choose(A, [ahead, behind], [])).run == "behind"
    assert offer_of(choose(A, [behind, ahead], [])).run == "behind"


def test_runs_that_are_equally_far_share_the_workers() -> None:
    runs = [view("x", target=9), view("y", target=9)]
    leases: list[Lease] = []
    for number in range(6):
        leases.append(leased(f"w{number}", offer_of(choose(WorkerId(f"w{number}"), runs, leases))))
    assert [lease.run for lease in leases] == ["x", "y"] * 3


def test_a_run_that_cannot_use_the_worker_does_not_hide_another() -> None:
    full = changed(view("full"), M0, updates=(update("a"),))
    assert offer_of(choose(A, [full, view("other", number=3)], [])).run == "other"


def test_no_run_and_finished_runs_are_told_apart() -> None:
    assert not wait_of(choose(A, [], [])).finished
    done = wait_of(choose(A, [view(number=4), view("s", number=4)], []))
    assert done == Wait("all runs are finished", finished=True)
    partly = wait_of(choose(A, [view(number=4), changed(view("s"), M0, state=RoundState.GATING)], []))
    assert partly.reason == "s: module 0.0 is gating; r is finished"
    assert not partly.finished


def test_progress_of_a_lease() -> None:
    lease = leased("a", offer_of(choose(A, [view()], [])))
    assert lease.in_flight(5.0).fraction_done == 0.0
    training = dataclasses.replace(lease, stage=Stage.TRAINING, num_done=1, num_total=4)
    assert training.in_flight(5.0).fraction_done == 0.25
    assert training.in_flight(5.0).remaining_s == 15.0
    for odd in (
        dataclasses.replace(training, num_done=9),
        dataclasses.replace(training, num_done=9, num_total=0),
    ):
        assert odd.in_flight(5.0).fraction_done == 0.98
    stages = [
        dataclasses.replace(training, stage=stage, num_done=4).in_flight(1.0).fraction_done for stage in Stage
    ]
    assert stages == sorted(stages)


@settings(max_examples=60)
@given(
    levels=st.integers(1, 3),
    experts=st.integers(1, 2),
    per_task=st.integers(0, 3),
    target=st.integers(1, 3),
    order=st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30),
)
def test_no_round_ever_has_more_than_its_target(
    levels: int, experts: int, per_task: int, target: int, order: list[tuple[int, bool]]
) -> None:
    run = view(experts=(experts,) * levels, per_task=min(per_task, levels), target=target)
    leases: dict[str, Lease] = {}
    for number, keeps in order:
        worker = f"w{number}"
        held = leases.pop(worker, None)
        if held is not None:
            for module, _ in held.rounds if keeps else ():
                done = update(worker, task=f"t-{worker}-{number}-{held.token}", path=held.path.experts)
                run = changed(run, module, updates=(*run.rounds[module].updates, done))
            continue
        choice = choose(WorkerId(worker), [run], tuple(leases.values()))
        if isinstance(choice, Offer):
            assert choice.train
            assert len(choice.train) <= (run.topology.levels_per_task or levels)
            assert {round_.module for round_ in choice.train} <= set(choice.path.modules)
            mine = (worker, choice.path)
            for round_ in choice.train:
                assert mine not in {(item.worker_id, item.path) for item in round_.updates}
            leases[worker] = leased(worker, choice)
        for round_ in run.rounds.values():
            asked = Counter(item.path for item in round_.updates)
            asked.update(lease.path for lease in leases.values() if lease.trains(round_))
            assert max(asked.values(), default=0) <= target


GRID = Topology(experts=(2, 2))
PATHS = GRID.paths


def grid(**changes: object) -> RunView:
    """A 2×2 run, one update a path."""
    return dataclasses.replace(view(experts=(2, 2), target=1), **changes)  # type: ignore[arg-type]


def ask(run: RunView, leases: list[Lease] | None = None, **more: object) -> Offer | Wait:
    return choose_for(Asker(worker_id=A, **more), [run], leases or [])  # type: ignore[arg-type]


def with_updates(run: RunView, *paths: Path) -> RunView:
    for path in paths:
        for module in path.modules:
            done = update("a", task=f"t-{path}", path=path.experts)
            run = changed(run, module, updates=(*run.rounds[module].updates, done))
    return run


def test_one_worker_does_path_after_path() -> None:
    run, done = grid(), []
    while isinstance(choice := ask(run), Offer):
        assert {round_.module for round_ in choice.train} == set(choice.path.modules)
        done.append(choice.path)
        run = with_updates(run, choice.path)
    assert sorted(done, key=lambda path: path.experts) == list(PATHS)


def test_a_path_is_free_as_soon_as_its_own_modules_are() -> None:
    run = with_updates(grid(), PATHS[0], PATHS[1], PATHS[2])
    # 0.0 and 1.0 have all their updates and were published; 1.1 still waits for path 1.1.
    for module in (ModuleKey(0, 0), ModuleKey(1, 0)):
        run = changed(run, module, number=2, base_version=1, updates=())
    first = offer_of(ask(run))
    assert first.path == PATHS[3], "who is furthest behind comes first"
    second = offer_of(choose(B, [run], [leased("a", first)]))
    assert (second.path, [round_.number for round_ in second.train]) == (PATHS[0], [2, 2])


def test_a_worker_comes_back_to_the_path_that_it_knows() -> None:
    assert offer_of(ask(grid(), recent={RunId("r"): PATHS[2]})).path == PATHS[2]


def test_paths_that_are_not_active_are_not_handed_out() -> None:
    run = grid(active=frozenset(PATHS[:1]), inactive=dict.fromkeys(PATHS[1:], "no data"))
    assert offer_of(ask(run)).path == PATHS[0]
    assert isinstance(ask(with_updates(run, PATHS[0])), Wait)


def test_without_any_active_path_the_run_waits_and_says_why() -> None:
    run = grid(active=frozenset(), inactive=dict.fromkeys(PATHS, "no worker has documents for it"))
    wait = wait_of(ask(run))
    assert "no worker has documents for it" in wait.reason
    assert not wait.finished
    assert wait_of(ask(dataclasses.replace(run, stopped=frozenset(PATHS)))).finished


def test_documents_are_routed_before_anything_else() -> None:
    run = grid(routes_locally=True, due=PATHS)
    assert offer_of(ask(run)).purpose is Purpose.ROUTE
    held = {RunId("r"): frozenset(PATHS[1:2])}
    assert offer_of(ask(run, holds=held)).purpose is Purpose.EVALUATE
    assert offer_of(ask(dataclasses.replace(run, due=()), holds=held)).path == PATHS[1]
    nothing = wait_of(ask(dataclasses.replace(run, due=()), holds={RunId("r"): frozenset()}))
    assert "no documents for any path" in nothing.reason


def test_a_path_is_evaluated_by_one_worker() -> None:
    run = grid(due=PATHS[:1])
    offer = offer_of(ask(run))
    assert (offer.purpose, offer.path, offer.train) == (Purpose.EVALUATE, PATHS[0], ())
    lease = dataclasses.replace(leased("a", offer), purpose=Purpose.EVALUATE)
    assert offer_of(choose(B, [run], [lease])).purpose is Purpose.TRAIN


def test_a_run_ends_once_its_last_versions_are_evaluated() -> None:
    over = {module: dataclasses.replace(round_, number=4) for module, round_ in grid().rounds.items()}
    assert offer_of(ask(grid(rounds=over, due=PATHS[:1]))).purpose is Purpose.EVALUATE
    assert wait_of(ask(grid(rounds=over))).finished


def test_backups_come_when_every_path_has_its_worker() -> None:
    run = grid(policy=RoundPolicy(count=3, backups=1))
    leases: list[Lease] = []
    for number in range(8):
        offer = offer_of(choose(WorkerId(f"w{number}"), [run], leases))
        leases.append(leased(f"w{number}", offer))
    assert [lease.path for lease in leases[:4]] == list(PATHS)
    assert {lease.path for lease in leases[4:]} == set(PATHS)
    assert isinstance(choose(WorkerId("w8"), [run], leases), Wait)


def test_asynchronous_paths_never_wait_for_a_merge() -> None:
    run = grid(policy=RoundPolicy(count=3, buffer=2))
    run = changed(with_updates(run, *PATHS), ModuleKey(0, 0), state=RoundState.MERGING)
    assert isinstance(ask(run), Offer)
    leases = [
        leased(f"w{index}", Offer(run=run.run, path=path, train=(), reason=""))
        for index, path in enumerate(PATHS)
    ]
    assert "all the workers" in wait_of(ask(run, leases)).reason


def test_a_small_worker_gets_a_small_rank_and_few_modules() -> None:
    limits = {"r": Limit(run_id="r", rank_max=4, levels_max=1)}
    offer = offer_of(ask(grid(), limits=limits))
    assert (offer.rank, len(offer.train)) == (4, 1)
    large = {"r": Limit(run_id="r", rank_max=64, levels_max=0)}
    offer = offer_of(ask(grid(), limits=large))
    assert (offer.rank, len(offer.train)) == (0, 2)


def test_fragments_take_turns_and_do_not_wait_for_a_merge() -> None:
    run = view(experts=(1, 1), per_task=1, target=1)
    run = changed(dataclasses.replace(run, streams=True), M0, state=RoundState.MERGING)
    assert [round_.module for round_ in offer_of(ask(run)).train] == [M1]
    assert isinstance(ask(dataclasses.replace(run, streams=False)), Wait)


@given(st.integers(1, 10_000), st.floats(0, 1e6), st.floats(0, 1e6))
def test_steps_follow_the_speed(num_steps: int, speed: float, fastest: float) -> None:
    steps = steps_for(num_steps, speed=speed, fastest=fastest)
    assert 1 <= steps <= num_steps
    if speed == 0 or speed >= fastest:
        assert steps == num_steps
    else:
        assert steps <= max(1, num_steps * speed / fastest)
