"""The gRPC edges over real TLS on a free port, with a backend that only remembers."""

import asyncio
import contextlib
import dataclasses
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from weft.client.transfer import IN_FLIGHT
from weft.client.transport import Transport
from weft.common import wire
from weft.common.blobs import BlobStore, manifest_of
from weft.common.errors import (
    ConflictingUpdate,
    CorruptState,
    IdentityMismatch,
    LeaseLost,
    NotFound,
    PermissionRefused,
    PortTaken,
    SessionExpired,
    SubmissionRefused,
    TransferStalled,
    Unreachable,
    UsageError,
    WeftError,
)
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.identity.session import verify_session
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, RunId, TaskId, WorkerId
from weft.common.protocol import (
    CHUNK_BYTES,
    BlobManifest,
    Joined,
    LossPoint,
    Missing,
    PollAnswer,
    ProgressAnswer,
    Receipt,
    ResolvedModule,
    Role,
    RoundState,
    RoundStatus,
    Session,
    Signed,
    Stage,
    Status,
    TokenStatus,
    Unable,
)
from weft.server import service
from weft.server.backend import Caller, Changes
from weft.server.service import ROLES, RunningServer, serve

SIGNED = Signed(payload=b"{}", payload_type="t", signature=b"s" * 64, key_id="k")
DIGEST = Digest("ab" * 32)
LEASE = "lease"


class FakeBackend:
    """Remembers what it was asked, keeps real blobs, and fails when it is told to."""

    def __init__(self, root: Path, pin: bytes) -> None:
        self.changed, self.work = Changes(), Changes()
        self.blobs = BlobStore(root)
        self.pin = pin
        self.sessions: dict[str, Caller] = {}
        self.members: dict[str, tuple[bytes, Role]] = {}
        self.nonces: dict[str, bytes] = {}
        self.life_s = 900.0
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, list[object]] = {}
        self.polled = threading.Semaphore(0)
        self.before: Callable[[str, dict[str, Any]], None] = lambda name, fields: None
        self.after: Callable[[str, dict[str, Any]], None] = lambda name, fields: None

    def add(self, worker_id: str, role: Role) -> SigningKey:
        key = SigningKey.generate()
        self.members[worker_id] = key.public, role
        return key

    def authenticate(self, session_token: str) -> Caller:
        if session_token not in self.sessions:
            raise SessionExpired("the session is over", hint="open another")
        return self.sessions[session_token]

    def start_session(self, peer: str, *, worker_id: str) -> bytes:
        if worker_id not in self.members:
            raise NotFound(f"there is no worker {worker_id}")
        self.nonces[worker_id] = bytes(32)
        return self.nonces[worker_id]

    def open_session(self, peer: str, *, worker_id: str, statement: Signed) -> Session:
        public, role = self.members[worker_id]
        nonce = self.nonces.pop(worker_id)
        if not verify_session(public, nonce, self.pin, WorkerId(worker_id), signature=statement.signature):
            raise SessionExpired("the signature is wrong")
        token = f"session-{worker_id}-{len(self.sessions)}"
        self.sessions[token] = Caller(worker_id=WorkerId(worker_id), role=role, runs=(), peer=peer)
        return Session(session_token=token, expires_at=1000.0 + self.life_s)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in ANSWERS:
            raise AttributeError(name)

        def method(who: Caller | str, **fields: Any) -> object:
            self.asked.append((name, fields | {"who": who}))
            self.before(name, fields)
            answer = ANSWERS[name]
            queue = self.answers.get(name)
            result = queue.pop(0) if queue else answer(self, fields) if callable(answer) else answer
            self.after(name, fields)
            if name == "poll_task":
                self.polled.release()
            if isinstance(result, Exception):
                raise result
            return result

        return method

    def counted(self, name: str) -> list[dict[str, Any]]:
        return [fields for asked, fields in self.asked if asked == name]


def _find(backend: FakeBackend, fields: dict[str, Any]) -> Missing:
    return backend.blobs.begin(fields["blob"], bytes_max=2**30)


