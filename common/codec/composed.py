"""Codecs put together from a choice of positions and a way to write values.

Section tensors, beside those of the positions: ``#scales`` BF16 [groups], where values have scales; and
``#value_bytes`` I32 [blocks] with ``#values`` U8, the packed codes of each block of the row of all elements (see
blocks.py), end to end. Only blocks are ever decoded whole: a tile costs the blocks that it lies in.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from weft.common.codec.blocks import Piece, Pieces, Row, pack
from weft.common.codec.lossless import BlockPositions
from weft.common.codec.positions import Positions
from weft.common.codec.section import Coding, DeltaReader, Expected, Indices, check_values, non_zero
from weft.common.codec.settings import CodecSettings
from weft.common.codec.values import BLOCK_BYTES_MAX, VALUES, Codes, Groups, ValueCoder
from weft.common.errors import UpdateRejected
from weft.common.modules import Schema
from weft.common.tensors import Bf16, Float32Array, TensorData, TensorFile, Uint16Array, to_float32

_DENSE_BLOCKS_KEPT: Final = 2
"""Decoded blocks that a reader remembers, a mebibyte each."""
_SPARSE_BLOCKS_KEPT: Final = 4
"""The same where few values are kept, eight bytes a value."""


@dataclass(frozen=True, slots=True)
class Composed:
    """Positions and values."""

    positions: Positions
    """Which values are kept."""

    @property
    def sparse(self) -> bool:
        """Whether positions leave most out."""
        return self.positions.sparse

    def expected(self, section: str, schema: Schema, settings: CodecSettings) -> dict[str, Expected]:
        """Two tensors for values, one for scales, and those of the positions, whatever the schema's number."""
        layout = _Layout.of(schema, self.positions, settings)
        scales = {f"{section}#scales": Expected("BF16", (layout.num_scales,))} if layout.coder.scaled else {}
        return (
            self.positions.expected(section, layout.row)
            | scales
            | {
                f"{section}#value_bytes": Expected("I32", (layout.row.num_blocks,)),
                f"{section}#values": Expected("U8", None),
            }
        )

    def encode(
        self, section: str, schema: Schema, arrays: Mapping[str, Float32Array], coding: Coding
    ) -> dict[str, TensorData]:
        """Choose, quantise tensor by tensor, and write block by block."""
        layout = _Layout.of(schema, self.positions, coding.settings)
        row = layout.row
        flat = [np.ascontiguousarray(arrays[name]).reshape(-1) for name in row.names]
        chosen = self.positions.choose(row, flat, coding)
        codes, scales = layout.quantise(flat, chosen, coding)
        tensors: dict[str, TensorData] = {}
        edges = [*(row.block_span(block)[0] for block in range(row.num_blocks)), row.size]
        if chosen is not None:
            kept = np.concatenate([*map(np.add, chosen, row.bounds.tolist()), np.empty(0, np.int64)])
            edges = np.searchsorted(kept, edges).tolist()
            by_block = [
                kept[low:high] - block * row.block_size
                for block, (low, high) in enumerate(itertools.pairwise(edges))
            ]
            tensors |= self.positions.encode(section, row, by_block)
        if layout.coder.scaled:
            tensors[f"{section}#scales"] = Bf16(scales)
        tensors[f"{section}#value_bytes"], tensors[f"{section}#values"] = pack(
            layout.coder.pack(codes[low:high]) for low, high in itertools.pairwise(edges)
        )
        return tensors

    def screen(
        self, section: str, file: TensorFile, schema: Schema, *, coding: Coding, magnitude_max: float
    ) -> float:
        """Decode block by block, look at each value, and count what each tensor keeps."""
        blocks = self._blocks(section, file, schema, coding)
        blocks.check_scales(magnitude_max)
        row = blocks.layout.row
        kept = np.zeros(len(row.names), np.int64)
        sum_of_squares = 0.0
        for block in range(row.num_blocks):
            positions, values = blocks.decode(block)
            for piece, low, high in _cut(row, block, positions):
                check_values(row.names[piece.index], piece.start, values[low:high], magnitude_max)
                kept[piece.index] += high - low
            sum_of_squares += float(np.square(values, dtype=np.float64).sum())
        for name, size, count in zip(row.names, row.sizes, kept.tolist(), strict=True):
            if count > self.positions.num_kept_max(size, coding.settings):
                raise UpdateRejected(f"{name} keeps {count} of {size} values, more than the codec's density")
        return sum_of_squares

    def open(self, section: str, file: TensorFile, schema: Schema, coding: Coding) -> DeltaReader:
        """Tiles from the few blocks that they lie in."""
        blocks = self._blocks(section, file, schema, coding)
        return _SparseReader(blocks) if self.sparse else _DenseReader(blocks)

    def _blocks(self, section: str, file: TensorFile, schema: Schema, coding: Coding) -> _Blocks:
        layout = _Layout.of(schema, self.positions, coding.settings)
        return _Blocks(section, file, self.positions, layout, coding)

    def data_bytes_max(self, schema: Schema, settings: CodecSettings) -> int:
        """As if nothing could be compressed."""
        layout = _Layout.of(schema, self.positions, settings)
        count = sum(self.positions.num_kept_max(size, settings) for size in layout.row.sizes)
        per_block = (4 + BLOCK_BYTES_MAX) * layout.row.num_blocks
        values = layout.coder.bytes_max(count) + per_block
        return self.positions.bytes_max(layout.row, settings) + 2 * layout.num_scales + values


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where things lie under a schema and settings."""

    row: Row
    coder: ValueCoder
    groups: tuple[Groups, ...]
    """Of each tensor."""
    widths: npt.NDArray[np.int64]
    """Elements of a group of each tensor."""
    first_scales: npt.NDArray[np.int64]
    """Number of each tensor's first scale, and one past the last."""

    @property
    def num_scales(self) -> int:
        return int(self.first_scales[-1])

    @classmethod
    def of(cls, schema: Schema, positions: Positions, settings: CodecSettings) -> _Layout:
        if settings.value_kind is None:
            raise ValueError(f"{settings.kind} does not choose how values are written")
        coder, row = VALUES[settings.value_kind], Row(schema, positions.block_size)
        groups = tuple(Groups(size, settings.elements_per_scale) for size in row.sizes)
        widths = np.array([group.width for group in groups], np.int64)
        nums = [group.num if coder.scaled else 0 for group in groups]
        return cls(row, coder, groups, widths, np.cumsum([0, *nums], dtype=np.int64))

    def quantise(
        self, arrays: Sequence[Float32Array], chosen: Sequence[Indices] | None, coding: Coding
    ) -> tuple[Codes, Uint16Array]:
        """Codes of all kept values, and all scales."""
        codes: list[Codes] = []
        scales = [np.empty(0, np.uint16)]
        for index, (values, groups) in enumerate(zip(arrays, self.groups, strict=True)):
            indices = None if chosen is None else chosen[index]
            kept = values if indices is None else values[indices]
            scales.append(self.coder.scales(kept, groups, indices))
            by_value = self._by_value(to_float32(scales[-1], "BF16"), groups, indices)
            generator = _generator(coding, index) if coding.settings.stochastic_rounding else None
            codes.append(self.coder.quantise(kept, by_value, generator))
        return np.concatenate(codes) if codes else np.empty(0, np.uint8), np.concatenate(scales)

    def _by_value(self, scales: Float32Array, groups: Groups, indices: Indices | None) -> Float32Array:
        return groups.spread(scales, 0, groups.size, indices) if self.coder.scaled else scales


