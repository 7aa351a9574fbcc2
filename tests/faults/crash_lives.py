"""Lives of a coordinator that end by SIGKILL: ``python -m tests.faults.crash_lives``, driven by test_crash.py.

Reads one JSON line for each life and forks for it, so that a life costs no imports. The life opens the state
directory, serves workers, and prints what they were told, each line after the call that told it:

    pid N · open · step N · ack WORKER TASK DIGEST · version NUMBER DIGEST · end STATUS

With ``kill_at`` it kills itself at that step of the storage: before, in the middle of or after every write, fsync,
rename and removal of a file, before and after every statement of the ledger. Without, whoever reads kills it.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
from pathlib import Path
from typing import Any

from tests.harness import Site, run_file

from weft.common.blobs import Files
from weft.common.ids import ModuleKey

ROUNDS = "count = 1000000\nquorum = 2\ntarget = 2"
WORKERS = ("a", "b", "c")


class Failpoints:
    """Counts steps, and ends the process at one of them."""

    def __init__(self) -> None:
        self.steps = 0
        self.kill_at = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


POINTS = Failpoints()


class KillingFiles(Files):
    """Files with a failpoint around everything that changes them."""

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        POINTS.step()
        super().write_at(path, offset, data[: len(data) // 2])
        POINTS.step()
        super().write_at(path, offset, data)
        POINTS.step()

    def sync(self, path: Path) -> None:
        POINTS.step()
        super().sync(path)
        POINTS.step()

    def rename(self, source: Path, target: Path) -> None:
        POINTS.step()
        super().rename(source, target)
        POINTS.step()

    def remove(self, path: Path) -> None:
        POINTS.step()
        super().remove(path)
        POINTS.step()


class KillingConnection(sqlite3.Connection):
    """A connection with a failpoint around every statement, COMMIT included."""

    def execute(self, text: str, *arguments: Any) -> sqlite3.Cursor:
        POINTS.step()
        cursor = super().execute(text, *arguments)
        POINTS.step()
        return cursor


def say(*words: object) -> None:
    """One line in one write, so that a kill cuts no line in two."""
    os.write(1, (" ".join(str(word) for word in words) + "\n").encode())


def live(directory: Path, life: str, turns: int, first: int) -> None:
    """Open the directory and serve three workers in turn, beginning with the ``first``."""
    site = Site(directory, files=KillingFiles(), life=life)
    say("open")
    if not site.coordinator.runs:
        site.add_run(run_file(rounds=ROUNDS))
    site.coordinator.tick()
    workers = site.workers(*WORKERS)
    told = -1
    for turn in range(first, first + turns):
        worker = workers[turn % len(workers)]
        site.clock.advance(0.1)
        task = worker.poll().task
        if task is None:
            continue
        statement = worker.ready(task)
        digest = json.loads(statement.payload)["updates"][0]["digest"]
        say("step", POINTS.steps)
        worker.submit(task, statement)
        say("ack", worker.worker_id, task.task_id, digest)
        newest = site.run.newest(ModuleKey(0, 0))
        if newest.version > told:
            told = newest.version
            say("version", newest.version, newest.digest)
    say("step", POINTS.steps)


def main() -> None:
    """Fork a life for every line of standard input."""
    connect = sqlite3.connect
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                POINTS.kill_at = wanted["kill_at"]
                sqlite3.connect = lambda *a, **k: connect(*a, **k, factory=KillingConnection)  # type: ignore[assignment]
                say("pid", os.getpid())
                live(Path(wanted["directory"]), wanted["life"], wanted["turns"], wanted["first"])
                os._exit(0)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        say("end", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