STATUS = Status(coordinator="c", started_at=1.0, taken_at=2.0, runs=(), workers=())
ROUND = RoundStatus(
    run_id="r", module="0.0", round_number=1, base_version=0, state=RoundState.MERGING, reason="quorum",
    num_updates=2, target=3, quorum=2, num_in_flight=0,
)  # fmt: skip
TOKEN = TokenStatus(
    token_id="ABCDEF", role=Role.WORKER, expires_at=5.0, num_uses_left=1, needs_approval=False, runs=(),
    label="", revoked=False,
)  # fmt: skip
JOINED = Joined(
    worker_id=WorkerId("w"),
    approved=True,
    role=Role.WORKER,
    coordinator_public_key=b"k" * 32,
    endorsement=b"e",
)
RESOLVED = ResolvedModule(recipe=SIGNED, manifests=(SIGNED,), coordinator_public_key=b"k", endorsement=b"e")
WAIT = PollAnswer(task=None, wait_reason="no round is open", finished=False)
ANSWERS: dict[str, Any] = {
    "join": JOINED,
    "poll_task": WAIT,
    "report_progress": ProgressAnswer(stop=False, reason=""),
    "submit_update": Receipt(receipt_blake3=DIGEST, accepted_at=3.0),
    "release_task": None,
    "find_missing": _find,
    "put_chunk": lambda b, f: b.blobs.put_chunk(f["blake3"], f["index"], f["data"]),
    "commit_blob": lambda b, f: b.blobs.commit(f["blake3"]),
    "get_blob": lambda b, f: b.blobs.manifest(f["blake3"]),
    "get_chunk": lambda b, f: b.blobs.read_chunk(f["blake3"], f["index"]),
    "get_recipe": SIGNED,
    "resolve_module": RESOLVED,
    "list_versions": (SIGNED, SIGNED),
    "get_status": STATUS,
    "watch_run": STATUS,
    "list_rounds": (ROUND,),
    "create_token": "WEFT1.TOKEN",
    "list_tokens": (TOKEN,),
    "revoke_token": None,
    "approve_worker": None,
    "revoke_worker": None,
}


