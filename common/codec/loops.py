"""The compiled loops of decoding; what they read has come over a network.

They are safe for whatever bytes: each index is checked, or cannot be out of range however the bytes fall, and none
takes more than 256 steps for each symbol or value that its caller asks for. The module is imported where a loop is
first called: a coordinator that has just started, or never sees such an update, does without the compiler.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from weft.common.compiled import compiled

BUCKET_BITS: Final = 12
"""A bucket is the slots with these upper bits in common."""

DECODED: Final = 0
OTHER_WORDS: Final = 1
"""The words are not what a writer makes of so many symbols."""
OTHER_GAPS: Final = 2
"""The gaps are not those of so many positions."""
PAST_THE_END: Final = 3
"""A position is none of the block's."""

_PRECISION: Final = np.uint64(24)
_SLOTS: Final = np.uint64((1 << 24) - 1)
_WORD_BITS: Final = np.uint64(32)
_WORDS: Final = np.uint64(1 << 32)
_IN_BUCKET: Final = np.uint64(24 - BUCKET_BITS)
_SYMBOL: Final = np.uint64(48)
_ONE: Final = np.uint64(1)
_ESCAPE: Final = np.uint64(255)


@compiled
def decode_gaps(
    words: npt.NDArray[np.uint32],
    num_symbols: int,
    below: npt.NDArray[np.uint64],
    buckets: npt.NDArray[np.uint64],
    positions: npt.NDArray[np.int32],
    size: int,
) -> int:
    """Words of a block to positions below ``size``, ascending; the reader of docs/update-format.md.

    Args:
        words: uint32; the last is not 0.
        num_symbols: How many they stand for.
        below: Frequencies of all smaller symbols, uint64 [257]; the last is 2²⁴, so that each slot is below one.
        buckets: The first symbol of each bucket: symbol · 2⁴⁸ + frequency · 2²⁴ + below, uint64 [2 ** BUCKET_BITS].
        positions: Result, int32 [as many as there should be].
        size: Elements of the block.

    Returns:
        ``DECODED``, or what is wrong; then ``positions`` holds anything.
    """
    state, num_left = np.uint64(0), len(words)
    while num_left > 0 and state < _WORDS:
        num_left -= 1
        state = state << _WORD_BITS | np.uint64(words[num_left])
    symbol, num_found, reached = _ONE, 0, np.int64(0)
    for _ in range(num_symbols):
        slot = state & _SLOTS
        first = buckets[slot >> _IN_BUCKET]
        symbol, frequency, offset = first >> _SYMBOL, first >> _PRECISION & _SLOTS, slot - (first & _SLOTS)
        while offset >= frequency:
            offset -= frequency
            symbol += _ONE
            frequency = below[symbol + _ONE] - below[symbol]
        state = (state >> _PRECISION) * frequency + offset
        if state < _WORDS and num_left > 0:
            num_left -= 1
            state = state << _WORD_BITS | np.uint64(words[num_left])
        reached += np.int64(symbol)
        if symbol != _ESCAPE:
            if num_found < len(positions):
                positions[num_found] = reached
            num_found += 1
            reached += 1
    if state != 0 or num_left > 0:
        return OTHER_WORDS
    if num_found != len(positions) or symbol == _ESCAPE:
        return OTHER_GAPS
    return PAST_THE_END if reached > size else DECODED


@compiled
def spread_scales(
    positions: npt.NDArray[np.int32],
    start: int,
    bounds: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int64],
    first_scales: npt.NDArray[np.int64],
    scales: npt.NDArray[np.uint16],
    by_value: npt.NDArray[np.uint32],
) -> None:
    """The scale of each kept value of a block.

    Args:
        positions: Ascending, int32 [k]; each lies in the row.
        start: Where the block starts in the row.
        bounds: Where each tensor starts in the row, and where the last ends, int64 [T + 1]; the first is the block's.
        widths: Elements of a group in each of them, at least 1, int64 [T].
        first_scales: Number of each one's first scale, int64 [T].
        scales: Of all tensors, the bits of bfloat16, uint16.
        by_value: Result, the bits of float32, uint32 [k].
    """
    tensor, edge, bits = 0, np.int64(0), np.uint32(0)
    for index in range(len(positions)):
        element = start + np.int64(positions[index])
        if index == 0 or element >= edge:
            while element >= bounds[tensor + 1]:
                tensor += 1
            group = (element - bounds[tensor]) // widths[tensor]
            edge = min(bounds[tensor] + (group + 1) * widths[tensor], bounds[tensor + 1])
            bits = np.uint32(scales[first_scales[tensor] + group]) << np.uint32(16)
        by_value[index] = bits
