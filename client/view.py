"""What a person sees of a worker: one living line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

from weft.client.cells import size
from weft.client.heartbeat import TaskProgress
from weft.client.loop import Action, Phase
from weft.common.protocol import Purpose, Stage, Task

_UPDATE_S: Final = 0.1
_QUIET: Final = frozenset({Phase.LOADING, Phase.ENCODING, Phase.SENDING, Phase.SUBMITTING})
"""Phases that plain lines leave out: the receipt says all."""


def action_line(action: Action) -> str:
    """One line for what a worker begins."""
    match action.phase:
        case _ if action.wait_s:
            return f"{action.reason}; trying again"
        case Phase.CONNECTING:
            return "connecting"
        case Phase.POLLING:
            return f"waiting for work: {action.reason}"
        case Phase.RELEASING:
            return f"giving the task back: {action.reason}"
    task = action.task
    if task is None:
        return action.reason
    if action.phase is Phase.TRAINING:
        return _work_line(task)
    return f"{action.phase.value} {_subject(task)} (task {task.task_id})"


def _work_line(task: Task) -> str:
    match task.purpose:
        case Purpose.TRAIN:
            rank = f" at rank {task.rank}" if task.rank else ""
            return f"training {_subject(task)}: {task.num_steps} steps{rank}"
        case Purpose.EVALUATE:
            return f"evaluating {_subject(task)}"
        case Purpose.ROUTE:
            return f"routing this worker's documents for {task.run_id}"


def _subject(task: Task) -> str:
    """The run, with what the task is about: modules that it trains, or those of the path that it evaluates."""
    chosen = [start for start in task.modules if start.train] or task.modules
    # A path of one module needs no name of its own.
    path = f" path {task.path}:" if len(task.modules) > 1 else ""
    modules = ", ".join(f"{start.module}@{start.version}" for start in chosen)
    return f"{task.run_id}{path} {modules}".rstrip()


def progress_line(progress: TaskProgress) -> str:
    """One line for how far a task is."""
    parts = [progress.stage.name.lower()]
    if progress.num_total:
        show = size if progress.stage in (Stage.FETCHING, Stage.SENDING) else str
        parts.append(f"{show(progress.num_done)}/{show(progress.num_total)}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.tokens_per_s:
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
    return " · ".join(parts)


class PlainView:
    """A line when something begins or is worth saying; the same one is not said twice in a row."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._last = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""

    def turn(self, action: Action) -> None:
        """See View."""
        if action.wait_s or action.phase not in _QUIET:
            self.said(action_line(action))

    def progress(self, progress: TaskProgress) -> None:
        """See View: too much for plain lines."""

    def said(self, text: str) -> None:
        """See View."""
        if text != self._last:
            self._last = text
            self._say(text)


class TerminalView:
    """What is worth saying scrolls by; below it one line that changes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = Status("", console=console)
        self._doing = ""
        self._shown_at_s = 0.0

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status.stop()

    def turn(self, action: Action) -> None:
        """See View."""
        self._doing = action_line(action)
        self._status.update(Text(self._doing))

    def progress(self, progress: TaskProgress) -> None:
        """See View."""
        # Drawing at every step would cost more than the steps of a small model.
        now_s = time.monotonic()
        if now_s - self._shown_at_s >= _UPDATE_S:
            self._shown_at_s = now_s
            self._status.update(Text(f"{self._doing} · {progress_line(progress)}"))

    def said(self, text: str) -> None:
        """See View."""
        self._console.print(Text(text))
