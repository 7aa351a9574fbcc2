"""What a result was measured on, for the head of its page."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def setting(packages: tuple[str, ...], *, load_before: float) -> str:
    """One paragraph: date, machine, load, versions, command."""
    # Paths are the machine's own.
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return (
        f"{datetime.now(UTC):%Y-%m-%d} · {os.cpu_count()} cores, {processor()}, {memory_gb():.0f} GB memory · "
        f"load average {load_before:.1f} before and {os.getloadavg()[0]:.1f} after, other work included · "
        f"Python {platform.python_version()}, {versions} · `{command}`"
    )
