"""Restarts, interruptions and revocations in the middle of a round: what was accepted stays, and the round ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.running import Hand, Site, ThreadEngine, eventually, main, operator_home, working, write_run

from weft.client import cli as client_cli
from weft.client.loop import exit_code
from weft.common.errors import AccessError
from weft.common.protocol import RoundState, Stage
from weft.server import app
from weft.server.engine_process import Jobs

INTERRUPTED = 130


@pytest.fixture
def site(tmp_path: Path, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(tmp_path, jobs) as site:
        operator_home(site, monkeypatch)
        yield site


def _hand(site: Site, base: Path, text: Path, name: str, *, holds: bool = False) -> Hand:
    return Hand(site.address, site.token, text, site.home, name, base=base, holds=holds)


@contextmanager
def _meanwhile(act: Callable[[], None]) -> Iterator[None]:
    """Do something in a thread while this one, which gets the signals, is busy; what it raises is raised."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(act)
        yield
        done.result()


# ---- the coordinator goes and comes back -------------------------------------------------------------------------


def test_a_round_ends_across_a_restart_with_what_was_accepted_before(
    site: Site, tiny_base: Path, text: Path, tmp_path: Path
) -> None:
    site.start(write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=2))
    quick = _hand(site, tiny_base, text, "quick")
    slow = _hand(site, tiny_base, text, "slow", holds=True)
    with working(quick, slow):
        assert slow.view.training.wait(60)
        eventually(lambda: len(site.round("one").updates) == 1, site.picture)
        accepted = site.round("one").updates
        site.stop()
        eventually(lambda: quick.view.has("; waits"))
        slow.view.may_train.set()
        site.start()
        assert accepted[0] in site.rounds("one")[0].updates
        eventually(lambda: site.version("one") == 1, site.picture)
        assert [hand.ended().num_accepted for hand in (quick, slow)] == [1, 1]
    assert slow.view.lines.count("training: loading is done") == 1
    assert len(site.coordinator.roster.workers) == 3


def test_a_session_that_is_forgotten_is_opened_again(
    site: Site, tiny_base: Path, text: Path, tmp_path: Path
) -> None:
    site.start(write_run(tmp_path / "one.toml", tiny_base, count=2, quorum=1))
    hand = _hand(site, tiny_base, text, "hand", holds=True)
    with working(hand):
        assert hand.view.training.wait(60)
        site.coordinator.roster._sessions.clear()
        hand.view.may_train.set()
        eventually(lambda: site.version("one") == 2, site.picture)
        assert exit_code(hand.ended()) == 0
    assert not [event for event in site.events() if "ended" in event]


def test_sessions_are_renewed_before_they_end(
    site: Site, tiny_base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.server.roster.SESSION_S", 0.2)
    site.start(write_run(tmp_path / "one.toml", tiny_base, count=4, quorum=1, steps=20))
    hand = _hand(site, tiny_base, text, "hand")
    with working(hand):
        eventually(lambda: site.version("one") == 4, site.picture)
        assert hand.ended().num_accepted == 4


# ---- the operator shuts a worker out -----------------------------------------------------------------------------


def test_a_revoked_worker_leaves_with_its_error_and_another_takes_its_task(
    site: Site, tiny_base: Path, text: Path, tmp_path: Path
) -> None:
    site.start(write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=1))
    out = _hand(site, tiny_base, text, "out", holds=True)
    stays = _hand(site, tiny_base, text, "stays")
    with working(out):
        assert out.view.training.wait(60)
        assert main(["workers", "revoke", out.worker_id]) == 0
        out.view.may_train.set()
        life = out.ended()
        assert isinstance(life.error, AccessError)
        assert exit_code(life) == 4
        assert "was revoked by the operator" in life.error.message
        with working(stays):
            eventually(lambda: site.version("one") == 1, site.picture)
    assert site.rounds("one")[0].contributors == {stays.worker_id}


# ---- Ctrl-C on a worker ------------------------------------------------------------------------------------------


def _join(hand: Hand) -> list[str]:
    return ["join", "--state", str(hand.state)]


