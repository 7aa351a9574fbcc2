"""Parcels: what goes to a node and comes back where a message queue carries it, instead of calls on a connection.

A parcel is a handful of named documents and the blobs that go with them. The documents are the messages of
``protos/weft/v1`` as :mod:`weft.common.wire` writes them, by the name of their RPC: an answer on the way to a node, a
request on the way back. So what arrives goes through the same gate as what comes over a connection.

On a local socket a parcel is an index and then its bytes:

    magic (8) · length of the index (4, big endian) · index, JSON · documents · blobs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from weft.common.errors import InputError, WeftError
from weft.common.ids import Digest, digest
from weft.common.manifest import canonical_json, parse_json

MAGIC: Final = b"WEFTPCL1"
INDEX_BYTES_MAX: Final = 1 << 20
DOCUMENTS_MAX: Final = 32
DOCUMENT_BYTES_MAX: Final = 4 << 20
BLOBS_MAX: Final = 4096
BLOBS_BYTES_MAX: Final = 64 << 30
"""Of all blobs of a parcel that comes over a local socket, whose other end is the same user."""

Read = Callable[[int], bytes]
"""Gives exactly that many bytes."""
Write = Callable[[bytes], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parcel:
    """Documents by name, blobs by digest. What arrived is neither checked nor trusted yet."""

    documents: Mapping[str, bytes]
    blobs: Mapping[Digest, bytes] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def size_bytes(self) -> int:
        """Of all that is in it."""
        return sum(map(len, self.documents.values())) + sum(map(len, self.blobs.values()))

    def document(self, name: str) -> bytes:
        """A document; raises InputError without it."""
        try:
            return self.documents[name]
        except KeyError:
            raise InputError(f"the parcel has no {name}") from None

    def text(self, name: str) -> str:
        """A document that is text; raises InputError."""
        try:
            return self.document(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{name} of the parcel is no text") from error

    def digests(self, name: str) -> frozenset[Digest]:
        """A document that is a list of digests, one a line; none where it is absent. Raises InputError."""
        try:
            return frozenset(
                digest(line) for line in self.documents.get(name, b"").decode("ascii", "replace").splitlines()
            )
        except ValueError as error:
            raise InputError(f"{name} of the parcel is no list of digests") from error


def error_parcel(error: WeftError) -> Parcel:
    """What goes back where there is no answer: the error's class, and what it says."""
    said = str(error).encode("utf-8", "replace")
    return Parcel(documents={"error": type(error).__name__.encode(), "message": said})


def write_parcel(parcel: Parcel, write: Write) -> None:
    """Write a parcel to a stream."""
    index = canonical_json(
        {
            "documents": {name: len(data) for name, data in parcel.documents.items()},
            "blobs": {name: len(data) for name, data in parcel.blobs.items()},
        }
    )
    write(MAGIC + len(index).to_bytes(4, "big") + index)
    for data in (*_in_order(parcel.documents), *_in_order(parcel.blobs)):
        write(data)


def read_parcel(read: Read) -> Parcel:
    """Read a parcel from a stream.

    Raises:
        InputError: What comes is no parcel.
    """
    head = read(len(MAGIC) + 4)
    if head[: len(MAGIC)] != MAGIC:
        raise InputError("what came is no parcel")
    size = int.from_bytes(head[len(MAGIC) :], "big")
    if size > INDEX_BYTES_MAX:
        raise InputError(f"a parcel's index of {size} bytes")
    documents, blobs = _index(read(size))
    try:
        names = [digest(name) for name, _ in blobs]
    except ValueError as error:
        raise InputError("a blob of the parcel is not named by a digest") from error
    return Parcel(
        documents={name: read(size) for name, size in documents},
        blobs={name: read(size) for name, (_, size) in zip(names, blobs, strict=True)},
    )


def _in_order(items: Mapping[str, bytes] | Mapping[Digest, bytes]) -> list[bytes]:
    return [data for _, data in sorted(items.items())]


def _index(data: bytes) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    match parse_json(data, INDEX_BYTES_MAX):
        case {"documents": dict(documents), "blobs": dict(blobs), **rest} if not rest:
            checked = _sizes(documents, DOCUMENTS_MAX, DOCUMENTS_MAX * DOCUMENT_BYTES_MAX)
            return checked, _sizes(blobs, BLOBS_MAX, BLOBS_BYTES_MAX)
    raise InputError("a parcel's index names documents and blobs")


def _sizes(table: dict[str, object], num_max: int, bytes_max: int) -> list[tuple[str, int]]:
    sizes = [(name, size) for name, size in sorted(table.items()) if type(size) is int and size >= 0]
    if len(sizes) != len(table) or len(sizes) > num_max or sum(size for _, size in sizes) > bytes_max:
        raise InputError("a parcel's index has a size that cannot be")
    return sizes
