"""LoRA merged as what it computes, ΔW = B A, without ever forming a dense ΔW.

The average of the A's times the average of the B's is not the average of the B A's. A sum of products is one
product of stacked factors, Σ κ_i B_i A_i = [κ_1 B_1 … κ_W B_W] [A_1; …; A_W], of rank up to n = W r. Its best
approximation of rank r (Eckart-Young) comes from QR of both stacks and the SVD of the n × n core between
them.

**Which factors.** The product leaves r × r freedom in (B, A), and the SVD's own choice would be a poor one to
go on training from: it rotates the basis every round under the workers' Adam moments, and where ΔW has rank
below r it zeroes a row of A and a column of B together, which no gradient ever revives. Here A stays as near
as the row space of the merged ΔW allows to the average A of the workers, and B is what makes the product
exact. With one update this returns the update; with a shared, frozen A it returns the average of the B's; at
version 0, where ΔW = 0, it leaves A alone. It also makes the result independent of the signs that the SVD
happens to choose.

Legend: o = out_features, i = in_features, r = rank, n = stacked rank, q = min(r, i), k = rank of ΔW ≤ q.
All tensors are float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from weft.common.modules import TensorSpec
from weft.server.merge.tiles import Tiles, Update

_RANK_TOLERANCE: Final = 1e-9
"""Singular values below this share of the largest are rounding of float32 factors, not directions."""
_OVERLAP_MIN: Final = 1e-2
"""The new A's singular values stay above this share of its largest, lest B make up for a vanishing A."""


@dataclass(frozen=True, slots=True)
class Factors:
    """LoRA factors of one layer."""

    B_or: torch.Tensor
    A_ri: torch.Tensor


@dataclass(frozen=True, slots=True)
class Recompressed:
    """Factors of rank r and what the truncation cost."""

    factors: Factors
    lost_square_sum: float
    """‖ΔW − B A‖²."""
    total_square_sum: float
    """‖ΔW‖²."""


def read_factors(tiles: Tiles | Update, a_spec: TensorSpec, b_spec: TensorSpec) -> Factors:
    """One layer's factors, or their movement, float64."""
    return Factors(_read(tiles, b_spec), _read(tiles, a_spec))


def _read(tiles: Tiles | Update, spec: TensorSpec) -> torch.Tensor:
    # torch's own allocation is always aligned alike, and linear algebra libraries round by alignment.
    tensor = torch.empty(spec.shape, dtype=torch.float64)
    tensor.view(-1).numpy()[:] = tiles.tile(spec.name, 0, spec.size)
    return tensor


def change_square_sum(start: Factors, movement: Factors) -> float:
    """‖(B₀ + dB)(A₀ + dA) − B₀ A₀‖², through 2r × 2r Gram matrices.

    The change is [dB, B₀] [A₀ + dA; dA]: written this way no large numbers cancel, and no movement gives 0.
    """
    left_on = torch.cat([movement.B_or, start.B_or], dim=1)
    right_ni = torch.cat([start.A_ri + movement.A_ri, movement.A_ri], dim=0)
    gram = (left_on.T @ left_on) * (right_ni @ right_ni.T)
    return max(0.0, float(gram.sum()))


def merge_pair(start: Factors, movements: Sequence[Factors], coefficients: Sequence[float]) -> Recompressed:
    """B₀A₀ + Σ κ_i (B_i A_i − B₀A₀), recompressed to the rank of the start.

    Args:
        start: The start version's factors.
        movements: Each worker's trained − start, factor by factor.
        coefficients: κ_i = outer learning rate · weight · clip factor of each worker.
    """
    trained = [Factors(start.B_or + m.B_or, start.A_ri + m.A_ri) for m in movements]
    left_on = torch.cat(
        [
            start.B_or * (1.0 - math.fsum(coefficients)),
            *(factors.B_or * coefficient for factors, coefficient in zip(trained, coefficients, strict=True)),
        ],
        dim=1,
    )
    right_ni = torch.cat([start.A_ri, *(factors.A_ri for factors in trained)], dim=0)
    average_ri = start.A_ri.clone()
    for movement, coefficient in zip(movements, coefficients, strict=True):
        average_ri += movement.A_ri * coefficient
    return recompress(left_on, right_ni, near_ri=average_ri)


def recompress(left_on: torch.Tensor, right_ni: torch.Tensor, *, near_ri: torch.Tensor) -> Recompressed:
    """The best factors of rank r of ``left @ right``, with A as near as can be to ``near_ri``.

    Cost O((o + i) n²) and O((o + i) n) memory.

    Args:
        left_on: float64 [o, n].
        right_ni: float64 [n, i].
        near_ri: float64 [r, i]: sets the rank, the basis and the scale.
    """
    left_basis, left_core = torch.linalg.qr(left_on)
    right_basis, right_core = torch.linalg.qr(right_ni.T)
    U, S, Vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    squares = S.square()
    k = min(near_ri.shape[0], int((_RANK_TOLERANCE * S[0] < S).sum()))
    scaled_ok = left_basis @ (U[:, :k] * S[:k])
    factors = _choose_basis(scaled_ok, right_basis @ Vh[:k].T, near_ri)
    return Recompressed(factors, float(squares[k:].sum()), float(squares.sum()))


def _choose_basis(scaled_ok: torch.Tensor, rows_ik: torch.Tensor, near_ri: torch.Tensor) -> Factors:
    """Factors of ``scaled @ rows.T`` whose A is ``near`` projected onto a row space that holds ``rows``."""
    space_iq = _complete(rows_ik, near_ri)
    P_rq, overlap_q, Nh_qq = torch.linalg.svd(near_ri @ space_iq, full_matrices=False)
    largest = float(overlap_q.max())
    scale_q = overlap_q.clamp(min=_OVERLAP_MIN * largest) if largest > 0 else torch.ones_like(overlap_q)
    coordinates_kq = rows_ik.T @ space_iq
    B_or = (scaled_ok @ coordinates_kq @ (Nh_qq.T / scale_q)) @ P_rq.T
    A_ri = ((P_rq * scale_q) @ Nh_qq) @ space_iq.T
    return Factors(B_or, A_ri)


def _complete(rows_ik: torch.Tensor, near_ri: torch.Tensor) -> torch.Tensor:
    """Orthonormal [i, q] that holds ``rows`` and, in what is left, the main directions of ``near``."""
    q, k = min(near_ri.shape), rows_ik.shape[1]
    if k == q:
        return rows_ik
    rest_ri = near_ri - (near_ri @ rows_ik) @ rows_ik.T
    directions_iq = torch.linalg.svd(rest_ri.T, full_matrices=False)[0]
    basis_iq: torch.Tensor = torch.linalg.qr(torch.cat([rows_ik, directions_iq[:, : q - k]], dim=1))[0]
    return basis_iq
