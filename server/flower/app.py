"""The ServerApp: Weft's coordinator, its ledger and its merge process in the process that Flower starts for a run."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from weft.common.errors import RunFileError, UsageError
from weft.common.settings import from_table
from weft.server.app import ServeOptions, opened_state, start_run
from weft.server.flower.gateway import TASK_S, Gateway
from weft.server.flower.post import FlowerPost
from weft.server.runfile import load_run_file

logger = logging.getLogger(__name__)

TURN_S: Final = 0.5
"""Pause between two looks at the SuperLink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AppSettings:
    """The app's run configuration: ``[tool.flwr.app.config]``, or ``flwr run --run-config``."""

    run: str
    """The run file, an absolute path on the machine of the SuperLink."""
    state: str
    """The coordinator's state directory there, absolute; `weft serve`, `weft verify` read it like any other."""
    task_s: float = TASK_S
    """Longest time for a task, from its message to its answer."""

    def __post_init__(self) -> None:
        for path in (self.run, self.state):
            if not Path(path).is_absolute():
                raise UsageError(f"{path!r} is no absolute path", hint="flwr run … --run-config 'run=\"/…\"'")
        if self.task_s <= 0:
            raise UsageError("task-s is how long a task may take, more than 0")


def read_settings(config: Mapping[str, object]) -> AppSettings:
    """The app's settings; ``task-s`` and ``task_s`` are the same. Raises UsageError."""
    try:
        return from_table(AppSettings, {key.replace("-", "_"): value for key, value in config.items()})
    except RunFileError as error:
        raise UsageError(f"run configuration: {error.message}", hint=error.hint) from error


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train a run file's run to its end over the nodes of a federation.

    Raises:
        WeftError: The run file, the base or the state directory cannot be used.
    """
    settings = read_settings(context.run_config)
    state, pause = Path(settings.state), threading.Event()
    with opened_state(ServeOptions(state=state)) as opened:
        start_run(opened, load_run_file(Path(settings.run)), state / "scratch", _say)
        gateway = Gateway(
            opened.coordinator,
            opened.identity,
            FlowerPost(grid),
            clock=time.monotonic,
            rng_bytes=os.urandom,
            task_s=settings.task_s,
            say=_say,
        )
        gateway.run(lambda: pause.wait(TURN_S))
        _say(
            f"finished: {gateway.num_accepted} updates, {gateway.bytes_out:,} bytes out, {gateway.bytes_in:,} in"
        )


def _say(text: str) -> None:
    # Flower shows what its apps print: `flwr log`.
    print(text, flush=True)  # noqa: T201
