"""Assignment: which task a worker gets, and why it gets none.

Pure: what is known of the run, its rounds and the leases goes in, an offer or a reason comes out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weft.common.ids import ModuleKey, Path, RunId, TaskId, WorkerId
from weft.common.modules import Topology
from weft.common.protocol import RoundState, Stage
from weft.server.rounds import InFlight, Round, RoundPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right of one worker to do one task."""

    task_id: TaskId
    run: RunId
    worker_id: WorkerId
    token: str
    """Opaque to the worker; names the lease in its calls."""
    epoch: int
    """Fencing epoch: grows with every lease that the coordinator grants."""
    path: Path
    rounds: tuple[tuple[ModuleKey, int], ...]
    """The modules that the task trains, with the round that each update counts in."""
    starts: tuple[tuple[ModuleKey, int], ...]
    """The path's modules with the version that each starts from."""
    num_steps: int
    granted_s: float
    """Monotonic clock."""
    expires_s: float
    """Monotonic clock; moved by every report, up to the idle time after the last real progress."""
    progress_s: float
    """Monotonic clock: when the work last moved."""
    stage: Stage = Stage.FETCHING
    num_done: int = 0
    num_total: int = 0
    stop_reason: str = ""
    """Set when the worker is to drop the task at its next report."""

    def trains(self, round_: Round) -> bool:
        """Whether an update of this lease would count in ``round_``."""
        return self.run == round_.run and (round_.module, round_.number) in self.rounds

    def in_flight(self, now_s: float) -> InFlight:
        """What the close rule wants to know."""
        done = {
            Stage.TRAINING: self.num_done / max(1, self.num_total),
            Stage.ENCODING: 0.98,
            Stage.SENDING: 0.99,
        }
        return InFlight(
            elapsed_s=now_s - self.granted_s,
            fraction_done=min(0.98, done[self.stage]) if self.stage in done else 0.0,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """What assignment needs of a run."""

    run: RunId
    topology: Topology
    policy: RoundPolicy
    rounds: Mapping[ModuleKey, Round]
    """The current round of every module; an ended one stands for a module that has had all its rounds."""

    @property
    def finished(self) -> bool:
        """Whether all modules have had their rounds."""
        return all(round_.number > self.policy.count for round_ in self.rounds.values())

    @property
    def fraction_done(self) -> float:
        """Share of all rounds that have ended."""
        return sum(round_.number - 1 for round_ in self.rounds.values()) / (
            self.policy.count * len(self.rounds)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A task to hand out."""

    run: RunId
    path: Path
    train: tuple[Round, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """No task now, and why."""

    reason: str
    finished: bool = False


def choose(worker_id: WorkerId, runs: Iterable[RunView], leases: Sequence[Lease]) -> Offer | Wait:
    """Choose a task for a worker that has none.

    The run that is furthest behind comes first, so that several runs on one coordinator share the workers.
    """
    ordered = sorted(
        runs, key=lambda view: (view.fraction_done, sum(lease.run == view.run for lease in leases), view.run)
    )
    if not ordered:
        return Wait("there is no run that this worker may see and can serve")
    reasons = []
    for view in ordered:
        offer = _from_run(worker_id, view, leases)
        if isinstance(offer, Offer):
            return offer
        reasons.append(offer.reason)
    finished = all(view.finished for view in ordered)
    return Wait("all runs are finished" if finished else "; ".join(dict.fromkeys(reasons)), finished=finished)


def _from_run(worker_id: WorkerId, view: RunView, leases: Sequence[Lease]) -> Offer | Wait:
    if view.finished:
        return Wait(f"{view.run} is finished")
    wanted = view.topology.levels_per_task or len(view.topology.experts)
    waits: list[str] = []
    for path in sorted(view.topology.paths, key=lambda path: (_in_flight(view, path, leases), path.experts)):
        rounds = [view.rounds[key] for key in path.modules]
        busy = [
            round_
            for round_ in rounds
            if round_.state is not RoundState.COLLECTING and round_.number <= view.policy.count
        ]
        if busy:
            waits.append(f"{view.run}: module {busy[0].module} is {busy[0].state.name.lower()}")
            continue
        open_ = [round_ for round_ in rounds if _wants(round_, worker_id, view.policy, leases)]
        if open_:
            open_.sort(
                key=lambda round_: (
                    len(round_.updates) + sum(lease.trains(round_) for lease in leases),
                    round_.module,
                )
            )
            train = tuple(sorted(open_[:wanted], key=lambda round_: round_.module))
            return Offer(run=view.run, path=path, train=train, reason=f"{view.run} path {path} wants updates")
        waits.append(
            f"{view.run}: its rounds have all the workers they ask for, or this one's update already"
        )
    return Wait(waits[0])


def _wants(round_: Round, worker_id: WorkerId, policy: RoundPolicy, leases: Sequence[Lease]) -> bool:
    if (
        round_.state is not RoundState.COLLECTING
        or round_.number > policy.count
        or worker_id in round_.contributors
    ):
        return False
    return len(round_.updates) + sum(lease.trains(round_) for lease in leases) < policy.target


def _in_flight(view: RunView, path: Path, leases: Sequence[Lease]) -> int:
    return sum(lease.run == view.run and lease.path == path for lease in leases)
