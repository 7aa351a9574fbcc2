"""What ``weft watch`` and the lists show: a :class:`Status` as tables for people and as JSON for scripts.

Everything here is a function of the status; the coordinator's clock is the only one (``taken_at``), so that a viewer
whose clock is wrong still sees right durations.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weft.client.cells import add_row, count, curve, duration, loss, make_table, plain, size
from weft.client.pathgrid import num_paths_through, path_steps, render_paths
from weft.common.protocol import (
    ModuleStatus,
    Role,
    RoundState,
    RoundStatus,
    RunStatus,
    Stage,
    Status,
    TokenStatus,
    WorkerState,
    WorkerStatus,
)

MODULES_DRAWN_MAX: Final = 24
"""Modules that the live picture shows."""
_BYTE_STAGES: Final = frozenset({Stage.FETCHING, Stage.SENDING})
_STYLES: Final[Mapping[enum.Enum, str]] = {
    RoundState.COLLECTING: "cyan",
    RoundState.MERGING: "yellow",
    RoundState.GATING: "yellow",
    RoundState.PUBLISHED: "green",
    RoundState.ROLLED_BACK: "red",
    WorkerState.PENDING: "yellow",
    WorkerState.IDLE: "",
    WorkerState.WORKING: "green",
    WorkerState.LOST: "red",
    WorkerState.REVOKED: "red",
}


def render(status: Status) -> RenderableType:
    """The whole picture: runs, modules, paths, workers."""
    uptime = duration(status.taken_at - status.started_at)
    title = Text.assemble(("weft ", "bold"), status.coordinator, (f" · up {uptime}", "dim"))
    return Group(
        title,
        runs_table(status.runs),
        modules_table(status.runs, taken_at=status.taken_at, rows_max=MODULES_DRAWN_MAX),
        *(render_paths(run, status.workers) for run in status.runs if run.paths),
        workers_table(status.workers, taken_at=status.taken_at),
    )


def steps(before: Status | None, after: Status) -> list[str]:
    """What moved between two pictures: a line for each module whose round did, then for each path."""
    runs = {run.run_id: run for run in (before.runs if before else ())}
    old = {
        (module.run_id, module.module): _step(module.round) for run in runs.values() for module in run.modules
    }
    moved = [
        f"{run.run_id} {module.module} round {module.round.round_number} of {run.num_rounds}: {_said(module.round)}"
        for run in after.runs
        for module in run.modules
        if old.get((module.run_id, module.module)) != _step(module.round)
    ]
    return moved + [line for run in after.runs for line in path_steps(runs.get(run.run_id), run)]


def _said(round_: RoundStatus) -> str:
    """State and reason; reasons of an end begin with it."""
    state = round_.state.name.lower().replace("_", " ")
    return round_.reason if round_.reason.startswith(state) else f"{state}: {round_.reason}"


def _step(round_: RoundStatus) -> tuple[int, RoundState, int]:
    return round_.round_number, round_.state, round_.num_updates


# ---- tables ------------------------------------------------------------------------------------------------------


def runs_table(runs: Sequence[RunStatus]) -> Table:
    """One line a run."""
    table = make_table("run", "rounds", "rule", "codec", "up", "of bf16", "down", "eta", "what it waits for")
    for run in runs:
        done = min((_rounds_done(module.round) for module in run.modules), default=0)
        add_row(
            table,
            run.run_id,
            f"{done}/{run.num_rounds}",
            run.rule,
            run.codec,
            size(run.bytes_up),
            f"{100 * run.bytes_up / run.bytes_up_bf16:.0f} %" if run.bytes_up_bf16 else "–",
            size(run.bytes_down),
            "–" if run.finished or run.eta_s is None else duration(run.eta_s),
            Text(run.reason, style="green" if run.finished else ""),
        )
    return table


def modules_table(
    runs: Sequence[RunStatus], *, taken_at: float, rows_max: int | None = None
) -> RenderableType:
    """One line a module, with its current or last round.

    Args:
        runs: Whose modules.
        taken_at: The coordinator's clock, Unix seconds.
        rows_max: Show no more than these, the ones that are furthest behind first, and say how many are left out.
    """
    table = make_table(
        "module", "version", "size", "paths", "round", "state", "for", "why", "training loss", "held-out loss"
    )
    rows = [(module, num_paths_through(run)) for run in runs for module in run.modules]
    if rows_max is None or len(rows) <= rows_max:
        shown = rows
    else:
        shown = sorted(rows, key=lambda row: row[0].version)[:rows_max]
    for module, through in shown:
        _add_module(table, module, num_paths=through.get(module.module, 0), taken_at=taken_at)
    left = len(rows) - len(shown)
    return (
        Group(table, Text(f"… and {left} modules that are further: weft modules list", "dim"))
        if left
        else table
    )


def _add_module(table: Table, module: ModuleStatus, *, num_paths: int, taken_at: float) -> None:
    round_ = module.round
    since = round_.ended_at if round_.ended_at is not None else round_.opened_at
    add_row(
        table,
        f"{module.run_id}/{module.module}",
        f"@{module.version}",
        count(module.num_parameters),
        str(num_paths),
        str(round_.round_number),
        _state(round_.state),
        "–" if since is None else duration(taken_at - since),
        round_.reason,
        curve(module.losses),
        curve(module.heldout_losses),
    )


def workers_table(workers: Sequence[WorkerStatus], *, taken_at: float) -> Table:
    """One line a worker, or viewer."""
    table = make_table(
        "worker", "name", "state", "device", "tokens/s", "doing", "for", "loss", "updates", "up", "note"
    )
    for worker in workers:
        add_row(
            table,
            worker.worker_id,
            worker.display_name,
            # Viewers and the operator have no work that they could be late with.
            _state(worker.state) if worker.role is Role.WORKER else Text(worker.role.value, style="dim"),
            worker.device,
            f"{worker.tokens_per_s:,.0f}" if worker.tokens_per_s else "–",
            doing(worker),
            "–" if worker.since is None else duration(taken_at - worker.since),
            loss(worker.loss),
            str(worker.num_updates),
            size(worker.bytes_up),
            worker.note,
        )
    return table


def rounds_table(rounds: Sequence[RoundStatus]) -> Table:
    """One line a round."""
    table = make_table("module", "round", "from", "state", "took", "updates", "bytes", "held-out loss", "why")
    for round_ in rounds:
        took = (
            None
            if round_.ended_at is None or round_.opened_at is None
            else round_.ended_at - round_.opened_at
        )
        add_row(
            table,
            f"{round_.run_id}/{round_.module}",
            str(round_.round_number),
            f"@{round_.base_version}",
            _state(round_.state),
            "–" if took is None else duration(took),
            f"{round_.num_updates}/{round_.target}",
            size(round_.update_bytes),
            heldout(round_),
            round_.reason,
        )
    return table


def tokens_table(tokens: Sequence[TokenStatus], *, now: float) -> Table:
    """One line a join token."""
    table = make_table("token", "role", "expires in", "uses left", "approval", "runs", "label")
    for token in tokens:
        left = (
            "revoked"
            if token.revoked
            else "expired"
            if token.expires_at <= now
            else duration(token.expires_at - now)
        )
        add_row(
            table,
            token.token_id,
            token.role.value,
            left,
            str(token.num_uses_left),
            "needed" if token.needs_approval else "–",
            ", ".join(token.runs) or "all",
            token.label,
        )
    return table


def fields_table(value: Any) -> Table:
    """A dataclass, one line a field that holds something; times in UTC."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, item in plain(value).items():
        if item not in (None, "", [], 0, 0.0):
            add_row(table, Text(name.replace("_", " "), style="dim"), _field(name, item))
    return table


