"""Jobs: what the engine is asked to do for a round. Pure: the same round always gives the same job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weft.common.blobs import BlobStore
from weft.common.settings import to_table
from weft.server.rounds import Round
from weft.server.run import Run


def merge_job(run: Run, round_: Round, blobs: BlobStore, scratch: Path) -> dict[str, Any]:
    """The engine's job that merges a round's updates into a candidate, written below ``scratch``."""
    start = run.at(round_.module, round_.base_version)
    name = f"{run.record.run}-{round_.module}-{round_.number}"
    return {
        "job": "merge",
        "schema": to_table(run.record.schemas[str(round_.module)]),
        "topology": to_table(run.recipe.topology),
        "start": str(blobs.path(start.digest)),
        "outer_state": str(blobs.path(start.outer_state)) if start.outer_state else None,
        "updates": [
            {
                "path": str(blobs.path(update.update_digest)),
                "worker_id": update.worker_id,
                "task_id": update.task_id,
                "weight": update.weight,
                "rank": update.rank,
                "norm": update.norm,
            }
            for update in round_.updates
        ],
        "num_paths": len({update.experts for update in round_.updates}),
        "merge": to_table(run.run_file.merging),
        "flower": to_table(run.run_file.flower),
        "outer": to_table(run.run_file.outer),
        "candidate": str(scratch / f"{name}.module"),
        "outer_state_to": str(scratch / f"{name}.outer"),
    }


def gate_job(run: Run, round_: Round, blobs: BlobStore) -> dict[str, Any]:
    """The engine's job that evaluates a round's candidate against the current version, on the paths that have it.

    Held-out documents are judged on the path that the router sends them to; without a router there is one path.
    """
    assert round_.candidate is not None  # noqa: S101 - the table says so
    paths = run.recipe.topology.paths_through(round_.module)
    modules = {module for path in paths for module in path.modules}
    return {
        "job": "gate",
        "base": run.record.base_directory,
        "recipe": to_table(run.recipe),
        "paths": [str(path) for path in paths],
        "router": str(blobs.path(run.router.blake3)) if run.router else None,
        "module": str(round_.module),
        "schemas": {str(module): to_table(run.record.schemas[str(module)]) for module in sorted(modules)},
        "files": {str(module): str(blobs.path(run.newest(module).digest)) for module in sorted(modules)},
        "candidate": str(blobs.path(round_.candidate.digest)),
        "heldout": run.run_file.gate.heldout,
        "num_sequences_max": run.run_file.gate.num_sequences_max,
    }
