"""The lossless stage: bytes through zstd, gaps through an entropy coder, signs as bits.

zstd's Huffman stage comes within half a per cent of the entropy of quantised values, at gigabytes a second.
Positions need more: kept at density p they are, at worst, independent, their gaps geometric, and cost H(p)
bits an element (Golomb 1966), of which Huffman and Rice codes waste one to two per cent. They are written as
bytes, 255 meaning "255 more and read on", through asymmetric numeral systems (Duda, arXiv 1311.2540) with one
model for the whole section. A geometric distribution has no memory, so that the escape costs nothing.

The model is a byte for each of the 256 symbols, a count with three bits of mantissa; the coder's arithmetic
is in integers, so that every machine and language finds the same frequencies. Signs carry one bit each.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import constriction
import numpy as np
import numpy.typing as npt

from weft.common.errors import CodecError
from weft.common.tensors import Uint8Array

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Positions: TypeAlias = npt.NDArray[np.int64]
BlockPositions: TypeAlias = npt.NDArray[np.int32]
"""Ascending, counted from where a block starts."""
Words: TypeAlias = npt.NDArray[np.uint32]

# Codes of weights repeat by chance alone: a tiny table of long matches leaves them to the Huffman stage, which is
# smaller than level 1 by a seventh on exponents, and faster; long runs are still found.
_COMPRESSION: Final[Mapping[int, int]] = {
    zstd.CompressionParameter.compression_level: 1,
    zstd.CompressionParameter.hash_log: 6,
    zstd.CompressionParameter.min_match: 7,
}
_WINDOW_LOG_MAX: Final = 21
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ESCAPE: Final = 255
NUM_SYMBOLS: Final = 256
_TOTAL: Final = 1 << 24
"""Sum of the frequencies that the entropy coder works with."""


# -- bytes -----------------------------------------------------------------------------------------------


def compress(data: Uint8Array) -> bytes:
    """One zstd frame that states its content size."""
    frame: bytes = zstd.compress(data.tobytes(), options=_COMPRESSION)
    return frame


def compressed_bytes_max(size_bytes: int) -> int:
    """More than any frame over ``size_bytes`` takes."""
    return size_bytes + size_bytes // 128 + 64


def decompress(frame: Uint8Array, *, size_bytes_max: int) -> Uint8Array:
    """The content of exactly one frame.

    Neither the size that the frame states nor its window is trusted.

    Raises:
        CodecError: Not one whole frame, of unstated size, or larger than allowed.
    """
    data = frame.tobytes()
    try:
        size = zstd.get_frame_info(data).decompressed_size if data.startswith(_MAGIC) else None
        if size is None or size > size_bytes_max:
            raise CodecError(f"a frame does not state a size of at most {size_bytes_max} bytes")
        decompressor = zstd.ZstdDecompressor(
            options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG_MAX}
        )
        content = decompressor.decompress(data, max_length=size + 1)
    except zstd.ZstdError as error:
        raise CodecError("a frame cannot be decompressed") from error
    if not decompressor.eof or decompressor.unused_data or len(content) != size:
        raise CodecError("a frame does not hold what it states")
    return np.frombuffer(content, np.uint8)


# -- gaps ------------------------------------------------------------------------------------------------


def num_gap_symbols_max(count: int, size: int) -> int:
    """Most symbols that ``count`` gaps within ``size`` elements take."""
    return count + size // _ESCAPE


def encode_gaps(positions: Positions) -> Uint8Array:
    """Elements skipped before each of the ascending ``positions``; 255 while more than 254 are left."""
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.size == 0 or gaps.max() < _ESCAPE:
        return gaps.astype(np.uint8)
    escapes, last = np.divmod(gaps, _ESCAPE)
    ends = np.cumsum(escapes + 1) - 1
    data = np.full(ends[-1] + 1, _ESCAPE, np.uint8)
    data[ends] = last
    return data


# -- entropy coding --------------------------------------------------------------------------------------


def model_of(counts: npt.NDArray[np.int64]) -> Uint8Array:
    """A byte for each symbol's count: 0 for none, else 1 + 8 · exponent + the three bits after the leading one."""
    mantissas, exponents = np.frexp(counts.astype(np.float64))
    codes = 8 * exponents + np.floor(16 * mantissas) - 15
    return np.where(counts > 0, np.minimum(codes, NUM_SYMBOLS - 1), 0).astype(np.uint8)


