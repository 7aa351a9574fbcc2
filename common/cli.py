"""The ``weft`` program: finds its commands, and turns errors into one line with the next command.

Commands register themselves through the entry point group ``weft.commands``, so that this program serves both
sides while neither imports the other. Command modules import what is heavy inside their commands: ``weft --help``
has to be there at once.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Final

import click
import typer

from weft.common.errors import UsageError, WeftError

COMMANDS: Final = "weft.commands"
"""Entry point group of functions that take the typer app."""
INTERRUPTED: Final = 130
_LEVELS: Final = (logging.WARNING, logging.INFO, logging.DEBUG)
_EPILOG: Final = (
    "weft demo shows all of it on this machine. weft init writes a run file, weft serve run.toml starts a "
    "coordinator and prints the weft join line for workers, weft watch shows what they do, weft pull fetches "
    "the result."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    # gRPC's core writes every failed handshake to stderr; what matters of it reaches the user as an error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = build_app()(given, prog_name="weft", standalone_mode=False)
    except WeftError as error:
        return report(error, as_json="--json" in given)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return UsageError.exit_code
    except click.ClickException as error:
        return report(_usage_error(error), as_json="--json" in given)
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; a second write at exit would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code if isinstance(code, int) else 0


def build_app() -> typer.Typer:
    """The program with all commands that are installed."""
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        help="Train adapters and path modules on machines that share only a network, and merge them.",
        epilog=_EPILOG,
    )
    app.callback()(_options)
    for entry in sorted(importlib.metadata.entry_points(group=COMMANDS), key=lambda entry: entry.name):
        entry.load()(app)
    return app


def report(error: WeftError, *, as_json: bool) -> int:
    """Say what went wrong and what to type next; returns the exit code."""
    if as_json:
        said = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        print_json(said | {"exit_code": error.exit_code})
    typer.echo(f"error: {error.message}", err=True)
    if error.hint:
        typer.echo(f"  next: {error.hint}", err=True)
    return error.exit_code


def print_json(value: Any) -> None:
    """Print one JSON value for a script."""
    typer.echo(json.dumps(value, indent=2))


def set_verbosity(verbose: int) -> None:
    """Log warnings; with 1 what happens, with 2 everything. Lines go to stderr, without colours."""
    level = _LEVELS[min(verbose, 2)]
    logging.basicConfig(
        format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    logging.getLogger("weft").setLevel(level)


def _say_version(wanted: bool) -> None:  # noqa: FBT001 - typer calls it so
    if wanted:
        typer.echo(f"weft {importlib.metadata.version('weft')}")
        raise typer.Exit


def _options(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_say_version),
    ] = False,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; -vv for all.")] = 0,
) -> None:
    set_verbosity(verbose)


def _usage_error(error: click.ClickException) -> UsageError:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "weft"
    return UsageError(error.format_message().rstrip("."), hint=f"{command} --help")


if __name__ == "__main__":
    sys.exit(main())
