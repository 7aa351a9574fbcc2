"""A worker's life: what it does next, and why. Pure: no clock, no network, no torch.

    CONNECTING → POLLING → FETCHING → LOADING → TRAINING → ENCODING → SENDING → SUBMITTING → POLLING → …
                    │          └────────┴──────────┴──────────┴──────────┴─────────┤ trouble
                    │                                                          RELEASING → POLLING
                    └ told to stop, revoked, nothing to do here ─────────────────────────→ GONE

Each phase has one action. What came of it is an event; :func:`after` gives the life after an event,
:func:`next_action` what to do now. What is retried is the same action: a trained update is never trained again
because the coordinator restarted. Four rules decide every failure (``REMEDIES``):

* the other side cannot be reached: wait, a little longer each time, and try again, for ever;
* the task is no longer ours (lease lost, round closed): drop it and ask for another;
* we cannot do the task: give it back with the reason, and after the second time stop asking for the run's tasks;
* only the data of the task's path cannot be used: give it back and ask for another, later each time. The run goes on.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from weft.common.errors import (
    AccessError,
    ApprovalPending,
    BaseModelError,
    ConflictingUpdate,
    CorruptState,
    DataError,
    DiskFull,
    InputError,
    LeaseLost,
    NetworkError,
    NotFound,
    OutOfMemory,
    RoundClosed,
    RouterMismatch,
    SessionExpired,
    TooManyAttempts,
    UpdateTooStale,
    UsageError,
    WeftError,
)
from weft.common.protocol import PollAnswer, Purpose, Task, Unable

BACKOFF_FIRST_S: Final = 0.5
BACKOFF_MAX_S: Final = 30.0
POLL_WAIT_S: Final = 20.0
"""How long the coordinator may hold a poll."""
TROUBLES_MAX: Final = 2
"""Tasks of a run that may fail on this worker, without an accepted update in between, before it stops asking."""
INTERRUPTED: Final = 130
"""Exit code of a worker that was told twice to stop."""


class Phase(enum.Enum):
    """Where a worker is."""

    CONNECTING = "connecting"
    POLLING = "polling"
    FETCHING = "fetching"
    LOADING = "loading"
    TRAINING = "training"
    ENCODING = "encoding"
    SENDING = "sending"
    SUBMITTING = "submitting"
    RELEASING = "releasing"
    GONE = "gone"


NEXT: Final[Mapping[Phase, Phase]] = {
    Phase.CONNECTING: Phase.POLLING,
    Phase.FETCHING: Phase.LOADING,
    Phase.LOADING: Phase.TRAINING,
    Phase.TRAINING: Phase.ENCODING,
    Phase.ENCODING: Phase.SENDING,
    Phase.SENDING: Phase.SUBMITTING,
    Phase.SUBMITTING: Phase.POLLING,
    Phase.RELEASING: Phase.POLLING,
}
"""What follows when a phase's action succeeds; POLLING is followed by FETCHING when there is a task."""

UNTRAINED: Final = frozenset({Phase.FETCHING, Phase.LOADING})
"""Phases with a task in hand in which nothing would be lost."""


class Remedy(enum.Enum):
    """What to do about an error."""

    RETRY = "retry"
    RECONNECT = "reconnect"
    DROP = "drop"
    GIVE_BACK = "give back"
    UNABLE = "unable"
    LEAVE = "leave"


REMEDIES: Final[Mapping[type[WeftError], Remedy]] = {
    # Anything not named below: this task does not work here, perhaps the next does.
    WeftError: Remedy.GIVE_BACK,
    NetworkError: Remedy.RETRY,
    TooManyAttempts: Remedy.RETRY,
    ApprovalPending: Remedy.RETRY,
    SessionExpired: Remedy.RECONNECT,
    LeaseLost: Remedy.DROP,
    RoundClosed: Remedy.DROP,
    UpdateTooStale: Remedy.DROP,
    ConflictingUpdate: Remedy.DROP,
    OutOfMemory: Remedy.UNABLE,
    BaseModelError: Remedy.UNABLE,
    RouterMismatch: Remedy.UNABLE,
    DataError: Remedy.UNABLE,
    DiskFull: Remedy.UNABLE,
    CorruptState: Remedy.UNABLE,
    AccessError: Remedy.LEAVE,
}
"""By class of error; the nearest base counts."""
_PASSING: Final = frozenset({Remedy.RETRY, Remedy.RECONNECT, Remedy.DROP, Remedy.LEAVE})
"""What is not for this worker's data to answer for."""
_THEIRS: Final = frozenset({Phase.POLLING, Phase.SENDING, Phase.SUBMITTING})
"""Phases that write nothing here."""
_ABOUT_US: Final = (NotFound, UsageError, InputError, DiskFull)


@dataclass(frozen=True, slots=True)
class Done:
    """The phase's action succeeded."""


@dataclass(frozen=True, slots=True)
class Polled:
    """The coordinator answered a poll."""

    answer: PollAnswer


