"""What commands have in common: options, the coordinator that is meant, how answers are printed."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from weft.common.cli import print_json
from weft.common.errors import NotFound

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from weft.client.home import Access, Home
    from weft.client.transport import Transport
    from weft.common.protocol import Status

Coordinator = Annotated[
    str | None,
    typer.Option("--coordinator", metavar="HOST:PORT", help="Which coordinator, if several are known."),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token", metavar="TOKEN", help="Viewer or admin token (or a file, or -), needed the first time."
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Without TLS; a coordinator on this machine only.")
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for scripts.")]
OneRun = Annotated[str, typer.Option("--run", help="Only this run.")]
DeviceKind = Annotated[
    str | None,
    typer.Option(help="Default: the best there is.", click_type=click.Choice(["cpu", "cuda", "mps"])),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads to use.")]


@contextlib.contextmanager
def look(coordinator: str | None, token: str | None, *, insecure: bool) -> Iterator[tuple[Access, Transport]]:
    """A connection to the coordinator that is meant; raises UsageError when that is not clear."""
    from weft.client.join import access_to, connect, read_token

    access = access_to(find_home(), coordinator, read_token(token, {}, sys.stdin), insecure=insecure)
    with connect(access) as transport:
        yield access, transport


def find_home() -> Home:
    """What this machine remembers."""
    from weft.client.home import Home

    return Home.of(os.environ)


def one_run(status: Status, run: str) -> Status:
    """The status, which must hold the run that was named, if one was; raises NotFound."""
    if run and not status.runs:
        raise NotFound(f"there is no run {run} here", hint="weft runs list")
    return status


def make_console() -> Console:
    """Where tables go."""
    from rich.console import Console

    console = Console(highlight=False)
    # Tables that are cut at 80 columns are of no use in a file or a pipe.
    return console if console.is_terminal else Console(highlight=False, width=240)


def show(table: RenderableType, value: Any, *, as_json: bool) -> None:
    """Print a table for people, or a value for scripts."""
    if as_json:
        print_json(value)
    else:
        make_console().print(table)


def show_status(status: Status, *, as_json: bool) -> None:
    """Print the whole picture."""
    from weft.client.cells import plain
    from weft.client.watch import render

    show(render(status), plain(status), as_json=as_json)


@contextlib.contextmanager
def progress_line(doing: str) -> Iterator[Any]:
    """A line on stderr that says how far it is, on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    with console.status(doing) as status:
        yield lambda done, total: status.update(Text(f"{doing} {100 * done // max(1, total)} %"))
