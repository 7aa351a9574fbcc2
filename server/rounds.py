"""Rounds: how a module's updates become its next version.

One round of one module takes version v to v + 1, or leaves it at v. The rule, in full::

    COLLECTING --accept--> COLLECTING     an update was made durable
    COLLECTING --close---> MERGING        close_reason() said why
    MERGING ----merged---> GATING         the merge process made a candidate
    MERGING ----failed---> ROLLED_BACK    it could not
    GATING -----passed---> PUBLISHED      the candidate is the next version
    GATING -----failed---> ROLLED_BACK    held-out data says it is worse
    MERGING, GATING --keep--> the same    asynchronous rounds only: the update counts in the next round

A module that several paths share takes updates of each of them; a round waits for the paths that are active.
Asynchronous rounds (FedBuff, arXiv 2106.06639) close at a number of updates, whatever versions these started from,
and count an update the less the staler it is.

Anything else raises IllegalTransition and changes nothing. All of it is pure: states are frozen, times are
arguments, and every decision comes with its reason, which is the log line, the status page and the test's
expectation at once.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

from weft.common.errors import UsageError
from weft.common.ids import Digest, ModuleKey, Path, RunId, TaskId, WorkerId
from weft.common.protocol import RoundState

TARGET_MAX: Final = 4096
"""Updates of a round: the manifest that names them all has to stay below its own bound of 4 MiB."""


class IllegalTransition(Exception):
    """The event does not belong to the round's state: a bug of the caller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPolicy:
    """When a round of a module closes, and how many there are."""

    count: int = 10
    """Rounds of each module."""
    quorum: int = 1
    """Updates without which a round does not close, of each path through the module."""
    target: int = 1
    """Updates that close a round at once, and the most that are asked for, of each path through the module."""
    paths_quorum: float = 1.0
    """Share of a module's active paths that must have their quorum; below 1 a round may leave slow paths behind."""
    straggler_factor: float = 0.5
    """With a quorum, wait for the others for this many times the median time that an update took."""
    backups: int = 0
    """Workers beyond the target that may do a path's task too when they have nothing else; the first in counts."""
    steps_by_speed: bool = False
    """A slower worker does fewer steps, in proportion to its measured speed (DyLU, arXiv 2401.09135)."""
    buffer: int = 0
    """Above 0, asynchronous: a round closes at this many updates, of whatever versions; workers never wait."""
    staleness_max: int = 8
    """Asynchronous: an update whose start is more versions behind than this is refused."""
    staleness_power: float = 0.5
    """Asynchronous: an update s versions behind counts (1 + s)^-staleness_power."""

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 1_000_000:
            raise UsageError(f"rounds.count is {self.count}", hint="use 1 to 1000000, for example 10")
        if not 1 <= self.quorum <= TARGET_MAX:
            raise UsageError(f"rounds.quorum is {self.quorum}", hint=f"use 1 to {TARGET_MAX}")
        if self.target > TARGET_MAX:
            raise UsageError(f"rounds.target is {self.target}", hint=f"use at most {TARGET_MAX}")
        if self.target < self.quorum:
            raise UsageError(
                f"rounds.target is {self.target} and rounds.quorum is {self.quorum}",
                hint=f"a round cannot close before its quorum: set rounds.target to {self.quorum} or more",
            )
        if not (math.isfinite(self.straggler_factor) and 0 <= self.straggler_factor <= 1000):
            raise UsageError(
                f"rounds.straggler_factor is {self.straggler_factor}", hint="use 0 to 1000, for example 0.5"
            )
        if not 0 < self.paths_quorum <= 1:
            raise UsageError(
                f"rounds.paths_quorum is {self.paths_quorum}",
                hint="use a share above 0, at most 1, for example 0.8",
            )
        if not 0 <= self.backups <= 64:
            raise UsageError(f"rounds.backups is {self.backups}", hint="use 0 to 64, for example 1")
        if not 0 <= self.buffer <= TARGET_MAX:
            raise UsageError(f"rounds.buffer is {self.buffer}", hint=f"use 0 (synchronous) to {TARGET_MAX}")
        if not 0 <= self.staleness_max <= 1_000_000:
            raise UsageError(
                f"rounds.staleness_max is {self.staleness_max}", hint="use 0 or more, for example 8"
            )
        if not (math.isfinite(self.staleness_power) and 0 <= self.staleness_power <= 10):
            raise UsageError(
                f"rounds.staleness_power is {self.staleness_power}", hint="use 0 to 10, for example 0.5"
            )

    @property
    def asynchronous(self) -> bool:
        """Whether rounds close by number alone and updates may be stale."""
        return self.buffer > 0

    def staleness_weight(self, staleness: int) -> float:
        """What an update counts that started ``staleness`` versions ago; 1 for a fresh one."""
        return float((1 + staleness) ** -self.staleness_power)


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """One durable update of one module."""

    worker_id: WorkerId
    task_id: TaskId
    epoch: int
    update_digest: Digest
    size_bytes: int
    weight: float
    """What it counts for: by its tokens, its path's data or equally, less when it is stale."""
    num_tokens: int
    """Tokens trained on, at most those that the task asked for."""
    num_steps: int
    norm: float
    """L2 norm of the decoded delta."""
    loss: float
    """Mean training loss of the task's second half, nats."""
    duration_s: float
    """From the lease to the receipt."""
    accepted_at: float
    """Unix seconds, for people."""
    experts: tuple[int, ...]
    """Of the path that was trained."""
    start_version: int
    """Of the module, that it started from."""
    rank: int = 0
    """LoRA rank of the slice that it holds; 0 for the module's own."""

    @property
    def path(self) -> Path:
        """The path that was trained."""
        return Path(self.experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What the merge process made of a round."""

    digest: Digest
    size_bytes: int
    sha256: str
    """Of the same bytes, for other programs that read the manifest."""
    outer_state: Digest | None = None
    """The outer optimiser's state after this round."""
    truncation_error: float | None = None
    """Relative Frobenius error of recompression to the rank; None when nothing was cut off."""
    clipped: tuple[str, ...] = ()
    """Workers whose update was scaled down to the norm bound."""

    @property
    def blobs(self) -> tuple[Digest, ...]:
        """The blobs that it consists of."""
        return (self.digest,) if self.outer_state is None else (self.digest, self.outer_state)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """What held-out data says of a candidate, and what follows."""

    passed: bool
    reason: str
    loss_before: float | None = None
    """Of the current version, nats per token or per example."""
    loss_after: float | None = None
    """Of the candidate."""
    difference: float = 0.0
    """Candidate − current, paired by sequence."""
    half_width: float | None = None
    """Half of the 95 % interval of the paired difference."""
    num_sequences: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One round of one module."""

    run: RunId
    module: ModuleKey
    number: int
    """Counts from 1."""
    base_version: int
    opened_at: float
    """Unix seconds, for people."""
    state: RoundState = RoundState.COLLECTING
    reason: str = "waiting for the first update"
    updates: tuple[Accepted, ...] = ()
    kept: tuple[Accepted, ...] = ()
    """Asynchronous: accepted after it closed, for the next round."""
    candidate: Candidate | None = None
    gate: GateResult | None = None
    ended_at: float | None = None

    @property
    def contributors(self) -> frozenset[WorkerId]:
        """Workers whose update is in."""
        return frozenset(update.worker_id for update in self.updates)


@dataclass(frozen=True, slots=True)
class Accept:
    """An update was made durable."""

    update: Accepted


@dataclass(frozen=True, slots=True)
class Keep:
    """An update was made durable while the round was closed already; the next one has it from the start."""

    update: Accepted


@dataclass(frozen=True, slots=True)
class Close:
    """The round takes no more updates."""

    reason: str


@dataclass(frozen=True, slots=True)
class Merged:
    """The merge process made a candidate."""

    candidate: Candidate


@dataclass(frozen=True, slots=True)
class MergeFailed:
    """The merge process could not make one."""

    reason: str


@dataclass(frozen=True, slots=True)
class Gated:
    """The gate decided."""

    result: GateResult


Event = Accept | Keep | Close | Merged | MergeFailed | Gated

TRANSITIONS: Final = {
    (RoundState.COLLECTING, Accept): RoundState.COLLECTING,
    (RoundState.COLLECTING, Close): RoundState.MERGING,
    (RoundState.MERGING, Merged): RoundState.GATING,
    (RoundState.MERGING, MergeFailed): RoundState.ROLLED_BACK,
    (RoundState.GATING, Gated): RoundState.PUBLISHED,  # or ROLLED_BACK when the gate did not pass
    (RoundState.MERGING, Keep): RoundState.MERGING,
    (RoundState.GATING, Keep): RoundState.GATING,
}
ENDED: Final = frozenset({RoundState.PUBLISHED, RoundState.ROLLED_BACK})


def advance(round_: Round, event: Event, now: float) -> Round:
    """The round after ``event`` at Unix time ``now``; raises IllegalTransition and leaves ``round_`` as it is."""
    state = TRANSITIONS.get((round_.state, type(event)))
    if state is None:
        raise IllegalTransition(f"{type(event).__name__} in state {round_.state.name}")
    match event:
        case Accept(update):
            updates = _with(round_, round_.updates, update)
            return dataclasses.replace(round_, updates=updates, reason=f"{len(updates)} update(s) in")
        case Keep(update):
            return dataclasses.replace(round_, kept=_with(round_, round_.kept, update))
        case Close(reason):
            return dataclasses.replace(round_, state=state, reason=reason)
        case Merged(candidate):
            return dataclasses.replace(
                round_, state=state, candidate=candidate, reason="evaluating the candidate"
            )
        case MergeFailed(reason):
            return dataclasses.replace(round_, state=state, reason=f"merge failed: {reason}", ended_at=now)
        case Gated(result):
            ended = state if result.passed else RoundState.ROLLED_BACK
            return dataclasses.replace(round_, state=ended, gate=result, reason=result.reason, ended_at=now)


def _with(round_: Round, updates: tuple[Accepted, ...], update: Accepted) -> tuple[Accepted, ...]:
    if update.task_id in {item.task_id for item in (*round_.updates, *round_.kept)}:
        raise IllegalTransition(f"{update.task_id} is in round {round_.number} already")
    # Sorted, so that the same accepted set gives the same bytes whatever order it arrived in.
    return tuple(sorted((*updates, update), key=lambda item: (item.worker_id, item.task_id)))


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A lease at work on a round, as far as its end can be told."""

    elapsed_s: float
    fraction_done: float
    """0 when it has not begun to train."""

    @property
    def remaining_s(self) -> float | None:
        """Expected time to the update at the pace so far; None when there is no pace yet."""
        if self.fraction_done <= 0:
            return None
        return self.elapsed_s * (1 - self.fraction_done) / self.fraction_done


def close_reason(
    round_: Round,
    policy: RoundPolicy,
    in_flight: Sequence[InFlight],
    *,
    paths: Collection[Path],
    since_last_s: float,
) -> str | None:
    """Say why ``round_`` should close now, or None to keep collecting.

    Args:
        round_: A round in COLLECTING.
        policy: Quorum, target and patience; or the buffer.
        in_flight: Leases at work on it.
        paths: Active paths through the module; others are not waited for.
        since_last_s: Time since the last update was accepted (monotonic clock).

    The patience adapts to the workers: ``straggler_factor`` × the median time of this round's updates. It ends
    early when the progress of all who are still at work says that they will not make it.
    """
    count = len(round_.updates)
    if policy.asynchronous:
        return f"buffer: {count} of {policy.buffer} updates" if count >= policy.buffer else None
    have = Counter(update.path for update in round_.updates)
    wanted = policy.target * len(paths)
    if count and all(have[path] >= policy.target for path in paths):
        return f"target: {count} of {wanted} updates" if paths else f"{count} updates, and no path is active"
    if not count or _num_ready(have, policy, paths) < _num_needed(policy, paths):
        return None
    grace_s = policy.straggler_factor * statistics.median(update.duration_s for update in round_.updates)
    left_s = grace_s - since_last_s
    if left_s <= 0:
        return f"quorum: {count} of {wanted} updates, and none came for {grace_s:.1f} s"
    remaining = [lease.remaining_s for lease in in_flight]
    if remaining and all(time_s is not None and time_s > left_s for time_s in remaining):
        soonest = min(time_s for time_s in remaining if time_s is not None)
        late = f"the next needs {soonest:.1f} s more, {left_s:.1f} s are left"
        return f"quorum: {count} of {wanted} updates; {late}"
    return None


def _num_ready(have: Counter[Path], policy: RoundPolicy, paths: Collection[Path]) -> int:
    return sum(have[path] >= policy.quorum for path in paths)


def _num_needed(policy: RoundPolicy, paths: Collection[Path]) -> int:
    """Paths that must have their quorum."""
    return math.ceil(policy.paths_quorum * len(paths) - 1e-9)


def waiting_reason(round_: Round, policy: RoundPolicy, num_in_flight: int, *, paths: Collection[Path]) -> str:
    """What a collecting round waits for, for people."""
    count = len(round_.updates)
    at_work = f"{num_in_flight} worker(s) at work" if num_in_flight else "no worker at work"
    if policy.asynchronous:
        return f"{count} of {policy.buffer} updates for the buffer; {at_work}"
    if not paths:
        return "no path through it is active"
    have = Counter(update.path for update in round_.updates)
    if len(paths) > 1:
        ready, needed = _num_ready(have, policy, paths), _num_needed(policy, paths)
        behind = [
            str(path) for path in sorted(paths, key=lambda path: path.experts) if have[path] < policy.target
        ]
        waits = f"; waits for path {', '.join(behind[:4])}{' …' if len(behind) > 4 else ''}" if behind else ""
        return f"{ready} of {needed} paths have their quorum{waits}; {at_work}"
    if count < policy.quorum:
        return f"{count} of {policy.quorum} updates for a quorum; {at_work}"
    return f"{count} of {policy.target} updates, quorum reached; {at_work}"


def next_round(previous: Round, now: float) -> Round:
    """The round that follows an ended one."""
    if previous.state not in ENDED:
        raise IllegalTransition(f"round {previous.number} has not ended")
    published = previous.state is RoundState.PUBLISHED
    return Round(
        run=previous.run,
        module=previous.module,
        number=previous.number + 1,
        base_version=previous.base_version + (1 if published else 0),
        opened_at=now,
        updates=previous.kept,
        reason=f"{len(previous.kept)} update(s) in" if previous.kept else "waiting for the first update",
    )
