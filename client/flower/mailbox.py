"""What a worker calls where messages come instead of answers: the ordinary worker lives on it unchanged.

    message arrives  →  deliver()            a letter waits
    worker polls     →  poll_task()          the letter's task is in hand
    worker fetches   →  get_recipe, download answered from the letter
    worker sends     →  upload, submit_update, release_task   kept for the answer
    worker polls     →  poll_task()          the answer is complete: what was sent, and what the poll says

An update counts as accepted when it is put into the answer, since nothing comes back before the next message. What
cannot be had here, and why, is in ``docs/flower.md``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Final, cast

from google.protobuf.message import DecodeError

from weft.client.tasks.inhand import Progress
from weft.common import wire
from weft.common.blobs import digest_of, manifest_of
from weft.common.errors import BaseModelError, CorruptState, InputError, NotFound, Unreachable, WeftError
from weft.common.identity.files import write_private
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, WorkerId
from weft.common.manifest import Signed
from weft.common.parcel import Parcel
from weft.common.protocol import (
    BlobManifest,
    Limit,
    LossPoint,
    PollAnswer,
    ProgressAnswer,
    Receipt,
    Session,
    Stage,
    Task,
    Unable,
)

SUPERSEDED: Final = "another message came, or who sent this one is gone"


class Letter:
    """A message with a task, and its answer as it comes about."""

    def __init__(self, parcel: Parcel) -> None:
        """Read a message; raises InputError, UsageError."""
        answer = cast("PollAnswer", response(parcel, "PollTask"))
        if answer.task is None:
            raise InputError("the message has no task")
        self.task: Task = answer.task
        self.recipe = cast("Signed", response(parcel, "GetRecipe"))
        self.blobs = parcel.blobs
        self.answer: Future[Parcel] = Future()
        self.is_over = False
        """Whether nobody waits for the answer any more."""
        self._requests: dict[str, bytes] = {}
        self._updates: dict[Digest, bytes] = {}

    @property
    def key(self) -> tuple[str, int]:
        """What makes two messages one: the task and the epoch of its lease."""
        return self.task.task_id, self.task.lease_epoch

    def say(self, name: str, **fields: object) -> None:
        """Put a request into the answer."""
        self._requests[name] = wire.to_message(fields, wire.METHODS[name].request).SerializeToString()

    def enclose(self, blob: Digest, data: bytes) -> None:
        """Put a blob into the answer."""
        self._updates[blob] = data

    def seal(self, kept: frozenset[Digest]) -> None:
        """Complete the answer."""
        documents = {**self._requests, "kept": "\n".join(sorted(kept)).encode()}
        self.answer.set_result(Parcel(documents=documents, blobs=self._updates))


class Mailbox:
    """The transport of one worker; ``deliver`` and ``close`` are called from other threads than the worker's."""

    def __init__(self, *, kept: Callable[[], frozenset[Digest]], clock: Callable[[], float]) -> None:
        """Make an empty mailbox.

        Args:
            kept: Which blobs this machine has, so that they are not sent again.
            clock: Unix seconds.
        """
        self._kept = kept
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: Letter | None = None
        self._in_hand: Letter | None = None
        self._answered: Letter | None = None
        """The last one: its message may come again."""
        self._is_closed = False

    # ---- the postman's side --------------------------------------------------------------------------------------

    def deliver(self, parcel: Parcel) -> Letter:
        """Put a message in; the same one again is the same letter, another one ends the task in hand.

        Raises:
            InputError, UsageError: It is no message with a task.
            Unreachable: The worker is leaving.
        """
        letter = Letter(parcel)
        with self._changed:
            if self._is_closed:
                raise Unreachable(
                    "the node's worker has just left", hint="it is started again by the next message"
                )
            for known in (self._in_hand, self._answered, self._waiting):
                if known is not None and known.key == letter.key:
                    return known
            for older in (self._in_hand, self._waiting):
                if older is not None:
                    older.is_over = True
            self._waiting = letter
            self._changed.notify_all()
        return letter

    def close(self) -> None:
        """There will be no more messages: the worker leaves at its next poll."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def fail(self, error: WeftError) -> None:
        """The worker is gone: whoever waits for an answer gets the error."""
        with self._changed:
            for letter in (self._in_hand, self._waiting):
                if letter is not None and not letter.answer.done():
                    letter.answer.set_exception(error)
            self._in_hand = self._waiting = None
            self._is_closed = True

    # ---- the worker's side: calls --------------------------------------------------------------------------------

    def open_session(self, worker_id: WorkerId, signing_key: SigningKey, pin: bytes) -> Session:
        """Nothing to open: whoever carries the messages knows who sends them."""
        return Session(session_token="", expires_at=math.inf)

    def poll_task(
        self,
        *,
        wait_s: float,
        unable: tuple[Unable, ...] = (),
        tokens_per_s: float = 0.0,
        limits: tuple[Limit, ...] = (),
    ) -> PollAnswer:
        """Complete the answer to the last message, and wait for the next."""
        with self._changed:
            self._seal(wait_s=wait_s, unable=unable, tokens_per_s=tokens_per_s, limits=limits)
            self._changed.wait_for(lambda: self._waiting is not None or self._is_closed, timeout=wait_s)
            self._in_hand, self._waiting = self._waiting, None
            task = self._in_hand.task if self._in_hand is not None else None
            return PollAnswer(task=task, wait_reason="waits for a message", finished=self._is_closed)

    def _seal(self, **poll: object) -> None:
        letter = self._in_hand
        if letter is not None:
            letter.say("PollTask", **poll)
            letter.seal(self._kept())
            self._answered, self._in_hand = letter, None

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
        """Nobody hears of it before the answer; says when nobody waits for that any more."""
        letter = self._in_hand
        is_over = letter is None or letter.is_over
        return ProgressAnswer(stop=is_over, reason=SUPERSEDED if is_over else "")

    def submit_update(self, *, lease_token: str, statement: Signed) -> Receipt:
        """Put the update into the answer."""
        self._letter().say("SubmitUpdate", lease_token=lease_token, statement=statement)
        return Receipt(receipt_blake3=digest_of(statement.payload), accepted_at=self._clock())

    def release_task(self, *, lease_token: str, reason: str) -> None:
        """Put it into the answer that the task is given back."""
        self._letter().say("ReleaseTask", lease_token=lease_token, reason=reason)

    def get_recipe(self, run_id: str) -> Signed:
        """The recipe that came with the task; its signature is the caller's to check."""
        return self._letter().recipe

    # ---- the worker's side: bytes --------------------------------------------------------------------------------

    def upload(
        self, path: Path, lease_token: str, *, idle_s: float, progress: Progress | None = None
    ) -> BlobManifest:
        """Put a file into the answer; raises NotFound, StorageError, InputError."""
        manifest = manifest_of(path)
        data = path.read_bytes()
        if digest_of(data) != manifest.blake3:
            raise CorruptState(f"{path} changed while it was read")
        self._letter().enclose(manifest.blake3, data)
        if progress is not None:
            progress(manifest.size_bytes, manifest.size_bytes)
        return manifest

    def download(
        self,
        blake3: Digest,
        to: Path,
        *,
        idle_s: float,
        size_bytes: int | None = None,
        progress: Progress | None = None,
    ) -> Path:
        """A blob that came with the task, or before it.

        Raises:
            NotFound: It did neither.
            CorruptState: It is not what its name says.
        """
        if not to.exists():
            write_private(to, self._blob(blake3))
        elif manifest_of(to).blake3 != blake3:
            # Named by its digest and not what it says: gone, and sent again with the next message.
            to.unlink()
            raise CorruptState(f"{to} is damaged")
        if progress is not None:
            size = to.stat().st_size
            progress(size, size)
        return to

    def _blob(self, blake3: Digest) -> bytes:
        data = self._letter().blobs.get(blake3)
        if data is None:
            raise NotFound(
                f"blob {blake3[:12]}… came with no message",
                hint="a base never comes through Flower: name its directory with base= in --node-config",
            )
        if digest_of(data) != blake3:
            raise CorruptState(f"blob {blake3[:12]}… of the message is not what its name says")
        return data

    def _letter(self) -> Letter:
        if self._in_hand is None:
            raise BaseModelError("there is no message in hand")
        return self._in_hand


def response(parcel: Parcel, name: str) -> object:
    """What an RPC's answer in a parcel stands for; raises InputError, UsageError."""
    try:
        return wire.answer(wire.METHODS[name].response.FromString(parcel.document(name)))
    except DecodeError as error:
        raise InputError(f"{name} of the message cannot be read") from error
