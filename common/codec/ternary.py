"""Signs of the largest values, times one scale a tensor.

After ComPEFT (arXiv 2311.13171) and sparse ternary compression (arXiv 1903.02891). Of each tensor the k =
max(1, floor(density · n + 1/2)) values of largest magnitude are kept, equal ones from the front, never a
zero; each becomes its sign times the mean magnitude of all that are kept, which is the least-squares scale.
Threshold and scale belong to one tensor: under a common threshold a LoRA's B, small beside its A, would lose
every value.

Section tensors: ``#scales`` F32 [tensors]; ``#counts`` I32 [blocks], values kept in each block of the row of
all elements (see blocks.py); ``#frame_bytes`` I32 [blocks] and ``#gaps`` U8, the frames end to end;
``#signs`` U8, the bits of each block from a whole byte on.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from weft.common.codec import lossless
from weft.common.codec.blocks import BLOCK_SIZE, Pieces, Row, pack
from weft.common.codec.section import Expected, SectionReader
from weft.common.codec.settings import CodecKind, CodecSettings
from weft.common.errors import CodecError, UpdateRejected
from weft.common.modules import Schema
from weft.common.tensors import Float32Array, TensorData, TensorFile

Indices = npt.NDArray[np.int64]
Signs = npt.NDArray[np.int8]


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


@dataclass(frozen=True, slots=True)
class Ternary:
    """Three values a tensor: zero, and plus or minus its scale."""

    name: CodecKind = CodecKind.TERNARY
    sparse: bool = True

    def expected(self, section: str, schema: Schema) -> dict[str, Expected]:
        """Five tensors, whatever the number of tensors in the schema."""
        num_blocks = Row(schema).num_blocks
        return {
            f"{section}#scales": Expected("F32", (len(schema.tensors),)),
            f"{section}#counts": Expected("I32", (num_blocks,)),
            f"{section}#frame_bytes": Expected("I32", (num_blocks,)),
            f"{section}#gaps": Expected("U8", None),
            f"{section}#signs": Expected("U8", None),
        }

    def encode(
        self, section: str, schema: Schema, arrays: Mapping[str, Float32Array], settings: CodecSettings
    ) -> dict[str, TensorData]:
        """Keep, scale, and write positions and signs block by block."""
        row = Row(schema)
        kept, negative, scales = _ternarise(row, arrays, settings.density)
        cuts = np.searchsorted(kept, [row.block_span(block)[0] for block in range(row.num_blocks)])
        kept_by_block = np.split(kept, cuts[1:])[: row.num_blocks]
        frame_bytes, gaps = pack(
            lossless.compress(lossless.encode_gaps(positions - block * BLOCK_SIZE))
            for block, positions in enumerate(kept_by_block)
        )
        _, signs = pack(lossless.encode_signs(part) for part in np.split(negative, cuts[1:]))
        return {
            f"{section}#scales": scales,
            f"{section}#counts": np.array([positions.size for positions in kept_by_block], np.int32),
            f"{section}#frame_bytes": frame_bytes,
            f"{section}#gaps": gaps,
            f"{section}#signs": signs,
        }

    def screen(
        self, section: str, file: TensorFile, schema: Schema, *, settings: CodecSettings, magnitude_max: float
    ) -> float:
        """Decode block by block, count what each tensor keeps, and look at the scales."""
        counts = _Blocks(section, file, Row(schema)).counts_by_tensor()
        scales: Float32Array = file.array(f"{section}#scales")
        for spec, count in zip(schema.tensors, counts.tolist(), strict=True):
            if count > num_kept(spec.size, settings.density):
                raise UpdateRejected(
                    f"{spec.name} keeps {count} of {spec.size} values, more than the codec's density"
                )
        _check_scales(schema, scales, counts, magnitude_max)
        return float((counts * np.square(scales, dtype=np.float64)).sum())

    def open(self, section: str, file: TensorFile, schema: Schema) -> SectionReader:
        """Tiles from the few blocks that they lie in."""
        return _TernaryReader(section, file, schema)

    def data_bytes_max(self, schema: Schema, settings: CodecSettings) -> int:
        """As if every gap took its bytes uncompressed."""
        row = Row(schema)
        count = sum(num_kept(spec.size, settings.density) for spec in schema.tensors)
        gaps = lossless.compressed_bytes_max(lossless.gap_bytes_max(count, row.size))
        per_block = 4 + 4 + 1 + lossless.compressed_bytes_max(0)
        return 4 * len(schema.tensors) + gaps + lossless.sign_bytes(count) + per_block * row.num_blocks


class _Blocks:
    """Positions and signs of each block of the row."""

    def __init__(self, section: str, file: TensorFile, row: Row) -> None:
        self._row = row
        self._counts = file.array(f"{section}#counts")
        self._frames = Pieces(
            f"{section}#gaps", file.array(f"{section}#frame_bytes"), file.array(f"{section}#gaps")
        )
        sign_bytes = (self._counts.astype(np.int64) + 7) // 8
        self._signs = Pieces(f"{section}#signs", sign_bytes, file.array(f"{section}#signs"))

    def decode(self, block: int) -> tuple[lossless.Positions, Signs]:
        """Ascending positions within the block, and the signs of the values there; raises CodecError."""
        start, stop = self._row.block_span(block)
        count, size = int(self._counts[block]), stop - start
        if not 0 <= count <= size:
            raise CodecError(f"block {block} cannot keep {count} of {size} values")
        data = lossless.decompress(self._frames[block], size_bytes_max=lossless.gap_bytes_max(count, size))
        positions = lossless.decode_gaps(data, count=count, size=size)
        return positions, lossless.decode_signs(self._signs[block], count=count)

    def counts_by_tensor(self) -> Indices:
        """How many values each tensor keeps; decodes every block once."""
        counts = np.zeros(len(self._row.names), np.int64)
        for block in range(self._row.num_blocks):
            positions, _ = self.decode(block)
            counts += np.diff(np.searchsorted(positions, self._row.bounds - block * BLOCK_SIZE))
        return counts


class _TernaryReader:
    """Decodes a block when a tile needs it and remembers the last few: five bytes a kept value."""

    def __init__(self, section: str, file: TensorFile, schema: Schema) -> None:
        self._row = Row(schema)
        self._scales: Float32Array = file.array(f"{section}#scales")
        self._decoded = functools.lru_cache(maxsize=4)(_Blocks(section, file, self._row).decode)

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        first, last = self._row.span(name, start, stop)
        scale = self._scales[self._row.index(name)]
        values = np.zeros(stop - start, np.float32)
        for block in self._row.blocks(first, last):
            positions, signs = self._decoded(block)
            offset = first - block * BLOCK_SIZE
            low, high = np.searchsorted(positions, (offset, last - block * BLOCK_SIZE))
            values[positions[low:high] - offset] = np.multiply(signs[low:high], scale, dtype=np.float32)
        return values


def _ternarise(
    row: Row, arrays: Mapping[str, Float32Array], density: float
) -> tuple[Indices, npt.NDArray[np.bool_], Float32Array]:
    """Ascending positions in the row, whether each is negative, and the scale of each tensor."""
    kept, negative, scales = [np.empty(0, np.int64)], [np.empty(0, np.bool_)], []
    for name, start in zip(row.names, row.bounds.tolist(), strict=False):
        values = np.ascontiguousarray(arrays[name]).reshape(-1)
        indices = largest(values, num_kept(values.size, density))
        chosen = values[indices]
        kept.append(indices + start)
        negative.append(chosen < 0)
        scales.append(np.abs(chosen).mean(dtype=np.float64) if chosen.size else 0.0)
    return np.concatenate(kept), np.concatenate(negative), np.array(scales, np.float32)


def _check_scales(schema: Schema, scales: Float32Array, counts: Indices, magnitude_max: float) -> None:
    for spec, scale, count in zip(schema.tensors, scales.tolist(), counts.tolist(), strict=True):
        if not math.isfinite(scale) or scale > magnitude_max:
            raise UpdateRejected(
                f"{spec.name} has a scale that is not finite or larger than {magnitude_max:g}"
            )
        if (scale <= 0) if count else (scale != 0 or math.copysign(1, scale) < 0):
            raise UpdateRejected(f"{spec.name} has a scale that does not fit the {count} values it keeps")
