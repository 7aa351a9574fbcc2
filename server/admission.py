"""Admission: may this submission change anything?

Every refusal is its own error and changes nothing. The order matters: a repeat of an accepted submission is
answered before the lease is looked at, since the lease ends with the first acceptance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weft.common.errors import (
    ConflictingUpdate,
    ForgedUpdate,
    LeaseLost,
    PermissionRefused,
    RoundClosed,
    UpdateTooStale,
)
from weft.common.ids import Digest, ModuleKey, TaskId, WorkerId
from weft.common.protocol import Purpose, RoundState
from weft.common.statements import UpdateStatement
from weft.server.assignment import Lease
from weft.server.rounds import Round, RoundPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedStatement:
    """What is remembered of a submission that was accepted."""

    task_id: TaskId
    epoch: int
    worker_id: WorkerId
    statement_digest: Digest
    accepted_at: float


def repeat_of(
    statement_digest: Digest,
    task_id: TaskId,
    epoch: int,
    worker_id: WorkerId,
    accepted: Mapping[tuple[TaskId, int], AcceptedStatement],
) -> AcceptedStatement | None:
    """The first answer when this submission was accepted before; None when there was none for the task and epoch.

    Raises:
        ConflictingUpdate: Another payload was accepted for the same task and epoch.
        PermissionRefused: It is another worker's task.
    """
    first = accepted.get((task_id, epoch))
    if first is None:
        return None
    if first.worker_id != worker_id:
        raise PermissionRefused(f"task {task_id} belongs to another worker")
    if first.statement_digest != statement_digest:
        raise ConflictingUpdate(
            f"another update was accepted for task {task_id}, epoch {epoch}", hint="the first one counts"
        )
    return first


def check_lease(lease: Lease | None, worker_id: WorkerId, *, now_s: float) -> Lease:
    """The lease, if it is alive and the caller's; raises LeaseLost or PermissionRefused."""
    if lease is None:
        raise LeaseLost(
            "the lease is over: it expired, was given back or its round closed", hint="ask for another task"
        )
    if lease.worker_id != worker_id:
        raise PermissionRefused("the lease belongs to another worker")
    if now_s >= lease.expires_s:
        raise LeaseLost(f"the lease of task {lease.task_id} expired", hint="ask for another task")
    return lease


def check_statement(statement: UpdateStatement, lease: Lease, *, recipe_digest: str) -> None:
    """The signed statement must say exactly what was leased; raises ForgedUpdate naming the field."""
    expected = {
        "run": (statement.run, lease.run),
        "task": (statement.task, lease.task_id),
        "worker": (statement.worker, lease.worker_id),
        "epoch": (statement.epoch, lease.epoch),
        "recipe": (statement.recipe, recipe_digest),
        "modules": (
            tuple(update.module for update in statement.updates),
            tuple(str(module) for module, _ in lease.rounds),
        ),
        "start versions": (
            tuple(update.start_version for update in statement.updates),
            tuple(dict(lease.starts)[module] for module, _ in lease.rounds),
        ),
    }
    for field, (said, leased) in expected.items():
        if said != leased:
            raise ForgedUpdate(f"the statement's {field} is {said!r}, the lease says {leased!r}")
    if statement.validation_loss is not None and lease.purpose is not Purpose.EVALUATE:
        raise ForgedUpdate(f"the statement has not what a task to {lease.purpose.name.lower()} is to have")
    if statement.holdings and lease.purpose is not Purpose.ROUTE:
        raise ForgedUpdate("the statement says what its worker holds, and its task was another")


def check_rounds(lease: Lease, rounds: Mapping[ModuleKey, Round], policy: RoundPolicy) -> None:
    """The rounds that the lease trains must still take its updates.

    Raises:
        RoundClosed: A round is over, or has all that it wants of the path.
        UpdateTooStale: Asynchronous rounds, and the start is too many versions behind.
    """
    for module, number in lease.rounds:
        current = rounds[module]
        if policy.asynchronous:
            _check_staleness(lease, current, policy)
        elif current.number != number or current.state is not RoundState.COLLECTING:
            raise RoundClosed(
                f"round {number} of module {module} is closed; it is at round {current.number}",
                hint="ask for another task",
            )
        elif sum(update.path == lease.path for update in current.updates) >= policy.target:
            raise RoundClosed(
                f"round {number} of module {module} has the updates of path {lease.path} that it asked for",
                hint="another worker was faster; ask for another task",
            )


def staleness(lease: Lease, current: Round) -> int:
    """Versions that were published since the lease's start."""
    return current.base_version - dict(lease.starts)[current.module]


def _check_staleness(lease: Lease, current: Round, policy: RoundPolicy) -> None:
    if current.number > policy.count:
        raise RoundClosed(
            f"module {current.module} has had its {policy.count} rounds", hint="ask for another task"
        )
    if (behind := staleness(lease, current)) > policy.staleness_max:
        raise UpdateTooStale(
            f"the update of {current.module} started {behind} versions ago; at most {policy.staleness_max} are taken",
            hint="ask for another task; the operator may raise rounds.staleness_max or lower inner.steps",
        )


def tokens_of(num_tokens: int, *, tokens_asked: int) -> int:
    """The tokens that count: those trained on, at most what was asked for: a claim cannot buy more."""
    return min(max(num_tokens, 1), tokens_asked)
