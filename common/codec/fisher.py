"""Non-negative values on a logarithmic scale of one byte each, made for the diagonal Fisher.

Only ratios of Fisher values matter to a merge. A float32 cut to its exponent and three bits of mantissa is
such a logarithm (eight steps an octave); counted down from the tensor's largest it fits a byte: 255 is the
largest, each step down an eighth of an octave, 1 the smallest, thirty-two octaves below, and 0 is zero. A
code stands for the middle of its step: at most 6.25 % off. Integers alone decide, so the same values give the
same bytes everywhere.

Section tensors: ``#scales`` F32 [tensors], the largest value cut to its step; ``#frame_bytes`` I32 [blocks]
and ``#codes`` U8, the zstd frames of the codes of each block of the row of all elements (see blocks.py), end
to end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from weft.common.codec import lossless
from weft.common.codec.blocks import DENSE_BLOCK, Pieces, Row, pack
from weft.common.codec.section import Coding, Expected, SectionReader
from weft.common.codec.settings import CodecSettings
from weft.common.errors import CodecError, UpdateRejected
from weft.common.modules import Schema
from weft.common.tensors import Float32Array, TensorData, TensorFile, Uint8Array, slices

SCALE_MIN: Final = 2.0**-95
"""A tensor whose largest value is below this is all zeros: thirty-two octaves down there is no float32."""
SCALE_MAX: Final = 2.0**100
"""Largest value that is written: a sum over thousands of workers, times a delta, stays finite in float32."""
_STEP_BITS: Final = 20


@dataclass(frozen=True, slots=True)
class LogScale:
    """Eight bits a value before the lossless stage."""

    def expected(self, section: str, schema: Schema, settings: CodecSettings) -> dict[str, Expected]:
        """Three tensors, whatever the number of tensors in the schema."""
        del settings
        return {
            f"{section}#scales": Expected("F32", (len(schema.tensors),)),
            f"{section}#frame_bytes": Expected("I32", (Row(schema, DENSE_BLOCK).num_blocks,)),
            f"{section}#codes": Expected("U8", None),
        }

    def encode(
        self, section: str, schema: Schema, arrays: Mapping[str, Float32Array], coding: Coding
    ) -> dict[str, TensorData]:
        """Code tensor by tensor; raises CodecError for a negative value or one above ``SCALE_MAX``."""
        del coding
        row = Row(schema, DENSE_BLOCK)
        codes, scales = np.empty(row.size, np.uint8), np.zeros(len(row.names), np.float32)
        for index, name in enumerate(row.names):
            values = np.ascontiguousarray(arrays[name]).reshape(-1)
            scales[index] = _scale(f"{section} of {name}", values)
            _encode(values, scales[index], out=codes[row.bounds[index] : row.bounds[index + 1]])
        blocks = (slice(*row.block_span(block)) for block in range(row.num_blocks))
        frame_bytes, frames = pack(lossless.compress(codes[block]) for block in blocks)
        return {
            f"{section}#scales": scales,
            f"{section}#frame_bytes": frame_bytes,
            f"{section}#codes": frames,
        }

    def screen(
        self, section: str, file: TensorFile, schema: Schema, *, coding: Coding, magnitude_max: float
    ) -> float:
        """Decompress every block and look at the scales, which alone say how large a value can be."""
        del magnitude_max
        row = Row(schema, DENSE_BLOCK)
        frames = _Frames(section, file, row)
        for block in range(row.num_blocks):
            frames.decode(block)
        scales: Float32Array = file.array(f"{section}#scales")
        for name, scale in zip(row.names, scales, strict=True):
            if not _is_scale(scale):
                raise UpdateRejected(f"{section} of {name} has the scale {scale:g}, which no encoder writes")
        reader = self.open(section, file, schema, coding)
        return sum(
            float(np.square(reader.tile(spec.name, start, stop), dtype=np.float64).sum())
            for spec in schema.tensors
            for start, stop in slices(spec.size)
        )

    def open(self, section: str, file: TensorFile, schema: Schema, coding: Coding) -> SectionReader:
        """Tiles by table from the few blocks that they lie in."""
        del coding
        return _LogScaleReader(section, file, schema)

    def data_bytes_max(self, schema: Schema, settings: CodecSettings) -> int:
        """As if no code could be compressed."""
        del settings
        row = Row(schema, DENSE_BLOCK)
        per_block = 4 + lossless.compressed_bytes_max(0)
        return 4 * len(row.names) + lossless.compressed_bytes_max(row.size) + per_block * row.num_blocks


class _Frames:
    """The codes of each block of the row."""

    def __init__(self, section: str, file: TensorFile, row: Row) -> None:
        self._row = row
        lengths, data = file.array(f"{section}#frame_bytes"), file.array(f"{section}#codes")
        self._frames = Pieces(f"{section}#codes", lengths, data)

    def decode(self, block: int) -> Uint8Array:
        """The codes of a block; raises CodecError when they are not one each element."""
        start, stop = self._row.block_span(block)
        codes = lossless.decompress(self._frames[block], size_bytes_max=stop - start)
        if codes.size != stop - start:
            raise CodecError(f"block {block} holds {codes.size} codes for {stop - start} elements")
        return codes


class _LogScaleReader:
    """Decodes a block when a tile needs it and remembers the last few: one byte an element."""

    def __init__(self, section: str, file: TensorFile, schema: Schema) -> None:
        self._row = Row(schema, DENSE_BLOCK)
        self._scales: Float32Array = file.array(f"{section}#scales")
        self._decoded = functools.lru_cache(maxsize=2)(_Frames(section, file, self._row).decode)

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        first, last = self._row.span(name, start, stop)
        values = _values_by_code(self._scales[self._row.index(name)])
        codes = [np.empty(0, np.uint8)]
        for block in self._row.blocks(first, last):
            offset = block * DENSE_BLOCK
            codes.append(self._decoded(block)[max(first - offset, 0) : last - offset])
        tile: Float32Array = values[np.concatenate(codes)]
        return tile


def _scale(what: str, values: Float32Array) -> np.float32:
    """The largest value cut to its step, or zero."""
    if values.size == 0:
        return np.float32(0)
    if values.min() < 0 or values.max() > SCALE_MAX:
        raise CodecError(f"{what} has values below zero or above {SCALE_MAX:g}")
    largest = values.max()
    bits = int(largest.view(np.uint32)) >> _STEP_BITS << _STEP_BITS
    return np.uint32(bits if largest >= SCALE_MIN else 0).view(np.float32)


def _encode(values: Float32Array, scale: np.float32, *, out: Uint8Array) -> None:
    if scale == 0:
        out[:] = 0
        return
    top = int(scale.view(np.uint32)) >> _STEP_BITS
    for start, stop in slices(values.size):
        # The absolute value only turns minus zero, whose sign bit would be read as an exponent, into zero.
        steps = (np.abs(values[start:stop]).view(np.uint32) >> _STEP_BITS).astype(np.int32)
        out[start:stop] = np.maximum(steps - top + 255, 0)


def _values_by_code(scale: np.float32) -> Float32Array:
    """What each of the 256 codes stands for."""
    if scale == 0:
        return np.zeros(256, np.float32)
    steps = np.arange(256, dtype=np.int64) + (int(scale.view(np.uint32)) >> _STEP_BITS) - 255
    values = ((steps << _STEP_BITS) | 1 << (_STEP_BITS - 1)).astype(np.uint32).view(np.float32)
    values[0] = 0
    return values


def _is_scale(scale: np.float32) -> bool:
    bits = int(scale.view(np.uint32))
    return bits == 0 or (bits % (1 << _STEP_BITS) == 0 and SCALE_MIN <= float(scale) <= SCALE_MAX)
