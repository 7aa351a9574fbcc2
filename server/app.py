"""``weft serve``, put together: state directory, identity, ledger, engine, service, metrics, signals.

The order on the way up is the order of dependence; everything that was opened is closed in reverse, whatever fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from weft.common.base import has_weights, pin_base, resolve_source
from weft.common.blobs import BlobStore
from weft.common.errors import BaseModelError, UsageError, WeftError
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.identity.files import private_directory, write_private
from weft.common.identity.signing import SigningKey
from weft.common.modules import Kind
from weft.common.protocol import Role
from weft.common.recipe import BasePin, RoutingMode
from weft.common.settings import to_table
from weft.common.wire import is_loopback
from weft.server.backend import Caller
from weft.server.coordinator import Coordinator
from weft.server.engine import Engine, EngineProcess
from weft.server.metrics import MetricsServer
from weft.server.roster import OPERATOR, Roster
from weft.server.runfile import RunFile
from weft.server.service import serve
from weft.server.store.ledger import Ledger, StateLock

logger = logging.getLogger(__name__)

TICK_S: Final = 0.5
STATE_THREADS: Final = 4
BLOB_THREADS: Final = 8
GRACE_S: Final = 2.0
RENEW_S: Final = 3600.0
DRAIN_S: Final = 60.0
"""Longest wait for a merge or a gate that is under way when the coordinator is told to stop."""


class SystemClock:
    """The real clocks."""

    def now(self) -> float:
        """Unix seconds."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds that never jump."""
        return time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What the command line says."""

    state: Path
    """State directory, mode 0700."""
    host: str = "0.0.0.0"  # noqa: S104 - workers dial in from anywhere; TLS and tokens guard the port
    """Address to listen on."""
    port: int = 7443
    """0 takes a free one."""
    advertise: str = ""
    """Host name for the join line; empty finds one."""
    http_host: str = "127.0.0.1"
    """Where /metrics and /healthz listen."""
    http_port: int | None = 7444
    """None turns them off; 0 takes a free one."""
    insecure: bool = False
    """No TLS; loopback only."""
    prints_token: bool = True
    """Whether a fresh join line is printed; not where the output is kept for many to read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A state directory in use."""

    coordinator: Coordinator
    identity: CoordinatorIdentity
    engine: Engine


@contextlib.contextmanager
def opened_state(options: ServeOptions, engine: Engine | None = None) -> Iterator[Opened]:
    """Open a state directory, making it if it is not there.

    Raises:
        StateLocked: Another coordinator uses it.
        CorruptState: It is damaged.
        AccessError: Others can read it.
    """
    state, clock = options.state, SystemClock()
    with contextlib.ExitStack() as stack:
        for directory in (state, state / "identity", state / "scratch"):
            private_directory(directory)
        lock = StateLock(state)
        stack.callback(lock.release)
        for left_over in (state / "scratch").iterdir():
            left_over.unlink()
        identity = CoordinatorIdentity.create_or_load(state / "identity", _names(options), datetime.now(UTC))
        operator = SigningKey.create_or_load(state / "operator.key")
        ledger = Ledger(state / "ledger.db")
        stack.callback(ledger.close)
        roster = Roster(ledger, identity, clock)
        roster.admit_operator(operator.public)
        engine = engine or EngineProcess()
        stack.callback(engine.close)
        coordinator = Coordinator(
            name=socket.gethostname(),
            ledger=ledger,
            blobs=BlobStore(state / "blobs"),
            scratch=state / "scratch",
            identity=identity,
            roster=roster,
            engine=engine,
            clock=clock,
        )
        stack.callback(coordinator.close)
        # The engine's threads write to the ledger: it ends first.
        stack.callback(engine.close)
        yield Opened(coordinator=coordinator, identity=identity, engine=engine)


def start_run(opened: Opened, run_file: RunFile, scratch: Path, say: Callable[[str], None]) -> None:
    """Start a run, or go on with it when the ledger has it.

    Raises:
        RunFileError: It exists with other settings.
        BaseModelError: The base is not the pinned one, or cannot carry the modules.
        DataError: The held-out data cannot be used.
    """
    if opened.coordinator.check_same(run_file):
        say(f"run {run_file.name}: resumed from the ledger")
        return
    directory = resolve_source(run_file.base.source, revision=run_file.base.revision)
    if not has_weights(directory):
        directory = _new_base(opened, run_file, directory, scratch.parent / "bases", say)
    is_local = Path(run_file.base.source).is_absolute()
    base = pin_base(
        directory, hub_id="" if is_local else run_file.base.source, revision=run_file.base.revision
    )
    _check_pin(run_file, base)
    say(
        f"run {run_file.name}: preparing modules over base {base.digest[:12]} ({base.size_bytes / 1e6:.1f} MB)"
    )
    job = {
        "job": "prepare",
        "base": str(directory),
        "recipe": to_table(run_file.recipe(base)),
        "to": str(scratch),
        "heldout": run_file.gate.heldout,
        "router": run_file.routing.router,
        "num_sequences_max": run_file.gate.num_sequences_max,
    }
    prepared = opened.engine.submit(job).result()
    opened.coordinator.add_run(run_file, base, directory, prepared)
    if not run_file.gate.heldout:
        say(f"run {run_file.name}: no gate.heldout, so every merged version is published without a check")


def _new_base(opened: Opened, run_file: RunFile, source: Path, to: Path, say: Callable[[str], None]) -> Path:
    """A base made from a configuration alone; only full modules can make something of random weights."""
    if run_file.topology.kind is not Kind.FULL:
        raise BaseModelError(
            f"{source} has no weights, and adapters need a trained base",
            hint='download the model\'s safetensors files, or set topology.kind = "full" to train from scratch',
        )
    private_directory(to)
    base = to / f"{run_file.name}-{run_file.inner.seed}"
    if not base.exists():
        say(f"run {run_file.name}: {source} has no weights; making some from its config.json and inner.seed")
        job = {"job": "create_base", "source": str(source), "to": str(base), "seed": run_file.inner.seed}
        opened.engine.submit(job).result()
    return base


def _check_pin(run_file: RunFile, base: BasePin) -> None:
    if run_file.base.digest not in ("", base.digest):
        raise BaseModelError(
            f"{run_file.base.source} has digest {base.digest[:12]}…, base.digest says {run_file.base.digest[:12]}…",
            hint="use the base that the run file pins, or change base.digest",
        )


def on_signals(stop: Callable[[], None]) -> None:
    """Call ``stop`` at SIGINT and SIGTERM; only in the main thread."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)


