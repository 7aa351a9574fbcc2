"""Every value, as float32 or as bfloat16 rounded to nearest even; one tensor ``SECTION/NAME`` each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from weft.common.codec.section import Expected, SectionReader, check_values
from weft.common.codec.settings import CodecKind, CodecSettings
from weft.common.modules import Schema
from weft.common.tensors import DTYPES, Bf16, Float32Array, TensorData, TensorFile, float32_to_bf16, slices


@dataclass(frozen=True, slots=True)
class Dense:
    """Values of one dtype."""

    name: CodecKind
    dtype: str
    sparse: bool = False

    def expected(self, section: str, schema: Schema) -> dict[str, Expected]:
        """One tensor each."""
        return {f"{section}/{spec.name}": Expected(self.dtype, spec.shape) for spec in schema.tensors}

    def encode(
        self, section: str, schema: Schema, arrays: Mapping[str, Float32Array], settings: CodecSettings
    ) -> dict[str, TensorData]:
        """Round where the dtype asks for it."""
        del schema, settings
        return {
            f"{section}/{name}": array if self.dtype == "F32" else Bf16(float32_to_bf16(array))
            for name, array in arrays.items()
        }

    def screen(
        self, section: str, file: TensorFile, schema: Schema, *, settings: CodecSettings, magnitude_max: float
    ) -> float:
        """Look at each value once, a slice at a time."""
        del settings
        sum_of_squares = 0.0
        for spec in schema.tensors:
            for start, stop in slices(spec.size):
                values = file.tile(f"{section}/{spec.name}", start, stop)
                check_values(spec.name, start, values, magnitude_max)
                sum_of_squares += float(np.square(values, dtype=np.float64).sum())
        return sum_of_squares

    def open(self, section: str, file: TensorFile, schema: Schema) -> SectionReader:
        """Tiles straight from the mapped file."""
        del schema
        return _DenseReader(section, file)

    def data_bytes_max(self, schema: Schema, settings: CodecSettings) -> int:
        """Exactly what it takes."""
        del settings
        return schema.num_parameters * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class _DenseReader:
    section: str
    file: TensorFile

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        return self.file.tile(f"{self.section}/{name}", start, stop)
