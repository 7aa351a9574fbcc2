"""Paths: how good each is on held-out data of its own, when that is to be measured, and when it has learnt enough.

Pure. A path's versions are those of its modules, by level. Losses are compared within one source only, since another
shard or another worker's documents are another scale: the best versions are those of the lowest loss (early stopping
of DiPaCo, arXiv 2403.10616, section 2.7).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from weft.common.errors import UsageError
from weft.common.ids import ModuleKey, Path, RunId, WorkerId
from weft.server.rounds import Round

EVALUATIONS_KEPT = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class PathPolicy:
    """Evaluation of each path on held-out data where that lies, and early stopping."""

    evaluate_every: int = 0
    """Evaluate a path each time its modules have moved by this many versions; 0 never."""
    early_stop: int = 0
    """Stop a path after this many evaluations without a better one; 0 never."""

    def __post_init__(self) -> None:
        if not 0 <= self.evaluate_every <= 1_000_000:
            raise UsageError(f"paths.evaluate_every is {self.evaluate_every}", hint="use 0 (never) or more")
        if not 0 <= self.early_stop <= 1_000_000:
            raise UsageError(f"paths.early_stop is {self.early_stop}", hint="use 0 (never) or more")
        if self.early_stop and not self.evaluate_every:
            raise UsageError(
                "paths.early_stop is set and nothing is evaluated", hint="set paths.evaluate_every = 1"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PathEvaluation:
    """One measurement of a path."""

    versions: tuple[int, ...]
    """Of its modules, by level."""
    loss: float
    """Nats per label."""
    num_labels: int
    source: str
    """Whose held-out data: a shard's digest, or the worker's id."""
    worker_id: WorkerId
    at: float
    """Unix seconds, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PathRecord:
    """What the ledger keeps of a path."""

    run: RunId
    experts: tuple[int, ...]
    evaluations: tuple[PathEvaluation, ...] = ()
    """In order; the newest few hundred."""
    best: PathEvaluation | None = None
    """Of the lowest loss within its source."""
    num_since_best: int = 0
    """Evaluations of the same source since, without a better one."""
    unmeasured: tuple[str, ...] = ()
    """Sources in which nothing is held out for it."""
    stopped: str = ""
    """Why it is not trained any more; empty while it is."""

    @property
    def path(self) -> Path:
        """The path."""
        return Path(self.experts)

    @property
    def newest(self) -> PathEvaluation | None:
        """The last measurement."""
        return self.evaluations[-1] if self.evaluations else None


def evaluated(record: PathRecord, evaluation: PathEvaluation, policy: PathPolicy) -> PathRecord:
    """The record after a measurement, stopped when it was one too many without a better one.

    What counts are the measurements of one source: of the one that has most, the newest of those where several have.
    """
    evaluations = (*record.evaluations, evaluation)[-EVALUATIONS_KEPT:]
    counts = Counter(item.source for item in evaluations)
    source = max(reversed(evaluations), key=lambda item: counts[item.source]).source
    same = [item for item in evaluations if item.source == source]
    best = min(same, key=lambda item: item.loss)
    num_since_best = len(same) - 1 - same.index(best)
    stopped = record.stopped
    if policy.early_stop and num_since_best >= policy.early_stop and evaluation.source == source:
        stopped = f"{num_since_best} evaluations without a loss below {best.loss:.4f}"
    return dataclasses.replace(
        record, evaluations=evaluations, best=best, num_since_best=num_since_best, stopped=stopped
    )


def not_measured(record: PathRecord, source: str) -> PathRecord:
    """The record once a source turned out to hold nothing out for the path."""
    return dataclasses.replace(record, unmeasured=tuple(sorted({*record.unmeasured, source})))


def is_due(
    record: PathRecord | None,
    path: Path,
    versions: Mapping[ModuleKey, int],
    policy: PathPolicy,
    *,
    trained: bool,
) -> bool:
    """Whether a path's newest versions are to be evaluated.

    Args:
        record: What is known of the path; None when nothing is.
        path: The path.
        versions: The newest version of every module.
        policy: How often.
        trained: The path gets no more updates, so that its last versions are what will be used.
    """
    if not policy.evaluate_every or (record is not None and record.stopped):
        return False
    current = tuple(versions[module] for module in path.modules)
    newest = record.newest if record is not None else None
    if newest is None:
        return True
    if newest.versions == current:
        return False
    return trained or min(current) >= min(newest.versions) + policy.evaluate_every


def has_ended(path: Path, rounds: Mapping[ModuleKey, Round], count: int) -> bool:
    """Whether all modules of a path have had their rounds."""
    return all(rounds[module].number > count for module in path.modules)
