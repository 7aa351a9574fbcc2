"""Opening a session: a worker proves its key over the coordinator's fresh nonce.

The statement names the coordinator's pin, so that a statement given to one coordinator opens nothing at
another; the nonce is used once, so that an old one opens nothing at all. The verifier builds the statement
from what it knows itself and parses nothing that came over the network.
"""

from __future__ import annotations

from typing import Final

from weft.common.identity.signing import SigningKey, verify
from weft.common.identity.token import PIN_BYTES
from weft.common.ids import WorkerId
from weft.common.manifest import canonical_json

SESSION_TYPE: Final = "application/vnd.weft.session+json"
NONCE_BYTES: Final = 32


def session_statement(nonce: bytes, pin: bytes, worker_id: WorkerId) -> bytes:
    """What a worker signs to open a session, as canonical JSON.

    Args:
        nonce: The coordinator's, 32 bytes, drawn for this session.
        pin: SHA-256 of the authority's key, 32 bytes, as the worker knows it.
        worker_id: As the coordinator issued it.
    """
    if len(nonce) != NONCE_BYTES or len(pin) != PIN_BYTES:
        raise ValueError("a nonce and a pin are 32 bytes each")
    return canonical_json({"nonce": nonce.hex(), "pin": pin.hex(), "worker": worker_id})


def sign_session(key: SigningKey, nonce: bytes, pin: bytes, worker_id: WorkerId) -> bytes:
    """The worker's proof, 64 bytes."""
    return key.sign(SESSION_TYPE, session_statement(nonce, pin, worker_id))


def verify_session(public: bytes, nonce: bytes, pin: bytes, worker_id: WorkerId, *, signature: bytes) -> bool:
    """Say whether ``signature`` is the proof of ``worker_id``, who registered ``public`` [32 bytes].

    False too where there is no nonce to prove anything over: pass ``b""`` when none was given or it is over.
    """
    if not nonce:
        return False
    return verify(public, SESSION_TYPE, session_statement(nonce, pin, worker_id), signature)
