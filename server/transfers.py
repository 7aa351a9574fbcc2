"""Transfers: which bytes may come up under a lease, and who may read which blob.

Bytes move without the state's lock, which is taken here for what is decided and counted around them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from weft.common.blobs import FILES, chunk_bytes, digest_of, manifest_of, storage_errors
from weft.common.errors import NotFound, StorageError, UpdateRejected
from weft.common.ids import Digest, RunId
from weft.common.protocol import CHUNK_BYTES, BlobManifest, Missing, Role
from weft.server.admission import check_lease
from weft.server.assignment import Lease
from weft.server.backend import Caller
from weft.server.live import UPLOADS_PER_MODULE
from weft.server.run import Run
from weft.server.state import State

READABLE: Final[Mapping[Role, frozenset[str]]] = {
    Role.WORKER: frozenset({"base", "version", "router", "shard"}),
    Role.VIEWER: frozenset({"base", "version", "router"}),
}
"""What blobs of its runs a role may read; an admin may read all."""


class Transfers:
    """Blobs, up and down. Every method but ``forget`` takes the lock itself and may be called from any thread."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._uploads: dict[Digest, set[str]] = {}
        """Tokens of the leases under which a blob was declared."""
        self._base_manifests: dict[Digest, BlobManifest] = {}

    # ---- up ------------------------------------------------------------------------------------------------------

    def find_missing(self, caller: Caller, *, lease_token: str, blob: BlobManifest) -> Missing:
        """Declare an update's blob; raises LeaseLost, UpdateRejected over the quota."""
        lease = self._leased(caller, lease_token)
        run = self._state.runs[lease.run]
        quota = max((run.update_bytes_max(module) for module, _ in lease.rounds), default=0)
        if blob.size_bytes > quota:
            raise UpdateRejected(f"an update of {blob.size_bytes} bytes, where at most {quota} are possible")
        with self._state.lock:
            self._declare(lease, blob.blake3)
        return self._state.blobs.begin(blob, bytes_max=quota)

    def put_chunk(self, caller: Caller, *, lease_token: str, blake3: Digest, index: int, data: bytes) -> None:
        """Take a chunk; raises LeaseLost, NotFound, CorruptState."""
        lease = self._leased(caller, lease_token)
        self._state.blobs.put_chunk(blake3, index, data)
        with self._state.lock:
            self._state.seen(caller).bytes_up += len(data)
            run = self._state.runs[lease.run]
            run.traffic = dataclasses.replace(run.traffic, bytes_up=run.traffic.bytes_up + len(data))

    def commit_blob(self, caller: Caller, *, lease_token: str, blake3: Digest) -> None:
        """Make a blob durable; raises LeaseLost, NotFound, CorruptState."""
        self._leased(caller, lease_token)
        self._state.blobs.commit(blake3)

    def forget(self, lease_token: str) -> None:
        """Remove what was uploaded under a lease and belongs to no accepted update. The lock is held."""
        for blob, tokens in list(self._uploads.items()):
            tokens.discard(lease_token)
            if not tokens:
                del self._uploads[blob]
                self._state.remove_unowned(blob)

    def _leased(self, caller: Caller, lease_token: str) -> Lease:
        state = self._state
        with state.lock:
            return check_lease(state.leases.get(lease_token), caller.worker_id, now_s=state.clock.monotonic())

    def _declare(self, lease: Lease, blob: Digest) -> None:
        declared = sum(lease.token in tokens for tokens in self._uploads.values())
        tokens = self._uploads.get(blob, set())
        if lease.token not in tokens and declared >= UPLOADS_PER_MODULE * len(lease.rounds):
            raise UpdateRejected(
                f"task {lease.task_id} has {declared} uploads already", hint="ask for another task"
            )
        self._uploads[blob] = tokens | {lease.token}

    # ---- down ----------------------------------------------------------------------------------------------------

    def get_blob(self, caller: Caller, *, blake3: Digest) -> BlobManifest:
        """What a blob consists of; raises NotFound also for blobs that the caller may not read."""
        self._readable(caller, blake3)
        path = self._state.base_files.get(blake3)
        return self._state.blobs.manifest(blake3) if path is None else self._base_manifest(path, blake3)

    def get_chunk(self, caller: Caller, *, blake3: Digest, index: int) -> bytes:
        """A chunk; raises NotFound also for blobs that the caller may not read."""
        run = self._readable(caller, blake3)
        path = self._state.base_files.get(blake3)
        data = (
            self._state.blobs.read_chunk(blake3, index)
            if path is None
            else self._base_chunk(path, blake3, index)
        )
        with self._state.lock:
            self._state.seen(caller).bytes_down += len(data)
            if run is not None:
                run.traffic = dataclasses.replace(run.traffic, bytes_down=run.traffic.bytes_down + len(data))
        return data

    def _readable(self, caller: Caller, blob: Digest) -> Run | None:
        """The run that the blob is read for; workers and viewers may read bases and versions of their runs."""
        with self._state.lock:
            owners = self._state.owners.get(blob, set())
            if caller.role is Role.ADMIN and owners:
                return self._state.runs.get(RunId(min(owners)[1]))
            for kind, run in sorted(owners):
                if kind in READABLE.get(caller.role, ()) and caller.may_see(run):
                    return self._state.runs[RunId(run)]
        raise NotFound(f"there is no blob {blob[:12]} here")

    def _base_manifest(self, path: Path, blob: Digest) -> BlobManifest:
        """Of a base's file, which is hashed when it is asked for first."""
        manifest = self._base_manifests.get(blob)
        if manifest is None:
            manifest = self._base_manifests[blob] = manifest_of(path)
        if manifest.blake3 != blob:
            raise _base_changed(path)
        return manifest

    def _base_chunk(self, path: Path, blob: Digest, index: int) -> bytes:
        manifest = self._base_manifest(path, blob)
        if not 0 <= index < len(manifest.chunk_blake3):
            raise NotFound(f"blob {blob[:12]} has no chunk {index}")
        with storage_errors(path):
            data = FILES.read_at(path, index * CHUNK_BYTES, chunk_bytes(manifest, index))
        if digest_of(data) != manifest.chunk_blake3[index]:
            raise _base_changed(path)
        return data


def _base_changed(path: Path) -> StorageError:
    return StorageError(
        f"the base's file {path.name} changed on the coordinator since the run started",
        hint=f"put the old {path} back",
    )
