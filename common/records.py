"""Parcels as Flower's records, and back; with ``weft.server.flower`` and ``weft.client.flower`` all that knows Flower.

Documents are bytes in a ConfigRecord. A blob is an array of bytes whose data is the blob itself: nothing is
serialised a second time, and Flower moves it in chunks of 5 MiB.
"""

from __future__ import annotations

from typing import Final

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from weft.common.errors import InputError
from weft.common.ids import digest
from weft.common.parcel import BLOBS_MAX, DOCUMENT_BYTES_MAX, DOCUMENTS_MAX, Parcel

DOCUMENTS: Final = "weft.documents"
BLOBS: Final = "weft.blobs"
BYTES: Final = "weft.bytes"
"""How an array's data is to be read: not as numpy wrote it, but as it is."""


def to_records(parcel: Parcel) -> RecordDict:
    """Wrap a parcel for a message."""
    records = RecordDict({DOCUMENTS: ConfigRecord(dict(parcel.documents))})
    if parcel.blobs:
        records[BLOBS] = ArrayRecord(
            {
                name: Array(dtype="uint8", shape=(len(data),), stype=BYTES, data=data)
                for name, data in parcel.blobs.items()
            }
        )
    return records


def from_records(records: RecordDict) -> Parcel:
    """Unwrap a message's content; raises InputError where it is not a parcel."""
    documents, blobs = records.get(DOCUMENTS), records.get(BLOBS, ArrayRecord())
    if not isinstance(documents, ConfigRecord) or not isinstance(blobs, ArrayRecord):
        raise InputError("the message is not from Weft")
    if len(documents) > DOCUMENTS_MAX or len(blobs) > BLOBS_MAX:
        raise InputError("the message has too many parts")
    checked = {}
    for name, data in documents.items():
        if not isinstance(data, bytes) or len(data) > DOCUMENT_BYTES_MAX:
            raise InputError(f"{name[:80]} of the message is no document")
        checked[name] = data
    try:
        return Parcel(documents=checked, blobs={digest(name): array.data for name, array in blobs.items()})
    except ValueError as error:
        raise InputError("an array of the message is not named by a digest") from error
