"""``kill -9`` at every step: what was acknowledged is there afterwards, and nothing is there twice.

``WEFT_CRASHES`` says about how many lives are ended in all; docs/results/crash.md has the long campaign.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from tests.harness import memory_directory

logger = logging.getLogger(__name__)
pytestmark = pytest.mark.timeout(3600)

CRASHES = int(os.environ.get("WEFT_CRASHES", "20"))
STRIDE = 1 if CRASHES >= 100 else 2
"""Of the steps of a submission; two steps are one before and one after the same call."""
FIRST_START_STEPS = 120
ROOT = Path(__file__).parents[2]


class Lives:
    """The process that forks lives, and what the lives said."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.crash_lives"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        self.count = 0

    def live(
        self, directory: Path, *, kill_at: int = 0, kill_after_lines: int = 0, turns: int = 12, first: int = 0
    ) -> list[list[str]]:
        """One life; it ends at a step of its own, after that many lines, or of itself. What it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.count += 1
        wanted: dict[str, Any] = {"directory": str(directory), "life": str(self.count)}
        wanted |= {"kill_at": kill_at, "turns": turns, "first": first}
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        said: list[list[str]] = []
        while not said or said[-1][0] != "end":
            said.append(self._process.stdout.readline().split())
            assert said[-1], "the process that forks lives has ended"
            if len(said) == kill_after_lines:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(said[0][1]), signal.SIGKILL)
        assert said[-1][1] in ("0", str(-signal.SIGKILL)), said
        return said

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def lives() -> Iterator[Lives]:
    made = Lives()
    yield made
    made.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    made = memory_directory()
    yield made
    shutil.rmtree(made)


class Witness:
    """What workers were told over all lives, compared with what the state says; it shares no code with Weft."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.acks: dict[tuple[str, str], str] = {}
        self.versions: dict[int, str] = {}
        self.kills = 0

    def hear(self, said: list[list[str]]) -> None:
        self.kills += said[-1][1] == str(-signal.SIGKILL)
        for words in said:
            if words[0] == "ack":
                assert (words[1], words[2]) not in self.acks, "one task was acknowledged twice"
                self.acks[(words[1], words[2])] = words[3]
            if words[0] == "version":
                assert self.versions.setdefault(int(words[1]), words[2]) == words[2], (
                    "a version was published twice"
                )

    def check(self) -> None:
        records = self._records()
        held = [
            ((update["worker_id"], update["task_id"]), update["update_digest"])
            for round_ in records["round"]
            for update in round_["updates"]
        ]
        assert len(held) == len(dict(held)), "an update is in two rounds"
        lost = {task: digest for task, digest in self.acks.items() if dict(held).get(task) != digest}
        assert not lost, f"acknowledged and lost: {lost}"
        numbers = [version["version"] for version in records["version"]]
        assert numbers == list(range(len(numbers)))
        assert {number: records["version"][number]["digest"] for number in self.versions} == self.versions
        made_by = [version["round_number"] for version in records["version"][1:]]
        published = [round_["number"] for round_ in records["round"] if round_["state"] == 4]
        assert made_by == published, "a round has no version, or two"
        assert all(round_["state"] in (4, 5) and round_["reason"] for round_ in records["round"][:-1])
        for digest in [digest for _, digest in held] + [version["digest"] for version in records["version"]]:
            assert (
                blake3((self._directory / "blobs" / digest[:2] / digest).read_bytes()).hexdigest() == digest
            )

    def add(self, other: Witness) -> None:
        """Count in what another directory's witness saw."""
        self.kills += other.kills
        self.acks |= {
            (f"{self.kills}/{worker}", task): digest for (worker, task), digest in other.acks.items()
        }
        self.versions |= {1000 * self.kills + number: digest for number, digest in other.versions.items()}

    def report(self) -> None:
        """A line for docs/results/crash.md."""
        logger.info(
            "%d kills, %d updates acknowledged, 0 lost; %d versions seen, none published twice",
            self.kills,
            len(self.acks),
            len(self.versions),
        )

    def _records(self) -> dict[str, list[Any]]:
        # A copy, so that recovering the log is left to the coordinator.
        copy = self._directory / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        copy.mkdir()
        for path in self._directory.glob("ledger.sqlite*"):
            shutil.copy(path, copy)
        found: dict[str, list[Any]] = {"round": [], "version": []}
        if not (copy / "ledger.sqlite").exists():
            return found
        database = sqlite3.connect(copy / "ledger.sqlite")
        try:
            assert database.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
            if database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                for kind, rows in found.items():
                    query = "SELECT body FROM records WHERE kind = ? ORDER BY key"
                    rows.extend(json.loads(row[0]) for row in database.execute(query, (kind,)))
        finally:
            database.close()
        return found


def test_killed_at_random_steps_again_and_again(lives: Lives, directory: Path) -> None:
    rng = random.Random(20)
    state = directory / "state"
    witness = Witness(state)
    for _ in range(CRASHES * 6 // 10):
        witness.hear(lives.live(state, kill_at=int(3 * 2 ** rng.uniform(0, 8))))
        witness.check()
    assert witness.kills >= 0.9 * (CRASHES * 6 // 10)
    witness.hear(lives.live(state))
    witness.check()
    assert len(witness.acks) >= CRASHES // 4
    witness.report()


def test_killed_from_outside_at_any_instant(lives: Lives, tmp_path: Path) -> None:
    rng = random.Random(21)
    state = tmp_path / "state"
    witness = Witness(state)
    lives.live(state, turns=1)
    for _ in range(CRASHES * 3 // 10):
        witness.hear(lives.live(state, kill_after_lines=rng.randint(1, 12), turns=40))
        witness.check()
    assert witness.kills >= 0.9 * (CRASHES * 3 // 10)
    witness.hear(lives.live(state))
    witness.check()
    witness.report()


def test_killed_at_every_step_of_the_submission_that_ends_a_round(lives: Lives, directory: Path) -> None:
    prepared, state = directory / "prepared", directory / "state"
    before = Witness(prepared)
    before.hear(lives.live(prepared, turns=1))
    said = lives.live(shutil.copytree(prepared, state), turns=1, first=1)
    submits, ends = (int(words[1]) for words in said if words[0] == "step")
    assert ends - submits > 30
    total = Witness(state)
    for kill_at in range(submits + 1, ends + 1, STRIDE):
        shutil.rmtree(state)
        witness = Witness(shutil.copytree(prepared, state))
        witness.acks |= before.acks
        witness.hear(lives.live(state, kill_at=kill_at, turns=1, first=1))
        witness.check()
        witness.hear(lives.live(state, turns=2, first=1))
        witness.check()
        assert witness.kills == 1
        assert witness.versions
        total.add(witness)
    total.report()


def test_killed_at_the_very_first_start(lives: Lives, directory: Path) -> None:
    total = Witness(directory)
    for kill_at in range(1, FIRST_START_STEPS, max(1, FIRST_START_STEPS * 5 // CRASHES)):
        state = directory / f"state{kill_at}"
        witness = Witness(state)
        witness.hear(lives.live(state, kill_at=kill_at, turns=2))
        witness.check()
        witness.hear(lives.live(state, turns=3))
        witness.check()
        assert witness.acks
        assert witness.kills == 1
        total.add(witness)
    total.report()
