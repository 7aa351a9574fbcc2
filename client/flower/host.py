"""Workers at home: each node's messages go to its own worker, over bases that all of them share.

One process hosts. In a federation it serves one node, whose worker stays between messages. In a simulation it serves
one client after another, each with its own key and state, and lets the worker go after each message: the client's next
one may come to another process, and what is on disk is what counts.
"""

from __future__ import annotations

import logging
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from weft.client.flower.mailbox import Mailbox
from weft.client.flower.settings import NodeSettings
from weft.client.home import KEY, Home, WorkerSettings
from weft.client.loop import Action
from weft.client.setup import Residents, Setup
from weft.client.tasks.inhand import View
from weft.client.worker import TaskProgress, Worker
from weft.common.errors import IdentityMismatch, UsageError, WeftError
from weft.common.identity.authority import load_certificate, pin_of, verify_endorsement
from weft.common.identity.files import private_directory, read_private, write_private
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, WorkerId, digest
from weft.common.manifest import Signed, canonical_json
from weft.common.parcel import Parcel
from weft.common.settings import to_table
from weft.common.statements import JOIN_TYPE, JoinStatement

logger = logging.getLogger(__name__)

PIN: Final = "coordinator"
ROOMS: Final = ("versions", "routers", "shards")
"""Directories of a worker whose files are named by their digest."""
LEAVE_S: Final = 60.0
"""Longest wait for a worker that was told that there is nothing more to do."""


