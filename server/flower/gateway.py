"""The gateway: the ordinary coordinator on one side, nodes that are reached by messages on the other.

    node appears   →  hello            it answers with its key's signed statement, and is joined with a token of one use
    node is idle   →  poll_task        on its behalf; the task leaves as one message with all that the node lacks
    task is out    →  report_progress  on its behalf, for a node cannot: the lease lives as long as its message may
    answer comes   →  find_missing … submit_update, through the gates of any other worker
    message lost   →  release_task     the node left, the message's time is over, or the node answered with an error

A lease is one message, and the message's time to live is the longest that a task may take. What comes late or twice is
refused by the lease's epoch, as everywhere. Nothing here trusts what arrives: documents go through ``common.wire``,
blobs and statements through the coordinator.

It has one thread, no state that outlives it, and is a function of the post and the clock. After a restart nodes are
greeted again, and who held a lease is given the same task once more.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from google.protobuf.message import DecodeError

from weft.common import wire
from weft.common.blobs import digest_of
from weft.common.errors import (
    DiskFull,
    IdentityMismatch,
    InputError,
    StorageError,
    SubmissionRefused,
    WeftError,
)
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.identity.token import JoinToken, Role, join_proof
from weft.common.ids import Digest
from weft.common.manifest import Signed, parse_json
from weft.common.parcel import Parcel
from weft.common.protocol import CHUNK_BYTES, BlobManifest, Stage, Task
from weft.common.statements import STATEMENT_BYTES_MAX
from weft.server.backend import Caller
from weft.server.coordinator import Coordinator
from weft.server.roster import OPERATOR

logger = logging.getLogger(__name__)

TASK_S: Final = 3600.0
"""Longest time for a task, from its message to its answer, unless somebody says otherwise."""
HELLO_S: Final = 600.0
REPORTS_PER_LEASE: Final = 5
ASK_AGAIN_S: Final = 2.0
"""How often work is asked for on behalf of an idle node when nothing seems to have changed."""
BACKOFF_MAX_S: Final = 300.0
VERSIONS_KEPT: Final = 8
"""Blobs in memory, so that many nodes are sent the same one."""
_OPERATOR: Final = Caller(worker_id=OPERATOR, role=Role.ADMIN, runs=(), peer="local")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """There will be no answer to a message."""

    reason: str


class Post(Protocol):
    """What carries messages: Flower's grid, or something that stands for it."""

    def nodes(self) -> Collection[int]:
        """Nodes that can be reached now."""

    def send(self, node: int, parcel: Parcel, *, ttl_s: float, is_task: bool) -> str:
        """Send a message; returns its id, empty where it was not taken."""

    def receive(self, messages: Collection[str]) -> Iterable[tuple[str, Parcel | Lost]]:
        """Answers that came to some of these messages; each is given once."""


@dataclass(slots=True, kw_only=True)
class Out:
    """A message under way."""

    sent_s: float
    task: Task | None
    """None for a hello."""
    challenge: str = ""
    reported_s: float = 0.0
    is_over: bool = False
    """Whether its lease has ended already: the answer will come to nothing."""


@dataclass(slots=True, kw_only=True)
class Node:
    """What is known of a node."""

    caller: Caller | None = None
    """Who it is to the coordinator, once it said hello."""
    kept: frozenset[Digest] = frozenset()
    """Blobs that it has."""
    asks: Mapping[str, Any] = field(default_factory=lambda: {"unable": (), "tokens_per_s": 0.0, "limits": ()})
    """What its worker says with a poll."""
    message: str = ""
    out: Out | None = None
    answer: Parcel | None = None
    """To the message that is out, where the disk had no room for it; tried again."""
    num_failures: int = 0
    """In a row."""
    not_before_s: float = 0.0
    """Left alone until then."""
    asked: tuple[int, float] = (-1, 0.0)
    """The coordinator's revision, and when, as it was last told that there is no work."""

    def settle(self) -> None:
        """Nothing is out any more."""
        self.message, self.out, self.answer = "", None, None


