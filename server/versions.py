"""Versions: the name, the record and the signed manifest that a published module gets. Pure, writes nothing."""

from __future__ import annotations

from weft.common.blobs import digest_of
from weft.common.identity.signing import SigningKey
from weft.common.ids import ModuleKey
from weft.common.manifest import Signed, sign_version
from weft.server.records import VersionRecord
from weft.server.rounds import Round
from weft.server.run import ContentOf, Run, first_manifest, next_manifest, steps_after


def version_key(version: VersionRecord) -> str:
    """How the ledger names a version and its manifest."""
    return f"{version.run}/{version.module}/{version.version:08d}"


def first_version(
    run: Run, module: ModuleKey, content: ContentOf, key: SigningKey, *, now: float
) -> tuple[VersionRecord, Signed]:
    """Version 0 of a module, with its signed manifest."""
    document = sign_version(first_manifest(run.record, run.recipe, module, content, now=now), key)
    version = VersionRecord(
        run=run.record.run,
        module=module,
        version=0,
        digest=content.digest,
        size_bytes=content.size_bytes,
        manifest_digest=digest_of(document.payload),
        round_number=0,
        published_at=now,
    )
    return version, document


def next_version(
    run: Run, ended: Round, content: ContentOf, key: SigningKey, *, now: float
) -> tuple[VersionRecord, Signed]:
    """The version that a round which passed the gate makes, with its signed manifest."""
    assert ended.candidate is not None  # noqa: S101 - only a candidate can be published
    assert ended.gate is not None  # noqa: S101 - and only once it was judged
    document = sign_version(next_manifest(run, ended, ended.gate, content, now=now), key)
    version = VersionRecord(
        run=run.record.run,
        module=ended.module,
        version=ended.base_version + 1,
        digest=content.digest,
        size_bytes=content.size_bytes,
        manifest_digest=digest_of(document.payload),
        round_number=ended.number,
        num_steps=steps_after(run, ended),
        outer_state=ended.candidate.outer_state,
        heldout_loss=ended.gate.loss_after,
        published_at=now,
    )
    return version, document
