"""Starting: a run that is new, or that the ledger has already with settings which may go on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.common.blobs import digest_of
from weft.common.errors import InputError, RouterMismatch, RunFileError
from weft.common.ids import Digest, ModuleKey
from weft.common.manifest import Signed, canonical_json
from weft.common.protocol import Purpose
from weft.common.recipe import RECIPE_TYPE, BasePin, Recipe, RoutingMode
from weft.common.routing import Shard, check_router, read_router, read_shards
from weft.common.settings import from_table, to_table
from weft.server.records import RoutingRecord, RunRecord, ShardRecord, TensorRecord, Traffic
from weft.server.rounds import Round
from weft.server.run import ContentOf, Run
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
    section = dataclasses.replace(
        run.run_file.routing, router=run_file.routing.router, shards=run_file.routing.shards
    )
    may_differ = dataclasses.replace(
        run.run_file, rounds=run_file.rounds, gate=run_file.gate, paths=run_file.paths, routing=section
    )
    if may_differ != run_file or run_file.rounds.count != run.run_file.rounds.count:
        changed = _changed(to_table(run.run_file), to_table(run_file))
        raise RunFileError(
            f"run {run_file.name} exists with other settings: {', '.join(changed)}",
            hint="give the new run another run.name, or put the old values back",
        )
    routing = _read_routing(state, run_file, run.recipe)
    with state.lock:
        record = dataclasses.replace(run.record, run_file=dump_run_file(run_file))
        with state.transaction():
            state.ledger.put("run", record.run, record, run=record.run)
            if routing is not None:
                _write_routing(state, run, routing)
        run.record, run.run_file = record, run_file
        if routing is not None:
            _take_routing(state, run, routing)
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
    routing = _read_routing(state, run_file, recipe)
    # The experts of a level start from one file.
    files = set(prepared["files"].values())
    starts = {file: _add_start(state, Path(file)) for file in files}
    with state.lock, state.transaction():
        for module in recipe.topology.modules:
            _open_module(state, run, module, starts[prepared["files"][str(module)]], now=now)
        for file in base.files:
            state.own(Digest(file.digest), "base", record.run)
        state.ledger.put("run", record.run, record, run=record.run)
        state.ledger.put_document("recipe", record.run, signed, run=record.run)
        if routing is not None:
            _write_routing(state, run, routing)
        state.log(record.run, f"run started over base {base.digest[:12]}")
    if routing is not None:
        _take_routing(state, run, routing)
    state.runs[record.run] = run


def _add_start(state: State, start: Path) -> ContentOf:
    blob = state.blobs.add_file(start, move=True)
    return state.content_of(blob.blake3, size_bytes=blob.size_bytes)


def _open_module(state: State, run: Run, module: ModuleKey, content: ContentOf, *, now: float) -> None:
    version, document = first_version(run, module, content, state.identity.signing_key, now=now)
    run.versions[module] = [version]
    run.rounds[module] = [Round(run=run.record.run, module=module, number=1, base_version=0, opened_at=now)]
    state.write_version(version, document)
    state.write_round(run.rounds[module][0])


def _read_routing(state: State, run_file: RunFile, recipe: Recipe) -> RoutingRecord | None:
    """Take the router and the shards that a run file names into the blobs; None where nothing is routed.

    Raises:
        RouterMismatch: The router is for another base or other paths.
        InputError: A file is damaged, or the shards were made with another router.
    """
    settings = run_file.routing
    if settings.mode is RoutingMode.NONE:
        return None
    path = Path(settings.router)
    check_router(read_router(path), recipe)
    router = state.blobs.add_file(path, move=False)
    shards = {}
    if settings.mode is RoutingMode.GIVEN:
        index = read_shards(Path(settings.shards), recipe)
        if index.router != router.blake3:
            raise RouterMismatch(
                f"routing.shards were made with router {index.router[:12]}, routing.router is {router.blake3[:12]}",
                hint=f"weft route shard DATA --router {path} --to DIR makes them anew",
            )
        shards = {
            shard.path: _add_shard(state, Path(settings.shards), shard)
            for shard in index.shards
            if shard.num_documents
        }
    return RoutingRecord(
        run=recipe.run,
        router=router.blake3,
        router_bytes=router.size_bytes,
        shards=shards,
        adopted_at=state.clock.now(),
    )


def _add_shard(state: State, directory: Path, shard: Shard) -> ShardRecord:
    blob = state.blobs.add_file(directory / shard.file, move=False)
    if blob.blake3 != shard.blake3:
        raise InputError(
            f"{directory / shard.file} changed since weft route shard wrote it",
            hint="make the shards anew with weft route shard",
        )
    return ShardRecord(digest=blob.blake3, size_bytes=blob.size_bytes, num_documents=shard.num_documents)


def _write_routing(state: State, run: Run, routing: RoutingRecord) -> None:
    """Make another routing durable; within a transaction. What depends on the old one is over."""
    name = routing.run
    assert routing.router is not None  # noqa: S101 - it was read from a router
    state.own(routing.router, "router", name)
    for shard in routing.shards.values():
        state.own(shard.digest, "shard", name)
    state.ledger.put("routing", name, routing, run=name)
    old = run.routing
    if old is not None and (old.router, old.shards) != (routing.router, routing.shards):
        state.log(name, f"documents are routed by {routing.router[:12]} from now on")
    empty = [path for path in map(str, run.recipe.topology.paths) if path not in routing.shards]
    if empty and routing.shards:
        state.log(name, f"no document for path(s) {', '.join(empty)}; weft route reseed splits the fullest")


def _take_routing(state: State, run: Run, routing: RoutingRecord) -> None:
    """Take up a routing that is durable; who is at work on routing by another is told to stop."""
    old, run.routing = run.routing, routing
    run.lost_shards.clear()
    if old is not None:
        run.paths = {path: dataclasses.replace(record, unmeasured=()) for path, record in run.paths.items()}
    if old is not None and old.router != routing.router:
        run.holdings.clear()
        run.holds.clear()
        for lease in [lease for lease in state.leases.values() if lease.run == run.record.run]:
            if lease.purpose is Purpose.ROUTE:
                reason = "another router is in use now"
                state.leases[lease.token] = dataclasses.replace(lease, stop_reason=reason)


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
