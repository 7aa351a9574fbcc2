"""What is known of workers only while this process lives, and the limits that apply to them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from weft.common.ids import Path, RunId
from weft.common.protocol import Limit, LossPoint, Purpose

LEASE_S: Final = 15.0
"""Silence after which a lease is lost; a worker reports several times within it."""
PRESENT_S: Final = 60.0
"""Silence after which nobody waits for the paths that only this worker has data for; polls are held for less."""
GAVE_BACK_S: Final = 30.0
"""A task that a worker gave back is not handed to it again for this long."""
REJECTIONS_MAX: Final = 3
"""Updates of one worker that may fail the gate in one run before it gets no more of its tasks."""
UPLOADS_PER_MODULE: Final = 4
"""Different files that one lease may upload for a module: a worker that starts again may train other bytes."""
LOSSES_KEPT: Final = 500


@dataclass(slots=True, kw_only=True)
class Live:
    """What is known of somebody only while this process lives."""

    seen_s: float
    seen_at: float
    tokens_per_s: float = 0.0
    since: float = 0.0
    unable: dict[str, str] = field(default_factory=dict)
    rejections: dict[RunId, int] = field(default_factory=dict)
    limits: dict[str, Limit] = field(default_factory=dict)
    recent: dict[RunId, Path] = field(default_factory=dict)
    """The path of each run that it trained last."""
    gave_back: dict[tuple[RunId, Path, Purpose], float] = field(default_factory=dict)
    """What it gave back, and when (monotonic clock)."""
    losses: list[LossPoint] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
