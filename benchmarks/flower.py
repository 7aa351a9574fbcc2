"""The same run, the same two workers, on three engines: Weft's own, Flower's federation, Flower's simulation.

    weft            weft serve, two of weft join, TLS on loopback
    federation      flower-superlink, two of flower-supernode, deploy/flower, resident trainers
    without         the same federation with a client app that loads PyTorch and the base for each message
    simulation      weft simulate --engine flower: Ray, two actors
    local           weft simulate --engine local: two processes, no Ray, no Flower

Loopback without TLS for Flower: its certificates would be the operator's to make. Memory is the sum of the private
and shared parts (PSS) of all processes of an arm, at its largest, looked at once a second.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lib.machine import setting
from lib.processes import environment
from lib.random_base import DEMO_BASE, write_text

from weft.common.protocol import Role, RoundStatus
from weft.server.app import ServeOptions, opened_state
from weft.server.backend import Caller
from weft.server.roster import OPERATOR

RESULT = Path(__file__).parent / "results" / "flower.md"
APP = Path(__file__).parents[1] / "deploy" / "flower"
BIN = Path(sys.executable).parent
ARM_S = 570.0
LOOK_S = 1.0
INNER_STEPS = 8
TEXT_BYTES = 200_000
RELOADING = '''"""Loads the base for each message."""

import os

from weft.client.flower.app import make_app
from weft.client.flower.settings import read_settings


def answer(context, parcel):
    from weft.client.flower.host import Host
    from weft.client.home import Home

    return Host(keep=False, home=Home.of(os.environ)).answer(read_settings(dict(context.node_config)), parcel)


app = make_app(answer)
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One arm."""

    arm: str
    rounds_s: tuple[float, ...]
    """From one published version to the next; the first round, with all that starts, is not among them."""
    first_s: float
    """From the start of the arm to the first published version."""
    bytes_up: int
    bytes_down: int
    """As the ledger counts them: encoded updates and module versions, without what carries them."""
    peak_mb: float
    loss: float


