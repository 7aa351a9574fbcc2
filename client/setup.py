"""Who works, with what, and what it asks of the connection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from weft.client.device import Device
from weft.client.heartbeat import Reports
from weft.client.tasks.inhand import Progress
from weft.client.trainer.gradients import ALONE, Gradients
from weft.common.composition import Quantisation, ResidentBase
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, WorkerId
from weft.common.manifest import Signed
from weft.common.modules import Kind
from weft.common.protocol import BlobManifest, Limit, PollAnswer, Receipt, Session, Unable
from weft.common.recipe import TaskSettings

Residents = dict[tuple[Digest, TaskSettings, Kind], ResidentBase]
"""Bases in memory."""


class Calls(Reports, Protocol):
    """What a worker needs of the transport."""

    def open_session(self, worker_id: WorkerId, signing_key: SigningKey, pin: bytes) -> Session:
        """Open a session, kept and renewed from now on."""

    def poll_task(
        self,
        *,
        wait_s: float,
        unable: tuple[Unable, ...] = ...,
        tokens_per_s: float = ...,
        limits: tuple[Limit, ...] = ...,
    ) -> PollAnswer:
        """Get work."""

    def submit_update(self, *, lease_token: str, statement: Signed) -> Receipt:
        """Hand in what a task came to; blobs were sent before."""

    def release_task(self, *, lease_token: str, reason: str) -> None:
        """Give a lease back."""

    def get_recipe(self, run_id: str) -> Signed:
        """Get a run's recipe."""

    def upload(
        self, path: Path, lease_token: str, *, idle_s: float, progress: Progress | None = ...
    ) -> BlobManifest:
        """Send a file that belongs to a leased task."""

    def download(
        self,
        blake3: Digest,
        to: Path,
        *,
        idle_s: float,
        size_bytes: int | None = ...,
        progress: Progress | None = ...,
    ) -> Path:
        """Get a blob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Who works, with what, where: fixed for the life of a worker."""

    worker_id: WorkerId
    key: SigningKey
    pin: bytes
    """Of the coordinator, 32 bytes."""
    coordinator_key: bytes
    """Ed25519 public key that signs recipes, endorsed by the pinned authority."""
    state: Path
    """This worker's directory."""
    bases: Callable[[Digest], Path]
    """Where this machine caches a base."""
    data: Path | None
    """The training data; None where only runs that give their data can be served."""
    base: Path | None
    """What ``--base`` named."""
    device: Device
    quantise: Quantisation = "none"
    rank_max: int = 0
    """Largest LoRA rank to train; 0 for any that fits."""
    checkpoint_s: float = 60.0
    """How often a task is saved within its inner loop."""
    gradients: Gradients = ALONE
    """Who computes a batch's gradients: this process, or it and others beside it."""
    load: Callable[..., ResidentBase] = field(default_factory=lambda: ResidentBase.load)
    """Loads a base as ``ResidentBase.load`` does, into this process or divided among it and others."""
    num_shares: int = 1
    """Processes among which a base is divided."""
    residents: Residents = field(default_factory=dict)
    """Bases in memory; one for all workers that live one after another in a process."""
