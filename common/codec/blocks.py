"""All tensors of a module as one row of numbers, cut into blocks.

The sections that go through a lossless stage lay the schema's tensors end to end, in the schema's order and
each in C order, and cut that row every ``BLOCK_SIZE`` elements. A block is one compressed frame. So a frame
is large enough for its overhead not to count, whatever the number of tensors, and small enough to be decoded
for one tile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weft.common.errors import CodecError
from weft.common.modules import Schema
from weft.common.tensors import Uint8Array

BLOCK_SIZE: Final = 1 << 20
"""Elements in a block; only the last one is shorter."""


class Row:
    """Where each tensor of a schema lies in the row of all elements, and how the row is cut."""

    def __init__(self, schema: Schema) -> None:
        self.names = tuple(spec.name for spec in schema.tensors)
        self.bounds: npt.NDArray[np.int64] = np.cumsum(
            [0, *(spec.size for spec in schema.tensors)], dtype=np.int64
        )
        self.size = schema.num_parameters
        self.num_blocks = -(-self.size // BLOCK_SIZE)
        self._index = {name: index for index, name in enumerate(self.names)}

    def index(self, name: str) -> int:
        """The number of a tensor in the schema."""
        return self._index[name]

    def span(self, name: str, start: int, stop: int) -> tuple[int, int]:
        """Elements ``start`` to ``stop`` of a tensor, counted in the row."""
        first = int(self.bounds[self._index[name]])
        return first + start, first + stop

    def block_span(self, block: int) -> tuple[int, int]:
        """First element of a block, and one past its last."""
        return block * BLOCK_SIZE, min((block + 1) * BLOCK_SIZE, self.size)

    def blocks(self, start: int, stop: int) -> range:
        """The blocks that elements ``start`` to ``stop`` of the row lie in."""
        return range(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE) if stop > start else start // BLOCK_SIZE)


def pack(pieces: Iterable[bytes]) -> tuple[npt.NDArray[np.int32], Uint8Array]:
    """Join pieces end to end; returns the length of each, and all bytes."""
    parts = list(pieces)
    return np.array([len(part) for part in parts], np.int32), np.frombuffer(b"".join(parts), np.uint8)


class Pieces:
    """Pieces joined end to end, apart again.

    Raises:
        CodecError: The lengths do not add up to the data.
    """

    def __init__(self, what: str, lengths: npt.NDArray[Any], data: Uint8Array) -> None:
        self._bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        self._data = data
        if (lengths < 0).any() or self._bounds[-1] != data.size:
            raise CodecError(f"the lengths in {what} do not add up to its data")

    def __getitem__(self, piece: int) -> Uint8Array:
        return self._data[self._bounds[piece] : self._bounds[piece + 1]]
