"""Commands of those who use what was trained: a module's lineage, pull, eval."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from weft.client.commands.console import (
    AsJson,
    Coordinator,
    DeviceKind,
    Insecure,
    Threads,
    Token,
    find_home,
    look,
    progress_line,
    show,
)
from weft.common.cli import print_json
from weft.common.errors import DataError, UsageError
from weft.common.ids import ModuleRef

if TYPE_CHECKING:
    from weft.client.score import Score


def modules_show(
    ref: Annotated[str, typer.Argument(help="RUN or RUN/level.expert.")],
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Draw a module's lineage from its signed manifests, which are verified: versions, contributors, rule, gate.

    Example: weft modules show my-run/0.0
    """
    from weft.client.cells import plain
    from weft.client.lineage import draw
    from weft.client.pull import lineage

    wanted = ModuleRef.parse(ref)
    with look(coordinator, token, insecure=insecure) as (access, transport):
        manifests = lineage(transport, wanted, ca_pem=access.member.ca_pem)
    show(draw(manifests), plain(manifests), as_json=as_json)


def pull(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="MODULE",
            help="RUN, RUN/level.expert or RUN/path:0.0, with @VERSION or the newest; a path also @best.",
        ),
    ],
    *,
    to: Annotated[Path, typer.Option(help="Directory to make.")],
    every_path: Annotated[
        bool,
        typer.Option("--all", help="All modules of a run with its router, for weft generate and weft eval."),
    ] = False,
    form: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="A PEFT adapter or the whole model (default: an adapter where the modules are LoRA).",
            click_type=click.Choice(["peft", "hf"]),
        ),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base, if it is here, where a base is needed.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say in one line where it lies.")] = False,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Fetch published modules as an ordinary PEFT adapter or Hugging Face model; or all of a run's, with its router.

    A path of LoRA modules becomes an adapter, with --as hf merged into the base; one of whole transformer blocks
    becomes a model. Signatures, digests and shapes are checked before anything is written; an interrupted pull leaves
    nothing at its target and goes on where it was.

    Example: weft pull my-run@3 --to ./adapter
    """
    from weft.client.deliver import Delivered, Form, deliver
    from weft.client.deliver_grid import DeliveredGrid, deliver_grid

    if every_path and form:
        raise UsageError("--all writes a grid directory, not one model", hint="leave --as or --all out")
    wanted = ModuleRef.parse(ref)
    with (
        look(coordinator, token, insecure=insecure) as (access, transport),
        progress_line("fetching") as progress,
    ):
        home, ca_pem = find_home(), access.member.ca_pem
        delivered: Delivered | DeliveredGrid
        if every_path:
            delivered = deliver_grid(
                transport, wanted, to, home=home, ca_pem=ca_pem, base=base, progress=progress
            )
        else:
            wished = Form(form) if form else None
            delivered = deliver(
                transport, wanted, to, home=home, ca_pem=ca_pem, form=wished, base=base, progress=progress
            )
    if as_json:
        print_json(delivered.table())
        return
    checked, where, *following = delivered.lines()
    for line in [where] if quiet else [checked, where, *following]:
        typer.echo(line)


def evaluate(
    models: Annotated[
        list[Path], typer.Argument(help="Directories: PEFT adapters, models, or grids of weft pull --all.")
    ],
    *,
    data: Annotated[list[Path], typer.Option(help="Held-out text: a file or a directory; may be repeated.")],
    base: Annotated[
        str | None, typer.Option(help="The adapters' or grid's base: directory or Hub id.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens per window (default: the run's).")
    ] = None,
    prefix_tokens: Annotated[
        int | None,
        typer.Option(min=0, help="First tokens of a document that do not count; 32 to compare with a grid."),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(
            min=0, help="Grid: choose the path anew every so many tokens, 0 never (default: the run's)."
        ),
    ] = None,
    best: Annotated[
        bool, typer.Option("--best", help="Grid: each path's best versions, where it was evaluated.")
    ] = False,
    device: DeviceKind = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well adapters, models or grids predict text: bits per byte, loss per token, perplexity.

    A grid sends each document along its own path, by its first tokens, which count for nothing.

    Example: weft eval ./base ./adapter --base ./base --data heldout.txt
    """
    for path in data:
        if not path.exists():
            raise DataError(f"there is no {path}", hint="give --data a file or a directory that exists")
    from weft.client.home import WorkerSettings
    from weft.client.join import choose_device
    from weft.client.score import Scorer, ScoreSettings

    worker = WorkerSettings(data="", name="", device=device or "", threads=threads or 0)
    settings = ScoreSettings(
        base=base, sequence_length=sequence_length, prefix_tokens=prefix_tokens, every=every, best=best
    )
    scorer = Scorer(data, settings, device=choose_device(worker))
    with progress_line("evaluating") as progress:
        found = [scorer.score(model, progress) for model in models]
    if as_json:
        print_json([dataclasses.asdict(item) for item in found])
        return
    for item in found:
        typer.echo(item.model)
        for score in item.results if len(item.results) == 1 else (*item.results, item.together):
            for line in _score_lines(score):
                typer.echo(f"  {line}")


def _score_lines(score: Score) -> Iterator[str]:
    bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f} bits per byte, "
    yield (
        f"{score.data}: {bits}loss {score.loss:.4f} nats, perplexity {score.perplexity:.3f} "
        f"({score.num_labels:,} labels)"
    )
    for path in score.paths:
        yield f"  path {path.path}: {path.num_documents:,} documents, loss {path.loss:.4f} nats"
