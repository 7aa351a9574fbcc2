"""What keeps a lease: a thread that reports how far a task is, and hears when it is over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from weft.client.loop import Event, Failed, Told
from weft.common.errors import AccessError, SessionExpired, SubmissionRefused, WeftError
from weft.common.protocol import LossPoint, ProgressAnswer, Stage, Task

logger = logging.getLogger(__name__)

REPORTS_PER_LEASE: Final = 5
"""Reports within the time after which silence loses a lease."""
LOSSES_PER_REPORT: Final = 100
END_S: Final = 2.0
"""Longest wait for a report that is under way when its task is over."""


class Reports(Protocol):
    """Where reports go: a transport."""

    def report_progress(
        self,
        *,
        lease_token: str,
        stage: Stage,
        num_done: int,
        num_total: int,
        tokens_per_s: float = ...,
        losses: tuple[LossPoint, ...] = ...,
    ) -> ProgressAnswer:
        """Keep the lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskProgress:
    """How far a task is."""

    stage: Stage
    num_done: int = 0
    num_total: int = 0
    loss: float | None = None
    """Of the last step."""
    tokens_per_s: float = 0.0
    """Of training; 0 when not known yet."""


class Heartbeat:
    """Reports a task's progress until the lease is over; its thread lives as long as the task is in hand."""

    def __init__(self, calls: Reports, task: Task) -> None:
        self.verdict: Event | None = None
        """What ended the task, once something did."""
        self._calls = calls
        self._task = task
        self._lock = threading.Lock()
        self._progress = TaskProgress(stage=Stage.FETCHING)
        self._losses: list[LossPoint] = []
        self._due = threading.Event()
        self._over = False
        self._thread = threading.Thread(target=self._run, name="weft-heartbeat", daemon=True)
        self._thread.start()

    def reached(self, progress: TaskProgress, losses: Sequence[LossPoint] = ()) -> None:
        """Take note of progress; a new stage is reported at once."""
        with self._lock:
            new_stage = progress.stage is not self._progress.stage
            self._progress = progress
            self._losses = [*self._losses, *losses][-LOSSES_PER_REPORT:]
        if new_stage:
            self._due.set()

    def end(self) -> None:
        """Report no more; a report that is under way may still end by itself, which changes nothing."""
        self._over = True
        self._due.set()
        self._thread.join(END_S)

    def beat(self) -> None:
        """Report once."""
        with self._lock:
            progress, losses = self._progress, tuple(self._losses)
        answer = self._calls.report_progress(
            lease_token=self._task.lease_token,
            stage=progress.stage,
            num_done=progress.num_done,
            num_total=progress.num_total,
            tokens_per_s=progress.tokens_per_s,
            losses=losses,
        )
        with self._lock:
            self._losses = [loss for loss in self._losses if loss not in losses]
        if answer.stop:
            self.verdict = Told(answer.reason)

    def _run(self) -> None:
        while self.verdict is None:
            self._due.wait(self._task.lease_s / REPORTS_PER_LEASE)
            self._due.clear()
            if self._over:
                return
            try:
                self.beat()
            except SessionExpired as error:
                logger.debug("no report: %s", error)
            except (SubmissionRefused, AccessError) as error:
                self.verdict = Failed(error)
            except WeftError as error:
                # A coordinator that restarts arms all leases anew: nothing is lost by trying again.
                logger.debug("no report: %s", error)
