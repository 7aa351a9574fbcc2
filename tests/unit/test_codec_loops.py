"""The compiled loops of decoding read what an encoder wrote, refuse everything else, and touch nothing beside it.

The reference is constriction's decoder, symbol by symbol, and numpy.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import constriction
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weft.common.codec import loops, lossless
from weft.common.codec.values import Groups
from weft.common.errors import CodecError
from weft.common.tensors import to_float32

Model: TypeAlias = npt.NDArray[np.uint8]
Words: TypeAlias = npt.NDArray[np.uint32]
GUARD = 8
"""Elements beside an array that a loop writes."""


def reference_symbols(model: Model, words: Words, count: int) -> npt.NDArray[np.uint8]:
    """Any words stand for any number of symbols; raises CodecError unless they are an encoder's."""
    shares = (lossless.frequencies(model) - 1).astype(np.float64)
    categorical: Any = constriction.stream.model.Categorical(shares, perfect=False, lazy=False)
    try:
        coder = constriction.stream.stack.AnsCoder(words.copy())
    except ValueError as error:
        raise CodecError("the words of a block end in zero") from error
    symbols: npt.NDArray[np.uint8] = coder.decode(categorical, count).astype(np.uint8)
    if not coder.is_empty():
        raise CodecError(f"the words of a block are not those of {count} symbols")
    return symbols


def reference(model: Model, words: Words, num_symbols: int, count: int, size: int) -> list[int]:
    """Positions."""
    symbols = reference_symbols(model, words, num_symbols)
    ends = symbols != 255
    if np.count_nonzero(ends) != count or (symbols.size > 0 and not ends[-1]):
        raise CodecError(f"the gaps are not those of {count} positions")
    reached = np.cumsum(symbols + ends.astype(np.int64))
    if count and reached[-1] > size:
        raise CodecError("the gaps lead past the end")
    return [int(position) for position in reached[ends] - 1]


def read_only(words: npt.ArrayLike) -> Words:
    """As the words of a file are."""
    array = np.array(words, np.uint32)
    array.setflags(write=False)
    return array


def decode(model: Model, words: Words, num_symbols: int, count: int, size: int) -> list[int]:
    positions = lossless.GapDecoder(model).decode(words, num_symbols, count=count, size=size)
    assert positions.dtype == np.int32
    return [int(position) for position in positions]


def outcome(decoder: Any, *block: Any) -> list[int] | str:
    """What it decodes, or why not."""
    try:
        positions: list[int] = decoder(*block)
    except CodecError as error:
        return error.message
    return positions


def model_of(symbols: npt.NDArray[np.uint8]) -> Model:
    return lossless.model_of(np.bincount(symbols, minlength=256))


# -- what was written


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 100_000])
def test_gaps_of_any_length_come_back(gap: int) -> None:
    positions = np.array([gap, 2 * gap + 1, 2 * gap + 2])
    gaps = lossless.encode_gaps(positions)
    model = model_of(gaps)
    words = read_only(lossless.GapEncoder(model).encode(gaps))
    assert gaps.size <= lossless.num_gap_symbols_max(3, 2 * gap + 3)
    assert decode(model, words, gaps.size, 3, 2 * gap + 3) == positions.tolist()
    with pytest.raises(CodecError, match="past the end"):
        decode(model, words, gaps.size, 3, 2 * gap + 2)


@pytest.mark.parametrize(
    ("gaps", "count"), [([1, 2], 1), ([1, 2], 3), ([1, 255], 1), ([255], 0), ([], 1)], ids=str
)
def test_gaps_of_another_count_are_refused(gaps: list[int], count: int) -> None:
    symbols = np.array(gaps, np.uint8)
    words = read_only(lossless.GapEncoder(model_of(symbols)).encode(symbols))
    with pytest.raises(CodecError, match=f"not those of {count} positions"):
        decode(model_of(symbols), words, symbols.size, count, 1000)


