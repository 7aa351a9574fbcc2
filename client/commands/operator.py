"""Commands of the operator: who is let in, who is shut out, join tokens."""

from __future__ import annotations

import time
from typing import Annotated

import click
import typer

from weft.client.commands.console import AsJson, Coordinator, Insecure, Token, look, show
from weft.common.cli import print_json
from weft.common.errors import UsageError
from weft.common.ids import run_id


def workers_approve(
    worker: Annotated[str, typer.Argument(help="The worker's id.")],
    *,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Let a worker in that waits for approval. Example: weft workers approve w-7k2f."""
    with look(coordinator, token, insecure=insecure) as (_, transport):
        transport.approve_worker(worker)
    typer.echo(f"✓ {worker} may work")


def workers_revoke(
    worker: Annotated[str, typer.Argument(help="The worker's id.")],
    *,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Shut a worker out at once; its accepted updates stay. Example: weft workers revoke w-7k2f."""
    with look(coordinator, token, insecure=insecure) as (_, transport):
        transport.revoke_worker(worker)
    typer.echo(f"✓ {worker} is shut out")


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

    with look(coordinator, token, insecure=insecure) as (access, transport):
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
    from weft.client.cells import plain
    from weft.client.watch import tokens_table

    with look(coordinator, token, insecure=insecure) as (_, transport):
        tokens = transport.list_tokens()
    show(tokens_table(tokens, now=time.time()), plain(tokens), as_json=as_json)


def token_revoke(
    token_id: Annotated[str, typer.Argument(help="The token's id: six characters.")],
    *,
    coordinator: Coordinator = None,
    token: Token = None,
    insecure: Insecure = False,
) -> None:
    """Take a token back; those who joined with it stay. Example: weft token revoke K3QZ7A."""
    with look(coordinator, token, insecure=insecure) as (_, transport):
        transport.revoke_token(token_id.upper())
    typer.echo(f"✓ token {token_id.upper()} admits nobody any more")


def parse_ttl(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``24h``, ``7d``; raises UsageError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
    number, unit = text[:-1], text[-1:]
    if unit not in units or not number.isascii() or not number.isdecimal() or int(number) == 0:
        raise UsageError(f"--ttl {text!r} is not a duration", hint="write 90s, 30m, 24h or 7d")
    return int(number) * units[unit]
