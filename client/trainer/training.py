"""The inner training of a task: a fixed number of AdamW steps on the modules it trains, the rest frozen.

On a GPU a loss is read only every few steps, since reading one makes the host wait for the device; that is the
one difference from a loop that logs every loss. A loss that is not finite ends the task and returns nothing.

A batch that does not fit into memory is halved until it does (``weft.client.trainer.gradients``), in the step in
which that shows, before the step has changed anything. The idea is that of accelerate's
``find_executable_batch_size``, which starts the whole function again at each try and collects garbage at each call.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from accelerate.utils import release_memory
from torch import Tensor, nn

from weft.client.data import TokenDataset
from weft.client.trainer.checkpoint import InnerCheckpoint, InnerState
from weft.client.trainer.gradients import ALONE, Gradients
from weft.client.trainer.optimiser import ModuleOptimiser, OptimiserState
from weft.client.trainer.schedule import learning_rate
from weft.common.composition import Composed, ResidentBase, memory_errors, to_numpy
from weft.common.errors import NonFiniteLoss, OutOfMemory
from weft.common.ids import ModuleKey
from weft.common.recipe import Recipe
from weft.common.sequences import Batch

logger = logging.getLogger(__name__)

Float32Array = npt.NDArray[np.float32]
Tensors = dict[str, Float32Array]
READ_STEPS: Final = 10
"""Losses are read from a GPU when this many steps wait."""
READ_S: Final = 1.0
"""They are also read after this long, since reporting them is what keeps the lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One step that was done."""

    step: int
    """Counted from 1 within the task."""
    loss: float
    """Mean nats per label of the step's batch, before the step."""
    num_tokens: int
    """Tokens of the batch."""


OnStep = Callable[[StepReport], bool]
"""Called for each step in order, on a GPU several at a time; returning True stops the task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What a task came to."""

    deltas: dict[ModuleKey, Tensors]
    """Trained − start of each trained module, float32 by tensor name."""
    optimiser_states: dict[ModuleKey, Tensors]
    """AdamW's state of each trained module, for its next task."""
    losses: tuple[float, ...]
    """Of each step."""
    num_steps: int
    """Steps done, those before a resumption among them; fewer than asked for when stopped."""
    num_tokens: int
    """Tokens trained on."""
    num_examples: int
    """Sequences trained on."""


