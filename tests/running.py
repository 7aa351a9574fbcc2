"""A coordinator that really serves over TLS and workers that really train, as threads of one process.

The state directory, the ledger, the service, the transfers, the trainer and the mathematics of the merge process are
the product's own; only processes and signals are replaced, since starting PyTorch takes longer than a whole test.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from weft.client import join as joining
from weft.client.home import Home, save_settings
from weft.client.loop import Action, Life
from weft.client.worker import TaskProgress
from weft.common.composition import ResidentBase, describe
from weft.common.errors import BY_NAME, EngineFailed, WeftError
from weft.common.ids import ModuleKey, RunId
from weft.common.protocol import Role, Stage
from weft.server.app import Opened, ServeOptions, opened_state, run_service, start_run
from weft.server.backend import Caller
from weft.server.coordinator import Coordinator
from weft.server.engine_process import Jobs
from weft.server.roster import OPERATOR
from weft.server.rounds import Round
from weft.server.runfile import load_run_file

with warnings.catch_warnings():
    # typer imports names that click 8.4 and later deprecate.
    warnings.simplefilter("ignore", DeprecationWarning)
    from weft.common.cli import main as main

PATIENCE_S = 60.0
"""Longest time for anything that a test waits for; the machine may be busy."""
_LOOK_S = 0.02
OPERATORS = Caller(worker_id=OPERATOR, role=Role.ADMIN, runs=(), peer="")
"""Calls of the operator's own."""


def eventually(
    condition: Callable[[], Any], what: Callable[[], object] | str = "", *, within_s: float = PATIENCE_S
) -> Any:
    """Wait until ``condition`` gives something true and return it; raises AssertionError after ``within_s``."""
    ends_s, pause = time.monotonic() + within_s, threading.Event()
    while not (found := condition()):
        if time.monotonic() >= ends_s:
            found = what() if callable(what) else what
            raise AssertionError(f"not within {within_s:.0f} s: {found or condition}")
        pause.wait(_LOOK_S)
    return found


def one_model_at_a_time(patch: pytest.MonkeyPatch) -> None:
    """Let threads make models in turn: while it does, transformers changes the state of the whole process."""
    making = threading.RLock()

    def in_turn(make: Callable[..., Any]) -> Callable[..., Any]:
        def make_alone(*arguments: Any, **options: Any) -> Any:
            with making:
                return make(*arguments, **options)

        return make_alone

    patch.setattr(ResidentBase, "load", in_turn(ResidentBase.load))
    patch.setattr(ResidentBase, "compose", in_turn(ResidentBase.compose))
    for module in ("client.workshop", "server.engine_process"):
        patch.setattr(f"weft.{module}.describe", in_turn(describe))


