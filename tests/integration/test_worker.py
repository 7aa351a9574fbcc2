"""The worker with its real trainer on a microscopic base, against a coordinator that only plays its part."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.stage import NUM_STEPS, Coordinator, Site
from tests.tiny import TEXT, tiny_recipe, write_tiny_base

from weft.client.heartbeat import TaskProgress
from weft.client.loop import INTERRUPTED, Action, Phase, exit_code
from weft.client.tasks.steps import read_module
from weft.client.tasks.training import loss_summary
from weft.client.worker import Worker
from weft.common.blobs import manifest_of
from weft.common.codec import CodecKind, CodecSettings
from weft.common.composition import ResidentBase
from weft.common.errors import (
    LeaseLost,
    NonFiniteLoss,
    PermissionRefused,
    RoundClosed,
    Unreachable,
    UpdateRejected,
    WeftError,
)
from weft.common.identity.signing import SigningKey
from weft.common.initial import initial_tensors
from weft.common.manifest import Signed, parse_json
from weft.common.protocol import (
    ProgressAnswer,
    Stage,
    Unable,
)
from weft.common.recipe import RECIPE_TYPE, FisherSettings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("worker") / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def make_site(tmp_path: Path, base: Path, data: Path) -> Callable[..., Site]:
    def make(*, given_base: Path | None = base, **changes: Any) -> Site:
        recipe = dataclasses.replace(tiny_recipe(base), **changes)
        return Site(tmp_path, Coordinator(tmp_path, base, recipe), data, given_base)

    return make


TERNARY = CodecSettings(kind=CodecKind.TERNARY, density=0.2)


# ---- the ordinary life -------------------------------------------------------------------------------------------


def test_a_task_from_the_poll_to_the_receipt(make_site: Callable[..., Site], tmp_path: Path) -> None:
    site = make_site(codec=TERNARY, fisher=FisherSettings(num_examples=2))
    life = site.live()
    coordinator = site.coordinator
    assert (life.num_accepted, exit_code(life)) == (1, 0)
    said = coordinator.accepted[0]
    assert (said.run, said.task, said.worker, said.epoch, said.num_steps) == (
        "tiny",
        "t-1",
        "w-1",
        1,
        NUM_STEPS,
    )
    assert said.num_tokens == NUM_STEPS * 4 * 16
    assert said.loss_last < said.loss_first
    assert any(np.abs(delta).max() > 0 for delta in coordinator.delta(0, tmp_path).values())
    assert list((tmp_path / "state" / "outbox").iterdir()) == []


def test_progress_is_reported_with_every_loss_once(make_site: Callable[..., Site]) -> None:
    site = make_site()
    seen = threading.Event()
    site.coordinator.on_report = lambda stage, done: _reported(
        seen, stage is Stage.TRAINING and done == NUM_STEPS
    )
    site.view.on_turn = lambda action: _await(seen) if action.phase is Phase.ENCODING else None
    site.live()
    steps = [loss.step for _, _, losses in site.coordinator.reports for loss in losses]
    assert steps == [1, 2, 3, 4]


def _reported(seen: threading.Event, now: bool) -> ProgressAnswer:
    if now:
        seen.set()
    return ProgressAnswer(stop=False, reason="")


def _await(event: threading.Event) -> None:
    # Reports are made by the clock; this only bounds how long a broken one can hold the test.
    assert event.wait(20)


def test_the_base_is_loaded_once_and_a_run_is_set_up_once(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[Path] = []
    load = ResidentBase.load

    def counted(base_dir: Path, *arguments: Any, **options: Any) -> ResidentBase:
        loads.append(base_dir)
        return load(base_dir, *arguments, **options)

    monkeypatch.setattr(ResidentBase, "load", counted)
    site = make_site()
    site.coordinator.num_tasks = 3
    assert site.live().num_accepted == 3
    assert len(loads) == 1
    assert sum("tokens" in line for line in site.view.lines) == 1


def test_adamw_residual_and_data_go_on_between_tasks_and_processes(
    make_site: Callable[..., Site], tmp_path: Path
) -> None:
    """Two tasks in one process, and one each in two processes, send the same bytes."""
    together = make_site(codec=TERNARY)
    together.coordinator.num_tasks = 2
    together.live()
    apart = make_site(codec=TERNARY)
    apart.directory = tmp_path / "apart"
    apart.directory.mkdir()
    apart.live()
    apart.coordinator.num_tasks = 2
    apart.live()
    digests = [
        [update.digest for said in site.coordinator.accepted for update in said.updates]
        for site in (together, apart)
    ]
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[0][1]


def test_what_is_damaged_of_an_earlier_process_starts_afresh(
    make_site: Callable[..., Site], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site = make_site(codec=TERNARY)
    site.live()
    for path in (tmp_path / "state" / "runs").glob("*/0/0.0.*"):
        path.write_bytes(b"damaged")
    site.coordinator.num_tasks = 2
    assert site.live().num_accepted == 1
    assert "starts afresh" in caplog.text


# ---- the network -------------------------------------------------------------------------------------------------


def test_a_lost_receipt_is_asked_for_again_with_the_same_statement(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.coordinator.submit_errors = [Unreachable("down"), Unreachable("down")]
    assert site.live().num_accepted == 1
    assert site.view.phases.count(Phase.TRAINING) == 1
    assert len({statement.payload for statement in site.coordinator.statements}) == 1
    assert len(site.coordinator.statements) == 3


@pytest.mark.parametrize("error", [LeaseLost("expired"), RoundClosed("late")])
def test_a_task_that_is_no_longer_ours_changes_nothing_here(
    make_site: Callable[..., Site], tmp_path: Path, error: WeftError
) -> None:
    site = make_site(codec=TERNARY)
    site.coordinator.submit_errors = [error]
    site.live()
    digests = [
        parse_json(said.payload, 10**6)["updates"][0]["digest"] for said in site.coordinator.statements
    ]
    # Neither AdamW's state nor the residual moved: the task done again is the same.
    assert len(digests) == 2
    assert digests[0] == digests[1]
    assert site.coordinator.released == []


def test_told_to_stop_the_training_ends_at_once(make_site: Callable[..., Site]) -> None:
    site = make_site()
    told: list[ProgressAnswer] = []
    heard = threading.Event()

    def on_report(stage: Stage, num_done: int) -> ProgressAnswer:
        if stage is Stage.TRAINING and not told:
            told.append(ProgressAnswer(stop=True, reason="round 1 closed"))
            heard.set()
            return told[0]
        return ProgressAnswer(stop=False, reason="")

    def on_progress(progress: TaskProgress) -> None:
        if progress.stage is Stage.TRAINING and progress.num_done == 1:
            _await(heard)

    site.coordinator.on_report = on_report
    site.view.on_progress = on_progress
    reasons: list[str] = []
    site.view.on_turn = lambda action: reasons.append(action.reason)
    assert site.live().num_accepted == 1
    assert "told to drop the task: round 1 closed" in reasons
    assert site.view.phases.count(Phase.TRAINING) == 2
    assert site.view.phases.count(Phase.SUBMITTING) == 1


def test_a_revoked_worker_leaves(make_site: Callable[..., Site]) -> None:
    site = make_site()

    def revoked() -> None:
        raise PermissionRefused("w-1 was revoked by the operator")

    site.coordinator.on_poll = revoked
    life = site.live()
    assert exit_code(life) == PermissionRefused.exit_code


# ---- what cannot be done -----------------------------------------------------------------------------------------


def test_a_refused_update_is_given_back_and_the_second_ends_the_run_here(
    make_site: Callable[..., Site],
) -> None:
    site = make_site()
    site.coordinator.submit_errors = [UpdateRejected("too large"), UpdateRejected("too large")]
    life = site.live()
    assert site.coordinator.released == ["too large", "too large"]
    assert site.coordinator.polled[-1] == (Unable(run_id="tiny", reason="too large"),)
    assert exit_code(life) == UpdateRejected.exit_code


def test_data_too_short_is_told_to_the_operator_and_ends_the_worker(
    make_site: Callable[..., Site], data: Path
) -> None:
    site = make_site()
    data.write_text("short")
    life = site.live()
    assert exit_code(life) == 3
    assert "one batch needs" in site.coordinator.released[0]
    assert site.coordinator.polled[-1][0].run_id == "tiny"


def test_a_worker_without_data_says_what_the_run_wants(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.data = None
    life = site.live()
    assert life.error is not None
    assert (exit_code(life), life.error.hint[:22]) == (3, "join again with --data")
    assert "learns from its workers' own data" in site.coordinator.released[0]


def test_divergence_twice_makes_the_run_unable(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*_: object, **__: object) -> None:
        raise NonFiniteLoss("the loss is nan at step 2")

    monkeypatch.setattr("weft.client.trainer.training.Trainer.train", diverge)
    site = make_site()
    life = site.live()
    assert site.coordinator.released == ["the loss is nan at step 2"] * 2
    assert exit_code(life) == NonFiniteLoss.exit_code


def test_a_bug_is_logged_and_does_not_end_the_process(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def buggy(losses: tuple[float, ...]) -> tuple[float, float]:
        calls.append(1)
        if len(calls) == 1:
            raise ZeroDivisionError("division by zero")
        return loss_summary(losses)

    monkeypatch.setattr("weft.client.tasks.training.loss_summary", buggy)
    site = make_site()
    assert site.live().num_accepted == 1
    assert site.coordinator.released == ["ZeroDivisionError while submitting: division by zero"]
    assert "failed unexpectedly" in caplog.text


def test_a_recipe_of_another_signer_is_not_followed(make_site: Callable[..., Site]) -> None:
    site = make_site()
    stranger = SigningKey.generate()
    site.coordinator.signed = Signed.sign(stranger, RECIPE_TYPE, site.coordinator.signed.payload)
    life = site.live()
    assert exit_code(life) == 4
    assert Phase.LOADING not in site.view.phases


# ---- the base ----------------------------------------------------------------------------------------------------


def test_a_base_that_is_nowhere_is_fetched_once_and_checked(
    make_site: Callable[..., Site], tmp_path: Path
) -> None:
    site = make_site(given_base=None)
    assert site.live().num_accepted == 1
    cached = tmp_path / "bases" / site.coordinator.recipe.base.digest
    assert {path.name for path in cached.iterdir()} == {
        file.name for file in site.coordinator.recipe.base.files
    }
    fetched = list(site.coordinator.downloaded)
    site.coordinator.num_tasks = 2
    site.live()
    assert site.coordinator.downloaded[len(fetched) :] == [manifest_of(site.coordinator.start).blake3]


def test_a_damaged_cached_base_is_found(make_site: Callable[..., Site], tmp_path: Path) -> None:
    site = make_site(given_base=None)
    site.live()
    config = tmp_path / "bases" / site.coordinator.recipe.base.digest / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    site.coordinator.num_tasks = 2
    life = site.live()
    assert exit_code(life) == 6
    assert "damaged" in site.coordinator.released[0]


def test_a_given_base_that_differs_is_refused(
    make_site: Callable[..., Site], tmp_path: Path, base: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    (other / "config.json").write_bytes((other / "config.json").read_bytes() + b" ")
    site = make_site(given_base=other)
    life = site.live()
    assert exit_code(life) == 3
    assert "config.json" in site.coordinator.released[0]


# ---- stopping ----------------------------------------------------------------------------------------------------


def _stop_at(site: Site, worker: Worker, phase: Phase, times: int = 1) -> None:
    def on_turn(action: Action) -> None:
        if action.phase is phase:
            for _ in range(times):
                worker.request_stop()

    site.view.on_turn = on_turn


def test_stop_once_finishes_the_task_in_hand(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.coordinator.num_tasks = 5
    worker = site.worker()
    _stop_at(site, worker, Phase.TRAINING)
    life = worker.run()
    assert (life.num_accepted, exit_code(life)) == (1, 0)


def test_stop_twice_gives_the_task_back(make_site: Callable[..., Site]) -> None:
    site = make_site()
    worker = site.worker()
    _stop_at(site, worker, Phase.TRAINING, times=2)
    life = worker.run()
    assert (life.num_accepted, exit_code(life)) == (0, INTERRUPTED)
    assert site.coordinator.released == ["the worker is stopping"]


def test_stop_while_fetching_breaks_it_off(make_site: Callable[..., Site], tmp_path: Path) -> None:
    site = make_site(given_base=None)
    worker = site.worker()
    _stop_at(site, worker, Phase.FETCHING)
    assert exit_code(worker.run()) == 0
    assert site.coordinator.released == ["the worker is stopping"]
    assert not (tmp_path / "bases" / site.coordinator.recipe.base.digest).exists()


def test_stop_while_waiting_for_work_leaves(make_site: Callable[..., Site]) -> None:
    site = make_site()
    worker = site.worker()
    _stop_at(site, worker, Phase.POLLING)
    assert exit_code(worker.run()) == 0
    assert site.coordinator.accepted == []


# ---- pieces ------------------------------------------------------------------------------------------------------


def test_loss_summary_is_first_tenth_and_second_half() -> None:
    assert loss_summary([4.0, 3.0, 2.0, 1.0]) == (4.0, 1.5)
    assert loss_summary([float(n) for n in range(20)]) == (0.5, 14.5)


def test_a_version_reads_as_it_was_written(make_site: Callable[..., Site]) -> None:
    coordinator = make_site().coordinator
    read = read_module(coordinator.start, coordinator.schema)
    expected = initial_tensors(coordinator.schema, seed=0)
    assert all(np.array_equal(read[name], expected[name]) for name in expected)
