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

Legend: o = out_features, i = in_features, r = rank, p = a slice of it, n = stacked rank, q = min(r, i),
k = rank of ΔW ≤ q.
All tensors are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeAlias

import torch

from weft.common.modules import Schema, TensorSpec
from weft.server.merge.tiles import Float32, Tiles, Update

Pair: TypeAlias = tuple[TensorSpec, TensorSpec]
"""Specs of A and B of a LoRA layer."""
_RANK_TOLERANCE: Final = 1e-9
"""Singular values below this share of the largest are rounding of float32 factors, not directions."""
_OVERLAP_MIN: Final = 1e-2
"""The new A's singular values stay above this share of its largest, lest B make up for a vanishing A."""


def pairs_of(schema: Schema) -> list[Pair]:
    """The LoRA layers of a module, or of an update with a rank of its own."""
    specs = {spec.name: spec for spec in schema.tensors}
    return [(specs[a_name], specs[b_name]) for a_name, b_name in schema.lora_pairs]


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
    b_read, a_read = (partial(tiles.tile, spec.name) for spec in (b_spec, a_spec))
    return Factors(read_tensor(b_read, b_spec), read_tensor(a_read, a_spec))


def read_tensor(read: Callable[[int, int], Float32], spec: TensorSpec) -> torch.Tensor:
    """All elements of a tensor in its shape, float64."""
    # torch's own allocation is always aligned alike, and linear algebra libraries round by alignment.
    tensor = torch.empty(spec.shape, dtype=torch.float64)
    tensor.view(-1).numpy()[:] = read(0, spec.size)
    return tensor


def change_square_sums(start: Factors, movements: Iterable[Factors]) -> list[float]:
    """‖(B₀ + dB)(A₀ + dA) − B₀ A₀‖² of the rank slices that each moved, through r × r Gram matrices.

    The change is [dB, B₀] [A₀ + dA; dA]: written this way no large numbers cancel, and no movement gives 0.
    What is of the start alone is computed once.
    """
    B_or, A_ri = start.B_or, start.A_ri
    start_B_rr, start_A_rr = B_or.T @ B_or, A_ri @ A_ri.T
    return [_change_square_sum(start, movement, start_B_rr, start_A_rr) for movement in movements]


def _change_square_sum(
    start: Factors, movement: Factors, start_B_rr: torch.Tensor, start_A_rr: torch.Tensor
) -> float:
    r = movement.A_ri.shape[0]
    moved_B_rr, cross_B_rr = movement.B_or.T @ movement.B_or, movement.B_or.T @ start.B_or[:, :r]
    moved_A_rr, cross_A_rr = movement.A_ri @ movement.A_ri.T, start.A_ri[:r] @ movement.A_ri.T
    trained_A_rr = start_A_rr[:r, :r] + cross_A_rr + cross_A_rr.T + moved_A_rr
    total = (moved_B_rr * trained_A_rr).sum()
    total += 2 * (cross_B_rr * (cross_A_rr + moved_A_rr)).sum()
    total += (start_B_rr[:r, :r] * moved_A_rr).sum()
    return max(0.0, float(total))


def merge_pair(
    start: Factors, movements: Sequence[Factors], coefficients: Sequence[torch.Tensor]
) -> Recompressed:
    """B₀A₀ + Σ_i Σ_p κ_ip (b_ip a_ip − b₀_p a₀_p), recompressed to the rank of the start.

    Args:
        start: The start version's factors.
        movements: Each worker's trained − start, factor by factor, of its own rank r_i ≤ r.
        coefficients: κ_i = outer learning rate · share of the slice · clip factor of each worker, float64 [r_i].
    """
    trained = [_trained(start, movement) for movement in movements]
    left_start_r = torch.ones(start.A_ri.shape[0], dtype=torch.float64)
    average_ri = start.A_ri.clone()
    for movement, coefficient_r in zip(movements, coefficients, strict=True):
        left_start_r[: len(coefficient_r)] -= coefficient_r
        average_ri[: len(coefficient_r)] += movement.A_ri * coefficient_r[:, None]
    scaled = [each.B_or * coefficient_r for each, coefficient_r in zip(trained, coefficients, strict=True)]
    left_on = torch.cat([start.B_or * left_start_r, *scaled], dim=1)
    right_ni = torch.cat([start.A_ri, *(each.A_ri for each in trained)], dim=0)
    return recompress(left_on, right_ni, near_ri=average_ri)