def frequencies(model: Uint8Array) -> npt.NDArray[np.int64]:
    """How often of 2²⁴ times the coder expects each symbol: never 0, however small its count."""
    steps = np.maximum(model.astype(np.int64) - 1, 0)
    weights: npt.NDArray[np.int64] = np.where(model > 0, (8 + steps % 8) << (steps // 8), 0)
    if not weights.any():
        weights[:] = 1
    shares: npt.NDArray[np.int64] = weights * (_TOTAL - NUM_SYMBOLS) // weights.sum()
    shares[np.argmax(weights)] += _TOTAL - NUM_SYMBOLS - shares.sum()
    shares += 1
    return shares


class GapEncoder:
    """Symbols 0 to 255 to 32-bit words, under one model."""

    def __init__(self, model: Uint8Array) -> None:
        # The library gives every symbol one of 2²⁴ and shares out the rest: in whole shares, exactly these.
        shares = (frequencies(model) - 1).astype(np.float64)
        self._model: Any = constriction.stream.model.Categorical(shares, perfect=False, lazy=False)

    def encode(self, symbols: Uint8Array) -> Words:
        """The words of some symbols: none for none."""
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(symbols.astype(np.int32), self._model)
        words: Words = coder.get_compressed()
        return words


class GapDecoder:
    """Words to the positions whose gaps were encoded, under one model."""

    def __init__(self, model: Uint8Array) -> None:
        from weft.common.codec import loops  # not before an update needs it: see there

        self._loops = loops
        shares = frequencies(model).astype(np.uint64)
        self._below = np.concatenate([np.zeros(1, np.uint64), np.cumsum(shares)])
        slots = np.arange(1 << loops.BUCKET_BITS, dtype=np.uint64) << np.uint64(24 - loops.BUCKET_BITS)
        first = np.searchsorted(self._below, slots, side="right") - 1
        self._buckets = (
            first.astype(np.uint64) << np.uint64(48) | shares[first] << np.uint64(24) | self._below[first]
        )

    def decode(self, words: Words, num_symbols: int, *, count: int, size: int) -> BlockPositions:
        """The ``count`` ascending positions, below ``size``, that so many symbols stand for.

        Args:
            words: uint32 in C order; an array that is read-only, as those of a file are, costs no further compilation.
            num_symbols: At most ``num_gap_symbols_max(count, size)``.
            count: Positions, at most ``size``.
            size: Elements of the block, below 2³¹.

        Returns:
            int32 [count].

        Raises:
            CodecError: The words are not what ``encode`` makes of the symbols that they decode to; another count, an
                unfinished gap, or a position out of range.
        """
        if words.size > 0 and words[-1] == 0:
            raise CodecError("the words of a block end in zero")
        positions = np.empty(count, np.int32)
        outcome = self._loops.decode_gaps(words, num_symbols, self._below, self._buckets, positions, size)
        if outcome == self._loops.OTHER_WORDS:
            raise CodecError(f"the words of a block are not those of {num_symbols} symbols")
        if outcome == self._loops.OTHER_GAPS:
            raise CodecError(f"the gaps are not those of {count} positions")
        if outcome == self._loops.PAST_THE_END:
            raise CodecError("the gaps lead past the end")
        return positions


def num_words_max(num_symbols: int) -> int:
    """More words than ``num_symbols`` take on average under a model of their own counts."""
    return num_symbols // 4 + num_symbols // 64 + 4


# -- signs -----------------------------------------------------------------------------------------------


def encode_signs(negative: npt.NDArray[Any]) -> bytes:
    """One bit each, 1 for negative, most significant bit first, zeros to the end of the last byte."""
    return np.packbits(negative).tobytes()


def decode_signs(data: Uint8Array, *, count: int) -> Uint8Array:
    """``count`` bits, 1 for negative; raises CodecError when others are left over or missing."""
    bits = np.unpackbits(data)
    if data.size != sign_bytes(count) or bits[count:].any():
        raise CodecError(f"the sign bits are not those of {count} values")
    return bits[:count]


def sign_bytes(count: int) -> int:
    """Bytes that ``count`` signs take."""
    return -(-count // 8)
