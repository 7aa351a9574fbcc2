"""``weft simulate``: a run with many clients on one machine."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from weft.common.errors import UsageError

if TYPE_CHECKING:
    from weft.common.protocol import RunStatus
    from weft.server.flower.gateway import Gateway
    from weft.server.flower.simulate import Summary

console = Console(highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    app.command("simulate")(simulate)


def simulate(
    run_file: Annotated[Path, typer.Argument(help="The run file.")],
    *,
    clients: Annotated[int, typer.Option(min=1, max=100_000, help="How many clients.")] = 10,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A directory with a file or folder a client, or what --split deals out among them."
        ),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Deal documents out: iid, or dirichlet:0.5 (smaller is less even).")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="local: processes of Weft. flower: Flower's simulation engine, on Ray.")
    ] = "local",
    processes: Annotated[
        int, typer.Option(min=0, help="How many clients train at a time; 0 takes half of the processors.")
    ] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each process.")] = 1,
    gpus: Annotated[float, typer.Option(min=0, help="Part of a GPU for each process; engine flower.")] = 0.0,
    state: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("weft-simulation"),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Run a run file with many simulated clients on this machine, with real training.

    Ctrl-C stops; the same command goes on. What comes out is an ordinary coordinator's state.

    Example: weft simulate run.toml --clients 200 --data corpus.jsonl --split dirichlet:0.5 --engine flower
    """
    from weft.server.flower.simulate import ENGINES, SimulationOptions, check_options
    from weft.server.flower.simulate import simulate as run_simulation
    from weft.server.flower.split import Split
    from weft.server.runfile import load_run_file

    if engine not in ENGINES:
        raise UsageError(f"--engine {engine!r} is unknown", hint=f"known: {', '.join(ENGINES)}")
    if engine == "flower":
        from weft.server.flower.limits import check_installed

        check_installed("--engine flower")
    options = SimulationOptions(
        state=state,
        data=data,
        num_clients=clients,
        num_processes=min(clients, processes or max(1, (os.cpu_count() or 2) // 2)),
        split=Split.parse(split) if split else None,
        threads=threads,
        gpus=gpus,
    )
    check_options(options, engine)
    loaded = load_run_file(run_file)
    with console.status("preparing") as shown:

        def watch(gateway: Gateway, status: RunStatus) -> None:
            shown.update(_line(gateway, status))

        summary = run_simulation(
            loaded,
            options,
            engine,
            say=(lambda text: None) if as_json else console.print,
            watch=watch,
        )
    if as_json:
        console.print_json(json.dumps(dataclasses.asdict(summary)))
    else:
        _say_summary(summary)


def _line(gateway: Gateway, status: RunStatus) -> str:
    """How far it is, on one line."""
    version = min(module.version for module in status.modules)
    num_out = sum(node.out is not None for node in gateway.nodes.values())
    return (
        f"{status.run_id}: {version} of {status.num_rounds} rounds · {gateway.num_accepted} updates · "
        f"{num_out} tasks out · {gateway.bytes_in / 1e6:.1f} MB in"
    )


def _say_summary(summary: Summary) -> None:
    loss = f" · held-out loss {summary.loss:.4f}" if summary.loss is not None else ""
    console.print(
        f"{summary.run}: {summary.reason or 'finished'} after {summary.rounds} rounds, {summary.updates} updates "
        f"of {summary.clients} clients, {summary.seconds:.1f} s{loss}"
    )
    console.print(
        f"{summary.bytes_out / 1e6:.1f} MB to the clients, {summary.bytes_in / 1e6:.1f} MB from them"
    )
    console.print(f"verify:  weft verify {summary.run} --state {summary.state}")
    console.print(f"pull:    weft serve --state {summary.state}, then: weft pull {summary.run} --to DIR")
