"""Nested LoRA ranks: a worker of rank r trains A[:r] and B[:, :r] of a module of rank R.

Each rank slice, a row of A and a column of B, is merged over the updates that own it, with their weights
renormalised, so that slices that few own are not diluted by zeros of the others. What nobody owns does not
move.

Legend: W = updates, T = elements of a tile, R = the module's rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from weft.common.modules import LORA_A, LORA_B, TensorSpec
from weft.server.merge.tiles import Float32, Float64, Indices


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements of a tile that are owned by the same updates."""

    owners: Indices
    """Places of the updates that own them, ascending."""
    elements: Indices
    """Places of the elements in the tile, ascending."""


def pad(
    spec: TensorSpec, own: TensorSpec, start: int, stop: int, read: Callable[[int, int], Float32]
) -> Float32:
    """Elements ``start:stop`` of the module's tensor, zero where an update of smaller rank has none.

    Args:
        spec: The module's tensor.
        own: The update's: the same, or its nested slice.
        start: First element, of the module's tensor.
        stop: One past the last.
        read: Reads elements of the update's own tensor.
    """
    if own.shape == spec.shape:
        return read(start, stop)
    if own.shape[0] < spec.shape[0]:
        padded_T = np.zeros(stop - start, np.float32)
        if start < own.size:
            end = min(stop, own.size)
            padded_T[: end - start] = read(start, end)
        return padded_T
    width, narrow = spec.shape[1], own.shape[1]
    first, last = start // width, -(-stop // width)
    rows = np.zeros((last - first, width), np.float32)
    rows[:, :narrow] = read(first * narrow, last * narrow).reshape(-1, narrow)
    return rows.reshape(-1)[start - first * width : stop - first * width]


def own_rank(spec: TensorSpec, own: TensorSpec) -> int | None:
    """How many rank slices of a tensor an update has; None where it has all there is."""
    if own.shape == spec.shape:
        return None
    return own.shape[0] if own.shape[0] < spec.shape[0] else own.shape[1]


def slices(spec: TensorSpec, ranks_W: Sequence[int | None], start: int, stop: int) -> Iterator[Slice]:
    """Cut a tile into what is owned by the same updates; what nobody owns is left out."""
    owned_W = np.array([math.inf if rank is None else rank for rank in ranks_W])
    rank_T = _rank_of_elements(spec, start, stop)
    low = 0.0
    for high in np.unique(owned_W):
        elements = np.flatnonzero((rank_T >= low) & (rank_T < high))
        if len(elements):
            yield Slice(np.flatnonzero(owned_W >= high), elements)
        low = high


def _rank_of_elements(spec: TensorSpec, start: int, stop: int) -> Indices:
    elements = np.arange(start, stop)
    if spec.name.endswith(LORA_A):
        return elements // spec.shape[1]
    if spec.name.endswith(LORA_B):
        return elements % spec.shape[1]
    raise ValueError(f"{spec.name} is no LoRA factor, and only those come in smaller ranks")


def shares(weights_W: Sequence[float], ranks_W: Sequence[int]) -> list[Float64]:
    """What each update counts for in each rank slice that it owns: float64 [its rank], by update."""
    totals_R = [
        math.fsum(weight for weight, rank in zip(weights_W, ranks_W, strict=True) if rank > slice_)
        for slice_ in range(max(ranks_W))
    ]
    return [weight / np.array(totals_R[:rank]) for weight, rank in zip(weights_W, ranks_W, strict=True)]
