"""The ledger: durable together or not at all, one process at a time, damage is found."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from weft.common.errors import CorruptState, DiskFull, StateLocked, StorageError
from weft.common.identity.signing import SigningKey
from weft.common.manifest import Signed
from weft.server.store.ledger import Ledger, StateLock


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """A record."""

    name: str
    size: float = 0.0
    tags: tuple[str, ...] = ()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    opened = Ledger(path)
    yield opened
    opened.close()


def reopened(ledger: Ledger) -> Ledger:
    ledger.close()
    return Ledger(ledger.path)


def test_it_is_durable_at_every_commit_and_for_its_owner_alone(ledger: Ledger) -> None:
    assert ledger._db.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert ledger._db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600


def test_what_was_committed_is_there_after_opening_again(ledger: Ledger) -> None:
    signed = Signed.sign(SigningKey.generate(), "text/plain", b"\x00exact\xff")
    with ledger.transaction():
        ledger.put("thing", "b", Thing(name="b"), run="r")
        ledger.put("thing", "a", Thing(name="old"))
        ledger.put("thing", "a", Thing(name="a", size=0.1, tags=("x", "y")))
        ledger.put("other", "c", Thing(name="c"))
        ledger.put_document("doc", "d", signed, run="r")
        ledger.own_blob("0" * 64, "update", "r")
        ledger.own_blob("0" * 64, "update", "r")
        ledger.own_blob("0" * 64, "version", "s")
        ledger.set_meta("epoch", "7")
        ledger.log(1.5, "r", "first")
        ledger.log(2.5, "", "second")
    again = reopened(ledger)
    assert again.all("thing", Thing) == {
        "a": Thing(name="a", size=0.1, tags=("x", "y")),
        "b": Thing(name="b"),
    }
    assert list(again.all("thing", Thing)) == ["a", "b"]
    assert again.documents("doc") == {"d": signed}
    assert again.blob_owners() == {"0" * 64: {("update", "r"), ("version", "s")}}
    assert again.meta("epoch") == "7"
    assert again.meta("nothing") is None
    assert [event.text for event in again.events()] == ["first", "second"]
    assert [event.text for event in again.events(run="r")] == ["first"]
    assert [event.text for event in again.events(last=1)] == ["second"]
    with again.transaction():
        again.delete("thing", "a")
        again.delete("thing", "never")
    assert list(again.all("thing", Thing)) == ["b"]
    again.close()


@pytest.mark.parametrize(
    "error", [ValueError("own"), KeyboardInterrupt(), sqlite3.OperationalError("disk I/O error")]
)
def test_a_transaction_that_fails_leaves_nothing(ledger: Ledger, error: BaseException) -> None:
    wanted = StorageError if isinstance(error, sqlite3.Error) else type(error)

    def write_and_fail() -> None:
        with ledger.transaction():
            ledger.put("thing", "a", Thing(name="a"))
            ledger.log(0.0, "", "line")
            raise error

    with pytest.raises(wanted):
        write_and_fail()
    assert ledger.all("thing", Thing) == {}
    assert ledger.events() == []
    with ledger.transaction():
        ledger.put("thing", "b", Thing(name="b"))
    assert list(reopened(ledger).all("thing", Thing)) == ["b"]


def test_a_number_that_is_none_is_not_written(ledger: Ledger) -> None:
    with pytest.raises(ValueError, match="JSON"), ledger.transaction():
        ledger.put("thing", "a", Thing(name="a", size=float("nan")))
    assert ledger.all("thing", Thing) == {}


def test_a_full_disk_says_so_and_loses_nothing(ledger: Ledger) -> None:
    with ledger.transaction():
        ledger.put("thing", "kept", Thing(name="kept"))
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull) as refused, ledger.transaction():
        ledger.put("thing", "large", Thing(name="x" * 100_000))
    assert "nothing was lost" in refused.value.hint
    ledger._db.execute("PRAGMA max_page_count = 100000")
    with ledger.transaction():
        ledger.put("thing", "large", Thing(name="x" * 100_000))
    assert list(reopened(ledger).all("thing", Thing)) == ["kept", "large"]


@pytest.mark.parametrize("content", [b"", None], ids=["empty", "no-tables"])
def test_a_file_that_a_killed_process_left_unfilled_is_filled(path: Path, content: bytes | None) -> None:
    if content is None:
        database = sqlite3.connect(path)
        database.execute("PRAGMA journal_mode=WAL")
        database.close()
    else:
        path.write_bytes(content)
    ledger = Ledger(path)
    with ledger.transaction():
        ledger.put("thing", "a", Thing(name="a"))
    ledger.close()


def test_a_directory_may_be_called_anything(tmp_path: Path) -> None:
    directory = tmp_path / "50% ?mode=ro #1"
    directory.mkdir()
    ledger = Ledger(directory / "ledger.sqlite")
    with ledger.transaction():
        ledger.set_meta("a", "b")
    ledger.close()
    assert (directory / "ledger.sqlite").is_file()
    reader = Ledger(directory / "ledger.sqlite", read_only=True)
    assert reader.meta("a") == "b"
    reader.close()


def test_a_reader_cannot_write(ledger: Ledger) -> None:
    reader = Ledger(ledger.path, read_only=True)
    with pytest.raises(StorageError), reader.transaction():
        reader.set_meta("a", "b")
    reader.close()


def damaged(path: Path, how: str) -> None:
    Ledger(path).close()
    database = sqlite3.connect(path)
    if how == "text":
        database.close()
        path.write_bytes(b"this is no database at all, whatever its name says" * 100)
        return
    if how == "format":
        database.execute("UPDATE meta SET value = '2' WHERE key = 'format'")
    if how == "no format":
        database.execute("DELETE FROM meta")
    if how == "foreign":
        database.execute("DROP TABLE meta")
    database.commit()
    database.close()
    if how == "page":
        data = bytearray(path.read_bytes())
        data[4096:8192] = b"\xff" * 4096
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["text", "format", "no format", "foreign", "page"])
def test_damage_is_found_at_the_start(path: Path, how: str) -> None:
    damaged(path, how)
    with pytest.raises(StorageError) as refused:
        Ledger(path)
    assert str(path) in refused.value.message
    if how != "foreign":
        assert isinstance(refused.value, CorruptState)


@pytest.mark.parametrize("body", ["{", "[]", "5", '{"name": 5}', '{"nme": "x"}', "{}"])
def test_a_record_that_cannot_be_read_is_corrupt(ledger: Ledger, body: str) -> None:
    with ledger.transaction():
        ledger._db.execute("INSERT INTO records VALUES ('thing', 'a', '', ?)", (body,))
    with pytest.raises(CorruptState, match="thing record"):
        ledger.all("thing", Thing)


def test_one_coordinator_holds_the_state_until_it_ends(tmp_path: Path) -> None:
    lock = StateLock(tmp_path)
    with pytest.raises(StateLocked, match=str(tmp_path)):
        StateLock(tmp_path)
    lock.release()
    StateLock(tmp_path).release()