class _Blocks:
    """Positions and values of each block of the row."""

    def __init__(
        self, section: str, file: TensorFile, positions: Positions, layout: _Layout, coding: Coding
    ) -> None:
        self.layout = layout
        self._positions = positions.open(section, file, layout.row, coding)
        self._pieces = Pieces(
            f"{section}#values", file.array(f"{section}#value_bytes"), file.array(f"{section}#values")
        )
        self._scales: Uint16Array = (
            file.array(f"{section}#scales") if layout.coder.scaled else np.empty(0, np.uint16)
        )

    def check_scales(self, magnitude_max: float) -> None:
        """Raise UpdateRejected unless all are finite, none is negative, −0 included, and none too large."""
        allowed = to_float32(self._scales, "BF16") <= magnitude_max
        wrong = np.flatnonzero(~allowed | (self._scales >> 15 > 0))
        if wrong.size:
            index = int(np.searchsorted(self.layout.first_scales, wrong[0], side="right")) - 1
            name = self.layout.row.names[index]
            raise UpdateRejected(
                f"{name} has a scale that is negative, not finite or above {magnitude_max:g}"
            )

    def decode(self, block: int) -> tuple[BlockPositions | None, Float32Array]:
        """Ascending positions within the block, None for all, and the values there; raises CodecError."""
        start, stop = self.layout.row.block_span(block)
        positions = self._positions.positions(block)
        count = stop - start if positions is None else positions.size
        codes = self.layout.coder.unpack(self._pieces[block], count)
        return positions, self.layout.coder.restore(codes, self._by_value(block, positions))

    def _by_value(self, block: int, positions: BlockPositions | None) -> Float32Array:
        """The scale of each value of a block."""
        if not self.layout.coder.scaled:
            return np.empty(0, np.float32)
        return self._of_all(block) if positions is None else self._of_kept(block, positions)

    def _of_all(self, block: int) -> Float32Array:
        layout = self.layout
        by_value = [np.empty(0, np.float32)]
        for piece in layout.row.pieces(block):
            first, last = layout.first_scales[piece.index : piece.index + 2]
            scales = to_float32(self._scales[first:last], "BF16")
            by_value.append(layout.groups[piece.index].spread(scales, piece.start, piece.stop, None))
        return np.concatenate(by_value)

    def _of_kept(self, block: int, positions: BlockPositions) -> Float32Array:
        from weft.common.codec import loops  # not before an update needs it: see there

        layout, row = self.layout, self.layout.row
        start, _ = row.block_span(block)
        tensor = row.tensor_at(start)
        bits = np.empty(positions.size, np.uint32)
        loops.spread_scales(
            positions,
            start,
            row.bounds[tensor:],
            layout.widths[tensor:],
            layout.first_scales[tensor:],
            self._scales,
            bits,
        )
        return bits.view(np.float32)


