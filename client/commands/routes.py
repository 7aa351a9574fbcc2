"""Commands that send text along paths: ``weft route …`` and ``weft generate``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click
import typer

from weft.client.commands.console import AsJson, DeviceKind, Threads, progress_line
from weft.common.cli import print_json
from weft.common.errors import UsageError

if TYPE_CHECKING:
    from weft.client.device import Device
    from weft.client.inference import Inference, Piece
    from weft.client.route import Fitted, RouterBase, Sample
    from weft.common.modules import Topology

_SHOWN_MAX: Final = 64
"""Paths listed one by one."""

Data = Annotated[
    Path, typer.Argument(help="Documents: .txt, .jsonl, .parquet, a saved data set, or a directory of these.")
]
Base = Annotated[str, typer.Option(help="The base that documents are seen through: directory or Hub id.")]
RouterFile = Annotated[Path, typer.Option("--router", help="A router's file.")]
Grid = Annotated[Path, typer.Option("--model", help="What `weft pull RUN --all --to DIR` wrote.")]
GridBase = Annotated[str | None, typer.Option("--base", help="The grid's base, if it does not say where.")]
Every = Annotated[int | None, typer.Option(min=1, help="Choose the path anew every so many tokens.")]
Share = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Look at this share of the documents, that --router-share of shard leaves out."
    ),
]
NumMax = Annotated[int, typer.Option("--documents", min=1, help="Look at most at so many documents.")]
Seed = Annotated[int, typer.Option(min=0, help="Of all draws.")]
NewRouter = Annotated[Path, typer.Option(help="The router's file to write.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode="rich",
        help="Which path a text belongs to: routers and shards.",
    )
    for command in (fit, shard, prompt, reseed):
        group.command(command.__name__)(command)
    app.add_typer(group, name="route")
    app.command("generate")(generate)


def fit(
    data: Data,
    *,
    to: NewRouter,
    method: Annotated[
        str,
        typer.Option(
            help="By documents alone, or by which path predicts them best.",
            click_type=click.Choice(["kmeans", "product", "random", "discriminative"]),
        ),
    ] = "kmeans",
    base: Annotated[str | None, typer.Option(help="The run's base: directory or Hub id.")] = None,
    experts: Annotated[
        str | None, typer.Option(help="The run's topology, for example 4x4; 0 is a path-specific level.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Discriminative: the trained paths, as `weft pull RUN --all` wrote them."),
    ] = None,
    router: Annotated[
        Path | None, typer.Option(help="Discriminative: what they were trained with (default: the grid's).")
    ] = None,
    share: Share = 1.0,
    documents: NumMax = 20_000,
    prefix_tokens: Annotated[
        int, typer.Option(min=1, max=4096, help="First tokens of a document that choose its path.")
    ] = 32,
    seed: Seed = 0,
    device: DeviceKind = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Fit a router. Start with kmeans or product; once paths are trained, discriminative asks them.

    Example: weft route fit ./corpus --base ./base --experts 4x4 --to first.router
    """
    from weft.client import route
    from weft.common.modules import Topology, parse_experts

    route.check_new(to)
    sample = route.Sample(share=share, num_max=documents, seed=seed)
    if method == "discriminative":
        if model is None or base is not None or experts is not None:
            raise UsageError(
                "a discriminative router is fitted to trained paths",
                hint="give --model DIR (and --router, if the grid has none), not --base or --experts",
            )
        with _open(model, None, device, threads) as grid:
            fitted = _fit_by_paths(data, grid, router, sample)
    else:
        if base is None or experts is None or model is not None or router is not None:
            raise UsageError(
                f"a {method} router is fitted to documents",
                hint="give --base DIR and --experts, for example 4x4, not --model or --router",
            )
        topology = Topology(experts=parse_experts(experts))
        loaded = route.RouterBase.load(base, _device(device, threads))
        fitted = _fit_clusters(data, loaded, topology, method, sample, prefix_tokens)
    _save(to, fitted, as_json=as_json)


