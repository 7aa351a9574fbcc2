"""The k-th largest magnitude against a sort, where the sample leads, where it misleads, and digit by digit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.server.merge import selection
from weft.server.merge.selection import Kth, index_of_equal, kths_largest
from weft.server.merge.settings import Trim
from weft.server.merge.statistics import Cut, find_cut
from weft.server.merge.tiles import Bits, Float32, Scratch

SIZE = 2 * selection.BLOCK_ELEMENTS + 77


def reader(values: Float32) -> selection.Read:
    return lambda start, stop: values[start:stop]


def reference(values: Float32, k: int) -> Kth:
    magnitudes = np.sort(np.abs(values))[::-1]
    kth = magnitudes[k - 1]
    return Kth(int(kth.view(np.int32)), int((magnitudes > kth).sum()), int((magnitudes == kth).sum()))


def tensor(kind: str) -> Float32:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(SIZE).astype(np.float32)
    kinds: dict[str, npt.NDArray[np.float32]] = {
        "normal": values,
        "heavy": values**5,
        "sorted": np.sort(values),
        "first-block-large": np.where(np.arange(SIZE) < 3000, values * 1e6, values).astype(np.float32),
        "mostly-zero": np.where(rng.random(SIZE) < 0.95, 0, values).astype(np.float32),
        "few-values": np.round(values).astype(np.float32),
        "equal": np.full(SIZE, -0.5, np.float32),
        "zeros": np.zeros(SIZE, np.float32),
        "tiny": (values * 1e-42).astype(np.float32),
        # Every sampled run lies on small values: the bracket cannot hold the answer.
        "misleading": np.where(np.arange(SIZE) % 5000 < 2000, 1e-3 * values, values).astype(np.float32),
    }
    return kinds[kind]


KINDS = pytest.mark.parametrize(
    "kind",
    [
        "normal",
        "heavy",
        "sorted",
        "first-block-large",
        "mostly-zero",
        "few-values",
        "equal",
        "zeros",
        "tiny",
        "misleading",
    ],
)


@KINDS
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_it_is_what_a_sort_finds(kind: str, share: float) -> None:
    values = tensor(kind)
    k = max(1, int(share * SIZE))
    assert kths_largest(reader(values), SIZE, [k], Scratch())[0] == reference(values, k)


@KINDS
def test_several_are_found_in_one_pass(kind: str) -> None:
    values, ks = tensor(kind), [SIZE // 5, 1, SIZE // 100, SIZE]
    for found, k in zip(kths_largest(reader(values), SIZE, ks, Scratch()), ks, strict=True):
        assert found == reference(values, k)
        if found.equal is not None:
            assert (
                found.equal.tolist() == np.flatnonzero(np.abs(values).view(np.int32) == found.bits).tolist()
            )


@KINDS
@pytest.mark.parametrize("k", [SIZE // 5])
def test_counting_digit_by_digit_finds_the_same(kind: str, k: int) -> None:
    values = tensor(kind)
    assert selection._radix(reader(values), SIZE, k, Scratch()) == reference(values, k)


def test_a_bracket_that_misses_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    values = tensor("normal")
    monkeypatch.setattr(selection, "_bracket", lambda *_: selection._Bracket(1, 2, SIZE))
    (found,) = kths_largest(reader(values), SIZE, [SIZE // 5], Scratch())
    assert found == reference(values, SIZE // 5)
    assert found.equal is None


@pytest.mark.parametrize("k", [1, SIZE // 100, SIZE // 5, SIZE // 2, SIZE])
@pytest.mark.parametrize("off", [-0.01, 0.01])
def test_where_the_sample_misled_one_more_pass_looks_on_the_right_side(
    monkeypatch: pytest.MonkeyPatch, k: int, off: float
) -> None:
    values, num_read = tensor("normal"), 0
    sampled = selection._bracket

    def misled(sample: Bits, size: int, k: int, margin: float) -> selection._Bracket:
        wrong = min(max(1, k + int(off * size)), size) if margin == selection._MARGIN else k
        return sampled(sample, size, wrong, margin)

    def counted(start: int, stop: int) -> Float32:
        nonlocal num_read
        num_read += stop - start
        return values[start:stop]

    monkeypatch.setattr(selection, "_bracket", misled)
    (found,) = kths_largest(counted, SIZE, [k], Scratch())
    assert found == reference(values, k)
    assert found.bits == 0 or found.equal is not None
    assert num_read <= 2 * SIZE + SIZE // 8


def test_what_a_wide_bracket_holds_is_not_all_held(monkeypatch: pytest.MonkeyPatch) -> None:
    values = tensor("normal")
    everything = selection._Bracket(0, int(selection.MAGNITUDE), SIZE)
    monkeypatch.setattr(selection, "_bracket", lambda *_: everything)
    (found,) = kths_largest(reader(values), SIZE, [SIZE // 5], Scratch())
    assert found == reference(values, SIZE // 5)
    assert found.equal is None


@settings(max_examples=60)
@given(values=st.lists(st.integers(-5, 5), min_size=1, max_size=30), data=st.data())
def test_small_tensors(values: list[int], data: st.DataObject) -> None:
    row = np.array(values, np.float32)
    k = data.draw(st.integers(1, len(values)))
    (found,) = kths_largest(reader(row), len(row), [k], Scratch())
    assert found == reference(row, k)
    equal = np.flatnonzero(np.abs(row).view(np.int32) == found.bits)
    number = data.draw(st.integers(1, len(equal)))
    assert found.equal is not None
    assert found.equal.tolist() == equal.tolist()
    assert index_of_equal(reader(row), len(row), found.bits, number, Scratch()) == equal[number - 1]


def test_more_equal_ones_than_there_are_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="fewer than 2"):
        index_of_equal(reader(np.ones(1, np.float32)), 1, int(np.float32(1).view(np.int32)), 2, Scratch())


@pytest.mark.parametrize(("density", "outliers"), [(0.1, 0.0), (0.1, 0.01), (1.0, 0.0), (0.5, 0.2)])
@pytest.mark.parametrize("kind", ["normal", "few-values", "mostly-zero"])
def test_a_cut_with_outliers_keeps_what_follows_them(kind: str, density: float, outliers: float) -> None:
    values, scratch = tensor(kind), Scratch()
    trim = Trim(density=density, keeps_ties=False, outliers=outliers)
    cut, num_kept = find_cut(reader(values), SIZE, trim, scratch)
    order = np.argsort(-np.abs(values), kind="stable")
    num_outliers = int(outliers * SIZE)
    kept = order[num_outliers : num_outliers + int(density * SIZE)]
    expected = np.zeros_like(values)
    expected[kept] = values[kept]
    np.testing.assert_array_equal(cut.apply(values, 0, scratch), expected)
    assert num_kept == np.count_nonzero(expected)


def test_a_cut_says_its_threshold() -> None:
    assert Cut(int(np.float32(0.75).view(np.int32)), 3).threshold == 0.75
