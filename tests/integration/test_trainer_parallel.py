"""Two processes on a CPU through gloo: rank 0 is the test, the follower is a process as ``weft join`` starts it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import tiny_recipe, write_tiny_base

from weft.client.data import load_dataset
from weft.client.trainer.gradients import ALONE
from weft.client.trainer.parallel import Group, launch
from weft.client.trainer.training import OnStep, StepReport, Trainer, TrainResult
from weft.common.composition import Composed, ResidentBase, describe
from weft.common.errors import OutOfMemory, UsageError
from weft.common.ids import ModuleKey
from weft.common.initial import initial_tensors
from weft.common.recipe import InnerSettings, Recipe, TaskKind, TaskSettings
from weft.common.sequences import Batch

CPU = torch.device("cpu")
INNER = InnerSettings(steps=4, batch_size=5, sequence_length=16, learning_rate=1e-3, weight_decay=0.1)
LOWER, UPPER = ModuleKey(0, 0), ModuleKey(1, 0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of which different parts are learnt, so that shares of a batch differ in labels."""
    path = tmp_path_factory.mktemp("data") / "a.jsonl"
    rows = [f'{{"prompt": "{"over " * (i % 9)}", "completion": "under, row by row. "}}' for i in range(60)]
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    with launch(2, CPU) as group:
        yield group


def make_trainer(base: Path, data: Path, recipe: Recipe, group: Group | None) -> Trainer:
    resident = ResidentBase.load(base, recipe.task, device=CPU, dtype=torch.float32)
    gradients = group.gradients(base, dtype=torch.float32, quantise="none") if group else ALONE
    dataset = load_dataset(data, resident.tokenizer, recipe, worker="w1")
    return Trainer(resident, recipe, dataset, clock=lambda: 0.0, gradients=gradients)


def train(
    trainer: Trainer, base: Path, keys: tuple[ModuleKey, ...], on_step: OnStep = lambda report: False
) -> TrainResult:
    schemas = describe(base, trainer.recipe)
    start = {
        name: array
        for schema in schemas.values()
        for name, array in initial_tensors(schema, seed=trainer.recipe.inner.seed).items()
    }

    return trainer.train(
        start, dict.fromkeys(keys, 0), num_steps=4, first_batch=1, optimiser_states={}, on_step=on_step
    )


def assert_same(found: TrainResult, expected: TrainResult) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.deltas.keys() == expected.deltas.keys()
    for key, deltas in expected.deltas.items():
        for name, delta in deltas.items():
            np.testing.assert_allclose(found.deltas[key][name], delta, atol=1e-6)


def recipes(base: Path) -> dict[str, Recipe]:
    path = tiny_recipe(base, experts=(1, 1), inner=INNER)
    labelled = TaskSettings(kind=TaskKind.SEQUENCE_CLASSIFICATION, num_labels=2)
    return {
        "path": path,
        "fewer sequences than processes": replace(path, inner=replace(INNER, batch_size=1)),
        "classification": replace(path, task=labelled),
    }


@pytest.mark.parametrize("name", ["path", "fewer sequences than processes", "classification"])
@pytest.mark.parametrize("keys", [(LOWER, UPPER), (UPPER,)], ids=["both", "upper"])
def test_two_processes_train_as_one(
    base: Path, chat: Path, tmp_path: Path, group: Group, name: str, keys: tuple[ModuleKey, ...]
) -> None:
    recipe, data = recipes(base)[name], chat
    if recipe.task.num_labels:
        data = tmp_path / "labelled.jsonl"
        data.write_text('{"text": "over", "label": 0}\n{"text": "under row by row", "label": 1}\n' * 8)
    alone = train(make_trainer(base, data, recipe, None), base, keys)
    together = make_trainer(base, data, recipe, group)
    assert together.micro_batch_size == -(-recipe.inner.batch_size // 2)
    assert_same(train(together, base, keys), alone)
    assert not group.broken


def test_a_task_that_is_stopped_leaves_the_group_ready(base: Path, chat: Path, group: Group) -> None:
    recipe = recipes(base)["path"]
    together = make_trainer(base, chat, recipe, group)
    assert train(together, base, (LOWER,), lambda report: report.step == 2).num_steps == 2
    assert_same(
        train(together, base, (LOWER,)), train(make_trainer(base, chat, recipe, None), base, (LOWER,))
    )
    assert not group.broken


def test_all_take_smaller_pieces_when_one_runs_out_of_memory(
    base: Path, chat: Path, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes(base)["path"]
    alone = train(make_trainer(base, chat, recipe, None), base, (LOWER, UPPER))
    whole = Composed.losses
    num_rows_max = 1

    def losses(composed: Composed, batch: Batch) -> torch.Tensor:
        if len(batch.lengths) > num_rows_max:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(composed, batch)

    together = make_trainer(base, chat, recipe, group)
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
    alone = train(make_trainer(base, chat, recipe, None), base, (LOWER,))
    (follower,) = group.followers

    def kill(report: StepReport) -> bool:
        if report.step == 2:
            follower.kill()
            follower.wait()
        return False

    together = make_trainer(base, chat, recipe, group)
    with caplog.at_level(logging.WARNING):
        assert_same(train(together, base, (LOWER,), kill), alone)
        assert "ended with exit code -9; going on alone" in caplog.text
        assert group.broken
        assert_same(train(together, base, (LOWER,)), alone)
    assert caplog.text.count("going on alone") == 1