def shard(
    data: Data,
    *,
    router: RouterFile,
    base: Base,
    to: Annotated[Path, typer.Option(help="Directory to make, for routing.shards of a run file.")],
    overlap: Annotated[int, typer.Option(min=1, help="Paths that each document is trained on.")] = 1,
    validation_share: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of the documents to keep for judging, in heldout/.")
    ] = 0.02,
    router_share: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share to leave out, for a discriminative router.")
    ] = 0.0,
    device: DeviceKind = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Cut a corpus into one file of documents for each path, with an index.

    Example: weft route shard ./corpus --router first.router --base ./base --to ./shards
    """
    from weft.client import route
    from weft.common.ids import Path as PathOfModules
    from weft.common.routing import read_router
    from weft.common.settings import to_table

    found = read_router(router)
    loaded = route.RouterBase.load(base, _device(device, threads))
    with _counting("routing documents") as on_document:
        index = route.make_shards(
            data,
            to,
            loaded,
            found,
            overlap=overlap,
            validation_share=validation_share,
            router_share=router_share,
            on_document=on_document,
        )
    if as_json:
        print_json({"directory": str(to), **to_table(index)})
        return
    counts = {PathOfModules.parse(item.path): item.num_documents for item in index.shards}
    typer.echo(f"✓ {to}: {sum(counts.values()):,} documents in {len(counts)} shards")
    _say_traffic(
        counts, f"weft route reseed {data} --router {router} --base {base} --to NEW, then shard again"
    )


def prompt(
    text: Annotated[str, typer.Argument(help="The beginning of a text.")],
    *,
    model: Grid,
    every: Every = None,
    base: GridBase = None,
    device: DeviceKind = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Say which path a text goes along, with the score of each path.

    Example: weft route prompt "fn main() {" --model ./grid
    """
    with _open(model, base, device, threads) as grid:
        routed = grid.route(text)
        along = () if every is None else grid.route_along(text, every=every)
    scores = {str(path): score for path, score in routed.scores}
    if as_json:
        chunks = [{"text": chunk, "path": str(path)} for chunk, path in along]
        print_json({"path": str(routed.path), "scores": scores, "chunks": chunks})
        return
    typer.echo(f"path {routed.path}")
    for name, score in list(scores.items())[:_SHOWN_MAX]:
        typer.echo(f"  {name}  {score:.3f}")
    for chunk, path in along:
        typer.echo(f"{path}  {chunk!r}")