class Running:
    """A server in a thread with an event loop, and clients of it."""

    def __init__(self, backend: FakeBackend, identity: CoordinatorIdentity | None) -> None:
        self.backend = backend
        self.identity = identity
        self.state = ThreadPoolExecutor(1)
        self.blobs = ThreadPoolExecutor(4)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server: RunningServer | None = None
        self.port = 0

    def run(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        return future.result(30)

    def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        identity = self.identity

        def credentials() -> tuple[str, str]:
            assert identity is not None
            return identity.leaf.chain_pem, identity.leaf.key_pem

        self.server = self.run(
            serve(
                self.backend,
                state=self.state,
                blobs=self.blobs,
                host=host,
                port=port,
                credentials=credentials if identity else None,
                clock=lambda: 1000.0,
            )
        )
        self.port = self.server.port

    def stop(self, grace_s: float = 0.0) -> None:
        if self.server is not None:
            self.run(self.server.stop(grace_s))
            self.server = None

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.state.shutdown()
        self.blobs.shutdown()

    def transport(self, **more: Any) -> Transport:
        ca_pem = self.identity.ca_pem if self.identity else None
        tls_name = self.identity.tls_name if self.identity else ""
        more = {"ca_pem": ca_pem, "tls_name": tls_name, "jitter": random.Random(0).random} | more
        return Transport(f"127.0.0.1:{self.port}", **more)

    def joined(self, role: Role, **more: Any) -> Transport:
        assert self.identity is not None
        transport = self.transport(**more)
        key = self.backend.add(role.name, role)
        transport.open_session(WorkerId(role.name), key, self.identity.pin)
        return transport


@pytest.fixture(scope="module")
def identity(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorIdentity:
    directory = tmp_path_factory.mktemp("state") / "identity"
    return CoordinatorIdentity.create_or_load(directory, ["127.0.0.1"], datetime.now(UTC))


@pytest.fixture
def running(tmp_path: Path, identity: CoordinatorIdentity) -> Iterator[Running]:
    made = Running(FakeBackend(tmp_path / "blobs", identity.pin), identity)
    with contextlib.closing(made):
        made.start()
        yield made


@pytest.fixture
def worker(running: Running) -> Iterator[Transport]:
    with running.joined(Role.WORKER) as transport:
        yield transport


@pytest.fixture
def admin(running: Running) -> Iterator[Transport]:
    with running.joined(Role.ADMIN) as transport:
        yield transport


# --- each RPC ---

BLOB = BlobManifest(blake3=DIGEST, size_bytes=1, chunk_blake3=(DIGEST,))
CALLS: dict[str, Callable[[Transport], object]] = {
    "Join": lambda t: t.join(token_id="ABCDEF", statement=SIGNED, proof=b"p"),
    "PollTask": lambda t: t.poll_task(
        wait_s=0, unable=(Unable(run_id="r", reason="small"),), tokens_per_s=3.0
    ),
    "ReportProgress": lambda t: t.report_progress(
        lease_token=LEASE,
        stage=Stage.TRAINING,
        num_done=1,
        num_total=2,
        losses=(LossPoint(step=1, loss=0.5),),
    ),
    "SubmitUpdate": lambda t: t.submit_update(lease_token=LEASE, statement=SIGNED),
    "ReleaseTask": lambda t: t.release_task(lease_token=LEASE, reason="stopped"),
    "FindMissing": lambda t: t.find_missing(lease_token=LEASE, blob=BLOB),
    "PutChunk": lambda t: t.put_chunk(lease_token=LEASE, blake3=DIGEST, index=0, data=b"x"),
    "CommitBlob": lambda t: t.commit_blob(lease_token=LEASE, blake3=DIGEST),
    "GetBlob": lambda t: t.get_blob(blake3=DIGEST),
    "GetChunk": lambda t: t.get_chunk(blake3=DIGEST, index=0),
    "GetRecipe": lambda t: t.get_recipe("r"),
    "ResolveModule": lambda t: t.resolve_module("r/0.0"),
    "ListVersions": lambda t: t.list_versions("r"),
    "GetStatus": lambda t: t.get_status(),
    "WatchRun": lambda t: next(iter(t.watch())),
    "ListRounds": lambda t: t.list_rounds("r", "0.0"),
    "CreateToken": lambda t: t.create_token(request_id="1", role=Role.VIEWER, runs=("r",)),
    "ListTokens": lambda t: t.list_tokens(),
    "RevokeToken": lambda t: t.revoke_token("ABCDEF"),
    "ApproveWorker": lambda t: t.approve_worker("w"),
    "RevokeWorker": lambda t: t.revoke_worker("w"),
}


def test_there_is_a_call_for_every_rpc() -> None:
    assert CALLS.keys() | {"StartSession", "OpenSession"} == wire.METHODS.keys()
    assert ANSWERS.keys() | {"start_session", "open_session"} == {
        method.snake_name for method in wire.METHODS.values()
    }


@pytest.mark.parametrize("role", Role, ids=lambda role: role.name.lower())
def test_every_role_gets_what_the_table_says(running: Running, role: Role) -> None:
    running.backend.blobs.add_bytes(b"x")
    with running.joined(role) as transport:
        for name, call in CALLS.items():
            allowed = ROLES[name]
            before = len(running.backend.asked)
            if allowed is None or role in allowed:
                # Of the fake's blob store: it was asked, and that counts.
                with contextlib.suppress(NotFound, CorruptState, SubmissionRefused):
                    call(transport)
                assert len(running.backend.asked) == before + 1, name
            else:
                with pytest.raises(
                    PermissionRefused, match=f"{name} is not for the role {role.name.lower()}"
                ):
                    call(transport)
                assert len(running.backend.asked) == before, name


def channel_to(running: Running) -> grpc.Channel:
    assert running.identity is not None
    credentials = grpc.ssl_channel_credentials(running.identity.ca_pem.encode())
    options = [("grpc.ssl_target_name_override", running.identity.tls_name)]
    return grpc.secure_channel(f"127.0.0.1:{running.port}", credentials, options=options)


def code_of(channel: grpc.Channel, method: wire.Method, token: str) -> grpc.StatusCode:
    """What an empty request with this session token is answered."""
    path = f"/{wire.SERVICE_NAME}/{method.name}"
    make: Any = channel.unary_stream if method.streams else channel.unary_unary
    call = make(path, method.request.SerializeToString, method.response.FromString)
    made = call.future if not method.streams else call
    answer = made(method.request(), metadata=((wire.SESSION_KEY, token),) if token else (), timeout=10)
    with contextlib.suppress(grpc.RpcError):
        list(answer) if method.streams else answer.result()
    code: grpc.StatusCode = answer.code()
    return code


def test_every_call_but_the_first_three_needs_a_session(running: Running) -> None:
    with channel_to(running) as channel:
        for name, method in wire.METHODS.items():
            for token in ("", "guessed"):
                refused = code_of(channel, method, token) is grpc.StatusCode.UNAUTHENTICATED
                assert refused == (name not in wire.SESSIONLESS), name
    assert running.backend.asked == []


def test_answers_and_requests_arrive_whole(running: Running, worker: Transport, admin: Transport) -> None:
    task_answer = PollAnswer(task=_task(), wait_reason="", finished=False)
    running.backend.answers["poll_task"] = [task_answer]
    unable = (Unable(run_id="r", reason="small"),)
    assert worker.poll_task(wait_s=9, unable=unable, tokens_per_s=3.0) == task_answer
    asked = running.backend.counted("poll_task")[0]
    assert (asked["wait_s"], asked["unable"], asked["tokens_per_s"]) == (9.0, unable, 3.0)
    assert asked["who"] == Caller(worker_id=WorkerId("WORKER"), role=Role.WORKER, runs=(), peer="127.0.0.1")
    assert CALLS["Join"](worker) == JOINED
    assert running.backend.counted("join")[0] == {
        "token_id": "ABCDEF", "statement": SIGNED, "proof": b"p", "who": "127.0.0.1",
    }  # fmt: skip
    assert CALLS["ReportProgress"](worker) == ANSWERS["report_progress"]
    assert running.backend.counted("report_progress")[0]["losses"] == (LossPoint(step=1, loss=0.5),)
    assert CALLS["SubmitUpdate"](worker) == ANSWERS["submit_update"]
    for name in (
        "GetRecipe",
        "ResolveModule",
        "ListVersions",
        "GetStatus",
        "ListRounds",
        "CreateToken",
        "ListTokens",
    ):
        assert CALLS[name](admin) == ANSWERS[wire.METHODS[name].snake_name], name
    assert running.backend.counted("create_token")[0]["runs"] == ("r",)


def _task() -> Any:
    from weft.common.protocol import ModuleStart, Task

    start = ModuleStart(
        module="0.0", version=1, blake3=DIGEST, size_bytes=9, train=True, round_number=2, steps_before=8
    )
    return Task(
        task_id=TaskId("t"), run_id=RunId("r"), lease_token=LEASE, lease_epoch=1, lease_s=15.0, path="0",
        modules=(start,), recipe_blake3=DIGEST, num_steps=4, update_bytes_max=10**6,
    )  # fmt: skip


# --- errors ---


def test_what_the_backend_refuses_arrives_as_its_class(running: Running, worker: Transport) -> None:
    running.backend.answers["submit_update"] = [ConflictingUpdate("another — payload", hint="nothing to do")]
    with pytest.raises(ConflictingUpdate, match="another — payload") as caught:
        CALLS["SubmitUpdate"](worker)
    assert caught.value.hint == "nothing to do"


def test_longest_words_arrive(running: Running, worker: Transport) -> None:
    running.backend.answers["submit_update"] = [ConflictingUpdate("—" * 5000, hint="‘" * 5000)]
    with pytest.raises(ConflictingUpdate) as caught:
        CALLS["SubmitUpdate"](worker)
    assert len(caught.value.message) == len(caught.value.hint) == wire.TEXT_MAX


def test_bug_is_logged_and_tells_nothing(
    running: Running, worker: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    running.backend.answers["submit_update"] = [RuntimeError("secret detail"), {"wrong": 1}]
    for _ in range(2):
        with pytest.raises(WeftError, match="unexpected error") as caught:
            CALLS["SubmitUpdate"](worker)
        assert type(caught.value) is WeftError
    assert "secret detail" in caplog.text


def test_malformed_request_is_refused_before_the_backend(running: Running, worker: Transport) -> None:
    with pytest.raises(UsageError, match="wait_s is not finite"):
        worker._send(
            wire.METHODS["PollTask"],
            wire.METHODS["PollTask"].request(wait_s=float("nan")),
            worker._session_token(),
            5.0,
            lambda: False,
        )
    assert running.backend.asked == []


def test_wrong_authority_and_wrong_name_are_no_coordinator(
    running: Running, tmp_path: Path, identity: CoordinatorIdentity
) -> None:
    other = CoordinatorIdentity.create_or_load(tmp_path / "other", [], datetime.now(UTC))
    for ca_pem, name in ((other.ca_pem, other.tls_name), (identity.ca_pem, other.tls_name)):
        with running.transport(ca_pem=ca_pem, tls_name=name) as transport, pytest.raises(IdentityMismatch):
            CALLS["Join"](transport)
    assert running.backend.asked == []


def test_nobody_there_is_unreachable(running: Running) -> None:
    running.stop()
    with running.transport() as transport, pytest.raises(Unreachable):
        CALLS["Join"](transport)


# --- sessions ---


def test_session_is_opened_anew_when_the_coordinator_forgot_it(running: Running, worker: Transport) -> None:
    running.backend.sessions.clear()
    CALLS["ReleaseTask"](worker)
    assert len(running.backend.sessions) == 1
    running.backend.members.clear()
    running.backend.sessions.clear()
    with pytest.raises(NotFound, match="no worker"):
        CALLS["ReleaseTask"](worker)


def test_session_is_renewed_before_it_ends(running: Running) -> None:
    time = FakeStop()
    with running.joined(Role.WORKER, clock=lambda: time.now_s) as worker:
        for now_s, num_sessions in ((599.0, 1), (600.0, 2), (1199.0, 2), (1200.0, 3)):
            time.now_s = now_s
            CALLS["ReleaseTask"](worker)
            assert len(running.backend.sessions) == num_sessions


def test_wrong_key_opens_no_session(running: Running, identity: CoordinatorIdentity) -> None:
    running.backend.add("w", Role.WORKER)
    with running.transport() as transport:
        with pytest.raises(SessionExpired, match="has not joined"):
            CALLS["PollTask"](transport)
        with pytest.raises(SessionExpired, match="signature is wrong"):
            transport.open_session(WorkerId("w"), SigningKey.generate(), identity.pin)


def test_renewed_leaf_is_served_to_the_next_connection(
    running: Running, identity: CoordinatorIdentity
) -> None:
    def served() -> bytes:
        import ssl

        context = ssl.create_default_context(cadata=identity.ca_pem)
        context.set_alpn_protocols(["h2"])
        with (
            socket.create_connection(("127.0.0.1", running.port)) as plain,
            context.wrap_socket(plain, server_hostname=identity.tls_name) as tls,
        ):
            return tls.getpeercert(binary_form=True) or b""

    before = served()
    assert served() == before
    assert identity.renew_if_due(datetime.now(UTC) - timedelta(days=1))  # as if the clock had been set back
    assert served() != before


# --- waiting ---


def test_poll_ends_as_soon_as_there_is_work(running: Running, worker: Transport) -> None:
    found = PollAnswer(task=_task(), wait_reason="", finished=False)
    running.backend.answers["poll_task"] = [WAIT, WAIT, found]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(worker.poll_task, wait_s=30)
        for _ in range(2):
            assert running.backend.polled.acquire(timeout=10)
            running.backend.changed.notify()  # of no concern to a poll
            running.backend.work.notify()
        assert answer.result(10) == found
    assert len(running.backend.counted("poll_task")) == 3


@pytest.mark.parametrize(
    ("wait_s", "answer"),
    [(0.0, WAIT), (0.05, WAIT), (30.0, dataclasses.replace(WAIT, finished=True))],
    ids=["no-time", "time-over", "finished"],
)
def test_poll_ends_without_work(
    running: Running, worker: Transport, wait_s: float, answer: PollAnswer
) -> None:
    running.backend.answers["poll_task"] = [answer, answer]
    assert worker.poll_task(wait_s=wait_s) == answer


def test_stop_ends_a_poll(running: Running) -> None:
    stop = threading.Event()
    with running.joined(Role.WORKER, stop=stop) as worker, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(worker.poll_task, wait_s=30)
        assert running.backend.polled.acquire(timeout=10)
        stop.set()
        with pytest.raises(Unreachable, match="broken off"):
            answer.result(10)
        CALLS["ReleaseTask"](worker)  # what does something goes on


def test_server_that_stops_answers_its_polls(running: Running, worker: Transport) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(worker.poll_task, wait_s=30)
        assert running.backend.polled.acquire(timeout=10)
        running.stop(grace_s=10)
        assert answer.result(10) == WAIT


def test_watch_follows_changes_and_ends_with_the_session(
    running: Running, admin: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "WATCH_INTERVAL_S", 0.01)
    numbered = [dataclasses.replace(STATUS, coordinator=str(number)) for number in range(3)]
    running.backend.answers["watch_run"] = list(numbered)
    watch = admin.watch("r")
    for status in numbered:
        assert next(watch) == status
        running.backend.changed.notify()
    # The session ends: the transport opens another and goes on.
    running.backend.sessions.clear()
    running.backend.changed.notify()
    while running.backend.sessions == {}:
        assert next(watch) == STATUS
    watch.close()  # type: ignore[attr-defined]
    running.backend.members.clear()
    running.backend.sessions.clear()
    with pytest.raises(NotFound):
        next(admin.watch("r"))


def test_watch_is_held_to_its_interval(
    running: Running, admin: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "WATCH_INTERVAL_S", 30.0)
    watch = admin.watch()
    next(watch)
    for _ in range(100):
        running.backend.changed.notify()
    watch.close()  # type: ignore[attr-defined]
    assert len(running.backend.counted("watch_run")) == 1


def test_stop_ends_a_watch_and_a_stopping_server_too(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "WATCH_INTERVAL_S", 0.01)
    stop = threading.Event()
    with running.joined(Role.VIEWER, stop=stop) as viewer:
        watch = viewer.watch()
        next(watch)
        stop.set()
        assert list(watch) == []
    with running.joined(Role.ADMIN) as viewer:
        watch = viewer.watch()
        next(watch)
        running.stop(grace_s=10)
        with pytest.raises(Unreachable):
            list(watch)


def test_health(running: Running) -> None:
    with channel_to(running) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        for name in ("", "weft.v1.CoordinatorService"):
            answer = check(health_pb2.HealthCheckRequest(service=name), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


# --- listening ---


def test_taken_port_and_foreign_addresses_are_refused(running: Running) -> None:
    with pytest.raises(PortTaken, match="in use"):
        running.start(port=running.port)
    with pytest.raises(UsageError, match="cannot listen"):
        running.start(host="192.0.2.1")


def test_without_tls_only_loopback(tmp_path: Path) -> None:
    plain = Running(FakeBackend(tmp_path / "blobs", bytes(32)), None)
    with contextlib.closing(plain):
        for host in ("0.0.0.0", "192.0.2.1", "example.org"):  # noqa: S104
            with pytest.raises(UsageError, match="without TLS"):
                plain.start(host=host)
        plain.start()
        key = plain.backend.add("w", Role.WORKER)
        with plain.transport() as transport:
            transport.open_session(WorkerId("w"), key, bytes(32))
            CALLS["ReleaseTask"](transport)
    with pytest.raises(UsageError, match="without TLS"):
        Transport("192.0.2.1:1", ca_pem=None)


def test_plaintext_client_gets_nothing_from_a_tls_server(running: Running) -> None:
    with running.transport(ca_pem=None) as plain, pytest.raises(Unreachable):
        CALLS["Join"](plain)
    assert running.backend.asked == []


# --- transfers ---

DATA = random.Random(1).randbytes(9 * CHUNK_BYTES + 17)
NUM_CHUNKS = 10


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "update"
    path.write_bytes(DATA)
    return path


class Cuts:
    """Cuts the connection at the n-th chunks, before or after the other side took them."""

    def __init__(self, name: str, before: frozenset[int], after: frozenset[int]) -> None:
        self.name, self.at = name, {"before": before, "after": after}
        self.seen: Counter[str] = Counter()
        self.done = 0
        self.lock = threading.Lock()

    def cut(self, when: str) -> Callable[[str, dict[str, Any]], None]:
        def maybe(name: str, _: dict[str, Any]) -> None:
            if name != self.name:
                return
            with self.lock:
                self.seen[when] += 1
                if self.seen[when] in self.at[when]:
                    self.done += 1
                    raise Unreachable("cut")

        return maybe


@pytest.mark.parametrize("name", ["put_chunk", "get_chunk"])
def test_transfers_survive_cuts_and_repeat_one_chunk_each(
    running: Running, worker: Transport, source: Path, tmp_path: Path, name: str
) -> None:
    cuts = Cuts(name, before=frozenset({1, 4}), after=frozenset({2, 7}))
    running.backend.before, running.backend.after = cuts.cut("before"), cuts.cut("after")
    reached: list[tuple[int, int]] = []
    stop = FakeStop()
    worker._stop = stop
    if name == "put_chunk":
        manifest = worker.upload(source, LEASE, idle_s=60, progress=lambda *at: reached.append(at))
        path = running.backend.blobs.path(manifest.blake3)
    else:
        manifest = running.backend.blobs.add_file(source)
        path = worker.download(
            manifest.blake3, tmp_path / "copy", idle_s=60, progress=lambda *at: reached.append(at)
        )
    assert path.read_bytes() == DATA
    assert cuts.done == 4
    sent = Counter(fields["index"] for fields in running.backend.counted(name))
    # A chunk whose answer was lost is not sent again, but has to be fetched again.
    assert sum(sent.values()) == NUM_CHUNKS + (2 if name == "put_chunk" else 4)
    assert [there for there, _ in reached] == sorted(there for there, _ in reached)
    assert reached[0] == (0, len(DATA))
    assert reached[-1] == (len(DATA), len(DATA))


class FakeStop(threading.Event):
    """Pauses end at once and move the clock on."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def wait(self, timeout: float | None = None) -> bool:
        self.now_s += timeout or 0.0
        return self.is_set()


def test_upload_goes_on_where_another_process_ended(
    running: Running, worker: Transport, source: Path
) -> None:
    real = ANSWERS["put_chunk"]
    taken: list[int] = []

    def take_four(name: str, fields: dict[str, Any]) -> None:
        if name == "put_chunk":
            if len(taken) >= 4:
                raise LeaseLost("the lease is lost")
            taken.append(fields["index"])
            real(running.backend, fields)

    running.backend.before = take_four
    with pytest.raises(LeaseLost):
        worker.upload(source, LEASE, idle_s=60)
    running.backend.before = lambda name, fields: None
    running.backend.asked.clear()
    reached: list[int] = []
    worker.upload(source, LEASE, idle_s=60, progress=lambda there, _: reached.append(there))
    sent = [fields["index"] for fields in running.backend.counted("put_chunk")]
    assert sorted(sent) == sorted(set(range(NUM_CHUNKS)) - set(taken))
    assert reached[0] > 0
    worker.upload(source, LEASE, idle_s=60)
    assert len(running.backend.counted("put_chunk")) == len(sent)
    assert len(running.backend.counted("commit_blob")) == 1


def test_upload_survives_a_restart_of_the_coordinator(
    running: Running, worker: Transport, source: Path, tmp_path: Path
) -> None:
    restarted = False

    def restart(name: str, _: dict[str, Any]) -> None:
        nonlocal restarted
        if name == "commit_blob" and not restarted:
            # All that was in memory is gone, the sessions too; so is a chunk that had not reached the disk.
            restarted = True
            part = next((tmp_path / "blobs" / "partial").iterdir())
            part.write_bytes(part.read_bytes()[: 3 * CHUNK_BYTES])
            running.backend.blobs = BlobStore(tmp_path / "blobs")
            running.backend.sessions.clear()
            raise Unreachable("killed")

    running.backend.before = restart
    worker._stop = FakeStop()
    manifest = worker.upload(source, LEASE, idle_s=60)
    assert running.backend.blobs.path(manifest.blake3).read_bytes() == DATA
    assert len(running.backend.counted("find_missing")) == 2
    assert len(running.backend.counted("put_chunk")) == NUM_CHUNKS + 7


def test_upload_survives_a_lost_connection(running: Running, worker: Transport, source: Path) -> None:
    lock = threading.Lock()
    restarts: list[int] = []

    def restart(name: str, fields: dict[str, Any]) -> None:
        with lock:
            if name == "put_chunk" and fields["index"] == 5 and not restarts:
                port = running.port
                running.stop()
                running.start(port=port)
                restarts.append(port)

    running.backend.after = restart
    manifest = worker.upload(source, LEASE, idle_s=60)
    assert running.backend.blobs.path(manifest.blake3).read_bytes() == DATA
    assert restarts == [running.port]
    # At most what was under way at that moment.
    assert len(running.backend.counted("put_chunk")) <= NUM_CHUNKS + IN_FLIGHT


def test_silence_fails_a_transfer_and_its_parts_are_used_later(
    running: Running, source: Path, tmp_path: Path
) -> None:
    manifest = running.backend.blobs.add_file(source)
    stop = FakeStop()

    def silent_after_three(name: str, fields: dict[str, Any]) -> None:
        if name == "get_chunk" and fields["index"] > 2:
            raise Unreachable("silence")

    running.backend.before = silent_after_three
    with (
        running.joined(Role.WORKER, stop=stop, clock=lambda: stop.now_s) as worker,
        pytest.raises(TransferStalled, match="no further"),
    ):
        worker.download(manifest.blake3, tmp_path / "copy", idle_s=60)
    assert 60 <= stop.now_s < 600
    assert not (tmp_path / "copy").exists()
    running.backend.before = lambda name, fields: None
    running.backend.asked.clear()
    with running.transport(member=worker._member) as again:
        again.download(manifest.blake3, tmp_path / "copy", idle_s=60)
    assert sorted(fields["index"] for fields in running.backend.counted("get_chunk")) == list(
        range(3, NUM_CHUNKS)
    )
    assert (tmp_path / "copy").read_bytes() == DATA
    assert [path.name for path in tmp_path.glob(".copy*")] == []


def test_stop_ends_a_transfer_that_waits(running: Running, worker: Transport, source: Path) -> None:
    def cut(name: str, _: dict[str, Any]) -> None:
        if name == "put_chunk":
            worker._stop.set()
            raise Unreachable("cut")

    running.backend.before = cut
    with pytest.raises(Unreachable, match="cut"):
        worker.upload(source, LEASE, idle_s=60)


def test_download_into_a_store(running: Running, worker: Transport, source: Path, tmp_path: Path) -> None:
    manifest = running.backend.blobs.add_file(source)
    store = BlobStore(tmp_path / "cache")
    for _ in range(2):
        path = worker.download(manifest.blake3, store, idle_s=60, size_bytes=len(DATA))
        assert path == store.path(manifest.blake3)
        assert path.read_bytes() == DATA
    assert len(running.backend.counted("get_chunk")) == NUM_CHUNKS
    worker.download(manifest.blake3, path, idle_s=60)
    assert len(running.backend.counted("get_chunk")) == NUM_CHUNKS


def test_corrupt_chunks_are_found_on_either_side(
    running: Running, worker: Transport, source: Path, tmp_path: Path
) -> None:
    manifest = running.backend.blobs.add_file(source)
    running.backend.answers["get_chunk"] = [bytes(CHUNK_BYTES)]
    with pytest.raises(CorruptState, match="not what was declared"):
        worker.download(manifest.blake3, tmp_path / "copy", idle_s=60)
    stored = running.backend.blobs.path(manifest.blake3)
    stored.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    with pytest.raises(CorruptState, match="damaged"):
        worker.download(manifest.blake3, tmp_path / "copy", idle_s=60)
    assert not (tmp_path / "copy").exists()
    running.backend.blobs.remove(manifest.blake3)

    def change(name: str, _: dict[str, Any]) -> None:
        if name == "find_missing":
            source.write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))

    running.backend.before = change
    with pytest.raises(CorruptState, match="not what was declared"):
        worker.upload(source, LEASE, idle_s=60)
    assert not running.backend.blobs.has(manifest.blake3)


def test_answers_that_do_not_fit_are_refused(
    running: Running, worker: Transport, source: Path, tmp_path: Path
) -> None:
    manifest = manifest_of(source)
    running.backend.answers["get_blob"] = [manifest, manifest]
    with pytest.raises(CorruptState, match="another blob"):
        worker.download(DIGEST, tmp_path / "copy", idle_s=60)
    with pytest.raises(CorruptState, match="another blob"):
        worker.download(manifest.blake3, tmp_path / "copy", idle_s=60, size_bytes=5)
    running.backend.answers["find_missing"] = [Missing(complete=False, missing=(99,))]
    with pytest.raises(CorruptState, match="does not have"):
        worker.upload(source, LEASE, idle_s=60)
