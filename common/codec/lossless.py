"""The lossless stage: positions as gaps, signs as bits, bytes through zstd.

Positions kept at density p are, at worst, independent: their gaps are geometric and cost H(p) bits an element
(Golomb 1966). One byte a gap, 255 meaning "255 more and read on", followed by zstd's Huffman stage comes
within 2 % of that, at gigabytes a second and without an entropy coder of our own. Signs carry one bit each
and are packed.
"""

from __future__ import annotations

import sys
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weft.common.errors import CodecError
from weft.common.tensors import Uint8Array

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Positions = npt.NDArray[np.int32]

_LEVEL: Final = 1
_WINDOW_LOG_MAX: Final = 21
_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_ESCAPE: Final = 255


def compress(data: Uint8Array) -> bytes:
    """One zstd frame that states its content size."""
    frame: bytes = zstd.compress(data.tobytes(), level=_LEVEL)
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


def gap_bytes_max(count: int, size: int) -> int:
    """Most bytes that ``count`` gaps within ``size`` elements take."""
    return count + size // _ESCAPE


def encode_gaps(positions: npt.NDArray[Any]) -> Uint8Array:
    """Elements skipped before each of the ascending ``positions``; 255 while more than 254 are left."""
    gaps = np.diff(positions, prepend=-1) - 1
    if gaps.size == 0 or gaps.max() < _ESCAPE:
        return gaps.astype(np.uint8)
    escapes, last = np.divmod(gaps, _ESCAPE)
    ends = np.cumsum(escapes + 1) - 1
    data = np.full(ends[-1] + 1, _ESCAPE, np.uint8)
    data[ends] = last
    return data


def decode_gaps(data: Uint8Array, *, count: int, size: int) -> Positions:
    """The ``count`` ascending positions below ``size``.

    Raises:
        CodecError: Another count, an unfinished gap, or a position out of range.
    """
    ends = data != _ESCAPE
    if np.count_nonzero(ends) != count or (data.size > 0 and not ends[-1]):
        raise CodecError(f"the gaps are not those of {count} positions")
    # An escape is 255 skipped elements and ends no gap; any other byte is its value and the kept element.
    reached: npt.NDArray[np.int64] = np.cumsum(data + ends.astype(np.int64))
    if count and reached[-1] > size:
        raise CodecError("the gaps lead past the end")
    positions: Positions = (reached[ends] - 1).astype(np.int32)
    return positions


def encode_signs(negative: npt.NDArray[np.bool_]) -> bytes:
    """One bit each, 1 for negative, most significant bit first, zeros to the end of the last byte."""
    return np.packbits(negative).tobytes()


def decode_signs(data: Uint8Array, *, count: int) -> npt.NDArray[np.int8]:
    """``count`` signs, 1 or -1; raises CodecError when bits are left over that are not zero."""
    bits = np.unpackbits(data)
    if bits.size != sign_bytes(count) * 8 or bits[count:].any():
        raise CodecError(f"the sign bits are not those of {count} values")
    return 1 - 2 * bits[:count].astype(np.int8)


def sign_bytes(count: int) -> int:
    """Bytes that ``count`` signs take."""
    return -(-count // 8)
