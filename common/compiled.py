"""Loops that numba compiles when they first run, and keeps on disk: what numpy does in several passes, in one.

A loop sees arrays and numbers, allocates nothing, and trusts its arguments: who calls it has checked every length
and index. Additions stay in their order and are never fused, so that results are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

from numba import njit

P = ParamSpec("P")
R = TypeVar("R")


def compiled(loop: Callable[P, R]) -> Callable[P, R]:
    """Decorate a loop; it runs without the interpreter's lock."""
    try:
        made = njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # neither beside the code nor under the home directory is a place to keep it
        made = njit(nogil=True)(loop)
    return cast("Callable[P, R]", made)
