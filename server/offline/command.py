"""``weft merge``."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from weft.common.errors import UsageError

if TYPE_CHECKING:
    from weft.server.offline.merging import Estimate, Result
    from weft.server.offline.plan import Plan
    from weft.server.offline.recipe import Recipe, RecipeFile

console = Console(highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add ``weft merge`` to the program."""
    app.command("merge")(merge)


def merge(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Adapter or model directories, [NAME=]DIR[:WEIGHT] each; or one mergekit YAML.",
            show_default=False,
        ),
    ] = None,
    *,
    to: Annotated[Path | None, typer.Option("--to", help="Where the result appears.")] = None,
    rule: Annotated[str, typer.Option(help="Merge rule; --list has them all.")] = "mean",
    list_rules: Annotated[bool, typer.Option("--list", help="Print the rules.")] = False,
    base: Annotated[str, typer.Option(help="The model that the inputs were trained from.")] = "",
    onto: Annotated[str, typer.Option(help="Another version of the base, to add the movements to.")] = "",
    expr: Annotated[str, typer.Option(help='Arithmetic instead of a rule: "2*math - toxic".')] = "",
    density: Annotated[float | None, typer.Option(help="Short for --param density=N.")] = None,
    scale: Annotated[float | None, typer.Option(help="Short for --param scale=N.")] = None,
    param: Annotated[
        list[str] | None, typer.Option(help="Parameter of the rule, KEY=VALUE; repeat it.")
    ] = None,
    recipe: Annotated[Path | None, typer.Option(help="A TOML file that says all of this.")] = None,
    dtype: Annotated[str, typer.Option(help="Store as fp32, bf16 or fp16; unset: as the base.")] = "",
    lora: Annotated[str, typer.Option(help="For adapters: exact, dense, stack or factors.")] = "",
    rank: Annotated[int, typer.Option(help="Rank of a merged adapter; 0: the inputs' largest.")] = 0,
    shard_size: Annotated[str, typer.Option(help="Longest weight file.")] = "5GB",
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge adapters that name different bases.")
    ] = False,
    threads: Annotated[int, typer.Option(help="0: one a core.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda for adapters.")] = "cpu",
    digests: Annotated[bool, typer.Option(help="Hash all inputs for the manifest.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Merge adapters or whole models that anyone made into one.

    Broken off, the same command goes on where it was.

    Example: weft merge --rule ties --density 0.2 --base ./base ./a ./b:0.5 --to ./merged
    """
    if list_rules:
        _print_rules(as_json=as_json)
        return
    given = inputs or []
    options = {
        "base": base,
        "onto": onto,
        "expression": expr,
        "dtype": dtype or None,
        "lora": lora or None,
        "rank": rank,
        "shard_size": shard_size,
        "any_base": any_base,
    }
    parameters = _parameters(param or [], density=density, scale=scale)
    understood = _understand(given, recipe, options, rule, parameters)
    _run(understood, to, threads=threads, device=device, digests=digests, dry_run=dry_run, as_json=as_json)


def _run(
    recipe: Recipe,
    to: Path | None,
    *,
    threads: int,
    device: str,
    digests: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from weft.server.offline import merging

    _check_device(device)
    plan = merging.make_plan(recipe, device=device)
    options = merging.Options(threads=threads or merging.num_threads(), digests=digests)
    if dry_run:
        _print_estimate(merging.estimate(recipe, plan, options), as_json=as_json)
        return
    if to is None:
        raise UsageError("there is no --to", hint="add --to DIR, or --dry-run")
    with _progress(plan, shown=not as_json and console.is_terminal) as advance:
        result = merging.merge(recipe, plan, to, options, advance=advance)
    _print_result(result, as_json=as_json)


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    import torch

    if device != "cuda":
        raise UsageError(f"there is no device {device!r}", hint="use cpu or cuda")
    if not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device", hint="remove --device, or install torch for CUDA")


def _understand(
    given: Sequence[str],
    recipe: Path | None,
    options: Mapping[str, Any],
    rule: str,
    parameters: Mapping[str, Any],
) -> Recipe:
    from weft.common.base import resolve_source
    from weft.server.offline.mergekit import load_mergekit
    from weft.server.offline.recipe import load_recipe, understand

    said = {key: value for key, value in options.items() if value not in ("", None, 0, False, "5GB")}
    file = Path(given[0]) if len(given) == 1 and Path(given[0]).suffix in {".yml", ".yaml"} else None
    if file is not None or recipe is not None:
        beside = [*said, *parameters, *(["rule"] if rule != "mean" else []), *(given if recipe else [])]
        if beside:
            raise UsageError(
                f"{beside[0]} is given beside a file that says how to merge",
                hint=f"write it into {recipe or file}",
            )
    if file is not None:
        return load_mergekit(file, resolve=resolve_source)
    written = load_recipe(recipe) if recipe is not None else _from_options(given, options, rule, parameters)
    return understand(written, resolve=resolve_source)


def _from_options(
    given: Sequence[str], options: Mapping[str, Any], rule: str, parameters: Mapping[str, Any]
) -> RecipeFile:
    from weft.common.settings import from_table
    from weft.server.offline.inputs import split_label
    from weft.server.offline.recipe import InputSpec, RecipeFile, merge_settings

    table = {key: value for key, value in options.items() if value is not None}
    file = from_table(RecipeFile, table)
    inputs = [split_label(text) for text in given]
    return dataclasses.replace(
        file,
        inputs=tuple(
            InputSpec(path=str(path), name=name, weight=1.0 if weight is None else weight)
            for name, path, weight in inputs
        ),
        merge=merge_settings(rule, parameters),
    )


def _parameters(pairs: Sequence[str], **named: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key in found:
            raise UsageError(f"--param {pair} is not KEY=VALUE, or given twice", hint="--param density=0.2")
        try:
            found[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = text
    return found


@contextlib.contextmanager
def _progress(plan: Plan, *, shown: bool) -> Iterator[Callable[[int], None]]:
    from weft.common.tensors import DTYPES

    total = sum(spec.size * DTYPES[spec.dtype].itemsize for spec in plan.specs)
    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task("merging", total=total)
        yield lambda count: progress.advance(task, count)


def _print_estimate(found: Estimate, *, as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(dataclasses.asdict(found)))
        return
    console.print(f"{found.num_tensors} tensors, {found.num_parameters / 1e6:.1f} million parameters")
    console.print(f"reads {_size(found.read_bytes)}, writes {_size(found.write_bytes)}")
    console.print(f"memory about {_size(found.memory_bytes)} beside the program and mapped files")
    console.print(f"time about {found.seconds:.1f} s, if the disk keeps up")
    _print_notes(found.notes)


def _print_result(result: Result, *, as_json: bool) -> None:
    if as_json:
        console.print_json(json.dumps(dataclasses.asdict(result)))
        return
    resumed = f", {result.num_resumed} of them done before" if result.num_resumed else ""
    console.print(f"{result.to}: {result.num_tensors} tensors{resumed}, in {result.seconds:.1f} s")
    if result.truncation_error is not None:
        console.print(f"truncation to the rank lost {100 * result.truncation_error:.2g} % of ‖ΔW‖")
    _print_notes(result.notes)


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        console.print(f"note: {note}")


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _print_rules(*, as_json: bool) -> None:
    rows = _rules()
    if as_json:
        console.print_json(json.dumps(rows))
        return
    for row in rows:
        console.print(f"[bold]{row['rule']}[/bold]  {row['title']}")
        for key in (
            "paper",
            "parameters",
            "needs",
            "cost for a worker",
            "robust",
            "secure aggregation",
            "adapters",
        ):
            console.print(f"    {key}: {row[key]}")


def _rules() -> list[dict[str, str]]:
    from weft.common.settings import to_table
    from weft.server.merge.rules import RULES
    from weft.server.merge.settings import DEFAULT_PARAMETERS, MergeSettings
    from weft.server.offline.recipe import needs_base, offline_merge

    rows = []
    for name, rule in RULES.items():
        settings = MergeSettings(**offline_merge({"rule": name}) | {"clip": "none"})
        parameters = to_table(DEFAULT_PARAMETERS[name])
        needs = "the diagonal Fisher beside each update" if rule.needs_fisher else "nothing"
        if not rule.needs_fisher and needs_base(settings):
            needs = "the base, for whole models"
        rows.append(
            {
                "rule": name.value,
                "title": rule.title,
                "paper": rule.paper,
                "parameters": ", ".join(f"{key} = {value}" for key, value in parameters.items()) or "none",
                "needs": needs,
                "cost for a worker": "8 bits a parameter and a backward pass"
                if rule.needs_fisher
                else "none",
                "robust": "yes" if rule.robust else "no",
                "secure aggregation": "yes" if rule.secure_aggregation else "no",
                "adapters": "exact, dense, stack, factors" if rule.linear else "dense, factors",
            }
        )
    return rows
