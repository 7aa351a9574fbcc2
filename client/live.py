"""``weft watch``, following: each status as it comes, on a terminal, as lines, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Final, Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from weft.client.cells import plain
from weft.client.watch import render, steps
from weft.common.errors import NetworkError
from weft.common.protocol import Status

RETRY_S: Final = 2.0


class Screen(Protocol):
    """Where a status is shown."""

    def show(self, status: Status) -> None:
        """Show the newest status."""

    def trouble(self, text: str) -> None:
        """Say that there is none now, and why."""


def follow(
    watch: Callable[[], Iterator[Status]],
    screen: Screen,
    *,
    until_finished: bool,
    pause: Callable[[float], object],
) -> None:
    """Show every status, through restarts of the coordinator.

    Args:
        watch: Starts to stream.
        screen: Where to.
        until_finished: Return when all runs shown are finished.
        pause: Waits that many seconds.
    """
    while True:
        try:
            for status in watch():
                screen.show(status)
                if until_finished and status.runs and all(run.finished for run in status.runs):
                    return
        except NetworkError as error:
            screen.trouble(f"{error}; trying again")
        pause(RETRY_S)


class _Plain:
    """A screen that needs no opening."""

    def __init__(self, say: Callable[[str], object]) -> None:
        self._say = say

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""


class JsonLines(_Plain):
    """One line of JSON a status."""

    def show(self, status: Status) -> None:
        """See Screen."""
        self._say(json.dumps(plain(status)))

    def trouble(self, text: str) -> None:
        """See Screen: the lines are statuses and nothing else."""


class Lines(_Plain):
    """One line for each change of a round or path."""

    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__(say)
        self._last: Status | None = None
        self._trouble = ""

    def show(self, status: Status) -> None:
        """See Screen."""
        for line in steps(self._last, status):
            self._say(line)
        self._last, self._trouble = status, ""

    def trouble(self, text: str) -> None:
        """See Screen."""
        if text != self._trouble:
            self._trouble = text
            self._say(text)


class Curtain:
    """A terminal: each picture over the last one."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, status: Status) -> None:
        """See Screen."""
        self._live.update(render(status), refresh=True)

    def trouble(self, text: str) -> None:
        """See Screen."""
        self._live.update(Text(text, style="yellow"), refresh=True)
