"""The task in hand: its reports, and the ways out of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from weft.client.heartbeat import Heartbeat, Reports, TaskProgress
from weft.client.loop import Action
from weft.common.errors import CorruptState, DataError, NotFound, WeftError
from weft.common.protocol import LossPoint, Stage, Task

Progress = Callable[[int, int], None]
"""Told how much is done, and of how much."""


class View(Protocol):
    """What follows a worker, to show it to a person."""

    def turn(self, action: Action) -> None:
        """The worker begins something."""

    def progress(self, progress: TaskProgress) -> None:
        """A task got further; called often."""

    def said(self, text: str) -> None:
        """Something to know, said once."""


class Halted(Exception):
    """Breaks off what is under way."""


class OfPath(Exception):
    """What went wrong concerns the data of the task's path, not the run."""

    def __init__(self, error: WeftError) -> None:
        super().__init__(str(error))
        self.error = error


@contextlib.contextmanager
def concerns_path() -> Iterator[None]:
    """Data that vanished, is damaged or too little is the path's trouble: other paths of the run have other data."""
    try:
        yield
    except (NotFound, CorruptState, DataError) as error:
        raise OfPath(error) from error


class TaskInHand:
    """A task that this worker holds the lease of.

    Args:
        task: What to do.
        calls: Where its progress is reported, which keeps the lease.
        view: Sees the same progress.
        halts: Whether the person at this machine wants it broken off.
    """

    def __init__(self, task: Task, calls: Reports, view: View, halts: Callable[[], bool]) -> None:
        self.task = task
        self.heartbeat = Heartbeat(calls, task)
        self.tokens_per_s = 0.0
        """Of its training; 0 before."""
        self._view = view
        self._halts = halts

    def must_halt(self) -> bool:
        """Whether what is under way is to be broken off."""
        return self.heartbeat.verdict is not None or self._halts()

    def check_halt(self) -> None:
        """Raise Halted where need be."""
        if self.must_halt():
            raise Halted

    def reached(
        self, stage: Stage, num_done: int = 0, num_total: int = 0, losses: Sequence[LossPoint] = ()
    ) -> None:
        """Tell coordinator and view how far the task is."""
        progress = TaskProgress(
            stage=stage,
            num_done=num_done,
            num_total=num_total,
            loss=losses[-1].loss if losses else None,
            tokens_per_s=self.tokens_per_s,
        )
        self.heartbeat.reached(progress, losses)
        self._view.progress(progress)

    def follow(self, stage: Stage) -> Progress:
        """What reports the progress of a stage, and breaks it off where need be."""

        def on_progress(num_done: int, num_total: int) -> None:
            self.reached(stage, num_done, num_total)
            self.check_halt()

        return on_progress

    def on_bytes(self, stage: Stage) -> Progress:
        """What follows one transfer after another."""
        before = last = 0
        follow = self.follow(stage)

        def on_bytes(num_done: int, num_total: int) -> None:
            nonlocal before, last
            # A new transfer counts from zero: what is reported must grow, or it is no progress.
            before, last = before + (last if num_done < last else 0), num_done
            follow(before + num_done, before + num_total)

        return on_bytes

    def on_tokenised(self, num_documents: int, _: int) -> None:
        """Follow data that is being read."""
        self.reached(Stage.LOADING, num_documents)
        self.check_halt()
