"""Join tokens: ``WEFT1.<pin>.<id>.<secret>``, each part in base32 without padding.

    pin     52 characters   SHA-256 of the authority's public key: whom the worker may talk to
    id       6 characters   which record of the coordinator is meant
    secret  26 characters   128 bits that prove the right to join

The secret is proved and never sent: the worker sends HMAC-SHA256(K, "weft-join-v1" ‖ pin ‖ request digest)
with K = SHA-256(secret). The pin inside makes a proof that was given to one coordinator worthless at another,
and the digest binds it to one request, the worker's public key in it included.

The coordinator stores K and not the secret, so that a token's text cannot be read back from its state. K is
enough to make proofs, though: whoever copies the state can join until the token expires or is revoked. That
is why records expire, count their uses and live in a 0700 directory.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import hashlib
import hmac
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from weft.common.errors import TokenRefused, UsageError
from weft.common.ids import RunId

PIN_BYTES: Final = 32
SECRET_BYTES: Final = 16
ID_CHARACTERS: Final = 6
USES_MAX: Final = 1_000_000

_PROOF_CONTEXT: Final = b"weft-join-v1"
_TEXT: Final = re.compile(r"WEFT1\.([A-Z2-7]{52})\.([A-Z2-7]{6})\.([A-Z2-7]{26})")
_COPY_HINT: Final = "copy the whole token from the line that `weft serve` or `weft token create` printed"
_NEW_HINT: Final = "ask the operator for a new token: weft token create"


class Role(enum.StrEnum):
    """What somebody may do."""

    WORKER = "worker"
    """Take tasks and send updates."""
    VIEWER = "viewer"
    """See rounds, workers and modules, and pull."""
    ADMIN = "admin"
    """All of that, and change runs, workers and tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinToken:
    """What is handed to a worker; its repr shows no secret, its ``text`` does."""

    pin: bytes
    """SHA-256 of the authority's public key, 32 bytes."""
    token_id: str
    """Six base32 characters."""
    secret: bytes = field(repr=False)
    """16 random bytes."""

    def __post_init__(self) -> None:
        if len(self.pin) != PIN_BYTES or len(self.secret) != SECRET_BYTES:
            raise ValueError("a token has a pin of 32 bytes and a secret of 16")
        if not re.fullmatch(f"[A-Z2-7]{{{ID_CHARACTERS}}}", self.token_id):
            raise ValueError(f"{self.token_id!r} is not a token id")

    @property
    def text(self) -> str:
        """The token as it is typed."""
        return f"WEFT1.{_base32(self.pin)}.{self.token_id}.{_base32(self.secret)}"

    @property
    def key(self) -> bytes:
        """K = SHA-256(secret): what both sides prove with, and all that the coordinator keeps."""
        return hashlib.sha256(self.secret).digest()

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Read a token in upper or lower case, with blanks or line breaks around it.

        Raises:
            UsageError: It is not a token. The message never repeats the text, which holds a secret.
        """
        upper = text.strip().upper()
        match = _TEXT.fullmatch(upper)
        if match is None:
            raise UsageError(_what_is_wrong(upper), hint=_COPY_HINT)
        token = cls(pin=_bytes(match[1]), token_id=match[2], secret=_bytes(match[3]))
        # The last character of each part has bits to spare; set, they show a typing error.
        if token.text != upper:
            raise UsageError("the join token has a typing error", hint=_COPY_HINT)
        return token


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecord:
    """What the coordinator stores of a token."""

    token_id: str
    """Six base32 characters."""
    key: bytes = field(repr=False)
    """K = SHA-256(secret), 32 bytes."""
    role: Role
    """What its holders may do."""
    expires_at: datetime
    """With a time zone; from then on it is refused."""
    uses_left: int
    """How many more may join with it."""
    needs_approval: bool = False
    """Whether the operator has to approve each that joins."""
    runs: tuple[RunId, ...] = ()
    """Runs that it opens; empty means all."""
    label: str = ""
    """The operator's note."""
    revoked: bool = False
    """Whether the operator took it back."""

    def spend(self, now: datetime) -> TokenRecord:
        """Take one use at ``now`` (with a time zone).

        Raises:
            TokenRefused: It was revoked, has expired or is used up.
        """
        if self.revoked:
            raise TokenRefused(f"join token {self.token_id} was revoked", hint=_NEW_HINT)
        if now >= self.expires_at:
            raise TokenRefused(
                f"join token {self.token_id} expired at {self.expires_at:%Y-%m-%d %H:%M %Z}", hint=_NEW_HINT
            )
        if self.uses_left < 1:
            raise TokenRefused(f"join token {self.token_id} is used up", hint=_NEW_HINT)
        return dataclasses.replace(self, uses_left=self.uses_left - 1)


