"""Ed25519 signatures over exact bytes.

What is signed is DSSE's pre-authentication encoding of (payload type, payload): the type and both lengths
are under the signature, so that a signature given for one purpose is never one for another. Payloads are the
bytes that were sent or stored, never a message encoded a second time.
Source: https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from weft.common.errors import CorruptState, StorageError
from weft.common.identity.files import private_directory, read_private, write_private


def preauthentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """Join type and payload so that no two pairs give the same bytes (DSSE's PAE, version 1)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def key_id(public: bytes) -> str:
    """A short name of a public key: the first 16 hex digits of its SHA-256. It selects, it proves nothing."""
    return hashlib.sha256(public).hexdigest()[:16]


@dataclass(frozen=True, slots=True, eq=False)
class SigningKey:
    """A private Ed25519 key (RFC 8032); its repr shows no secret."""

    _private: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> SigningKey:
        """Draw a key from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Read a key that :meth:`save` wrote.

        Raises:
            NotFound: There is no such file.
            AccessError: Other users can read it.
            CorruptState: It holds no Ed25519 key.
        """
        data = read_private(path)
        try:
            private = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as error:
            raise CorruptState(
                f"{path} holds no readable key", hint=f"restore {path} from a backup"
            ) from error
        if not isinstance(private, Ed25519PrivateKey):
            raise CorruptState(f"{path} holds another kind of key", hint=f"restore {path} from a backup")
        return cls(private)

    @classmethod
    def create_or_load(cls, path: Path) -> SigningKey:
        """Read the key at ``path``, or make one there, with its directory, at the first time."""
        private_directory(path.parent)
        if path.exists():
            return cls.load(path)
        key = cls.generate()
        key.save(path)
        return key

    def save(self, path: Path) -> None:
        """Write the key, unencrypted PKCS #8, readable by its owner alone.

        Raises:
            StorageError: There is a file already (a key is never overwritten), or it cannot be written.
        """
        if path.exists():
            raise StorageError(f"{path} exists and a key is never overwritten", hint="name another file")
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        write_private(path, self._private.private_bytes(encoding, form, serialization.NoEncryption()))

    @property
    def public(self) -> bytes:
        """The public key, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    @property
    def key_id(self) -> str:
        """:func:`key_id` of the public key."""
        return key_id(self.public)

    def sign(self, payload_type: str, payload: bytes) -> bytes:
        """Sign exact bytes for one purpose; 64 bytes, the same for the same input."""
        return self._private.sign(preauthentication_encoding(payload_type, payload))


def verify(public: bytes, payload_type: str, payload: bytes, signature: bytes) -> bool:
    """Say whether ``signature`` is ``public``'s over exactly this type and payload.

    Never raises, whatever the bytes are: the caller knows whether a wrong one is a forged update, a damaged
    file or an expired session. A key or signature of a wrong length is simply not right.
    """
    try:
        key = Ed25519PublicKey.from_public_bytes(public)
        key.verify(signature, preauthentication_encoding(payload_type, payload))
    except (InvalidSignature, ValueError):
        return False
    return True
