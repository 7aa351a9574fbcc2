"""How fast this worker's line is upwards, and which codec a run wants it to use for that."""

from __future__ import annotations

import logging
import statistics
from pathlib import Path
from typing import Final

from weft.common.blobs import storage_errors
from weft.common.codec import CodecSettings
from weft.common.errors import InputError
from weft.common.manifest import canonical_json, parse_json
from weft.common.recipe import Recipe

logger = logging.getLogger(__name__)

MEASURED_BYTES_MIN: Final = 64 * 1024
"""Smaller uploads measure the calls' delays rather than the line."""
MEASUREMENTS_KEPT: Final = 5
_FILE_BYTES_MAX: Final = 4096


class Uplink:
    """Measured speeds of finished uploads, kept in a file over restarts."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._bytes_per_s = _read(file)

    @property
    def bytes_per_s(self) -> float | None:
        """The median of the last few uploads; None before the first."""
        return statistics.median(self._bytes_per_s) if self._bytes_per_s else None

    def took(self, num_bytes: int, seconds: float) -> None:
        """Take note of a finished upload; raises DiskFull, StorageError."""
        if num_bytes < MEASURED_BYTES_MIN or seconds <= 0:
            return
        self._bytes_per_s = [*self._bytes_per_s, num_bytes / seconds][-MEASUREMENTS_KEPT:]
        partial = self._file.with_name(f"{self._file.name}.partial")
        with storage_errors(self._file):
            partial.write_bytes(canonical_json(self._bytes_per_s))
            partial.replace(self._file)


def choose_codec(recipe: Recipe, bytes_per_s: float | None) -> CodecSettings:
    """The codec of an update: the recipe's, or the one for slow lines where this one was measured as such."""
    slow = recipe.slow_uplink
    if slow is None or bytes_per_s is None:
        return recipe.codec
    return slow.codec if bytes_per_s * 8 / 1e6 < slow.below_mbit_s else recipe.codec


def _read(file: Path) -> list[float]:
    if not file.exists():
        return []
    try:
        found = parse_json(file.read_bytes(), _FILE_BYTES_MAX)
        return [float(value) for value in found if float(value) > 0][-MEASUREMENTS_KEPT:]
    except (InputError, OSError, TypeError, ValueError) as error:
        logger.warning("the uplink is measured anew: %s", error)
        return []
