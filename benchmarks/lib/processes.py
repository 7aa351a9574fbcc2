"""Processes of a benchmark: started, waited for, ended in order, and asked for their peak memory (Linux)."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

STOP_S = 30.0
BENCHMARKS = Path(__file__).parents[1]


def environment(home: Path) -> dict[str, str]:
    """With a home of its own, lines that are long enough for a token, and these modules."""
    return {
        **os.environ,
        "WEFT_HOME": str(home),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "400",
        "PYTHONPATH": str(BENCHMARKS),
    }


@contextlib.contextmanager
def started(*arguments: str, log: Path, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process with its output in ``log``; ended in order however the body ends."""
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *arguments], stdout=out, env=environment(home))
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        process.wait()


def wait_for(log: Path, pattern: str, process: subprocess.Popen[bytes]) -> re.Match[str]:
    """Wait until the log of a process says something that matches."""
    while not (found := re.search(pattern, log.read_text())):
        assert process.poll() is None, f"it ended: {log.read_text()}"
        time.sleep(0.02)
    return found


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a process that ends by itself."""
    status = process.wait()
    assert status == 0, f"{process.args!r} ended with status {status}"


def peak_mb(pid: int) -> float:
    """Peak resident memory of a process so far, 10⁶ bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def children(pid: int) -> list[int]:
    """Processes that a process started, from any of its threads."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]
