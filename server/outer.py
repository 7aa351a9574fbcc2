"""Outer optimisers: the merged movement of a round becomes the step from one version to the next.

A movement is trained − start, so it points downhill: it is minus the outer gradient of DiLoCo (arXiv
2311.08105, algorithm 1). With d the movement, η the learning rate, and every division element by element:

    sgd                 step = η d
    nesterov            m ← μ m + d                      step = η (d + μ m)
    delayed_nesterov    s ← s + d                        step = η d / N
      every N-th round  m ← μ m + s / N,  s ← 0          step = η (d / N + μ m)
    fedadam             m ← μ m + (1 − μ) d
                        v ← β v + (1 − β) d²             step = η m / (√v + τ)
    fedyogi             as fedadam, but v ← v − (1 − β) d² sign(v − d²)

Nesterov is ``torch.optim.SGD(nesterov=True)`` on the gradient −d. Delayed Nesterov (arXiv 2401.09135,
algorithm 3, with its momentum activation c = 0) is for asynchronous rounds of one update or a few: N of them
count as one of Nesterov, whose momentum they would otherwise apply N times. FedAdam and FedYogi are those of
arXiv 2003.00295, algorithm 2: no bias correction, v starts at τ².

Every optimiser works element by element, so that it can run tile by tile. What it keeps between rounds, its
**slots**, are tensors of the module's shapes beside the number of rounds so far: ``outer_schema`` is the
schema of the file that they lie in.
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
from weft.common.modules import Schema, TensorSpec

Float64: TypeAlias = npt.NDArray[np.float64]

STEP: Final = "step"
"""Name of the state's tensor [1] that counts the rounds so far."""
DELAY_MAX: Final = 10_000


class OuterName(enum.StrEnum):
    """The outer optimisers; ``OPTIMISERS`` has a row for each."""

    SGD = "sgd"
    NESTEROV = "nesterov"
    DELAYED_NESTEROV = "delayed_nesterov"
    FEDADAM = "fedadam"
    FEDYOGI = "fedyogi"


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSettings:
    """The ``[outer]`` table of a run file."""

    name: OuterName = OuterName.SGD
    """sgd, nesterov, delayed_nesterov, fedadam or fedyogi."""
    learning_rate: float | None = None
    """η; unset: 1.0 for sgd (the next version is the merged one), 0.7 for both nesterovs, 0.01 for the others."""
    momentum: float | None = None
    """μ of all but sgd; unset: 0.9."""
    delay: int | None = None
    """N of delayed_nesterov: rounds that make one step of the momentum, for example the number of workers."""
    second_momentum: float | None = None
    """β of fedadam and fedyogi; unset: 0.99."""
    adaptivity: float | None = None
    """τ of fedadam and fedyogi: the larger, the more it is like sgd with momentum; unset: 0.001."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate) and 0 < self.rate <= 100):
            raise UsageError(
                f"outer.learning_rate is {self.rate}",
                hint="use a number above 0, at most 100, for example 0.7",
            )
        for key in ("momentum", "delay", "second_momentum", "adaptivity"):
            if getattr(self, key) is not None and key not in OPTIMISERS[self.name].uses:
                users = [f'"{name}"' for name, row in OPTIMISERS.items() if key in row.uses]
                raise UsageError(
                    f'outer.{key} is set and outer.name is "{self.name}"',
                    hint=f"remove outer.{key}, or set outer.name = {' or '.join(users)}",
                )
        for key, value in (("momentum", self.decay), ("second_momentum", self.second_decay)):
            if not 0 <= value < 1:
                raise UsageError(f"outer.{key} is {value}", hint="use 0 to 0.9999, for example 0.9")
        if not 1e-12 <= self.tau <= 1:
            raise UsageError(f"outer.adaptivity is {self.tau}", hint="use 1e-12 to 1, for example 0.001")
        if self.name is OuterName.DELAYED_NESTEROV and not 1 <= (self.delay or 0) <= DELAY_MAX:
            raise UsageError(
                f"outer.delay is {self.delay} and outer.name is {self.name.value!r}",
                hint=f"use 1 to {DELAY_MAX}: as many as there are workers",
            )

    @property
    def rate(self) -> float:
        """The learning rate in force."""
        return OPTIMISERS[self.name].rate if self.learning_rate is None else self.learning_rate

    @property
    def decay(self) -> float:
        """The momentum in force."""
        return OPTIMISERS[self.name].decay if self.momentum is None else self.momentum

    @property
    def second_decay(self) -> float:
        """β in force."""
        return 0.99 if self.second_momentum is None else self.second_momentum

    @property
    def tau(self) -> float:
        """τ in force."""
        return 1e-3 if self.adaptivity is None else self.adaptivity

    @property
    def num_slots(self) -> int:
        """How many times the module's size is kept between rounds."""
        return OPTIMISERS[self.name].num_slots


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
    num_slots: int
    """S: how many times the module's size it keeps between rounds."""
    uses: frozenset[str]
    """Settings that it has beside the learning rate."""
    step: Callable[[Float64, Float64, int, OuterSettings], tuple[Float64, Float64]]
    """(movement [T], slots [S, T], rounds so far, settings) → (step [T], next slots [S, T])."""
    first: Callable[[OuterSettings], tuple[float, ...]]
    """What each slot holds before the first round, everywhere."""


def _sgd(d: Float64, slots: Float64, _rounds: int, settings: OuterSettings) -> tuple[Float64, Float64]:
    return settings.rate * d, slots


def _nesterov(d: Float64, slots: Float64, _rounds: int, settings: OuterSettings) -> tuple[Float64, Float64]:
    m = settings.decay * slots[0] + d
    return settings.rate * (d + settings.decay * m), m[np.newaxis]


