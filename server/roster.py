"""The roster: who may talk to the coordinator, proved by keys.

A token admits, a key identifies, a session authenticates: identity is always taken from the session, never from a
field of a request. Join is idempotent on the public key, and takes a use of the token in the same transaction that
adds the worker.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import secrets
from collections import defaultdict, deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, Protocol

from weft.common.errors import (
    AccessError,
    ApprovalPending,
    NotFound,
    PermissionRefused,
    SessionExpired,
    TooManyAttempts,
    UsageError,
)
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.identity.session import NONCE_BYTES, verify_session
from weft.common.identity.token import TokenRecord, check_proof, check_secret, mint
from weft.common.ids import WorkerId, run_id
from weft.common.manifest import parse_json
from weft.common.protocol import Joined, Role, Session, Signed, TokenStatus
from weft.common.settings import from_table
from weft.common.statements import JOIN_TYPE, STATEMENT_BYTES_MAX, JoinStatement
from weft.server.backend import Caller
from weft.server.records import TokenEntry, WorkerRecord
from weft.server.store.ledger import Ledger

SESSION_S: Final = 900.0
NONCE_S: Final = 60.0
NONCES_MAX: Final = 8
TOKEN_S: Final = 24 * 3600.0
TOKEN_USES: Final = 16
WRONG_PROOFS_MAX: Final = 10
WRONG_PROOFS_WINDOW_S: Final = 60.0
ADDRESSES_MAX: Final = 100_000
"""Addresses that are remembered for their wrong proofs; beyond that all are forgiven rather than memory spent."""
OPERATOR: Final = WorkerId("operator")


class Clock(Protocol):
    """Both clocks, as an argument."""

    def now(self) -> float:
        """Unix seconds, for people and for token expiry."""
        ...

    def monotonic(self) -> float:
        """Seconds that never jump, for leases and sessions."""
        ...


class Roster:
    """Workers, viewers and the operator; tokens; sessions. Sessions and nonces live in memory only."""

    def __init__(
        self,
        ledger: Ledger,
        identity: CoordinatorIdentity,
        clock: Clock,
        *,
        rng_bytes: Callable[[int], bytes] = secrets.token_bytes,
    ) -> None:
        self._ledger = ledger
        self._identity = identity
        self._clock = clock
        self._rng_bytes = rng_bytes
        self.workers: dict[WorkerId, WorkerRecord] = {
            WorkerId(key): value for key, value in ledger.all("worker", WorkerRecord).items()
        }
        self._tokens = ledger.all("token", TokenEntry)
        self._sessions: dict[str, tuple[WorkerId, float, str]] = {}
        self._nonces: dict[WorkerId, deque[tuple[bytes, float]]] = {}
        self._made: dict[str, str] = {}
        self._wrong: defaultdict[str, deque[float]] = defaultdict(deque)

    def admit_operator(self, public_key: bytes) -> None:
        """Put the key that lies in the state directory on the roster, as admin."""
        record = WorkerRecord(
            worker_id=OPERATOR,
            public_key=public_key.hex(),
            role=Role.ADMIN,
            display_name="operator",
            joined_at=self._clock.now(),
        )
        known = self.workers.get(OPERATOR)
        if known is None or known.public_key != record.public_key:
            self._store(record)

    def join(self, peer: str, *, token_id: str, statement: Signed, proof: bytes) -> Joined:
        """Put the signer on the roster.

        Raises:
            TokenRefused: The token is wrong, expired, used up or revoked.
            TooManyAttempts: Too many wrong proofs from this address.
            AccessError: The statement is not signed by the key that it names.
        """
        self._limit(peer)
        claim = _read_join(statement)
        request_digest = hashlib.sha256(statement.payload).digest()
        record = self._record(token_id)
        known = next((item for item in self.workers.values() if item.public_key == claim.public_key), None)
        try:
            if known is not None:
                check_secret(record, self._identity.pin, request_digest, proof)
                return self._joined(known)
            spent = check_proof(
                record, self._identity.pin, request_digest, proof, _datetime(self._clock.now())
            )
        except AccessError:
            self._wrong[peer].append(self._clock.monotonic())
            raise
        worker = WorkerRecord(
            worker_id=self._new_id(claim.public_key),
            public_key=claim.public_key,
            role=spent.role,
            runs=tuple(spent.runs),
            display_name=claim.display_name,
            device=claim.device,
            token_id=token_id,
            approved=not spent.needs_approval,
            joined_at=self._clock.now(),
        )
        entry = dataclasses.replace(self._tokens[token_id], num_uses_left=spent.uses_left)
        with self._ledger.transaction():
            self._ledger.put("token", token_id, entry)
            self._ledger.put("worker", worker.worker_id, worker)
            self._ledger.log(
                self._clock.now(), "", f"{worker.worker_id} ({worker.display_name}) joined as {worker.role}"
            )
        self._tokens[token_id] = entry
        self.workers[worker.worker_id] = worker
        return self._joined(worker)

    def start_session(self, *, worker_id: str) -> bytes:
        """A nonce to sign, good for one minute; raises NotFound."""
        worker = self._worker(worker_id)
        nonce = self._rng_bytes(NONCE_BYTES)
        # Several at once: anyone who knows a worker's id may ask, and must not be able to lock it out.
        held = self._nonces.setdefault(worker.worker_id, deque(maxlen=NONCES_MAX))
        held.append((nonce, self._clock.monotonic() + NONCE_S))
        return nonce

    def open_session(self, peer: str, *, worker_id: str, statement: Signed) -> Session:
        """Open a session for who signed the nonce.

        Raises:
            SessionExpired: No nonce, an old one, or a wrong signature.
            ApprovalPending: The operator has not approved the worker yet.
            PermissionRefused: The worker was revoked.
        """
        worker = self._worker(worker_id)
        if not self._spend_nonce(worker, statement):
            raise SessionExpired("the session was refused: wrong key, or the nonce is over")
        if worker.revoked:
            raise PermissionRefused(f"{worker_id} was revoked by the operator")
        if not worker.approved:
            raise ApprovalPending(
                f"{worker_id} waits for approval",
                hint=f"the operator types: weft workers approve {worker_id}",
            )
        token = self._rng_bytes(32).hex()
        self._forget_old_sessions()
        self._sessions[token] = (worker.worker_id, self._clock.monotonic() + SESSION_S, peer)
        return Session(session_token=token, expires_at=self._clock.now() + SESSION_S)

    def authenticate(self, session_token: str) -> Caller:
        """Who holds the session; raises SessionExpired."""
        worker_id, ends, peer = self._sessions.get(session_token, (WorkerId(""), 0.0, ""))
        worker = self.workers.get(worker_id)
        if worker is None or worker.revoked or self._clock.monotonic() >= ends:
            self._sessions.pop(session_token, None)
            raise SessionExpired("the session is unknown or over")
        return Caller(worker_id=worker_id, role=worker.role, runs=worker.runs, peer=peer)

    def create_token(
        self,
        *,
        request_id: str,
        role: Role,
        ttl_s: float,
        num_uses: int,
        needs_approval: bool,
        runs: tuple[str, ...],
        label: str,
    ) -> str:
        """Make a token to hand out; a repeated ``request_id`` gets the same one while this process lives."""
        if not 1 <= len(request_id) <= 64:
            raise UsageError("a request id has 1 to 64 characters")
        if not 0 <= ttl_s <= 3650 * 86400:
            raise UsageError(f"a token cannot last {ttl_s} s", hint="use for example --ttl 24h")
        if (made := self._made.get(request_id)) is not None:
            return made
        while True:
            token, record = mint(
                self._rng_bytes,
                pin=self._identity.pin,
                role=role,
                expires_at=_datetime(self._clock.now() + (ttl_s or TOKEN_S)),
                uses=num_uses or TOKEN_USES,
                needs_approval=needs_approval,
                runs=tuple(run_id(run) for run in runs),
                label=label[:120],
            )
            if record.token_id not in self._tokens:
                break
        entry = TokenEntry(
            token_id=record.token_id,
            key=record.key.hex(),
            role=role,
            expires_at=record.expires_at.timestamp(),
            num_uses_left=record.uses_left,
            needs_approval=needs_approval,
            runs=tuple(runs),
            label=record.label,
        )
        with self._ledger.transaction():
            self._ledger.put("token", entry.token_id, entry)
        self._tokens[entry.token_id] = entry
        self._made[request_id] = token.text
        return token.text

    def tokens(self) -> tuple[TokenStatus, ...]:
        """All tokens, those that end first before the others."""
        entries = sorted(self._tokens.values(), key=lambda entry: (entry.expires_at, entry.token_id))
        return tuple(
            TokenStatus(
                token_id=entry.token_id,
                role=entry.role,
                expires_at=entry.expires_at,
                num_uses_left=entry.num_uses_left,
                needs_approval=entry.needs_approval,
                runs=entry.runs,
                label=entry.label,
                revoked=entry.revoked,
            )
            for entry in entries
        )

    def revoke_token(self, *, token_id: str) -> None:
        """Take a token back; raises NotFound."""
        entry = self._tokens.get(token_id)
        if entry is None:
            raise NotFound(f"there is no token {token_id}", hint="weft token list")
        revoked = dataclasses.replace(entry, revoked=True)
        with self._ledger.transaction():
            self._ledger.put("token", token_id, revoked)
        self._tokens[token_id] = revoked

    def approve(self, *, worker_id: str) -> None:
        """Let a worker in; raises NotFound."""
        self._store(dataclasses.replace(self._worker(worker_id), approved=True))

    def revoke(self, *, worker_id: str) -> None:
        """Shut a worker out and end its sessions; raises NotFound."""
        worker = self._worker(worker_id)
        if worker.worker_id == OPERATOR:
            raise PermissionRefused("the operator cannot be revoked")
        self._store(dataclasses.replace(worker, revoked=True))
        self._sessions = {
            token: held for token, held in self._sessions.items() if held[0] != worker.worker_id
        }

    def _spend_nonce(self, worker: WorkerRecord, statement: Signed) -> bool:
        """Whether the statement signs an outstanding nonce with the worker's key; the nonce is used up by that."""
        public, now_s = bytes.fromhex(worker.public_key), self._clock.monotonic()
        held = self._nonces.get(worker.worker_id, deque())
        for nonce, ends_s in held:
            if now_s < ends_s and verify_session(
                public, nonce, self._identity.pin, worker.worker_id, signature=statement.signature
            ):
                held.remove((nonce, ends_s))
                return True
        return False

    def _worker(self, worker_id: str) -> WorkerRecord:
        worker = self.workers.get(WorkerId(worker_id))
        if worker is None:
            raise NotFound(f"there is no worker {worker_id[:40]} here", hint="join again with a token")
        return worker

    def _record(self, token_id: str) -> TokenRecord | None:
        entry = self._tokens.get(token_id)
        if entry is None:
            return None
        return TokenRecord(
            token_id=entry.token_id,
            key=bytes.fromhex(entry.key),
            role=entry.role,
            expires_at=_datetime(entry.expires_at),
            uses_left=entry.num_uses_left,
            needs_approval=entry.needs_approval,
            runs=tuple(run_id(run) for run in entry.runs),
            label=entry.label,
            revoked=entry.revoked,
        )

    def _joined(self, worker: WorkerRecord) -> Joined:
        return Joined(
            worker_id=worker.worker_id,
            approved=worker.approved,
            role=worker.role,
            coordinator_public_key=self._identity.signing_key.public,
            endorsement=self._identity.endorse_signing_key(),
        )

    def _new_id(self, public_key: str) -> WorkerId:
        # From the key, so that a retried Join whose first answer was lost cannot end in two ids.
        name = hmac.new(self._identity.pin, bytes.fromhex(public_key), hashlib.sha256).hexdigest()
        length = next(length for length in range(8, 65) if WorkerId(f"w-{name[:length]}") not in self.workers)
        return WorkerId(f"w-{name[:length]}")

    def _store(self, worker: WorkerRecord) -> None:
        with self._ledger.transaction():
            self._ledger.put("worker", worker.worker_id, worker)
        self.workers[worker.worker_id] = worker

    def _limit(self, address: str) -> None:
        recent = self._wrong[address]
        while recent and recent[0] <= self._clock.monotonic() - WRONG_PROOFS_WINDOW_S:
            recent.popleft()
        if len(recent) >= WRONG_PROOFS_MAX:
            raise TooManyAttempts("too many wrong tokens from this address", hint="wait a minute")
        if not recent:
            del self._wrong[address]
        if len(self._wrong) > ADDRESSES_MAX:
            self._wrong.clear()

    def _forget_old_sessions(self) -> None:
        now_s = self._clock.monotonic()
        self._sessions = {token: held for token, held in self._sessions.items() if held[1] > now_s}


def _read_join(statement: Signed) -> JoinStatement:
    try:
        claim = from_table(JoinStatement, parse_json(statement.payload, STATEMENT_BYTES_MAX))
    except ValueError as error:
        raise UsageError(f"the join statement is malformed: {error}") from error
    if not statement.is_from(bytes.fromhex(claim.public_key), JOIN_TYPE):
        raise AccessError("the join statement is not signed by the key that it names")
    return claim


def _datetime(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)
