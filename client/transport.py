"""The coordinator's RPCs as methods that take and give domain types and raise Weft's errors.

One :class:`Transport` is one connection, safe to use from several threads. It keeps a session: opened at the
first call that needs one, renewed when two thirds of its life are over and once more when the coordinator does
not know it, for instance since it restarted. The session's token goes over TLS, or over loopback, and nowhere
else. Single calls are not repeated here: what is UNAVAILABLE is raised as Unreachable, and whoever calls knows
whether to try again. Transfers repeat their calls themselves.
"""

from __future__ import annotations

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any, Final, Self, TypeVar, cast

import grpc
from google.protobuf.message import Message

from weft.client import transfer
from weft.client.transfer import CHUNK_S, Patience, Progress
from weft.common import wire
from weft.common.blobs import BlobStore
from weft.common.errors import SessionExpired, Unreachable, UsageError, WeftError
from weft.common.identity.session import SESSION_TYPE, session_statement, sign_session
from weft.common.identity.signing import SigningKey
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
from weft.v1.coordinator_service_pb2_grpc import CoordinatorServiceStub

T = TypeVar("T")

UNARY_S: Final = 30.0
"""Deadline of calls that move no bytes."""
POLL_MARGIN_S: Final = 10.0
"""What a long poll may take beyond the time that it is held."""
GLANCE_S: Final = 0.2
"""How often a call that is under way looks whether it should stop."""
RENEW_AFTER: Final = 2 / 3
"""Part of a session's life after which another is opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Who opens sessions."""

    worker_id: WorkerId
    """Issued at Join."""
    signing_key: SigningKey
    """The key that was registered."""
    pin: bytes
    """Of the coordinator, 32 bytes, from the join token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _OpenSession:
    session: Session
    renew_at_s: float
    """On this machine's monotonic clock."""


