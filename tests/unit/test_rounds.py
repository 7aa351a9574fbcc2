"""The round's transition table and the close rule."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.harness import accepted_update as update

from weft.common.errors import UsageError
from weft.common.ids import Digest, ModuleKey, Path, RunId
from weft.common.protocol import RoundState
from weft.server.rounds import (
    ENDED,
    TARGET_MAX,
    TRANSITIONS,
    Accept,
    Candidate,
    Close,
    Event,
    Gated,
    GateResult,
    IllegalTransition,
    InFlight,
    Keep,
    Merged,
    MergeFailed,
    Round,
    RoundPolicy,
    advance,
    close_reason,
    next_round,
    waiting_reason,
)


def round_in(state: RoundState = RoundState.COLLECTING, *workers: str, duration_s: float = 100.0) -> Round:
    updates = tuple(update(worker, duration_s=duration_s) for worker in workers)
    return Round(
        run=RunId("r"),
        module=ModuleKey(0, 0),
        number=1,
        base_version=0,
        opened_at=5.0,
        state=state,
        updates=updates,
    )


CANDIDATE = Candidate(digest=Digest("1" * 64), size_bytes=3, sha256="2" * 64)
EVENTS: dict[type[Event], Event] = {
    Accept: Accept(update("w")),
    Keep: Keep(update("w")),
    Close: Close("because"),
    Merged: Merged(CANDIDATE),
    MergeFailed: MergeFailed("no memory"),
    Gated: Gated(GateResult(passed=True, reason="good")),
}
ILLEGAL = [pair for pair in itertools.product(RoundState, EVENTS) if pair not in TRANSITIONS]


def test_the_table_knows_every_event_and_names_states_alone() -> None:
    assert {event for _, event in TRANSITIONS} == set(EVENTS)
    assert {state for state, _ in TRANSITIONS} == set(RoundState) - ENDED


@pytest.mark.parametrize(
    ("state", "event"), ILLEGAL, ids=lambda item: getattr(item, "name", None) or item.__name__
)
def test_what_is_not_in_the_table_raises_and_changes_nothing(state: RoundState, event: type[Event]) -> None:
    before = round_in(state)
    copy = dataclasses.replace(before)
    with pytest.raises(IllegalTransition, match=state.name):
        advance(before, EVENTS[event], 9.0)
    assert before == copy


@pytest.mark.parametrize(
    ("state", "event"), TRANSITIONS, ids=lambda item: getattr(item, "name", None) or item.__name__
)
def test_what_is_in_the_table_gives_a_new_round_and_leaves_the_old(
    state: RoundState, event: type[Event]
) -> None:
    before = round_in(state)
    copy = dataclasses.replace(before)
    after = advance(before, EVENTS[event], 9.0)
    assert before == copy
    assert after.state is TRANSITIONS[state, event]
    assert after.reason
    assert after.ended_at == (9.0 if after.state in ENDED else None)


def test_a_gate_that_does_not_pass_rolls_back() -> None:
    after = advance(round_in(RoundState.GATING), Gated(GateResult(passed=False, reason="worse")), 9.0)
    assert (after.state, after.reason, after.ended_at) == (RoundState.ROLLED_BACK, "worse", 9.0)


def test_a_task_is_in_a_round_once() -> None:
    once = advance(round_in(), Accept(update("w")), 1.0)
    with pytest.raises(IllegalTransition, match="already"):
        advance(once, Accept(update("w")), 2.0)


@given(st.permutations(["a", "b", "c", "d", "e"]))
def test_the_order_of_arrival_does_not_show(order: list[str]) -> None:
    round_ = round_in()
    for worker in order:
        round_ = advance(round_, Accept(update(worker)), 1.0)
    assert [item.worker_id for item in round_.updates] == ["a", "b", "c", "d", "e"]
    assert round_.contributors == set(order)
    assert round_.reason == "5 update(s) in"


def lease(elapsed_s: float, fraction_done: float) -> InFlight:
    return InFlight(elapsed_s=elapsed_s, fraction_done=fraction_done)


PATHS = (Path((0,)),)
POLICY = RoundPolicy(quorum=2, target=4, straggler_factor=0.5)


@pytest.mark.parametrize(
    ("workers", "in_flight", "since_last_s", "reason"),
    [
        ("", [], 1e9, None),
        ("a", [], 1e9, None),
        ("ab", [], 0.0, None),
        ("ab", [], 49.9, None),
        ("ab", [], 50.0, "quorum: 2 of 4 updates, and none came for 50.0 s"),
        ("abc", [], 50.0, "quorum: 3 of 4 updates, and none came for 50.0 s"),
        ("abcd", [lease(1, 0.9)], 0.0, "target: 4 of 4 updates"),
        ("ab", [lease(10, 0.5)], 0.0, None),
        (
            "ab",
            [lease(100, 0.5)],
            0.0,
            "quorum: 2 of 4 updates; the next needs 100.0 s more, 50.0 s are left",
        ),
        ("ab", [lease(100, 0.5), lease(10, 0.5)], 0.0, None),
        ("ab", [lease(100, 0.5), lease(100, 0.0)], 0.0, None),
        ("ab", [lease(50, 0.5)], 0.0, None),
        ("ab", [lease(50, 0.5)], 1.0, "quorum: 2 of 4 updates; the next needs 50.0 s more, 49.0 s are left"),
    ],
    ids=[
        "empty-never-closes",
        "below-quorum-never-closes",
        "quorum-waits",
        "patience-holds",
        "patience-ends",
        "patience-ends-above-quorum",
        "target",
        "will-make-it",
        "will-not-make-it",
        "one-will-make-it",
        "one-has-no-pace-yet",
        "just-in-time",
        "just-too-late",
    ],
)
def test_close_reason(
    workers: str, in_flight: list[InFlight], since_last_s: float, reason: str | None
) -> None:
    round_ = round_in(RoundState.COLLECTING, *workers)
    assert close_reason(round_, POLICY, in_flight, paths=PATHS, since_last_s=since_last_s) == reason


def test_the_patience_is_a_multiple_of_the_median_duration() -> None:
    round_ = dataclasses.replace(
        round_in(),
        updates=tuple(update(name, duration_s=s) for name, s in (("a", 10.0), ("b", 1000.0), ("c", 20.0))),
    )
    assert close_reason(round_, POLICY, [], paths=PATHS, since_last_s=9.9) is None
    assert close_reason(round_, POLICY, [], paths=PATHS, since_last_s=10.0) is not None


def test_no_patience_closes_at_the_quorum() -> None:
    policy = RoundPolicy(quorum=1, target=9, straggler_factor=0.0)
    round_ = round_in(RoundState.COLLECTING, "a")
    assert close_reason(round_, policy, [], paths=PATHS, since_last_s=0.0) is not None


@given(
    count=st.integers(0, 6),
    quorum=st.integers(1, 4),
    more=st.integers(0, 3),
    fractions=st.lists(st.floats(0, 0.99), max_size=4),
    since_last_s=st.floats(0, 1e6),
)
def test_a_round_closes_with_a_quorum_only_and_always_in_the_end(
    count: int, quorum: int, more: int, fractions: list[float], since_last_s: float
) -> None:
    policy = RoundPolicy(quorum=quorum, target=quorum + more)
    round_ = round_in(RoundState.COLLECTING, *(f"w{i}" for i in range(count)))
    in_flight = [lease(60.0, fraction) for fraction in fractions]
    reason = close_reason(round_, policy, in_flight, paths=PATHS, since_last_s=since_last_s)
    assert reason is None or count >= quorum
    if count >= quorum:
        assert close_reason(round_, policy, in_flight, paths=PATHS, since_last_s=1e7) is not None
    if count >= policy.target:
        assert reason is not None


@pytest.mark.parametrize(
    ("workers", "num_in_flight", "said"),
    [
        ("", 0, "0 of 2 updates for a quorum; no worker at work"),
        ("a", 2, "1 of 2 updates for a quorum; 2 worker(s) at work"),
        ("ab", 1, "2 of 4 updates, quorum reached; 1 worker(s) at work"),
    ],
)
def test_waiting_reason(workers: str, num_in_flight: int, said: str) -> None:
    assert (
        waiting_reason(round_in(RoundState.COLLECTING, *workers), POLICY, num_in_flight, paths=PATHS) == said
    )


def test_the_round_after_a_published_one_starts_from_the_new_version() -> None:
    following = next_round(round_in(RoundState.PUBLISHED, "a"), 7.0)
    assert (following.number, following.base_version, following.updates) == (2, 1, ())
    assert following.state is RoundState.COLLECTING
    assert following.opened_at == 7.0


def test_the_round_after_one_rolled_back_starts_from_the_same_version() -> None:
    assert next_round(round_in(RoundState.ROLLED_BACK), 7.0).base_version == 0


@pytest.mark.parametrize("state", [state for state in RoundState if state not in ENDED])
def test_no_round_follows_one_that_has_not_ended(state: RoundState) -> None:
    with pytest.raises(IllegalTransition):
        next_round(round_in(state), 7.0)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"count": 0}, "rounds.count"),
        ({"count": 10**7}, "rounds.count"),
        ({"quorum": 0}, "rounds.quorum"),
        ({"quorum": -1}, "rounds.quorum"),
        ({"quorum": TARGET_MAX + 1, "target": TARGET_MAX + 1}, "rounds.quorum"),
        ({"target": TARGET_MAX + 1}, "rounds.target"),
        ({"quorum": 3, "target": 2}, "rounds.target"),
        ({"straggler_factor": -0.1}, "rounds.straggler_factor"),
        ({"straggler_factor": math.nan}, "rounds.straggler_factor"),
        ({"straggler_factor": math.inf}, "rounds.straggler_factor"),
    ],
)
def test_a_policy_that_cannot_work_is_refused_by_name(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UsageError, match=key) as refused:
        RoundPolicy(**settings)
    assert refused.value.hint


FOUR = tuple(Path((0, expert)) for expert in range(4))


def shared(*experts: int, **more: int) -> Round:
    """A round of a module that four paths share, with an update of each path named."""
    updates = tuple(update(f"w{index}", path=(0, expert)) for index, expert in enumerate(experts))
    return dataclasses.replace(round_in(), updates=updates)


@pytest.mark.parametrize(
    ("experts", "policy", "paths", "closes"),
    [
        ((0, 1, 2, 3), RoundPolicy(), FOUR, "target: 4 of 4 updates"),
        ((0, 1, 2), RoundPolicy(), FOUR, None),
        ((0, 1, 2), RoundPolicy(), FOUR[:3], "target: 3 of 3 updates"),
        ((0, 0, 1, 1), RoundPolicy(), FOUR, None),
        ((0, 0, 1, 1), RoundPolicy(target=2), FOUR[:2], "target: 4 of 4 updates"),
        ((0, 1, 2), RoundPolicy(paths_quorum=0.75), FOUR, "quorum: 3 of 4 updates"),
        ((0, 1), RoundPolicy(paths_quorum=0.75), FOUR, None),
        ((0,), RoundPolicy(), (), "1 updates, and no path is active"),
        ((), RoundPolicy(), (), None),
    ],
)
def test_a_shared_module_waits_for_its_active_paths(
    experts: tuple[int, ...], policy: RoundPolicy, paths: tuple[Path, ...], closes: str | None
) -> None:
    reason = close_reason(shared(*experts), policy, [], paths=paths, since_last_s=1e6)
    assert (reason is None) if closes is None else (reason is not None and reason.startswith(closes))


def test_a_shared_module_names_the_paths_that_it_waits_for() -> None:
    said = waiting_reason(shared(0, 3), RoundPolicy(), 1, paths=FOUR)
    assert said == "2 of 4 paths have their quorum; waits for path 0.1, 0.2; 1 worker(s) at work"


def test_an_asynchronous_round_closes_by_number_alone() -> None:
    policy = RoundPolicy(buffer=3)
    assert close_reason(shared(0, 0), policy, [], paths=FOUR, since_last_s=1e9) is None
    assert close_reason(shared(0, 0, 0), policy, [], paths=FOUR, since_last_s=0.0) == "buffer: 3 of 3 updates"


@pytest.mark.parametrize("state", [RoundState.MERGING, RoundState.GATING])
def test_what_comes_while_an_asynchronous_round_is_merged_is_in_the_next(state: RoundState) -> None:
    kept = advance(round_in(state, "a"), Keep(update("b")), 1.0)
    assert (kept.state, [item.worker_id for item in kept.updates]) == (state, ["a"])
    ended = dataclasses.replace(kept, state=RoundState.PUBLISHED)
    following = next_round(ended, 2.0)
    assert [item.worker_id for item in following.updates] == ["b"]
    assert (following.number, following.kept) == (2, ())


def test_a_task_that_is_kept_already_is_not_taken_again() -> None:
    kept = advance(round_in(RoundState.MERGING), Keep(update("b")), 1.0)
    with pytest.raises(IllegalTransition, match="already"):
        advance(kept, Keep(update("b")), 2.0)


@given(st.integers(0, 1000), st.floats(0, 10))
def test_a_staler_update_never_counts_more(staleness: int, power: float) -> None:
    policy = RoundPolicy(buffer=1, staleness_power=power)
    weight, staler = policy.staleness_weight(staleness), policy.staleness_weight(staleness + 1)
    assert 0 < staler <= weight <= policy.staleness_weight(0) == 1.0