def reseed(
    data: Data,
    *,
    router: RouterFile,
    base: Base,
    to: NewRouter,
    share: Share = 1.0,
    documents: NumMax = 20_000,
    seed: Seed = 0,
    device: DeviceKind = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Give each path that gets no documents half of those of the busiest path; all others keep theirs.

    Example: weft route reseed ./corpus --router first.router --base ./base --to second.router
    """
    from weft.client import route
    from weft.common.routing import read_router

    route.check_new(to)
    found = read_router(router)
    loaded = route.RouterBase.load(base, _device(device, threads))
    sample = route.Sample(share=share, num_max=documents, seed=seed)
    with _counting("looking at documents") as on_document:
        fitted = route.reseed_router(data, loaded, found, sample=sample, on_document=on_document)
    _save(to, fitted, as_json=as_json)


def generate(
    text: Annotated[str, typer.Argument(metavar="PROMPT", help="The beginning of a text; - reads stdin.")],
    *,
    model: Grid,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    every: Every = None,
    path: Annotated[str | None, typer.Option(help="Take this path, for example 2.3.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the likeliest token; 1 draws as the model predicts.")
    ] = 0.0,
    seed: Seed = 0,
    best: Annotated[
        bool, typer.Option("--best", help="Versions that a path was best with, not the newest.")
    ] = False,
    base: GridBase = None,
    device: DeviceKind = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Continue a text along the path that it belongs to, and say which.

    The text goes to stdout as it is written, the path to stderr.

    Example: weft generate "fn main() {" --model ./grid
    """
    from weft.common.ids import Path as PathOfModules

    beginning = sys.stdin.read() if text == "-" else text
    with _open(model, base, device, threads, best=best) as grid:
        chosen = None if path is None else grid.recipe.topology.find_path(PathOfModules.parse(path))
        pieces: list[Piece] = []
        for piece in grid.generate(
            beginning,
            max_new_tokens=max_new_tokens,
            every=every,
            path=chosen,
            temperature=temperature,
            seed=seed,
        ):
            if not as_json:
                if not pieces or piece.path != pieces[-1].path:
                    typer.echo(f"[path {piece.path}]", err=True)
                typer.echo(piece.text, nl=False)
                sys.stdout.flush()
            pieces.append(piece)
    if as_json:
        print_json(
            {
                "text": "".join(piece.text for piece in pieces),
                "pieces": [{"text": piece.text, "path": str(piece.path)} for piece in pieces],
            }
        )
    else:
        typer.echo()


def _fit_by_paths(data: Path, grid: Inference, router: Path | None, sample: Sample) -> Fitted:
    from weft.client.route import fit_by_paths
    from weft.common.routing import read_router

    like = grid.router if router is None else read_router(router)
    with progress_line("asking paths") as progress:
        return fit_by_paths(data, grid, like=like, sample=sample, progress=progress)


def _fit_clusters(
    data: Path, base: RouterBase, topology: Topology, method: str, sample: Sample, prefix_tokens: int
) -> Fitted:
    from weft.client.route import fit_clusters
    from weft.common.routing import RouterKind

    with _counting("looking at documents") as on_document:
        return fit_clusters(
            data,
            base,
            topology,
            method=RouterKind(method),
            sample=sample,
            num_prefix_tokens=prefix_tokens,
            on_document=on_document,
        )


# ---- shared ------------------------------------------------------------------------------------------------------


def _device(device: str | None, threads: int | None) -> Device:
    from weft.client.home import WorkerSettings
    from weft.client.join import choose_device

    return choose_device(WorkerSettings(data="", name="", device=device or "", threads=threads or 0))


def _open(
    directory: Path, base: str | None, device: str | None, threads: int | None, *, best: bool = False
) -> Inference:
    from weft.client.inference import Inference

    return Inference.open(directory, device=_device(device, threads), base=base, best=best)


@contextlib.contextmanager
def _counting(doing: str) -> Iterator[Callable[[int], None]]:
    """A line on stderr that counts, on a terminal; nothing elsewhere."""
    from rich.console import Console

    with Console(stderr=True).status(doing) as status:
        yield lambda done: status.update(f"{doing}: {done:,}")


def _save(to: Path, fitted: Fitted, *, as_json: bool) -> None:
    from weft.client.route import save_router

    save_router(to, fitted.router)
    router = fitted.router
    if as_json:
        print_json(_table(to, fitted))
        return
    typer.echo(f"✓ {to}: {router.kind.value}, {len(router.paths)} paths, {fitted.num_documents:,} documents")
    _say_traffic(fitted.counts, f"weft route reseed DATA --base DIR --router {to} --to NEW")


def _table(to: Path, fitted: Fitted) -> dict[str, Any]:
    return {
        "router": str(to),
        "digest": fitted.router.digest,
        "kind": fitted.router.kind.value,
        "base": fitted.router.base_digest,
        "prefix_tokens": fitted.router.num_prefix_tokens,
        "documents": fitted.num_documents,
        "traffic": {str(path): count for path, count in fitted.counts.items()},
        "empty": [str(path) for path, count in fitted.counts.items() if not count],
    }


def _say_traffic(counts: Mapping[Any, int], remedy: str) -> None:
    """Documents of each path, and what to do about paths without any."""
    total = max(1, sum(counts.values()))
    if len(counts) <= _SHOWN_MAX:
        for path, count in counts.items():
            typer.echo(f"  {path}  {count:>9,}  {100 * count / total:5.1f} %")
    else:
        typer.echo(f"  {min(counts.values()):,} to {max(counts.values()):,} documents a path")
    empty = [str(path) for path, count in counts.items() if not count]
    if empty:
        typer.echo(f"! no documents: {', '.join(empty[:_SHOWN_MAX])}")
        typer.echo(f"    next: {remedy}")