class Transport:
    """One connection to one coordinator."""

    def __init__(
        self,
        address: str,
        *,
        ca_pem: str | None,
        tls_name: str = "",
        member: Member | None = None,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """Prepare a connection; it is made at the first call.

        Args:
            address: HOST:PORT.
            ca_pem: The coordinator's authority, the only one to trust; None connects without TLS, on loopback.
            tls_name: The name to expect in the coordinator's certificate, whatever its address.
            member: Who opens sessions; None until :meth:`open_session`.
            stop: Set, it ends what only waits: long polls, watches, pauses between attempts. Calls that do
                something go on, so that a worker can still send its update and give its lease back.
            clock: Monotonic seconds.
            jitter: Uniform in [0, 1).

        Raises:
            UsageError: The address is none, or needs TLS.
        """
        host, _ = wire.parse_address(address)
        if ca_pem is None:
            if not wire.is_loopback(host):
                raise UsageError(
                    f"{host} is not reached without TLS", hint="join with the coordinator's token"
                )
            self._channel = grpc.insecure_channel(address, options=wire.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(
                address,
                grpc.ssl_channel_credentials(ca_pem.encode()),
                options=(*wire.CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", tls_name)),
            )
        self._stub = CoordinatorServiceStub(self._channel)
        self._member = member
        self._stop = stop or threading.Event()
        self._clock = clock
        self._jitter = jitter
        self._session_lock = threading.Lock()
        self._open: _OpenSession | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and the calls that are under way."""
        self._channel.close()

    # --- joining ---

    def join(self, *, token_id: str, statement: Signed, proof: bytes) -> Joined:
        """Put this machine's key on the roster; raises TokenRefused."""
        return self._call(Joined, "Join", token_id=token_id, statement=statement, proof=proof)

    def open_session(self, worker_id: WorkerId, signing_key: SigningKey, pin: bytes) -> Session:
        """Open a session, kept and renewed from now on.

        Raises:
            NotFound: The coordinator does not know the worker.
            ApprovalPending: The operator has to approve it.
            PermissionRefused: It was revoked.
        """
        with self._session_lock:
            self._member = Member(worker_id=worker_id, signing_key=signing_key, pin=pin)
            self._open = self._opened(self._member)
            return self._open.session

    # --- work ---

    def poll_task(
        self,
        *,
        wait_s: float,
        unable: tuple[Unable, ...] = (),
        tokens_per_s: float = 0.0,
        limits: tuple[Limit, ...] = (),
    ) -> PollAnswer:
        """Get work, waiting for it up to ``wait_s``; raises Unreachable when ``stop`` is set meanwhile."""
        return self._call(
            PollAnswer,
            "PollTask",
            timeout_s=wait_s + POLL_MARGIN_S,
            halted=self._stop.is_set,
            wait_s=wait_s,
            unable=unable,
            tokens_per_s=tokens_per_s,
            limits=limits,
        )

    def report_progress(
        self,
        *,
        lease_token: str,
        stage: Stage,
        num_done: int,
        num_total: int,
        tokens_per_s: float = 0.0,
        losses: tuple[LossPoint, ...] = (),
    ) -> ProgressAnswer:
        """Keep the lease; raises LeaseLost."""
        return self._call(
            ProgressAnswer,
            "ReportProgress",
            lease_token=lease_token,
            stage=stage,
            num_done=num_done,
            num_total=num_total,
            tokens_per_s=tokens_per_s,
            losses=losses,
        )

    def submit_update(self, *, lease_token: str, statement: Signed) -> Receipt:
        """Hand in updates whose blobs were sent; raises a class of SubmissionRefused."""
        return self._call(Receipt, "SubmitUpdate", lease_token=lease_token, statement=statement)

    def release_task(self, *, lease_token: str, reason: str) -> None:
        """Give a lease back."""
        self._call(NoneType, "ReleaseTask", lease_token=lease_token, reason=reason)

    # --- bytes ---

    def upload(
        self, path: Path, lease_token: str, *, idle_s: float, progress: Progress | None = None
    ) -> BlobManifest:
        """Send a file that belongs to a leased task: see :func:`weft.client.transfer.upload`."""
        return transfer.upload(self, path, lease_token, patience=self._patience(idle_s), progress=progress)

    def download(
        self,
        blake3: Digest,
        to: BlobStore | Path,
        *,
        idle_s: float,
        size_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """Get a blob: see :func:`weft.client.transfer.download`."""
        patience = self._patience(idle_s)
        return transfer.download(
            self, blake3, to, size_bytes=size_bytes, patience=patience, progress=progress
        )

    def find_missing(self, *, lease_token: str, blob: BlobManifest, timeout_s: float = CHUNK_S) -> Missing:
        """Declare a blob and ask what of it to send."""
        return self._call(Missing, "FindMissing", timeout_s=timeout_s, lease_token=lease_token, blob=blob)

    def put_chunk(
        self,
        *,
        lease_token: str,
        blake3: Digest,
        index: int,
        data: bytes,
        timeout_s: float = CHUNK_S,
        halted: Callable[[], bool] = lambda: False,
    ) -> None:
        """Send one chunk."""
        self._call(
            NoneType,
            "PutChunk",
            timeout_s=timeout_s,
            halted=halted,
            lease_token=lease_token,
            blake3=blake3,
            index=index,
            data=data,
        )

    def commit_blob(self, *, lease_token: str, blake3: Digest, timeout_s: float = CHUNK_S) -> None:
        """Have a blob made durable whose chunks were sent."""
        self._call(NoneType, "CommitBlob", timeout_s=timeout_s, lease_token=lease_token, blake3=blake3)

    def get_blob(self, *, blake3: Digest) -> BlobManifest:
        """Ask what a blob consists of."""
        return self._call(BlobManifest, "GetBlob", timeout_s=CHUNK_S, blake3=blake3)

    def get_chunk(
        self,
        *,
        blake3: Digest,
        index: int,
        timeout_s: float = CHUNK_S,
        halted: Callable[[], bool] = lambda: False,
    ) -> bytes:
        """Get one chunk, not checked."""
        return self._call(bytes, "GetChunk", timeout_s=timeout_s, halted=halted, blake3=blake3, index=index)

    # --- modules ---

    def get_recipe(self, run_id: str) -> Signed:
        """Get a run's recipe; its signature is the caller's to check."""
        return self._call(Signed, "GetRecipe", run_id=run_id)

    def resolve_module(self, ref: str) -> ResolvedModule:
        """Get the manifests of a module or path; their signatures are the caller's to check."""
        return self._call(ResolvedModule, "ResolveModule", ref=ref)

    def list_versions(self, run_id: str, module: str = "") -> tuple[Signed, ...]:
        """Get the manifests of all versions of a module, or of all modules."""
        return self._call(tuple, "ListVersions", run_id=run_id, module=module)

    # --- status ---

    def get_status(self, run_id: str = "") -> Status:
        """Get the status of a run, or of all."""
        return self._call(Status, "GetStatus", run_id=run_id)

    def watch(self, run_id: str = "") -> Iterator[Status]:
        """Get the status now and after each change, until ``stop`` is set or the iterator is closed.

        Raises:
            Unreachable: The connection or the coordinator ended; watch again.
        """
        request = wire.to_message({"run_id": run_id}, wire.METHODS["WatchRun"].request)
        is_new = False
        while not self._stop.is_set():
            token = self._session_token()
            try:
                for message in self._stream(request, token):
                    is_new = False
                    yield _answer(message)
            except SessionExpired:
                # A session that was just opened and is not known will not become known by opening another.
                if is_new:
                    raise
                self._session_token(stale=token)
                is_new = True

    def list_rounds(self, run_id: str, module: str = "") -> tuple[RoundStatus, ...]:
        """Get past and present rounds of a module, or of all modules."""
        return self._call(tuple, "ListRounds", run_id=run_id, module=module)

    # --- the operator ---

    def create_token(
        self,
        *,
        request_id: str,
        role: Role,
        ttl_s: float = 0.0,
        num_uses: int = 0,
        needs_approval: bool = False,
        runs: tuple[str, ...] = (),
        label: str = "",
    ) -> str:
        """Make a join token; the same ``request_id`` gives the same token again."""
        return self._call(
            str,
            "CreateToken",
            request_id=request_id,
            role=role,
            ttl_s=ttl_s,
            num_uses=num_uses,
            needs_approval=needs_approval,
            runs=runs,
            label=label,
        )

    def list_tokens(self) -> tuple[TokenStatus, ...]:
        """Get all tokens, oldest first."""
        return self._call(tuple, "ListTokens")

    def revoke_token(self, token_id: str) -> None:
        """Take a token back."""
        self._call(NoneType, "RevokeToken", token_id=token_id)

    def approve_worker(self, worker_id: str) -> None:
        """Let a worker in."""
        self._call(NoneType, "ApproveWorker", worker_id=worker_id)

    def revoke_worker(self, worker_id: str) -> None:
        """Shut a worker out."""
        self._call(NoneType, "RevokeWorker", worker_id=worker_id)

    # --- calls ---

    def _call(
        self,
        kind: type[T],
        name: str,
        *,
        timeout_s: float = UNARY_S,
        halted: Callable[[], bool] = lambda: False,
        **fields: object,
    ) -> T:
        """Make a call and give what its response stands for, which is of ``kind``."""
        method = wire.METHODS[name]
        request = wire.to_message(fields, method.request)
        if name in wire.SESSIONLESS:
            return cast("T", _answer(self._send(method, request, "", timeout_s, halted)))
        token = self._session_token()
        try:
            message = self._send(method, request, token, timeout_s, halted)
        except SessionExpired:
            message = self._send(method, request, self._session_token(stale=token), timeout_s, halted)
        return cast("T", _answer(message))

    def _send(
        self, method: wire.Method, request: Message, token: str, timeout_s: float, halted: Callable[[], bool]
    ) -> Message:
        call = getattr(self._stub, method.name).future(request, timeout=timeout_s, metadata=_metadata(token))
        try:
            while True:
                with contextlib.suppress(grpc.FutureTimeoutError):
                    return cast("Message", call.result(timeout=GLANCE_S))
                if halted():
                    raise Unreachable(f"{method.name} was broken off")
        except grpc.RpcError as error:
            raise wire.error_from_rpc(error) from error
        finally:
            # No effect on a call that has ended.
            call.cancel()

    def _stream(self, request: Message, token: str) -> Iterator[Message]:
        """The messages of a watch. They are read in a thread of their own, so that ``stop`` can end the wait."""
        call: Any = self._stub.WatchRun(cast("Any", request), metadata=_metadata(token))
        inbox: queue.SimpleQueue[Message | grpc.RpcError | None] = queue.SimpleQueue()
        reader = threading.Thread(target=_read, args=(call, inbox), name="weft-watch", daemon=True)
        reader.start()
        try:
            while not self._stop.is_set():
                with contextlib.suppress(queue.Empty):
                    item = inbox.get(timeout=GLANCE_S)
                    if item is None:
                        return
                    if isinstance(item, grpc.RpcError):
                        raise wire.error_from_rpc(item) from item
                    yield item
        finally:
            call.cancel()
            reader.join()

    def _patience(self, idle_s: float) -> Patience:
        return Patience(idle_s=idle_s, clock=self._clock, jitter=self._jitter, stop=self._stop)

    # --- the session ---

    def _session_token(self, *, stale: str = "") -> str:
        """The token to send now; another than ``stale``, which the coordinator refused."""
        with self._session_lock:
            if self._member is None:
                raise SessionExpired("this machine has not joined", hint="weft join HOST:PORT TOKEN")
            opened = self._open
            if opened is None or opened.session.session_token == stale or self._clock() >= opened.renew_at_s:
                opened = self._open = self._opened(self._member)
            return opened.session.session_token

    def _opened(self, member: Member) -> _OpenSession:
        nonce = self._call(bytes, "StartSession", worker_id=member.worker_id)
        statement = Signed(
            payload=session_statement(nonce, member.pin, member.worker_id),
            payload_type=SESSION_TYPE,
            signature=sign_session(member.signing_key, nonce, member.pin, member.worker_id),
            key_id=member.signing_key.key_id,
        )
        method = wire.METHODS["OpenSession"]
        request = wire.to_message({"worker_id": member.worker_id, "statement": statement}, method.request)
        asked_at_s = self._clock()
        message = self._send(method, request, "", UNARY_S, lambda: False)
        session = cast("Session", _answer(message))
        # Both times are the coordinator's, so that this machine's clock need not be right.
        life_s = session.expires_at - wire.server_time(message)
        return _OpenSession(session=session, renew_at_s=asked_at_s + RENEW_AFTER * life_s)


def _answer(message: Message) -> Any:
    try:
        return wire.answer(message)
    except UsageError as error:
        raise WeftError(
            f"the coordinator's answer is malformed: {error}", hint="use the same version on both sides"
        ) from error


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return ((wire.SESSION_KEY, token),) if token else ()


def _read(call: Any, inbox: queue.SimpleQueue[Message | grpc.RpcError | None]) -> None:
    try:
        for message in call:
            inbox.put(message)
        inbox.put(None)
    except grpc.RpcError as error:
        inbox.put(error)
