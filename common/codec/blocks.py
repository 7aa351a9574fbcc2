"""All tensors of a module as one row of numbers, cut into blocks.

The sections that go through a lossless stage lay the schema's tensors end to end, in the schema's order and
each in C order, and cut that row into blocks of one size. A block is coded by itself. So it is large enough
for its overhead not to count, whatever the number of tensors, and small enough to be decoded for one tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weft.common.errors import CodecError
from weft.common.modules import Schema
from weft.common.tensors import Uint8Array

DENSE_BLOCK: Final = 1 << 18
"""Elements in a block where every value is written: a mebibyte once decoded."""
SPARSE_BLOCK: Final = 1 << 20
"""Elements in a block where few values are written."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a tensor that lies in a block."""

    index: int
    """The tensor's number in the schema."""
    start: int
    """First element, counted in the tensor."""
    stop: int
    """One past the last."""
    offset: int
    """Where ``start`` lies, counted in the block."""


class Row:
    """Where each tensor of a schema lies in the row of all elements, and how the row is cut."""

    def __init__(self, schema: Schema, block_size: int) -> None:
        self.names = tuple(spec.name for spec in schema.tensors)
        self.sizes = tuple(spec.size for spec in schema.tensors)
        self.bounds: npt.NDArray[np.int64] = np.cumsum([0, *self.sizes], dtype=np.int64)
        self.size = schema.num_parameters
        self.block_size = block_size
        self.num_blocks = -(-self.size // block_size)
        self._index = {name: index for index, name in enumerate(self.names)}
        self._first = dict(zip(self.names, self.bounds.tolist(), strict=False))

    def index(self, name: str) -> int:
        """The number of a tensor in the schema."""
        return self._index[name]

    def span(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """Elements ``start`` to ``stop`` of a tensor, counted in the row."""
        first = self._first[name]
        return first + start, first + stop

    def block_span(self, block: int) -> tuple[int, int]:
        """First element of a block, and one past its last."""
        return block * self.block_size, min((block + 1) * self.block_size, self.size)

    def block_sizes(self) -> npt.NDArray[np.int64]:
        """Elements of each block: all but the last are full."""
        edges = np.minimum(np.arange(self.num_blocks + 1, dtype=np.int64) * self.block_size, self.size)
        return np.diff(edges)

    def tensor_at(self, element: int) -> int:
        """The number of the tensor that an element of the row belongs to."""
        return int(np.searchsorted(self.bounds, element, side="right")) - 1

    def blocks(self, start: int, stop: int) -> range:
        """The blocks that elements ``start`` to ``stop`` of the row lie in."""
        first = start // self.block_size
        return range(first, -(-stop // self.block_size) if stop > start else first)

    def pieces(self, block: int) -> Iterator[Piece]:
        """The parts of tensors that a block consists of, in order; empty tensors have none."""
        first, last = self.block_span(block)
        index = self.tensor_at(first)
        while index < len(self.names) and self.bounds[index] < last:
            begin = int(self.bounds[index])
            start, stop = max(first - begin, 0), min(last - begin, self.sizes[index])
            if stop > start:
                yield Piece(index, start, stop, begin + start - first)
            index += 1

    def locate(self, element: int) -> tuple[str, int]:
        """Tensor and element within it of an element of the row."""
        index = self.tensor_at(element)
        return self.names[index], element - int(self.bounds[index])


def pack(pieces: Iterable[bytes]) -> tuple[npt.NDArray[np.int32], Uint8Array]:
    """Join pieces end to end; returns the length of each, and all bytes."""
    parts = list(pieces)
    return np.array([len(part) for part in parts], np.int32), np.frombuffer(b"".join(parts), np.uint8)


class Pieces:
    """Pieces joined end to end, apart again.

    Raises:
        CodecError: The lengths do not add up to the data.
    """

    def __init__(self, what: str, lengths: npt.NDArray[Any], data: npt.NDArray[Any]) -> None:
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        self._data = data
        if (lengths < 0).any() or self._bounds[-1] != data.size:
            raise CodecError(f"the lengths in {what} do not add up to its data")

    def __getitem__(self, piece: int) -> npt.NDArray[Any]:
        return self._data[self._bounds[piece] : self._bounds[piece + 1]]
