"""Rules that have to see a tensor whole: a matrix by its singular vectors, or all magnitudes of an update.

What they read is one tensor of one update at a time, float64, clipped. Of LoRA it is ΔW = B A of a layer in an
orthonormal basis of all that the updates can reach: m ≤ (W + 1) r rows instead of o. All rules of matrices turn
with the rows, f(Q D) = Q f(D), so that what they make of the few rows is what they would make of ΔW, which is
never formed.

A basis of singular vectors is unique but for signs, and where singular values are equal not even that: results
are the same on machines with the same linear algebra library. Signs never matter here.

Legend: W = updates, N = elements of a tensor, o, i = rows and columns of a matrix, m = rows as they are read,
k = directions that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import torch

from weft.common.errors import EngineFailed
from weft.server.merge.settings import (
    IsoParameters,
    KnotsParameters,
    LeastSquaresParameters,
    PcbParameters,
    RegmeanParameters,
    TsvParameters,
)
from weft.server.merge.tiles import Float64

_RANK_TOLERANCE: Final = 1e-6
"""Singular values below this share of the largest are rounding of float32 movements, not directions."""
_OUTLIERS: Final = 1e-4
"""Share of elements at either end that PCB clamps."""
_RIDGE_MAX: Final = 0.01
"""Up to which a ridge is raised where rounding has left a sum of Grams without a Cholesky factor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """One tensor of every update, or the change of ΔW of one LoRA layer."""

    weights: Float64
    """Sum to 1, float64 [W]."""
    shape: tuple[int, ...]
    """Of the tensor, or of ΔW: [o, i]."""
    read: Callable[[int], torch.Tensor]
    """The clipped movement of an update by its place: float64, of that shape, or [m, i]."""
    gram: Callable[[int], torch.Tensor | None]
    """Second moments of the inputs of its layer, float64 [i, i], by the update's place; None: it has none."""
    rank_max: int | None = None
    """Rank that the result is cut to afterwards; None: it is kept as it is."""

    @property
    def count(self) -> int:
        """W."""
        return len(self.weights)

    def rows(self) -> Iterator[tuple[float, torch.Tensor]]:
        """(weight, movement) of one update after the other."""
        return ((weight, self.read(place)) for place, weight in enumerate(self.weights.tolist()))

    def weighted_sum(self) -> torch.Tensor:
        """Σ weight · movement, in the order of updates."""
        total = torch.zeros_like(self.read(0))
        for weight, movement in self.rows():
            total += weight * movement
        return total


WholeRule: TypeAlias = Callable[[Whole, Any], torch.Tensor]
"""(a tensor of every update, parameters) → the merged movement, of the shape that ``read`` gives."""


# -- by all magnitudes -------------------------------------------------------------------------------------


def pcb(whole: Whole, parameters: PcbParameters) -> torch.Tensor:
    """Balance what parameters compete for, within an update and between them (arXiv 2410.02396, section 4).

    With x a movement whose magnitudes are clamped to all but the outermost 10⁻⁴ on either side: the score of an
    element is exp(W · minmax(|x|)²) · tanh(τ · Σ_j τ_j); the ``density`` best of an update are kept, with weights
    minmax(score) that begin at 0 for the worst of them, and averaged by these. As the authors' code, with three
    differences: it ranks over the whole model and this tensor by tensor, as all rules here; weights multiply
    what an element counts for; and exp(W (… − 1)), which ranks alike, does not overflow.

    Where all magnitudes or all scores of an update are equal they count alike; coordinates that nobody keeps do
    not move. Not homogeneous: tanh bends where movements are of the order of 1. A single update loses all but
    its ``density`` as well.
    """
    total_N = whole.weighted_sum().reshape(-1) * whole.count
    merged_N, counted_N = torch.zeros_like(total_N), torch.zeros_like(total_N)
    for weight, movement in whole.rows():
        tau_N = movement.reshape(-1)
        size_N = tau_N.abs()
        edge = int(len(size_N) * _OUTLIERS)
        size_N = size_N.clamp(*_ranked(size_N, edge, len(size_N) - 1 - edge))
        score_N = torch.exp(whole.count * (_from_0_to_1(size_N).square() - 1)) * torch.tanh(tau_N * total_N)
        (lowest,) = _ranked(score_N, min(len(score_N) - 1, int(len(score_N) * (1 - parameters.density))))
        share_N = torch.where(score_N >= lowest, _from_0_to_1(score_N.clamp(min=lowest)), 0.0) * weight
        merged_N += share_N * size_N * tau_N.sign()
        counted_N += share_N
    merged_N /= torch.where(counted_N > 0, counted_N, 1.0)
    return (merged_N * parameters.scale).reshape(whole.shape)


def _ranked(values_N: torch.Tensor, *places: int) -> list[float]:
    """The values that are at ``places`` in ascending order."""
    # numpy's selection takes a tenth of the time of torch's.
    ordered_N = np.partition(values_N.numpy(), places)
    return [float(ordered_N[place]) for place in places]


