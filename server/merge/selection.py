"""The k-th largest magnitude of a tensor, exactly, without sorting it or holding it.

Magnitudes of float32 order like their bits read as whole numbers, so everything here works on bits. A sample
says between which two values the answer lies, nearly always; one pass counts what is above and gathers the
little that is between, and the answer is the right one of those. Where the sample misled, another pass looks
further on the side that the counts tell; where that misses too, or too many are equal, three passes of radix
counting (12, 12 and 7 bits) find it. The result is the same.

Legend: N = elements of the tensor, n = elements of a block, k = how many largest are meant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

import numpy as np

from weft.server.merge import loops
from weft.server.merge.tiles import Bits, Float32, Indices, Scratch, spans

Read: TypeAlias = Callable[[int, int], Float32]
"""(start, stop) → those elements of the tensor, float32."""

BLOCK_ELEMENTS: Final = 1 << 17
"""Tensors are read in blocks of this length: a few of them fit a core's second-level cache."""
_SMALL_ELEMENTS: Final = 1 << 16
"""Tensors up to this length are partitioned whole."""
MAGNITUDE: Final = np.int32(0x7FFFFFFF)
"""All bits but the sign."""
_SAMPLE_ELEMENTS: Final = 1 << 11
"""Length of a sampled run."""
_SAMPLE_SHARE: Final = 1 << 16
"""One run for so many elements,"""
_SAMPLE_RUNS: Final = (4, 1 << 7)
"""but no fewer and no more runs than these: a quarter of a million elements give a quantile within 0.08 %."""
_MARGIN: Final = 4.0
"""Standard deviations of independent samples between the quantile of these and the ends of the bracket."""
_WIDE_MARGIN: Final = 16.0
"""The same where that was not enough: elements of a run are alike if rows of the tensor differ."""
_GATHERED_MAX: Final = 1 / 16
"""Share of a tensor that is gathered at most: few magnitudes, many times each, can put more into a bracket."""
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
    equal: Indices | None = field(default=None, compare=False, repr=False)
    """Where the equal ones are, ascending; None: that would take another pass."""


@dataclass(slots=True)
class _Bracket:
    """Two magnitudes that an answer lies between, nearly always, and what one pass found there."""

    low: int
    high: int
    """At least 1."""
    size: int
    """N."""
    num_above: int = 0
    """Magnitudes above ``high``."""
    num_between: int = 0
    """The others from ``low`` on, zeros not counted."""
    between: list[Bits] = field(default_factory=list)
    """Those, in their order, unless there is nothing to choose from or they are too many to be held."""
    places: list[Indices] = field(default_factory=list)
    """Their indices."""

    def gather(self, values: Float32, start: int, scratch: Scratch) -> None:
        """Count and gather in the block that begins at element ``start``."""
        size = len(values)
        flags = scratch.take("flags", size, np.uint8)
        bits, places = scratch.take("bits", size, np.int32), scratch.take("places", size, np.int64)
        num_above, num_between = loops.gather(values, max(1, self.low), self.high, flags, bits, places)
        self.num_above += num_above
        self.num_between += num_between
        if self._gathers:
            self.between.append(bits[:num_between].copy())
            self.places.append(places[:num_between] + start)

    @property
    def _gathers(self) -> bool:
        return self.low < self.high and self.num_between <= self.size * _GATHERED_MAX

    def holds(self, k: int) -> bool:
        """Whether the answer lies here, as far as is known now."""
        until = self.num_above + self.num_between
        return self.num_above < k <= until or (k > until and self.low == 0)

    def beside(self, wider: _Bracket, k: int) -> _Bracket:
        """What ``wider`` has on the side that the answer lies on."""
        if k <= self.num_above:
            return _Bracket(self.high + 1, max(self.high + 1, wider.high), self.size)
        return _Bracket(min(wider.low, self.low - 1), max(1, self.low - 1), self.size)

    def kth(self, k: int) -> Kth | None:
        """The answer, unless it lies elsewhere or among too many."""
        above, until = self.num_above, self.num_above + self.num_between
        if not self.holds(k):
            return None
        if k > until:
            return Kth(0, until, self.size - until)
        if self.low == self.high:
            return Kth(self.low, above, until - above)
        if not self._gathers:
            return None
        return _kth(np.concatenate(self.between), np.concatenate(self.places), k - above, num_above=above)