def mint(
    rng_bytes: Callable[[int], bytes],
    *,
    pin: bytes,
    role: Role,
    expires_at: datetime,
    uses: int,
    needs_approval: bool = False,
    runs: tuple[RunId, ...] = (),
    label: str = "",
) -> tuple[JoinToken, TokenRecord]:
    """Make a token to hand out and the record to keep.

    Args:
        rng_bytes: Gives that many bytes from a cryptographic generator (``secrets.token_bytes``).
        pin: SHA-256 of the authority's public key, 32 bytes.
        role: What its holders may do.
        expires_at: With a time zone.
        uses: How many may join with it, 1 to 1,000,000.
        needs_approval: Whether the operator has to approve each that joins.
        runs: Runs that it opens; empty means all.
        label: The operator's note.

    The id is six random characters; where the store says that it is taken, the caller mints again.
    """
    if not 1 <= uses <= USES_MAX:
        raise UsageError(f"a token of {uses} uses", hint=f"give 1 to {USES_MAX} uses, for example --uses 16")
    if expires_at.tzinfo is None:
        raise ValueError("expires_at needs a time zone")
    token_id = _base32(rng_bytes(4))[:ID_CHARACTERS]
    token = JoinToken(pin=pin, token_id=token_id, secret=rng_bytes(SECRET_BYTES))
    record = TokenRecord(
        token_id=token_id,
        key=token.key,
        role=role,
        expires_at=expires_at,
        uses_left=uses,
        needs_approval=needs_approval,
        runs=runs,
        label=label,
    )
    return token, record


def join_proof(token: JoinToken, request_digest: bytes) -> bytes:
    """Prove the secret for the request of ``request_digest`` (SHA-256 of it without the proof); 32 bytes."""
    return _proof(token.key, token.pin, request_digest)


def check_secret(record: TokenRecord | None, pin: bytes, request_digest: bytes, proof: bytes) -> TokenRecord:
    """Check a proof in constant time and spend nothing: for a Join repeated after its answer was lost.

    Args:
        record: What is stored under the id that the request names; None when there is nothing.
        pin: This coordinator's own pin, never one from the request.
        request_digest: SHA-256 of the request without its proof, 32 bytes.
        proof: As received.

    Raises:
        TokenRefused: The secret is wrong. An unknown id gets the same answer, after the same work.
    """
    expected = _proof(record.key if record else bytes(32), pin, request_digest)
    if not hmac.compare_digest(expected, proof) or record is None:
        raise TokenRefused("the join token is wrong", hint=_COPY_HINT)
    return record


def check_proof(
    record: TokenRecord | None, pin: bytes, request_digest: bytes, proof: bytes, now: datetime
) -> TokenRecord:
    """Check a proof and take one use; store the record returned in the transaction that adds the worker.

    The secret is checked first, so that only a holder of the token learns whether it expired.

    Raises:
        TokenRefused: Wrong, revoked, expired or used up, each with its own message.
    """
    return check_secret(record, pin, request_digest, proof).spend(now)


def _proof(key: bytes, pin: bytes, request_digest: bytes) -> bytes:
    if len(pin) != PIN_BYTES or len(request_digest) != hashlib.sha256().digest_size:
        raise ValueError("a pin and a request digest are 32 bytes each")
    return hmac.digest(key, _PROOF_CONTEXT + pin + request_digest, "sha256")


def _what_is_wrong(upper: str) -> str:
    if not upper:
        return "the join token is empty"
    if re.match(r"WEFT([2-9]|1\d+)\.", upper):
        return "the join token is of a newer Weft than this one"
    if not upper.startswith("WEFT1."):
        return "a join token starts with WEFT1."
    return "the join token is cut off or has a typing error"


def _base32(data: bytes) -> str:
    return base64.b32encode(data).decode("ascii").rstrip("=")


def _bytes(text: str) -> bytes:
    return base64.b32decode(text + "=" * (-len(text) % 8))