def change_gram(start: Factors, movements: Sequence[Factors]) -> torch.Tensor:
    """⟨D_i, D_j⟩ of D_i = (B₀ + dB_i)(A₀ + dA_i) − B₀A₀, float64 [W, W], without forming any D.

    D_i = [dB_i, B₀] [A₀ + dA_i; dA_i], and ⟨L_i R_i, L_j R_j⟩ = Σ (L_iᵀ L_j) ∘ (R_i R_jᵀ).
    """
    trained = [_trained(start, movement) for movement in movements]
    left_on = torch.cat([torch.cat([each.B_or, start.B_or], dim=1) for each in movements], dim=1)
    right_ni = torch.cat(
        [torch.cat([new.A_ri, moved.A_ri]) for new, moved in zip(trained, movements, strict=True)]
    )
    products = (left_on.T @ left_on) * (right_ni @ right_ni.T)
    count, width = len(movements), 2 * start.A_ri.shape[0]
    return products.reshape(count, width, count, width).sum(dim=(1, 3))


@dataclass(frozen=True, slots=True)
class Changes:
    """D_i = (B₀ + dB_i)(A₀ + dA_i) − B₀A₀ = [dB_i, B₀] [A₀ + dA_i; dA_i] of every update, in a basis they share.

    The basis holds the columns of all dB_i and of B₀, so that no D_i has a part outside: m ≤ min(o, (W + 1) r).
    """

    start: Factors
    movements: Sequence[Factors]
    basis_om: torch.Tensor

    @classmethod
    def of(cls, start: Factors, movements: Sequence[Factors]) -> Changes:
        """The changes of a layer, each movement of its own rank."""
        columns_on = torch.cat([start.B_or, *(each.B_or for each in movements)], dim=1)
        return cls(start, movements, torch.linalg.qr(columns_on)[0])

    @property
    def shape(self) -> tuple[int, int]:
        """[o, i]."""
        return self.start.B_or.shape[0], self.start.A_ri.shape[1]

    def in_basis(self, place: int) -> torch.Tensor:
        """Basisᵀ D_i, [m, i]."""
        moved = self.movements[place]
        trained, rank = _trained(self.start, moved), moved.A_ri.shape[0]
        left_on = torch.cat([moved.B_or, self.start.B_or[:, :rank]], dim=1)
        return (self.basis_om.T @ left_on) @ torch.cat([trained.A_ri, moved.A_ri])

    def apply(self, moved_mi: torch.Tensor, shares: Sequence[float]) -> Recompressed:
        """B₀A₀ + basis · ``moved``, recompressed, with A near to A₀ + Σ share · dA_i."""
        average_ri = self.start.A_ri.clone()
        for each, share in zip(self.movements, shares, strict=True):
            average_ri[: each.A_ri.shape[0]] += each.A_ri * share
        left_on = torch.cat([self.start.B_or, self.basis_om], dim=1)
        return recompress(left_on, torch.cat([self.start.A_ri, moved_mi]), near_ri=average_ri)


def combined_square_sum(
    start: Factors, movements: Sequence[Factors], coefficients: Sequence[torch.Tensor]
) -> float:
    """‖Σ_i Σ_p κ_ip (b_ip a_ip − b₀_p a₀_p)‖², arguments as of ``merge_pair``; no large numbers cancel."""
    moved_ri = torch.zeros_like(start.A_ri)
    for movement, coefficient_r in zip(movements, coefficients, strict=True):
        moved_ri[: len(coefficient_r)] += movement.A_ri * coefficient_r[:, None]
    scaled = [each.B_or * coefficient_r for each, coefficient_r in zip(movements, coefficients, strict=True)]
    left_on = torch.cat([start.B_or, *scaled], dim=1)
    right_ni = torch.cat([moved_ri, *(_trained(start, each).A_ri for each in movements)], dim=0)
    return product_square_sum(left_on, right_ni)


def _trained(start: Factors, movement: Factors) -> Factors:
    rank = movement.A_ri.shape[0]
    return Factors(start.B_or[:, :rank] + movement.B_or, start.A_ri[:rank] + movement.A_ri)


def product_square_sum(left_on: torch.Tensor, right_ni: torch.Tensor) -> float:
    """‖left @ right‖², without forming it."""
    return max(0.0, float(((left_on.T @ left_on) * (right_ni @ right_ni.T)).sum()))


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
