"""``weft demo``: everything that users do, on one machine, with the same commands, on real text.

Six runs over one small base share a coordinator and three workers, each a process of its own that holds another part of
the Python standard library's text: three runs merge all workers under mean, TIES and Fisher, three train each worker
alone with as many steps. What comes out is measured on text that nobody trained on, and printed as it is.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from weft.client.demo.corpus import TOPICS, write_topics
from weft.common.errors import ComputeError, UsageError

console = Console(highlight=False, soft_wrap=True)

BASE: Final = Path(__file__).parent / "base"
RULES: Final = ("mean", "ties", "fisher")
MARKER: Final = ".weft-demo"
GATE_SHARE: Final = 1 / 3
"""Share of the held-out text that the gate sees; the table is measured on the rest."""
START_S: Final = 120.0
STOP_S: Final = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much the demo trains."""

    num_rounds: int
    num_steps: int
    heldout_bytes: int


FULL: Final = Scale(num_rounds=4, num_steps=20, heldout_bytes=24_000)
QUICK: Final = Scale(num_rounds=1, num_steps=4, heldout_bytes=6_000)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("demo")(demo)


def demo(
    *,
    directory: Annotated[Path, typer.Option("--dir", help="Where everything is written.")] = Path(
        "weft-demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="One short round: does it work here?")] = False,
) -> None:
    """Serve, join three workers, merge, judge and pull, on this machine alone.

    Needs no network, no GPU and no account; about three minutes on two cores. Every command is printed as it runs.

    Example: weft demo --dir ./weft-demo
    """
    started = time.monotonic()
    scale = QUICK if quick else FULL
    _fresh(directory)
    stage = Stage(directory=directory)
    _explain(directory, scale)
    data = _write_data(directory, scale)
    run_files = _write_run_files(directory, scale)
    port = _free_port()
    with stage.running():
        state = directory / "state"
        stage.start(
            "serve",
            "serve",
            *map(str, run_files),
            "--state",
            str(state),
            "--listen",
            f"127.0.0.1:{port}",
            "--http",
            "off",
        )
        stage.wait_for("serve", "weft join")
        for topic in TOPICS:
            _join(stage, topic, data[topic], port)
        stage.follow("watch", "--until-finished")
        for name in _run_names():
            stage.run("pull", name, "--to", str(directory / "pulled" / name), "--quiet")
        status = json.loads(stage.run("watch", "--once", "--json", capture=True))
        rounds = {
            name: json.loads(stage.run("rounds", "list", "--run", name, "--json", capture=True))
            for name in RULES
        }
        scores = _evaluate(stage, directory)
    stage.run("verify", "mean", "--state", str(state))
    _report(directory, scale, scores, status, rounds, seconds=time.monotonic() - started)


# -- what the demo starts from ---------------------------------------------------------------------------------


def _fresh(directory: Path) -> None:
    """An empty directory of our own; what an earlier demo left is replaced, anything else is refused."""
    if directory.exists() and any(directory.iterdir()):
        if not (directory / MARKER).exists():
            raise UsageError(
                f"{directory} is not empty and not a demo's", hint="weft demo --dir ./another-directory"
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARKER).touch()


def _explain(directory: Path, scale: Scale) -> None:
    console.print(
        "[bold]Weft demo[/bold]: three workers, three private topics of Python's own text, one small Llama."
    )
    console.print(
        f"Everything is written below {directory}; {scale.num_rounds} round(s) of {scale.num_steps} steps a run.\n"
    )


def _write_data(directory: Path, scale: Scale) -> dict[str, Path]:
    """Private training text by topic; held-out text for the gate and, apart from it, for the table."""
    files = write_topics(directory / "data", heldout_bytes_max=scale.heldout_bytes)
    (directory / "gate").mkdir()
    (directory / "heldout").mkdir()
    for topic, topic_files in files.items():
        text = topic_files.heldout.read_text(encoding="utf-8")
        cut = int(len(text) * GATE_SHARE)
        (directory / "gate" / f"{topic}.txt").write_text(text[:cut], encoding="utf-8")
        (directory / "heldout" / f"{topic}.txt").write_text(text[cut:], encoding="utf-8")
        size = f"{topic_files.train_bytes / 1e3:.0f} kB in {topic_files.num_documents} documents"
        console.print(f"  worker {topic:<10} holds {size}; held out {len(text.encode()) / 1e3:.0f} kB")
    return {topic: topic_files.train for topic, topic_files in files.items()}


def _run_names() -> list[str]:
    return [*RULES, *(f"alone-{topic}" for topic in TOPICS)]


def _write_run_files(directory: Path, scale: Scale) -> list[Path]:
    paths = []
    for name in _run_names():
        path = directory / "runs" / f"{name}.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(_run_file(name, scale), encoding="utf-8")
        paths.append(path)
    console.print(f"\n  wrote {len(paths)} run files; {paths[0]} says:\n")
    console.print(
        "\n".join(f"    {line}" for line in paths[0].read_text().splitlines() if line),
        style="dim",
        markup=False,
    )
    return paths


def _run_file(name: str, scale: Scale) -> str:
    merged = name in RULES
    workers = len(TOPICS) if merged else 1
    sections = [
        f'[run]\nname = "{name}"',
        f"[base]\nsource = {json.dumps(str(BASE))}",
        "[topology.lora]\nrank = 8\nalpha = 16",
        f"[inner]\nsteps = {scale.num_steps}\nlearning_rate = 3e-3\nwarmup_steps = 5",
        f"[rounds]\ncount = {scale.num_rounds}\nquorum = {workers}\ntarget = {workers}",
        f'[merge]\nrule = "{name if merged else "mean"}"',
        '[codec]\nkind = "ternary"\ndensity = 0.2',
    ]
    if name == "fisher":
        sections.append("[statistics]\nfisher_examples = 32")
    if merged:
        sections.append('[gate]\nheldout = "../gate"\ntolerance = 0.02')
    return "\n\n".join(sections) + "\n"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _join(stage: Stage, topic: str, data: Path, port: int) -> None:
    runs = ",".join([*RULES, f"alone-{topic}"])
    made = stage.run(
        "token", "create", "--runs", runs, "--uses", "1", "--label", topic, "--json", capture=True
    )
    home = str(stage.directory / "workers" / topic)
    options = [
        "--data",
        str(data),
        "--name",
        topic,
        "--state",
        home,
        "--threads",
        "1",
        "--exit-when-finished",
    ]
    stage.start(topic, "join", f"127.0.0.1:{port}", json.loads(made)["token"], *options)


# -- running commands ------------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Stage:
    """Runs ``weft`` commands as processes, printing each; ends all of them at the end."""

    directory: Path
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def run(self, *arguments: str, capture: bool = False) -> str:
        """Run a command to its end; its output is shown, or returned when captured. Raises ComputeError."""
        self._show(arguments)
        done = subprocess.run(
            [*_PROGRAM, *arguments],
            env=self._environment(),
            stdout=subprocess.PIPE if capture else None,
            check=False,
        )
        if done.returncode:
            raise ComputeError(
                f"weft {arguments[0]} failed with exit code {done.returncode}", hint=self._logs()
            )
        return done.stdout.decode() if capture else ""

    def follow(self, *arguments: str) -> None:
        """Run a command that shows what the others do; raises ComputeError when one of those fails."""
        self._show(arguments)
        shown = subprocess.Popen([*_PROGRAM, *arguments], env=self._environment())
        try:
            while shown.poll() is None:
                time.sleep(0.2)
                for name, process in self._running.items():
                    if process.poll():
                        raise self._failed(name)
        finally:
            if shown.poll() is None:
                shown.terminate()
            shown.wait()
        if shown.returncode:
            raise ComputeError(
                f"weft {arguments[0]} failed with exit code {shown.returncode}", hint=self._logs()
            )

    def start(self, name: str, *arguments: str) -> None:
        """Start a command that goes on beside the others; its output goes to a log."""
        self._show(arguments, note=f"  &   (log: {self._log(name)})")
        self._log(name).parent.mkdir(exist_ok=True)
        with self._log(name).open("wb") as log:
            self._running[name] = self._spawn(arguments, log)

    def wait_for(self, name: str, text: str) -> None:
        """Wait until the log of a started command says ``text``. Raises ComputeError when it ends before."""
        deadline = time.monotonic() + START_S
        while text not in self._log(name).read_text(errors="replace"):
            if self._running[name].poll() is not None or time.monotonic() > deadline:
                raise self._failed(name)
            time.sleep(0.1)

    @contextmanager
    def running(self) -> Iterator[None]:
        """End everything that was started, however the body ends."""
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)
            for process in reversed(self._running.values()):
                if process.poll() is None:
                    process.send_signal(signal.SIGINT)
            for process in self._running.values():
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _spawn(self, arguments: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches the demo alone, which then ends the others in order.
        return subprocess.Popen(
            [*_PROGRAM, *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _environment(self) -> Mapping[str, str]:
        return {
            **os.environ,
            "WEFT_HOME": str(self.directory / "home"),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def _show(self, arguments: Sequence[str], *, note: str = "") -> None:
        words = [f"{word[:14]}…" if word.startswith("WEFT1.") else word for word in arguments]
        console.print(f"\n[bold]$ weft {shlex.join(words)}[/bold]{note}")

    def _log(self, name: str) -> Path:
        return self.directory / "logs" / f"{name}.log"

    def _failed(self, name: str) -> ComputeError:
        lines = self._log(name).read_text(errors="replace").splitlines()
        said = next(
            (line for line in reversed(lines) if "rror: " in line), lines[-1] if lines else "no output"
        )
        return ComputeError(f"{name} failed: {said}", hint=self._logs())

    def _logs(self) -> str:
        return f"read the logs: ls {self.directory / 'logs'}"


def _interrupt(number: int, frame: object) -> None:
    """A polite kill ends the demo as Ctrl-C does, with everything that it started."""
    raise KeyboardInterrupt


_PROGRAM: Final = (sys.executable, "-m", "weft.common.cli")


# -- what came out ---------------------------------------------------------------------------------------------


def _evaluate(stage: Stage, directory: Path) -> list[dict[str, Any]]:
    """Bits per byte of the base and of every pulled adapter, by topic."""
    models = [str(BASE), *(str(directory / "pulled" / name) for name in _run_names())]
    data = [word for topic in TOPICS for word in ("--data", str(directory / "heldout" / f"{topic}.txt"))]
    answer = stage.run(
        "eval", *models, "--base", str(BASE), *data, "--sequence-length", "128", "--json", capture=True
    )
    scores: list[dict[str, Any]] = json.loads(answer)
    return scores


def _report(
    directory: Path,
    scale: Scale,
    scores: list[dict[str, Any]],
    status: dict[str, Any],
    rounds: dict[str, list[dict[str, Any]]],
    *,
    seconds: float,
) -> None:
    results = {"scores": scores, "runs": status["runs"], "rounds": rounds, "seconds": seconds}
    (directory / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    console.print()
    console.print(_score_table(directory, scores))
    console.print(_traffic_table(status, rounds))
    adapter = directory / "pulled" / "mean"
    console.print(f"\nThe merged adapter lies in {adapter}. These three lines load it:\n")
    console.print("  from peft import PeftModel; from transformers import AutoModelForCausalLM")
    console.print(f'  base = AutoModelForCausalLM.from_pretrained("{BASE}")')
    console.print(f'  model = PeftModel.from_pretrained(base, "{adapter}")\n')
    console.print(f"All numbers: {directory / 'results.json'}. The whole demo took {seconds:.0f} s.")
    if scale is QUICK:
        console.print("This was --quick: too short to learn much. Without it the numbers mean something.")


def _score_table(directory: Path, scores: list[dict[str, Any]]) -> Table:
    table = Table(
        title="Held-out bits per byte, lower is better (text that nobody trained on)", title_justify="left"
    )
    table.add_column("model")
    for column in (*TOPICS, "average"):
        table.add_column(column, justify="right")
    for model in scores:
        values = [model["results"][index]["bits_per_byte"] for index in range(len(TOPICS))]
        cells = [f"{value:.3f}" for value in (*values, sum(values) / len(values))]
        table.add_row(_label(directory, model["model"]), *cells)
    return table


def _label(directory: Path, model: str) -> str:
    name = Path(model).name
    if Path(model) == BASE:
        return "base, untrained on these"
    return f"worker {name.removeprefix('alone-')} alone" if name.startswith("alone-") else f"merged: {name}"


def _traffic_table(status: dict[str, Any], rounds: dict[str, list[dict[str, Any]]]) -> Table:
    table = Table(title="What it cost (the six runs share the workers)", title_justify="left")
    for column in ("run", "up", "in bf16", "down", "in bf16", "s/round", "gate"):
        table.add_column(column, justify="left" if column in ("run", "gate") else "right")
    for run in status["runs"]:
        if run["run_id"] not in RULES:
            continue
        done = [item for item in rounds[run["run_id"]] if item["ended_at"] is not None]
        seconds = [item["ended_at"] - item["opened_at"] for item in done]
        published = sum(item["state"] == "published" for item in done)
        # Versions travel as float32, so in bf16 they would be half of it.
        table.add_row(
            run["run_id"],
            f"{run['bytes_up'] / 1e3:.0f} kB",
            f"{run['bytes_up_bf16'] / 1e3:.0f} kB",
            f"{run['bytes_down'] / 1e3:.0f} kB",
            f"{run['bytes_down'] / 2e3:.0f} kB",
            f"{sum(seconds) / max(1, len(seconds)):.1f}",
            f"{published} of {len(done)} passed",
        )
    return table
