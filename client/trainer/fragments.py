"""Streaming fragments: a path's modules are synchronised at different times while the worker trains on.

A worker trains all modules of its path and sends one fragment of them at a time. While the fragment's new version is
on its way, training goes on; when it arrives it meets parameters that have moved since, and the two are mixed
(Streaming DiLoCo, arXiv 2501.18512, section 2.3: half and half, with up to five steps in between).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from weft.common.tensors import Float32Array


def mix(
    local: Mapping[str, Float32Array], global_: Mapping[str, Float32Array], alpha: float
) -> dict[str, Float32Array]:
    """``alpha`` · local + (1 − ``alpha``) · global of every tensor, float32; 0 takes the global, 1 the local as it is.

    Raises:
        ValueError: Not the same tensors, or ``alpha`` outside [0, 1].
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, not within 0 and 1")
    if local.keys() != global_.keys():
        raise ValueError("local and global parameters are not of the same tensors")
    weight = np.float32(alpha)
    return {name: weight * array + (1 - weight) * global_[name] for name, array in local.items()}