class Gateway:
    """Lets nodes work for a coordinator until all runs are finished."""

    def __init__(
        self,
        coordinator: Coordinator,
        identity: CoordinatorIdentity,
        post: Post,
        *,
        clock: Callable[[], float],
        rng_bytes: Callable[[int], bytes],
        task_s: float = TASK_S,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            coordinator: With its runs started.
            identity: The coordinator's, shown to nodes.
            post: Carries messages.
            clock: Monotonic seconds.
            rng_bytes: That many unpredictable bytes.
            task_s: Longest time for a task.
            say: Takes lines for people.
        """
        self.nodes: dict[int, Node] = {}
        self.num_accepted = 0
        self.bytes_out = 0
        self.bytes_in = 0
        self._coordinator = coordinator
        self._post = post
        self._clock = clock
        self._rng_bytes = rng_bytes
        self._task_s = task_s
        self._say = say
        self._pin = identity.pin
        self._credentials = {
            "authority": identity.ca_pem.encode(),
            "coordinator-key": identity.signing_key.public,
            "endorsement": identity.endorse_signing_key(),
        }
        self._blobs: OrderedDict[Digest, bytes] = OrderedDict()

    def run(self, wait: Callable[[], object]) -> None:
        """Work until all runs are finished; ``wait`` passes a little time, and may raise to break off."""
        while not self.is_finished():
            try:
                self.turn()
            except DiskFull as error:
                # Nothing was changed by what failed, and the next turn tries again.
                logger.error("%s", error)
            wait()

    def is_finished(self) -> bool:
        """Whether there will be no more work, and none is being done."""
        runs = self._coordinator.get_status(_OPERATOR, run_id="").runs
        return all(run.finished for run in runs) and not self._coordinator.busy

    def turn(self) -> None:
        """Do what is to be done now."""
        online = frozenset(self._post.nodes())
        for gone in self.nodes.keys() - online:
            self._lose(self.nodes.pop(gone), f"node {gone} is gone")
        for node_id in sorted(online - self.nodes.keys()):
            self.nodes[node_id] = Node()
        self._collect()
        for node_id, node in self.nodes.items():
            self._keep(node) if node.out else self._employ(node_id, node)
        self._coordinator.tick()

    # ---- nodes with nothing to do --------------------------------------------------------------------------------

    def _employ(self, node_id: int, node: Node) -> None:
        """Greet it, or give it a task where there is one."""
        now_s = self._clock()
        if now_s < node.not_before_s:
            return
        try:
            self._greet(node_id, node) if node.caller is None else self._offer(node_id, node)
        except StorageError as error:
            # Our own disk, most likely: nothing was changed.
            logger.error("node %d: %s", node_id, error)
            node.not_before_s = now_s + ASK_AGAIN_S

    def _greet(self, node_id: int, node: Node) -> None:
        challenge = self._rng_bytes(16).hex()
        parcel = Parcel(documents={**self._credentials, "challenge": challenge.encode()})
        self._send(node_id, node, parcel, Out(sent_s=self._clock(), task=None, challenge=challenge))

    def _offer(self, node_id: int, node: Node) -> None:
        assert node.caller is not None  # noqa: S101 - greeted before
        revision, now_s = self._coordinator.work.revision, self._clock()
        if node.asked[0] == revision and now_s - node.asked[1] < ASK_AGAIN_S:
            return
        worker = self._coordinator.roster.workers.get(node.caller.worker_id)
        if worker is None or worker.revoked or not worker.approved:
            node.not_before_s = now_s + BACKOFF_MAX_S
            return
        answer = self._coordinator.poll_task(node.caller, **node.asks)
        if answer.task is None:
            node.asked = (revision, now_s)
            return
        parcel = self._task_parcel(node, node.caller, answer.task)
        self._send(node_id, node, parcel, Out(sent_s=now_s, task=answer.task, reported_s=now_s))

    def _send(self, node_id: int, node: Node, parcel: Parcel, out: Out) -> None:
        ttl_s = HELLO_S if out.task is None else self._task_s
        node.message = self._post.send(node_id, parcel, ttl_s=ttl_s, is_task=out.task is not None)
        node.out = out
        self.bytes_out += parcel.size_bytes
        if not node.message:
            self._lose(node, "the message was not taken")

    def _task_parcel(self, node: Node, caller: Caller, task: Task) -> Parcel:
        """A task with its signed recipe and the blobs that the node lacks."""
        wanted = [start.blake3 for start in task.modules]
        wanted += [ref.blake3 for ref in (task.router, task.shard) if ref is not None]
        poll = wire.to_message(
            {"task": task, "wait_reason": "", "finished": False}, wire.METHODS["PollTask"].response
        )
        recipe = self._coordinator.get_recipe(caller, run_id=task.run_id)
        get_recipe = wire.to_message({"recipe": recipe}, wire.METHODS["GetRecipe"].response)
        return Parcel(
            documents={
                **self._credentials,
                "worker": caller.worker_id.encode(),
                "PollTask": poll.SerializeToString(),
                "GetRecipe": get_recipe.SerializeToString(),
            },
            blobs={name: self._blob(caller, name) for name in wanted if name not in node.kept},
        )

    def _blob(self, caller: Caller, name: Digest) -> bytes:
        if name not in self._blobs:
            manifest = self._coordinator.get_blob(caller, blake3=name)
            chunks = range(len(manifest.chunk_blake3))
            self._blobs[name] = b"".join(
                self._coordinator.get_chunk(caller, blake3=name, index=index) for index in chunks
            )
            while len(self._blobs) > VERSIONS_KEPT:
                self._blobs.popitem(last=False)
        self._blobs.move_to_end(name)
        return self._blobs[name]

    # ---- messages under way --------------------------------------------------------------------------------------

    def _keep(self, node: Node) -> None:
        """Keep the lease of a task that is out, or give up its message."""
        out, now_s = node.out, self._clock()
        assert out is not None  # noqa: S101 - the caller looked
        ttl_s = HELLO_S if out.task is None else self._task_s
        if now_s - out.sent_s >= ttl_s:
            self._lose(node, f"no answer within {ttl_s:.0f} s")
        elif out.task and not out.is_over and now_s - out.reported_s >= out.task.lease_s / REPORTS_PER_LEASE:
            self._report(node, out, out.task, now_s)
            if node.answer is not None:
                self._take_in(node, out.task, node.answer)

    def _report(self, node: Node, out: Out, task: Task, now_s: float) -> None:
        """Say that the task goes on: seconds are all that is known of its progress."""
        out.reported_s = now_s
        assert node.caller is not None  # noqa: S101 - it was given a task
        try:
            answer = self._coordinator.report_progress(
                node.caller,
                lease_token=task.lease_token,
                stage=Stage.TRAINING,
                num_done=int(1000 * (now_s - out.sent_s)),
                num_total=int(1000 * self._task_s),
                tokens_per_s=0.0,
                losses=(),
            )
            out.is_over = answer.stop
        except SubmissionRefused as error:
            # A node cannot be told: its answer is refused when it comes.
            logger.info("%s: %s", task.task_id, error)
            out.is_over = True

    def _lose(self, node: Node, reason: str) -> None:
        """There will be no answer to the node's message."""
        out = node.out
        node.settle()
        if out is None:
            return
        node.num_failures += 1
        node.not_before_s = self._clock() + min(BACKOFF_MAX_S, 2.0**node.num_failures)
        if out.task is None or node.caller is None:
            self._say(f"hello: {reason}")
            return
        self._say(f"{out.task.task_id} of {node.caller.worker_id}: {reason}")
        self._release(node.caller, out.task, reason)

    def _release(self, caller: Caller, task: Task, reason: str) -> None:
        self._coordinator.release_task(caller, lease_token=task.lease_token, reason=reason)

    # ---- answers -------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        waiting = {node.message: node for node in self.nodes.values() if node.message}
        for message, answer in self._post.receive(frozenset(waiting)) if waiting else ():
            node = waiting.pop(message, None)
            if node is None or node.out is None:
                continue
            if isinstance(answer, Parcel) and "error" in answer.documents:
                answer = Lost(reason=_told(answer))
            if isinstance(answer, Lost):
                self._lose(node, answer.reason)
                continue
            self.bytes_in += answer.size_bytes
            node.message = ""
            if node.out.task is None:
                self._admit(node, node.out, answer)
            else:
                self._take_in(node, node.out.task, answer)

    def _admit(self, node: Node, out: Out, answer: Parcel) -> None:
        """Put a node on the roster that said who it is."""
        try:
            statement = Signed.from_envelope(answer.document("statement"))
            claim = parse_json(statement.payload, STATEMENT_BYTES_MAX)
            if not isinstance(claim, dict) or claim.get("nonce") != out.challenge:
                raise IdentityMismatch("the node answered another challenge than ours")
            node.caller = self._joined(statement)
            node.kept = answer.digests("kept")
            node.num_failures = 0
            node.settle()
        except WeftError as error:
            self._lose(node, str(error))

    def _joined(self, statement: Signed) -> Caller:
        coordinator, request = self._coordinator, self._rng_bytes(16).hex()
        text = coordinator.create_token(
            _OPERATOR,
            request_id=request,
            role=Role.WORKER,
            ttl_s=HELLO_S,
            num_uses=1,
            needs_approval=False,
            runs=(),
            label="a node of Flower",
        )
        token = JoinToken.parse(text)
        proof = join_proof(token, hashlib.sha256(statement.payload).digest())
        joined = coordinator.join(
            f"flower-{request}", token_id=token.token_id, statement=statement, proof=proof
        )
        if any(node.caller and node.caller.worker_id == joined.worker_id for node in self.nodes.values()):
            raise IdentityMismatch(f"another node is {joined.worker_id} already")
        worker = coordinator.roster.workers[joined.worker_id]
        return Caller(worker_id=joined.worker_id, role=worker.role, runs=worker.runs, peer="flower")

    def _take_in(self, node: Node, task: Task, answer: Parcel) -> None:
        """Play what a node sent to the coordinator, as if it had called."""
        assert node.caller is not None  # noqa: S101 - it was given a task
        try:
            node.kept = answer.digests("kept")
            node.asks = _asks(answer)
            self._submit(node.caller, task, answer)
            node.num_failures = 0
            node.settle()
        except DiskFull as error:
            if node.answer is None:
                logger.error("%s: %s", task.task_id, error)
            node.answer = answer
        except WeftError as error:
            node.settle()
            self._say(f"{task.task_id} of {node.caller.worker_id}: {type(error).__name__}: {error}")
            node.num_failures += 1
            node.not_before_s = self._clock() + min(BACKOFF_MAX_S, 2.0**node.num_failures)
            self._release(node.caller, task, str(error))

    def _submit(self, caller: Caller, task: Task, answer: Parcel) -> None:
        """Hand in a task's update, or give the task back.

        Raises:
            InputError, UsageError, SubmissionRefused: What came is no answer, or is refused.
            StorageError: It cannot be kept.
        """
        if "SubmitUpdate" not in answer.documents:
            given_back = _request(answer, "ReleaseTask") if "ReleaseTask" in answer.documents else {}
            self._release(caller, task, given_back.get("reason", "the node dropped it"))
            return
        submitted = _request(answer, "SubmitUpdate")
        for data in answer.blobs.values():
            self._upload(caller, task, data)
        self._coordinator.submit_update(
            caller, lease_token=task.lease_token, statement=submitted["statement"]
        )
        self.num_accepted += 1

    def _upload(self, caller: Caller, task: Task, data: bytes) -> None:
        pieces = [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]
        blob = BlobManifest(
            blake3=digest_of(data),
            size_bytes=len(data),
            chunk_blake3=tuple(digest_of(piece) for piece in pieces),
        )
        lease = task.lease_token
        for index in self._coordinator.find_missing(caller, lease_token=lease, blob=blob).missing:
            self._coordinator.put_chunk(
                caller, lease_token=lease, blake3=blob.blake3, index=index, data=pieces[index]
            )
        self._coordinator.commit_blob(caller, lease_token=lease, blake3=blob.blake3)


def _request(answer: Parcel, name: str) -> dict[str, Any]:
    """An RPC's request in an answer, checked; raises InputError, UsageError."""
    try:
        return wire.fields(wire.METHODS[name].request.FromString(answer.document(name)))
    except DecodeError as error:
        raise InputError(f"{name} of the answer cannot be read") from error


def _asks(answer: Parcel) -> Mapping[str, Any]:
    polled = _request(answer, "PollTask")
    return {name: polled[name] for name in ("unable", "tokens_per_s", "limits")}


def _told(answer: Parcel) -> str:
    """What a node says of its failure, fit to be shown."""
    kind = wire.printable(answer.documents["error"].decode("utf-8", "replace"))[:40]
    message = answer.documents.get("message", b"").decode("utf-8", "replace")
    return f"{kind}: {wire.printable(message)[:300]}"
