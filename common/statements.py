"""What workers sign: statements, as canonical JSON that is verified before it is read.

The exact bytes that were signed are what travels, is checked and is kept; nothing is serialised a second time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from weft.common.errors import UsageError
from weft.common.ids import ModuleKey, RunId, TaskId, WorkerId, digest

JOIN_TYPE: Final = "application/vnd.weft.join+json"
"""DSSE payload type of a JoinStatement."""
UPDATE_TYPE: Final = "application/vnd.weft.update+json"
"""DSSE payload type of an UpdateStatement."""
STATEMENT_BYTES_MAX: Final = 256 * 1024
_LOSS_MAX: Final = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinStatement:
    """What somebody who joins says of itself."""

    public_key: str
    """Ed25519, 64 hex digits."""
    nonce: str
    """Random, so that no two statements are the same."""
    display_name: str = ""
    """Free text, at most 80 characters."""
    device: str = ""
    """For people, at most 120 characters."""
    format: int = 1

    def __post_init__(self) -> None:
        digest(self.public_key)
        if len(self.display_name) > 80 or len(self.device) > 120 or len(self.nonce) > 128:
            raise UsageError("the join statement has a field that is too long")
        if not (self.display_name + self.device).isprintable():
            raise UsageError("the join statement has a character that cannot be printed")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateOfModule:
    """One module's part of an UpdateStatement."""

    module: str
    """level.expert"""
    start_version: int
    digest: str
    """BLAKE3-256 of the update file."""
    size_bytes: int

    def __post_init__(self) -> None:
        digest(self.digest)
        ModuleKey.parse(self.module)
        if self.size_bytes <= 0 or self.start_version < 0:
            raise UsageError("the update statement has a negative size or version")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStatement:
    """What a worker says when it hands in a task."""

    run: RunId
    task: TaskId
    worker: WorkerId
    epoch: int
    """Of the lease."""
    recipe: str
    """BLAKE3-256 of the recipe's payload."""
    updates: tuple[UpdateOfModule, ...]
    num_steps: int
    num_tokens: int
    loss_first: float
    """Mean loss of the first tenth of the steps, nats."""
    loss_last: float
    """Mean loss of the second half of the steps, nats."""
    format: int = 1

    def __post_init__(self) -> None:
        if self.format != 1:
            raise UsageError(
                f"update statement format {self.format} is not known here", hint="upgrade the coordinator"
            )
        if not all(
            math.isfinite(loss) and abs(loss) < _LOSS_MAX for loss in (self.loss_first, self.loss_last)
        ):
            raise UsageError("the update statement has a loss that is not finite")
        if self.num_steps < 1 or self.num_tokens < 0 or self.epoch < 1:
            raise UsageError("the update statement has a negative count")
