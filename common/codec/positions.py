"""Which values a codec keeps, and how their positions are written.

* ``All``: every one; nothing is written.
* ``Largest``: of each tensor the k = max(1, floor(density · n + 1/2)) of largest magnitude, equal ones from the
  front, never a zero. Their gaps go through the entropy coder.
* ``SharedMask``: those that a seed names, the same for every worker of a round, so that nothing is written and
  an average is over the same elements everywhere (the random mask of arXiv 1610.05492). A generator by counter,
  Philox4x64-10 (Salmon et al. 2011), gives each element of a block 32 bits; it is kept when they are below
  density · 2³².

Threshold and share belong to one tensor: under a common threshold a LoRA's B, small beside its A, would lose
every value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from weft.common.codec import lossless
from weft.common.codec.blocks import DENSE_BLOCK, SPARSE_BLOCK, Pieces, Row
from weft.common.codec.lossless import BlockPositions
from weft.common.codec.section import Coding, Expected, Indices
from weft.common.codec.settings import CodecSettings
from weft.common.errors import CodecError
from weft.common.tensors import Float32Array, TensorData, TensorFile


class PositionReader(Protocol):
    """Positions of an open section."""

    def positions(self, block: int) -> BlockPositions | None:
        """Where kept values lie in a block, ascending; None when all are kept. Raises CodecError."""
        ...


class Positions(Protocol):
    """One way to choose positions."""

    @property
    def sparse(self) -> bool:
        """Whether most are left out."""
        ...

    @property
    def block_size(self) -> int:
        """Elements in a block of the row."""
        ...

    def choose(self, row: Row, arrays: Sequence[Float32Array], coding: Coding) -> list[Indices] | None:
        """Ascending indices into each tensor of the row, given flat; None for all of all."""
        ...

    def expected(self, section: str, row: Row) -> dict[str, Expected]:
        """The tensors that positions are written to."""
        ...

    def encode(self, section: str, row: Row, by_block: Sequence[Indices]) -> dict[str, TensorData]:
        """Write the positions kept in each block; empty when they need not be written."""
        ...

    def open(self, section: str, file: TensorFile, row: Row, coding: Coding) -> PositionReader:
        """Read them again."""
        ...

    def num_kept_max(self, size: int, settings: CodecSettings) -> int:
        """How many of a tensor's elements are kept, at most."""
        ...

    def bytes_max(self, row: Row, settings: CodecSettings) -> int:
        """More bytes than positions ever take."""
        ...


def num_kept(size: int, density: float) -> int:
    """How many of ``size`` values are kept when none is zero."""
    return min(size, max(1, math.floor(density * size + 0.5)))


def largest(values: Float32Array, count: int) -> Indices:
    """Ascending indices of the ``count`` largest magnitudes; never a zero, and of equal ones the first."""
    if count == 0:
        return np.empty(0, np.int64)
    # Magnitudes of floats order as the integers of the same bits, and integers select faster.
    bits = values.view(np.int32) & np.int32(0x7FFFFFFF)
    threshold = np.partition(bits, bits.size - count)[bits.size - count]
    kept = np.flatnonzero(bits >= max(int(threshold), 1))
    surplus = kept.size - count
    if surplus <= 0:
        return kept
    tied = np.flatnonzero(bits[kept] == threshold)
    return np.delete(kept, tied[-surplus:])


class _Unwritten:
    """Positions that a reader knows without being told."""

    __slots__ = ()

    def expected(self, section: str, row: Row) -> dict[str, Expected]:
        """No tensors."""
        del section, row
        return {}

    def encode(self, section: str, row: Row, by_block: Sequence[Indices]) -> dict[str, TensorData]:
        """Nothing to write."""
        del section, row, by_block
        return {}

    def bytes_max(self, row: Row, settings: CodecSettings) -> int:
        """Nothing."""
        del row, settings
        return 0


# -- all -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class All(_Unwritten):
    """Every value."""

    sparse: bool = False
    block_size: int = DENSE_BLOCK

    def choose(self, row: Row, arrays: Sequence[Float32Array], coding: Coding) -> None:
        """Nothing to choose."""
        del row, arrays, coding

    def open(self, section: str, file: TensorFile, row: Row, coding: Coding) -> PositionReader:
        """Blocks are full."""
        del section, file, row, coding
        return _AllReader()

    def num_kept_max(self, size: int, settings: CodecSettings) -> int:
        """All."""
        del settings
        return size


class _AllReader:
    def positions(self, block: int) -> None:
        del block


