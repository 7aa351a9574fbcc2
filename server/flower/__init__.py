"""Flower beside Weft: its strategies as merge rules of a run, Weft's merge rules as a strategy of its apps.

``WeftStrategy`` is imported when it is asked for, so that a coordinator that uses none of this imports no flwr.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.server.flower.limits import check_installed

if TYPE_CHECKING:
    from weft.server.flower.strategy import WeftStrategy

__all__ = ["WeftStrategy"]


def __getattr__(name: str) -> object:
    if name != "WeftStrategy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_installed("WeftStrategy")
    from weft.server.flower.strategy import WeftStrategy

    return WeftStrategy
