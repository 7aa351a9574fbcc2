"""Radial-directional averaging: as long as the mean movement, in the direction that the movements agree on.

The mean of P movements at right angles is √P times shorter than they are. DiPaCo (arXiv 2403.10616, section
2.7) makes up for it by √P, whatever the angles are (``sqrt_paths``). RDA (Decoupled DiLoCo) does it exactly,
tensor by tensor: (Σ w_i ‖v_i‖) · u / ‖u‖ with u = Σ w_i v_i / ‖v_i‖. Both are linear in the movements once
the norms are known, so they are factors on the weights.

Legend: W = updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from weft.server.merge.movements import Contributor
from weft.server.merge.tiles import Float64


def tensor_norms(contributors: Sequence[Contributor], name: str) -> Float64:
    """Norm of the clipped movement of a tensor, float64 [W]."""
    return np.array([each.clip * math.sqrt(each.measure.square_sums[name]) for each in contributors])


def layer_norms(contributors: Sequence[Contributor], pair: tuple[str, str]) -> Float64:
    """Norm of the clipped movement of a LoRA layer's B A, float64 [W]."""
    return np.array([each.clip * math.sqrt(each.measure.change_squares[pair]) for each in contributors])


def units(norms_W: Float64) -> Float64:
    """What brings each movement to norm 1; 0 for one that did not move."""
    return np.divide(1.0, norms_W, out=np.zeros_like(norms_W), where=norms_W > 0)


def directional(weights_W: Float64, norms_W: Float64, unit_square_sum: float) -> Float64:
    """The factors on the weights, float64 [W]; zeros where the directions cancel.

    Args:
        weights_W: Sum to 1.
        norms_W: Of the clipped movements.
        unit_square_sum: ‖u‖².
    """
    length = math.fsum((weights_W * norms_W).tolist())
    scale = length / math.sqrt(unit_square_sum) if unit_square_sum > 0 else 0.0
    return units(norms_W) * scale
