"""The quality campaign's statistics: intervals, verdicts, and that every check names arms that are run."""

from __future__ import annotations

import math
from typing import Any

import pytest
from benchmarks.quality.arms import ABLATION, FULL, LORA_ARMS, SHORT
from benchmarks.quality.checks import (
    ABLATION_CHECKS,
    FULL_CHECKS,
    LORA_CHECKS,
    SHORT_CHECKS,
    Check,
    Expected,
    gap_closed,
    interval,
    measure,
)


def check(expected: Expected) -> Check:
    return Check(
        number="1",
        claim="",
        source="",
        first=("a", "loss"),
        second=("b", "nested", "loss"),
        expected=expected,
    )


def results(differences: list[float]) -> dict[tuple[str, int], dict[str, Any]]:
    found: dict[tuple[str, int], dict[str, Any]] = {
        ("a", seed): {"loss": 2.0 + difference} for seed, difference in enumerate(differences)
    }
    return found | {("b", seed): {"nested": {"loss": 2.0}} for seed in range(len(differences) + 1)}


def test_interval_is_students() -> None:
    mean, half_width = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert half_width == pytest.approx(2.776 * math.sqrt(2.5 / 5))
    assert interval([1.0]) == (1.0, math.inf)


@pytest.mark.parametrize(
    ("expected", "differences", "verdict"),
    [
        (Expected.LOWER, [-0.2, -0.21, -0.19], "confirmed"),
        (Expected.LOWER, [0.2, 0.21, 0.19], "opposite"),
        (Expected.LOWER, [-0.2, 0.21, -0.19], "not shown"),
        (Expected.HIGHER, [0.2, 0.21, 0.19], "confirmed"),
        (Expected.SMALL, [0.001, -0.001, 0.002], "confirmed"),
        (Expected.SMALL, [0.04, 0.06, 0.02], "not shown"),
        (Expected.SMALL, [0.2, 0.21, 0.19], "opposite"),
        (Expected.LOWER, [-0.2], "not shown"),
    ],
)
def test_verdict(expected: Expected, differences: list[float], verdict: str) -> None:
    measured = measure(check(expected), results(differences))
    assert measured is not None
    assert measured.num_seeds == len(differences)
    assert measured.verdict == verdict


def test_without_a_common_seed_nothing_is_measured() -> None:
    assert measure(check(Expected.LOWER), {("a", 0): {"loss": 1.0}, ("b", 1): {"loss": 1.0}}) is None


def test_gap_closed() -> None:
    assert gap_closed({"loss_before": 3.0, "loss": 2.5, "floor": 1.0}) == 0.25


def test_every_check_names_arms_that_are_run() -> None:
    known = {*FULL, *ABLATION, *LORA_ARMS}
    for each in (*FULL_CHECKS, *ABLATION_CHECKS, *LORA_CHECKS):
        assert {each.first[0], each.second[0]} <= known
    assert {name for each in SHORT_CHECKS for name in (each.first[0], each.second[0])} <= SHORT.keys()


def test_an_arms_digest_follows_its_settings_and_seed() -> None:
    digests = {arm.digest(seed) for arm in ({**FULL, **ABLATION}).values() for seed in range(2)}
    assert len(digests) == 2 * len({**FULL, **ABLATION})
