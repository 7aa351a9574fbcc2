"""What a codec is: a way to write one section of an update and to read it tile by tile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from weft.common.codec.settings import CodecSettings
from weft.common.errors import UpdateRejected
from weft.common.modules import Schema
from weft.common.tensors import Entry, Float32Array, TensorData, TensorFile, first_non_finite


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


class SectionReader(Protocol):
    """An open section."""

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        """Elements ``start`` to ``stop`` of a tensor in C order, as float32; not to be written to."""
        ...


class SectionCodec(Protocol):
    """One way to write a section; a row of the registry."""

    @property
    def name(self) -> str:
        """What the update's statement calls it."""
        ...

    @property
    def sparse(self) -> bool:
        """Whether most values are exactly zero, so that nothing is left to trim."""
        ...

    def expected(self, section: str, schema: Schema) -> Mapping[str, Expected]:
        """The tensors of the section in the file, by name."""
        ...

    def encode(
        self, section: str, schema: Schema, arrays: Mapping[str, Float32Array], settings: CodecSettings
    ) -> dict[str, TensorData]:
        """Turn finite float32 arrays in the schema's shapes into the tensors of the section."""
        ...

    def screen(
        self, section: str, file: TensorFile, schema: Schema, *, settings: CodecSettings, magnitude_max: float
    ) -> float:
        """Check every value of a section whose tensors are as expected; returns its float64 sum of squares.

        Raises:
            CodecError: The data decode to nothing.
            UpdateRejected: They decode to values that are not allowed.
        """
        ...

    def open(self, section: str, file: TensorFile, schema: Schema) -> SectionReader:
        """Read a section that was screened."""
        ...

    def data_bytes_max(self, schema: Schema, settings: CodecSettings) -> int:
        """More bytes than the section's tensors ever take."""
        ...


def check_values(name: str, start: int, values: Float32Array, magnitude_max: float) -> None:
    """Raise UpdateRejected unless the values, from ``start`` of ``name`` on, are finite and small enough."""
    index = first_non_finite(values)
    if index is not None:
        raise UpdateRejected(f"{name} is not finite at element {start + index}")
    if values.size and max(float(values.max()), -float(values.min())) > magnitude_max:
        raise UpdateRejected(f"{name} holds a value larger than {magnitude_max:g}")
