"""Held-out losses become a decision with its reason."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.common.errors import UsageError
from weft.common.settings import to_table
from weft.server.gate import GateSettings, decide, without_data
from weft.server.rounds import GateResult


def decided(before: float, after: float, half_width: float = 0.1, *, tolerance: float = 0.0) -> GateResult:
    return decide(
        before=before,
        after=after,
        difference=after - before,
        half_width=half_width,
        num_sequences=8,
        tolerance=tolerance,
    )


@pytest.mark.parametrize(
    ("after", "tolerance", "passed"),
    [
        (1.5, 0.0, True),
        (2.0, 0.0, True),
        (2.09, 0.0, True),
        (2.11, 0.0, False),
        (2.11, 0.05, True),
        (2.2, 0.05, False),
    ],
    ids=[
        "better",
        "same",
        "within-the-interval",
        "worse",
        "worse-within-the-tolerance",
        "worse-than-the-tolerance",
    ],
)
def test_only_what_is_surely_worse_is_rolled_back(after: float, tolerance: float, passed: bool) -> None:
    result = decided(2.0, after, tolerance=tolerance)
    assert result.passed is passed
    assert result.reason.startswith(f"worse by more than {tolerance:g}: ") is not passed
    assert f"held-out loss 2.0000 to {after:.4f}" in result.reason
    assert (result.loss_before, result.loss_after, result.num_sequences) == (2.0, after, 8)


@pytest.mark.parametrize("after", [math.nan, math.inf])
def test_a_candidate_without_a_finite_loss_is_rolled_back(after: float) -> None:
    for before in (2.0, math.nan):
        result = decided(before, after)
        assert not result.passed
        assert result.reason == f"held-out loss is {after}"


def test_a_candidate_that_heals_a_diverged_version_is_published() -> None:
    result = decided(math.nan, 2.0)
    assert result.passed
    assert result.loss_after == 2.0


@given(before=st.floats(), after=st.floats(), half_width=st.floats(), tolerance=st.floats(0, 1e6))
def test_whatever_was_measured_the_ledger_can_keep_the_result(
    before: float, after: float, half_width: float, tolerance: float
) -> None:
    result = decided(before, after, half_width, tolerance=tolerance)
    json.dumps(to_table(result), allow_nan=False)
    assert result.reason
    if not math.isfinite(after):
        assert not result.passed


def test_without_data_everything_is_published_and_says_so() -> None:
    result = without_data()
    assert result.passed
    assert "no held-out data" in result.reason


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"tolerance": -0.1}, "gate.tolerance"),
        ({"tolerance": math.nan}, "gate.tolerance"),
        ({"tolerance": math.inf}, "gate.tolerance"),
        ({"num_sequences_max": 1}, "gate.num_sequences_max"),
        ({"num_sequences_max": 10**9}, "gate.num_sequences_max"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: dict[str, float], key: str) -> None:
    with pytest.raises(UsageError, match=key):
        GateSettings(**settings)  # type: ignore[arg-type]