def _field(name: str, item: Any) -> str:
    if name.endswith("_at") or name == "since":
        return f"{datetime.fromtimestamp(item, UTC):%Y-%m-%d %H:%M:%S} UTC"
    return ", ".join(map(str, item)) if isinstance(item, list) else str(item)


# ---- one cell ----------------------------------------------------------------------------------------------------


def doing(worker: WorkerStatus) -> str:
    """What a worker does, and how far it is."""
    if worker.stage is None:
        return "–"
    stage = worker.stage.name.lower()
    if not worker.num_total:
        return f"{stage} {worker.run_id}"
    show = size if worker.stage in _BYTE_STAGES else str
    return f"{stage} {worker.run_id} {show(worker.num_done)}/{show(worker.num_total)}"


def heldout(round_: RoundStatus) -> str:
    """Held-out loss before and after, and the half width of the difference's interval."""
    if round_.loss_before is None or round_.loss_after is None:
        return "–"
    interval = f" ± {round_.loss_interval:.4f}" if round_.loss_interval is not None else ""
    return f"{round_.loss_before:.4f} → {round_.loss_after:.4f}{interval}"


def _state(state: enum.Enum) -> Text:
    return Text(state.name.lower().replace("_", " "), style=_STYLES[state])


def _rounds_done(round_: RoundStatus) -> int:
    ended = round_.state in (RoundState.PUBLISHED, RoundState.ROLLED_BACK)
    return round_.round_number if ended else round_.round_number - 1
