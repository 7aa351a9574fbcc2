"""``weft doctor``: what of this machine, and of the coordinators it knows, would keep Weft from working."""

from __future__ import annotations

import enum
import importlib.metadata
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from weft.client.home import Access, Home, load_member, load_settings, split_address
from weft.common.errors import WeftError

FREE_BYTES_MIN: Final = 5 * 10**9
CLOCK_DIFFERENCE_MAX_S: Final = 300.0
HELLO_S: Final = 5.0


class Outcome(enum.StrEnum):
    """Of one check."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at and what was found."""

    name: str
    outcome: Outcome
    found: str
    hint: str = ""
    """What to do about it."""


def examine(home: Home) -> Iterator[Check]:
    """All checks, the quick ones first."""
    yield _check_python()
    yield _check_home(home)
    yield _check_disk(home)
    yield _check_device()
    known = home.workers()
    for directory in known:
        yield _check_worker(directory)
    accesses = home.accesses()
    for access in accesses:
        yield _check_access(access)
    if not known and not accesses:
        yield Check(
            name="coordinators",
            outcome=Outcome.WARNING,
            found="none is known here",
            hint="weft join HOST:PORT TOKEN --data PATH, or weft serve run.toml",
        )


def _check_python() -> Check:
    found = f"Python {platform.python_version()}, weft {importlib.metadata.version('weft')}, {platform.platform()}"
    return Check(name="python", outcome=Outcome.OK, found=found)


def _check_home(home: Home) -> Check:
    if not home.root.exists():
        return Check(name="home", outcome=Outcome.OK, found=f"{home.root} (made when it is needed)")
    mode = home.root.stat().st_mode & 0o777
    if mode & 0o077:
        return Check(
            name="home",
            outcome=Outcome.FAILED,
            found=f"{home.root} is open to other users (mode {mode:04o})",
            hint=f"chmod 700 {home.root}",
        )
    return Check(name="home", outcome=Outcome.OK, found=f"{home.root}, mode {mode:04o}")


def _check_disk(home: Home) -> Check:
    existing = next(path for path in (home.root, *home.root.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{free / 1e9:.1f} GB free for {home.root}"
    if free < FREE_BYTES_MIN:
        return Check(
            name="disk",
            outcome=Outcome.WARNING,
            found=found,
            hint="set WEFT_HOME to a directory with more room",
        )
    return Check(name="disk", outcome=Outcome.OK, found=found)


def _check_device() -> Check:
    try:
        import torch

        from weft.client.device import available_bytes, find_device
    except ImportError as error:
        return Check(
            name="device",
            outcome=Outcome.FAILED,
            found=f"torch cannot be imported: {error}",
            hint="install weft again",
        )
    device = find_device()
    free = available_bytes(device.torch_device)
    memory = f", {free / 2**30:.1f} GiB free" if free is not None else ""
    return Check(
        name="device", outcome=Outcome.OK, found=f"{device.describe()}{memory} (torch {torch.__version__})"
    )


def _check_worker(directory: Path) -> Check:
    """Whether the coordinator of a worker is there and is the same, and the worker's data too."""
    name = f"worker {directory.name}"
    try:
        member = load_member(directory)
        settings = load_settings(directory)
        _greet(Access(member=member, key_file=directory / "key"))
    except WeftError as error:
        return Check(name=name, outcome=Outcome.FAILED, found=str(error), hint=error.hint)
    if settings is not None and not Path(settings.data).exists():
        return Check(
            name=name,
            outcome=Outcome.FAILED,
            found=f"its data is gone: {settings.data}",
            hint=f"weft join {member.address} --data PATH",
        )
    return Check(
        name=name, outcome=Outcome.OK, found=f"{member.worker_id} of {member.address}, whose identity matches"
    )


def _check_access(access: Access) -> Check:
    """Whether a coordinator answers, is the same, and agrees on the time."""
    from weft.client.join import connect

    name = f"coordinator {access.member.address}"
    try:
        _greet(access)
        with connect(access) as transport:
            ahead_s = transport.get_status().taken_at - time.time()
    except WeftError as error:
        return Check(name=name, outcome=Outcome.FAILED, found=str(error), hint=error.hint)
    if abs(ahead_s) > CLOCK_DIFFERENCE_MAX_S:
        return Check(
            name=name,
            outcome=Outcome.WARNING,
            found=f"its clock is {ahead_s:+.0f} s from this machine's",
            hint="set both clocks: certificates and tokens have ends",
        )
    return Check(
        name=name,
        outcome=Outcome.OK,
        found=f"answers as {access.member.role.value}, identity matches, clocks agree within {abs(ahead_s):.0f} s",
    )


def _greet(access: Access) -> None:
    from weft.common.identity.hello import fetch_pinned_ca

    member = access.member
    if not member.insecure:
        host, port = split_address(member.address)
        fetch_pinned_ca(host, port, bytes.fromhex(member.pin), HELLO_S, now=datetime.now(UTC))