def test_a_block_that_keeps_nothing_has_no_words() -> None:
    model = np.zeros(256, np.uint8)
    assert decode(model, read_only([]), 0, 0, 1000) == []


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Of symbols as they come, and such that no encoder writes: all mass on a few, hundreds in one bucket."""
    codes = draw(st.sampled_from([st.integers(0, 255), st.sampled_from([0, 1, 255]), st.just(0)]))
    return draw(hnp.arrays(np.uint8, 256, elements=codes, fill=st.just(draw(st.sampled_from([0, 1, 90])))))


symbol_lists = hnp.arrays(
    np.uint8, st.integers(0, 120), elements=st.integers(0, 255) | st.sampled_from([0, 255])
)


@settings(max_examples=200, deadline=None)
@given(symbols=symbol_lists, model=models())
def test_symbols_come_back_whatever_the_model(symbols: npt.NDArray[np.uint8], model: Model) -> None:
    symbols = np.append(symbols, np.uint8(7))
    words = read_only(lossless.GapEncoder(model).encode(symbols))
    assert reference_symbols(model, words, symbols.size).tolist() == symbols.tolist()
    count = int(np.count_nonzero(symbols != 255))
    positions = decode(model, words, symbols.size, count, 256 * symbols.size)
    assert lossless.encode_gaps(np.array(positions)).tolist() == symbols.tolist()


# -- what was not


@st.composite
def blocks(draw: st.DrawFn) -> tuple[Model, Words, int, int, int]:
    """(model, words, symbols, positions, elements) that were good before something happened to them."""
    symbols = draw(symbol_lists)
    model = draw(models()) if draw(st.booleans()) else model_of(symbols)
    words = [int(word) for word in lossless.GapEncoder(model).encode(symbols)]
    num_symbols, count = symbols.size, int(np.count_nonzero(symbols != 255))
    size = int(symbols.astype(np.int64).sum()) + count
    for _ in range(draw(st.integers(0, 3))):
        match draw(st.integers(0, 6)):
            case 0 if words:
                words[draw(st.integers(0, len(words) - 1))] ^= 1 << draw(st.integers(0, 31))
            case 1 if words:
                words[-1] = 0
            case 2:
                words.insert(draw(st.integers(0, len(words))), draw(st.integers(0, 2**32 - 1)))
            case 3:
                words = words[: draw(st.integers(0, len(words)))]
            case 4:
                num_symbols = max(num_symbols + draw(st.integers(-3, 300)), 0)
            case 5:
                count = max(count + draw(st.integers(-2, 2)), 0)
            case _:
                size = max(size + draw(st.integers(-2, 2)), 0)
    return model, read_only(words), num_symbols, count, size


@settings(max_examples=600, deadline=None)
@given(block=blocks())
def test_what_something_happened_to_is_decoded_or_refused_as_by_the_reference(
    block: tuple[Model, Words, int, int, int],
) -> None:
    assert outcome(decode, *block) == outcome(reference, *block)


@settings(max_examples=300, deadline=None)
@given(model=models(), words=hnp.arrays(np.uint32, st.integers(0, 12)), num_symbols=st.integers(0, 40))
def test_no_words_but_the_encoders_are_decoded(model: Model, words: Words, num_symbols: int) -> None:
    """Whatever a block may be said to keep: each decodes to positions under one count at most."""
    for count in range(num_symbols + 1):
        try:
            positions = decode(model, read_only(words), num_symbols, count, 1 << 20)
        except CodecError:
            continue
        symbols = lossless.encode_gaps(np.array(positions, np.int64))
        assert symbols.size == num_symbols
        assert lossless.GapEncoder(model).encode(symbols).tolist() == words.tolist()


@settings(max_examples=200, deadline=None)
@given(block=blocks(), interpreted=st.booleans())
def test_no_bytes_make_the_loop_write_beside_its_result(
    block: tuple[Model, Words, int, int, int], interpreted: bool
) -> None:
    """Interpreted, numpy raises where an index is out of range and warns where a number overflows."""
    model, words, num_symbols, count, size = block
    if words.size and words[-1] == 0:
        words = words[:-1]
    decoder: Any = lossless.GapDecoder(model)
    loop: Any = loops.decode_gaps
    memory = np.full(count + 2 * GUARD, -7, np.int32)
    inside = memory[GUARD : GUARD + count]
    result = (loop.py_func if interpreted else loop)(
        words, num_symbols, decoder._below, decoder._buckets, inside, size
    )
    assert (memory[:GUARD] == -7).all()
    assert (memory[GUARD + count :] == -7).all()
    assert result in {loops.DECODED, loops.OTHER_WORDS, loops.OTHER_GAPS, loops.PAST_THE_END}
    if result == loops.DECODED:
        assert (np.diff(inside) > 0).all()
        assert count == 0 or 0 <= inside[0] <= inside[-1] < size


# -- scales


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[Groups], list[list[int]]]:
    """Tensors, and the elements that each keeps."""
    groups = [
        Groups(size, elements)
        for size, elements in draw(
            st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0, 1, 3, 16])), min_size=1, max_size=6)
        )
    ]
    return groups, [
        sorted(draw(st.sets(st.integers(0, group.size - 1)))) if group.size else [] for group in groups
    ]


@settings(max_examples=200, deadline=None)
@given(row=rows(), start=st.integers(0, 60), interpreted=st.booleans())
def test_each_value_gets_the_scale_of_its_group(
    row: tuple[list[Groups], list[list[int]]], start: int, interpreted: bool
) -> None:
    groups, kept = row
    bounds = np.cumsum([0, *(group.size for group in groups)], dtype=np.int64)
    first_scales = np.cumsum([0, *(group.num for group in groups)], dtype=np.int64)
    scales = np.arange(1, first_scales[-1] + 1).astype(np.uint16)
    scales.setflags(write=False)
    expected = [
        float(group.spread(to_float32(scales[first:], "BF16"), 0, group.size, np.array([element]))[0])
        for group, elements, first, low in zip(groups, kept, first_scales, bounds, strict=False)
        for element in elements
        if low + element >= start
    ]
    elements = np.concatenate(
        [np.array(part, np.int64) + low for part, low in zip(kept, bounds, strict=False)]
    )
    tensor = max(int(np.searchsorted(bounds, start, side="right")) - 1, 0)
    by_value = np.zeros(len(expected), np.uint32)
    loop: Any = loops.spread_scales
    (loop.py_func if interpreted else loop)(
        (elements[elements >= start] - start).astype(np.int32),
        start,
        bounds[tensor:],
        np.array([group.width for group in groups[tensor:]], np.int64),
        first_scales[tensor:],
        scales,
        by_value,
    )
    assert by_value.view(np.float32).tolist() == expected