async def run_service(
    opened: Opened,
    options: ServeOptions,
    *,
    say: Callable[[str], None],
    ready: Callable[[int], None] = lambda _port: None,
    on_stop: Callable[[Callable[[], None]], None] = on_signals,
) -> None:
    """Serve until it is told to stop; the first time drains, a second one stops at once.

    Args:
        opened: The state in use.
        options: Where to listen.
        say: Takes lines for people.
        ready: Told the port when it listens.
        on_stop: Given, on the event loop, what tells the service to stop; SIGINT and SIGTERM do by default.
    """
    coordinator, identity = opened.coordinator, opened.identity
    stop, now = asyncio.Event(), asyncio.Event()
    on_stop(lambda: now.set() if stop.is_set() else stop.set())
    credentials = None if options.insecure else lambda: (identity.leaf.chain_pem, identity.leaf.key_pem)
    async with contextlib.AsyncExitStack() as stack:
        # Two pools, so that moving bytes never holds up the reports that keep leases alive.
        state = stack.enter_context(ThreadPoolExecutor(STATE_THREADS, thread_name_prefix="state"))
        blobs = stack.enter_context(ThreadPoolExecutor(BLOB_THREADS, thread_name_prefix="blobs"))
        server = await serve(
            coordinator,
            state=state,
            blobs=blobs,
            host=options.host,
            port=options.port,
            credentials=credentials,
        )
        stack.push_async_callback(server.stop, GRACE_S)
        address = f"{options.advertise or _own_address(options.host)}:{server.port}"
        stack.enter_context(_local_pointer(options, identity, f"{_local_host(options.host)}:{server.port}"))
        await stack.enter_async_context(_ticking(coordinator, identity))
        if options.http_port is not None:
            metrics = MetricsServer(
                options.http_host, options.http_port, lambda: coordinator.get_status(_OPERATOR, run_id="")
            )
            stack.callback(metrics.close)
            say(f"metrics  http://{options.http_host}:{metrics.port}/metrics · health /healthz")
        _announce(coordinator, identity, options, address, say)
        ready(server.port)
        await stop.wait()
        say("stopping: no new tasks; workers keep training and come back. Ctrl-C again stops at once")
        await _drain(coordinator, now)
    say("stopped; weft serve with the same --state resumes")


_OPERATOR: Final = Caller(worker_id=OPERATOR, role=Role.ADMIN, runs=(), peer="local")


async def _drain(coordinator: Coordinator, now: asyncio.Event) -> None:
    coordinator.drain()
    deadline = time.monotonic() + DRAIN_S
    while coordinator.busy and not now.is_set() and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(now.wait(), TICK_S)


