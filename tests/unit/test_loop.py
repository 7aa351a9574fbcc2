"""The worker's life: every decision, with its reason, without any I/O."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.client.loop import (
    BACKOFF_MAX_S,
    INTERRUPTED,
    NEXT,
    POLL_WAIT_S,
    REMEDIES,
    Done,
    Event,
    Failed,
    Life,
    Phase,
    Polled,
    StopRequested,
    Told,
    TooMuch,
    after,
    backoff_s,
    exit_code,
    next_action,
    remedy_of,
)
from weft.common.errors import (
    BY_NAME,
    ApprovalPending,
    BaseModelError,
    ConflictingUpdate,
    DataError,
    ForgedUpdate,
    IdentityMismatch,
    LeaseLost,
    NonFiniteLoss,
    NotFound,
    OutOfMemory,
    PermissionRefused,
    RoundClosed,
    RouterMismatch,
    SessionExpired,
    TransferStalled,
    Unreachable,
    UpdateRejected,
    UpdateTooStale,
    WeftError,
)
from weft.common.ids import Digest, RunId, TaskId
from weft.common.protocol import PollAnswer, Purpose, Task, Unable

TASK = Task(
    task_id=TaskId("t-1"),
    run_id=RunId("alpha"),
    lease_token="lease",
    lease_epoch=1,
    lease_s=15.0,
    path="0",
    modules=(),
    recipe_blake3=Digest("0" * 64),
    num_steps=4,
    update_bytes_max=1000,
)
WITH_TASK = [
    phase for phase in Phase if phase.value.endswith("ing") and phase not in (Phase.CONNECTING, Phase.POLLING)
]
WAIT = PollAnswer(task=None, wait_reason="round 2 is merging", finished=False)
FINISHED = PollAnswer(task=None, wait_reason="all runs are finished", finished=True)


def at(phase: Phase, **changes: object) -> Life:
    life = Life(phase=phase, task=TASK if phase in WITH_TASK else None)
    return dataclasses.replace(life, **changes)  # type: ignore[arg-type]


def lived(life: Life, *events: Event) -> Life:
    for event in events:
        life = after(life, event)
    return life


def test_a_whole_task() -> None:
    life = lived(Life(), Done(), Polled(PollAnswer(task=TASK, wait_reason="", finished=False)))
    phases = [life.phase]
    while life.phase is not Phase.POLLING:
        assert next_action(life).task is TASK
        life = after(life, Done())
        phases.append(life.phase)
    assert phases == [
        Phase.FETCHING,
        Phase.LOADING,
        Phase.TRAINING,
        Phase.ENCODING,
        Phase.SENDING,
        Phase.SUBMITTING,
        Phase.POLLING,
    ]
    assert (life.task, life.num_accepted) == (None, 1)
    assert life.reason == "the update of task t-1 was accepted"


@pytest.mark.parametrize(
    ("phase", "event", "then", "reason"),
    [
        (Phase.POLLING, Polled(WAIT), Phase.POLLING, "round 2 is merging"),
        (Phase.POLLING, Polled(FINISHED), Phase.POLLING, "all runs are finished"),
        (Phase.CONNECTING, Failed(Unreachable("no answer")), Phase.CONNECTING, "no answer"),
        (Phase.CONNECTING, Failed(ApprovalPending("wait")), Phase.CONNECTING, "wait"),
        (Phase.CONNECTING, Failed(PermissionRefused("w-1 was revoked")), Phase.GONE, "w-1 was revoked"),
        (Phase.CONNECTING, Failed(NotFound("no worker w-1")), Phase.GONE, "no worker w-1"),
        (Phase.CONNECTING, Failed(IdentityMismatch("another key")), Phase.GONE, "another key"),
        (Phase.POLLING, Failed(SessionExpired("over")), Phase.CONNECTING, "over"),
        (Phase.POLLING, Failed(WeftError("the coordinator failed")), Phase.POLLING, "the coordinator failed"),
        (Phase.POLLING, Failed(PermissionRefused("not for viewers")), Phase.GONE, "not for viewers"),
        (Phase.FETCHING, Failed(TransferStalled("silence")), Phase.FETCHING, "silence"),
        (Phase.FETCHING, Failed(BaseModelError("differs")), Phase.RELEASING, "differs"),
        (Phase.LOADING, Failed(OutOfMemory("16 GiB")), Phase.RELEASING, "16 GiB"),
        (Phase.LOADING, Failed(DataError("empty")), Phase.RELEASING, "empty"),
        (Phase.TRAINING, Told("round 1 closed"), Phase.POLLING, "told to drop the task: round 1 closed"),
        (Phase.TRAINING, Failed(LeaseLost("expired")), Phase.POLLING, "the task was dropped: expired"),
        (Phase.TRAINING, Failed(NonFiniteLoss("nan")), Phase.RELEASING, "nan"),
        (Phase.SENDING, Failed(Unreachable("down")), Phase.SENDING, "down"),
        (Phase.SENDING, Failed(SessionExpired("over")), Phase.SENDING, "over"),
        (Phase.SUBMITTING, Failed(Unreachable("down")), Phase.SUBMITTING, "down"),
        (Phase.SUBMITTING, Failed(RoundClosed("late")), Phase.POLLING, "the task was dropped: late"),
        (Phase.SUBMITTING, Failed(UpdateTooStale("old")), Phase.POLLING, "the task was dropped: old"),
        (Phase.LOADING, Failed(RouterMismatch("another base")), Phase.RELEASING, "another base"),
        (Phase.LOADING, Failed(DataError("short"), of_path=True), Phase.RELEASING, "short"),
        (Phase.FETCHING, Failed(Unreachable("down"), of_path=True), Phase.FETCHING, "down"),
        (Phase.LOADING, TooMuch("rank 4 at most"), Phase.RELEASING, "rank 4 at most"),
        (Phase.SUBMITTING, Failed(ConflictingUpdate("two")), Phase.POLLING, "the task was dropped: two"),
        (Phase.SUBMITTING, Failed(UpdateRejected("shape")), Phase.RELEASING, "shape"),
        (Phase.SUBMITTING, Failed(ForgedUpdate("epoch")), Phase.RELEASING, "epoch"),
        (Phase.RELEASING, Done(), Phase.POLLING, "the task was given back"),
        (
            Phase.RELEASING,
            Failed(Unreachable("down")),
            Phase.POLLING,
            "the task could not be given back: down",
        ),
    ],
    ids=lambda value: value.value if isinstance(value, Phase) else None,
)
def test_decision(phase: Phase, event: Event, then: Phase, reason: str) -> None:
    life = after(at(phase), event)
    assert (life.phase, life.reason) == (then, reason)
    assert (life.task is not None) == (then in WITH_TASK)


def test_retries_wait_longer_each_time_and_start_afresh_after_a_success() -> None:
    life, waits = at(Phase.POLLING), []
    for _ in range(9):
        life = after(life, Failed(Unreachable("down")), chance=1.0)
        waits.append(next_action(life).wait_s)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    life = after(life, Polled(WAIT))
    assert next_action(life).wait_s == 0.0
    assert next_action(after(life, Failed(Unreachable("down")), chance=1.0)).wait_s == 0.5


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_backoff_stays_within_its_bounds(num_failures: int, chance: float) -> None:
    assert 0.25 <= backoff_s(num_failures, chance) <= BACKOFF_MAX_S


def test_a_run_that_diverges_twice_is_not_asked_for_again() -> None:
    once = lived(at(Phase.TRAINING), Failed(NonFiniteLoss("loss is nan")), Done())
    assert next_action(once).unable == ()
    again = dataclasses.replace(once, phase=Phase.TRAINING, task=TASK)
    twice = lived(again, Failed(NonFiniteLoss("loss is nan")), Done())
    assert next_action(twice).unable == (Unable(run_id="alpha", reason="loss is nan"),)


def test_an_accepted_update_forgives_an_earlier_failure() -> None:
    once = lived(at(Phase.TRAINING), Failed(NonFiniteLoss("nan")), Done())
    accepted = after(dataclasses.replace(once, phase=Phase.SUBMITTING, task=TASK), Done())
    again = lived(
        dataclasses.replace(accepted, phase=Phase.TRAINING, task=TASK), Failed(NonFiniteLoss("nan"))
    )
    assert again.unable == ()


def test_an_evaluation_does_not_forgive_a_training_that_failed() -> None:
    once = lived(at(Phase.TRAINING), Failed(NonFiniteLoss("nan")), Done())
    evaluation = dataclasses.replace(TASK, purpose=Purpose.EVALUATE)
    accepted = after(dataclasses.replace(once, phase=Phase.SUBMITTING, task=evaluation), Done())
    again = lived(
        dataclasses.replace(accepted, phase=Phase.TRAINING, task=TASK), Failed(NonFiniteLoss("nan"))
    )
    assert again.unable == (Unable(run_id="alpha", reason="nan"),)


def test_paths_without_usable_data_never_bar_the_run_and_are_asked_for_later_each_time() -> None:
    life, waits = at(Phase.LOADING), []
    for _ in range(9):
        life = lived(life, Failed(NotFound("the shard is gone"), of_path=True), Done())
        waits.append(next_action(life).wait_s)
        life = dataclasses.replace(life, phase=Phase.LOADING, task=TASK)
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert (life.unable, life.troubles) == ((), {})
    life = lived(dataclasses.replace(life, phase=Phase.SUBMITTING), Done())
    assert (life.num_paths_failed, next_action(life).wait_s) == (0, 0.0)


def test_a_task_that_is_too_large_is_no_trouble_and_the_next_is_asked_for_at_once() -> None:
    life = lived(at(Phase.LOADING), TooMuch("rank 4 at most"), Done())
    assert (life.phase, life.unable, life.troubles, next_action(life).wait_s) == (Phase.POLLING, (), {}, 0.0)


def test_what_cannot_pass_makes_the_run_unable_at_once() -> None:
    life = lived(at(Phase.LOADING), Failed(OutOfMemory("needs 16 GiB")), Done())
    action = next_action(life)
    assert action.unable == (Unable(run_id="alpha", reason="needs 16 GiB"),)
    assert action.poll_wait_s == 0.0


def test_a_worker_that_can_serve_nothing_leaves_with_the_cause() -> None:
    life = lived(at(Phase.LOADING), Failed(DataError("12 tokens")), Done(), Polled(WAIT))
    assert life.phase is Phase.GONE
    assert exit_code(life) == DataError.exit_code
    assert life.error is not None
    assert str(life.error) == "12 tokens"


def test_a_worker_that_has_contributed_stays_when_one_run_becomes_unable() -> None:
    life = lived(at(Phase.LOADING, num_accepted=1), Failed(OutOfMemory("big")), Done(), Polled(WAIT))
    assert life.phase is Phase.POLLING
    assert next_action(life).poll_wait_s == POLL_WAIT_S


def test_leaves_when_finished_only_if_asked_to() -> None:
    leaving = after(at(Phase.POLLING, leave_when_finished=True), Polled(FINISHED))
    assert (leaving.phase, exit_code(leaving)) == (Phase.GONE, 0)
    assert after(at(Phase.POLLING), Polled(FINISHED)).phase is Phase.POLLING


@pytest.mark.parametrize("phase", [Phase.CONNECTING, Phase.POLLING])
def test_stop_without_a_task_leaves_at_once(phase: Phase) -> None:
    life = after(at(phase), StopRequested())
    assert (life.phase, exit_code(life)) == (Phase.GONE, 0)


@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.LOADING])
def test_stop_before_training_gives_the_task_back(phase: Phase) -> None:
    life = after(at(phase), StopRequested())
    assert (life.phase, life.task) == (Phase.RELEASING, TASK)
    assert after(life, Done()).phase is Phase.GONE


@pytest.mark.parametrize("phase", [Phase.TRAINING, Phase.ENCODING, Phase.SENDING, Phase.SUBMITTING])
def test_stop_once_finishes_the_task_in_hand(phase: Phase) -> None:
    life = after(at(phase), StopRequested())
    while life.phase is not Phase.GONE:
        assert life.phase is not Phase.POLLING
        life = after(life, Done())
    assert (life.num_accepted, exit_code(life)) == (1, 0)


@pytest.mark.parametrize("phase", [phase for phase in WITH_TASK if phase is not Phase.RELEASING])
def test_stop_twice_gives_the_task_back_and_leaves(phase: Phase) -> None:
    life = lived(at(phase), StopRequested(), StopRequested())
    assert life.phase is Phase.RELEASING
    left = after(life, Failed(Unreachable("down")))
    assert (left.phase, exit_code(left)) == (Phase.GONE, INTERRUPTED)


def test_a_task_that_arrives_after_the_stop_is_given_back() -> None:
    life = after(
        at(Phase.POLLING, num_stops=1), Polled(PollAnswer(task=TASK, wait_reason="", finished=False))
    )
    assert (life.phase, life.task) == (Phase.RELEASING, TASK)


def test_a_stopping_worker_does_not_wait_for_a_coordinator_that_is_gone() -> None:
    assert after(at(Phase.CONNECTING, num_stops=1), Failed(Unreachable("down"))).phase is Phase.GONE


@pytest.mark.parametrize(
    ("phase", "event"),
    [
        (Phase.POLLING, Done()),
        (Phase.TRAINING, Polled(WAIT)),
        (Phase.GONE, Done()),
        (Phase.POLLING, TooMuch("x")),
        (Phase.RELEASING, TooMuch("x")),
    ],
)
def test_an_event_that_cannot_happen_is_our_own_mistake(phase: Phase, event: Event) -> None:
    with pytest.raises(ValueError):
        after(at(phase), event)


def test_every_error_has_a_remedy_and_every_phase_a_successor() -> None:
    assert all(remedy_of(cls("x")) in REMEDIES.values() for cls in BY_NAME.values())
    assert set(NEXT) == set(Phase) - {Phase.POLLING, Phase.GONE}


TAKEN = PollAnswer(task=TASK, wait_reason="", finished=False)
FAILURES: list[Event] = [
    Failed(cls(name), of_path=of_path) for name, cls in sorted(BY_NAME.items()) for of_path in (False, True)
]
EVENTS = st.sampled_from(
    [Done(), Polled(WAIT), Polled(TAKEN), TooMuch("x"), Told("x"), StopRequested(), *FAILURES]
)


@given(st.lists(EVENTS, max_size=60))
def test_a_task_is_in_hand_exactly_in_the_phases_that_work_on_one(events: list[Event]) -> None:
    life = Life()
    for event in events:
        try:
            life = after(life, event)
        except ValueError:
            continue
        assert (life.task is not None) == (life.phase in WITH_TASK)
        assert life.reason
