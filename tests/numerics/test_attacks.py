"""The attacks of the robustness table: that each is what its paper says."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
Floats = npt.NDArray[np.float64]


@pytest.fixture(scope="module")
def robustness() -> ModuleType:
    """benchmarks/robustness.py, which finds its library beside itself when it is run."""
    spec = importlib.util.spec_from_file_location("robustness", BENCHMARKS / "robustness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(BENCHMARKS))
    sys.modules["robustness"] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def honest(rng: np.random.Generator) -> Floats:
    return rng.standard_normal((16, 50)) + 1


@pytest.fixture
def own(rng: np.random.Generator) -> Floats:
    return rng.standard_normal((4, 50)) + 1


def test_flips(robustness: ModuleType, honest: Floats, own: Floats, rng: np.random.Generator) -> None:
    np.testing.assert_array_equal(robustness.sign_flip(honest, own, rng), -own)
    np.testing.assert_array_equal(robustness.flip_tenfold(honest, own, rng), -10 * own)


def test_gaussian_is_ten_times_as_long(
    robustness: ModuleType, honest: Floats, own: Floats, rng: np.random.Generator
) -> None:
    noise = robustness.gaussian(honest, own, rng)
    lengths = np.linalg.norm(noise, axis=1)
    np.testing.assert_allclose(lengths, 10 * np.linalg.norm(honest, axis=1).mean())
    assert abs(np.corrcoef(noise)[0, 1]) < 0.5


@pytest.mark.parametrize(
    ("num_honest", "num_attackers", "z"),
    [
        (38, 12, 0.336),  # s = 26 − 12 = 14, Φ(z) = 24/38
        (16, 4, 0.157),  # s = 11 − 4 = 7, Φ(z) = 9/16
        (8, 2, 0.0),  # s = 6 − 2 = 4, Φ(z) = 4/8
    ],
)
def test_alie_z_is_that_of_algorithm_3(
    robustness: ModuleType, num_honest: int, num_attackers: int, z: float
) -> None:
    assert robustness.alie_z(num_honest, num_attackers) == pytest.approx(z, abs=1e-3)


def test_alie_is_z_deviations_from_the_mean(
    robustness: ModuleType, honest: Floats, own: Floats, rng: np.random.Generator
) -> None:
    sent = robustness.alie(honest, own, rng)
    moved = (honest.mean(0) - sent[0]) / honest.std(0)
    np.testing.assert_allclose(moved, robustness.alie_z(16, 4))


def test_inner_product_turns_the_mean(
    robustness: ModuleType, honest: Floats, own: Floats, rng: np.random.Generator
) -> None:
    sent = robustness.inner_product(honest, own, rng)
    np.testing.assert_allclose(sent[0], -0.5 * honest.mean(0))
    assert (sent @ honest.mean(0) < 0).all()


def test_min_max_is_as_far_out_as_it_can_hide(
    robustness: ModuleType, honest: Floats, own: Floats, rng: np.random.Generator
) -> None:
    sent = robustness.min_max(honest, own, rng)[0]
    allowed = max(np.linalg.norm(one - other) for one in honest for other in honest)
    assert np.linalg.norm(sent - honest, axis=1).max() == pytest.approx(allowed, rel=1e-6)
    step = (honest.mean(0) - sent) / honest.std(0)
    np.testing.assert_allclose(step, step[0])
    assert step[0] > 0


def test_those_who_send_the_same_send_other_bytes(
    robustness: ModuleType, honest: Floats, own: Floats, rng: np.random.Generator
) -> None:
    for attack in (robustness.alie, robustness.inner_product, robustness.min_max):
        sent = attack(honest, own, rng).astype(np.float32)
        assert len({row.tobytes() for row in sent}) == len(own)
        np.testing.assert_allclose(sent, np.tile(sent[0], (len(own), 1)), rtol=1e-4)


def test_one_is_huge_and_the_others_are_honest(
    robustness: ModuleType, honest: Floats, own: Floats, rng: np.random.Generator
) -> None:
    sent = robustness.one_huge(honest, own, rng)
    np.testing.assert_array_equal(sent[0], 1e4 * own[0])
    np.testing.assert_array_equal(sent[1:], own[1:])


def test_the_gate_refuses_nan_and_takes_the_rest(robustness: ModuleType, tmp_path: Path) -> None:
    shape = robustness.SCHEMA.tensors[0].shape
    movement = np.random.default_rng(1).standard_normal(shape)
    update = robustness.gate(tmp_path, 3, movement, 2.0)
    assert (update.worker_id, update.weight) == ("03", 2.0)
    np.testing.assert_array_equal(update.deltas.arrays["w"], movement.astype(np.float32))
    assert robustness.gate(tmp_path, 3, np.full(shape, math.nan), 1.0) is None
    movement[-1, -1] = math.inf
    assert robustness.gate(tmp_path, 3, movement, 1.0) is None


def test_the_gradient_is_that_of_the_loss(robustness: ModuleType, rng: np.random.Generator) -> None:
    inputs, labels = rng.standard_normal((7, 4)), rng.integers(3, size=7)
    weights, direction = rng.standard_normal((4, 3)), rng.standard_normal((4, 3))
    step = 1e-6 * direction
    numeric = (
        robustness.loss(weights + step, inputs, labels) - robustness.loss(weights - step, inputs, labels)
    ) / 2e-6
    assert (robustness.gradient(weights, inputs, labels) * direction).sum() == pytest.approx(
        numeric, rel=1e-6
    )


def test_no_step_from_the_optimum_is_better(robustness: ModuleType, rng: np.random.Generator) -> None:
    problem = robustness.Problem.draw(rng)
    best = problem.optimum()
    assert best < problem.honest_loss(np.zeros(robustness.SCHEMA.tensors[0].shape, np.float32))
    assert robustness.RIDGE > 0  # so that there is just one
