"""The commands of this side, and those of a worker itself: join, doctor.

Only declarations and their wiring: what a command does is in the module it imports when it runs, so that
``weft --help`` needs neither torch nor gRPC. Commands of those who look, of operators and of those who use what was
trained are in ``weft.client.commands``.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import click
import typer

from weft.client.commands import models, operator, routes, status
from weft.client.commands.console import AsJson, DeviceKind, Insecure, Threads, find_home, make_console
from weft.common.cli import print_json
from weft.common.errors import NotFound, UsageError

if TYPE_CHECKING:
    from weft.client.device import Device
    from weft.client.home import Membership, WorkerSettings
    from weft.client.view import PlainView, TerminalView
    from weft.common.identity.token import JoinToken

Commands = Mapping[str, Callable[..., None]]

JoinAddress = Annotated[
    str | None,
    typer.Argument(metavar="[HOST:PORT]", help="The coordinator; none resumes the one joined before."),
]
JoinTokenText = Annotated[
    str | None,
    typer.Argument(
        metavar="[TOKEN]", help="Join token, a file that holds it, or - for stdin. Or WEFT_JOIN_TOKEN."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Training data: .txt, .jsonl, .parquet, a saved data set, or a directory of these."),
]
State = Annotated[Path | None, typer.Option(help="This worker's directory (default: below ~/.weft).")]
Name = Annotated[str | None, typer.Option(help="What others see (default: the host's name).")]
Dtype = Annotated[
    str | None, typer.Option(help="Of the frozen base.", click_type=click.Choice(["float32", "bfloat16"]))
]
Quantise = Annotated[
    str | None,
    typer.Option(help="Load the frozen base in 4 bits, on CUDA.", click_type=click.Choice(["4bit"])),
]
Base = Annotated[
    Path | None, typer.Option(help="Directory of the base, if it is here already; its digest is checked.")
]
Rank = Annotated[
    int | None,
    typer.Option(min=1, help="Train LoRA modules at this rank at most (default: what fits into memory)."),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Processes that share each batch, one a GPU; one of them talks.")
]
ShardBase = Annotated[
    bool | None,
    typer.Option(
        "--shard-base/--no-shard-base",
        help="Divide a frozen base among --processes: one that does not fit into a GPU.",
    ),
]
ExitWhenFinished = Annotated[
    bool, typer.Option("--exit-when-finished", help="Leave when all runs are finished.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    commands: Commands = {
        "join": join,
        "watch": status.watch,
        "pull": models.pull,
        "eval": models.evaluate,
        "doctor": doctor,
    }
    for name, command in commands.items():
        app.command(name)(command)
    for name, (verbs, text) in _GROUPS.items():
        group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help=text)
        for verb, command in verbs.items():
            group.command(verb)(command)
        app.add_typer(group, name=name)
    routes.register(app)


# ---- join --------------------------------------------------------------------------------------------------------


def join(
    address: JoinAddress = None,
    token: JoinTokenText = None,
    *,
    data: Data = None,
    state: State = None,
    name: Name = None,
    device: DeviceKind = None,
    dtype: Dtype = None,
    quantise: Quantise = None,
    base: Base = None,
    threads: Threads = None,
    rank: Rank = None,
    processes: Processes = None,
    shard_base: ShardBase = None,
    exit_when_finished: ExitWhenFinished = False,
    insecure: Insecure = False,
) -> None:
    """Work for a coordinator until stopped. Your data stays on this machine.

    Without --data it serves runs that give their documents. Ctrl-C once finishes the task in hand, twice leaves at
    once. The same command without token, or without anything, resumes as the same worker.

    Example: weft join coord.example.org:7443 WEFT1.ABC… --data ./my-texts
    """
    from weft.client import home as homes
    from weft.client import join as joining

    home = homes.Home.of(os.environ)
    parsed = joining.read_token(token, os.environ if address else {}, sys.stdin)
    directory = joining.resolve_state(home, state, address, parsed)
    if parsed is None:
        _known_member(directory, address)
    given = {"data": data, "name": name, "device": device, "dtype": dtype, "quantise": quantise, "base": base}
    texts: dict[str, str | int | None] = {
        key: None if value is None else str(value) for key, value in given.items()
    }
    numbers = {"threads": threads, "rank": rank, "processes": processes, "shard_base": shard_base}
    settings = joining.settle(directory, texts | numbers)
    with joining.alone(directory):
        member, found = _enter(directory, address, parsed, settings, insecure=insecure)
        homes.save_settings(directory, settings)
        with joining.beside(settings, found) as group:
            view = _view()
            worker, transport = joining.make_worker(
                home,
                directory,
                member,
                settings,
                found,
                view=view,
                leave_when_finished=exit_when_finished,
                group=group,
            )
            with transport, view:
                code = joining.work(worker, _say_stopping)
    raise typer.Exit(code)


def _enter(
    directory: Path, address: str | None, token: JoinToken | None, settings: WorkerSettings, *, insecure: bool
) -> tuple[Membership, Device]:
    """Join, or go on as the worker that joined before."""
    from datetime import UTC, datetime

    from weft.client import home as homes
    from weft.client import join as joining

    if token is not None:
        where = homes.join_address(*homes.split_address(address or ""))
        ca_pem = joining.greet(where, token, insecure=insecure, now=datetime.now(UTC))
        typer.echo("✓ coordinator identity matches the token" if ca_pem else "! no TLS: this machine only")
        device = joining.choose_device(settings)
        member = joining.register(
            directory, where, token, ca_pem=ca_pem, name=settings.name, device=device.describe()
        )
        typer.echo(f"✓ registered as {member.worker_id}")
    else:
        member = _known_member(directory, address)
        device = joining.choose_device(settings)
        typer.echo(f"✓ resuming as {member.worker_id} of {member.address}")
    typer.echo(f"✓ {device.describe()}")
    return member, device


def _known_member(directory: Path, address: str | None) -> Membership:
    """The membership in a state directory; a coordinator that moved is known by its pin, not by its address."""
    from weft.client import home as homes

    try:
        member = homes.load_member(directory)
    except NotFound as error:
        raise UsageError(
            f"{directory} has joined no coordinator", hint="weft join HOST:PORT TOKEN --data PATH"
        ) from error
    if address is None:
        return member
    moved = dataclasses.replace(member, address=homes.join_address(*homes.split_address(address)))
    if moved != member:
        homes.save_member(directory, moved)
    return moved


def _say_stopping(times: int) -> None:
    once = "stopping: the task in hand is finished first; Ctrl-C again leaves at once"
    typer.echo(once if times == 1 else "leaving now")


def _view() -> PlainView | TerminalView:
    from weft.client.view import PlainView, TerminalView

    console = make_console()
    return TerminalView(console) if console.is_terminal else PlainView(typer.echo)


def doctor(*, as_json: AsJson = False) -> None:
    """Check this machine and the coordinators it knows; each finding comes with what to do.

    Example: weft doctor
    """
    from weft.client.doctor import Outcome, examine

    checks = []
    for check in examine(find_home()):
        checks.append(check)
        if not as_json:
            sign = {Outcome.OK: "✓", Outcome.WARNING: "!", Outcome.FAILED: "✗"}[check.outcome]
            typer.echo(f"{sign} {check.name}: {check.found}")
            if check.hint and check.outcome is not Outcome.OK:
                typer.echo(f"    next: {check.hint}")
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    raise typer.Exit(int(any(check.outcome is Outcome.FAILED for check in checks)))


_GROUPS: Final[Mapping[str, tuple[Commands, str]]] = {
    "runs": ({"list": status.runs_list, "show": status.runs_show}, "What is being trained."),
    "rounds": (
        {"list": status.rounds_list, "show": status.rounds_show},
        "Past and present rounds, with the reason for each.",
    ),
    "modules": (
        {"list": status.modules_list, "show": models.modules_show},
        "Modules, their versions and their lineage.",
    ),
    "paths": (
        {"list": status.paths_list},
        "Paths through the modules: who trains them, and how good they are.",
    ),
    "workers": (
        {
            "list": status.workers_list,
            "show": status.workers_show,
            "approve": operator.workers_approve,
            "revoke": operator.workers_revoke,
        },
        "Who works; let them in, shut them out.",
    ),
    "token": (
        {"create": operator.token_create, "list": operator.token_list, "revoke": operator.token_revoke},
        "Join tokens to hand out.",
    ),
}
