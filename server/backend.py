"""What the service asks of the coordinator, in domain types: neither side of this page knows gRPC.

Methods are named as the RPCs. They get who calls and the request's fields, and return what the response stands
for: its class in ``common.protocol``, the one field of a response that has only one, or None. They refuse by
raising a class of ``common.errors``. All of them are synchronous and run in threads, several at a time where the
executors that :func:`weft.server.service.serve` is given have several; those in ``BLOB_METHODS`` in one of the
two, all others in the other, so that moving bytes and deciding need not wait for each other.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from typing import Final, Protocol

from weft.common.ids import Digest, WorkerId
from weft.common.protocol import (
    BlobManifest,
    Joined,
    Limit,
    LossPoint,
    Missing,
    PollAnswer,
    ProgressAnswer,
    Receipt,
    ResolvedModule,
    Role,
    RoundStatus,
    Session,
    Signed,
    Stage,
    Status,
    TokenStatus,
    Unable,
)

BLOB_METHODS: Final = frozenset({"find_missing", "put_chunk", "commit_blob", "get_blob", "get_chunk"})
"""Methods that read or write whole chunks; they run beside the others and beside each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls, as their session says; never as a request says."""

    worker_id: WorkerId
    role: Role
    runs: tuple[str, ...]
    """Runs that the caller may see; none means all."""
    peer: str
    """Address from which the session was opened."""

    def may_see(self, run: str) -> bool:
        """Whether the run is among those that the caller may see."""
        return not self.runs or run in self.runs


class Changes:
    """Counts changes, so that coroutines can wait for the next; ``notify`` may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._revision = 0
        self._waiting: dict[asyncio.AbstractEventLoop, set[asyncio.Future[None]]] = {}

    @property
    def revision(self) -> int:
        """How many changes there were. Read it before the state, and no change in between is missed."""
        return self._revision

    def notify(self) -> None:
        """Say that something changed."""
        with self._lock:
            self._revision += 1
            waiting, self._waiting = self._waiting, {}
            for loop, futures in waiting.items():
                # A loop that ended has nobody who waits.
                if not loop.is_closed():
                    loop.call_soon_threadsafe(_wake, futures)

    async def wait(self, revision: int, timeout_s: float) -> int:
        """Return the revision as soon as it is another than ``revision``, or after ``timeout_s``."""
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._revision != revision:
                return self._revision
            future = loop.create_future()
            self._waiting.setdefault(loop, set()).add(future)
        try:
            await asyncio.wait((future,), timeout=timeout_s)
        finally:
            with self._lock:
                self._waiting.get(loop, set()).discard(future)
        return self._revision


def _wake(futures: set[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)


class Backend(Protocol):
    """The coordinator, as the service sees it."""

    changed: Changes
    """Notified whenever the status is another: watchers get the new one."""
    work: Changes
    """Notified whenever a poll that found no task may find one; may be the same as ``changed``."""

    def authenticate(self, session_token: str) -> Caller:
        """Say whose session it is; raises SessionExpired. Called from all threads, before each call."""

    # --- no session: the first argument is the caller's address, without port ---

    def join(self, peer: str, *, token_id: str, statement: Signed, proof: bytes) -> Joined:
        """Put a worker on the roster, or find it there by its key; raises TokenRefused."""

    def start_session(self, peer: str, *, worker_id: str) -> bytes:
        """Give a nonce of 32 bytes; raises NotFound."""

    def open_session(self, peer: str, *, worker_id: str, statement: Signed) -> Session:
        """Open a session; raises SessionExpired for a wrong nonce or signature, ApprovalPending."""

    # --- workers ---

    def poll_task(
        self,
        caller: Caller,
        *,
        wait_s: float,
        unable: tuple[Unable, ...],
        limits: tuple[Limit, ...],
        tokens_per_s: float,
    ) -> PollAnswer:
        """Answer at once; the service asks again after each change of ``work`` until ``wait_s`` are over."""

    def report_progress(
        self,
        caller: Caller,
        *,
        lease_token: str,
        stage: Stage,
        num_done: int,
        num_total: int,
        tokens_per_s: float,
        losses: tuple[LossPoint, ...],
    ) -> ProgressAnswer:
        """Keep the lease; raises LeaseLost."""

    def submit_update(self, caller: Caller, *, lease_token: str, statement: Signed) -> Receipt:
        """Accept updates durably; raises a class of SubmissionRefused."""

    def release_task(self, caller: Caller, *, lease_token: str, reason: str) -> None:
        """Take a lease back; one that is lost already is no error."""

    # --- bytes ---

    def find_missing(self, caller: Caller, *, lease_token: str, blob: BlobManifest) -> Missing:
        """Declare a blob and say what is missing; raises LeaseLost, UsageError, DiskFull."""

    def put_chunk(self, caller: Caller, *, lease_token: str, blake3: Digest, index: int, data: bytes) -> None:
        """Take a chunk; raises CorruptState, NotFound when the blob was not declared, LeaseLost, DiskFull."""

    def commit_blob(self, caller: Caller, *, lease_token: str, blake3: Digest) -> None:
        """Make a blob durable; raises SubmissionRefused while chunks are missing, else as put_chunk."""

    def get_blob(self, caller: Caller, *, blake3: Digest) -> BlobManifest:
        """Say what a blob consists of; raises NotFound, also for blobs that the caller may not read."""

    def get_chunk(self, caller: Caller, *, blake3: Digest, index: int) -> bytes:
        """Give a chunk; raises NotFound likewise, CorruptState."""

    # --- modules: NotFound also for runs that the caller may not see ---

    def get_recipe(self, caller: Caller, *, run_id: str) -> Signed:
        """Give a run's recipe."""

    def resolve_module(self, caller: Caller, *, ref: str) -> ResolvedModule:
        """Give the manifests of a module or path; raises UsageError when ``ref`` names none."""

    def list_versions(self, caller: Caller, *, run_id: str, module: str) -> tuple[Signed, ...]:
        """Give the manifests of a module, or of all when it is empty."""

    # --- status ---

    def get_status(self, caller: Caller, *, run_id: str) -> Status:
        """Give the status of a run, or of all when it is empty."""

    def watch_run(self, caller: Caller, *, run_id: str) -> Status:
        """As get_status; the service asks after each change of ``changed``, at most twice a second."""

    def list_rounds(self, caller: Caller, *, run_id: str, module: str) -> tuple[RoundStatus, ...]:
        """Give the rounds of a module, or of all when it is empty."""

    # --- the operator: NotFound for unknown tokens and workers ---

    def create_token(
        self,
        caller: Caller,
        *,
        request_id: str,
        role: Role,
        ttl_s: float,
        num_uses: int,
        needs_approval: bool,
        runs: tuple[str, ...],
        label: str,
    ) -> str:
        """Give a join token; idempotent on ``request_id``."""

    def list_tokens(self, caller: Caller) -> tuple[TokenStatus, ...]:
        """Give all tokens, oldest first."""

    def revoke_token(self, caller: Caller, *, token_id: str) -> None:
        """Take a token back."""

    def approve_worker(self, caller: Caller, *, worker_id: str) -> None:
        """Let a worker in."""

    def revoke_worker(self, caller: Caller, *, worker_id: str) -> None:
        """Shut a worker out."""
