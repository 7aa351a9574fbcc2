"""Assignment: which task a worker gets, and why it gets none.

Pure: what is known of the worker, the run, its rounds and the leases goes in, an offer or a reason comes out.

A worker whose documents have to be routed first gets that to do; then a path whose newest versions are to be
evaluated; then a path that wants an update. A path is free as soon as its own modules are: nothing waits for all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from weft.common.ids import ModuleKey, Path, RunId, TaskId, WorkerId
from weft.common.modules import Topology
from weft.common.protocol import Limit, Purpose, RoundState, Stage
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
    purpose: Purpose = Purpose.TRAIN
    path: Path
    """Of no meaning when documents are to be routed."""
    rounds: tuple[tuple[ModuleKey, int], ...]
    """The modules that the task trains, with the round that each update counts in."""
    starts: tuple[tuple[ModuleKey, int], ...]
    """The path's modules with the version that each starts from."""
    num_steps: int
    rank: int = 0
    """LoRA rank of the slices that it trains; 0 for the modules' own."""
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

    def is_for(self, run: RunId, path: Path, purpose: Purpose) -> bool:
        """Whether it is at work on a path of a run to this end."""
        return self.run == run and self.path == path and self.purpose is purpose

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
    active: frozenset[Path]
    """Paths that are trained: not stopped early, and somebody can serve them."""
    inactive: Mapping[Path, str] = field(default_factory=dict)
    """The others, each with the reason."""
    stopped: frozenset[Path] = frozenset()
    """Of these, the ones that were stopped early, for good."""
    due: tuple[Path, ...] = ()
    """Paths whose newest versions are to be evaluated."""
    evaluators: Mapping[Path, WorkerId] = field(default_factory=dict)
    """Who evaluates a path as long as it is here: losses on another's documents are another scale."""
    routes_locally: bool = False
    """Workers route their own documents and serve the paths that they have some for."""
    streams: bool = False
    """Fragments: what a task does not send goes on on the worker, so that nothing has to be published first."""

    @property
    def trained(self) -> bool:
        """Whether no module wants another round of a path that is active.

        While nobody can serve any path, the run waits; where some are served, it goes on without the others.
        """
        open_ = [module for module, round_ in self.rounds.items() if round_.number <= self.policy.count]
        if not self.active and not self.stopped.issuperset(self.topology.paths):
            return not open_
        return not any(self.active_through(module) for module in open_)

    @property
    def finished(self) -> bool:
        """Whether all modules have had their rounds, and the last versions were evaluated."""
        return self.trained and not self.due

    @property
    def fraction_done(self) -> float:
        """Share of all rounds that have ended."""
        return sum(round_.number - 1 for round_ in self.rounds.values()) / (
            self.policy.count * len(self.rounds)
        )

    def active_through(self, module: ModuleKey) -> tuple[Path, ...]:
        """Active paths that share a module."""
        return tuple(path for path in self.topology.paths_through(module) if path in self.active)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """What assignment needs of the worker that asks."""

    worker_id: WorkerId
    holds: Mapping[RunId, frozenset[Path]] = field(default_factory=dict)
    """Paths that it has documents for, of runs whose documents it has routed."""
    limits: Mapping[str, Limit] = field(default_factory=dict)
    """What it can train of a run, where that is not all."""
    recent: Mapping[RunId, Path] = field(default_factory=dict)
    """The path that it trained last, whose data and optimiser state are at hand."""
    gave_back: frozenset[tuple[RunId, Path, Purpose]] = frozenset()
    """What it gave back lately: others get it first, and it gets other things."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A task to hand out."""

    run: RunId
    path: Path
    train: tuple[Round, ...]
    reason: str
    purpose: Purpose = Purpose.TRAIN
    rank: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """No task now, and why."""

    reason: str
    finished: bool = False


def choose(asker: Asker, runs: Iterable[RunView], leases: Sequence[Lease]) -> Offer | Wait:
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
        offer = _from_run(asker, view, leases)
        if isinstance(offer, Offer):
            return offer
        reasons.append(offer.reason)
    finished = all(view.finished for view in ordered)
    return Wait("all runs are finished" if finished else "; ".join(dict.fromkeys(reasons)), finished=finished)


def _from_run(asker: Asker, view: RunView, leases: Sequence[Lease]) -> Offer | Wait:
    if view.finished:
        return Wait(f"{view.run} is finished")
    if view.routes_locally and view.run not in asker.holds:
        return Offer(
            run=view.run,
            path=view.topology.paths[0],
            train=(),
            reason=f"{view.run} wants to know how many documents each path would get",
            purpose=Purpose.ROUTE,
        )
    served = asker.holds[view.run] if view.routes_locally else frozenset(view.topology.paths)
    for path in view.due:
        if (
            path in served
            and view.evaluators.get(path, asker.worker_id) == asker.worker_id
            and (view.run, path, Purpose.EVALUATE) not in asker.gave_back
            and not any(lease.is_for(view.run, path, Purpose.EVALUATE) for lease in leases)
        ):
            reason = f"{view.run} path {path} has versions to evaluate"
            return Offer(run=view.run, path=path, train=(), reason=reason, purpose=Purpose.EVALUATE)
    return _training(asker, view, leases, served & view.active)