def _is_training(site: Site) -> bool:
    return any(lease.stage is Stage.TRAINING for lease in site.coordinator.leases.values())


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a worker has said that it is stopping."""
    said = threading.Event()
    say = client_cli._say_stopping

    def tell(times: int) -> None:
        say(times)
        said.set()

    monkeypatch.setattr(client_cli, "_say_stopping", tell)
    return said


def test_one_interrupt_finishes_the_task_in_hand(
    site: Site,
    tiny_base: Path,
    text: Path,
    tmp_path: Path,
    interrupted: threading.Event,
    capsys: pytest.CaptureFixture[str],
) -> None:
    site.start(write_run(tmp_path / "one.toml", tiny_base, count=5, quorum=1, steps=150))
    hand = _hand(site, tiny_base, text, "hand")

    def interrupt() -> None:
        eventually(lambda: _is_training(site), site.picture)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(60)

    with _meanwhile(interrupt):
        assert main(_join(hand)) == 0
    assert "stopping: the task in hand is finished first" in capsys.readouterr().out
    eventually(lambda: site.version("one") == 1, site.picture)
    assert not site.coordinator.leases


def test_a_second_interrupt_leaves_at_once_and_gives_the_task_back(
    site: Site, tiny_base: Path, text: Path, tmp_path: Path, interrupted: threading.Event
) -> None:
    site.start(write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=1, steps=1_000_000))
    hand = _hand(site, tiny_base, text, "hand")

    def interrupt_twice() -> None:
        eventually(lambda: _is_training(site), site.picture)
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    with _meanwhile(interrupt_twice):
        assert main(_join(hand)) == INTERRUPTED
    assert not site.coordinator.leases
    assert [event for event in site.events() if "given back: the worker is stopping" in event]


def test_two_interrupts_at_once_end_a_worker_that_waits(
    site: Site, tiny_base: Path, text: Path, tmp_path: Path
) -> None:
    site.start(write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=2))
    hand = _hand(site, tiny_base, text, "hand")
    with working(hand):
        eventually(lambda: hand.worker.life.num_accepted == 1, site.picture)
        assert exit_code(hand.stop()) in (0, INTERRUPTED)


# ---- Ctrl-C on the coordinator -----------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_an_interrupted_coordinator_finishes_its_merge_or_does_it_again(
    site: Site,
    tiny_base: Path,
    text: Path,
    jobs: Jobs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
) -> None:
    site.start(write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=1))
    hand = _hand(site, tiny_base, text, "hand")
    site.stop()
    engine, draining, drain = ThreadEngine(jobs), threading.Event(), app._drain
    engine.may_run.clear()

    async def tell(coordinator: Any, now: Any) -> None:
        draining.set()
        await drain(coordinator, now)

    monkeypatch.setattr(app, "EngineProcess", lambda: engine)
    monkeypatch.setattr(app, "_drain", tell)
    words = ["serve", "--state", str(site.state), "--listen", site.address, "--http", "off"]

    def interrupt() -> None:
        with working(hand, leave_when_finished=False):
            assert engine.running.wait(60)
            os.kill(os.getpid(), signal.SIGINT)
            assert draining.wait(60)
            if times == 1:
                engine.may_run.set()
            else:
                os.kill(os.getpid(), signal.SIGINT)
            eventually(lambda: hand.view.has("; waits"))

    with _meanwhile(interrupt):
        assert main(words) == 0
    published = 1 if times == 1 else 0
    assert _versions(site, jobs) == published
    site.start()
    eventually(lambda: site.version("one") == 1, site.picture)
    assert site.rounds("one")[0].state is RoundState.PUBLISHED


def _versions(site: Site, jobs: Jobs) -> int:
    """The newest version that the ledger of a stopped coordinator has."""
    engine = ThreadEngine(jobs)
    engine.may_run.clear()
    with app.opened_state(app.ServeOptions(state=site.state), engine) as opened:
        (run,) = opened.coordinator.runs.values()
        return max(version.version for versions in run.versions.values() for version in versions)