class Trainer:
    """Trains a run's modules on one worker's data.

    Args:
        resident: The base; tasks of other runs may use it in between.
        recipe: Of the run.
        data: The worker's.
        clock: Monotonic seconds.
        gradients: Who computes them; processes beside this one share each batch.
    """

    def __init__(
        self,
        resident: ResidentBase,
        recipe: Recipe,
        data: TokenDataset,
        *,
        clock: Callable[[], float],
        gradients: Gradients = ALONE,
    ) -> None:
        self.resident = resident
        self.recipe = recipe
        self.data = data
        self.clock = clock
        self._gradients = gradients
        self._micro_batch_size = -(-recipe.inner.batch_size // gradients.num_processes)

    @property
    def micro_batch_size(self) -> int:
        """Sequences that go through the model at once: a process's whole share of a batch, or what was found to fit."""
        return self._micro_batch_size

    def train(
        self,
        start: Mapping[str, Float32Array],
        steps_before: Mapping[ModuleKey, int],
        *,
        num_steps: int,
        first_batch: int,
        optimiser_states: Mapping[ModuleKey, OptimiserState],
        on_step: OnStep,
        rank: int = 0,
        carried: Mapping[str, Float32Array] | None = None,
        checkpoint: InnerCheckpoint | None = None,
    ) -> TrainResult:
        """Train the modules of one task.

        Args:
            start: Tensors of all modules of the task's path, float32 by name.
            steps_before: The modules to train, each with the steps in its history (for the schedule).
            num_steps: Optimiser steps.
            first_batch: Batches of this run that the worker has trained on before.
            optimiser_states: Of modules that this worker trained before, on this path.
            on_step: Told of every step done here; stops the task by returning True.
            rank: Of the LoRA slices in ``start``; 0 for the modules' own.
            carried: Tensors from which training begins instead of their ``start``; deltas are still taken against
                ``start`` (the outer gradient of a streaming fragment, arXiv 2501.18512, Algorithm 2).
            checkpoint: Where to save now and then, and upon a stop; what it holds of this task is taken up first.

        Raises:
            NonFiniteLoss: Training diverged.
            OutOfMemory: The device is too small for a single sequence.
        """
        with memory_errors("training"):
            composed = self.resident.compose(self.recipe, {**start, **(carried or {})}, rank=rank)
            modules = composed.trainable(steps_before)
            work = _Work(composed, modules, ModuleOptimiser(modules, self.recipe.inner))
            progress = _Progress(on_step, self.clock, reads_at_once=self.resident.device.type != "cpu")
            if checkpoint is None or not work.resume(checkpoint, progress, num_steps=num_steps):
                work.optimiser.restore(optimiser_states)
            self._gradients.begin(composed, self.recipe, modules, rank=rank)
            for index in range(len(progress.losses), num_steps):
                rates = self._rates(steps_before, index)
                if progress.record(*self._step(work, first_batch + index, rates)):
                    break
                if checkpoint is not None and checkpoint.due():
                    if progress.read():
                        break
                    checkpoint.save(work.state(progress))
            progress.read()
            if checkpoint is not None and len(progress.losses) < num_steps:
                checkpoint.save(work.state(progress))
            return self._result(start, work, progress)

    def fisher_diagonal(
        self,
        tensors: Mapping[str, Float32Array],
        keys: frozenset[ModuleKey],
        *,
        num_examples: int,
        first_example: int = 0,
        rank: int = 0,
    ) -> dict[ModuleKey, Tensors]:
        """The empirical diagonal Fisher at ``tensors``: mean over sequences of (∂ log p(sequence) / ∂θ)².

        One sequence at a time, since squares of a batch's summed gradient are another quantity (Matena and
        Raffel, arXiv 2111.09832, section 3). Values are finite and at least zero, shapes those of the tensors, which
        are slices of ``rank`` unless it is 0.

        Raises:
            NonFiniteLoss: A gradient is not finite.
            OutOfMemory: The device is too small.
        """
        num_examples = min(num_examples, len(self.data))
        with memory_errors("computing the Fisher diagonal"):
            composed = self.resident.compose(self.recipe, tensors, rank=rank)
            modules = composed.trainable(keys)
            parameters = [parameter for module in modules.values() for parameter in module.values()]
            sums = [torch.zeros_like(parameter) for parameter in parameters]
            self._gradients.begin(composed, self.recipe, modules, rank=rank)
            for position in range(first_example, first_example + num_examples):
                gradients = self._gradients.of_sum(composed, parameters, self.data.example(position))
                torch._foreach_addcmul_(sums, gradients, gradients)
            means = iter([to_numpy(total / num_examples) for total in sums])
        return {key: _finite({name: next(means) for name in module}) for key, module in modules.items()}

    def _step(self, work: _Work, position: int, rates: Mapping[ModuleKey, float]) -> tuple[Tensor, int]:
        batch = self.data.batch(position)
        loss = self._whole_gradient(work, batch)
        work.optimiser.step(rates)
        return loss, int(batch.lengths.sum())

    def _whole_gradient(self, work: _Work, batch: Batch) -> Tensor:
        """Leave the gradient of the batch's mean loss in the parameters, in smaller pieces where it must be."""
        while True:
            try:
                return self._gradients.compute(
                    work.composed, work.parameters, batch, micro_batch_size=self._micro_batch_size
                )
            except OutOfMemory:
                if self._micro_batch_size == 1:
                    raise
            # Only now is the exception gone, and with it the frames that hold what was computed so far.
            self._halve(work.parameters)

    def _halve(self, parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            parameter.grad = None
        release_memory()
        self._micro_batch_size = (self._micro_batch_size + 1) // 2
        logger.info(
            "memory is short: each step goes through the model %d sequences at a time", self._micro_batch_size
        )

    def _rates(self, steps_before: Mapping[ModuleKey, int], index: int) -> dict[ModuleKey, float]:
        inner, num_rounds = self.recipe.inner, self.recipe.num_rounds
        return {
            key: learning_rate(inner, num_rounds=num_rounds, step=before + index)
            for key, before in steps_before.items()
        }

    def _result(self, start: Mapping[str, Float32Array], work: _Work, progress: _Progress) -> TrainResult:
        return TrainResult(
            deltas={
                key: _finite({name: to_numpy(tensor) - start[name] for name, tensor in module.items()})
                for key, module in work.modules.items()
            },
            optimiser_states=work.optimiser.state(),
            losses=tuple(progress.losses),
            num_steps=len(progress.losses),
            num_tokens=progress.num_tokens,
            num_examples=len(progress.losses) * self.recipe.inner.batch_size,
        )


@dataclass(frozen=True, slots=True)
class _Work:
    """A task on the device."""

    composed: Composed
    modules: Mapping[ModuleKey, Mapping[str, nn.Parameter]]
    optimiser: ModuleOptimiser

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, in the order of the modules."""
        return [parameter for module in self.modules.values() for parameter in module.values()]

    def state(self, progress: _Progress) -> InnerState:
        """Copies of all that the task needs to go on, once no losses wait to be read."""
        return InnerState(
            parameters={key: _arrays(module) for key, module in self.modules.items()},
            optimiser=self.optimiser.state(),
            losses=tuple(progress.losses),
            num_tokens=progress.num_tokens,
        )

    def resume(self, checkpoint: InnerCheckpoint, progress: _Progress, *, num_steps: int) -> bool:
        """Take up what was saved of this task; say whether there was anything."""
        shapes = {
            key: {name: tuple(parameter.shape) for name, parameter in module.items()}
            for key, module in self.modules.items()
        }
        state = checkpoint.load(shapes)
        if state is None or len(state.losses) > num_steps:
            return False
        with torch.no_grad():
            for key, module in self.modules.items():
                for name, parameter in module.items():
                    parameter.copy_(torch.from_numpy(state.parameters[key][name]))
        self.optimiser.restore(state.optimiser)
        progress.losses.extend(state.losses)
        progress.num_tokens = state.num_tokens
        logger.info("the task goes on after step %d", len(state.losses))
        return True


def _arrays(module: Mapping[str, nn.Parameter]) -> Tensors:
    return {name: to_numpy(parameter) for name, parameter in module.items()}


class _Progress:
    """Losses on their way from the device to whoever follows the task."""

    def __init__(self, on_step: OnStep, clock: Callable[[], float], *, reads_at_once: bool) -> None:
        self.losses: list[float] = []
        self.num_tokens = 0
        self._pending: list[tuple[Tensor, int]] = []
        self._on_step = on_step
        self._clock = clock
        self._read_steps = READ_STEPS if reads_at_once else 1
        self._read_at = clock()

    def record(self, loss: Tensor, num_tokens: int) -> bool:
        """Take note of a step; say whether the task is to stop."""
        self._pending.append((loss, num_tokens))
        due = len(self._pending) >= self._read_steps or self._clock() - self._read_at >= READ_S
        return due and self.read()

    def read(self) -> bool:
        """Read the losses that wait and report them; say whether the task is to stop."""
        if not self._pending:
            return False
        values = torch.stack([loss for loss, _ in self._pending]).tolist()
        counts = [num_tokens for _, num_tokens in self._pending]
        self._pending.clear()
        self._read_at = self._clock()
        # All of them are reported, also when the first says stop: these steps are done.
        answers = [self._report(loss, count) for loss, count in zip(values, counts, strict=True)]
        return any(answers)

    def _report(self, loss: float, num_tokens: int) -> bool:
        if not math.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss is {loss} at step {len(self.losses) + 1}",
                hint="lower inner.learning_rate, or check the data of this worker",
            )
        self.losses.append(loss)
        self.num_tokens += num_tokens
        return self._on_step(StepReport(step=len(self.losses), loss=loss, num_tokens=num_tokens))


def _finite(tensors: Tensors) -> Tensors:
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise NonFiniteLoss(f"{name} is no longer finite", hint="lower inner.learning_rate")
    return tensors