@contextlib.asynccontextmanager
async def _ticking(coordinator: Coordinator, identity: CoordinatorIdentity) -> AsyncIterator[None]:
    """Let time act on the coordinator, in a thread, for as long as the service runs."""

    async def tick() -> None:
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await asyncio.to_thread(coordinator.tick)
                if time.monotonic() - renewed > RENEW_S:
                    renewed = time.monotonic()
                    await asyncio.to_thread(identity.renew_if_due, datetime.now(UTC))
            except WeftError as error:
                # A full disk, most likely: nothing was changed, and the next tick tries again.
                logger.error("%s", error)
            except Exception:
                # Time must go on: without ticks no lease would end and no round would close.
                logger.exception("a tick failed")

    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _announce(
    coordinator: Coordinator,
    identity: CoordinatorIdentity,
    options: ServeOptions,
    address: str,
    say: Callable[[str], None],
) -> None:
    tls = "no TLS, loopback only" if options.insecure else f"TLS, CA sha256 {identity.pin.hex()[:16]}…"
    say(f"listening on {options.host}:{address.rsplit(':', 1)[1]} · {tls} · state {options.state} (0700)")
    for name, run in sorted(coordinator.runs.items()):
        done = min(rounds[-1].number - 1 for rounds in run.rounds.values())
        say(f"run {name}: {len(run.rounds)} module(s), {done} of {run.run_file.rounds.count} rounds done")
    modes = {run.recipe.routing.mode for run in coordinator.runs.values()}
    flags = join_flags(modes, insecure=options.insecure)
    if not options.prints_token:
        say("join a worker (weft token create prints a token):")
        say(f"  weft join {address} TOKEN{flags}")
        return
    token = coordinator.create_token(
        _OPERATOR,
        request_id=f"serve-{os.getpid()}",
        role=Role.WORKER,
        ttl_s=0,
        num_uses=0,
        needs_approval=False,
        runs=(),
        label="printed by weft serve",
    )
    say("join a worker (token valid 24 h, 16 uses):")
    say(f"  weft join {address} {token}{flags}")


def join_flags(modes: Set[RoutingMode], *, insecure: bool) -> str:
    """What ``weft join`` needs beside address and token: the operator's documents come with the tasks."""
    data = "" if modes == {RoutingMode.GIVEN} else " --data PATH"
    return data + (" --insecure" if insecure else "")


@contextlib.contextmanager
def _local_pointer(options: ServeOptions, identity: CoordinatorIdentity, address: str) -> Iterator[None]:
    """Let commands on this machine find the coordinator without flags, for as long as it serves."""
    entry: dict[str, Any] = {
        "address": address,
        "ca_pem": identity.ca_pem,
        "tls_name": identity.tls_name,
        "pin": identity.pin.hex(),
        "worker_id": OPERATOR,
        "insecure": options.insecure,
    }
    write_private(options.state / "local.json", json.dumps(entry).encode())
    home = Path(os.environ.get("WEFT_HOME", "~/.weft")).expanduser()
    state = str(options.state.resolve())
    pointer = home / "local" / f"{hashlib.sha256(state.encode()).hexdigest()[:16]}.json"
    for directory in (home, pointer.parent):
        private_directory(directory)
    write_private(pointer, json.dumps({"state": state, "pid": os.getpid()}).encode())
    try:
        yield
    finally:
        pointer.unlink(missing_ok=True)


def _names(options: ServeOptions) -> list[str]:
    names = [
        "localhost",
        "127.0.0.1",
        "::1",
        socket.gethostname(),
        options.advertise,
        _own_address(options.host),
    ]
    return sorted({name for name in names if name})


def _local_host(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host  # noqa: S104 - compared, not bound


def _own_address(host: str) -> str:
    """The address by which others most likely reach this machine."""
    if host not in ("0.0.0.0", "::", ""):  # noqa: S104 - compared, not bound
        return host
    # Connecting a datagram socket sends nothing; it only asks the routing table.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return socket.gethostname()


def parse_address(text: str, option: str, *, default_port: int) -> tuple[str, int]:
    """HOST:PORT, HOST or :PORT; raises UsageError."""
    host, _, port = text.rpartition(":") if ":" in text else (text, "", str(default_port))
    if not port.isdigit() or int(port) > 65535:
        raise UsageError(
            f"{option} {text!r} is not HOST:PORT", hint=f"for example {option} 0.0.0.0:{default_port}"
        )
    return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104 - the documented default


def check_insecure(options: ServeOptions) -> None:
    """Plain text is for the loopback interface alone; raises UsageError."""
    if options.insecure and not is_loopback(options.host):
        raise UsageError(
            f"--insecure refuses to listen on {options.host}",
            hint="add --listen 127.0.0.1:7443, or drop --insecure",
        )
