"""A run with many clients on one machine: the gateway over Flower's simulation engine, or over processes of our own.

    <state>/                 an ordinary coordinator's state: ledger, blobs, keys
    <state>/clients/00042/   client 42: its settings, key and training state
    <state>/clients/data/    documents, where they were dealt out

The clients' half is named here and not imported, as Flower's own apps are named: it is loaded where it runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weft.common.errors import InputError, UsageError
from weft.common.identity.files import private_directory, write_private
from weft.common.protocol import Role, RunStatus
from weft.server.app import Opened, ServeOptions, opened_state, start_run
from weft.server.backend import Caller
from weft.server.flower.gateway import TASK_S, Gateway, Post
from weft.server.flower.local import LocalPost
from weft.server.flower.split import Split, client_data
from weft.server.roster import OPERATOR
from weft.server.runfile import RunFile

RAY_APP: Final = "weft.client.flower.simulated:ray_app"
PROCESSES: Final = "weft.client.flower.simulated:Processes"
TURN_S: Final = 0.1
_OPERATOR: Final = Caller(worker_id=OPERATOR, role=Role.ADMIN, runs=(), peer="local")

Wait = Callable[[float], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions:
    """What the command line says."""

    state: Path
    """The coordinator's state directory."""
    data: Path | None
    """What clients learn from; None where the run gives its data."""
    num_clients: int
    num_processes: int
    """How many train at a time."""
    split: Split | None = None
    threads: int = 1
    """CPU threads of each process."""
    gpus: float = 0.0
    """Part of a GPU for each process; Flower's engine only."""
    task_s: float = TASK_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a simulation came to."""

    run: str
    engine: str
    clients: int
    updates: int
    seconds: float
    bytes_out: int
    """To the clients, as messages."""
    bytes_in: int
    rounds: int
    reason: str
    """Why the run is finished."""
    loss: float | None
    """Held-out loss of the last version, nats; None without a gate."""
    state: str


class Stopped(Exception):
    """The simulation was broken off."""


def simulate(
    run_file: RunFile,
    options: SimulationOptions,
    engine: str,
    *,
    say: Callable[[str], None],
    watch: Callable[[Gateway, RunStatus], None] = lambda gateway, status: None,
) -> Summary:
    """Train a run with simulated clients.

    Args:
        run_file: The run.
        options: Who trains it.
        engine: A key of ``ENGINES``.
        say: Takes lines for people.
        watch: Called now and then.

    Raises:
        WeftError: The run cannot be trained.
    """
    began_s = time.monotonic()
    with opened_state(ServeOptions(state=options.state)) as opened:
        clients = write_clients(run_file, options)
        start_run(opened, run_file, options.state / "scratch", say)
        gateways: list[Gateway] = []

        def play(post: Post, wait: Wait) -> None:
            gateway = _gateway(opened, post, options, say)
            gateways.append(gateway)

            def pause() -> None:
                wait(TURN_S)
                watch(gateway, _status(opened, run_file))

            gateway.run(pause)

        ENGINES[engine](clients, options, play)
        status, gateway = _status(opened, run_file), gateways[0]
        module = status.modules[0]
        return Summary(
            run=run_file.name,
            engine=engine,
            clients=options.num_clients,
            updates=gateway.num_accepted,
            seconds=round(time.monotonic() - began_s, 3),
            bytes_out=gateway.bytes_out,
            bytes_in=gateway.bytes_in,
            rounds=module.version,
            reason=status.reason,
            loss=module.heldout_losses[-1].loss if module.heldout_losses else None,
            state=str(options.state),
        )


def write_clients(run_file: RunFile, options: SimulationOptions) -> Path:
    """Write down how each client works; the directory of them all.

    Raises:
        DataError: The data cannot be read or dealt out.
        StorageError: There is no room.
    """
    clients = options.state.absolute() / "clients"
    private_directory(clients)
    data = [Path()] * options.num_clients
    if options.data is not None:
        data = client_data(
            options.data,
            clients / "data",
            num_clients=options.num_clients,
            split=options.split,
            seed=run_file.inner.seed,
        )
    base = Path(run_file.base.source)
    for client, path in enumerate(data):
        state = clients / f"{client:05}"
        private_directory(state)
        node = {
            "state": str(state),
            "name": f"client {client}",
            "data": str(path) if path.parts else "",
            "base": str(base) if base.is_absolute() else "",
            "threads": options.threads,
        }
        write_private(state / "node.json", json.dumps(node).encode())
    return clients


def _gateway(opened: Opened, post: Post, options: SimulationOptions, say: Callable[[str], None]) -> Gateway:
    return Gateway(
        opened.coordinator,
        opened.identity,
        post,
        clock=time.monotonic,
        rng_bytes=os.urandom,
        task_s=options.task_s,
        say=say,
    )


def _status(opened: Opened, run_file: RunFile) -> RunStatus:
    return opened.coordinator.get_status(_OPERATOR, run_id=run_file.name).runs[0]


# ---- engines -----------------------------------------------------------------------------------------------------

Play = Callable[[Post, Wait], None]


def _on_processes(clients: Path, options: SimulationOptions, play: Play) -> None:
    """Processes of our own: no Flower, no Ray."""
    processes: Any = pkgutil.resolve_name(PROCESSES)(clients, options.num_processes)
    with contextlib.ExitStack() as stack:
        post = LocalPost(options.num_clients, processes.answer, num_threads=options.num_processes)
        # Processes end first, so that nobody waits for what they were doing.
        stack.callback(post.close)
        stack.callback(processes.close)
        play(post, post.wait)


def _on_flower(clients: Path, options: SimulationOptions, play: Play) -> None:
    """Flower's simulation engine: a ServerApp in a thread, clients in actors of Ray."""
    os.environ |= {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": str(options.threads),
    }
    from weft.server.flower.ray import run_on_ray

    stop = threading.Event()

    def wait(seconds: float) -> None:
        if stop.wait(seconds):
            raise Stopped

    with _setting(stop):
        run_on_ray(
            pkgutil.resolve_name(RAY_APP)(clients),
            lambda post: play(post, wait),
            num_clients=options.num_clients,
            num_processes=options.num_processes,
            gpus=options.gpus,
        )


@contextlib.contextmanager
def _setting(stop: threading.Event) -> Iterator[None]:
    """Set an event at the end, whatever ends it."""
    try:
        yield
    finally:
        stop.set()


ENGINES: Final[dict[str, Callable[[Path, SimulationOptions, Play], None]]] = {
    "local": _on_processes,
    "flower": _on_flower,
}
"""By name: how messages travel."""


def check_options(options: SimulationOptions, engine: str) -> None:
    """Refuse what cannot be; raises UsageError, InputError."""
    if options.data is not None and not options.data.exists():
        raise InputError(f"there is no {options.data}", hint="give --data a file or a directory that exists")
    if options.gpus and engine != "flower":
        raise UsageError("--gpus divides GPUs among actors of Ray", hint="--engine flower")
