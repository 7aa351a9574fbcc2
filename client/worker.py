"""The worker: does what the loop says, with a transport, a trainer and a clock that it is given.

What it keeps at hand between tasks is in ``weft.client.workshop``, what it does of a task in ``weft.client.tasks``.

While a task is in hand a second thread reports how far it is, which keeps the lease, and takes note when the
coordinator says that the task is over; training then ends after its current step. Where a run streams, the phases
between two inner loops (sending, submitting, polling, fetching) are lived in a thread of their own while this one
trains ahead; nothing else is shared between the two, and the life goes on in one thread when both are done.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeGuard

from weft.client.heartbeat import TaskProgress as TaskProgress
from weft.client.loop import (
    UNTRAINED,
    Action,
    Done,
    Event,
    Failed,
    Life,
    Phase,
    Polled,
    StopRequested,
    after,
    next_action,
)
from weft.client.setup import Calls
from weft.client.setup import Setup as Setup
from weft.client.tasks.evaluating import EvaluationSteps
from weft.client.tasks.inhand import Halted, OfPath, TaskInHand
from weft.client.tasks.inhand import View as View
from weft.client.tasks.routing import RoutingSteps
from weft.client.tasks.steps import Steps
from weft.client.tasks.training import TrainingSteps
from weft.client.workshop import Workshop
from weft.common.errors import WeftError
from weft.common.protocol import Purpose, Task

logger = logging.getLogger(__name__)

AT_ONCE_S: Final = 0.5
"""A poll that is answered sooner was not held ..."""
ASK_AGAIN_S: Final = 2.0
"""... and is repeated after this pause."""
_WITHOUT_TRAINING: Final = UNTRAINED | {Phase.CONNECTING, Phase.POLLING}
_BESIDE_TRAINING: Final = frozenset({Phase.SENDING, Phase.SUBMITTING, Phase.POLLING, Phase.FETCHING})
"""Phases between two inner loops, which need neither the base nor what is trained."""
STEPS: Final[Mapping[Purpose, type[Steps]]] = {
    Purpose.TRAIN: TrainingSteps,
    Purpose.EVALUATE: EvaluationSteps,
    Purpose.ROUTE: RoutingSteps,
}
"""What a task of each purpose consists of."""
_STEP_OF: Final[Mapping[Phase, Callable[[Steps], Event | None]]] = {
    Phase.FETCHING: lambda steps: steps.fetch(),
    Phase.LOADING: lambda steps: steps.load(),
    Phase.TRAINING: lambda steps: steps.perform(),
    Phase.ENCODING: lambda steps: steps.encode(),
    Phase.SENDING: lambda steps: steps.send(),
    Phase.SUBMITTING: lambda steps: steps.submit(),
}


class Worker:
    """Works for one coordinator until it is stopped. ``request_stop`` may be called from any thread."""

    def __init__(
        self,
        me: Setup,
        calls: Calls,
        *,
        view: View,
        stop_waits: threading.Event,
        clock: Callable[[], float],
        chance: Callable[[], float],
        leave_when_finished: bool = False,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            me: Who works, with what.
            calls: The connection to the coordinator.
            view: Follows what happens.
            stop_waits: The event that ends the waits of ``calls``.
            clock: Monotonic seconds.
            chance: Uniform in [0, 1), spreads retries.
            leave_when_finished: End when the coordinator will never have work again.
        """
        self.life = Life(leave_when_finished=leave_when_finished)
        self._me = me
        self._calls = calls
        self._view = view
        self._stop_waits = stop_waits
        self._clock = clock
        self._chance = chance
        self._num_stops = 0
        self._woken = threading.Event()
        self._steps: Steps | None = None
        """Of the task in hand."""
        self._shop = Workshop(me, calls, say=view.said, clock=clock, pause=self._pause)
        self._actions: Mapping[Phase, Callable[[Action], Event]] = {
            Phase.CONNECTING: self._connect,
            Phase.POLLING: self._poll,
            Phase.RELEASING: self._release,
            **dict.fromkeys(_STEP_OF, self._step),
        }

    def run(self) -> Life:
        """Live; returns the life when it is over."""
        self._clear_outbox()
        try:
            while self.life.phase is not Phase.GONE:
                steps = self._steps
                if self.life.phase is Phase.SENDING and _can_train_ahead(steps):
                    self._train_beside(steps)
                else:
                    self._turn()
        finally:
            self._put_down()
        return self.life

    def request_stop(self) -> None:
        """Ask the worker to finish; the second time, to leave at once."""
        self._num_stops += 1
        if self._num_stops > 1 or self.life.phase in _WITHOUT_TRAINING:
            self._stop_waits.set()
        self._woken.set()

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Do the next thing, and take note of what came of it."""
        action = next_action(self.life)
        self._view.turn(action)
        event = self._perform(action)
        if event is not None:
            self.life = after(self.life, event, chance=self._chance())
        self._take_note_of_stops()
        if self.life.task is None:
            self._put_down()

    def _train_beside(self, steps: TrainingSteps) -> None:
        """Let the life go on beside this thread until it wants to compute, and train ahead meanwhile."""

        def live() -> None:
            while self.life.phase in _BESIDE_TRAINING:
                self._turn()

        with ThreadPoolExecutor(1, thread_name_prefix="weft-between") as pool:
            living = pool.submit(live)
            try:
                steps.train_ahead(living.done)
            except Exception:
                # As in ``_perform``: what was trained ahead is not missed.
                logger.exception("training ahead failed unexpectedly")
            living.result()
        steps.keep_ahead()

    def _perform(self, action: Action) -> Event | None:
        """Do it; None when the person broke it off."""
        try:
            if action.wait_s:
                self._pause(action.wait_s)
            return self._actions[action.phase](action)
        except Halted:
            return self._steps.hand.heartbeat.verdict if self._steps else None
        except OfPath as trouble:
            return Failed(trouble.error, of_path=True)
        except WeftError as error:
            logger.debug("%s failed", action.phase.value, exc_info=True)
            return Failed(error)
        except Exception as error:
            # The one place that must not end with a bug: a worker is left alone for weeks.
            logger.exception("%s failed unexpectedly", action.phase.value)
            return Failed(WeftError(f"{type(error).__name__} while {action.phase.value}: {error}"))

    def _take_note_of_stops(self) -> None:
        self._woken.clear()
        while self.life.num_stops < self._num_stops and self.life.phase is not Phase.GONE:
            self.life = after(self.life, StopRequested())

    def _pause(self, seconds: float) -> None:
        """Wait; raises Halted when the person or the coordinator wants something else meanwhile."""
        if self._woken.wait(seconds) or self._must_halt():
            raise Halted

    def _must_halt(self) -> bool:
        """Whether what is under way is to be broken off."""
        return self._steps.hand.must_halt() if self._steps else self._is_stopped()

    def _is_stopped(self) -> bool:
        """Whether the person at this machine wants what is under way broken off."""
        return self._num_stops > 1 or (self._num_stops > 0 and self.life.phase in _WITHOUT_TRAINING)

    def _put_down(self) -> None:
        """The task is no longer in hand."""
        if self._steps is not None:
            self._steps.put_down()
            self._steps = None

    def _clear_outbox(self) -> None:
        """Remove updates of an earlier process: what is still wanted of them is trained again."""
        for path in self._me.state.glob("outbox/*.update"):
            path.unlink()

    # ---- without a task ------------------------------------------------------------------------------------------

    def _connect(self, _: Action) -> Event:
        self._calls.open_session(self._me.worker_id, self._me.key, self._me.pin)
        return Done()

    def _poll(self, action: Action) -> Event:
        asked_at_s, limits = self._clock(), self._shop.limits
        answer = self._calls.poll_task(
            wait_s=action.poll_wait_s,
            unable=action.unable,
            tokens_per_s=self._shop.tokens_per_s,
            limits=limits,
        )
        self._shop.told = frozenset(limit.run_id for limit in limits)
        if answer.task is not None:
            self._steps = self._take(answer.task)
        elif (
            self._clock() - asked_at_s < AT_ONCE_S and after(self.life, Polled(answer)).phase is Phase.POLLING
        ):
            # A coordinator that does not hold the call must not be asked in circles.
            self._woken.wait(ASK_AGAIN_S)
        return Polled(answer)

    def _take(self, task: Task) -> Steps:
        return STEPS[task.purpose](self._shop, TaskInHand(task, self._calls, self._view, self._is_stopped))

    def _release(self, action: Action) -> Event:
        assert action.task is not None  # noqa: S101 - the loop says so
        self._calls.release_task(lease_token=action.task.lease_token, reason=action.reason[:200])
        return Done()

    # ---- with a task ---------------------------------------------------------------------------------------------

    def _step(self, action: Action) -> Event:
        assert self._steps is not None  # noqa: S101 - the loop says so
        self._steps.hand.check_halt()
        return _STEP_OF[action.phase](self._steps) or Done()


def _can_train_ahead(steps: Steps | None) -> TypeGuard[TrainingSteps]:
    return isinstance(steps, TrainingSteps) and steps.can_train_ahead
