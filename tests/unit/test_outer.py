"""Outer optimisers: torch's SGD and ten lines from the papers are the oracles; settings are refused by key."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from weft.common.errors import RunFileError
from weft.common.modules import Schema, TensorSpec
from weft.common.settings import from_table, to_table
from weft.server.outer import (
    OPTIMISERS,
    OuterName,
    OuterSettings,
    first_slots,
    outer_schema,
    outer_step,
    slot_name,
)

Array = npt.NDArray[np.float64]
DELAYED = OuterSettings(name=OuterName.DELAYED_NESTEROV, delay=3, learning_rate=0.5, momentum=0.8)


def walk(settings: OuterSettings, movements: list[Array], weights: Array) -> list[Array]:
    """The versions after each round."""
    versions, slots = [], first_slots(settings, len(weights))
    for rounds, movement in enumerate(movements):
        step, slots = outer_step(movement, slots, settings, rounds=rounds)
        weights = weights + step
        versions.append(weights)
    return versions


def random_movements(count: int, size: int = 40) -> list[Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(size) for _ in range(count)]


def test_every_name_has_a_row() -> None:
    assert set(OPTIMISERS) == set(OuterName)


@pytest.mark.parametrize(
    ("settings", "momentum"),
    [
        (OuterSettings(), 0.0),
        (OuterSettings(learning_rate=0.3), 0.0),
        (OuterSettings(name=OuterName.NESTEROV), 0.9),
        (OuterSettings(name=OuterName.NESTEROV, learning_rate=1.1, momentum=0.5), 0.5),
        (OuterSettings(name=OuterName.DELAYED_NESTEROV, delay=1), 0.9),
    ],
    ids=["sgd", "sgd-slow", "nesterov", "nesterov-fast", "no-delay"],
)
def test_five_rounds_are_torch_sgd_on_the_opposite_gradient(settings: OuterSettings, momentum: float) -> None:
    weights, movements = np.ones(40), random_movements(5)
    parameter = torch.nn.Parameter(torch.tensor(weights))
    oracle = torch.optim.SGD([parameter], lr=settings.rate, momentum=momentum, nesterov=momentum > 0)
    for version, movement in zip(walk(settings, movements, weights), movements, strict=True):
        parameter.grad = torch.tensor(-movement)
        oracle.step()
        np.testing.assert_allclose(version, parameter.detach().numpy(), rtol=1e-12, atol=1e-12)


def test_delayed_nesterov_is_algorithm_3_of_the_paper() -> None:
    gradients = [-movement for movement in random_movements(8)]
    theta, m, buffer, expected = np.ones(40), np.zeros(40), np.zeros(40), []
    for t, g in enumerate(gradients):
        buffer = buffer + g
        if (t + 1) % 3 == 0:
            m = 0.8 * m + buffer / 3
            theta = theta - 0.5 * (0.8 * m + g / 3)
            buffer = np.zeros(40)
        else:
            theta = theta - 0.5 * (g / 3)
        expected.append(theta)
    for version, reference in zip(walk(DELAYED, [-g for g in gradients], np.ones(40)), expected, strict=True):
        np.testing.assert_allclose(version, reference, rtol=1e-13)


def test_delayed_nesterov_over_equal_movements_is_one_step_of_nesterov() -> None:
    movement = random_movements(1)[0]
    plain = OuterSettings(name=OuterName.NESTEROV, learning_rate=0.5, momentum=0.8)
    one, three = walk(plain, [movement] * 2, np.zeros(40)), walk(DELAYED, [movement] * 6, np.zeros(40))
    np.testing.assert_allclose(three[2::3], one, rtol=1e-13)


@pytest.mark.parametrize("name", [OuterName.FEDADAM, OuterName.FEDYOGI])
def test_adaptive_optimisers_are_algorithm_2_of_the_paper(name: OuterName) -> None:
    movements = random_movements(6)
    settings = OuterSettings(name=name, learning_rate=0.2, momentum=0.7, second_momentum=0.9, adaptivity=0.05)
    x, m, v = np.ones(40), np.zeros(40), np.full(40, 0.05**2)
    for version, delta in zip(walk(settings, movements, np.ones(40)), movements, strict=True):
        m = 0.7 * m + 0.3 * delta
        adam, yogi = 0.9 * v + 0.1 * delta**2, v - 0.1 * delta**2 * np.sign(v - delta**2)
        v = adam if name is OuterName.FEDADAM else yogi
        x = x + 0.2 * m / (np.sqrt(v) + 0.05)
        np.testing.assert_allclose(version, x, rtol=1e-12)


def test_yogi_survives_a_second_moment_that_rounding_made_negative() -> None:
    settings = OuterSettings(name=OuterName.FEDYOGI)
    step, slots = outer_step(np.zeros(1), np.array([[1.0], [-1e-12]]), settings)
    assert np.isfinite(step).all()
    assert slots[1] == 0


def test_sgd_by_default_takes_the_merged_version() -> None:
    movement = np.array([1.0, -2.0])
    step, _ = outer_step(movement, first_slots(OuterSettings(), 2), OuterSettings())
    np.testing.assert_array_equal(step, movement)


def test_defaults_are_those_of_the_papers() -> None:
    nesterov, adam = OuterSettings(name=OuterName.NESTEROV), OuterSettings(name=OuterName.FEDADAM)
    assert (nesterov.rate, nesterov.decay, nesterov.num_slots) == (0.7, 0.9, 1)
    assert (adam.decay, adam.second_decay, adam.tau, adam.num_slots) == (0.9, 0.99, 1e-3, 2)
    assert OuterSettings().num_slots == 0


def test_the_state_is_a_module_of_its_own() -> None:
    schema = Schema((TensorSpec("a", "F32", (2,)), TensorSpec("b", "BF16", (3, 4))))
    state = outer_schema(schema, DELAYED)
    assert {spec.name: spec.shape for spec in state.tensors} == {
        "slot0/a": (2,),
        "slot0/b": (3, 4),
        "slot1/a": (2,),
        "slot1/b": (3, 4),
        "step": (1,),
    }
    assert {spec.dtype for spec in state.tensors} == {"F32"}
    assert slot_name(1, "b") == "slot1/b"
    with pytest.raises(ValueError, match="keeps no state"):
        outer_schema(schema, OuterSettings())


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"name": "adam"}, "outer.name"),
        ({"learning_rate": 0.0}, "outer.learning_rate"),
        ({"learning_rate": float("nan")}, "outer.learning_rate"),
        ({"momentum": 0.9}, "outer.momentum"),
        ({"name": "nesterov", "momentum": 1.0}, "outer.momentum"),
        ({"name": "nesterov", "momentum": -0.1}, "outer.momentum"),
        ({"name": "nesterov", "delay": 4}, "outer.delay"),
        ({"name": "delayed_nesterov"}, "outer.delay"),
        ({"name": "delayed_nesterov", "delay": 0}, "outer.delay"),
        ({"name": "nesterov", "second_momentum": 0.9}, "outer.second_momentum"),
        ({"name": "fedadam", "second_momentum": 1.0}, "outer.second_momentum"),
        ({"name": "fedyogi", "adaptivity": 0.0}, "outer.adaptivity"),
        ({"name": "sgd", "adaptivity": 0.1}, "outer.adaptivity"),
        ({"lr": 0.7}, "outer.lr"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(table: dict[str, Any], key: str) -> None:
    with pytest.raises(RunFileError, match=re.escape(key)):
        from_table(OuterSettings, table, where="outer")


@pytest.mark.parametrize("settings", [OuterSettings(name=OuterName.NESTEROV, momentum=0.8), DELAYED])
def test_settings_survive_a_table(settings: OuterSettings) -> None:
    assert from_table(OuterSettings, to_table(settings)) == settings
