"""How good a path is, when that is measured, and when it has learnt enough."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from weft.common.ids import ModuleKey, Path, RunId, WorkerId
from weft.server.paths import (
    EVALUATIONS_KEPT,
    PathEvaluation,
    PathPolicy,
    PathRecord,
    evaluated,
    is_due,
    not_measured,
)

PATH = Path((0, 1))
START = PathRecord(run=RunId("r"), experts=PATH.experts)
EVERY = PathPolicy(evaluate_every=1)


def measured(loss: float, version: int, source: str = "a") -> PathEvaluation:
    return PathEvaluation(
        versions=(version, version), loss=loss, num_labels=8, source=source, worker_id=WorkerId("w"), at=0.0
    )


def after(*measurements: PathEvaluation, policy: PathPolicy = EVERY) -> PathRecord:
    record = START
    for measurement in measurements:
        record = evaluated(record, measurement, policy)
    return record


@given(st.lists(st.floats(0, 10), min_size=1, max_size=30))
def test_the_best_is_the_lowest_loss_of_one_source(losses: list[float]) -> None:
    record = after(*(measured(loss, version) for version, loss in enumerate(losses)))
    assert record.best is not None
    assert record.best.loss == min(losses)
    assert record.num_since_best == len(losses) - 1 - losses.index(min(losses))
    assert not record.stopped


def test_losses_of_different_data_are_not_compared() -> None:
    record = after(measured(1.0, 0, "easy"), measured(5.0, 0, "hard"), measured(4.0, 1, "hard"))
    assert record.best is not None
    assert (record.best.source, record.best.loss) == ("hard", 4.0)


def test_a_path_stops_after_too_many_without_a_better_one() -> None:
    policy = PathPolicy(evaluate_every=1, early_stop=2)
    losses = (3.0, 2.0, 2.5)
    assert not after(*(measured(loss, index) for index, loss in enumerate(losses)), policy=policy).stopped
    stopped = after(*(measured(loss, index) for index, loss in enumerate((*losses, 2.4))), policy=policy)
    assert stopped.stopped == "2 evaluations without a loss below 2.0000"


def test_what_is_kept_is_bounded() -> None:
    record = after(*(measured(float(version), version) for version in range(EVALUATIONS_KEPT + 9)))
    assert len(record.evaluations) == EVALUATIONS_KEPT


def versions(first: int, second: int) -> dict[ModuleKey, int]:
    return dict(zip(PATH.modules, (first, second), strict=True))


def test_a_path_is_due_when_all_its_modules_moved() -> None:
    policy = PathPolicy(evaluate_every=2)
    record = after(measured(2.0, 1))
    assert is_due(None, PATH, versions(0, 0), policy, trained=False)
    assert not is_due(record, PATH, versions(1, 1), policy, trained=True)
    assert not is_due(record, PATH, versions(3, 2), policy, trained=False)
    assert is_due(record, PATH, versions(3, 3), policy, trained=False)
    assert is_due(record, PATH, versions(2, 1), policy, trained=True)
    assert not is_due(None, PATH, versions(0, 0), PathPolicy(), trained=True)


def test_a_source_with_nothing_held_out_is_remembered_once() -> None:
    record = not_measured(not_measured(START, "a"), "a")
    assert record.unmeasured == ("a",)
