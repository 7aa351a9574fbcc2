"""The learning rate as a function of a module's history, so that tasks of many workers follow one schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from weft.common.recipe import InnerSettings, Schedule

_DECAY: Final[Mapping[Schedule, Callable[[float], float]]] = {
    Schedule.CONSTANT: lambda progress: 1.0,
    Schedule.COSINE: lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    Schedule.LINEAR: lambda progress: 1 - progress,
}


def learning_rate(inner: InnerSettings, *, num_rounds: int, step: int) -> float:
    """The rate for ``step``, counted from 0 at the module's first, of inner.steps × num_rounds in all.

    Warm-up is linear and reaches the peak with its last step; cosine and linear then fall to zero at the end.
    """
    if step < inner.warmup_steps:
        return inner.learning_rate * (step + 1) / inner.warmup_steps
    num_decay_steps = max(1, inner.steps * num_rounds - inner.warmup_steps)
    progress = min(1.0, (step - inner.warmup_steps) / num_decay_steps)
    return inner.learning_rate * _DECAY[inner.schedule](progress)
