"""The operator's commands: ``weft init``, ``weft serve``, ``weft verify``.

Heavy modules are imported inside the commands, so that ``weft --help`` answers at once.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from weft.common.errors import UsageError

console = Console(highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the operator's commands to the program."""
    app.command("init")(init)
    app.command("serve")(serve)
    app.command("verify")(verify)


def init(
    path: Annotated[Path, typer.Argument(help="Where to write the run file.")] = Path("run.toml"),
    *,
    base: Annotated[
        str, typer.Option(help="Base: a directory in Hugging Face layout, or a Hub id.")
    ] = "./base",
    name: Annotated[str, typer.Option(help="The run's name.")] = "my-run",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented run file: every key, with its meaning and its default.

    Example: weft init run.toml --base ./Llama-3.2-1B --name recipes
    """
    from weft.common.base import pin_base
    from weft.common.ids import run_id
    from weft.server.runfile import template

    if path.exists() and not force:
        raise UsageError(f"{path} exists", hint="choose another path, or add --force")
    digest = pin_base(Path(base)).digest if Path(base).is_dir() else ""
    source = str(Path(base).resolve()) if Path(base).is_dir() else base
    path.write_text(template(name=run_id(name), source=source, digest=digest), encoding="utf-8")
    console.print(f"wrote {path}")
    console.print(f"next: weft serve {path}")


def serve(
    run_files: Annotated[
        list[Path] | None, typer.Argument(help="Run files; none resumes what the state has.")
    ] = None,
    *,
    state: Annotated[Path, typer.Option(help="Where the coordinator keeps everything.")] = Path("weft-state"),
    listen: Annotated[str, typer.Option(help="HOST:PORT for workers and viewers.")] = "0.0.0.0:7443",
    advertise: Annotated[str, typer.Option(help="Host name for the join line.")] = "",
    http: Annotated[
        str, typer.Option(help="HOST:PORT for /metrics and /healthz, or off.")
    ] = "127.0.0.1:7444",
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS; loopback only.")] = False,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Print no join line: where logs are kept for many to read.")
    ] = False,
) -> None:
    """Start a coordinator for one or several runs, or resume it.

    Prints a join line to hand out. Ctrl-C drains and stops; the same command resumes where it was.

    Example: weft serve run.toml --state ./weft-state
    """
    from weft.server.app import (
        ServeOptions,
        check_insecure,
        opened_state,
        parse_address,
        run_service,
        start_run,
    )
    from weft.server.runfile import load_run_file

    host, port = parse_address(listen, "--listen", default_port=7443)
    http_host, http_port = ("", None) if http == "off" else parse_address(http, "--http", default_port=7444)
    options = ServeOptions(
        state=state,
        host=host,
        port=port,
        advertise=advertise,
        http_host=http_host,
        http_port=http_port,
        insecure=insecure,
        prints_token=not no_token,
    )
    check_insecure(options)
    loaded = [load_run_file(path) for path in run_files or []]
    names = [run_file.name for run_file in loaded]
    if len(set(names)) < len(names):
        raise UsageError("two run files have the same run.name", hint="give each run its own name")
    if not loaded and not (state / "ledger.db").exists():
        raise UsageError(
            f"no run file given, and {state} has no runs", hint="weft init run.toml, then weft serve run.toml"
        )
    with opened_state(options) as opened:
        for run_file in loaded:
            with console.status("preparing"):
                start_run(opened, run_file, state / "scratch", console.print)
        asyncio.run(run_service(opened, options, say=console.print))


def verify(
    ref: Annotated[
        str, typer.Argument(help="RUN, RUN/level.expert or RUN/path:0.0, with @VERSION or the newest.")
    ],
    *,
    state: Annotated[Path, typer.Option(help="The coordinator's state directory.")] = Path("weft-state"),
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Recompute a published version from the stored updates, byte for byte.

    Example: weft verify recipes@3 --state ./weft-state
    """
    from dataclasses import asdict

    from weft.common.ids import ModuleRef
    from weft.server.engine import EngineProcess
    from weft.server.verify import verify as verify_version

    if not (state / "ledger.db").exists():
        raise UsageError(f"{state} is no state directory", hint="name the coordinator's with --state")
    engine = EngineProcess()
    try:
        with console.status("recomputing"):
            found = verify_version(state, ModuleRef.parse(ref), engine)
    finally:
        engine.close()
    if as_json:
        console.print_json(json.dumps([asdict(item) for item in found]))
        return
    for item in found:
        console.print(
            f"{item.run}/{item.module}@{item.version}: recomputed from {item.num_updates} update(s) by {item.rule}"
        )
        console.print(f"  blake3 {item.digest}, equal to what was published and signed")
