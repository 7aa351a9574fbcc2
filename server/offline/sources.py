"""Tensors of other programs' files, as the engine reads them: float32, tile by tile.

Legend: T = elements of a tile.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3

from weft.common.errors import TensorFileError
from weft.common.modules import TensorSpec
from weft.common.tensors import FOREIGN, TensorFile, float8_to_float32
from weft.server.merge.selection import BLOCK_ELEMENTS
from weft.server.merge.tiles import OWN, Float32, Scratch, Tiles, Update, aligned

FLOAT8: Final = frozenset({"F8_E4M3", "F8_E5M2"})
"""What is too coarse to store results in."""
FLOATS: Final = frozenset({"F64", "F32", "F16", "BF16"}) | FLOAT8
"""What is merged; other dtypes are copied."""
WHOLE: Final = frozenset({"F32", "BF16", "F16"})
"""What results are stored as."""


def stored_dtype(dtype: str) -> str:
    """What a floating-point result is stored as that has an input's dtype, if nothing else is asked for."""
    if dtype in FLOAT8:
        return "BF16"
    return dtype if dtype in WHOLE else "F32"


class Weights:
    """The tensors of some files of one directory, mapped, by the names that they have there."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._flat: dict[str, npt.NDArray[Any]] = {}
        self._bfloat16: dict[str, torch.Tensor] = {}
        specs: dict[str, TensorSpec] = {}
        for path in paths:
            file = TensorFile(path, FOREIGN)
            for spec in file.header.specs:
                if spec.name in specs:
                    raise TensorFileError(
                        f"{path} holds {spec.name}, which another file of the directory holds too",
                        hint="remove the file that does not belong to the model",
                    )
                specs[spec.name] = spec
                self._flat[spec.name] = file.array(spec.name).reshape(-1)
                if spec.dtype == "BF16":
                    self._bfloat16[spec.name] = _for_torch(self._flat[spec.name]).view(torch.bfloat16)
        self.specs: Mapping[str, TensorSpec] = specs

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """Elements ``start:stop`` of a floating-point tensor, float32 [T]; float64 is rounded.

        The next tile of any tensor may come to lie where this one lies.
        """
        if name in self._bfloat16:
            wide = _place("wide", stop - start)
            torch.from_numpy(wide).copy_(self._bfloat16[name][start:stop])
            return wide
        return _widen(self._flat[name][start:stop], self.specs[name].dtype)

    def raw(self, name: str) -> npt.NDArray[Any]:
        """The whole tensor as it lies in the file, flat; bfloat16 as uint16."""
        return self._flat[name]

    def digest(self, name: str) -> str:
        """BLAKE3-256 of the tensor's bytes."""
        return blake3(self._flat[name].view(np.uint8).data).hexdigest()


def _widen(values: npt.NDArray[Any], dtype: str) -> Float32:
    if dtype in FLOAT8:
        return float8_to_float32(values, dtype)
    if dtype in FLOATS:
        floats: Float32 = values.astype(np.float32, copy=False)
        return floats
    raise ValueError(f"{dtype} is not floating point")


class Zeros:
    """A start that is zero everywhere."""

    def tile(self, _name: str, start: int, stop: int) -> Float32:
        """Zeros [T]."""
        return np.broadcast_to(np.float32(0), stop - start)


class Recent:
    """Tiles that keep the last one of each thread: a base is read once a tile, not once an input."""

    def __init__(self, tiles: Tiles) -> None:
        self._tiles = tiles
        self._held = _Held()

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """Elements ``start:stop``, not to be written to."""
        held, span = self._held, (name, start, stop)
        if held.span != span:
            values = self._tiles.tile(*span)
            if values.flags.writeable:  # others may come to lie there
                kept = held.scratch.take("tile", len(values), np.float32)
                np.copyto(kept, values)
                values = kept
            held.span, held.values = span, values
        return held.values


class _Held(threading.local):
    """The last tile of a thread."""

    def __init__(self) -> None:
        self.span: tuple[str, int, int] | None = None
        self.values = np.empty(0, np.float32)
        self.scratch = Scratch()