def shorten_leases(patch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let silence end a lease sooner."""
    for name, module in list(sys.modules.items()):
        if name.startswith("weft.server.") and hasattr(module, "LEASE_S"):
            patch.setattr(module, "LEASE_S", seconds)


class ThreadEngine:
    """The merge process's jobs, one at a time, in a thread of this process."""

    def __init__(self, jobs: Jobs) -> None:
        self.may_run = threading.Event()
        self.may_run.set()
        self.running = threading.Event()
        """Set when a job was begun."""
        self.failing: list[WeftError] = []
        """Raised by the next jobs instead of what they would do."""
        self._jobs = jobs
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def submit(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        return self._pool.submit(self._run, json.dumps(job))

    def close(self) -> None:
        """As the process is killed: what waits for ``may_run`` fails."""
        self._closed = True
        self.may_run.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, text: str) -> dict[str, Any]:
        job = json.loads(text)
        self.running.set()
        if job["job"] != "prepare":
            self.may_run.wait(PATIENCE_S)
        if self._closed:
            raise EngineFailed("the coordinator is stopping")
        if self.failing:
            raise self.failing.pop(0)
        try:
            result = self._jobs.run(job)
        except WeftError as error:
            # Only what a process can say of an error comes over.
            raise BY_NAME[type(error).__name__](error.message, hint=error.hint) from None
        answer: dict[str, Any] = json.loads(json.dumps(result))
        return answer


class Site:
    """A coordinator's state directory and, between ``start`` and ``stop``, the coordinator that serves it."""

    def __init__(
        self, directory: Path, jobs: Jobs, *, host: str = "127.0.0.1", insecure: bool = False
    ) -> None:
        self.state = directory / "state"
        self.home = Home(directory / "home")
        """Of the workers."""
        self.port = 0
        self.said: list[str] = []
        self._jobs = jobs
        self._host = host
        self._insecure = insecure
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="coordinator")
        self._running: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._pool.shutdown()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def join_line(self) -> list[str]:
        """The line to hand out, as it was printed, in words."""
        return next(line for line in reversed(self.said) if line.strip().startswith("weft join")).split()

    @property
    def token(self) -> str:
        return self.join_line[3]

    def start(self, *run_files: Path) -> Self:
        """Serve, on the port that it had before; raises what keeps it from serving."""
        ready: Future[int] = Future()
        self.engine = ThreadEngine(self._jobs)
        self._running = self._pool.submit(self._serve, run_files, ready)
        self.port = ready.result(PATIENCE_S)
        return self

    def stop(self, *, times: int = 1) -> None:
        """Tell it to stop, ``times`` times, and wait until it has."""
        if self._running is not None:
            for _ in range(times):
                self.tell_to_stop()
            self._running.result(PATIENCE_S)
            self._running = None

    @property
    def stopped(self) -> bool:
        return self._running is None or self._running.done()

    def round(self, run: str, module: str = "0.0") -> Round:
        """The current round."""
        return self.coordinator.runs[RunId(run)].current(ModuleKey.parse(module))

    def rounds(self, run: str, module: str = "0.0") -> list[Round]:
        """Past rounds and the current one."""
        return self.coordinator.runs[RunId(run)].rounds[ModuleKey.parse(module)]

    def file(self, run: str, module: str = "0.0") -> Path:
        """Where the newest version lies."""
        digest = self.coordinator.runs[RunId(run)].newest(ModuleKey.parse(module)).digest
        return self.state / "blobs" / digest[:2] / digest

    def version(self, run: str, module: str = "0.0") -> int:
        """The newest version."""
        return self.coordinator.runs[RunId(run)].newest(ModuleKey.parse(module)).version

    def create_token(self, **wanted: Any) -> str:
        """A join token, unlike the printed one where ``wanted`` says so."""
        settings: dict[str, Any] = {
            "request_id": secrets.token_hex(8),
            "role": Role.WORKER,
            "ttl_s": 0.0,
            "num_uses": 0,
            "needs_approval": False,
            "runs": (),
            "label": "",
        }
        return self.coordinator.create_token(OPERATORS, **(settings | wanted))

    def picture(self) -> str:
        """What the rounds wait for and what happened, for a message."""
        runs = self.coordinator.runs.values()
        rounds = [rounds_[-1] for run in runs for rounds_ in run.rounds.values()]
        now = [
            f"{item.run}/{item.module} round {item.number} {item.state.name}: {item.reason}"
            for item in rounds
        ]
        return "\n".join([*now, *self.events()])

    def events(self) -> list[str]:
        """The ledger's journal."""
        return [event.text for event in self.coordinator.state.ledger.events()]

    def _serve(self, run_files: tuple[Path, ...], ready: Future[int]) -> None:
        options = ServeOptions(
            state=self.state, host=self._host, port=self.port, http_port=None, insecure=self._insecure
        )
        try:
            with opened_state(options, self.engine) as opened:
                for path in run_files:
                    start_run(opened, load_run_file(path), options.state / "scratch", self.said.append)
                self.coordinator: Coordinator = opened.coordinator
                asyncio.run(self._service(opened, options, ready))
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)

    async def _service(self, opened: Opened, options: ServeOptions, ready: Future[int]) -> None:
        loop = asyncio.get_running_loop()

        def on_stop(stop: Callable[[], None]) -> None:
            self.tell_to_stop = partial(loop.call_soon_threadsafe, stop)

        await run_service(opened, options, say=self.said.append, ready=ready.set_result, on_stop=on_stop)


class Recorder:
    """A worker's view: keeps what was said and, if told to, holds the worker in the middle of its training."""

    def __init__(self, *, holds: bool = False) -> None:
        self.lines: list[str] = []
        self.training = threading.Event()
        """Set at the first training step."""
        self.may_train = threading.Event()
        if not holds:
            self.may_train.set()

    def turn(self, action: Action) -> None:
        self.lines.append(f"{action.phase.value}: {action.reason}{'; waits' if action.wait_s else ''}")

    def progress(self, progress: TaskProgress) -> None:
        if progress.stage is Stage.TRAINING and progress.num_done:
            self.training.set()
            self.may_train.wait(PATIENCE_S)

    def said(self, text: str) -> None:
        self.lines.append(text)

    def has(self, text: str) -> bool:
        return any(text in line for line in self.lines)