class LogView:
    """Follows a worker in the log."""

    def turn(self, action: Action) -> None:
        """A new phase."""
        logger.debug("%s: %s", action.phase.value, action.reason)

    def progress(self, progress: TaskProgress) -> None:
        """Too often for a log."""

    def said(self, text: str) -> None:
        """Something to know."""
        logger.info("%s", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Employer:
    """The coordinator that a message comes from, as its own authority vouches."""

    pin: bytes
    """SHA-256 of the authority's public key."""
    key: bytes
    """Ed25519 public key that signs recipes."""

    @classmethod
    def of(cls, parcel: Parcel) -> Employer:
        """Read and check it; raises IdentityMismatch, InputError."""
        ca_pem, key = parcel.text("authority"), parcel.document("coordinator-key")
        if not verify_endorsement(ca_pem, key, parcel.document("endorsement")):
            raise IdentityMismatch(
                "the message's authority does not endorse the key that signs its recipes",
                hint="ask the operator of the SuperLink who runs Weft there",
            )
        return cls(pin=pin_of(load_certificate(ca_pem)), key=key)


@dataclass(slots=True)
class Living:
    """A worker, its mailbox and the thread that it lives in."""

    worker_id: WorkerId
    mailbox: Mailbox
    worker: Worker
    thread: threading.Thread = field(init=False)

    def start(self) -> None:
        """Let it live; when it is over, who waits for an answer is told why."""
        self.thread = threading.Thread(target=self._live, name="weft-worker", daemon=True)
        self.thread.start()

    def _live(self) -> None:
        life = self.worker.run()
        self.mailbox.fail(life.error or WeftError(f"the worker left: {life.reason}"))


class Host:
    """Answers messages. One process has one; ``answer`` may be called from several threads."""

    def __init__(
        self,
        *,
        keep: bool,
        home: Home,
        make_view: Callable[[], View] = LogView,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make a host without workers.

        Args:
            keep: Whether workers stay between messages.
            home: Where bases are cached.
            make_view: Makes what follows a worker.
            clock: Unix seconds.
        """
        self._keep = keep
        self._home = home
        self._make_view = make_view
        self._clock = clock
        self._living: dict[Path, Living] = {}
        self._residents: Residents = {}
        self._lock = threading.Lock()

    def answer(self, settings: NodeSettings, parcel: Parcel) -> Parcel:
        """Answer a message: introduce the node, or let its worker do the task.

        Raises:
            IdentityMismatch: Another coordinator than the node works for.
            InputError, UsageError: It is no such message.
            WeftError: What made the worker leave.
        """
        employer = Employer.of(parcel)
        state = _directory(settings, employer)
        if "challenge" in parcel.documents:
            return introduce(settings, state, challenge=parcel.text("challenge"))
        living = self._worker_of(settings, state, employer, WorkerId(parcel.text("worker")))
        letter = living.mailbox.deliver(parcel)
        try:
            return letter.answer.result()
        finally:
            if not self._keep:
                self._let_go(state)

    def close(self) -> None:
        """Let all workers go."""
        for state in tuple(self._living):
            self._let_go(state)

    def _worker_of(
        self, settings: NodeSettings, state: Path, employer: Employer, worker_id: WorkerId
    ) -> Living:
        with self._lock:
            living = self._living.get(state)
            if living is None or living.worker_id != worker_id or not living.thread.is_alive():
                living = self._living[state] = self._start(settings, state, employer, worker_id)
            return living

    def _start(self, settings: NodeSettings, state: Path, employer: Employer, worker_id: WorkerId) -> Living:
        from weft.client.join import choose_device

        wanted = WorkerSettings(
            data=settings.data,
            name=settings.name,
            device=settings.device,
            dtype=settings.dtype,
            quantise=settings.quantise,
            threads=settings.threads,
        )
        setup = Setup(
            worker_id=worker_id,
            key=SigningKey.load(state / KEY),
            pin=employer.pin,
            coordinator_key=employer.key,
            state=state,
            bases=self._home.base_directory,
            data=_absolute(settings.data),
            base=_absolute(settings.base),
            device=choose_device(wanted),
            quantise="4bit" if settings.quantise else "none",
            rank_max=settings.rank,
            residents=self._residents,
        )
        mailbox = Mailbox(kept=lambda: kept_in(state), clock=self._clock)
        worker = Worker(
            setup,
            mailbox,
            view=self._make_view(),
            stop_waits=threading.Event(),
            clock=time.monotonic,
            chance=random.random,
            leave_when_finished=True,
        )
        living = Living(worker_id, mailbox, worker)
        living.start()
        return living

    def _let_go(self, state: Path) -> None:
        living = self._living.pop(state, None)
        if living is not None:
            living.mailbox.close()
            living.thread.join(LEAVE_S)


def introduce(settings: NodeSettings, state: Path, *, challenge: str) -> Parcel:
    """Say who this node is: its key, made at the first time, signs the challenge; and what it has already."""
    key = SigningKey.create_or_load(state / KEY)
    statement = JoinStatement(
        public_key=key.public.hex(),
        nonce=challenge,
        display_name=(settings.name or socket.gethostname())[:80],
        device=settings.device,
    )
    signed = Signed.sign(key, JOIN_TYPE, canonical_json(to_table(statement)))
    kept = "\n".join(sorted(kept_in(state))).encode()
    return Parcel(documents={"statement": signed.to_envelope(), "kept": kept})


def kept_in(state: Path) -> frozenset[Digest]:
    """Digests of the blobs that a worker keeps; each is checked when it is used."""
    names = (path.name.partition(".")[0] for room in ROOMS for path in (state / room).glob("*"))
    return frozenset(digest(name) for name in names if len(name) == 64)


def _directory(settings: NodeSettings, employer: Employer) -> Path:
    """A node's directory for its coordinator, which is the one that it first worked for or that it was told."""
    state = _absolute(settings.state)
    if state is None:
        raise UsageError("the node has no state directory", hint='--node-config "state=DIR"')
    private_directory(state)
    found = employer.pin.hex()
    wanted = settings.coordinator.lower()
    if not wanted and (state / PIN).exists():
        wanted = read_private(state / PIN).decode("ascii", "replace")
    if wanted and wanted != found:
        raise IdentityMismatch(
            f"this node works for coordinator {wanted[:16]}…, and {found[:16]}… asks",
            hint=f'--node-config "coordinator={found}" works for the new one',
        )
    if not (state / PIN).exists():
        write_private(state / PIN, found.encode())
    directory = state / found[:8]
    private_directory(directory)
    return directory


def _absolute(path: str) -> Path | None:
    return Path(path).expanduser().absolute() if path else None
