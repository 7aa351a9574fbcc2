"""The gRPC edge of the coordinator: sessions, roles, long polls, status codes. No decision is made here.

Every RPC takes the same way: who calls, may the role do this, is the request well-formed, then the backend;
all of it in a thread, so that hashing and SQLite never hold up the event loop. ``ROLES`` is the one table of
who may do what. What the backend refuses travels as its class; what nobody expected is logged and answered
INTERNAL.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Final, cast
from urllib.parse import unquote

import grpc
import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from weft.common import wire
from weft.common.errors import (
    PermissionRefused,
    PortTaken,
    SessionExpired,
    Unreachable,
    UsageError,
    WeftError,
)
from weft.common.protocol import Role
from weft.server.backend import BLOB_METHODS, Backend, Caller
from weft.v1 import task_pb2

logger = logging.getLogger(__name__)

_WORKER: Final = frozenset({Role.WORKER})
_VIEWERS: Final = frozenset({Role.VIEWER, Role.ADMIN})
_ADMIN: Final = frozenset({Role.ADMIN})
_ALL: Final = frozenset(Role)

ROLES: Final[Mapping[str, frozenset[Role] | None]] = {
    "Join": None,
    "StartSession": None,
    "OpenSession": None,
    "PollTask": _WORKER,
    "ReportProgress": _WORKER,
    "SubmitUpdate": _WORKER,
    "ReleaseTask": _WORKER,
    "FindMissing": _WORKER,
    "PutChunk": _WORKER,
    "CommitBlob": _WORKER,
    "GetBlob": _ALL,
    "GetChunk": _ALL,
    "GetRecipe": _ALL,
    "ResolveModule": _ALL,
    "ListVersions": _ALL,
    "GetStatus": _VIEWERS,
    "WatchRun": _VIEWERS,
    "ListRounds": _VIEWERS,
    "CreateToken": _ADMIN,
    "ListTokens": _ADMIN,
    "RevokeToken": _ADMIN,
    "ApproveWorker": _ADMIN,
    "RevokeWorker": _ADMIN,
}
"""Who may call what; None needs no session."""

POLL_MAX_S: Final = 30.0
"""Longest time that a poll is held."""
WATCH_INTERVAL_S: Final = 0.5
"""Shortest time between two messages of a watch."""
SESSION_CHECK_S: Final = 5.0
"""How often a watch without changes checks that its session still lives."""
CALLS_MAX: Final = 8192
"""Calls in progress, long polls and watches included; more are answered RESOURCE_EXHAUSTED."""

Credentials = Callable[[], tuple[str, str]]
"""Gives the chain and the leaf's key, PEM, as they are now; asked at each handshake."""


Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What a thread needs of a call; the call itself belongs to the event loop."""

    method: wire.Method
    request: Message
    session_token: str
    """Empty when none was sent."""
    address: str

    @classmethod
    def of(cls, method: wire.Method, request: Message, context: Context) -> _Call:
        token = dict(context.invocation_metadata() or ()).get(wire.SESSION_KEY, "")
        return cls(
            method=method,
            request=request,
            session_token=token if isinstance(token, str) else "",
            address=_address(context.peer()),
        )


class CoordinatorServicer:
    """All RPCs over one backend."""

    def __init__(
        self, backend: Backend, *, state: Executor, blobs: Executor, clock: Callable[[], float] = time.time
    ) -> None:
        """Serve ``backend``.

        Args:
            backend: What answers.
            state: Threads for all methods but those of ``BLOB_METHODS``.
            blobs: Threads for those.
            clock: Unix seconds, for the header of every response.
        """
        self._backend = backend
        self._state = state
        self._blobs = blobs
        self._clock = clock
        self._stopping = False

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """A handler for each RPC, by its name in the proto."""
        return {method.name: self._handler(method) for method in wire.METHODS.values()}

    def stop_waiting(self) -> None:
        """Answer the polls that are held and end the watches; called on the event loop."""
        self._stopping = True
        self._backend.work.notify()
        self._backend.changed.notify()

    def _handler(self, method: wire.Method) -> grpc.RpcMethodHandler[Any, Any]:
        if method.streams:
            return grpc.unary_stream_rpc_method_handler(
                self._guarded(method, self._watch),
                request_deserializer=method.request.FromString,
                response_serializer=method.response.SerializeToString,
            )
        answer = self._poll if method.name == "PollTask" else self._answer
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(method, answer),
            request_deserializer=method.request.FromString,
            response_serializer=method.response.SerializeToString,
        )

    def _guarded(
        self, method: wire.Method, answer: Callable[[_Call, Context], Awaitable[Message | None]]
    ) -> Callable[[Message, Context], Awaitable[Message | None]]:
        """The boundary: what an answer raises becomes a status."""

        async def handle(request: Message, context: Context) -> Message | None:
            try:
                return await answer(_Call.of(method, request, context), context)
            except WeftError as error:
                logger.info("%s refused: %s: %s", method.name, type(error).__name__, error)
                return await context.abort(*wire.abort_details(error))
            except Exception:
                logger.exception("%s failed", method.name)
                return await context.abort(grpc.StatusCode.INTERNAL, "an unexpected error")

        return handle

    async def _answer(self, call: _Call, _: Context) -> Message:
        """One question to the backend, in a thread."""
        executor = self._blobs if call.method.snake_name in BLOB_METHODS else self._state
        return await asyncio.get_running_loop().run_in_executor(executor, self._work, call)

    def _work(self, call: _Call) -> Message:
        who = self._who(call)
        answer = getattr(self._backend, call.method.snake_name)(who, **wire.fields(call.request))
        return wire.to_response(answer, call.method.response, time_s=self._clock())

    def _who(self, call: _Call) -> Caller | str:
        """The caller, if the role may do this; the address where no session is needed."""
        roles = ROLES[call.method.name]
        if roles is None:
            return call.address
        if not call.session_token:
            raise SessionExpired("there is no session", hint="join first: weft join HOST:PORT TOKEN")
        caller = self._backend.authenticate(call.session_token)
        if caller.role not in roles:
            raise PermissionRefused(
                f"{call.method.name} is not for the role {caller.role.name.lower()}",
                hint="join with a token of another role: weft token create --role",
            )
        return caller

    async def _poll(self, call: _Call, context: Context) -> Message:
        """Ask again after each change until there is a task, or nothing to wait for, or the time is over."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + min(cast("task_pb2.PollTaskRequest", call.request).wait_s, POLL_MAX_S)
        while True:
            revision = self._backend.work.revision
            message = cast("task_pb2.PollTaskResponse", await self._answer(call, context))
            left_s = end_s - loop.time()
            if message.HasField("task") or message.finished or left_s <= 0 or self._stopping:
                return message
            await self._backend.work.wait(revision, left_s)

    async def _watch(self, call: _Call, context: Context) -> None:
        """Send the status now and after changes, at most twice a second, until the session ends."""
        loop = asyncio.get_running_loop()
        sent = -1
        while not self._stopping:
            revision = self._backend.changed.revision
            if revision != sent:
                await context.write(await self._answer(call, context))
                sent = revision
                await asyncio.sleep(WATCH_INTERVAL_S)
            else:
                await loop.run_in_executor(self._state, self._who, call)
            await self._backend.changed.wait(revision, SESSION_CHECK_S)
        raise Unreachable("the coordinator is stopping", hint="try again when it runs")


