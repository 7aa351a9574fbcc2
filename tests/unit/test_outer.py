"""Outer optimisers: torch's SGD is the oracle; settings are refused by key."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from weft.common.errors import RunFileError
from weft.common.settings import from_table, to_table
from weft.server.outer import OPTIMISERS, OuterName, OuterSettings, outer_step


def test_every_name_has_a_row() -> None:
    assert set(OPTIMISERS) == set(OuterName)


@pytest.mark.parametrize(
    ("settings", "momentum"),
    [
        (OuterSettings(), 0.0),
        (OuterSettings(learning_rate=0.3), 0.0),
        (OuterSettings(name=OuterName.NESTEROV), 0.9),
        (OuterSettings(name=OuterName.NESTEROV, learning_rate=1.1, momentum=0.5), 0.5),
    ],
    ids=["sgd", "sgd-slow", "nesterov", "nesterov-fast"],
)
def test_five_rounds_are_torch_sgd_on_the_opposite_gradient(settings: OuterSettings, momentum: float) -> None:
    rng = np.random.default_rng(0)
    weights, state = rng.standard_normal(40), np.zeros(40)
    parameter = torch.nn.Parameter(torch.tensor(weights))
    oracle = torch.optim.SGD([parameter], lr=settings.rate, momentum=momentum, nesterov=momentum > 0)
    for _ in range(5):
        movement = rng.standard_normal(40)
        step, state = outer_step(movement, state, settings)
        weights = weights + step
        parameter.grad = torch.tensor(-movement)
        oracle.step()
    np.testing.assert_allclose(weights, parameter.detach().numpy(), rtol=1e-13, atol=1e-13)


def test_sgd_by_default_takes_the_merged_version() -> None:
    movement = np.array([1.0, -2.0])
    step, _ = outer_step(movement, np.zeros(2), OuterSettings())
    np.testing.assert_array_equal(step, movement)


def test_defaults_are_those_of_diloco() -> None:
    settings = OuterSettings(name=OuterName.NESTEROV)
    assert (settings.rate, settings.decay, settings.has_momentum) == (0.7, 0.9, True)
    assert not OuterSettings().has_momentum


@pytest.mark.parametrize(
    ("table", "key"),
    [
        ({"name": "adam"}, "outer.name"),
        ({"learning_rate": 0.0}, "outer.learning_rate"),
        ({"learning_rate": float("nan")}, "outer.learning_rate"),
        ({"momentum": 0.9}, "outer.momentum"),
        ({"name": "nesterov", "momentum": 1.0}, "outer.momentum"),
        ({"name": "nesterov", "momentum": -0.1}, "outer.momentum"),
        ({"lr": 0.7}, "outer.lr"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(table: dict[str, Any], key: str) -> None:
    with pytest.raises(RunFileError, match=re.escape(key)):
        from_table(OuterSettings, table, where="outer")


def test_settings_survive_a_table() -> None:
    settings = OuterSettings(name=OuterName.NESTEROV, momentum=0.8)
    assert from_table(OuterSettings, to_table(settings)) == settings
