"""Outer optimisers: the merged movement of a round becomes the step from one version to the next.

A movement is trained − start, so it points downhill: it is minus the outer gradient of DiLoCo (arXiv
2311.08105, algorithm 1). Nesterov is ``torch.optim.SGD(nesterov=True)`` on the gradient −movement:

    m ← μ m + movement            step = η (movement + μ m)

Every optimiser works element by element, so that it can run tile by tile.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from weft.common.errors import UsageError

Float64: TypeAlias = npt.NDArray[np.float64]


class OuterName(enum.StrEnum):
    """The outer optimisers; ``OPTIMISERS`` has a row for each."""

    SGD = "sgd"
    NESTEROV = "nesterov"


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSettings:
    """The ``[outer]`` table of a run file."""

    name: OuterName = OuterName.SGD
    """sgd or nesterov."""
    learning_rate: float | None = None
    """η; unset: 1.0 for sgd (the next version is the merged one), 0.7 for nesterov."""
    momentum: float | None = None
    """μ of nesterov; unset: 0.9."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and 0 < self.rate <= 100):
            raise UsageError(
                f"outer.learning_rate is {self.rate}",
                hint="use a number above 0, at most 100, for example 0.7",
            )
        if self.name is OuterName.SGD and self.momentum:
            raise UsageError(
                "outer.momentum is set for sgd", hint='set outer.name = "nesterov", or remove outer.momentum'
            )
        if not 0 <= self.decay < 1:
            raise UsageError(f"outer.momentum is {self.decay}", hint="use 0 to 0.9999, for example 0.9")

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        return OPTIMISERS[self.name].rate if self.learning_rate is None else self.learning_rate

    @property
    def decay(self) -> float:
        """The momentum in force."""
        return OPTIMISERS[self.name].decay if self.momentum is None else self.momentum

    @property
    def has_momentum(self) -> bool:
        """Whether a momentum of the module's size is kept between rounds."""
        return OPTIMISERS[self.name].has_momentum


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterOptimiser:
    """One row of ``OPTIMISERS``."""

    title: str
    """For people."""
    paper: str
    """Where it is defined."""
    rate: float
    """Default learning rate."""
    decay: float
    """Default momentum."""
    has_momentum: bool
    """Whether it keeps a momentum of the module's size."""
    step: Callable[[Float64, Float64, OuterSettings], tuple[Float64, Float64]]
    """(movement [T], momentum [T], settings) → (step [T], next momentum [T])."""


def _sgd(movement: Float64, momentum: Float64, settings: OuterSettings) -> tuple[Float64, Float64]:
    return settings.rate * movement, momentum


def _nesterov(movement: Float64, momentum: Float64, settings: OuterSettings) -> tuple[Float64, Float64]:
    following = settings.decay * momentum + movement
    return settings.rate * (movement + settings.decay * following), following


OPTIMISERS: Final[Mapping[OuterName, OuterOptimiser]] = {
    OuterName.SGD: OuterOptimiser(
        title="Plain step; with rate 1 the next version is the merged one",
        paper="https://arxiv.org/abs/1602.05629",
        rate=1.0,
        decay=0.0,
        has_momentum=False,
        step=_sgd,
    ),
    OuterName.NESTEROV: OuterOptimiser(
        title="Nesterov momentum over rounds, as DiLoCo",
        paper="https://arxiv.org/abs/2311.08105",
        rate=0.7,
        decay=0.9,
        has_momentum=True,
        step=_nesterov,
    ),
}


def outer_step(movement: Float64, momentum: Float64, settings: OuterSettings) -> tuple[Float64, Float64]:
    """One outer step on a tile.

    Args:
        movement: Merged trained − start, float64 [T].
        momentum: What the last round left, float64 [T]; zeros in the first round.
        settings: The ``[outer]`` table.

    Returns:
        What to add to the start version and the next momentum, float64 [T] each; sgd leaves the momentum as
        it is.
    """
    return OPTIMISERS[settings.name].step(movement, momentum, settings)
