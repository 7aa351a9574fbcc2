"""The k-th largest magnitude of a tensor, exactly, without sorting it or holding it.

Magnitudes of float32 order like their bits read as whole numbers, so everything here works on bits. A sample
says between which two values the answer lies, nearly always; one pass counts what is above and gathers the
little that is between, and the answer is the right one of those. Where the sample misled, three passes of
radix counting (12, 12 and 7 bits) find it instead: the result is the same.

Legend: N = elements of the tensor, n = elements of a block, k = how many largest are meant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from weft.server.merge.tiles import Float32, Scratch, spans

Bits: TypeAlias = npt.NDArray[np.int32]
Read: TypeAlias = Callable[[int, int], Float32]
"""(start, stop) → those elements of the tensor, float32."""

BLOCK_ELEMENTS: Final = 1 << 16
"""Tensors are read in blocks of this length: a few of them fit a core's second-level cache."""
MAGNITUDE: Final = np.int32(0x7FFFFFFF)
"""All bits but the sign."""
_SAMPLE_BLOCKS: Final = 64
_SAMPLE_ELEMENTS: Final = 1 << 10
"""Of each sampled block: at most 65,536 elements in all, whose quantiles are within 0.2 % (one deviation)."""
_MARGIN: Final = 5.0
"""Standard deviations between the sample's quantile and the ends of the bracket."""
_NUM_BITS: Final = 31
_DIGITS: Final = ((19, 12), (7, 12), (0, 7))
"""(shift, width) of the radix digits of 31 bits, highest first."""


@dataclass(frozen=True, slots=True)
class Kth:
    """The k-th largest magnitude of a tensor, and where it stands."""

    bits: int
    """Of the magnitude."""
    num_above: int
    """Magnitudes that are larger."""
    num_equal: int
    """Magnitudes that are equal, itself among them."""


def kth_largest(read: Read, size: int, k: int, scratch: Scratch) -> Kth:
    """The k-th largest magnitude, 1 ≤ k ≤ size."""
    if size <= 2 * BLOCK_ELEMENTS:
        return _kth(read(0, size).view(np.int32) & MAGNITUDE, k, num_above=0)
    low, high = _bracket(read, size, k)
    num_above, between = 0, []
    for bits in _blocks(read, size, scratch):
        above = np.greater(bits, high, out=scratch.take("above", len(bits), np.bool_))
        num_above += int(np.count_nonzero(above))
        inside = np.greater_equal(bits, low, out=scratch.take("inside", len(bits), np.bool_))
        between.append(bits[np.not_equal(inside, above, out=inside)])
    candidates = np.concatenate(between)
    if num_above < k <= num_above + len(candidates):
        return _kth(candidates, k - num_above, num_above=num_above)
    return _radix(read, size, k, scratch)


def _kth(bits: Bits, k: int, *, num_above: int) -> Kth:
    bits.partition(len(bits) - k)
    kth = bits[len(bits) - k]
    num_larger = int(np.count_nonzero(bits[len(bits) - k :] > kth))
    return Kth(int(kth), num_above + num_larger, int(np.count_nonzero(bits == kth)))


def _bracket(read: Read, size: int, k: int) -> tuple[np.int32, np.int32]:
    """Two values that the answer lies between, nearly always."""
    num_blocks = int(np.clip(size >> 16, _SAMPLE_BLOCKS // 8, _SAMPLE_BLOCKS))
    starts = np.linspace(0, size - _SAMPLE_ELEMENTS, num_blocks).astype(np.int64)
    sample = np.concatenate([read(start, start + _SAMPLE_ELEMENTS) for start in starts.tolist()])
    sample = sample.view(np.int32) & MAGNITUDE
    share = k / size
    middle = len(sample) * (1 - share)
    # The sample is of whole runs, whose elements are alike: allow for fewer independent ones than there are.
    spread = _MARGIN * np.sqrt(len(sample) * share * (1 - share)) + 16
    first, last = (int(np.clip(at, 0, len(sample) - 1)) for at in (middle - spread, middle + spread))
    sample.partition((first, last))
    low = np.int32(sample[first]) if middle > spread else np.int32(0)
    return low, np.int32(sample[last]) if middle + spread < len(sample) - 1 else MAGNITUDE


def _blocks(read: Read, size: int, scratch: Scratch) -> Iterator[Bits]:
    """The magnitudes of the tensor, block by block, in scratch "magnitudes"."""
    for start, stop in spans(size, BLOCK_ELEMENTS):
        buffer = scratch.take("magnitudes", stop - start, np.int32)
        yield np.bitwise_and(read(start, stop).view(np.int32), MAGNITUDE, out=buffer)


def _radix(read: Read, size: int, k: int, scratch: Scratch) -> Kth:
    prefix, num_above, num_equal = 0, 0, size
    for shift, width in _DIGITS:
        counts = np.zeros(1 << width, np.int64)
        for bits in _blocks(read, size, scratch):
            alike = bits[bits >> (shift + width) == prefix] if shift + width < _NUM_BITS else bits
            counts += np.bincount((alike >> shift) & ((1 << width) - 1), minlength=1 << width)
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, k - num_above))
        num_above += int(from_top[place - 1]) if place else 0
        digit = len(counts) - 1 - place
        prefix, num_equal = prefix << width | digit, int(counts[digit])
    return Kth(prefix, num_above, num_equal)


def index_of_equal(read: Read, size: int, threshold: int, number: int, scratch: Scratch) -> int:
    """Index of the ``number``-th magnitude, from 1, that is equal to ``threshold``."""
    seen = 0
    for index, bits in enumerate(_blocks(read, size, scratch)):
        equal = np.flatnonzero(bits == threshold)
        if seen + len(equal) >= number:
            return index * BLOCK_ELEMENTS + int(equal[number - 1 - seen])
        seen += len(equal)
    raise ValueError(f"fewer than {number} magnitudes are equal to the threshold")
