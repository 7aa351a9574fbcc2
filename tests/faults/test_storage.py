"""Disks that fill up and fail: at every single step of a round, once and for good.

What was answered ACCEPTED is in the state afterwards, the state can be read, and work goes on when the disk does.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.harness import Site, Worker, memory_directory, run_file

from weft.common.blobs import Files
from weft.common.errors import DiskFull, LeaseLost, RoundClosed, SessionExpired, StorageError
from weft.common.ids import Digest, ModuleKey
from weft.common.manifest import Signed
from weft.common.protocol import Receipt, Task
from weft.server.rounds import ENDED
from weft.server.run import ContentOf
from weft.server.state import State

MODULE = ModuleKey(0, 0)
ROUNDS = "count = 2\nquorum = 2\ntarget = 2"


class FailingFiles(Files):
    """Files of which the n-th step fails, or all from the n-th on."""

    def __init__(self) -> None:
        self.steps = 0
        self.fail_at = -1
        self.sticky = False
        self.code = errno.ENOSPC
        self.num_failed = 0

    def arm(self, fail_at: int, code: int, *, sticky: bool) -> None:
        self.steps, self.num_failed = 0, 0
        self.fail_at, self.code, self.sticky = fail_at, code, sticky

    def heal(self) -> None:
        self.fail_at = -1

    def _step(self) -> None:
        self.steps += 1
        if self.fail_at >= 0 and (self.steps == self.fail_at or (self.sticky and self.steps > self.fail_at)):
            self.num_failed += 1
            raise OSError(self.code, "injected")

    def write_at(self, path: Path, offset: int, data: bytes) -> None:
        if self.fail_at == self.steps + 1:
            # A full disk takes the first part.
            super().write_at(path, offset, data[: len(data) // 2])
        self._step()
        super().write_at(path, offset, data)

    def sync(self, path: Path) -> None:
        self._step()
        super().sync(path)

    def rename(self, source: Path, target: Path) -> None:
        self._step()
        super().rename(source, target)

    def remove(self, path: Path) -> None:
        self._step()
        super().remove(path)


@pytest.fixture
def directory() -> Iterator[Path]:
    made = memory_directory()
    yield made
    shutil.rmtree(made)


class Diligent:
    """Workers who try again until their update is in, and keep the receipts that they were given."""

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.receipts: dict[str, tuple[Worker, Task, Signed, Receipt]] = {}
        self.refused = 0

    def turn(self) -> None:
        """Every worker tries once to get a task done."""
        for worker in self.workers:
            try:
                task = worker.poll().task
                if task is not None:
                    # What a first attempt left behind has to go when the second is in.
                    worker.upload(task, worker.encode(task, salt="first")["0.0"])
                    statement = worker.ready(task)
                    self.receipts[task.task_id] = (worker, task, statement, worker.submit(task, statement))
            except SessionExpired:
                worker.open_session()
            except StorageError:
                self.refused += 1
            except (LeaseLost, RoundClosed):
                pass

    def check(self, site: Site) -> None:
        """Nothing that was acknowledged is lost, and nothing is there twice."""
        assert site.coordinator.state.owners == site.ledger.blob_owners()
        accepted = site.accepted()
        digests = [digest for *_, digest in accepted]
        assert len(digests) == len(set(digests))
        for worker, task, statement, receipt in self.receipts.values():
            assert worker.submit(task, statement) == receipt
            assert any(item[2] == worker.worker_id for item in accepted)
        assert {str(receipt.receipt_blake3) for *_, receipt in self.receipts.values()} <= {
            record.statement_digest for record in site.coordinator.state.accepted.values()
        }
        for digest in map(Digest, digests):
            assert site.blobs.manifest(digest).blake3 == digest
        for versions in site.run.versions.values():
            assert [record.version for record in versions] == list(range(len(versions)))
            for record in versions:
                assert site.blobs.manifest(record.digest).blake3 == record.digest


def finish(site: Site, diligent: Diligent, *, num_rounds: int = 2) -> None:
    for _ in range(40):
        diligent.turn()
        site.clock.advance(1)
        site.coordinator.tick()
        if all(rounds[-1].number > num_rounds for rounds in site.run.rounds.values()):
            return
    raise AssertionError(f"the run does not end: {site.current()}")


def steps_of_a_round() -> int:
    directory = memory_directory()
    files = FailingFiles()
    site = Site(directory / "s", files=files)
    site.add_run(run_file(rounds=ROUNDS))
    diligent = Diligent(site.workers("a", "b"))
    files.arm(-1, 0, sticky=False)
    finish(site, diligent, num_rounds=1)
    site.crash()
    shutil.rmtree(directory)
    return files.steps


def test_every_step_of_a_round_may_fail_once_or_for_good(directory: Path) -> None:
    num_steps = steps_of_a_round()
    assert num_steps > 20
    fired = 0
    for number in range(1, num_steps + 1):
        for code, sticky in ((errno.ENOSPC, True), (errno.EIO, False)):
            files = FailingFiles()
            site = Site(directory / f"{number}-{code}", files=files)
            site.add_run(run_file(rounds=ROUNDS))
            diligent = Diligent(site.workers("a", "b"))
            files.arm(number, code, sticky=sticky)
            for _ in range(3):
                diligent.turn()
                site.clock.advance(1)
                try:
                    site.coordinator.tick()
                except StorageError:
                    diligent.refused += 1
            fired += files.num_failed > 0
            files.heal()
            diligent.check(site)
            site.restart()
            for worker in diligent.workers:
                worker.open_session()
            diligent.check(site)
            finish(site, diligent)
            diligent.check(site)
            assert all(round_.state in ENDED for round_ in site.run.rounds[MODULE][:2])
            assert site.run.newest(MODULE).version == 2, "a full disk rolled a round back"
            site.crash()
            shutil.rmtree(site.directory)
    assert fired == 2 * num_steps


def _fill(site: Site, pages_more: int) -> None:
    """Let SQLite have that many more pages and no further one, as on a full disk."""
    pages = site.ledger._db.execute("PRAGMA page_count").fetchone()[0]
    site.ledger._db.execute(f"PRAGMA max_page_count = {pages + pages_more}")


@pytest.mark.parametrize("pages_more", range(0, 12, 2))
def test_a_full_ledger_refuses_cleanly_and_goes_on_with_space(directory: Path, pages_more: int) -> None:
    site = Site(directory / "s")
    site.add_run(run_file(rounds=ROUNDS))
    diligent = Diligent(site.workers("a", "b"))
    _fill(site, pages_more)
    for _ in range(6):
        diligent.turn()
        try:
            # Lines of the journal use up what is left.
            with site.ledger.transaction():
                site.ledger.log(0.0, "", "x" * 3000)
        except DiskFull:
            diligent.refused += 1
    assert diligent.refused
    diligent.check(site)
    site.ledger._db.execute("PRAGMA max_page_count = 1000000")
    diligent.check(site)
    site.restart()
    for worker in diligent.workers:
        worker.open_session()
    diligent.check(site)
    finish(site, diligent)
    diligent.check(site)
    assert site.run.newest(MODULE).version == 2
    site.crash()


class FlakyDatabase:
    """A connection whose n-th statement fails as SQLite does on a disk error."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        self.statements = 0
        self.fail_at = -1

    @property
    def in_transaction(self) -> bool:
        return self._database.in_transaction

    def execute(self, text: str, *arguments: Any) -> sqlite3.Cursor:
        self.statements += 1
        if self.statements == self.fail_at and text != "ROLLBACK":
            raise sqlite3.OperationalError("disk I/O error")
        return self._database.execute(text, *arguments)

    def close(self) -> None:
        self._database.close()


