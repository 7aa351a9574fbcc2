"""Two processes on a CPU through gloo: rank 0 is the test, the follower is a process as ``weft join`` starts it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.sharing import (
    CPU,
    LOWER,
    UPPER,
    assert_same,
    load_whole,
    make_trainer,
    recipes,
    train,
    write_chat,
    write_labelled,
)
from tests.tiny import write_tiny_base

from weft.client.trainer.group import Group, launch
from weft.client.trainer.parallel import Shared
from weft.client.trainer.training import StepReport
from weft.common.composition import Composed
from weft.common.errors import OutOfMemory, UsageError
from weft.common.ids import ModuleKey
from weft.common.sequences import Batch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("data") / "a.jsonl")


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with launch(2, CPU) as group:
        yield group


@pytest.mark.parametrize("name", ["path", "fewer sequences than processes", "classification"])
@pytest.mark.parametrize("keys", [(LOWER, UPPER), (UPPER,)], ids=["both", "upper"])
def test_two_processes_train_as_one(
    base: Path, chat: Path, tmp_path: Path, group: Group, name: str, keys: tuple[ModuleKey, ...]
) -> None:
    recipe, data = recipes(base)[name], chat
    if recipe.task.num_labels:
        data = write_labelled(tmp_path / "labelled.jsonl")
    alone = train(make_trainer(load_whole(base, recipe), data, recipe), base, keys)
    together = make_trainer(load_whole(base, recipe), data, recipe, Shared(group))
    assert together.micro_batch_size == -(-recipe.inner.batch_size // 2)
    assert_same(train(together, base, keys), alone)
    assert not group.broken


def test_a_task_that_is_stopped_leaves_the_group_ready(base: Path, chat: Path, group: Group) -> None:
    recipe = recipes(base)["path"]
    together = make_trainer(load_whole(base, recipe), chat, recipe, Shared(group))
    assert train(together, base, (LOWER,), lambda report: report.step == 2).num_steps == 2
    assert_same(
        train(together, base, (LOWER,)),
        train(make_trainer(load_whole(base, recipe), chat, recipe), base, (LOWER,)),
    )
    assert not group.broken


def test_all_take_smaller_pieces_when_one_runs_out_of_memory(
    base: Path, chat: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes(base)["path"]
    alone = train(make_trainer(load_whole(base, recipe), chat, recipe), base, (LOWER, UPPER))
    whole = Composed.losses
    num_rows_max = 1

    def losses(composed: Composed, batch: Batch) -> torch.Tensor:
        if len(batch.lengths) > num_rows_max:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(composed, batch)

    together = make_trainer(load_whole(base, recipe), chat, recipe, Shared(group))
    monkeypatch.setattr(Composed, "losses", losses)
    assert_same(train(together, base, (LOWER, UPPER)), alone)
    assert together.micro_batch_size == 1
    num_rows_max = 0
    with pytest.raises(OutOfMemory, match="1 of 2 processes ran out of memory"):
        train(together, base, (LOWER, UPPER))
    assert not group.broken


@pytest.mark.parametrize(("num_processes", "device"), [(0, "cpu"), (10_000, "cuda"), (2, "mps")])
def test_processes_without_a_device_are_refused(num_processes: int, device: str) -> None:
    with (
        pytest.raises(UsageError, match=f"--processes is {num_processes}"),
        launch(num_processes, torch.device(device)),
    ):
        raise AssertionError


def test_when_a_follower_dies_the_task_goes_on_alone(
    base: Path, chat: Path, group: Group, caplog: pytest.LogCaptureFixture
) -> None:
    # The last test: a process can be in one group at a time, and this one is of no use afterwards.
    recipe = recipes(base)["path"]
    alone = train(make_trainer(load_whole(base, recipe), chat, recipe), base, (LOWER,))
    (follower,) = group.followers

    def kill(report: StepReport) -> bool:
        if report.step == 2:
            follower.kill()
            follower.wait()
        return False

    together = make_trainer(load_whole(base, recipe), chat, recipe, Shared(group))
    with caplog.at_level(logging.WARNING):
        assert_same(train(together, base, (LOWER,), kill), alone)
        assert "ended with exit code -9; going on alone" in caplog.text
        assert group.broken
        assert_same(train(together, base, (LOWER,)), alone)
    assert caplog.text.count("going on alone") == 1
