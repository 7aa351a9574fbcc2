"""Which task a worker gets, and why it gets none."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.harness import accepted_update as update

from weft.common.ids import ModuleKey, Path, RunId, TaskId, WorkerId
from weft.common.modules import Topology
from weft.common.protocol import RoundState, Stage
from weft.server.assignment import Lease, Offer, RunView, Wait, choose
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
    return RunView(run=RunId(name), topology=topology, policy=policy, rounds=rounds)


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


@settings(max_examples=60, deadline=None)
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
                run = changed(run, module, updates=(*run.rounds[module].updates, update(worker)))
            continue
        choice = choose(WorkerId(worker), [run], tuple(leases.values()))
        if isinstance(choice, Offer):
            assert choice.train
            assert len(choice.train) <= (run.topology.levels_per_task or levels)
            assert {round_.module for round_ in choice.train} <= set(choice.path.modules)
            assert all(worker not in round_.contributors for round_ in choice.train)
            leases[worker] = leased(worker, choice)
        for round_ in run.rounds.values():
            asked = len(round_.updates) + sum(lease.trains(round_) for lease in leases.values())
            assert asked <= target
