from __future__ import annotations

import math

import numpy as np
import pytest

from weft.common.evaluation import Evaluation, paired_difference


def evaluation(losses: np.ndarray, num_labels: np.ndarray, num_bytes: int = 0) -> Evaluation:
    return Evaluation(losses=losses, num_labels=num_labels, num_bytes=num_bytes)


def test_loss_is_weighted_by_labels_and_bits_by_bytes() -> None:
    found = evaluation(np.array([6.0, 2.0]), np.array([3, 1]), num_bytes=10)
    assert found.loss == 2.0
    assert found.bits_per_byte == pytest.approx(8 / math.log(2) / 10)
    assert evaluation(np.array([1.0]), np.array([1])).bits_per_byte is None


def test_interval_of_equal_lengths_is_that_of_the_mean() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(100, 30, 50), rng.normal(99, 30, 50)
    labels = np.full(50, 7)
    mean, half_width = paired_difference(evaluation(before, labels), evaluation(after, labels))
    per_label = (after - before) / 7
    assert mean == pytest.approx(per_label.mean())
    assert half_width == pytest.approx(1.959964 * per_label.std(ddof=1) / math.sqrt(50), rel=1e-6)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        labels = rng.integers(50, 150, 60)
        hardness = rng.normal(3.0, 1.0, 60) * labels
        effect = (-0.02 + rng.normal(0, 0.05, 60)) * labels
        mean, half_width = paired_difference(
            evaluation(hardness, labels), evaluation(hardness + effect, labels)
        )
        covered += abs(mean + 0.02) <= half_width
    assert 0.91 <= covered / 400 <= 0.98


def test_pairing_removes_what_makes_sequences_hard() -> None:
    rng = np.random.default_rng(2)
    labels = np.full(20, 100)
    hardness = rng.normal(300, 100, 20)
    mean, half_width = paired_difference(evaluation(hardness, labels), evaluation(hardness - 1, labels))
    assert mean == pytest.approx(-0.01)
    assert half_width == pytest.approx(0.0, abs=1e-12)


def test_other_sequences_and_single_ones_are_refused() -> None:
    one = evaluation(np.array([1.0]), np.array([2]))
    with pytest.raises(ValueError, match="one sequence"):
        paired_difference(one, one)
    with pytest.raises(ValueError, match="not of the same sequences"):
        paired_difference(one, evaluation(np.array([1.0]), np.array([3])))
