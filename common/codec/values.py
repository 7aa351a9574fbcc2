"""How the values that a codec keeps are written: as bfloat16, as whole multiples of a scale, or as signs.

A value becomes a *code*, a small whole number; a block's codes are packed into one piece of bytes. Where there
are scales, a group of consecutive elements of one tensor shares one, so that a LoRA's small B never drowns
beside its A. Scales are bfloat16.

Rounding is to nearest, ties to even, or stochastic: with u from [0, 1), floor(x / scale + u), which is right
on average (QSGD, arXiv 1610.02132). u comes from Philox, a generator by counter, keyed by the worker's seed and
the tensor, so that the same seed gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from weft.common.codec import lossless
from weft.common.codec.section import Indices
from weft.common.codec.settings import ValueKind
from weft.common.errors import CodecError
from weft.common.tensors import Float32Array, Uint8Array, Uint16Array, float32_to_bf16, to_float32

Codes: TypeAlias = npt.NDArray[Any]
"""uint8 or uint16 [k], one for each kept value."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Elements of one tensor, so many in a row to a scale."""

    size: int
    """Elements of the tensor."""
    elements: int
    """Elements of a group, the last one shorter; 0 for one group."""

    @property
    def width(self) -> int:
        """Elements of a group; at least 1, whatever the tensor."""
        return min(self.elements or self.size, self.size) or 1

    @property
    def num(self) -> int:
        """Number of scales."""
        return -(-self.size // self.width)

    def starts(self, indices: Indices | None) -> tuple[Indices, Indices]:
        """Where groups begin among a tensor's kept values, and which groups these are; empty ones are left out.

        Args:
            indices: Where kept values lie in the tensor, ascending; None when all are there.
        """
        if indices is None:
            numbers = np.arange(self.num, dtype=np.int64)
            return numbers * self.width, numbers
        of_value = indices // self.width
        starts = np.flatnonzero(np.diff(of_value, prepend=-1))
        return starts, of_value[starts]

    def spread(self, scales: Float32Array, start: int, stop: int, indices: Indices | None) -> Float32Array:
        """The scale of each value: of elements ``start`` to ``stop`` of the tensor, or of those at ``indices``."""
        if indices is not None:
            return scales[indices // self.width]
        first, last = start // self.width, -(-stop // self.width)
        edges = np.clip(np.arange(first, last + 1, dtype=np.int64) * self.width, start, stop)
        return np.repeat(scales[first:last], np.diff(edges))


class ValueCoder(Protocol):
    """One way to write values."""

    @property
    def scaled(self) -> bool:
        """Whether groups of values have scales."""
        ...

    def scales(self, values: Float32Array, groups: Groups, indices: Indices | None) -> Uint16Array:
        """A scale for each group of a tensor's kept values, as bfloat16 bits."""
        ...

    def quantise(
        self, values: Float32Array, scales: Float32Array, generator: np.random.Generator | None
    ) -> Codes:
        """A code for each value, given its scale; rounds to nearest without a generator."""
        ...

    def restore(self, codes: Codes, scales: Float32Array) -> Float32Array:
        """What codes stand for; ``scales`` may be written over."""
        ...

    def pack(self, codes: Codes) -> bytes:
        """The bytes of a block's codes."""
        ...

    def unpack(self, piece: Uint8Array, count: int) -> Codes:
        """Exactly ``count`` codes again; raises CodecError."""
        ...

    def bytes_max(self, count: int) -> int:
        """More bytes than ``count`` codes take, beside what each block adds."""
        ...


@dataclass(frozen=True, slots=True)
class Bfloats:
    """The upper half of a float32: its exponents through zstd, sign and mantissa as they are."""

    scaled: bool = False

    def scales(self, values: Float32Array, groups: Groups, indices: Indices | None) -> Uint16Array:
        """None."""
        del values, groups, indices
        return np.empty(0, np.uint16)

    def quantise(
        self, values: Float32Array, scales: Float32Array, generator: np.random.Generator | None
    ) -> Codes:
        """bfloat16 bits."""
        del scales
        if generator is None:
            return float32_to_bf16(values)
        carry = generator.integers(0, 1 << 16, values.size, np.uint32)
        codes: Codes = ((values.view(np.uint32) + carry) >> 16).astype(np.uint16)
        return codes

    def restore(self, codes: Codes, scales: Float32Array) -> Float32Array:
        """Widen, exactly."""
        del scales
        return to_float32(codes, "BF16")

    def pack(self, codes: Codes) -> bytes:
        """A frame of exponents, then as many bytes of sign and mantissa."""
        rest = (codes >> 8 & 0x80 | codes & 0x7F).astype(np.uint8)
        return lossless.compress((codes >> 7 & 0xFF).astype(np.uint8)) + rest.tobytes()

    def unpack(self, piece: Uint8Array, count: int) -> Codes:
        """Put the halves together."""
        if piece.size < count:
            raise CodecError(f"a block does not hold {count} values")
        cut = piece.size - count
        exponents, rest = _content(piece[:cut], count).astype(np.uint16), piece[cut:].astype(np.uint16)
        codes: Codes = exponents << 7 | rest & 0x7F | (rest & 0x80) << 8
        return codes

    def bytes_max(self, count: int) -> int:
        """As if no exponent could be compressed."""
        return lossless.compressed_bytes_max(count) + count


@dataclass(frozen=True, slots=True)
class Integers:
    """Multiples −m … m of the group's scale, which is its largest magnitude divided by m; through zstd."""

    bits: int
    """8, or 4 for two codes in a byte."""
    scaled: bool = True

    @property
    def largest(self) -> int:
        """The largest multiple, m."""
        return (1 << self.bits - 1) - 1

    def scales(self, values: Float32Array, groups: Groups, indices: Indices | None) -> Uint16Array:
        """Rounded up, so that the largest magnitude is not cut."""
        starts, filled = groups.starts(indices)
        peaks = np.zeros(groups.num, np.float32)
        peaks[filled] = np.maximum.reduceat(np.abs(values), starts) if starts.size else 0
        bits = (peaks / np.float32(self.largest)).view(np.uint32)
        scales: Uint16Array = ((bits + np.uint32(0xFFFF)) >> 16).astype(np.uint16)
        return scales

    def quantise(
        self, values: Float32Array, scales: Float32Array, generator: np.random.Generator | None
    ) -> Codes:
        """Multiple + m."""
        multiples = np.divide(values, scales, out=np.zeros_like(values), where=scales > 0)
        if generator is None:
            np.rint(multiples, out=multiples)
        else:
            multiples += generator.random(values.size, np.float32)
            np.floor(multiples, out=multiples)
        np.clip(multiples, -self.largest, self.largest, out=multiples)
        multiples += np.float32(self.largest)
        return multiples.astype(np.uint8)

    def restore(self, codes: Codes, scales: Float32Array) -> Float32Array:
        """(code − m) · scale, exact in float32."""
        values: Float32Array = codes.astype(np.float32)
        values -= np.float32(self.largest)
        values *= scales
        return values

    def pack(self, codes: Codes) -> bytes:
        """One frame; of 4 bits, two codes in a byte, the first in the upper half, 0 after the last."""
        if self.bits == 4:
            even = np.append(codes, np.uint8(0)) if codes.size % 2 else codes
            codes = even[0::2] << 4 | even[1::2]
        return lossless.compress(codes)

    def unpack(self, piece: Uint8Array, count: int) -> Codes:
        """Apart again; no code is above 2m."""
        content = _content(piece, -(-count * self.bits // 8))
        if self.bits == 4:
            halves = np.empty(2 * content.size, np.uint8)
            halves[0::2], halves[1::2] = content >> 4, content & 15
            if halves[count:].any():
                raise CodecError("a block has codes left over")
            content = halves[:count]
        if content.max(initial=0) > 2 * self.largest:
            raise CodecError("a block holds a code that no encoder writes")
        return content

    def bytes_max(self, count: int) -> int:
        """As if no code could be compressed."""
        return lossless.compressed_bytes_max(-(-count * self.bits // 8))


@dataclass(frozen=True, slots=True)
class Signs:
    """Plus or minus the group's scale, its mean magnitude, which minimises the squared error; one bit each."""

    scaled: bool = True

    def scales(self, values: Float32Array, groups: Groups, indices: Indices | None) -> Uint16Array:
        """Rounded to nearest, but not to zero."""
        starts, filled = groups.starts(indices)
        means = np.zeros(groups.num)
        sums = np.add.reduceat(np.abs(values), starts, dtype=np.float64) if starts.size else means[:0]
        means[filled] = sums / np.diff(starts, append=values.size)
        scales = float32_to_bf16(means.astype(np.float32))
        scales[means > 0] = np.maximum(scales[means > 0], 1)
        return scales

    def quantise(
        self, values: Float32Array, scales: Float32Array, generator: np.random.Generator | None
    ) -> Codes:
        """1 for negative."""
        del scales, generator
        return (values < 0).view(np.uint8)

    def restore(self, codes: Codes, scales: Float32Array) -> Float32Array:
        """The scale with the sign put in front."""
        bits = scales.view(np.uint32)
        bits |= np.left_shift(codes, 31, dtype=np.uint32)
        return scales

    def pack(self, codes: Codes) -> bytes:
        """Bits."""
        return lossless.encode_signs(codes)

    def unpack(self, piece: Uint8Array, count: int) -> Codes:
        """Bytes again."""
        return lossless.decode_signs(piece, count=count)

    def bytes_max(self, count: int) -> int:
        """Exactly what they take."""
        return lossless.sign_bytes(count)


VALUES: Final[Mapping[ValueKind, ValueCoder]] = {
    ValueKind.BF16: Bfloats(),
    ValueKind.INT8: Integers(8),
    ValueKind.INT4: Integers(4),
    ValueKind.SIGN: Signs(),
}
"""How values are written, by setting."""
BLOCK_BYTES_MAX: Final = lossless.compressed_bytes_max(0) + 2
"""What a block adds to the size of its codes, at most."""


def _content(frame: Uint8Array, size: int) -> Uint8Array:
    content = lossless.decompress(frame, size_bytes_max=size)
    if content.size != size:
        raise CodecError(f"a block's frame holds {content.size} bytes and not {size}")
    return content