def _from_0_to_1(values_N: torch.Tensor) -> torch.Tensor:
    low, high = float(values_N.min()), float(values_N.max())
    return (values_N - low) / (high - low) if high > low else torch.ones_like(values_N)


# -- by singular vectors -----------------------------------------------------------------------------------


def knots(whole: Whole, parameters: KnotsParameters) -> torch.Tensor:
    """TIES on coordinates in a basis that all updates share (KnOTS-TIES, arXiv 2410.19735, section 4).

    [D_1 … D_W] = U Σ [V_1 … V_W]ᵀ; the parts Σ V_iᵀ = Uᵀ D_i are trimmed, elect a sign by their unweighted sum and
    are averaged by weight where they agree; the result is U times that. The authors' code trims over all layers
    at once, this one a layer at a time. With a mean instead of TIES nothing would change: U Σ_i w_i Uᵀ D_i is the
    mean itself.

    All magnitudes as large as the smallest kept one are kept. Where the sum is 0 nothing moves, whatever sign an
    SVD has chosen. One update, or equal ones, come back when nothing is trimmed.
    """
    basis_mk = _shared_basis(whole)
    parts = [_trimmed(basis_mk.T @ movement, parameters.density) for _, movement in whole.rows()]
    mass_ki = torch.zeros_like(parts[0])
    for part_ki in parts:
        mass_ki += part_ki
    chosen_ki, counted_ki = torch.zeros_like(mass_ki), torch.zeros_like(mass_ki)
    for weight, part_ki in zip(whole.weights.tolist(), parts, strict=True):
        agrees_ki = part_ki * mass_ki > 0
        chosen_ki += weight * part_ki * agrees_ki
        counted_ki += weight * agrees_ki
    chosen_ki /= torch.where(counted_ki > 0, counted_ki, 1.0)
    merged_mi: torch.Tensor = basis_mk @ chosen_ki
    return merged_mi * parameters.scale


def _shared_basis(whole: Whole) -> torch.Tensor:
    """U of [D_1 … D_W] = U Σ Vᵀ, [m, k]."""
    m, i = whole.read(0).shape
    if m > whole.count * i:
        beside_mn = torch.cat([movement for _, movement in whole.rows()], dim=1)
        return _main_triples(beside_mn, beside_mn.shape[1])[0]
    # Of a wide matrix the eigenvectors of a Gram matrix, a fraction of the cost: the small ones among them are less
    # exact, and orthonormal all the same, so that nothing of a movement gets lost.
    gram_mm = torch.zeros(m, m, dtype=torch.float64)
    for _, movement in whole.rows():
        gram_mm += movement @ movement.T
    squares_m, vectors_mm = torch.linalg.eigh(gram_mm)
    kept_mk: torch.Tensor = vectors_mm[:, squares_m > squares_m[-1].clamp(min=0) * _RANK_TOLERANCE**2]
    return kept_mk


def _trimmed(part_ki: torch.Tensor, density: float) -> torch.Tensor:
    """The authors' trim: everything as large as the (⌊N density⌋ + 1)-st magnitude."""
    place = part_ki.numel() - int(part_ki.numel() * density)
    if place == 0:
        return part_ki
    (lowest,) = _ranked(part_ki.abs().reshape(-1), place - 1)
    return torch.where(part_ki.abs() >= lowest, part_ki, 0.0)


