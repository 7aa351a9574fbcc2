"""Commands of those who look: watch, and the lists of runs, rounds, modules, paths and workers."""

from __future__ import annotations

import contextlib
import time
from typing import Annotated

import typer

from weft.client.commands.console import (
    AsJson,
    Coordinator,
    Insecure,
    OneRun,
    Token,
    look,
    make_console,
    one_run,
    show,
    show_status,
)
from weft.common.errors import NotFound
from weft.common.ids import ModuleRef, run_id


def watch(
    *,
    once: Annotated[bool, typer.Option("--once", help="Show the picture once and leave.")] = False,
    until_finished: Annotated[
        bool, typer.Option("--until-finished", help="Leave when all runs shown are finished.")
    ] = False,
    run: OneRun = "",
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Show live what each run, module and worker is doing, and why. Ctrl-C leaves.

    Where the output is no terminal it is one line for each change of a round; with --json, one line of JSON for
    each change of anything (with --once: one document).

    Example: weft watch --coordinator coord.example.org:7443 --token WEFT1.ABC…
    """
    from weft.client.live import Curtain, JsonLines, Lines, follow

    with look(coordinator, token, insecure=insecure) as (_, transport):
        first = one_run(transport.get_status(run), run)
        if once:
            show_status(first, as_json=as_json)
            return
        console = make_console()
        screen = (
            JsonLines(typer.echo)
            if as_json
            else Curtain(console)
            if console.is_terminal
            else Lines(typer.echo)
        )
        with contextlib.suppress(KeyboardInterrupt), screen:
            follow(lambda: transport.watch(run), screen, until_finished=until_finished, pause=time.sleep)


def runs_list(
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """List all runs. Example: weft runs list."""
    from weft.client.cells import plain
    from weft.client.watch import runs_table

    with look(coordinator, token, insecure=insecure) as (_, transport):
        runs = transport.get_status().runs
    show(runs_table(runs), plain(runs), as_json=as_json)


def runs_show(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Show one run with its modules and workers. Example: weft runs show my-run."""
    with look(coordinator, token, insecure=insecure) as (_, transport):
        status = one_run(transport.get_status(run_id(run)), run)
    show_status(status, as_json=as_json)


def rounds_list(
    *,
    run: OneRun = "",
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """List the rounds of a run, or of all. Example: weft rounds list --run my-run."""
    from weft.client.cells import plain
    from weft.client.watch import rounds_table

    with look(coordinator, token, insecure=insecure) as (_, transport):
        status = one_run(transport.get_status(run), run)
        # A module at a time: all rounds of a long run with many modules would not fit one message.
        rounds = [
            item
            for found in status.runs
            for module in found.modules
            for item in transport.list_rounds(found.run_id, module.module)
        ]
    show(rounds_table(rounds), plain(rounds), as_json=as_json)


def rounds_show(
    ref: Annotated[str, typer.Argument(help="RUN/level.expert, for example my-run/0.0.")],
    number: Annotated[int | None, typer.Argument(help="Which round; none shows the last.")] = None,
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Show one round: who contributed, what the gate measured, why. Example: weft rounds show my-run/0.0 3."""
    from weft.client.cells import plain
    from weft.client.watch import fields_table

    wanted = ModuleRef.parse(ref)
    with look(coordinator, token, insecure=insecure) as (_, transport):
        rounds = transport.list_rounds(wanted.run, str(wanted.module or ""))
    found = [item for item in rounds if number in (None, item.round_number)]
    if not found:
        raise NotFound(f"{ref} has no round {number}", hint=f"weft rounds list --run {wanted.run}")
    show(fields_table(found[-1]), plain(found[-1]), as_json=as_json)


def modules_list(
    *,
    run: OneRun = "",
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """List modules with their newest version and current round. Example: weft modules list."""
    from weft.client.cells import plain
    from weft.client.pathgrid import num_paths_through
    from weft.client.watch import modules_table

    with look(coordinator, token, insecure=insecure) as (_, transport):
        status = one_run(transport.get_status(run), run)
    modules = [
        plain(module) | {"num_paths": num_paths_through(item).get(module.module, 0)}
        for item in status.runs
        for module in item.modules
    ]
    show(modules_table(status.runs, taken_at=status.taken_at), modules, as_json=as_json)


def paths_list(
    *,
    run: OneRun = "",
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """List paths, those that nobody serves first: who trains them, held-out loss, best versions, data.

    Example: weft paths list --run my-run
    """
    from weft.client.cells import plain
    from weft.client.pathgrid import paths_table

    with look(coordinator, token, insecure=insecure) as (_, transport):
        status = one_run(transport.get_status(run), run)
    paths = [{"run_id": item.run_id, **plain(path)} for item in status.runs for path in item.paths]
    show(paths_table(status.runs, status.workers), paths, as_json=as_json)


def workers_list(
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """List workers and viewers. Example: weft workers list."""
    from weft.client.cells import plain
    from weft.client.watch import workers_table

    with look(coordinator, token, insecure=insecure) as (_, transport):
        status = transport.get_status()
    show(workers_table(status.workers, taken_at=status.taken_at), plain(status.workers), as_json=as_json)


def workers_show(
    worker: Annotated[str, typer.Argument(help="The worker's id, for example w-7k2f.")],
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Show one worker. Example: weft workers show w-7k2f."""
    from weft.client.cells import plain
    from weft.client.watch import fields_table

    with look(coordinator, token, insecure=insecure) as (_, transport):
        found = [item for item in transport.get_status().workers if item.worker_id == worker]
    if not found:
        raise NotFound(f"there is no worker {worker}", hint="weft workers list")
    show(fields_table(found[0]), plain(found[0]), as_json=as_json)
