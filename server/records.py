"""What the ledger keeps beside rounds: runs, versions, workers, tasks, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weft.common.ids import Digest, ModuleKey, RunId, TaskId, WorkerId
from weft.common.modules import Schema, TensorSpec
from weft.common.protocol import Purpose, Role


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """A TensorSpec as the ledger writes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A run: what was asked for and where its base lies."""

    run: RunId
    run_file: str
    """TOML, every value written out."""
    base_directory: str
    recipe_digest: Digest
    schemas: Mapping[str, tuple[TensorRecord, ...]]
    """By module, ``level.expert``."""
    created_at: float

    def schema(self, module: ModuleKey) -> Schema:
        """The tensors of a module."""
        return Schema(
            tuple(TensorSpec(item.name, item.dtype, item.shape) for item in self.schemas[str(module)])
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """A published version."""

    run: RunId
    module: ModuleKey
    version: int
    digest: Digest
    """Of the module file's bytes."""
    size_bytes: int
    manifest_digest: Digest
    round_number: int
    """Round that made it; 0 for version 0."""
    num_steps: int = 0
    """Optimiser steps in its history: the sum over rounds of the mean steps of their updates."""
    outer_state: Digest | None = None
    heldout_loss: float | None = None
    published_at: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRecord:
    """Somebody on the roster."""

    worker_id: WorkerId
    public_key: str
    """Ed25519, hex."""
    role: Role
    runs: tuple[str, ...] = ()
    """Runs it may see; none means all."""
    display_name: str = ""
    device: str = ""
    token_id: str = ""
    approved: bool = True
    revoked: bool = False
    joined_at: float = 0.0

    def may_see(self, run: str) -> bool:
        """Whether the run is among those it may see."""
        return not self.runs or run in self.runs


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """A lease as it survives a restart: the clock is armed afresh."""

    task_id: TaskId
    run: RunId
    worker_id: WorkerId
    token: str
    epoch: int
    experts: tuple[int, ...]
    rounds: Mapping[str, int]
    """Round by module, of the modules that the task trains."""
    starts: Mapping[str, int]
    """Version by module, of all modules of the path."""
    num_steps: int
    purpose: Purpose
    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRecord:
    """A path's documents, where the coordinator gives the data."""

    digest: Digest
    size_bytes: int
    num_documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRecord:
    """How a run's documents come to paths now; another router may take over when the coordinator starts."""

    run: RunId
    router: Digest | None
    router_bytes: int
    shards: Mapping[str, ShardRecord]
    """By path; none where workers route their own documents."""
    adopted_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldingRecord:
    """What a worker said that it holds for each path."""

    run: RunId
    worker_id: WorkerId
    router: Digest
    """That it routed with."""
    sequences: Mapping[str, int]
    """Training sequences by path."""
    documents: Mapping[str, int]
    """Documents by path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEntry:
    """A join token as the ledger keeps it: a key derived from the secret, never the secret."""

    token_id: str
    key: str
    """SHA-256 of the secret, hex."""
    role: Role
    expires_at: float
    num_uses_left: int
    needs_approval: bool = False
    runs: tuple[str, ...] = ()
    label: str = ""
    revoked: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes of a run, as far as they were counted."""

    bytes_up: int = 0
    bytes_down: int = 0