def tsv(whole: Whole, parameters: TsvParameters) -> torch.Tensor:
    """Task singular vectors, whitened so that tasks do not interfere (TSV-M, arXiv 2412.00081, section 4).

    Of each update the main ⌊min(o, i) / W⌋ singular triples, at least one, with values × W · weight; their left
    and right vectors, side by side, are replaced by the nearest orthonormal ones (polar factor, from an SVD). Of
    equal updates the vectors coincide, and what there is is shared among them: the polar factor leaves out
    directions that are rounding, which the authors' code would blow up to length 1.

    One update comes back; W equal ones come back cut to the main 1 / W of their singular values.
    """
    kept = max(1, min(whole.shape) // whole.count)
    triples = [_main_triples(movement, kept) for _, movement in whole.rows()]
    values = [
        values_k * (weight * whole.count)
        for weight, (_, values_k, _) in zip(whole.weights.tolist(), triples, strict=True)
    ]
    left_mn = _polar(torch.cat([left_mk for left_mk, _, _ in triples], dim=1))
    right_in = _polar(torch.cat([right_ki.T for _, _, right_ki in triples], dim=1))
    return parameters.scale * ((left_mn * torch.cat(values)) @ right_in.T)


def _main_triples(matrix_mi: torch.Tensor, count_max: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [m, k], S [k] and Vᵀ [k, i] of at most so many singular values that are not rounding."""
    U, S, Vh = torch.linalg.svd(matrix_mi, full_matrices=False)
    k = min(count_max, int((_RANK_TOLERANCE * S[0] < S).sum()))
    return U[:, :k], S[:k], Vh[:k]


def _polar(vectors_mn: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal columns, or rows, [m, n]; of lower rank where they depend on each other."""
    if not vectors_mn.shape[1]:
        return vectors_mn
    U, _, Vh = _main_triples(vectors_mn, min(vectors_mn.shape))
    polar_mn: torch.Tensor = U @ Vh
    return polar_mn


def iso(whole: Whole, parameters: IsoParameters) -> torch.Tensor:
    """The sum with all its singular values made equal to their mean (Iso-C, arXiv 2502.04959, section 4.1).

    σ̄ U Vᵀ of Σ_i τ_i = U Σ Vᵀ, weights multiplying τ_i by W · weight. The mean is over singular values that are
    not rounding, the paper's min(o, i) of a sum of full rank; of a LoRA layer it is over those that the layer's
    rank can hold, since of equal ones none comes first.

    A single update does not come back: its spectrum is made flat too.
    """
    total = whole.weighted_sum() * whole.count
    U, S, Vh = _main_triples(total, min(total.shape) if whole.rank_max is None else whole.rank_max)
    mean = float(S.mean()) if len(S) else 0.0
    return parameters.scale * mean * (U @ Vh)


# -- by second moments of inputs ---------------------------------------------------------------------------


def regmean(whole: Whole, parameters: RegmeanParameters) -> torch.Tensor:
    """Regression mean: what gives each update's outputs on its own inputs best (arXiv 2212.09849, section 4).

    ``least_squares`` with every off-diagonal element of a Gram matrix multiplied by ``off_diagonal`` (the paper's
    α), and a ridge where the authors' code inverts the sum as it is.
    """
    return _least_squares(whole, off_diagonal=parameters.off_diagonal, ridge=parameters.ridge)


def least_squares(whole: Whole, parameters: LeastSquaresParameters) -> torch.Tensor:
    """Minimise Σ_i w_i ‖(D − D_i) X_i‖² + ‖(D − D̄) Λ^½‖²: D = (Σ w_i D_i G_i + D̄ Λ) (Σ w_i G_i + Λ)⁻¹, G_i = X_i X_iᵀ.

    D̄ is the weighted mean and Λ = ``ridge`` × the diagonal of Σ w_i G_i: combinations of inputs that nobody has
    seen leave the mean there, and so does an input that was 0 for everyone. By Cholesky, on the scale of
    correlations; where rounding has left no factor the ridge is raised tenfold. Mix-of-Show's gradient fusion
    (arXiv 2305.18292, section 3.3) goes the same way by iteration. Tensors without Grams are averaged. One
    update, and equal ones, come back.
    """
    return _least_squares(whole, off_diagonal=1.0, ridge=parameters.ridge)


def _least_squares(whole: Whole, *, off_diagonal: float, ridge: float) -> torch.Tensor:
    grams = [whole.gram(place) for place in range(whole.count)]
    if all(gram is None for gram in grams):
        return whole.weighted_sum()
    size = whole.shape[1]
    sum_ii, right_mi = torch.zeros(size, size, dtype=torch.float64), torch.zeros_like(whole.read(0))
    for gram_ii, (weight, movement) in zip(grams, whole.rows(), strict=True):
        if gram_ii is None:
            raise EngineFailed("some inputs have a Gram for a tensor and others have none")
        scaled_ii = gram_ii * (off_diagonal * weight)
        scaled_ii.diagonal().copy_(gram_ii.diagonal() * weight)
        sum_ii += scaled_ii
        right_mi += movement @ scaled_ii
    return _solve(sum_ii, right_mi, whole.weighted_sum(), ridge=ridge)


def _solve(
    sum_ii: torch.Tensor, right_mi: torch.Tensor, mean_mi: torch.Tensor, *, ridge: float
) -> torch.Tensor:
    """(right + mean Λ) (sum + Λ)⁻¹ with Λ = ridge · diagonal of the sum, 1 where that is 0."""
    squares_i = sum_ii.diagonal()
    lengths_i = torch.where(squares_i > 0, squares_i.abs().sqrt(), 1.0)
    correlations_ii = sum_ii / torch.outer(lengths_i, lengths_i)
    identity_ii = torch.eye(len(sum_ii), dtype=torch.float64)
    while True:
        factor_ii, failed = torch.linalg.cholesky_ex(correlations_ii + ridge * identity_ii)
        if not failed:
            pulled_mi = right_mi / lengths_i + ridge * (mean_mi * lengths_i)
            solved: torch.Tensor = torch.cholesky_solve(pulled_mi.T, factor_ii).T / lengths_i
            return solved
        ridge *= 10
        if ridge > _RIDGE_MAX:
            raise EngineFailed("a Gram is far from positive semi-definite", hint="compute the Grams again")
