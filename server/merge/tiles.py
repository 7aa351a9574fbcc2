"""What the engine reads and writes: slices of flat tensors, so that it knows nothing of files.

A *tile* is elements ``start:stop`` of one tensor in C order. Readers and sinks are called from several
threads at once, on disjoint slices.

Legend: W = updates, T = elements of a tile.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from weft.common.modules import Schema

Float32: TypeAlias = npt.NDArray[np.float32]
Float64: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]
Bits: TypeAlias = npt.NDArray[np.int32]
Bytes: TypeAlias = npt.NDArray[np.uint8]
Words: TypeAlias = npt.NDArray[np.uint16]
Counts: TypeAlias = npt.NDArray[np.unsignedinteger[Any]]

D = TypeVar("D", bound=np.generic)

WORKING_ELEMENTS: Final = 1 << 18
"""Elements of a tile over all updates: as float64 they fit a core's second-level cache."""
CACHE_LINE_BYTES: Final = 64


class Tiles(Protocol):
    """A module's tensors, read slice by slice: a start version, or the outer optimiser's momentum."""

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """Elements ``start:stop`` of tensor ``name``, flat in C order, float32 [stop − start]."""
        ...


class Sink(Protocol):
    """Where the next version goes; every element is written, in any order, some again: what comes last holds."""

    def write(self, name: str, start: int, values: Float32) -> None:
        """Set elements from ``start`` of tensor ``name``."""
        ...


class Update(Protocol):
    """One worker's movement, trained − start, with what it says about itself."""

    @property
    def worker_id(self) -> str:
        """Who sent it."""
        ...

    @property
    def task_id(self) -> str:
        """For which task; (worker, task) is unique among the updates of a merge."""
        ...

    @property
    def weight(self) -> float:
        """What it counts for, ≥ 0; any unit, since weights are normalised."""
        ...

    @property
    def sparse(self) -> bool:
        """Whether the worker has trimmed it already, so that no rule trims it again."""
        ...

    @property
    def rank(self) -> int | None:
        """Rank of its LoRA factors, A[:rank] and B[:, :rank] of the module's; None: the module's own."""
        ...

    @property
    def norm(self) -> float | None:
        """L2 norm of the movement of all its tensors, where that was measured when it came in."""
        ...

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """The movement of elements ``start:stop`` of tensor ``name``, flat in C order.

        The next tile of any update may come to lie where this one lies.

        Of a smaller rank, the elements are those of its own, smaller tensor (``Schema.at_rank``).
        """
        ...

    def sparse_tile(self, name: str, start: int, stop: int) -> tuple[Indices, Float32] | None:
        """The same as (positions from ``start`` on, ascending; values); None where it is held dense."""
        ...

    def fisher_tile(self, name: str, start: int, stop: int) -> Float32:
        """The diagonal Fisher of the same elements, ≥ 0; only asked for when the rule needs it."""
        ...


InputGrams: TypeAlias = Callable[[Update, str], Float32 | Float64 | None]
"""(update, matrix, or A of a LoRA layer) → second moments of the inputs of its layer, [i, i]; None: it has none."""


