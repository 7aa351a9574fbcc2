from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3

from weft.common.initial import initial_tensors, normal_tensor
from weft.common.modules import Schema, TensorSpec

WIDE = TensorSpec("model.layers.0.mlp.up_proj.weight", "F32", (640, 500))


def test_normal_values_have_the_moments_of_a_normal_distribution() -> None:
    values = normal_tensor(WIDE, seed=1, std=1.0).astype(np.float64)
    error = 1 / np.sqrt(values.size)
    assert abs(values.mean()) < 4 * error
    assert values.var() == pytest.approx(1, abs=4 * np.sqrt(2) * error)
    assert (values**3).mean() == pytest.approx(0, abs=4 * np.sqrt(15) * error)
    assert (values**4).mean() == pytest.approx(2.9, abs=4 * np.sqrt(96) * error)
    assert np.abs(values).max() < 6


def test_values_are_a_function_of_seed_and_name_alone() -> None:
    values = normal_tensor(WIDE, seed=1, std=0.02)
    np.testing.assert_array_equal(values, normal_tensor(WIDE, seed=1, std=0.02))
    assert not np.array_equal(values, normal_tensor(WIDE, seed=2, std=0.02))
    other = TensorSpec("model.layers.1.mlp.up_proj.weight", "F32", WIDE.shape)
    assert not np.array_equal(values, normal_tensor(other, seed=1, std=0.02))


def test_the_bytes_are_the_same_on_every_machine() -> None:
    factor = TensorSpec("layer.lora_A.weight", "F32", (4, 32))
    head = TensorSpec("score.weight", "F32", (3, 32))
    tensors = initial_tensors(Schema((factor, head)), seed=0)
    found = [blake3(tensors[spec.name].astype("<f4").tobytes()).hexdigest()[:16] for spec in (factor, head)]
    assert found == ["30fd26cc58a050fa", "fafd84b130bd2a41"]
