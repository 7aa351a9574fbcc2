"""The commands of workers and of those who look: join, watch, pull, eval, the lists, tokens, doctor.

Only declarations and their wiring: what a command does is in the module it imports when it runs, so that
``weft --help`` needs neither torch nor gRPC.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import click
import typer

from weft.common.cli import print_json
from weft.common.errors import DataError, NotFound, UsageError
from weft.common.ids import ModuleRef, run_id

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from weft.client.device import Device
    from weft.client.home import Access, Home, Membership, WorkerSettings
    from weft.client.transport import Transport
    from weft.client.view import PlainView, TerminalView
    from weft.common.identity.token import JoinToken
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
DeviceKind = Annotated[
    str | None,
    typer.Option(help="Default: the best there is.", click_type=click.Choice(["cpu", "cuda", "mps"])),
]
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
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads to use.")]
ExitWhenFinished = Annotated[
    bool, typer.Option("--exit-when-finished", help="Leave when all runs are finished.")
]
OneRun = Annotated[str, typer.Option("--run", help="Only this run.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (join, watch, pull, evaluate, doctor):
        app.command("eval" if command is evaluate else command.__name__)(command)
    groups = {
        "runs": (_RUNS, "What is being trained."),
        "rounds": (_ROUNDS, "Past and present rounds, with the reason for each."),
        "modules": (_MODULES, "Modules, their versions and their lineage."),
        "workers": (_WORKERS, "Who works; let them in, shut them out."),
        "token": (_TOKENS, "Join tokens to hand out."),
    }
    for name, (commands, text) in groups.items():
        group = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help=text)
        for verb, command in commands.items():
            group.command(verb)(command)
        app.add_typer(group, name=name)


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
    exit_when_finished: ExitWhenFinished = False,
    insecure: Insecure = False,
) -> None:
    """Work for a coordinator until stopped. Your data stays on this machine.

    Ctrl-C once finishes the task in hand, twice leaves at once. The same command without token, or without
    anything, resumes as the same worker.

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
    settings = joining.settle(directory, texts | {"threads": threads})
    with joining.alone(directory):
        member, found = _enter(directory, address, parsed, settings, insecure=insecure)
        homes.save_settings(directory, settings)
        view = _view()
        worker, transport = joining.make_worker(
            home, directory, member, settings, found, view=view, leave_when_finished=exit_when_finished
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
        _say("✓ coordinator identity matches the token" if ca_pem else "! no TLS: this machine only")
        device = joining.choose_device(settings)
        member = joining.register(
            directory, where, token, ca_pem=ca_pem, name=settings.name, device=device.describe()
        )
        _say(f"✓ registered as {member.worker_id}")
    else:
        member = _known_member(directory, address)
        device = joining.choose_device(settings)
        _say(f"✓ resuming as {member.worker_id} of {member.address}")
    _say(f"✓ {device.describe()}")
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
    _say(once if times == 1 else "leaving now")


def _view() -> PlainView | TerminalView:
    from weft.client.view import PlainView, TerminalView

    console = _console()
    return TerminalView(console) if console.is_terminal else PlainView(_say)


# ---- looking -----------------------------------------------------------------------------------------------------


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

    with _look(coordinator, token, insecure=insecure) as (_, transport):
        first = _one_run(transport.get_status(run), run)
        if once:
            _show(first, as_json=as_json)
            return
        console = _console()
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
    from weft.client.watch import plain, runs_table

    with _look(coordinator, token, insecure=insecure) as (_, transport):
        runs = transport.get_status().runs
    _print(runs_table(runs), plain(runs), as_json=as_json)


def runs_show(
    run: Annotated[str, typer.Argument(help="The run's name.")],
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Show one run with its modules and workers. Example: weft runs show my-run."""
    with _look(coordinator, token, insecure=insecure) as (_, transport):
        status = _one_run(transport.get_status(run_id(run)), run)
    _show(status, as_json=as_json)


def rounds_list(
    *,
    run: OneRun = "",
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """List the rounds of a run, or of all. Example: weft rounds list --run my-run."""
    from weft.client.watch import plain, rounds_table

    with _look(coordinator, token, insecure=insecure) as (_, transport):
        names = [run] if run else [item.run_id for item in transport.get_status().runs]
        rounds = [item for name in names for item in transport.list_rounds(name)]
    _print(rounds_table(rounds), plain(rounds), as_json=as_json)


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
    from weft.client.watch import fields_table, plain

    wanted = ModuleRef.parse(ref)
    with _look(coordinator, token, insecure=insecure) as (_, transport):
        rounds = transport.list_rounds(wanted.run, str(wanted.module or ""))
    found = [item for item in rounds if number in (None, item.round_number)]
    if not found:
        raise NotFound(f"{ref} has no round {number}", hint=f"weft rounds list --run {wanted.run}")
    _print(fields_table(found[-1]), plain(found[-1]), as_json=as_json)


def modules_list(
    *,
    run: OneRun = "",
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """List modules with their newest version and current round. Example: weft modules list."""
    from weft.client.watch import modules_table, plain

    with _look(coordinator, token, insecure=insecure) as (_, transport):
        status = _one_run(transport.get_status(run), run)
    modules = [module for item in status.runs for module in item.modules]
    _print(modules_table(modules, taken_at=status.taken_at), plain(modules), as_json=as_json)


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
    from weft.client.lineage import draw
    from weft.client.pull import lineage
    from weft.client.watch import plain

    wanted = ModuleRef.parse(ref)
    with _look(coordinator, token, insecure=insecure) as (access, transport):
        manifests = lineage(transport, wanted, ca_pem=access.member.ca_pem)
    _print(draw(manifests), plain(manifests), as_json=as_json)


def workers_list(
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """List workers and viewers. Example: weft workers list."""
    from weft.client.watch import plain, workers_table

    with _look(coordinator, token, insecure=insecure) as (_, transport):
        status = transport.get_status()
    _print(workers_table(status.workers, taken_at=status.taken_at), plain(status.workers), as_json=as_json)


def workers_show(
    worker: Annotated[str, typer.Argument(help="The worker's id, for example w-7k2f.")],
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Show one worker. Example: weft workers show w-7k2f."""
    from weft.client.watch import fields_table, plain

    with _look(coordinator, token, insecure=insecure) as (_, transport):
        found = [item for item in transport.get_status().workers if item.worker_id == worker]
    if not found:
        raise NotFound(f"there is no worker {worker}", hint="weft workers list")
    _print(fields_table(found[0]), plain(found[0]), as_json=as_json)


def workers_approve(
    worker: Annotated[str, typer.Argument(help="The worker's id.")],
    *,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Let a worker in that waits for approval. Example: weft workers approve w-7k2f."""
    with _look(coordinator, token, insecure=insecure) as (_, transport):
        transport.approve_worker(worker)
    _say(f"✓ {worker} may work")


def workers_revoke(
    worker: Annotated[str, typer.Argument(help="The worker's id.")],
    *,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Shut a worker out at once; its accepted updates stay. Example: weft workers revoke w-7k2f."""
    with _look(coordinator, token, insecure=insecure) as (_, transport):
        transport.revoke_worker(worker)
    _say(f"✓ {worker} is shut out")


# ---- tokens ------------------------------------------------------------------------------------------------------


def token_create(
    *,
    role: Annotated[
        str, typer.Option(help="What it allows.", click_type=click.Choice(["worker", "viewer", "admin"]))
    ] = "worker",
    ttl: Annotated[str, typer.Option(help="How long it is good for: 90s, 30m, 24h or 7d.")] = "24h",
    uses: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many may join with it.")] = 16,
    runs: Annotated[str, typer.Option(metavar="RUN,RUN", help="Only for these runs (default: all).")] = "",
    approve: Annotated[
        bool, typer.Option("--approve", help="Each who joins waits for your approval.")
    ] = False,
    label: Annotated[str, typer.Option(help="A note for yourself.")] = "",
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Make a join token to hand out. It is shown once; the coordinator keeps only a hash.

    Example: weft token create --role viewer --ttl 7d --uses 1 --label "Ada's laptop"
    """
    import secrets

    from weft.common.protocol import Role

    with _look(coordinator, token, insecure=insecure) as (access, transport):
        made = transport.create_token(
            request_id=secrets.token_hex(16),
            role=Role(role),
            ttl_s=parse_ttl(ttl),
            num_uses=uses,
            needs_approval=approve,
            runs=tuple(run_id(run.strip()) for run in runs.split(",") if run.strip()),
            label=label,
        )
    address = access.member.address
    if as_json:
        print_json({"token": made, "address": address, "role": role})
        return
    typer.echo(made)
    use = (
        f"weft join {address} TOKEN --data PATH"
        if role == "worker"
        else f"weft watch --coordinator {address} --token TOKEN"
    )
    typer.echo(f"  next: {use}", err=True)


def token_list(
    *,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """List join tokens, without their secrets. Example: weft token list."""
    from weft.client.watch import plain, tokens_table

    with _look(coordinator, token, insecure=insecure) as (_, transport):
        tokens = transport.list_tokens()
    _print(tokens_table(tokens, now=time.time()), plain(tokens), as_json=as_json)


def token_revoke(
    token_id: Annotated[str, typer.Argument(help="The token's id: six characters.")],
    *,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Take a token back; those who joined with it stay. Example: weft token revoke K3QZ7A."""
    with _look(coordinator, token, insecure=insecure) as (_, transport):
        transport.revoke_token(token_id.upper())
    _say(f"✓ token {token_id.upper()} admits nobody any more")


# ---- pull and eval -----------------------------------------------------------------------------------------------


def pull(
    ref: Annotated[
        str,
        typer.Argument(
            metavar="MODULE", help="RUN, RUN/level.expert or RUN/path:0.0, with @VERSION or the newest."
        ),
    ],
    *,
    to: Annotated[Path, typer.Option(help="Directory to make.")],
    form: Annotated[
        str,
        typer.Option(
            "--as", help="A PEFT adapter, or the whole model.", click_type=click.Choice(["peft", "hf"])
        ),
    ] = "peft",
    base: Annotated[
        Path | None, typer.Option(help="With --as hf: directory of the base, if it is here.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Say in one line where it lies.")] = False,
    as_json: AsJson = False,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Fetch a published module as an ordinary PEFT adapter, or merged into its base as a Hugging Face model.

    Signatures, digests and shapes are checked before anything is written; an interrupted pull leaves nothing.

    Example: weft pull my-run@3 --to ./adapter
    """
    from weft.client.deliver import deliver

    wanted = ModuleRef.parse(ref)
    with (
        _look(coordinator, token, insecure=insecure) as (access, transport),
        _progress("fetching") as progress,
    ):
        delivered = deliver(
            transport,
            wanted,
            to,
            home=_home(),
            ca_pem=access.member.ca_pem,
            merged=form == "hf",
            base=base,
            progress=progress,
        )
    if as_json:
        print_json(delivered.table())
        return
    for line in delivered.lines()[: 1 if quiet else None]:
        typer.echo(line)


def evaluate(
    models: Annotated[list[Path], typer.Argument(help="PEFT adapter directories, or directories of bases.")],
    *,
    data: Annotated[list[Path], typer.Option(help="Held-out text: a file or a directory; may be repeated.")],
    base: Annotated[str | None, typer.Option(help="The adapters' base: directory or Hub id.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens per window (default: the run's).")
    ] = None,
    device: DeviceKind = None,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well adapters, or bare bases, predict text: bits per byte, and loss per token.

    Example: weft eval ./base ./adapter --base ./base --data heldout.txt
    """
    for path in data:
        if not path.exists():
            raise DataError(f"there is no {path}", hint="give --data a file or a directory that exists")
    from weft.client.home import WorkerSettings
    from weft.client.join import choose_device
    from weft.client.score import Scorer

    settings = WorkerSettings(data="", name="", device=device or "", threads=threads or 0)
    scorer = Scorer(data, base=base, sequence_length=sequence_length, device=choose_device(settings))
    with _progress("evaluating") as progress:
        found = [scorer.score(model, progress) for model in models]
    if as_json:
        print_json([dataclasses.asdict(item) for item in found])
        return
    for item in found:
        typer.echo(item.model)
        for score in item.results if len(item.results) == 1 else (*item.results, item.together):
            bits = "" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f} bits per byte, "
            typer.echo(f"  {score.data}: {bits}loss {score.loss:.4f} nats ({score.num_labels:,} labels)")


def doctor(*, as_json: AsJson = False) -> None:
    """Check this machine and the coordinators it knows; each finding comes with what to do.

    Example: weft doctor
    """
    from weft.client.doctor import Outcome, examine

    checks = []
    for check in examine(_home()):
        checks.append(check)
        if not as_json:
            sign = {Outcome.OK: "✓", Outcome.WARNING: "!", Outcome.FAILED: "✗"}[check.outcome]
            typer.echo(f"{sign} {check.name}: {check.found}")
            if check.hint and check.outcome is not Outcome.OK:
                typer.echo(f"    next: {check.hint}")
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    raise typer.Exit(int(any(check.outcome is Outcome.FAILED for check in checks)))


# ---- shared ------------------------------------------------------------------------------------------------------


def parse_ttl(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``24h``, ``7d``; raises UsageError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not number.isascii() or not number.isdecimal() or int(number) == 0:
        raise UsageError(f"--ttl {text!r} is not a duration", hint="write 90s, 30m, 24h or 7d")
    return int(number) * units[unit]


@contextlib.contextmanager
def _look(
    coordinator: str | None, token: str | None, *, insecure: bool
) -> Iterator[tuple[Access, Transport]]:
    """A connection to the coordinator that is meant."""
    from weft.client.join import access_to, connect, read_token

    access = access_to(_home(), coordinator, read_token(token, {}, sys.stdin), insecure=insecure)
    with connect(access) as transport:
        yield access, transport


def _home() -> Home:
    from weft.client.home import Home

    return Home.of(os.environ)


def _one_run(status: Status, run: str) -> Status:
    if run and not status.runs:
        raise NotFound(f"there is no run {run} here", hint="weft runs list")
    return status


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    # Tables that are cut at 80 columns are of no use in a file or a pipe.
    return console if console.is_terminal else Console(highlight=False, width=240)


def _say(text: str) -> None:
    typer.echo(text)


def _print(table: RenderableType, value: Any, *, as_json: bool) -> None:
    if as_json:
        print_json(value)
    else:
        _console().print(table)


def _show(status: Status, *, as_json: bool) -> None:
    from weft.client.watch import plain, render

    _print(render(status), plain(status), as_json=as_json)


@contextlib.contextmanager
def _progress(doing: str) -> Iterator[Any]:
    """A line on stderr that says how far it is, on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    with console.status(doing) as status:
        yield lambda done, total: status.update(Text(f"{doing} {100 * done // max(1, total)} %"))


Commands = Mapping[str, Callable[..., None]]

_RUNS: Final[Commands] = {"list": runs_list, "show": runs_show}
_ROUNDS: Final[Commands] = {"list": rounds_list, "show": rounds_show}
_MODULES: Final[Commands] = {"list": modules_list, "show": modules_show}
_WORKERS: Final[Commands] = {
    "list": workers_list,
    "show": workers_show,
    "approve": workers_approve,
    "revoke": workers_revoke,
}
_TOKENS: Final[Commands] = {"create": token_create, "list": token_list, "revoke": token_revoke}