class Movement:
    """What an input moved from its base, as an update of the engine."""

    task_id = ""
    rank = None
    norm = None

    def __init__(
        self,
        trained: Tiles,
        *,
        label: str,
        place: int,
        weight: float = 1.0,
        base: Recent | None = None,
        checked: bool = True,
        sparse: bool = False,
    ) -> None:
        """A movement.

        Args:
            trained: The input's tensors.
            label: What the input is called in messages.
            place: Its place among the inputs, which they are added up in.
            weight: What it counts for; a negative one turns the movement round.
            base: What it is measured from, ``Recent``; None: from zero.
            checked: Refuse NaN and infinity; linear rules hand them on to the result, where they are found.
            sparse: It is trimmed already.
        """
        self.worker_id = f"{place:04d}"
        self.weight = abs(weight)
        self.sparse = sparse
        self._trained, self._base, self._label = trained, base, label
        self._turned, self._checked = weight < 0, checked

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """The movement of elements ``start:stop``, float32 [T]."""
        # First the base, which is kept: the next tile that is read may take the place of the last.
        base = None if self._base is None else self._base.tile(name, start, stop)
        values = self._trained.tile(name, start, stop)
        if base is not None:
            values = np.subtract(values, base, out=_place("difference", len(values)))
        if self._turned:
            values = -values
        if self._checked and not is_finite(values):
            raise not_finite(self._label, name, start, values)
        return values

    def sparse_tile(self, _name: str, _start: int, _stop: int) -> None:
        """None: files of others are dense."""
        return

    def fisher_tile(self, name: str, _start: int, _stop: int) -> Float32:
        """No such file carries a Fisher."""
        raise ValueError(f"{self._label} has no Fisher for {name}")


def _place(name: str, size: int) -> Float32:
    """Where to compute: tiles always in the same place, since a fresh one each costs page faults."""
    if size > BLOCK_ELEMENTS:
        return aligned(size, np.float32)
    return OWN.scratch.take(name, size, np.float32)


def _for_torch(halves: npt.NDArray[np.uint16]) -> torch.Tensor:
    """Mapped 16-bit elements, int16, to be read only: torch widens them faster than numpy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(halves.view(np.int16))


def is_finite(values: Float32) -> bool:
    """Whether there is neither NaN nor infinity."""
    # One sum is many times as fast as looking at each, and finite unless something is not, or it overflows.
    if values.flags.writeable:
        total = float(torch.from_numpy(values).sum())
    else:
        with np.errstate(over="ignore", invalid="ignore"):
            total = float(np.add.reduce(values))
    return math.isfinite(total) or bool(np.isfinite(values).all())


def not_finite(label: str, name: str, start: int, values: Float32) -> TensorFileError:
    """The error for a tile that begins at element ``start``."""
    index = int(np.argmin(np.isfinite(values)))
    said = "NaN" if np.isnan(values[index]) else "infinity"
    return TensorFileError(
        f"{label} holds {said} in {name}, element {start + index}",
        hint="train or export it again; nothing was written",
    )


Thin: TypeAlias = Callable[[Float32, int], Float32]
"""(elements of a tensor, the first one's index) → those that stay, zeros elsewhere, wherever they lie."""


class Thinned:
    """A movement of which some is dropped as it is read, tensor by tensor; the engine then trims nothing more."""

    task_id = ""
    rank = None
    norm = None
    sparse = True

    def __init__(self, update: Update, cuts: Mapping[str, Thin]) -> None:
        self.worker_id, self.weight = update.worker_id, update.weight
        self._update, self._cuts = update, cuts

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """The movement of elements ``start:stop``, zero where it is dropped."""
        values = self._update.tile(name, start, stop)
        cut = self._cuts.get(name)
        return values if cut is None else cut(values, start)

    def sparse_tile(self, _name: str, _start: int, _stop: int) -> None:
        """None: it is thinned as it is read."""
        return

    def fisher_tile(self, name: str, start: int, stop: int) -> Float32:
        """That of the movement."""
        return self._update.fisher_tile(name, start, stop)