# -- the largest -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest of each tensor; positions as entropy-coded gaps."""

    sparse: bool = True
    block_size: int = SPARSE_BLOCK

    def choose(self, row: Row, arrays: Sequence[Float32Array], coding: Coding) -> list[Indices]:
        """Top-k by magnitude, tensor by tensor."""
        del row
        return [largest(values, num_kept(values.size, coding.settings.density)) for values in arrays]

    def expected(self, section: str, row: Row) -> dict[str, Expected]:
        """The coder's model and, block by block, values, symbols, words."""
        by_block = Expected("I32", (row.num_blocks,))
        return {
            f"{section}#counts": by_block,
            f"{section}#gap_symbols": by_block,
            f"{section}#gap_words": by_block,
            f"{section}#gap_model": Expected("U8", (lossless.NUM_SYMBOLS,)),
            f"{section}#gaps": Expected("U32", None),
        }

    def encode(self, section: str, row: Row, by_block: Sequence[Indices]) -> dict[str, TensorData]:
        """Gaps of each block under the model of all of them."""
        del row
        gaps = [lossless.encode_gaps(positions) for positions in by_block]
        counts = sum((np.bincount(part, minlength=256) for part in gaps), np.zeros(256, np.int64))
        model = lossless.model_of(counts)
        encoder = lossless.GapEncoder(model)
        words = [encoder.encode(part) for part in gaps]
        return {
            f"{section}#counts": _lengths(by_block),
            f"{section}#gap_symbols": _lengths(gaps),
            f"{section}#gap_words": _lengths(words),
            f"{section}#gap_model": model,
            f"{section}#gaps": np.concatenate([*words, np.empty(0, np.uint32)]),
        }

    def open(self, section: str, file: TensorFile, row: Row, coding: Coding) -> PositionReader:
        """Decode a block at a time."""
        del coding
        return _LargestReader(section, file, row)

    def num_kept_max(self, size: int, settings: CodecSettings) -> int:
        """What the density allows."""
        return num_kept(size, settings.density)

    def bytes_max(self, row: Row, settings: CodecSettings) -> int:
        """As if gaps were as good as random bytes."""
        count = sum(num_kept(size, settings.density) for size in row.sizes)
        symbols = lossless.num_gap_symbols_max(count, row.size)
        return 4 * lossless.num_words_max(symbols) + (3 * 4 + 8) * row.num_blocks + lossless.NUM_SYMBOLS


class _LargestReader:
    """Positions of the blocks of a section.

    Raises:
        CodecError: Counts that are impossible, or do not fit the data.
    """

    def __init__(self, section: str, file: TensorFile, row: Row) -> None:
        self._sizes = row.block_sizes()
        self._counts, self._symbols, lengths = (
            file.array(f"{section}#{name}").astype(np.int64)
            for name in ("counts", "gap_symbols", "gap_words")
        )
        if ((self._counts < 0) | (self._counts > self._sizes)).any():
            raise CodecError(f"{section}#counts has a block that keeps more values than it has")
        longest = self._counts + self._sizes // 255
        if ((self._symbols < self._counts) | (self._symbols > longest)).any():
            raise CodecError(f"{section}#gap_symbols does not fit the number of positions")
        self._words = Pieces(f"{section}#gaps", lengths, file.array(f"{section}#gaps"))
        self._decoder = lossless.GapDecoder(file.array(f"{section}#gap_model"))

    def positions(self, block: int) -> BlockPositions:
        count, size = int(self._counts[block]), int(self._sizes[block])
        return self._decoder.decode(self._words[block], int(self._symbols[block]), count=count, size=size)


# -- a shared mask ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SharedMask(_Unwritten):
    """Positions from the round's seed."""

    sparse: bool = True
    block_size: int = SPARSE_BLOCK

    def choose(self, row: Row, arrays: Sequence[Float32Array], coding: Coding) -> list[Indices]:
        """The mask, whatever the values."""
        del arrays
        mask = _MaskReader(row, coding)
        blocks = [
            np.add(mask.positions(block), block * row.block_size, dtype=np.int64)
            for block in range(row.num_blocks)
        ]
        kept = np.concatenate([*blocks, np.empty(0, np.int64)])
        cuts = np.searchsorted(kept, row.bounds)
        return [
            kept[low:high] - first
            for low, high, first in zip(cuts[:-1], cuts[1:], row.bounds.tolist(), strict=False)
        ]

    def open(self, section: str, file: TensorFile, row: Row, coding: Coding) -> PositionReader:
        """Draw the mask again."""
        del section, file
        return _MaskReader(row, coding)

    def num_kept_max(self, size: int, settings: CodecSettings) -> int:
        """Ten standard deviations above the mean: once in 10²³ tensors it would be more."""
        mean = size * settings.density
        return min(size, math.ceil(mean + 10 * math.sqrt(mean)) + 64)


class _MaskReader:
    """The mask of each block, drawn when it is asked for."""

    def __init__(self, row: Row, coding: Coding) -> None:
        self._row = row
        self._seed = coding.round_seed
        self._threshold = math.floor(coding.settings.density * 2**32)

    def positions(self, block: int) -> BlockPositions:
        start, stop = self._row.block_span(block)
        bits = np.random.Philox(key=np.array([self._seed, block], np.uint64))
        draws = bits.random_raw(-(-(stop - start) // 2)).astype("<u8", copy=False).view("<u4")
        return np.flatnonzero(draws[: stop - start] < self._threshold).astype(np.int32)


def _lengths(parts: Sequence[npt.NDArray[np.generic]]) -> npt.NDArray[np.int32]:
    return np.array([part.size for part in parts], np.int32)
