from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from weft.client.trainer.checkpoint import TIME_SHARE_MAX, InnerCheckpoint, InnerState, binding_of
from weft.common.ids import Digest, ModuleKey, TaskId, run_id
from weft.common.protocol import ModuleStart, Task
from weft.common.tensors import write_tensors

LOWER, UPPER = ModuleKey(0, 2), ModuleKey(1, 0)
SHAPES: dict[ModuleKey, dict[str, tuple[int, ...]]] = {LOWER: {"a": (2, 3)}, UPPER: {"b": (4,), "c": (1, 2)}}
BINDING = Digest("a" * 64)


def state() -> InnerState:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    return InnerState(
        parameters={
            key: {name: draw(*shape) for name, shape in module.items()} for key, module in SHAPES.items()
        },
        optimiser={
            key: {
                f"{part}/{name}": draw(*(shape if part != "step" else (1,)))
                for name, shape in module.items()
                for part in ("exp_avg", "exp_avg_sq", "step")
            }
            for key, module in SHAPES.items()
        },
        losses=(3.25, 1 / 3),
        num_tokens=1234567890123,
    )


def checkpoint(path: Path, binding: Digest = BINDING, every_s: float = 10.0) -> InnerCheckpoint:
    return InnerCheckpoint(path, binding=binding, every_s=every_s, clock=lambda: 0.0)


def assert_equal(found: InnerState | None, expected: InnerState) -> None:
    assert found is not None
    assert (found.losses, found.num_tokens) == (expected.losses, expected.num_tokens)
    for ours, theirs in ((found.parameters, expected.parameters), (found.optimiser, expected.optimiser)):
        assert ours.keys() == theirs.keys()
        for key, arrays in theirs.items():
            assert ours[key].keys() == arrays.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(ours[key][name], array)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "inner"
    assert checkpoint(path).load(SHAPES) is None
    checkpoint(path).save(state())
    assert_equal(checkpoint(path).load(SHAPES), state())
    assert [entry.name for entry in tmp_path.iterdir()] == ["inner"]
    checkpoint(path).remove()
    assert checkpoint(path).load(SHAPES) is None
    checkpoint(path).remove()


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.99], ids=["header", "moments", "parameters", "end"])
def test_a_flipped_bit_is_a_warning_and_a_fresh_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: float
) -> None:
    path = tmp_path / "inner"
    checkpoint(path).save(state())
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert checkpoint(path).load(SHAPES) is None
    assert "inner is left aside" in caplog.text


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_torn_file_is_a_warning_and_a_fresh_start(tmp_path: Path, size: int) -> None:
    path = tmp_path / "inner"
    checkpoint(path).save(state())
    path.write_bytes(path.read_bytes()[:size])
    assert checkpoint(path).load(SHAPES) is None


def test_a_file_of_another_task_or_other_modules_is_left_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "inner"
    checkpoint(path).save(state())
    with caplog.at_level(logging.WARNING):
        assert checkpoint(path, Digest("b" * 64)).load(SHAPES) is None
        assert "of another task" in caplog.text
        assert checkpoint(path).load({LOWER: SHAPES[LOWER]}) is None
        assert checkpoint(path).load({**SHAPES, LOWER: {"a": (3, 2)}}) is None
        assert caplog.text.count("does not hold the tensors of this task") == 2
        write_tensors(path, {"losses": np.float64(1.0) * np.ones(())}, {"binding": BINDING})
        assert checkpoint(path).load(SHAPES) is None


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() == 0:
        path = tmp_path / "missing"
        yield path
        return
    tmp_path.chmod(0o500)
    yield tmp_path
    tmp_path.chmod(0o700)


def test_what_cannot_be_saved_is_a_warning(read_only: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        checkpoint(read_only / "inner").save(state())
    assert "no checkpoint within the task" in caplog.text


def test_saving_is_due_every_so_often_and_rarer_where_it_takes_long(tmp_path: Path) -> None:
    now_s = [0.0]
    reads = iter([0.0, 10.0, 10.0, 14.0])
    slow = InnerCheckpoint(
        tmp_path / "inner", binding=BINDING, every_s=10.0, clock=lambda: next(reads, now_s[0])
    )
    assert slow.due()
    slow.save(state())
    for now_s[0], due in ((14 + 4 / TIME_SHARE_MAX - 1, False), (14 + 4 / TIME_SHARE_MAX, True)):
        assert slow.due() is due
    quick = InnerCheckpoint(tmp_path / "inner", binding=BINDING, every_s=10.0, clock=lambda: now_s[0])
    quick.save(state())
    now_s[0] += 9.9
    assert not quick.due()
    now_s[0] += 0.1
    assert quick.due()


def task() -> Task:
    start = ModuleStart(
        module="0.2",
        version=3,
        blake3=Digest("c" * 64),
        size_bytes=9,
        train=True,
        round_number=4,
        steps_before=60,
    )
    return Task(
        task_id=TaskId("t-1"),
        run_id=run_id("tiny"),
        lease_token="token",
        lease_epoch=1,
        lease_s=20.0,
        path="2.0",
        modules=(start,),
        recipe_blake3=Digest("d" * 64),
        num_steps=20,
        update_bytes_max=1000,
    )


def test_a_binding_is_what_training_follows_from_and_not_the_lease() -> None:
    first = binding_of(task(), first_batch=40)
    again = replace(task(), task_id=TaskId("t-2"), lease_epoch=2, lease_token="other", num_steps=30)
    assert binding_of(again, first_batch=40) == first
    (start,) = task().modules
    others = [
        replace(task(), modules=(replace(start, blake3=Digest("e" * 64)),)),
        replace(task(), modules=(replace(start, train=False),)),
        replace(task(), modules=(replace(start, steps_before=61),)),
        replace(task(), recipe_blake3=Digest("e" * 64)),
        replace(task(), path="2.1"),
        replace(task(), rank=4),
    ]
    found = {binding_of(other, first_batch=40) for other in others} | {binding_of(task(), first_batch=41)}
    assert len(found) == 7
    assert first not in found
