"""What a codec is: a way to write one section of an update and to read it tile by tile."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from weft.common.codec.settings import CodecSettings
from weft.common.errors import UpdateRejected
from weft.common.modules import Schema
from weft.common.tensors import Entry, Float32Array, TensorData, TensorFile, first_non_finite

Indices: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Expected:
    """A tensor that a section consists of."""

    dtype: str
    """As safetensors writes it."""
    shape: tuple[int, ...] | None
    """None: one dimension, of a length that the data decides."""

    def matches(self, entry: Entry) -> bool:
        """Whether ``entry`` is that tensor."""
        shape = entry.spec.shape
        return entry.spec.dtype == self.dtype and (
            len(shape) == 1 if self.shape is None else shape == self.shape
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """Settings, and the seeds of what is left to chance."""

    settings: CodecSettings
    """The run's setting."""
    round_seed: int = 0
    """Decides which positions a shared mask keeps: the same for all updates of a round. Below 2⁶⁴."""
    worker_seed: int = 0
    """Decides how stochastic rounding falls; a reader needs no such thing. Below 2⁶⁴."""

    def __post_init__(self) -> None:
        if not (0 <= self.round_seed < 1 << 64 and 0 <= self.worker_seed < 1 << 64):
            raise ValueError("seeds are whole numbers from 0, below 2**64")


def seed_of(*parts: str | int) -> int:
    """A seed from names and numbers, the same everywhere: of a run, a module and a round, for ``round_seed``."""
    text = json.dumps(parts, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "little")


class SectionReader(Protocol):
    """An open section."""

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        """Elements ``start`` to ``stop`` of a tensor in C order, as float32; not to be written to."""
        ...


class DeltaReader(SectionReader, Protocol):
    """An open delta, which may be sparse."""

    def sparse_tile(self, name: str, start: int, stop: int) -> tuple[Indices, Float32Array]:
        """The tile's elements that are not zero: indices from ``start`` on, ascending, and values [k]."""
        ...


class SectionCodec(Protocol):
    """One way to write a section."""

    def expected(self, section: str, schema: Schema, settings: CodecSettings) -> Mapping[str, Expected]:
        """The tensors of the section in the file, by name."""
        ...

    def encode(
        self, section: str, schema: Schema, arrays: Mapping[str, Float32Array], coding: Coding
    ) -> dict[str, TensorData]:
        """Turn finite float32 arrays in the schema's shapes into the tensors of the section."""
        ...

    def screen(
        self, section: str, file: TensorFile, schema: Schema, *, coding: Coding, magnitude_max: float
    ) -> float:
        """Check every value of a section whose tensors are as expected; returns its float64 sum of squares.

        Raises:
            CodecError: The data decode to nothing.
            UpdateRejected: They decode to values that are not allowed.
        """
        ...

    def open(self, section: str, file: TensorFile, schema: Schema, coding: Coding) -> SectionReader:
        """Read a section that was screened."""
        ...

    def data_bytes_max(self, schema: Schema, settings: CodecSettings) -> int:
        """More bytes than the section's tensors ever take."""
        ...


class DeltaCodec(SectionCodec, Protocol):
    """One way to write a delta; a row of the registry."""

    @property
    def sparse(self) -> bool:
        """Whether most values are exactly zero, so that nothing is left to trim."""
        ...

    def open(self, section: str, file: TensorFile, schema: Schema, coding: Coding) -> DeltaReader:
        """Read a delta that was screened."""
        ...


def check_values(name: str, start: int, values: Float32Array, magnitude_max: float) -> None:
    """Raise UpdateRejected unless the values, from ``start`` of ``name`` on, are finite and small enough."""
    index = first_non_finite(values)
    if index is not None:
        raise UpdateRejected(f"{name} is not finite at element {start + index}")
    if values.size and max(float(values.max()), -float(values.min())) > magnitude_max:
        raise UpdateRejected(f"{name} holds a value larger than {magnitude_max:g}")


def non_zero(values: Float32Array) -> tuple[Indices, Float32Array]:
    """Ascending indices and values of what is not zero."""
    indices = np.flatnonzero(values)
    return indices, values[indices]
