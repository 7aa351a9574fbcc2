"""Parcels in Flower's records."""

from __future__ import annotations

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from weft.common.blobs import digest_of
from weft.common.errors import InputError
from weft.common.parcel import DOCUMENTS_MAX, Parcel
from weft.common.records import BLOBS, DOCUMENTS, from_records, to_records

DATA = b"\x00encoded update"


@pytest.mark.parametrize("blobs", [{}, {digest_of(DATA): DATA}])
def test_a_parcel_comes_back_as_it_was(blobs: dict[str, bytes]) -> None:
    parcel = Parcel(documents={"a": b"\xff\x00", "b": b""}, blobs=blobs)  # type: ignore[arg-type]
    assert from_records(to_records(parcel)) == parcel


def array(data: bytes) -> Array:
    return Array(dtype="uint8", shape=(len(data),), stype="weft.bytes", data=data)


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({DOCUMENTS: MetricRecord({"a": 1.0})}),
        RecordDict({DOCUMENTS: ConfigRecord({"a": "text"})}),
        RecordDict({DOCUMENTS: ConfigRecord({str(i): b"" for i in range(DOCUMENTS_MAX + 1)})}),
        RecordDict({DOCUMENTS: ConfigRecord({"a": b"x" * (5 << 20)})}),
        RecordDict({DOCUMENTS: ConfigRecord({}), BLOBS: ConfigRecord({})}),
        RecordDict({DOCUMENTS: ConfigRecord({}), BLOBS: ArrayRecord({"../x": array(b"x")})}),
    ],
    ids=["empty", "metrics", "text", "many", "large", "no arrays", "name"],
)
def test_what_others_send_is_refused(records: RecordDict) -> None:
    with pytest.raises(InputError):
        from_records(records)


def test_an_array_is_the_blob_itself() -> None:
    records = to_records(Parcel(documents={}, blobs={digest_of(DATA): DATA}))
    found = records[BLOBS]
    assert isinstance(found, ArrayRecord)
    assert [item.data for item in found.values()] == [DATA]
