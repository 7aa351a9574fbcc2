"""Starting: a run that is new, or that the ledger has already with settings which may go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.common.blobs import digest_of
from weft.common.errors import RunFileError
from weft.common.ids import Digest, ModuleKey
from weft.common.manifest import Signed, canonical_json
from weft.common.recipe import RECIPE_TYPE, BasePin
from weft.common.settings import from_table, to_table
from weft.server.records import RunRecord, TensorRecord, Traffic
from weft.server.rounds import Round
from weft.server.run import Run
from weft.server.runfile import RunFile, dump_run_file
from weft.server.state import State
from weft.server.versions import first_version


def check_same(state: State, run_file: RunFile) -> bool:
    """Whether this run exists already with the same settings; what only the coordinator needs may differ.

    Raises:
        RunFileError: It exists with other settings that workers follow.
    """
    run = state.runs.get(run_file.name)
    if run is None:
        return False
    same = dataclasses.replace(run.run_file, rounds=run_file.rounds, gate=run_file.gate) == run_file
    if not same or run_file.rounds.count != run.run_file.rounds.count:
        changed = _changed(to_table(run.run_file), to_table(run_file))
        raise RunFileError(
            f"run {run_file.name} exists with other settings: {', '.join(changed)}",
            hint="give the new run another run.name, or put the old values back",
        )
    with state.lock:
        record = dataclasses.replace(run.record, run_file=dump_run_file(run_file))
        with state.transaction():
            state.ledger.put("run", record.run, record, run=record.run)
        run.record, run.run_file = record, run_file
    return True


def add_run(
    state: State, run_file: RunFile, base: BasePin, base_directory: Path, prepared: Mapping[str, Any]
) -> None:
    """Sign the recipe, publish version 0 of every module, open the first rounds: all of it or nothing.

    Args:
        state: Where the run is to be.
        run_file: What the operator asked for.
        base: The pinned base.
        base_directory: Where its files lie; they are served from there.
        prepared: The engine's answer to a ``prepare`` job: schemas and files of version 0, by module.
    """
    now = state.clock.now()
    recipe = run_file.recipe(base)
    payload = canonical_json(to_table(recipe))
    signed = Signed.sign(state.identity.signing_key, RECIPE_TYPE, payload)
    record = RunRecord(
        run=run_file.name,
        run_file=dump_run_file(run_file),
        base_directory=str(base_directory),
        recipe_digest=digest_of(payload),
        schemas={
            key: tuple(from_table(TensorRecord, item) for item in schema)
            for key, schema in prepared["schemas"].items()
        },
        created_at=now,
    )
    run = state.open_run(record, signed, Traffic())
    with state.lock, state.transaction():
        for module in recipe.topology.modules:
            _open_module(state, run, module, Path(prepared["files"][str(module)]), now=now)
        for file in base.files:
            state.own(Digest(file.digest), "base", record.run)
        state.ledger.put("run", record.run, record, run=record.run)
        state.ledger.put_document("recipe", record.run, signed, run=record.run)
        state.log(record.run, f"run started over base {base.digest[:12]}")
    state.runs[record.run] = run


def _open_module(state: State, run: Run, module: ModuleKey, start: Path, *, now: float) -> None:
    blob = state.blobs.add_file(start, move=True)
    content = state.content_of(blob.blake3, size_bytes=blob.size_bytes)
    version, document = first_version(run, module, content, state.identity.signing_key, now=now)
    run.versions[module] = [version]
    run.rounds[module] = [Round(run=run.record.run, module=module, number=1, base_version=0, opened_at=now)]
    state.write_version(version, document)
    state.write_round(run.rounds[module][0])


def _changed(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ."""
    changed = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += _changed(before, after, f"{prefix}{key}.")
        elif before != after:
            changed.append(f"{prefix}{key}")
    return changed
