from __future__ import annotations

import numpy as np
import pytest

from weft.client.trainer.fragments import mix

LOCAL = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([[0.1]], np.float32)}
GLOBAL = {"a": np.array([3.0, -2.0], np.float32), "b": np.array([[0.3]], np.float32)}


def test_mixing_weighs_the_local_by_alpha() -> None:
    mixed = mix(LOCAL, GLOBAL, 0.25)
    np.testing.assert_allclose(mixed["a"], [2.5, -1.0])
    np.testing.assert_allclose(mixed["b"], [[0.25]])
    assert {array.dtype for array in mixed.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, GLOBAL), (1.0, LOCAL)], ids=["global", "local"])
def test_the_ends_take_one_side_exactly(alpha: float, expected: dict[str, np.ndarray]) -> None:
    for name, array in mix(LOCAL, GLOBAL, alpha).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("alpha", [-0.1, 1.1, np.nan])
def test_an_alpha_outside_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        mix(LOCAL, GLOBAL, alpha)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="same tensors"):
        mix(LOCAL, {"a": GLOBAL["a"]}, 0.5)
