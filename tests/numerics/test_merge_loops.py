"""The compiled loops say what a line of numpy says, bit by bit, of every float that there is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weft.server.merge import loops
from weft.server.merge.tiles import Float32

SIZES = st.integers(0, 40)
ALL = (np.float32(-1), np.float32(np.inf))
FLOATS = st.floats(width=32)
TILES = hnp.arrays(np.float32, SIZES, elements=FLOATS | st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0]))


def same(ours: npt.NDArray[np.generic], expected: npt.NDArray[np.generic]) -> None:
    """Equal bits; any NaN is NaN, and either zero zero."""
    np.testing.assert_array_equal(ours, expected)
    assert ours.dtype == expected.dtype


def kept(values: Float32, dropped: np.float32, upto: np.float32) -> Float32:
    return np.where((np.abs(values) <= dropped) | (np.abs(values) > upto), np.float32(0), values)


BOUNDS = st.sampled_from([ALL, (np.float32(1), ALL[1]), (np.float32(0), np.float32(1.5))])


@given(TILES, st.integers(1, 2**31 - 1), st.integers(1, 2**31 - 1))
def test_what_lies_between_is_gathered_in_order_and_what_lies_above_counted(
    values: Float32, one: int, other: int
) -> None:
    low, high = sorted((one, other))
    flags = np.full(len(values), 7, np.uint8)
    bits, places = np.empty(len(values), np.int32), np.empty(len(values), np.int64)
    num_above, num = loops.gather(values, low, high, flags, bits, places)
    magnitudes = values.view(np.int32) & 0x7FFFFFFF
    between = np.flatnonzero((magnitudes >= low) & (magnitudes <= high))
    assert num_above == np.count_nonzero(magnitudes > high)
    same(places[:num], between)
    same(bits[:num], magnitudes[between])


@given(TILES, BOUNDS)
def test_trimming_leaves_what_is_neither_small_nor_an_outlier(
    values: Float32, bounds: tuple[np.float32, np.float32]
) -> None:
    out = np.empty_like(values)
    loops.trim(values, *bounds, out)
    same(out, kept(values, *bounds))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@given(TILES, BOUNDS, st.floats(-1e3, 1e3, width=32))
def test_a_sum_rounds_after_each_step(
    values: Float32, bounds: tuple[np.float32, np.float32], factor: float
) -> None:
    total = np.arange(len(values), dtype=np.float32) / np.float32(3)
    expected = total + np.where(kept(values, *bounds) == 0, np.float32(0), values * np.float32(factor))
    loops.add(values, *bounds, np.float32(factor), total)
    same(total, expected)


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@given(TILES, BOUNDS, st.sampled_from([1.0, 0.3]), st.sampled_from([np.uint8, np.uint32]))
def test_signs_are_summed_and_counted_apart_and_nan_shows_in_both(
    values: Float32,
    bounds: tuple[np.float32, np.float32],
    factor: float,
    kind: type[np.unsignedinteger[npt.NBitBase]],
) -> None:
    sums, counts = np.ones((2, len(values)), np.float32), np.ones((2, len(values)), kind)
    loops.add_signed(values, *bounds, np.float32(factor), *sums, *counts)
    scaled = kept(values, *bounds) * np.float32(factor)
    same(sums[0], 1 + np.maximum(scaled, 0))
    same(sums[1], 1 + np.minimum(scaled, 0))
    same(counts[0], (1 + (scaled > 0)).astype(kind))
    same(counts[1], (1 + (scaled < 0)).astype(kind))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@given(TILES, BOUNDS)
def test_only_what_agrees_is_added(values: Float32, bounds: tuple[np.float32, np.float32]) -> None:
    elected = (np.arange(len(values)) % 2).astype(np.uint8)
    total, shares = np.ones((2, len(values)), np.float32)
    loops.add_agreeing(values, *bounds, np.float32(0.3), np.float32(0.2), elected, total, shares)
    left = kept(values, *bounds)
    agrees = np.where(elected, left > 0, left < 0)
    same(total, np.where(agrees, 1 + values * np.float32(0.3), np.float32(1)))
    same(shares, np.where(agrees, np.float32(1) + np.float32(0.2), np.float32(1)))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@given(TILES, st.booleans(), st.booleans())
def test_an_election_chooses_the_sum_of_the_larger_mass(
    values: Float32, tie_is_positive: bool, averages: bool
) -> None:
    positive, negative = np.maximum(values, 0), np.minimum(np.roll(values, 1), 0)
    counts = (np.arange(2 * len(values)) % 3).astype(np.uint8).reshape(2, -1)
    elected, out = np.empty(len(values), np.uint8), np.empty_like(values)
    loops.elect(positive, negative, tie_is_positive, elected)
    mass = positive + negative
    same(elected, ((mass >= 0) if tie_is_positive else (mass > 0)).astype(np.uint8))
    loops.choose(positive, negative, counts[0], counts[1], elected, averages, np.float32(0.7), out)
    divisors = (
        np.maximum(np.where(elected, counts[0], counts[1]), 1).astype(np.float32)
        if averages
        else np.float32(1)
    )
    same(out, np.where(elected, positive, negative) / divisors * np.float32(0.7))
    above, zero, tied = loops.balance(positive, negative, counts[0])
    assert above == np.count_nonzero(mass > 0)
    assert zero == np.count_nonzero(mass == 0)
    assert tied == np.count_nonzero((mass == 0) & (counts[0] > 0))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@given(TILES, st.integers(0, 1 << 16))
def test_what_is_dropped_by_chance_is_zero_and_the_rest_scaled(values: Float32, num_words: int) -> None:
    words, out = (np.arange(len(values)) * 7919 % (1 << 16)).astype(np.uint16), np.empty_like(values)
    loops.drop(values, words, num_words, np.float32(1.25), out)
    same(out, np.where(words < num_words, values * np.float32(1.25), np.float32(0)))


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@given(TILES, st.sampled_from([1.0, 0.3]))
def test_a_sparse_tile_adds_what_the_dense_one_does(values: Float32, factor: float) -> None:
    places = np.flatnonzero(values != 0)
    elected = (np.arange(len(values)) % 2).astype(np.uint8)
    dense, sparse = np.ones((2, 5, len(values)), np.float32)
    counts = np.ones((2, 2, len(values)), np.uint8)
    scale, share = np.float32(factor), np.float32(0.2)
    loops.add(values, *ALL, scale, dense[0])
    loops.add_at(places, values[places], scale, sparse[0])
    loops.add_signed(values, *ALL, scale, dense[1], dense[2], counts[0, 0], counts[0, 1])
    loops.add_signed_at(places, values[places], scale, sparse[1], sparse[2], counts[1, 0], counts[1, 1])
    loops.add_agreeing(values, *ALL, scale, share, elected, dense[3], dense[4])
    loops.add_agreeing_at(places, values[places], scale, share, elected, sparse[3], sparse[4])
    same(sparse, dense)
    same(counts[1], counts[0])
