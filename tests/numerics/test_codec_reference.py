"""What each codec makes of a delta, against a reference that handles one value at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weft.common.codec import CodecKind, CodecSettings, UpdateFile, ValueKind, encode_update
from weft.common.codec.settings import KEEPS_A_SHARE
from weft.common.modules import Schema, TensorSpec

Values = npt.NDArray[np.float32]
LARGEST = {ValueKind.INT8: 127, ValueKind.INT4: 7}


def bfloat(value: float, rounding: str) -> float:
    """``value`` ≥ 0 as bfloat16: eight bits from the leading one on, or multiples of 2⁻¹³³."""
    step = max(math.ldexp(1, math.frexp(value)[1] - 8), 2.0**-133)
    return (round(value / step) if rounding == "nearest" else math.ceil(value / step)) * step


def is_kept(values: Sequence[float], density: float) -> list[bool]:
    """The largest magnitudes, the first of equals, never zero."""
    count = min(len(values), max(1, math.floor(density * len(values) + 0.5)))
    order = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))
    chosen = {index for index in order[:count] if values[index]}
    return [index in chosen for index in range(len(values))]


def of_group(values: Sequence[float], kind: ValueKind) -> list[float]:
    """Values that share a scale."""
    if not values:
        return []
    if kind is ValueKind.BF16:
        return [math.copysign(bfloat(abs(value), "nearest"), value) for value in values]
    if kind is ValueKind.SIGN:
        mean = float(np.float32(math.fsum(map(abs, values)) / len(values)))
        scale = max(bfloat(mean, "nearest"), 2.0**-133) if any(values) else 0.0
        return [-scale if value < 0 else scale for value in values]
    largest = LARGEST[kind]
    scale = bfloat(float(np.float32(max(map(abs, values))) / np.float32(largest)), "up")
    multiples = [float(np.rint(np.float32(value) / np.float32(scale))) if scale else 0 for value in values]
    return [min(max(multiple, -largest), largest) * scale for multiple in multiples]


def reference(values: Values, codec: CodecSettings, kept: list[bool]) -> list[float]:
    """One tensor."""
    assert codec.value_kind is not None
    result = [0.0] * values.size
    width = codec.elements_per_scale or values.size
    for start in range(0, values.size, max(width, 1)):
        inside = [index for index in range(start, min(start + width, values.size)) if kept[index]]
        written = of_group([float(values[index]) for index in inside], codec.value_kind)
        for index, value in zip(inside, written, strict=True):
            result[index] = value
    return result


def through(path: Path, values: Values, codec: CodecSettings) -> Values:
    schema = Schema((TensorSpec("t", "F32", values.shape),))
    encode_update(path, schema, {"t": values}, codec)
    with UpdateFile(path, schema) as update:
        return update.tile("t", 0, values.size).copy()


CODECS = [
    *(
        CodecSettings(kind=CodecKind(kind), scale_elements=elements)
        for kind in ("int8", "int4", "sign")
        for elements in (0, 16)
    ),
    CodecSettings(kind=CodecKind.BF16),
    *(
        CodecSettings(kind=CodecKind.TERNARY, density=density, scale_elements=elements)
        for density in (0.1, 1.0)
        for elements in (0, 16)
    ),
    *(CodecSettings(kind=CodecKind.TOPK, density=0.3, values=kind, scale_elements=16) for kind in ValueKind),
]
numbers = st.floats(-(2.0**13), 2.0**13, width=32)
arrays = st.sampled_from([st.just(0.0), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45]), numbers]).flatmap(
    lambda elements: hnp.arrays(np.float32, st.integers(0, 90), elements=elements)
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(values=arrays, codec=st.sampled_from(CODECS))
def test_an_update_decodes_to_what_its_codec_promises(
    tmp_path: Path, values: Values, codec: CodecSettings
) -> None:
    sparse = codec.kind in KEEPS_A_SHARE
    kept = is_kept(values.tolist(), codec.density) if sparse else [True] * values.size
    expected = np.array(reference(values, codec, kept), np.float32)
    np.testing.assert_array_equal(through(tmp_path / "u", values, codec), expected)


@pytest.mark.parametrize("kind", list(ValueKind))
def test_a_shared_mask_writes_what_it_keeps_and_nothing_else(tmp_path: Path, kind: ValueKind) -> None:
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    codec = CodecSettings(kind=CodecKind.SHARED_MASK, density=0.2, values=kind, scale_elements=500)
    mask = through(tmp_path / "u", np.ones_like(values), codec) != 0
    assert 0.17 < mask.mean() < 0.23
    expected = np.array(reference(values, codec, mask.tolist()), np.float32)
    np.testing.assert_array_equal(through(tmp_path / "u", values, codec), expected)


@pytest.mark.parametrize(
    ("codec", "error"),
    [
        (CodecSettings(kind=CodecKind.BF16), 0.0017),
        (CodecSettings(kind=CodecKind.INT8), 0.0070),
        (CodecSettings(kind=CodecKind.INT4), 0.127),
        (CodecSettings(kind=CodecKind.INT4, stochastic_rounding=True), 0.18),
        (CodecSettings(kind=CodecKind.SIGN), math.sqrt(1 - 2 / math.pi)),
        (CodecSettings(kind=CodecKind.TERNARY, density=0.2), math.sqrt(1 - 0.785**2)),
        (CodecSettings(kind=CodecKind.TOPK, density=0.2, values=ValueKind.BF16), math.sqrt(1 - 0.806**2)),
    ],
    ids=lambda value: value.kind.value if isinstance(value, CodecSettings) else "",
)
def test_how_much_of_a_gaussian_is_lost(tmp_path: Path, codec: CodecSettings, error: float) -> None:
    values = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    lost = through(tmp_path / "u", values, codec) - values
    assert np.linalg.norm(lost) / np.linalg.norm(values) == pytest.approx(error, rel=0.05)


def test_each_factor_of_a_lora_keeps_its_share_on_its_own_scale(tmp_path: Path) -> None:
    schema = Schema((TensorSpec("A", "F32", (1000,)), TensorSpec("B", "F32", (1000,))))
    rng = np.random.default_rng(0)
    deltas = {name: rng.standard_normal(1000, np.float32) for name in "AB"}
    deltas["B"] /= 1000
    encode_update(tmp_path / "u", schema, deltas, CodecSettings(kind=CodecKind.TERNARY, density=0.1))
    with UpdateFile(tmp_path / "u", schema) as update:
        indices, values = update.sparse_tile("B", 0, 1000)
    assert indices.size == 100
    assert 1e-3 < np.abs(values).max() < 3e-3
