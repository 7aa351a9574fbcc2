"""``weft verify``: recompute a published version from what is stored, byte for byte.

Reads the ledger without writing to it, so it may run beside the coordinator. The manifest's signature, the file's
digests and the lineage are checked on the way.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.common.blobs import BlobStore, manifest_of
from weft.common.errors import CorruptState, NotFound
from weft.common.identity.signing import SigningKey
from weft.common.ids import ModuleRef
from weft.common.manifest import VersionManifest, open_version, parse_json
from weft.common.recipe import RECIPE_TYPE, Recipe
from weft.common.settings import from_table
from weft.common.statements import STATEMENT_BYTES_MAX
from weft.server.engine import Engine
from weft.server.jobs import merge_job
from weft.server.records import RunRecord, Traffic, VersionRecord
from weft.server.rounds import Round
from weft.server.run import Run, check_complete
from weft.server.runfile import parse_run_file
from weft.server.store.ledger import Ledger
from weft.server.versions import version_key


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was found of one version."""

    run: str
    module: str
    version: int
    digest: str
    """Of the published file, which is also that of the recomputed one."""
    num_updates: int
    rule: str


def verify(state: Path, ref: ModuleRef, engine: Engine) -> list[Verified]:
    """Recompute the versions that ``ref`` names.

    Raises:
        NotFound: There is no such run, module or version.
        CorruptState: A signature, a digest or the recomputed bytes do not fit.
    """
    ledger, blobs = Ledger(state / "ledger.db", read_only=True), BlobStore(state / "blobs")
    try:
        public = SigningKey.load(state / "identity" / "signing.pem").public
        run = read_run(ledger, ref, public)
        return [
            _verify_version(
                run,
                version,
                open_version(ledger.document("version", version_key(version)), public),
                blobs,
                engine,
            )
            for version in run.resolve(ref)
        ]
    finally:
        ledger.close()


def read_run(ledger: Ledger, ref: ModuleRef, public: bytes) -> Run:
    """A run as the ledger has it; raises NotFound, CorruptState."""
    record = ledger.all("run", RunRecord).get(ref.run)
    if record is None:
        raise NotFound(f"the ledger has no run {ref.run}", hint="weft runs list")
    signed = ledger.document("recipe", ref.run)
    recipe = from_table(Recipe, parse_json(signed.open(public, RECIPE_TYPE), STATEMENT_BYTES_MAX))
    run = Run(
        record=record,
        run_file=parse_run_file(record.run_file),
        recipe=recipe,
        recipe_signed=signed,
        rounds={},
        versions={},
        traffic=Traffic(),
    )
    for version in ledger.all("version", VersionRecord).values():
        if version.run == ref.run:
            run.versions.setdefault(version.module, []).append(version)
    for round_ in ledger.all("round", Round).values():
        if round_.run == ref.run:
            run.rounds.setdefault(round_.module, []).append(round_)
    check_complete(run)
    return run


def _verify_version(
    run: Run, version: VersionRecord, manifest: VersionManifest, blobs: BlobStore, engine: Engine
) -> Verified:
    name = f"{version.run}/{version.module}@{version.version}"
    path = blobs.path(version.digest)
    if not path.exists():
        raise CorruptState(f"{name}: its file is missing", hint="restore the state directory from a backup")
    if manifest_of(path).blake3 != manifest.content_digest or _sha256(path) != manifest.content_sha256:
        raise CorruptState(f"{name}: the stored file is not the one that its manifest names")
    if version.version > 0:
        _recompute(run, version, manifest, blobs, engine, name)
    return Verified(
        run=version.run,
        module=str(version.module),
        version=version.version,
        digest=manifest.content_digest,
        num_updates=len(manifest.contributors),
        rule=manifest.merge.rule if manifest.merge else "start",
    )


def _recompute(
    run: Run, version: VersionRecord, manifest: VersionManifest, blobs: BlobStore, engine: Engine, name: str
) -> None:
    round_ = next(item for item in run.rounds[version.module] if item.number == version.round_number)
    for update in round_.updates:
        path = blobs.path(update.update_digest)
        if not path.exists() or manifest_of(path).blake3 != update.update_digest:
            raise CorruptState(f"{name}: the update of {update.worker_id} is missing or damaged")
    if {item.update_digest for item in manifest.contributors} != {
        item.update_digest for item in round_.updates
    }:
        raise CorruptState(f"{name}: the manifest names other updates than the ledger")
    with tempfile.TemporaryDirectory(prefix="weft-verify-") as scratch:
        result: dict[str, Any] = engine.submit(merge_job(run, round_, blobs, Path(scratch))).result()
        found = manifest_of(Path(result["candidate"])).blake3
    if found != manifest.content_digest:
        raise CorruptState(
            f"{name}: recomputed {found[:12]}…, published {manifest.content_digest[:12]}…",
            hint="another processor or torch version may round differently; a change of the updates shows the same",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