class Hand:
    """A worker that joined: its directory, and between ``start`` and its end the thread that it works in."""

    def __init__(
        self,
        address: str,
        token: str,
        data: Path,
        home: Home,
        name: str,
        *,
        base: Path | None = None,
        holds: bool = False,
    ) -> None:
        self.name = name
        self.view = Recorder(holds=holds)
        self.state = home.root / "workers" / name
        self._home = home
        self._settings = joining.settle(
            self.state, {"data": str(data), "name": name, "base": str(base) if base else None, "threads": 1}
        )
        parsed = joining.read_token(token, {}, sys.stdin)
        assert parsed is not None
        ca_pem = joining.greet(address, parsed, insecure=False, now=datetime.now(UTC))
        self.member = joining.register(
            self.state, address, parsed, ca_pem=ca_pem, name=name, device="a thread"
        )
        save_settings(self.state, self._settings)

    @property
    def worker_id(self) -> str:
        return self.member.worker_id

    def start(self, *, leave_when_finished: bool = True) -> Self:
        device = joining.choose_device(self._settings)
        self.worker, self.transport = joining.make_worker(
            self._home,
            self.state,
            self.member,
            self._settings,
            device,
            view=self.view,
            leave_when_finished=leave_when_finished,
        )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=self.name)
        self._living = self._pool.submit(self.worker.run)
        return self

    @property
    def gone(self) -> bool:
        return self._living.done()

    def ended(self) -> Life:
        """Wait for the end of its life."""
        life = self._living.result(PATIENCE_S)
        self._pool.shutdown()
        self.transport.close()
        return life

    def stop(self) -> Life:
        """Tell it to leave at once and wait until it has."""
        self.view.may_train.set()
        self.worker.request_stop()
        self.worker.request_stop()
        return self.ended()


@contextlib.contextmanager
def working(*hands: Hand, leave_when_finished: bool = True) -> Iterator[tuple[Hand, ...]]:
    """Workers that work meanwhile; those who have not left at the end are told to."""
    started = [hand.start(leave_when_finished=leave_when_finished) for hand in hands]
    try:
        yield hands
    finally:
        for hand in started:
            hand.stop()


RUN = """
[run]
name = "{name}"
idle_s = {idle_s}
[base]
source = "{base}"
[topology.lora]
rank = 4
alpha = 8.0
[inner]
steps = {steps}
batch_size = 4
sequence_length = 16
learning_rate = 1e-2
[rounds]
count = {count}
quorum = {quorum}
target = {quorum}
"""


def write_run(
    path: Path,
    base: Path,
    more: str = "",
    *,
    count: int = 2,
    quorum: int = 2,
    steps: int = 4,
    idle_s: int = 60,
) -> Path:
    """Write the run file of a microscopic run, named as the file; ``more`` adds keys or replaces whole sections."""
    head = RUN.format(name=path.stem, base=base, count=count, quorum=quorum, steps=steps, idle_s=idle_s)
    given = {line.strip() for line in more.splitlines() if line.startswith("[")}
    sections = [part for part in head.split("\n[") if f"[{part.partition(']')[0].lstrip('[')}]" not in given]
    path.write_text("\n[".join(sections) + "\n" + more)
    return path


def operator_home(site: Site, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point the commands of this process at the coordinator's own machine."""
    home = site.home.root.parent / "operator"
    monkeypatch.setenv("WEFT_HOME", str(home))
    return home


class Program:
    """The ``weft`` command in a process of its own."""

    def __init__(self, *words: str | Path, home: Path, directory: Path, name: str) -> None:
        self.out, self.err = directory / f"{name}.out", directory / f"{name}.err"
        environment: Mapping[str, str] = {
            **os.environ,
            "WEFT_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with self.out.open("w") as out, self.err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "weft.common.cli", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def shown(self) -> str:
        """What it printed so far."""
        return self.out.read_text()

    def says(self, text: str) -> str:
        """Wait for a line with ``text`` and return it."""

        def line() -> str | None:
            found = next((line for line in self.shown().splitlines() if text in line), None)
            assert found or not self.ended, f"it ended: {self.shown()}\n{self.err.read_text()}"
            return found

        return str(eventually(line, f"{text!r} in {self.out.name}"))

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill -9."""
        self._process.kill()
        self._process.wait()

    def code(self) -> int:
        """Wait for its end."""
        return self._process.wait(PATIENCE_S)