def _delayed_nesterov(
    d: Float64, slots: Float64, rounds: int, settings: OuterSettings
) -> tuple[Float64, Float64]:
    every = settings.delay or 1
    m, s = slots[0], slots[1] + d
    if (rounds + 1) % every:
        return settings.rate * (d / every), np.stack([m, s])
    m = settings.decay * m + s / every
    return settings.rate * (d / every + settings.decay * m), np.stack([m, np.zeros_like(s)])


def _adaptive(d: Float64, slots: Float64, v: Float64, settings: OuterSettings) -> tuple[Float64, Float64]:
    m = settings.decay * slots[0] + (1 - settings.decay) * d
    return settings.rate * m / (np.sqrt(v) + settings.tau), np.stack([m, v])


def _fedadam(d: Float64, slots: Float64, _rounds: int, settings: OuterSettings) -> tuple[Float64, Float64]:
    beta = settings.second_decay
    return _adaptive(d, slots, beta * slots[1] + (1 - beta) * np.square(d), settings)


def _fedyogi(d: Float64, slots: Float64, _rounds: int, settings: OuterSettings) -> tuple[Float64, Float64]:
    square = np.square(d)
    moved = (1 - settings.second_decay) * square * np.sign(slots[1] - square)
    # v stays positive in the paper; rounding to float32 between rounds could leave it just below 0.
    return _adaptive(d, slots, np.maximum(slots[1] - moved, 0.0), settings)


def _zeros(settings: OuterSettings) -> tuple[float, ...]:
    return (0.0,) * settings.num_slots


def _zero_and_tau_squared(settings: OuterSettings) -> tuple[float, ...]:
    return 0.0, settings.tau**2


_ADAPTIVE_USES: Final = frozenset({"momentum", "second_momentum", "adaptivity"})

OPTIMISERS: Final[Mapping[OuterName, OuterOptimiser]] = {
    OuterName.SGD: OuterOptimiser(
        title="Plain step; with rate 1 the next version is the merged one",
        paper="https://arxiv.org/abs/1602.05629",
        rate=1.0,
        decay=0.0,
        num_slots=0,
        uses=frozenset(),
        step=_sgd,
        first=_zeros,
    ),
    OuterName.NESTEROV: OuterOptimiser(
        title="Nesterov momentum over rounds, as DiLoCo",
        paper="https://arxiv.org/abs/2311.08105",
        rate=0.7,
        decay=0.9,
        num_slots=1,
        uses=frozenset({"momentum"}),
        step=_nesterov,
        first=_zeros,
    ),
    OuterName.DELAYED_NESTEROV: OuterOptimiser(
        title="Nesterov whose momentum moves every N rounds, for asynchronous rounds",
        paper="https://arxiv.org/abs/2401.09135",
        rate=0.7,
        decay=0.9,
        num_slots=2,
        uses=frozenset({"momentum", "delay"}),
        step=_delayed_nesterov,
        first=_zeros,
    ),
    OuterName.FEDADAM: OuterOptimiser(
        title="Adam over rounds",
        paper="https://arxiv.org/abs/2003.00295",
        rate=0.01,
        decay=0.9,
        num_slots=2,
        uses=_ADAPTIVE_USES,
        step=_fedadam,
        first=_zero_and_tau_squared,
    ),
    OuterName.FEDYOGI: OuterOptimiser(
        title="Yogi over rounds: Adam whose second moment moves by a bounded amount",
        paper="https://arxiv.org/abs/2003.00295",
        rate=0.01,
        decay=0.9,
        num_slots=2,
        uses=_ADAPTIVE_USES,
        step=_fedyogi,
        first=_zero_and_tau_squared,
    ),
}


def outer_step(
    movement: Float64, slots: Float64, settings: OuterSettings, *, rounds: int = 0
) -> tuple[Float64, Float64]:
    """One outer step on a tile.

    Args:
        movement: Merged trained − start, float64 [T].
        slots: What the last round left, float64 [S, T]; ``first_slots`` in the first round.
        settings: The ``[outer]`` table.
        rounds: How many rounds there were before this one.

    Returns:
        What to add to the start version, float64 [T], and the next slots, float64 [S, T].
    """
    return OPTIMISERS[settings.name].step(movement, slots, rounds, settings)


def first_slots(settings: OuterSettings, size: int) -> Float64:
    """The slots of a tile of ``size`` elements before the first round, float64 [S, T]."""
    first = OPTIMISERS[settings.name].first(settings)
    return np.array(first).reshape(-1, 1).repeat(size, axis=1)


def slot_name(slot: int, tensor: str) -> str:
    """Where slot ``slot`` of a tensor lies in the state."""
    return f"slot{slot}/{tensor}"


def outer_schema(schema: Schema, settings: OuterSettings) -> Schema:
    """Schema of the optimiser's state over a module: float32 ``slot<i>/<tensor>`` and ``step`` [1].

    Raises:
        ValueError: The optimiser keeps no state.
    """
    if not settings.num_slots:
        raise ValueError(f"outer optimiser {settings.name} keeps no state")
    return slots_schema(schema, settings.num_slots)


def slots_schema(schema: Schema, num_slots: int) -> Schema:
    """Schema of a state of so many slots over a module, with the number of rounds so far."""
    slots = [
        TensorSpec(slot_name(slot, spec.name), "F32", spec.shape)
        for slot in range(num_slots)
        for spec in schema.tensors
    ]
    return Schema(tuple(sorted([*slots, TensorSpec(STEP, "F32", (1,))])))
