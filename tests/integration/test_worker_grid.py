"""Workers on grids against the real coordinator: fragments with overlap, a small rank, a kill within a task."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.running import Hand, Site, working, write_run

from weft.client.heartbeat import TaskProgress
from weft.client.home import WorkerSettings, save_settings
from weft.common.protocol import Stage
from weft.server.engine_process import Jobs


class Killed(BaseException):
    """The end of a process, as far as one process can play it."""


@pytest.fixture
def site(tmp_path: Path, jobs: Jobs) -> Iterator[Site]:
    with Site(tmp_path / "site", jobs) as site:
        yield site


def test_fragments_are_sent_in_turn_while_training_goes_on(
    site: Site, tiny_base: Path, text: Path, tmp_path: Path
) -> None:
    more = "[topology]\nexperts = [1, 1]\nlevels_per_task = 1\n[streaming]\noverlap_steps = 2\nmixing = 0.5\n"
    site.start(write_run(tmp_path / "streams.toml", tiny_base, more, count=3, quorum=1))
    with working(Hand(site.address, site.token, text, site.home, "one", base=tiny_base)) as (one,):
        assert one.ended().num_accepted == 6
    for module in ("0.0", "1.0"):
        assert site.version("streams", module) == 3
        updates = [update for round_ in site.rounds("streams", module) for update in round_.updates]
        assert [update.num_steps for update in updates] == [4] * 3


def test_a_worker_of_a_smaller_rank_is_given_slices(
    site: Site, tiny_base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A worker that gave a path back is not offered it again for a while.
    monkeypatch.setattr("weft.server.leasing.GAVE_BACK_S", 0.0)
    site.start(write_run(tmp_path / "ranks.toml", tiny_base, count=1))
    small = site.home.root / "workers" / "small"
    save_settings(small, WorkerSettings(data=str(text), name="small", rank=2))
    hands = [
        Hand(site.address, site.token, text, site.home, name, base=tiny_base) for name in ("small", "large")
    ]
    with working(*hands):
        assert [hand.ended().num_accepted for hand in hands] == [1, 1]
    ranks = {update.worker_id: update.rank for update in site.rounds("ranks")[0].updates}
    assert ranks == {hands[0].worker_id: 2, hands[1].worker_id: 0}
    assert any("this worker trains rank 2" in event for event in site.events())


def test_a_worker_that_is_killed_goes_on_with_the_same_task(
    site: Site, tiny_base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.client.trainer.checkpoint.InnerCheckpoint.due", lambda self: True)
    site.start(write_run(tmp_path / "killed.toml", tiny_base, count=1, quorum=1))
    hand = Hand(site.address, site.token, text, site.home, "mortal", base=tiny_base)
    steps: list[int] = []

    def on_progress(progress: TaskProgress) -> None:
        if progress.stage is Stage.TRAINING and progress.num_done:
            if len(steps) == 2:
                steps.append(0)
                raise Killed
            steps.append(progress.num_done)

    monkeypatch.setattr(hand.view, "progress", on_progress)
    with pytest.raises(Killed):
        hand.start().ended()
    hand.transport.close()
    with working(hand):
        assert hand.ended().num_accepted == 1
    assert steps == [1, 2, 0, 3, 4]
    (update,) = site.rounds("killed")[0].updates
    assert (update.task_id, update.epoch, update.num_steps) == ("t-1", 1, 4)
