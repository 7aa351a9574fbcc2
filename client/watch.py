"""What ``weft watch`` and the lists show: a :class:`Status` as tables for people and as JSON for scripts.

Everything here is a function of the status; the coordinator's clock is the only one (``taken_at``), so that a viewer
whose clock is wrong still sees right durations.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weft.common.protocol import (
    LossPoint,
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

_BARS: Final = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH: Final = 16
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")
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
    """The whole picture: runs, modules, workers."""
    uptime = duration(status.taken_at - status.started_at)
    title = Text.assemble(("weft ", "bold"), status.coordinator, (f" · up {uptime}", "dim"))
    modules = [module for run in status.runs for module in run.modules]
    return Group(
        title,
        runs_table(status.runs),
        modules_table(modules, taken_at=status.taken_at),
        workers_table(status.workers, taken_at=status.taken_at),
    )


def steps(before: Status | None, after: Status) -> list[str]:
    """What moved in the rounds between two pictures, a line for each module that did."""
    old = {
        (module.run_id, module.module): _step(module.round)
        for run in (before.runs if before else ())
        for module in run.modules
    }
    return [
        f"{run.run_id} {module.module} round {module.round.round_number} of {run.num_rounds}: {_said(module.round)}"
        for run in after.runs
        for module in run.modules
        if old.get((module.run_id, module.module)) != _step(module.round)
    ]


def _said(round_: RoundStatus) -> str:
    """State and reason; reasons of an end begin with it."""
    state = round_.state.name.lower().replace("_", " ")
    return round_.reason if round_.reason.startswith(state) else f"{state}: {round_.reason}"


def _step(round_: RoundStatus) -> tuple[int, RoundState, int]:
    return round_.round_number, round_.state, round_.num_updates


# ---- tables ------------------------------------------------------------------------------------------------------


def runs_table(runs: Sequence[RunStatus]) -> Table:
    """One line a run."""
    table = _table("run", "rounds", "rule", "codec", "up", "of bf16", "down", "eta", "what it waits for")
    for run in runs:
        done = min((_rounds_done(module.round) for module in run.modules), default=0)
        _add(
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


def modules_table(modules: Sequence[ModuleStatus], *, taken_at: float) -> Table:
    """One line a module, with its current or last round."""
    table = _table(
        "module", "version", "size", "round", "state", "for", "why", "training loss", "held-out loss"
    )
    for module in modules:
        round_ = module.round
        since = round_.ended_at if round_.ended_at is not None else round_.opened_at
        _add(
            table,
            f"{module.run_id}/{module.module}",
            f"@{module.version}",
            count(module.num_parameters),
            str(round_.round_number),
            _state(round_.state),
            "–" if since is None else duration(taken_at - since),
            round_.reason,
            curve(module.losses),
            curve(module.heldout_losses),
        )
    return table


def workers_table(workers: Sequence[WorkerStatus], *, taken_at: float) -> Table:
    """One line a worker, or viewer."""
    table = _table(
        "worker", "name", "state", "device", "tokens/s", "doing", "for", "loss", "updates", "up", "note"
    )
    for worker in workers:
        _add(
            table,
            worker.worker_id,
            worker.display_name,
            # Viewers and the operator have no work that they could be late with.
            _state(worker.state) if worker.role is Role.WORKER else Text(worker.role.value, style="dim"),
            worker.device,
            f"{worker.tokens_per_s:,.0f}" if worker.tokens_per_s else "–",
            doing(worker),
            "–" if worker.since is None else duration(taken_at - worker.since),
            "–" if worker.loss is None else f"{worker.loss:.3f}",
            str(worker.num_updates),
            size(worker.bytes_up),
            worker.note,
        )
    return table


def rounds_table(rounds: Sequence[RoundStatus]) -> Table:
    """One line a round."""
    table = _table("module", "round", "from", "state", "took", "updates", "bytes", "held-out loss", "why")
    for round_ in rounds:
        took = (
            None
            if round_.ended_at is None or round_.opened_at is None
            else round_.ended_at - round_.opened_at
        )
        _add(
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
    table = _table("token", "role", "expires in", "uses left", "approval", "runs", "label")
    for token in tokens:
        left = (
            "revoked"
            if token.revoked
            else "expired"
            if token.expires_at <= now
            else duration(token.expires_at - now)
        )
        _add(
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
            _add(table, Text(name.replace("_", " "), style="dim"), _field(name, item))
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


def curve(points: Sequence[LossPoint], width: int = _CURVE_WIDTH) -> str:
    """The last points as bars between their lowest and highest, then the last value; gaps where not finite."""
    values = [point.loss for point in points[-width:]]
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "–"
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    bars = "".join(
        _BARS[round((value - low) / span * (len(_BARS) - 1))] if math.isfinite(value) else " "
        for value in values
    )
    return f"{bars} {values[-1]:.3f}"


def size(num_bytes: int) -> str:
    """Bytes with a unit of 1000."""
    value = float(num_bytes)
    for unit in _UNITS:
        if value < 999.5 or unit == _UNITS[-1]:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
        value /= 1000
    raise AssertionError


def count(number: int) -> str:
    """A number of parameters."""
    for unit, whole in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= whole:
            return f"{number / whole:.1f}{unit}"
    return str(number)


def duration(seconds: float) -> str:
    """A duration in its largest unit or two."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 2 * 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} days"


# ---- for scripts -------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """JSON of a domain type: field names as they are, enums by lower-case name, times as Unix seconds."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, bytes):
        return value.hex()
    return value


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """Add a row as it is: names and reasons come from others and may look like rich's markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def _state(state: enum.Enum) -> Text:
    return Text(state.name.lower().replace("_", " "), style=_STYLES[state])


def _rounds_done(round_: RoundStatus) -> int:
    ended = round_.state in (RoundState.PUBLISHED, RoundState.ROLLED_BACK)
    return round_.round_number if ended else round_.round_number - 1
