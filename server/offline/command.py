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
    from weft.server.merge.rule import MergeRule
    from weft.server.offline.merging import Estimate, Options, Result
    from weft.server.offline.plan import Plan
    from weft.server.offline.recipe import Recipe, RecipeFile
    from weft.server.offline.scoring import Scorer
    from weft.server.offline.search import Found

console = Console(highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add ``weft merge`` to the program."""
    app.command("merge")(merge)


def merge(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            help="NAME=DIR:WEIGHT each, or one file that says everything: a recipe (TOML) or a mergekit YAML.",
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
    lora: Annotated[str, typer.Option(help="For adapters: exact, dense, stack, factors or residual.")] = "",
    rank: Annotated[int, typer.Option(help="Rank of a merged adapter; 0: the inputs' largest.")] = 0,
    shard_size: Annotated[str, typer.Option(help="Longest weight file.")] = "5GB",
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Merge adapters that name different bases.")
    ] = False,
    search: Annotated[str, typer.Option(help="Look for the weights: greedy or lorahub.")] = "",
    evaluate: Annotated[
        str, typer.Option(help="Command whose last line is the score of a trial; {model} is its directory.")
    ] = "",
    heldout: Annotated[
        Path | None, typer.Option(help="Or text, on which a causal model's loss is the score.")
    ] = None,
    maximise: Annotated[
        bool, typer.Option("--maximise/--minimise", help="Whether what --evaluate prints should be high.")
    ] = True,
    budget: Annotated[
        int, typer.Option(help="Trials at most; 0: 2n − 1 for greedy, 40 for lorahub.", min=0)
    ] = 0,
    threads: Annotated[
        int,
        typer.Option(
            help="Processes that share the work (threads where they cannot be forked); 0: one a core.", min=0
        ),
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, or cuda for adapters.")] = "cpu",
    digests: Annotated[bool, typer.Option(help="Hash all inputs for the manifest.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would take, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Merge adapters or whole models that anyone made into one.

    Inputs are directories of either kind, each with a name and a weight if you like: NAME=DIR:WEIGHT. Or one
    file that says everything: a recipe in TOML, or a mergekit YAML. Broken off, the same command goes on where
    it was.

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
    scorer = _scorer(understood, search, evaluate, heldout, maximise=maximise, budget=budget)
    _run(
        understood,
        to,
        _Search(search, scorer, budget) if scorer is not None else None,
        threads=threads,
        device=device,
        digests=digests,
        dry_run=dry_run,
        as_json=as_json,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Search:
    """What a search was asked to be."""

    method: str
    scorer: Scorer
    budget: int


def _scorer(
    recipe: Recipe, method: str, command: str, heldout: Path | None, *, maximise: bool, budget: int
) -> Scorer | None:
    if not method:
        if command or heldout is not None or budget:
            raise UsageError("there is nothing to evaluate without a search", hint="add --search greedy")
        return None
    if bool(command) == (heldout is not None):
        raise UsageError(
            "a search needs either a command or held-out text",
            hint='add --evaluate "python score.py {model}", or --heldout FILE',
        )
    from weft.server.offline.scoring import CommandScorer, HeldoutScorer

    if heldout is not None:
        return HeldoutScorer(heldout, recipe.base)
    return CommandScorer(command, higher_is_better=maximise)


def _found(recipe: Recipe, to: Path, asked: _Search, options: Options, *, as_json: bool) -> Found:
    from weft.server.offline.search import Method, Trial, search

    if asked.method not in set(Method):
        raise UsageError(f"there is no search {asked.method!r}", hint=f"use {' or '.join(Method)}")

    def say(number: int, total: int, trial: Trial) -> None:
        if not as_json:
            weights = ", ".join(f"{weight:g}" for weight in trial.weights)
            console.print(f"trial {number} of at most {total}: {_score(trial.score)} with weights {weights}")

    found = search(
        recipe,
        to,
        asked.scorer,
        options,
        method=Method(asked.method),
        num_trials_max=asked.budget,
        on_trial=say,
    )
    if not as_json:
        again = f", {found.num_resumed} of them made before" if found.num_resumed else ""
        console.print(f"best of {len(found.trials)} trials{again}: {_score(found.best.score)}")
    return found


def _score(score: float | None) -> str:
    return "no finite score" if score is None else f"{score:.6g}"


def _run(
    recipe: Recipe,
    to: Path | None,
    asked: _Search | None,
    *,
    threads: int,
    device: str,
    digests: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    from weft.server.offline import merging
    from weft.server.offline.search import forget

    _check_device(device)
    plan = merging.make_plan(recipe, device=device)
    options = merging.Options(threads=threads or merging.num_threads(), digests=digests, device=device)
    if dry_run:
        _print_estimate(merging.estimate(recipe, plan, options), as_json=as_json)
        return
    if to is None:
        raise UsageError("there is no --to", hint="add --to DIR, or --dry-run")
    if asked is not None:
        recipe = _found(recipe, to, asked, options, as_json=as_json).recipe
        plan = merging.make_plan(recipe, device=device)
    try:
        with _progress(plan, shown=not as_json and console.is_terminal) as advance:
            result = merging.merge(recipe, plan, to, options, advance=advance)
    except KeyboardInterrupt:
        typer.echo(f"stopped; the same command goes on where it was, from {to}.partial", err=True)
        raise
    if asked is not None:
        forget(to)
    _print_result(result, plan, recipe.table.get("search"), as_json=as_json)


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
    file = None
    if len(given) == 1 and Path(given[0]).suffix in {".yml", ".yaml"}:
        file = Path(given[0])
    elif recipe is None and len(given) == 1 and Path(given[0]).suffix == ".toml":
        recipe, given = Path(given[0]), []
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
            InputSpec(path=path, name=name, weight=1.0 if weight is None else weight)
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

    total = sum(spec.size * DTYPES[spec.dtype].itemsize for spec in plan.all_specs)
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


def _print_result(result: Result, plan: Plan, search: Mapping[str, Any] | None, *, as_json: bool) -> None:
    if as_json:
        found = {} if search is None else {"search": search}
        console.print_json(json.dumps(dataclasses.asdict(result) | found))
        return
    resumed = f", {result.num_resumed} of them done before" if result.num_resumed else ""
    console.print(f"{result.to}: {result.num_tensors} tensors{resumed}, in {result.seconds:.1f} s")
    if result.truncation_error is not None:
        console.print(f"{plan.loses} lost {100 * result.truncation_error:.2g} % of ‖ΔW‖")
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


def _adapters(rule: MergeRule[Any]) -> str:
    """What --lora can say."""
    from weft.server.merge.settings import LoraSpace, MergeRuleName

    if rule.name == MergeRuleName.MEAN:
        return "exact, dense, stack, factors, residual"
    if len(rule.spaces) > 1:
        return "exact, dense, stack, factors"
    return "exact" if LoraSpace.EXACT in rule.spaces else "dense, factors"


def _cost(rule: MergeRule[Any]) -> str:
    """What a rule asks of a worker beside its update."""
    if rule.needs_grams:
        return "not for rounds"
    return "8 bits a parameter and a backward pass" if rule.needs_fisher else "none"


def _rules() -> list[dict[str, str]]:
    from weft.common.settings import from_table, to_table
    from weft.server.merge.rules import RULES
    from weft.server.merge.settings import DEFAULT_PARAMETERS, MergeSettings
    from weft.server.offline.recipe import needs_base, offline_merge

    rows = []
    for name, rule in RULES.items():
        settings = from_table(MergeSettings, offline_merge({"rule": name.value}))
        parameters = to_table(DEFAULT_PARAMETERS[name])
        needs = "the base, for whole models" if needs_base(settings) else "nothing"
        if rule.needs_fisher:
            needs = "the diagonal Fisher beside each update"
        if rule.needs_grams:
            needs = "Grams of the inputs of each layer, in grams.safetensors beside each input"
        rows.append(
            {
                "rule": name.value,
                "title": rule.title,
                "paper": rule.paper,
                "parameters": ", ".join(f"{key} = {value}" for key, value in parameters.items()) or "none",
                "needs": needs,
                "cost for a worker": _cost(rule),
                "robust": "yes" if rule.robust else "no",
                "secure aggregation": "yes" if rule.secure_aggregation else "no",
                "adapters": _adapters(rule),
            }
        )
    return rows