def _address(peer: str) -> str:
    """The address in gRPC's words for a peer, such as ``ipv6:%5B::1%5D:4711``, without the port."""
    host, _, _ = unquote(peer).partition(":")[2].rpartition(":")
    return host.strip("[]")


# --- the server ---


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServer:
    """A server that listens."""

    port: int
    """The port, also where 0 was asked for."""
    _server: grpc.aio.Server
    _servicer: CoordinatorServicer
    _health: health.aio.HealthServicer

    async def stop(self, grace_s: float = 5.0) -> None:
        """Take no more calls, answer those that wait, give the others ``grace_s`` to end."""
        await self._health.enter_graceful_shutdown()
        self._servicer.stop_waiting()
        await self._server.stop(grace_s)


async def serve(
    backend: Backend,
    *,
    state: Executor,
    blobs: Executor,
    host: str,
    port: int,
    credentials: Credentials | None,
    clock: Callable[[], float] = time.time,
) -> RunningServer:
    """Listen on ``host``:``port`` and serve ``backend``, beside the health service.

    Args:
        backend: What answers.
        state: Threads for all methods but those of ``BLOB_METHODS``.
        blobs: Threads for those; may be the same.
        host: Name or address of an interface; ``0.0.0.0`` or ``::`` for all.
        port: 0 takes a free one.
        credentials: Asked at each handshake, so that a renewed leaf is served at once; None serves without
            TLS, on loopback only.
        clock: Unix seconds.

    Raises:
        PortTaken: Something else listens there.
        UsageError: The address is not of this machine or not allowed, or without TLS not a loopback one.
    """
    if credentials is None and not wire.is_loopback(host):
        raise UsageError(
            f"without TLS a coordinator does not listen on {host}",
            hint="leave --insecure away, or listen on 127.0.0.1",
        )
    server = grpc.aio.server(options=wire.SERVER_OPTIONS, maximum_concurrent_rpcs=CALLS_MAX)
    servicer = CoordinatorServicer(backend, state=state, blobs=blobs, clock=clock)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(wire.SERVICE_NAME, servicer.handlers()),)
    )
    healthy = await _add_health(server)
    bound = _bind(server, host, port, credentials)
    await server.start()
    return RunningServer(port=bound, _server=server, _servicer=servicer, _health=healthy)


async def _add_health(server: grpc.aio.Server) -> health.aio.HealthServicer:
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for service in ("", wire.SERVICE_NAME):
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    return servicer


def _bind(server: grpc.aio.Server, host: str, port: int, credentials: Credentials | None) -> int:
    _check_free(host, port)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, _tls(credentials))
    except RuntimeError as error:
        raise _in_use(host, port) from error


def _tls(credentials: Credentials) -> grpc.ServerCredentials:
    def configuration() -> grpc.ServerCertificateConfiguration:
        chain_pem, key_pem = credentials()
        return grpc.ssl_server_certificate_configuration([(key_pem.encode(), chain_pem.encode())])

    return grpc.dynamic_ssl_server_credentials(configuration(), configuration)


def _check_free(host: str, port: int) -> None:
    """Try the address by hand first: gRPC says that it failed and no more."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does: connections that a stopped coordinator left behind do not hold the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _in_use(host, port) from error
        cause = error.strerror or error
        raise UsageError(f"cannot listen on {host}:{port}: {cause}", hint=_LISTEN_HINT) from error


def _in_use(host: str, port: int) -> PortTaken:
    return PortTaken(f"{host}:{port} is in use", hint=f"stop what uses it, or {_LISTEN_HINT}")


_LISTEN_HINT: Final = "choose another --listen HOST:PORT"
