"""What workers sign: statements, as canonical JSON that is verified before it is read.

The exact bytes that were signed are what travels, is checked and is kept; nothing is serialised a second time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from weft.common.errors import UsageError
from weft.common.ids import ModuleKey, Path, RunId, TaskId, WorkerId, digest

JOIN_TYPE: Final = "application/vnd.weft.join+json"
"""DSSE payload type of a JoinStatement."""
UPDATE_TYPE: Final = "application/vnd.weft.update+json"
"""DSSE payload type of an UpdateStatement."""
STATEMENT_BYTES_MAX: Final = 1024 * 1024
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
class Holding:
    """How much a worker holds for a path: counts are all that leaves it."""

    path: str
    num_documents: int
    num_sequences: int
    """Training sequences that they make."""

    def __post_init__(self) -> None:
        Path.parse(self.path)
        if min(self.num_documents, self.num_sequences) < 0:
            raise UsageError("the update statement has a negative count")


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStatement:
    """What a worker says when it hands in a task: of training, of an evaluation or of routing its documents."""

    run: RunId
    task: TaskId
    worker: WorkerId
    epoch: int
    """Of the lease."""
    recipe: str
    """BLAKE3-256 of the recipe's payload."""
    updates: tuple[UpdateOfModule, ...] = ()
    """Empty unless the task was to train."""
    num_steps: int = 0
    num_tokens: int = 0
    loss_first: float = 0.0
    """Mean loss of the first tenth of the steps, nats."""
    loss_last: float = 0.0
    """Mean loss of the second half of the steps, nats."""
    validation_loss: float | None = None
    """Of an evaluation: nats per label on the held-out part of the worker's data for the path."""
    validation_labels: int = 0
    """Labels that it is the mean of."""
    holdings: tuple[Holding, ...] = ()
    """Of routing: what each path got, paths without a document left out."""
    format: int = 1

    def __post_init__(self) -> None:
        if self.format != 1:
            raise UsageError(
                f"update statement format {self.format} is not known here", hint="upgrade the coordinator"
            )
        losses = (self.loss_first, self.loss_last, self.validation_loss or 0.0)
        if not all(math.isfinite(loss) and abs(loss) < _LOSS_MAX for loss in losses):
            raise UsageError("the update statement has a loss that is not finite")
        if min(self.num_steps, self.num_tokens, self.validation_labels) < 0 or self.epoch < 1:
            raise UsageError("the update statement has a negative count")
        if bool(self.updates) != bool(self.num_steps):
            raise UsageError("the update statement has steps without updates, or updates without steps")
        if len({holding.path for holding in self.holdings}) < len(self.holdings):
            raise UsageError("the update statement names a path twice")
