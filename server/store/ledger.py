"""The ledger: everything the coordinator has promised, in one SQLite file.

WAL with ``synchronous=FULL``: a transaction that returned is on disk. The order of every acknowledged write is

    blob: tmp → fsync file → rename → fsync directory;  then commit here;  then reply

so that a row never names a blob that is not there, and a receipt never precedes either. One process at a time:
a lock on the state directory says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from weft.common.errors import CorruptState, DiskFull, StateLocked, StorageError, WeftError
from weft.common.protocol import Signed
from weft.common.settings import from_table, to_table

T = TypeVar("T")

FORMAT: Final = 1
_TABLES: Final = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE records (
    kind TEXT NOT NULL, key TEXT NOT NULL, run TEXT NOT NULL, body TEXT NOT NULL,
    PRIMARY KEY (kind, key)) STRICT;
CREATE INDEX records_by_run ON records (kind, run);
CREATE TABLE documents (
    kind TEXT NOT NULL, key TEXT NOT NULL, run TEXT NOT NULL,
    payload BLOB NOT NULL, payload_type TEXT NOT NULL, signature BLOB NOT NULL, key_id TEXT NOT NULL,
    PRIMARY KEY (kind, key)) STRICT;
CREATE TABLE blobs (
    digest TEXT NOT NULL, kind TEXT NOT NULL, run TEXT NOT NULL, PRIMARY KEY (digest, kind, run)) STRICT;
CREATE TABLE events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, run TEXT NOT NULL, text TEXT NOT NULL) STRICT;
"""


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the journal."""

    number: int
    time: float
    run: str
    text: str


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours, with the file's name."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)
        if "full" in text.lower():
            raise DiskFull(
                f"no space left for {path.name}", hint=f"free space on {path.parent}; nothing was lost"
            ) from error
        if any(word in text.lower() for word in ("malformed", "not a database", "corrupt")):
            raise CorruptState(
                f"{path} is damaged: {text}", hint="restore the state directory from a backup"
            ) from error
        raise StorageError(f"{path}: {text}") from error


class StateLock:
    """Holds the state directory for one coordinator as long as it lives."""

    def __init__(self, directory: Path) -> None:
        self._handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._handle)
            raise StateLocked(
                f"another coordinator uses {directory}", hint="stop it, or give this one its own --state"
            ) from error

    def release(self) -> None:
        """Let the next coordinator in."""
        os.close(self._handle)


class Ledger:
    """Records, signed documents, blob ownership and the journal.

    Not safe for several threads at once: the coordinator owns it.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        with translated(path):
            # Escaped: a ? or # in a directory's name means something in a URI.
            target = path.absolute().as_uri() + ("?mode=ro" if read_only else "")
            self._db = sqlite3.connect(target, uri=True, isolation_level=None, check_same_thread=False)
            if not read_only:
                os.chmod(path, 0o600)
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=FULL")
            # Not by the file: the first process may have been killed between making it and filling it.
            fresh = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
            if fresh and not read_only:
                with self.transaction():
                    for statement in filter(str.strip, _TABLES.split(";")):
                        self._db.execute(statement)
                    self._db.execute("INSERT INTO meta VALUES ('format', ?)", (str(FORMAT),))
            self._check()

    def _check(self) -> None:
        found = self._db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        if found is None or found[0] != str(FORMAT):
            raise CorruptState(f"{self.path} has format {found and found[0]}, this program reads {FORMAT}")
        if self._db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise CorruptState(f"{self.path} is damaged", hint="restore the state directory from a backup")

    def close(self) -> None:
        """Close the file; what was committed stays."""
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside are durable together when this returns, or none is."""
        with translated(self.path):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def put(self, kind: str, key: str, value: Any, *, run: str = "") -> None:
        """Insert or replace a record, a dataclass that ``settings.from_table`` can read back."""
        body = json.dumps(to_table(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
        self._db.execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", (kind, key, run, body))

    def all(self, kind: str, cls: type[T]) -> dict[str, T]:
        """All records of a kind, by key."""
        with translated(self.path):
            rows = self._db.execute(
                "SELECT key, body FROM records WHERE kind = ? ORDER BY key", (kind,)
            ).fetchall()
        try:
            return {key: from_table(cls, json.loads(body)) for key, body in rows}
        except (ValueError, TypeError, WeftError) as error:
            raise CorruptState(f"{self.path}: a {kind} record cannot be read: {error}") from error

    def delete(self, kind: str, key: str) -> None:
        """Remove a record, if it is there."""
        self._db.execute("DELETE FROM records WHERE kind = ? AND key = ?", (kind, key))

    def put_document(self, kind: str, key: str, document: Signed, *, run: str) -> None:
        """Insert or replace a signed document, byte for byte."""
        self._db.execute(
            "INSERT OR REPLACE INTO documents VALUES (?, ?, ?, ?, ?, ?, ?)",
            (kind, key, run, document.payload, document.payload_type, document.signature, document.key_id),
        )

    def document(self, kind: str, key: str) -> Signed:
        """One signed document; raises CorruptState when it is missing, since rows name it."""
        with translated(self.path):
            row = self._db.execute(
                "SELECT payload, payload_type, signature, key_id FROM documents WHERE kind = ? AND key = ?",
                (kind, key),
            ).fetchone()
        if row is None:
            raise CorruptState(f"{self.path}: the {kind} document {key} is missing")
        payload, payload_type, signature, key_id = row
        return Signed(payload=payload, payload_type=payload_type, signature=signature, key_id=key_id)

    def documents(self, kind: str) -> dict[str, Signed]:
        """All signed documents of a kind, by key."""
        with translated(self.path):
            rows = self._db.execute(
                "SELECT key, payload, payload_type, signature, key_id FROM documents WHERE kind = ? ORDER BY key",
                (kind,),
            ).fetchall()
        return {
            key: Signed(payload=payload, payload_type=payload_type, signature=signature, key_id=key_id)
            for key, payload, payload_type, signature, key_id in rows
        }

    def own_blob(self, digest: str, kind: str, run: str) -> None:
        """Note what a blob is for, which decides who may read it and how long it is kept."""
        self._db.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?, ?)", (digest, kind, run))

    def blob_owners(self) -> dict[str, set[tuple[str, str]]]:
        """(kind, run) pairs of every blob, by digest."""
        owners: dict[str, set[tuple[str, str]]] = {}
        with translated(self.path):
            for digest, kind, run in self._db.execute("SELECT digest, kind, run FROM blobs"):
                owners.setdefault(digest, set()).add((kind, run))
        return owners

    def log(self, time: float, run: str, text: str) -> None:
        """Append a line to the journal."""
        self._db.execute("INSERT INTO events (time, run, text) VALUES (?, ?, ?)", (time, run, text))

    def events(self, *, run: str = "", last: int = 100) -> list[Event]:
        """The newest lines of the journal, oldest first."""
        where, arguments = ("WHERE run = ?", [run]) if run else ("", [])
        with translated(self.path):
            rows = self._db.execute(
                f"SELECT number, time, run, text FROM events {where} ORDER BY number DESC LIMIT ?",  # noqa: S608 - constant
                [*arguments, last],
            ).fetchall()
        return [Event(*row) for row in reversed(rows)]

    def meta(self, key: str) -> str | None:
        """A single value."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_meta(self, key: str, value: str) -> None:
        """Insert or replace a single value."""
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))