@dataclass(frozen=True, slots=True)
class Failed:
    """The phase's action failed."""

    error: WeftError
    of_path: bool = False
    """Whether it concerns the data of the task's path alone: another path of the run may well be served."""


@dataclass(frozen=True, slots=True)
class TooMuch:
    """The task is larger than this worker can do, which the next poll says."""

    reason: str


@dataclass(frozen=True, slots=True)
class Told:
    """The coordinator told this worker to drop its task."""

    reason: str


@dataclass(frozen=True, slots=True)
class StopRequested:
    """The person at this machine wants it to stop; the second time at once."""


Event: TypeAlias = Done | Polled | Failed | TooMuch | Told | StopRequested


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """A worker's state."""

    phase: Phase = Phase.CONNECTING
    reason: str = "start"
    """Why it is in this phase."""
    task: Task | None = None
    """The task in hand."""
    wait_s: float = 0.0
    """To wait before the phase's action."""
    num_failures: int = 0
    """Retries in a row."""
    num_stops: int = 0
    """How often it was told to stop."""
    num_accepted: int = 0
    """Tasks accepted since the start."""
    num_paths_failed: int = 0
    """Tasks in a row whose path has no usable data here."""
    troubles: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """By run: tasks that failed here since the last accepted update."""
    unable: tuple[Unable, ...] = ()
    """Runs that this worker does not ask for."""
    error: WeftError | None = None
    """The last error that made it unable, or made it leave."""
    leave_when_finished: bool = False
    """Leave when the coordinator will never have work again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What to do now."""

    phase: Phase
    """Which phase's action; GONE ends the life."""
    reason: str
    """Why, for the log."""
    task: Task | None = None
    """The task in hand."""
    wait_s: float = 0.0
    """Wait this long first."""
    poll_wait_s: float = 0.0
    """POLLING: how long the coordinator may hold the call."""
    unable: tuple[Unable, ...] = ()
    """POLLING: runs not to be asked for."""


def next_action(life: Life) -> Action:
    """What a worker in this state does."""
    # A worker that has just found that it cannot serve a run wants to know at once whether there is another.
    patient = life.num_accepted > 0 or not life.unable
    return Action(
        phase=life.phase,
        reason=life.reason,
        task=life.task,
        wait_s=life.wait_s,
        poll_wait_s=POLL_WAIT_S if patient and life.phase is Phase.POLLING else 0.0,
        unable=life.unable,
    )


def after(life: Life, event: Event, *, chance: float = 0.5) -> Life:
    """The life after an event.

    Args:
        life: Before it.
        event: What happened.
        chance: Random, 0 to 1; spreads the retries of many workers.

    Raises:
        ValueError: The event cannot happen in this phase; nothing changed.
    """
    match event:
        case StopRequested():
            return _asked_to_stop(life)
        case Polled(answer):
            return _polled(life, answer)
        case Done():
            return _succeeded(life)
        case Told(reason):
            return _to_poll(life, f"told to drop the task: {reason}")
        case TooMuch(reason):
            return _given_back(life, reason)
        case Failed(error, of_path=True) if life.task is not None and remedy_of(error) not in _PASSING:
            failed = dataclasses.replace(life, num_paths_failed=life.num_paths_failed + 1)
            return _given_back(failed, str(error))
        case Failed(error):
            return _failed(life, error, chance)


def remedy_of(error: WeftError) -> Remedy:
    """What an error calls for, by its nearest class in ``REMEDIES``."""
    return next(REMEDIES[base] for base in type(error).__mro__ if base in REMEDIES)


def backoff_s(num_failures: int, chance: float) -> float:
    """Seconds before the n-th retry in a row: doubling up to 30, of which a random half is taken off."""
    whole: float = min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(num_failures, 16))
    return whole * (0.5 + chance / 2)


def _polled(life: Life, answer: PollAnswer) -> Life:
    if life.phase is not Phase.POLLING:
        raise ValueError(f"a poll was answered while {life.phase.value}")
    if answer.task is not None:
        taken = _to(
            life, Phase.FETCHING, f"task {answer.task.task_id} of run {answer.task.run_id}", task=answer.task
        )
        return _asked_again(taken) if life.num_stops else taken
    if life.num_stops:
        return _gone(life, "told to stop")
    if answer.finished and life.leave_when_finished:
        return _gone(life, "all runs are finished")
    if life.unable and not life.num_accepted:
        return _gone(life, "no run here can be served", error=life.error)
    return _to(life, Phase.POLLING, answer.wait_reason)


def _succeeded(life: Life) -> Life:
    if life.phase not in NEXT:
        raise ValueError(f"{life.phase.value} cannot simply succeed")
    if life.phase is Phase.SUBMITTING:
        return _accepted(life)
    if life.phase is Phase.CONNECTING:
        return _to_poll(life, "connected")
    if life.phase is Phase.RELEASING:
        return _later(_to_poll(life, "the task was given back"))
    return _to(life, NEXT[life.phase], f"{life.phase.value} is done", task=life.task)


