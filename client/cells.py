"""One cell of a table: amounts, durations and curves as people read them, and the table they go into."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, Final

from rich.table import Table
from rich.text import Text

from weft.common.protocol import LossPoint

_BARS: Final = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH: Final = 16
_UNITS: Final = ("B", "kB", "MB", "GB", "TB")


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


def loss(value: float | None) -> str:
    """A loss in nats, or that there is none."""
    return "–" if value is None else f"{value:.3f}"


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


def make_table(*columns: str) -> Table:
    """A table with a header and no lines."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def add_row(table: Table, *cells: str | Text) -> None:
    """Add a row as it is: names and reasons come from others and may look like rich's markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
