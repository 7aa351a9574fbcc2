"""Admission: may this submission change anything?

Every refusal is its own error and changes nothing. The order matters: a repeat of an accepted submission is
answered before the lease is looked at, since the lease ends with the first acceptance.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weft.common.errors import ConflictingUpdate, ForgedUpdate, LeaseLost, PermissionRefused, RoundClosed
from weft.common.ids import Digest, ModuleKey, TaskId, WorkerId
from weft.common.protocol import RoundState
from weft.common.statements import UpdateStatement
from weft.server.assignment import Lease
from weft.server.rounds import Round


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


def check_rounds(lease: Lease, rounds: Mapping[ModuleKey, Round]) -> None:
    """All rounds that the lease trains must still collect; raises RoundClosed."""
    for module, number in lease.rounds:
        current = rounds[module]
        if current.number != number or current.state is not RoundState.COLLECTING:
            raise RoundClosed(
                f"round {number} of module {module} is closed; it is at round {current.number}",
                hint="ask for another task",
            )


def weight_of(num_tokens: int, *, tokens_asked: int) -> float:
    """The weight of an update: tokens trained on, at most what was asked for: a claim cannot buy more."""
    return float(min(max(num_tokens, 1), tokens_asked))
