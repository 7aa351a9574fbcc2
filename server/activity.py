"""Activity: which paths of a run are trained now, and why the others are not. Reads a run, changes nothing."""

from __future__ import annotations

from collections.abc import Callable

from weft.common.ids import Path, WorkerId
from weft.common.recipe import RoutingMode
from weft.server.assignment import RunView
from weft.server.paths import has_ended, is_due
from weft.server.run import Run

Present = Callable[[WorkerId], bool]
"""Whether a worker has been heard of lately."""


def run_view(run: Run, present: Present) -> RunView:
    """What assignment, closing and the status need of a run."""
    rounds = {module: rounds_[-1] for module, rounds_ in run.rounds.items()}
    inactive, stopped = (
        _inactive(run, present),
        frozenset(path for path, record in run.paths.items() if record.stopped),
    )
    return RunView(
        run=run.record.run,
        topology=run.recipe.topology,
        policy=run.run_file.rounds,
        rounds=rounds,
        active=frozenset(run.recipe.topology.paths) - inactive.keys(),
        inactive=inactive,
        stopped=stopped,
        due=_due(run, inactive, present),
        evaluators=_evaluators(run, present),
        routes_locally=run.recipe.routing.mode is RoutingMode.LOCAL,
        streams=run.recipe.streaming is not None,
    )


def _inactive(run: Run, present: Present) -> dict[Path, str]:
    """Paths that are not trained now, each with the reason."""
    reasons = {}
    mode = run.recipe.routing.mode
    served = _served(run, present) if mode is RoutingMode.LOCAL else frozenset()
    for path in run.recipe.topology.paths:
        record = run.paths.get(path)
        if record is not None and record.stopped:
            reasons[path] = f"stopped early: {record.stopped}"
        elif mode is RoutingMode.LOCAL and path not in served:
            reasons[path] = (
                "no worker that is here has documents for it: let one with such data join, or fit the router again"
            )
        elif mode is RoutingMode.GIVEN and (missing := run.shard_missing(path)):
            reasons[path] = missing
    return reasons


def _served(run: Run, present: Present) -> frozenset[Path]:
    return frozenset(path for worker_id, paths in run.holds.items() if present(worker_id) for path in paths)


def _due(run: Run, inactive: dict[Path, str], present: Present) -> tuple[Path, ...]:
    policy = run.run_file.paths
    if not policy.evaluate_every:
        return ()
    versions = {module: versions_[-1].version for module, versions_ in run.versions.items()}
    rounds = {module: rounds_[-1] for module, rounds_ in run.rounds.items()}
    count = run.run_file.rounds.count
    return tuple(
        path
        for path in run.recipe.topology.paths
        if path not in inactive
        and _can_be_measured(run, path, present)
        and is_due(run.paths.get(path), path, versions, policy, trained=has_ended(path, rounds, count))
    )


def _evaluators(run: Run, present: Present) -> dict[Path, WorkerId]:
    """Local data: who evaluated a path before, and is still here with documents for it."""
    if run.recipe.routing.mode is not RoutingMode.LOCAL:
        return {}
    return {
        path: record.best.worker_id
        for path, record in run.paths.items()
        if record.best is not None
        and present(record.best.worker_id)
        and path in run.holds.get(record.best.worker_id, frozenset())
    }


def _can_be_measured(run: Run, path: Path, present: Present) -> bool:
    """Whether somebody may have something held out for a path."""
    record = run.paths.get(path)
    if record is None or not record.unmeasured:
        return True
    if (shard := run.shard(path)) is not None:
        return shard.blake3 not in record.unmeasured
    if run.recipe.routing.mode is not RoutingMode.LOCAL:
        return False
    holders = {worker_id for worker_id, paths in run.holds.items() if path in paths and present(worker_id)}
    return bool(holders.difference(record.unmeasured))