def statements_of_a_round() -> int:
    directory = memory_directory()
    site = Site(directory / "s")
    site.add_run(run_file(rounds=ROUNDS))
    diligent = Diligent(site.workers("a", "b"))
    flaky = FlakyDatabase(site.ledger._db)
    site.ledger._db = flaky  # type: ignore[assignment]
    finish(site, diligent, num_rounds=1)
    site.crash()
    shutil.rmtree(directory)
    return flaky.statements


def test_every_statement_of_the_ledger_may_fail(directory: Path) -> None:
    num_statements = statements_of_a_round()
    assert num_statements > 40
    for number in range(1, num_statements + 1):
        site = Site(directory / str(number))
        site.add_run(run_file(rounds=ROUNDS))
        diligent = Diligent(site.workers("a", "b"))
        flaky = FlakyDatabase(site.ledger._db)
        flaky.fail_at = number
        site.ledger._db = flaky  # type: ignore[assignment]
        for _ in range(3):
            diligent.turn()
            site.clock.advance(1)
            try:
                site.coordinator.tick()
            except StorageError:
                diligent.refused += 1
        assert flaky.statements >= number
        diligent.check(site)
        finish(site, diligent)
        diligent.check(site)
        before = site.accepted()
        site.restart()
        for worker in diligent.workers:
            worker.open_session()
        assert site.accepted() == before
        diligent.check(site)
        assert site.run.newest(MODULE).version == 2
        site.crash()
        shutil.rmtree(site.directory)


def test_a_candidate_that_cannot_be_read_is_merged_again(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was never forgotten would be a round that never ends."""
    failures: list[Digest] = []

    def failing(state: State, blob: Digest, *, size_bytes: int) -> ContentOf:
        if not failures:
            failures.append(blob)
            raise OSError(errno.EIO, "the disk failed")
        return content_of(state, blob, size_bytes=size_bytes)

    site = Site(directory / "s")
    site.add_run(run_file(rounds="count = 1\nquorum = 1\ntarget = 1"))
    (a,) = site.workers("a")
    content_of = State.content_of
    monkeypatch.setattr(State, "content_of", failing)
    a.work()
    assert site.run.newest(MODULE).version == 0
    assert not site.coordinator.busy
    site.coordinator.tick()
    assert len(failures) == 1
    assert site.run.newest(MODULE).version == 1
    site.crash()
