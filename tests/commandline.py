"""Checks a command line against the real program without running it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import click

with warnings.catch_warnings():
    # typer imports names that click 8.4 and later deprecate.
    warnings.simplefilter("ignore", DeprecationWarning)
    import typer.main

    from weft.common.cli import build_app


@functools.cache
def program() -> click.Group:
    """The program with all its commands."""
    group = typer.main.get_command(build_app())
    assert isinstance(group, click.Group)
    return group


def find_command(words: Sequence[str]) -> tuple[click.Command, list[str]]:
    """The command that ``words`` (without ``weft``) begin with, and the words that are left for it.

    Raises:
        AssertionError: There is none.
    """
    command: click.Command = program()
    left = list(words)
    while isinstance(command, click.Group):
        while left and left[0].startswith("-"):
            check_option(command, left.pop(0))
        if not left:
            break
        name = left.pop(0)
        assert name in command.commands, f"weft has no command {name!r} in: weft {' '.join(words)}"
        command = command.commands[name]
    return command, left


def options_of(command: click.Command) -> frozenset[str]:
    """Every spelling of every option of a command."""
    options = [option for option in command.params if isinstance(option, click.Option)]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    return frozenset(known | {"--help", "-h"})


def check_option(command: click.Command, word: str) -> None:
    """Raise AssertionError unless ``word`` is an option of ``command``; its value after ``=`` is not looked at."""
    assert word.partition("=")[0] in options_of(command), f"{command.name} has no option {word}"


def check_options(words: Sequence[str]) -> None:
    """Raise AssertionError unless the command exists and has every option that ``words`` name."""
    command, left = find_command(words)
    for word in left:
        if word.startswith("--"):
            check_option(command, word)


def check_line(words: Sequence[str]) -> None:
    """Raise AssertionError unless the program would accept ``words`` as they are, values included."""
    command, left = find_command(words)
    if "--help" in left or "-h" in left or isinstance(command, click.Group):
        return
    try:
        command.make_context(f"weft {command.name}", left)
    except click.ClickException as error:
        raise AssertionError(f"weft {' '.join(words)}: {error.format_message()}") from error
