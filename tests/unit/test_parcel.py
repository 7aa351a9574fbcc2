"""Parcels on a stream: what is written is read, and nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from weft.common.errors import DataError, InputError
from weft.common.ids import Digest
from weft.common.parcel import MAGIC, Parcel, error_parcel, read_parcel, write_parcel

NAME = Digest("a" * 64)


def reader(data: bytes) -> Callable[[int], bytes]:
    stream = io.BytesIO(data)

    def read(size: int) -> bytes:
        found = stream.read(size)
        if len(found) != size:
            raise InputError("the stream ended")
        return found

    return read


def written(parcel: Parcel) -> bytes:
    stream = io.BytesIO()
    write_parcel(parcel, stream.write)
    return stream.getvalue()


@given(
    documents=st.dictionaries(
        st.text(min_size=1, max_size=9).filter(str.isprintable), st.binary(max_size=99)
    ),
    blobs=st.lists(st.binary(max_size=200), max_size=4),
)
def test_what_is_written_is_read(documents: dict[str, bytes], blobs: list[bytes]) -> None:
    parcel = Parcel(
        documents=dict(list(documents.items())[:32]),
        blobs={Digest(blake3(data).hexdigest()): data for data in blobs},
    )
    found = read_parcel(reader(written(parcel)))
    assert found == parcel
    assert found.size_bytes == parcel.size_bytes


def index(table: object) -> bytes:
    data = json.dumps(table).encode()
    return MAGIC + len(data).to_bytes(4, "big") + data


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        MAGIC + b"\xff\xff\xff\xff",
        index([]),
        index({"documents": {}}),
        index({"documents": {}, "blobs": {}, "more": {}}),
        index({"documents": {"a": -1}, "blobs": {}}),
        index({"documents": {"a": True}, "blobs": {}}),
        index({"documents": {"a": 1 << 40}, "blobs": {}}),
        index({"documents": {str(i): 0 for i in range(33)}, "blobs": {}}),
        index({"documents": {}, "blobs": {"../../etc/passwd": 1}}) + b"x",
        index({"documents": {}, "blobs": {NAME: 1 << 50}}),
        index({"documents": {"a": 9}, "blobs": {}}) + b"short",
    ],
)
def test_what_is_no_parcel_is_refused(data: bytes) -> None:
    with pytest.raises(InputError):
        read_parcel(reader(data))


def test_documents_are_asked_for_by_name() -> None:
    parcel = Parcel(
        documents={"text": "ä".encode(), "raw": b"\xff", "kept": f"{NAME}\n".encode(), "bad": b"x"}
    )
    assert parcel.text("text") == "ä"
    assert parcel.digests("kept") == {NAME}
    assert parcel.digests("nothing") == frozenset()
    for ask in (lambda: parcel.text("raw"), lambda: parcel.document("none"), lambda: parcel.digests("bad")):
        with pytest.raises(InputError):
            ask()


def test_an_error_goes_back_as_its_class_and_what_it_says() -> None:
    parcel = error_parcel(DataError("too short", hint="more"))
    assert parcel.text("error") == "DataError"
    assert "too short" in parcel.text("message")