def _cut(row: Row, block: int, positions: BlockPositions | None) -> Iterator[tuple[Piece, int, int]]:
    """The parts of tensors in a block, and which of its kept values lie in each."""
    for piece in row.pieces(block):
        low, high = piece.offset, piece.offset + piece.stop - piece.start
        if positions is None:
            yield piece, low, high
        else:
            first, last = np.searchsorted(positions, np.array([low, high], np.int32)).tolist()
            yield piece, first, last


class _DenseReader:
    """Decodes a block when a tile needs it and remembers the last few."""

    def __init__(self, blocks: _Blocks) -> None:
        self._row = blocks.layout.row
        self._decoded = functools.lru_cache(maxsize=_DENSE_BLOCKS_KEPT)(lambda block: blocks.decode(block)[1])

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        first, last = self._row.span(name, start, stop)
        parts = []
        for block in self._row.blocks(first, last):
            offset = block * self._row.block_size
            parts.append(self._decoded(block)[max(first - offset, 0) : last - offset])
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, np.float32)])

    def sparse_tile(self, name: str, start: int, stop: int) -> tuple[Indices, Float32Array]:
        return non_zero(self.tile(name, start, stop))


class _SparseReader:
    """The same with positions, of which values that were rounded to zero are left out."""

    def __init__(self, blocks: _Blocks) -> None:
        self._row = blocks.layout.row
        self._decoded = functools.lru_cache(maxsize=_SPARSE_BLOCKS_KEPT)(
            functools.partial(_decode_non_zero, blocks)
        )

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        values = np.zeros(stop - start, np.float32)
        indices, kept = self.sparse_tile(name, start, stop)
        values[indices] = kept
        return values

    def sparse_tile(self, name: str, start: int, stop: int) -> tuple[Indices, Float32Array]:
        first, last = self._row.span(name, start, stop)
        parts = [self._of_block(block, first, last) for block in self._row.blocks(first, last)]
        if len(parts) == 1:
            return parts[0]
        indices = np.concatenate([np.empty(0, np.int64), *(indices for indices, _ in parts)])
        return indices, np.concatenate([np.empty(0, np.float32), *(values for _, values in parts)])

    def _of_block(self, block: int, first: int, last: int) -> tuple[Indices, Float32Array]:
        positions, values = self._decoded(block)
        start, stop = self._row.block_span(block)
        edges = np.array([max(first, start) - start, min(last, stop) - start], np.int32)
        low, high = positions.searchsorted(edges).tolist()
        return np.add(positions[low:high], start - first, dtype=np.int64), values[low:high]


def _decode_non_zero(blocks: _Blocks, block: int) -> tuple[BlockPositions, Float32Array]:
    positions, values = blocks.decode(block)
    if positions is None:
        raise ValueError("every value of the block is kept")
    kept = values != 0
    return (positions, values) if kept.all() else (positions[kept], values[kept])


def _generator(coding: Coding, tensor: int) -> np.random.Generator:
    """Randomness for one tensor's rounding."""
    return np.random.Generator(np.random.Philox(key=np.array([coding.worker_seed, tensor], np.uint64)))