def _training(asker: Asker, view: RunView, leases: Sequence[Lease], paths: Collection[Path]) -> Offer | Wait:
    if not paths:
        return Wait(f"{view.run}: {_why_none(view)}")
    waits: list[str] = []
    # Backups only when no path wants a first worker.
    for spare in (0, view.policy.backups) if view.policy.backups else (0,):
        for path in sorted(paths, key=lambda path: _order(path, asker, view, leases)):
            train = _wanted(path, asker, view, leases, spare=spare)
            if isinstance(train, str):
                waits.append(train)
                continue
            limit = asker.limits.get(view.run)
            rank = limit.rank_max if limit and limit.rank_max < view.topology.lora.rank else 0
            reason = f"{view.run} path {path} wants updates"
            return Offer(run=view.run, path=path, train=train, reason=reason, rank=rank)
    return Wait(f"{view.run}: {waits[0]}")


def _why_none(view: RunView) -> str:
    if view.active:
        return "this worker has no documents for any path that is trained"
    reasons = dict.fromkeys(view.inactive.values())
    return f"no path is active ({'; '.join(list(reasons)[:3])})"


def _order(
    path: Path, asker: Asker, view: RunView, leases: Sequence[Lease]
) -> tuple[int, int, bool, tuple[int, ...]]:
    """Furthest behind first, then fewest at work on it, then what this worker knows already."""
    number = min(view.rounds[module].number for module in path.modules)
    at_work = sum(lease.is_for(view.run, path, Purpose.TRAIN) for lease in leases)
    return number, at_work, asker.recent.get(view.run) != path, path.experts


def _wanted(
    path: Path, asker: Asker, view: RunView, leases: Sequence[Lease], *, spare: int
) -> tuple[Round, ...] | str:
    """The rounds that a task of the path would train, or why there is none for this worker now."""
    if (view.run, path, Purpose.TRAIN) in asker.gave_back:
        return f"this worker gave path {path} back a moment ago"
    rounds = [view.rounds[key] for key in path.modules if view.rounds[key].number <= view.policy.count]
    if not rounds:
        return f"path {path} has had its rounds"
    if view.policy.asynchronous:
        at_work = sum(lease.is_for(view.run, path, Purpose.TRAIN) for lease in leases)
        if at_work >= view.policy.target + spare:
            return f"path {path} has all the workers that it asks for"
        return _subset(path, rounds, asker, view, leases)
    busy = [round_ for round_ in rounds if round_.state is not RoundState.COLLECTING]
    if busy and not view.streams:
        return f"module {busy[0].module} is {busy[0].state.name.lower()}"
    open_ = [round_ for round_ in rounds if _wants(round_, path, asker, view, leases, spare=spare)]
    partly = view.topology.levels_per_task or path_limit(asker, view)
    if not open_ or (len(open_) < len(rounds) and not partly):
        return "its rounds have all the workers they ask for, or this one's update already"
    return _subset(path, open_, asker, view, leases)


def _subset(
    path: Path, rounds: Sequence[Round], asker: Asker, view: RunView, leases: Sequence[Lease]
) -> tuple[Round, ...]:
    """As many of a path's rounds as one task trains, those first that are furthest behind."""
    limit = path_limit(asker, view) or len(path.modules)
    wanted = min(view.topology.levels_per_task or len(path.modules), limit)
    by_need = sorted(
        rounds,
        key=lambda round_: (
            round_.number,
            len(round_.updates) + sum(lease.trains(round_) for lease in leases),
            round_.module,
        ),
    )
    return tuple(sorted(by_need[:wanted], key=lambda round_: round_.module))


def path_limit(asker: Asker, view: RunView) -> int:
    """Most modules of a path that the worker can train at once; 0 for all."""
    limit = asker.limits.get(view.run)
    return limit.levels_max if limit else 0


def _wants(
    round_: Round, path: Path, asker: Asker, view: RunView, leases: Sequence[Lease], *, spare: int
) -> bool:
    if round_.state is not RoundState.COLLECTING:
        return False
    of_path = [update for update in round_.updates if update.path == path]
    if len(of_path) >= view.policy.target or any(item.worker_id == asker.worker_id for item in of_path):
        return False
    at_work = sum(lease.trains(round_) and lease.path == path for lease in leases)
    return len(of_path) + at_work < view.policy.target + spare


def steps_for(num_steps: int, *, speed: float, fastest: float) -> int:
    """DyLU: steps in proportion to a worker's speed, at least one (arXiv 2401.09135, section 4.2).

    Args:
        num_steps: H, of the fastest.
        speed: Of this worker, tokens per second; 0 when not known, which gives H.
        fastest: Of the fastest at work.
    """
    if speed <= 0 or fastest <= speed:
        return num_steps
    return max(1, int(num_steps * speed / fastest))
