"""What a merge will do, known before any work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from weft.common.modules import TensorSpec
from weft.server.offline.units import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The units of a merge and the files of its result."""

    units: tuple[Unit, ...]
    """What is to be done, in this order."""
    specs: tuple[TensorSpec, ...]
    """What is stored, by the dtypes of the files, but for a base beside it."""
    stem: str
    """Name of the weight files: model or adapter_model."""
    files: Mapping[str, bytes | Path]
    """Other files by name: their content, or what they are copied from."""
    notes: tuple[str, ...]
    """What a person should know."""
    library: str
    """What loads the result: transformers or peft."""
    base_name: str
    """The base that it belongs to or comes from, for the model card; unset where that would mislead."""
    loses: str = "truncation to the rank"
    """What can lose a part of ΔW."""
    base_specs: tuple[TensorSpec, ...] = ()
    """What is stored in the folder base of an adapter that brings its base along."""

    @property
    def num_parameters(self) -> int:
        """Elements of the result."""
        return sum(spec.size for spec in self.all_specs)

    @property
    def all_specs(self) -> tuple[TensorSpec, ...]:
        """All that is stored."""
        return (*self.specs, *self.base_specs)
