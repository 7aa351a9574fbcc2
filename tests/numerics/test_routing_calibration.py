"""Calibration of a router's bias, against a linear program and as properties; k-means against brute force."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from weft.common.ids import Digest
from weft.common.modules import Topology
from weft.common.routing import calibrate, fit_kmeans

BASE = Digest("ab" * 32)


def predicted(scores: Any, bias: Any) -> Any:
    return np.bincount((scores + bias).argmax(1), minlength=scores.shape[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 9), st.floats(0.05, 20), st.floats(0.1, 5))
def test_predicted_paths_are_as_frequent_as_labels(
    seed: int, num_paths: int, spread: float, evenness: float
) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, spread, (400, num_paths)) + rng.normal(0, 2 * spread, num_paths)
    labels = rng.choice(num_paths, 400, p=rng.dirichlet(np.full(num_paths, evenness)))
    wanted = np.bincount(labels, minlength=num_paths)
    found = predicted(scores, calibrate(scores, wanted / 400))
    assert np.abs(found - wanted).max() <= 3
    assert (found[wanted == 0] == 0).all()


def test_the_assignment_is_the_cheapest_one_of_these_sizes() -> None:
    """The transport problem's optimum, from a linear program that knows nothing of temperatures."""
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(60, 4))
    wanted = np.array([30, 18, 9, 3])
    rows = np.kron(np.eye(60), np.ones(4))
    columns = np.kron(np.ones(60), np.eye(4))
    optimum = linprog(
        -scores.reshape(-1), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([np.ones(60), wanted])
    ).x.reshape(60, 4)
    bias = calibrate(scores, wanted / 60)
    agreeing = (optimum.argmax(1) == (scores + bias).argmax(1)).mean()
    assert agreeing >= 58 / 60


def test_a_calibrated_router_needs_no_bias() -> None:
    rng = np.random.default_rng(4)
    scores = rng.normal(size=(500, 5)) * 3
    bias = calibrate(scores, predicted(scores, np.zeros(5)) / 500)
    assert ((scores + bias).argmax(1) == scores.argmax(1)).mean() > 0.98


def test_kmeans_centres_are_the_best_of_all_partitions() -> None:
    rng = np.random.default_rng(5)
    points = np.concatenate([rng.normal(mean, 0.4, (3, 2)) for mean in (0, 3, 6)]).astype(np.float32)

    def cost(labels: Any) -> float:
        return sum(
            float(((points[labels == k] - points[labels == k].mean(0)) ** 2).sum())
            for k in range(3)
            if (labels == k).any()
        )

    best = min(cost(np.array(labels)) for labels in itertools.product(range(3), repeat=9))
    router = fit_kmeans(points, paths=Topology(experts=(3,)).paths, base_digest=BASE, seed=0)
    assert cost(router.route(points)[:, 0]) == pytest.approx(best, rel=1e-5)


def test_the_linear_form_finds_the_nearest_centre() -> None:
    rng = np.random.default_rng(6)
    points = (rng.normal(size=(300, 8)) + 50).astype(np.float32)
    router = fit_kmeans(points, paths=Topology(experts=(4,)).paths, base_digest=BASE, seed=0)
    centres = router.weights / 2 + router.centre.astype(np.float64)
    distances = ((points[:, None] - centres) ** 2).sum(-1)
    assert np.array_equal(router.route(points)[:, 0], distances.argmin(1))
