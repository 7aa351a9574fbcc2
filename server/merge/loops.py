"""Compiled loops over tiles: what the rules that read most do to every element.

Of each value they see what a cut keeps: zero stands for magnitudes up to ``dropped`` and for those above ``upto``;
−1 and infinity keep all. What is not a number stays. Those whose name ends in ``at`` are for sparse tiles, of which
all is kept.

Legend: T = elements of a tile, n = elements of a sparse tile that are not zero.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from weft.common.compiled import compiled
from weft.server.merge.tiles import Bits, Bytes, Counts, Float32, Indices, Words

_WORD: Final = 8
"""Flags that are looked at together."""
_MAGNITUDE: Final = 0x7FFFFFFF


@compiled
def gather(
    values: Float32, low: int, high: int, flags: Bytes, bits: Bits, places: Indices
) -> tuple[int, int]:
    """How many magnitudes are above ``high``, and how many of the others from ``low`` on: those are gathered.

    Magnitudes are compared as the bits of float32 without the sign, which order as they do.

    Args:
        values: [T].
        low: Bits of the smallest magnitude to be gathered.
        high: Of the largest.
        flags: Scratch, [T].
        bits: Receives those of what is gathered, in order, [T].
        places: Receives its indices, [T].
    """
    signed, size, num_above, num_gathered = values.view(np.int32), len(values), 0, 0
    for index in range(size):
        num_above += (signed[index] & _MAGNITUDE) > high
    width = np.uint32(high - low)
    for index in range(size):
        flags[index] = np.uint32((signed[index] & _MAGNITUDE) - low) <= width
    whole = size // _WORD * _WORD
    words = flags[:whole].view(np.uint64)
    for word in range(len(words)):
        if words[word] != 0:
            for index in range(word * _WORD, word * _WORD + _WORD):
                # Written over by the next, unless it counts: a guess that fails costs more.
                bits[num_gathered] = signed[index] & _MAGNITUDE
                places[num_gathered] = index
                num_gathered += flags[index]
    for index in range(whole, size):
        bits[num_gathered] = signed[index] & _MAGNITUDE
        places[num_gathered] = index
        num_gathered += flags[index]
    return num_above, num_gathered


@compiled
def _is_cut(value: np.float32, dropped: np.float32, upto: np.float32) -> np.bool_:
    """Whether the cut drops a value."""
    magnitude = abs(value)
    return (magnitude <= dropped) | (magnitude > upto)


@compiled
def trim(values: Float32, dropped: np.float32, upto: np.float32, out: Float32) -> None:
    """Write what the cut keeps, [T]."""
    for index in range(len(values)):
        value = values[index]
        cut = _is_cut(value, dropped, upto)
        out[index] = np.float32(0) if cut else value


@compiled
def add(values: Float32, dropped: np.float32, upto: np.float32, factor: np.float32, total: Float32) -> None:
    """Add ``factor`` times what the cut keeps to ``total`` [T]."""
    for index in range(len(values)):
        value = values[index]
        cut = _is_cut(value, dropped, upto)
        total[index] += np.float32(0) if cut else value * factor


@compiled
def add_at(places: Indices, values: Float32, factor: np.float32, total: Float32) -> None:
    """Add ``factor`` times ``values`` [n] to ``total`` [T] at ``places`` [n]."""
    for index in range(len(places)):
        total[np.uint64(places[index])] += values[index] * factor


@compiled
def add_signed(
    values: Float32,
    dropped: np.float32,
    upto: np.float32,
    factor: np.float32,
    positive: Float32,
    negative: Float32,
    num_positive: Counts,
    num_negative: Counts,
) -> None:
    """Add ``factor`` times what the cut keeps to two sums, by its sign, and count both; [T].

    NaN is added to both and counted in neither.
    """
    for index in range(len(values)):
        value = values[index]
        cut = _is_cut(value, dropped, upto)
        value = np.float32(0) if cut else value * factor
        positive[index] += np.float32(0) if value < 0 else value
        negative[index] += np.float32(0) if value > 0 else value
        num_positive[index] += value > 0
        num_negative[index] += value < 0


@compiled
def add_signed_at(
    places: Indices,
    values: Float32,
    factor: np.float32,
    positive: Float32,
    negative: Float32,
    num_positive: Counts,
    num_negative: Counts,
) -> None:
    """As ``add_signed``, of ``values`` [n] at ``places`` [n]."""
    for index in range(len(places)):
        value, place = values[index] * factor, np.uint64(places[index])
        # Both, whatever the sign: a guess that fails every other time costs more.
        positive[place] += np.float32(0) if value < 0 else value
        negative[place] += np.float32(0) if value > 0 else value
        num_positive[place] += value > 0
        num_negative[place] += value < 0


@compiled
def add_agreeing(
    values: Float32,
    dropped: np.float32,
    upto: np.float32,
    factor: np.float32,
    share: np.float32,
    elected: Bytes,
    total: Float32,
    shares: Float32,
) -> None:
    """Add ``factor`` times what the cut keeps where it has the elected sign, 1 for +, and ``share`` to another; [T]."""
    for index in range(len(values)):
        value = values[index]
        cut = _is_cut(value, dropped, upto)
        agrees = (value > 0 if elected[index] else value < 0) & (not cut)
        total[index] += value * factor if agrees else np.float32(0)
        shares[index] += share if agrees else np.float32(0)


@compiled
def add_agreeing_at(
    places: Indices,
    values: Float32,
    factor: np.float32,
    share: np.float32,
    elected: Bytes,
    total: Float32,
    shares: Float32,
) -> None:
    """As ``add_agreeing``, of ``values`` [n] at ``places`` [n]."""
    for index in range(len(places)):
        value, place = values[index], np.uint64(places[index])
        agrees = value > 0 if elected[place] else value < 0
        total[place] += value * factor if agrees else np.float32(0)
        shares[place] += share if agrees else np.float32(0)


@compiled
def elect(positive: Float32, negative: Float32, tie_is_positive: bool, elected: Bytes) -> None:  # noqa: FBT001
    """1 where the sum of both is positive, [T]."""
    for index in range(len(elected)):
        mass = positive[index] + negative[index]
        elected[index] = (mass >= 0) if tie_is_positive else (mass > 0)


@compiled
def choose(
    positive: Float32,
    negative: Float32,
    num_positive: Counts,
    num_negative: Counts,
    elected: Bytes,
    averages: bool,  # noqa: FBT001
    scale: np.float32,
    out: Float32,
) -> None:
    """``scale`` times the sum that has the elected sign, divided by how many it is of if that is asked for; [T]."""
    for index in range(len(out)):
        up = elected[index] != 0
        total = positive[index] if up else negative[index]
        count = num_positive[index] if up else num_negative[index]
        divisor = np.float32(max(count, 1)) if averages else np.float32(1)
        out[index] = total / divisor * scale


@compiled
def balance(positive: Float32, negative: Float32, num_positive: Counts) -> tuple[int, int, int]:
    """How often the sum of both is positive, how often zero, and how often zero though not of zeros alone."""
    num_above, num_zero, num_tied = 0, 0, 0
    for index in range(len(positive)):
        mass = positive[index] + negative[index]
        num_above += mass > 0
        num_zero += mass == 0
        num_tied += (mass == 0) & (num_positive[index] > 0)
    return num_above, num_zero, num_tied


@compiled
def drop(values: Float32, words: Words, num_words: int, factor: np.float32, out: Float32) -> None:
    """Write ``factor`` times the values whose word is below ``num_words``, zero for others; [T]."""
    for index in range(len(values)):
        out[index] = values[index] * factor if words[index] < num_words else np.float32(0)
