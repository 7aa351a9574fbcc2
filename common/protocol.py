"""What the two sides say to each other, as domain types.

Each class has the name and the fields of its message in ``protos/weft/v1``, which is where units, ranges and the
meaning of absence are written. ``common.wire`` converts: digests are 32 bytes there and hex here, times are
Timestamps there and Unix seconds here.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from weft.common.identity.token import Role as Role
from weft.common.ids import Digest, RunId, TaskId, WorkerId
from weft.common.manifest import Signed as Signed

CHUNK_BYTES = 2 * 1024 * 1024
"""Size of all chunks of a blob but the last."""


class Stage(enum.Enum):
    """What a worker is doing."""

    FETCHING = 1
    LOADING = 2
    TRAINING = 3
    ENCODING = 4
    SENDING = 5


class Purpose(enum.Enum):
    """What a task is for."""

    TRAIN = 1
    EVALUATE = 2
    ROUTE = 3


class RoundState(enum.Enum):
    """Where a round is."""

    COLLECTING = 1
    MERGING = 2
    GATING = 3
    PUBLISHED = 4
    ROLLED_BACK = 5


class WorkerState(enum.Enum):
    """Where a worker is."""

    PENDING = 1
    IDLE = 2
    WORKING = 3
    LOST = 4
    REVOKED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobManifest:
    """What a blob consists of."""

    blake3: Digest
    size_bytes: int
    chunk_blake3: tuple[Digest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unable:
    """A run that a worker cannot serve, and why."""

    run_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a worker can train of a run."""

    run_id: str
    rank_max: int
    levels_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleStart:
    """The version of a module that a task starts from."""

    module: str
    version: int
    blake3: Digest
    size_bytes: int
    train: bool
    round_number: int
    steps_before: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobRef:
    """A blob to get."""

    blake3: Digest
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What a worker is asked to do."""

    task_id: TaskId
    run_id: RunId
    lease_token: str
    lease_epoch: int
    lease_s: float
    path: str
    modules: tuple[ModuleStart, ...]
    recipe_blake3: Digest
    num_steps: int
    update_bytes_max: int
    purpose: Purpose = Purpose.TRAIN
    router: BlobRef | None = None
    shard: BlobRef | None = None
    rank: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PollAnswer:
    """Either a task or a reason to wait (PollTaskResponse)."""

    task: Task | None
    wait_reason: str
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressAnswer:
    """What to do next (ReportProgressResponse)."""

    stop: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """ACCEPTED: the update is durable (SubmitUpdateResponse)."""

    receipt_blake3: Digest
    accepted_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LossPoint:
    """A loss after a step, nats."""

    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """The place on the roster (JoinResponse)."""

    worker_id: WorkerId
    approved: bool
    role: Role
    coordinator_public_key: bytes
    endorsement: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """An open session (OpenSessionResponse)."""

    session_token: str
    expires_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """Which chunks to send (FindMissingResponse)."""

    complete: bool
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModule:
    """The signed documents of a module or path (ResolveModuleResponse)."""

    recipe: Signed
    manifests: tuple[Signed, ...]
    coordinator_public_key: bytes
    endorsement: bytes
    router: BlobRef | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatus:
    """One join token, without its secret."""

    token_id: str
    role: Role
    expires_at: float
    num_uses_left: int
    needs_approval: bool
    runs: tuple[str, ...]
    label: str
    revoked: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundStatus:
    """One round of one module."""

    run_id: str
    module: str
    round_number: int
    base_version: int
    state: RoundState
    reason: str
    num_updates: int
    target: int
    quorum: int
    num_in_flight: int
    opened_at: float | None = None
    ended_at: float | None = None
    update_bytes: int = 0
    loss_before: float | None = None
    loss_after: float | None = None
    loss_interval: float | None = None
    contributors: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleStatus:
    """One module."""

    run_id: str
    module: str
    version: int
    num_parameters: int
    digest: str
    round: RoundStatus
    losses: tuple[LossPoint, ...] = ()
    heldout_losses: tuple[LossPoint, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PathStatus:
    """One path."""

    path: str
    state: str
    workers: tuple[str, ...]
    num_in: int
    validation_loss: float | None = None
    best_loss: float | None = None
    best_versions: tuple[int, ...] = ()
    num_sequences: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One run."""

    run_id: str
    num_rounds: int
    finished: bool
    reason: str
    base_digest: str
    rule: str
    codec: str
    modules: tuple[ModuleStatus, ...]
    bytes_up: int = 0
    bytes_down: int = 0
    bytes_up_bf16: int = 0
    eta_s: float | None = None
    paths: tuple[PathStatus, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker."""

    worker_id: str
    display_name: str
    state: WorkerState
    role: Role
    device: str
    tokens_per_s: float = 0.0
    run_id: str = ""
    task_id: str = ""
    stage: Stage | None = None
    num_done: int = 0
    num_total: int = 0
    since: float | None = None
    seen_at: float | None = None
    loss: float | None = None
    num_updates: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """Everything that ``weft watch`` shows."""

    coordinator: str
    started_at: float
    taken_at: float
    runs: tuple[RunStatus, ...]
    workers: tuple[WorkerStatus, ...]