def _accepted(life: Life) -> Life:
    assert life.task is not None  # noqa: S101 - only a task can be submitted
    trained = life.task.purpose is Purpose.TRAIN
    # Who can evaluate but not train stays in trouble.
    troubles = {run: count for run, count in life.troubles.items() if not trained or run != life.task.run_id}
    counted = dataclasses.replace(
        life, num_accepted=life.num_accepted + 1, num_paths_failed=0, troubles=troubles
    )
    what = "the update of task" if trained else "task"
    return _to_poll(counted, f"{what} {life.task.task_id} was accepted")


def _given_back(life: Life, reason: str) -> Life:
    """Give a task back that says nothing of the run's other tasks."""
    if life.task is None or life.phase is Phase.RELEASING:
        raise ValueError(f"there is nothing to give back while {life.phase.value}")
    return _to(life, Phase.RELEASING, reason, task=life.task)


def _later(life: Life) -> Life:
    """Wait before the poll where one path after another had no usable data: it may be the same path each time."""
    if life.phase is not Phase.POLLING or not life.num_paths_failed:
        return life
    return dataclasses.replace(life, wait_s=backoff_s(life.num_paths_failed - 1, 1.0))


def _failed(life: Life, error: WeftError, chance: float) -> Life:
    if life.phase is Phase.RELEASING:
        # Best effort: a lease that cannot be given back ends by silence.
        return _later(_to_poll(life, f"the task could not be given back: {error}"))
    remedy = remedy_of(error)
    if isinstance(error, DiskFull) and life.phase in _THEIRS:
        # The coordinator's disk: the update is safe here until there is room there.
        remedy = Remedy.RETRY
    if life.task is None and remedy in (Remedy.DROP, Remedy.GIVE_BACK, Remedy.UNABLE):
        # Without a task there is nothing to give back. The coordinator does not know this worker, or fails itself,
        # which passes.
        remedy = Remedy.LEAVE if isinstance(error, _ABOUT_US) else Remedy.RETRY
    match remedy:
        case Remedy.RETRY:
            return _retry(life, str(error), chance)
        case Remedy.RECONNECT:
            return _reconnect(life, str(error), chance)
        case Remedy.DROP:
            return _to_poll(life, f"the task was dropped: {error}")
        case Remedy.GIVE_BACK | Remedy.UNABLE:
            return _troubled(life, error, at_once=remedy is Remedy.UNABLE)
        case Remedy.LEAVE:
            return _gone(life, str(error), error=error)


def _retry(life: Life, reason: str, chance: float) -> Life:
    if life.num_stops and life.task is None:
        return _gone(life, "told to stop")
    return dataclasses.replace(
        life, reason=reason, wait_s=backoff_s(life.num_failures, chance), num_failures=life.num_failures + 1
    )


def _reconnect(life: Life, reason: str, chance: float) -> Life:
    """The session is over: without a task connect anew; with one the next call opens another by itself."""
    if life.task is None and life.phase is not Phase.CONNECTING:
        return _to(life, Phase.CONNECTING, reason)
    return _retry(life, reason, chance)


def _troubled(life: Life, error: WeftError, *, at_once: bool) -> Life:
    assert life.task is not None  # noqa: S101 - the caller saw to it
    run = life.task.run_id
    count = life.troubles.get(run, 0) + 1
    counted = dataclasses.replace(life, troubles={**life.troubles, run: count})
    if at_once or count >= TROUBLES_MAX:
        others = tuple(item for item in life.unable if item.run_id != run)
        counted = dataclasses.replace(
            counted, unable=(*others, Unable(run_id=run, reason=str(error))), error=error
        )
    return _to(counted, Phase.RELEASING, str(error), task=life.task)


def _asked_to_stop(life: Life) -> Life:
    if life.phase is Phase.GONE:
        return life
    return _asked_again(dataclasses.replace(life, num_stops=life.num_stops + 1))


def _asked_again(life: Life) -> Life:
    """What a wish to stop means here: finish what was trained, give back what was not."""
    if life.task is None:
        return _gone(life, "told to stop")
    if life.phase is Phase.RELEASING:
        return life
    if life.num_stops > 1 or life.phase in UNTRAINED:
        return _to(life, Phase.RELEASING, "the worker is stopping", task=life.task)
    return dataclasses.replace(life, reason="told to stop: the task in hand is finished first")


def _to_poll(life: Life, reason: str) -> Life:
    """The task is over, one way or another."""
    return _gone(life, "told to stop") if life.num_stops else _to(life, Phase.POLLING, reason)


def _gone(life: Life, reason: str, *, error: WeftError | None = None) -> Life:
    return dataclasses.replace(_to(life, Phase.GONE, reason), error=error)


def _to(life: Life, phase: Phase, reason: str, *, task: Task | None = None) -> Life:
    return dataclasses.replace(life, phase=phase, reason=reason, task=task, wait_s=0.0, num_failures=0)


def exit_code(life: Life) -> int:
    """The exit code of a life that is over."""
    if life.error is not None:
        return life.error.exit_code
    return INTERRUPTED if life.num_stops > 1 else 0
