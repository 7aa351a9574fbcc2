"""Anonymous memory of this process and those it has started, over a while (Linux)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_PAUSE_S = 0.005


def anonymous_bytes() -> int:
    """Of all of them: a page that n processes share counts a n-th in each. Mapped files do not count."""
    this = psutil.Process()
    return sum(_anonymous_bytes(process.pid) for process in (this, *this.children(recursive=True)))


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


@dataclass(slots=True)
class Growth:
    """By how much it grew at most, once the while is over."""

    mib: float = 0.0


@contextlib.contextmanager
def watched() -> Iterator[Growth]:
    """Look at it every few milliseconds."""
    growth, over, before = Growth(), threading.Event(), anonymous_bytes()

    def watch() -> None:
        while not over.wait(_PAUSE_S):
            growth.mib = max(growth.mib, (anonymous_bytes() - before) / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield growth
    finally:
        over.set()
        watcher.join()