class Arm:
    """A folder with a run, and the processes that train it."""

    def __init__(self, folder: Path, base: Path, text: Path, num_rounds: int) -> None:
        self.folder = folder
        self.base = base
        self.text = text
        self.state = folder / "state"
        self.run = folder / "run.toml"
        self.peak_mb = 0.0
        self.began = time.time()
        folder.mkdir()
        self.run.write_text(run_file(base, text, num_rounds))
        self.environ = {
            **environment(folder / "home"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "XDG_RUNTIME_DIR": str(folder),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "WEFT_MARK": str(folder),
        }

    @contextlib.contextmanager
    def started(self, name: str, *command: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process with its log, ended with all that belongs to its session."""
        with self.log(name).open("wb") as log:
            process = subprocess.Popen(
                command,
                env=self.environ,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def log(self, name: str) -> Path:
        """Where a process's output goes."""
        return self.folder / f"{name}.log"

    def said(self, name: str, pattern: str, *processes: subprocess.Popen[bytes]) -> re.Match[str]:
        """Wait until a log says something that matches."""
        ends_s = time.monotonic() + ARM_S
        while not (found := re.search(pattern, self.log(name).read_text(errors="replace"))):
            alive = all(process.poll() is None for process in processes) and time.monotonic() < ends_s
            assert alive, self.log(name).read_text()[-4000:]
            time.sleep(0.05)
        return found

    @contextlib.contextmanager
    def weighed(self) -> Iterator[None]:
        """Follow the memory of all processes of this folder."""
        over = threading.Event()

        def look() -> None:
            while not over.wait(LOOK_S):
                self.peak_mb = max(self.peak_mb, sum(map(pss_mb, self.processes())))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def processes(self) -> list[int]:
        """Whatever has this folder in its environment."""
        mark, found = f"WEFT_MARK={self.folder}\0".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (path / "environ").read_bytes():
                    found.append(int(path.name))
        return found

    def end(self) -> None:
        """End what outlives its starter: residents."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def measured(self, arm: str) -> Measured:
        """What the ledger says of the rounds."""
        caller = Caller(worker_id=OPERATOR, role=Role.ADMIN, runs=(), peer="")
        with opened_state(ServeOptions(state=self.state)) as opened:
            rounds = opened.coordinator.list_rounds(caller, run_id="engines", module="")
            (run,) = opened.coordinator.runs.values()
            ((version, *_),) = run.versions.values()
            module = opened.coordinator.get_status(caller, run_id="engines").runs[0].modules[0]
        ended = published(rounds)
        version_bytes = (self.state / "blobs" / version.digest[:2] / version.digest).stat().st_size
        return Measured(
            arm=arm,
            rounds_s=tuple(after - before for before, after in itertools.pairwise(ended)),
            first_s=ended[0] - self.began,
            bytes_up=sum(round_.update_bytes for round_ in rounds),
            bytes_down=version_bytes * sum(round_.num_updates for round_ in rounds),
            peak_mb=self.peak_mb,
            loss=module.heldout_losses[-1].loss,
        )


def published(rounds: tuple[RoundStatus, ...]) -> list[float]:
    return [round_.ended_at for round_ in rounds if round_.ended_at is not None]


def pss_mb(pid: int) -> float:
    with contextlib.suppress(OSError):
        found = re.search(r"\nPss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text())
        return int(found[1]) * 1024 / 1e6 if found else 0.0
    return 0.0


def run_file(base: Path, text: Path, num_rounds: int) -> str:
    return f"""[run]
name = "engines"
[base]
source = "{base}"
[inner]
steps = {INNER_STEPS}
batch_size = 4
sequence_length = 64
[rounds]
count = {num_rounds}
quorum = 2
target = 2
[codec]
kind = "int8"
[gate]
heldout = "{text}"
num_sequences_max = 32
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- arms --------------------------------------------------------------------------------------------------------


def weft(arm: Arm) -> None:
    program = [sys.executable, "-m", "weft.common.cli"]
    options = ["--state", str(arm.state), "--listen", "127.0.0.1:0", "--http", "off"]
    with contextlib.ExitStack() as stack:
        serve = stack.enter_context(arm.started("serve", *program, "serve", str(arm.run), *options))
        address, token = arm.said("serve", r"weft join (\S+) (\S+)", serve).groups()
        workers = [
            stack.enter_context(
                arm.started(
                    name, *program, "join", address, token, "--data", str(arm.text), "--base", str(arm.base),
                    "--state", str(arm.folder / name), "--threads", "1", "--exit-when-finished",
                )
            )
            for name in ("one", "two")
        ]  # fmt: skip
        for worker in workers:
            worker.wait(ARM_S)


def federation(arm: Arm, app: Path = APP) -> None:
    port = free_port()
    (arm.folder / "flwr").mkdir()
    (arm.folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with contextlib.ExitStack() as stack:
        superlink = stack.enter_context(
            arm.started(
                "superlink", "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port),
                "--disable-runtime-dependency-installation",
            )
        )  # fmt: skip
        arm.said("superlink", "Uvicorn running", superlink)
        for name in ("one", "two"):
            config = {
                "data": str(arm.text),
                "base": str(arm.base),
                "state": str(arm.folder / name),
                "threads": 1,
            }
            stack.enter_context(
                arm.started(
                    name, "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}",
                    "--port", str(free_port()),
                    "--node-config", " ".join(f"{key}={json.dumps(value)}" for key, value in config.items()),
                )
            )  # fmt: skip
        config = f'run="{arm.run}" state="{arm.state}"'
        subprocess.run(
            ["flwr", "run", str(app), "here", "--run-config", config],
            env=arm.environ, check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        arm.said("superlink", r"Finished task \d+", superlink)


def without(arm: Arm) -> None:
    app = arm.folder / "app"
    shutil.copytree(APP, app)
    (app / "weft_flower" / "client_app.py").write_text(RELOADING)
    federation(arm, app)


def simulation(arm: Arm, engine: str = "flower") -> None:
    data = arm.folder / "data"
    data.mkdir()
    for name in ("one.txt", "two.txt"):
        shutil.copy(arm.text, data / name)
    program = "import typer; from weft.server.flower.command import simulate; typer.run(simulate)"
    command = [sys.executable, "-c", program, str(arm.run), "--engine", engine, "--clients", "2"]
    command += ["--processes", "2", "--data", str(data), "--state", str(arm.state)]
    with arm.started("simulate", *command) as process:
        assert process.wait(ARM_S) == 0, arm.log("simulate").read_text()[-4000:]


ARMS: dict[str, Callable[[Arm], None]] = {
    "weft": weft,
    "federation": federation,
    "without": without,
    "simulation": simulation,
    "local": lambda arm: simulation(arm, "local"),
}
LABELS = {
    "weft": "Weft: `weft serve`, `weft join`",
    "federation": "Flower federation, resident trainer",
    "without": "Flower federation, base loaded for each message",
    "simulation": "`weft simulate --engine flower` (Ray)",
    "local": "`weft simulate --engine local`",
}


def measure(folder: Path, name: str, base: Path, text: Path, num_rounds: int) -> Measured:
    arm = Arm(folder / name, base, text, num_rounds)
    try:
        with arm.weighed():
            ARMS[name](arm)
    finally:
        arm.end()
    return arm.measured(name)


# ---- the page ----------------------------------------------------------------------------------------------------


def row(case: Measured) -> str:
    median, least, most = statistics.median(case.rounds_s), min(case.rounds_s), max(case.rounds_s)
    return (
        f"| {LABELS[case.arm]} | **{median:.2f}** ({least:.2f} to {most:.2f}) | {case.first_s:.1f} "
        f"| {case.bytes_up / 1e6:.2f} | {case.bytes_down / 1e6:.2f} | {case.peak_mb:,.0f} | {case.loss:.4f} |"
    )


def report(cases: list[Measured], num_rounds: int, *, load_before: float) -> str:
    rows = "\n".join(map(row, cases))
    seconds = {case.arm: statistics.median(case.rounds_s) for case in cases}
    ratio = seconds["without"] / seconds["federation"]
    return f"""# One run on Weft's engine and on Flower's

{setting(("weft", "flwr", "ray", "torch"), load_before=load_before)}

The same run file, the same two workers with the same data, one thread each: LoRA over the demo's base, {INNER_STEPS}
inner steps of 4 × 64 tokens, codec int8, a gate, {num_rounds} rounds. Seconds from one published version to the next,
median (least to most) after the first; the first, from nothing, with all that has to start. Megabytes are encoded
updates up and module versions down, one for each task, without what carries them; memory is the sum over all processes
of an arm (PSS), at its largest. Held-out losses differ by the workers' keys, which decide their order of the data.

| engine | s a round | first round, s | MB up | MB down | memory, MB | held-out loss |
|---|--:|--:|--:|--:|--:|--:|
{rows}

What is beside the training in a round of the federation is Flower's: a process for each message, a SuperNode that looks
for messages every 3 s, one at a time. A client app that loads PyTorch and the base for each message takes
**{ratio:.1f} times** as long a round as the one that hands it to the resident trainer.
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"replace {RESULT.name}, from all arms")
    parser.add_argument("--only", choices=ARMS, help="one arm")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each arm")
    arguments = parser.parse_args()
    load_before, cases = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory(prefix="w") as folder:
        base, text = DEMO_BASE, Path(folder) / "text.txt"
        text.write_bytes(write_text(text).read_bytes()[:TEXT_BYTES])
        for name in ARMS:
            if arguments.only in (None, name):
                cases.append(measure(Path(folder), name, base, text, arguments.rounds))
                print(row(cases[-1]), flush=True)
    if arguments.write and not arguments.only:
        RESULT.write_text(report(cases, arguments.rounds, load_before=load_before))


if __name__ == "__main__":
    main()
