from __future__ import annotations

import pytest

from weft.client.trainer.schedule import learning_rate
from weft.common.recipe import InnerSettings, Schedule


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Schedule.CONSTANT, [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Schedule.COSINE, [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]),
        (Schedule.LINEAR, [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]),
    ],
)
def test_rate_follows_the_module_through_all_its_rounds(schedule: Schedule, rates: list[float]) -> None:
    inner = InnerSettings(steps=5, learning_rate=1.0, warmup_steps=2, schedule=schedule)
    steps = [0, 1, 2, 6, 10, 11]
    assert [learning_rate(inner, num_rounds=2, step=step) for step in steps] == pytest.approx(rates)


def test_warm_up_longer_than_the_run_stays_below_the_peak() -> None:
    inner = InnerSettings(steps=1, learning_rate=1.0, warmup_steps=4, schedule=Schedule.COSINE)
    assert [learning_rate(inner, num_rounds=2, step=step) for step in range(2)] == [0.25, 0.5]