def kths_largest(read: Read, size: int, ks: Sequence[int], scratch: Scratch) -> list[Kth]:
    """The k-th largest magnitude for each of ``ks``, 1 ≤ k ≤ size, in one pass."""
    if size <= _SMALL_ELEMENTS:
        bits = read(0, size).view(np.int32) & MAGNITUDE
        return [_kth(bits, None, k, num_above=0) for k in ks]
    sample = _sample(read, size, scratch)
    brackets = {k: _bracket(sample, size, k, _MARGIN) for k in ks}
    _gather(read, size, brackets.values(), scratch)
    beside = {
        k: bracket.beside(_bracket(sample, size, k, _WIDE_MARGIN), k)
        for k, bracket in brackets.items()
        if not bracket.holds(k)
    }
    if beside:
        _gather(read, size, beside.values(), scratch)
    found = {k: bracket.kth(k) for k, bracket in (brackets | beside).items()}
    return [found[k] or _radix(read, size, k, scratch) for k in ks]


def _gather(read: Read, size: int, brackets: Iterable[_Bracket], scratch: Scratch) -> None:
    """One pass."""
    for start, stop in spans(size, BLOCK_ELEMENTS):
        values = read(start, stop)
        for bracket in brackets:
            bracket.gather(values, start, scratch)


def _kth(bits: Bits, places: Indices | None, k: int, *, num_above: int) -> Kth:
    """Of ``bits``, which stand at ``places`` of the tensor; None: they are all of it."""
    kth = np.partition(bits, len(bits) - k)[len(bits) - k]
    equal = np.flatnonzero(bits == kth)
    num_larger = int(np.count_nonzero(bits > kth))
    return Kth(int(kth), num_above + num_larger, len(equal), equal if places is None else places[equal])


def _sample(read: Read, size: int, scratch: Scratch) -> Bits:
    """Magnitudes of some runs, sorted, in scratch "sample"."""
    num_runs = int(np.clip(size // _SAMPLE_SHARE, *_SAMPLE_RUNS))
    sample = scratch.take("sample", num_runs * _SAMPLE_ELEMENTS, np.int32)
    starts = np.linspace(0, size - _SAMPLE_ELEMENTS, num_runs).astype(np.int64)
    for run, start in zip(sample.reshape(num_runs, -1), starts.tolist(), strict=True):
        np.bitwise_and(read(start, start + _SAMPLE_ELEMENTS).view(np.int32), MAGNITUDE, out=run)
    sample.sort()
    return sample


def _bracket(sample: Bits, size: int, k: int, margin: float) -> _Bracket:
    """What holds the k-th largest of ``size`` unless that is off by more standard deviations of the sample."""
    share, last = k / size, len(sample) - 1
    middle = len(sample) * (1 - share)
    spread = margin * math.sqrt(len(sample) * share * (1 - share)) + 16
    low, high = int(middle - spread), int(middle + spread)
    return _Bracket(
        int(sample[low]) if low > 0 else 0,
        max(1, int(sample[high])) if high < last else int(MAGNITUDE),
        size,
    )


def _blocks(read: Read, size: int, scratch: Scratch) -> Iterator[tuple[int, Bits]]:
    """The magnitudes of the tensor, block by block with its first index, in scratch "magnitudes"."""
    for start, stop in spans(size, BLOCK_ELEMENTS):
        buffer = scratch.take("magnitudes", stop - start, np.int32)
        yield start, np.bitwise_and(read(start, stop).view(np.int32), MAGNITUDE, out=buffer)


def _radix(read: Read, size: int, k: int, scratch: Scratch) -> Kth:
    prefix, num_above, num_equal = 0, 0, size
    for shift, width in _DIGITS:
        counts = np.zeros(1 << width, np.int64)
        for _, bits in _blocks(read, size, scratch):
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
    for start, bits in _blocks(read, size, scratch):
        equal = np.flatnonzero(bits == threshold)
        if seen + len(equal) >= number:
            return start + int(equal[number - 1 - seen])
        seen += len(equal)
    raise ValueError(f"fewer than {number} magnitudes are equal to the threshold")