@dataclass(frozen=True, slots=True)
class Arrays:
    """Tensors held as float32 arrays, in memory or memory-mapped: a reader and a sink."""

    arrays: Mapping[str, npt.NDArray[np.float32]]
    """C-contiguous float32 arrays by tensor name; ``np.memmap`` is one."""

    def __post_init__(self) -> None:
        for name, array in self.arrays.items():
            if array.dtype != np.float32 or not array.flags.c_contiguous:
                raise ValueError(f"{name} must be float32 in C order")

    @classmethod
    def zeros(cls, schema: Schema) -> Arrays:
        """Arrays of zeros in the shapes of ``schema``."""
        return cls({spec.name: np.zeros(spec.shape, np.float32) for spec in schema.tensors})

    @classmethod
    def shared(cls, schema: Schema) -> Arrays:
        """The same, in memory that forked processes write to together."""
        arrays, end = {}, 0
        places = {spec.name: (end, end := end + spec.size * 4) for spec in schema.tensors}
        memory = mmap.mmap(-1, max(1, end))
        for spec in schema.tensors:
            start, stop = places[spec.name]
            arrays[spec.name] = np.frombuffer(memory, np.float32, (stop - start) // 4, start).reshape(
                spec.shape
            )
        return cls(arrays)

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """A view of elements ``start:stop``."""
        return self.arrays[name].reshape(-1)[start:stop]

    def write(self, name: str, start: int, values: Float32) -> None:
        """Set elements from ``start``."""
        self.arrays[name].reshape(-1)[start : start + len(values)] = values


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayUpdate:
    """An update held in memory."""

    worker_id: str
    """Who sent it."""
    deltas: Arrays
    """Movement by tensor name."""
    task_id: str = ""
    """For which task."""
    weight: float = 1.0
    """What it counts for."""
    sparse: bool = False
    """Whether it is trimmed already."""
    rank: int | None = None
    """Rank of its LoRA factors; None: the module's own."""
    fisher: Arrays | None = None
    """Diagonal Fisher by tensor name."""
    norm: float | None = None
    """L2 norm of the movement, where it is known."""

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """The movement of elements ``start:stop``."""
        return self.deltas.tile(name, start, stop)

    def sparse_tile(self, _name: str, _start: int, _stop: int) -> tuple[Indices, Float32] | None:
        """None: arrays are dense."""
        return None

    def fisher_tile(self, name: str, start: int, stop: int) -> Float32:
        """The Fisher of elements ``start:stop``; ValueError when there is none."""
        if self.fisher is None:
            raise ValueError(f"the update of {self.worker_id} carries no Fisher")
        return self.fisher.tile(name, start, stop)


def aligned(size: int, dtype: type[D]) -> npt.NDArray[D]:
    """An array of ``size`` elements that begins at a cache line; it holds anything."""
    num_bytes = size * np.dtype(dtype).itemsize
    raw = np.empty(num_bytes + CACHE_LINE_BYTES, np.uint8)
    first = -raw.__array_interface__["data"][0] % CACHE_LINE_BYTES
    return raw[first : first + num_bytes].view(dtype)


class Scratch:
    """Arrays of one thread that are used again: fresh ones cost more in page faults than the arithmetic.

    They begin at a cache line: arithmetic on others takes twice as long. What was taken under a name holds until
    the name is taken again.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, type[np.generic]], npt.NDArray[Any]] = {}

    def take(self, name: str, size: int, dtype: type[D]) -> npt.NDArray[D]:
        """An array of ``size`` elements of ``dtype``; it holds anything."""
        buffer = self._buffers.get((name, dtype))
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[name, dtype] = aligned(size, dtype)
        return buffer[:size]

    def zeros(self, name: str, size: int, dtype: type[D]) -> npt.NDArray[D]:
        """The same, filled with zeros."""
        buffer = self.take(name, size, dtype)
        buffer.fill(0)
        return buffer


class _Own(threading.local):
    def __init__(self) -> None:
        self.scratch = Scratch()


OWN: Final = _Own()
"""What each thread has for itself, from one merge to the next: a model is a few hundred of them."""


def spans(size: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut ``size`` elements into (start, stop) of at most ``length``."""
    return ((start, min(start + length, size)) for start in range(0, size, length))


def weighted_sum(rows_WT: Float64 | npt.NDArray[np.bool_], weights_W: Float64) -> Float64:
    """Σ_i weights[i] · rows[i], row by row.

    ``rows.sum(axis=0)`` and ``weights @ rows`` choose their order of addition by shape, so that the result
    would depend on the length of the tile: rules use this instead.

    Args:
        rows_WT: float64 or bool [W, T].
        weights_W: float64 [W].

    Returns:
        float64 [T].
    """
    total_T: Float64 = rows_WT[0] * weights_W[0]
    product_T = np.empty_like(total_T)
    for row_T, weight in zip(rows_WT[1:], weights_W[1:], strict=True):
        np.multiply(row_T, weight, out=product_T)
        total_T += product_T
    return total_T
