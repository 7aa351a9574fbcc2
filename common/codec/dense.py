"""Every value as it is, in float32: one tensor ``SECTION/NAME`` each, read straight from the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from weft.common.codec.section import Coding, DeltaReader, Expected, Indices, check_values, non_zero
from weft.common.codec.settings import CodecSettings
from weft.common.modules import Schema
from weft.common.tensors import Float32Array, TensorData, TensorFile, slices


@dataclass(frozen=True, slots=True)
class Dense:
    """Thirty-two bits a value."""

    sparse: bool = False

    def expected(self, section: str, schema: Schema, settings: CodecSettings) -> dict[str, Expected]:
        """One tensor each."""
        del settings
        return {f"{section}/{spec.name}": Expected("F32", spec.shape) for spec in schema.tensors}

    def encode(
        self, section: str, schema: Schema, arrays: Mapping[str, Float32Array], coding: Coding
    ) -> dict[str, TensorData]:
        """The arrays themselves."""
        del schema, coding
        return {f"{section}/{name}": array for name, array in arrays.items()}

    def screen(
        self, section: str, file: TensorFile, schema: Schema, *, coding: Coding, magnitude_max: float
    ) -> float:
        """Look at each value once, a slice at a time."""
        del coding
        sum_of_squares = 0.0
        for spec in schema.tensors:
            for start, stop in slices(spec.size):
                values = file.tile(f"{section}/{spec.name}", start, stop)
                check_values(spec.name, start, values, magnitude_max)
                sum_of_squares += float(np.square(values, dtype=np.float64).sum())
        return sum_of_squares

    def open(self, section: str, file: TensorFile, schema: Schema, coding: Coding) -> DeltaReader:
        """Tiles straight from the mapped file."""
        del schema, coding
        return _DenseReader(section, file)

    def data_bytes_max(self, schema: Schema, settings: CodecSettings) -> int:
        """Exactly what it takes."""
        del settings
        return 4 * schema.num_parameters


@dataclass(frozen=True, slots=True)
class _DenseReader:
    section: str
    file: TensorFile

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        return self.file.tile(f"{self.section}/{name}", start, stop)

    def sparse_tile(self, name: str, start: int, stop: int) -> tuple[Indices, Float32Array]:
        return non_zero(self.tile(name, start, stop))
