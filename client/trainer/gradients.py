"""The gradient of a batch's mean loss, computed in pieces that fit into the device's memory.

The batch of a step is the recipe's, whatever the hardware: a device that cannot hold it takes it in pieces (micro-
batches) whose gradients add up. Each piece's loss is divided by the labels of the *whole* batch, so the sum is the
gradient of the whole batch's mean loss also where pieces have different numbers of labels; a mean of the pieces'
means would weigh labels unequally. Only the order of floating-point additions differs from one large batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from weft.client.data import rows_of
from weft.common.composition import Composed, memory_errors
from weft.common.ids import ModuleKey
from weft.common.recipe import Recipe
from weft.common.sequences import Batch


class Gradients(Protocol):
    """Who computes the gradients of a task's batches: this process alone, or it and others beside it."""

    @property
    def num_processes(self) -> int:
        """Processes that share a batch."""

    def begin(self, composed: Composed, recipe: Recipe, keys: Collection[ModuleKey], *, rank: int) -> None:
        """A task begins that trains ``keys`` of the composed path, in their order; ``rank`` as in ``compose``."""

    def compute(
        self, composed: Composed, parameters: Sequence[nn.Parameter], batch: Batch, *, micro_batch_size: int
    ) -> Tensor:
        """Add the gradient of the batch's mean loss to the parameters; return that loss, a float32 scalar.

        Raises:
            OutOfMemory: ``micro_batch_size`` sequences do not fit. Gradients are then incomplete, and nothing
                else has changed.
        """

    def of_sum(
        self, composed: Composed, parameters: Sequence[nn.Parameter], batch: Batch
    ) -> tuple[Tensor, ...]:
        """The gradient of the batch's summed loss by each parameter; whatever ``grad`` held is gone or as it was.

        Raises:
            OutOfMemory: It does not fit.
        """


class Alone:
    """This process computes whole batches itself."""

    num_processes: Final = 1

    def begin(self, composed: Composed, recipe: Recipe, keys: Collection[ModuleKey], *, rank: int) -> None:
        """Nobody needs to be told."""

    def compute(
        self, composed: Composed, parameters: Sequence[nn.Parameter], batch: Batch, *, micro_batch_size: int
    ) -> Tensor:
        """As ``Gradients.compute``."""
        return accumulate(composed, pieces_of(batch, micro_batch_size), num_labels=batch.num_labels)

    def of_sum(
        self, composed: Composed, parameters: Sequence[nn.Parameter], batch: Batch
    ) -> tuple[Tensor, ...]:
        """As ``Gradients.of_sum``."""
        with memory_errors("training"):
            return torch.autograd.grad(composed.losses(batch).sum(), parameters)


ALONE: Final = Alone()


def accumulate(composed: Composed, pieces: Iterable[Batch], *, num_labels: int) -> Tensor:
    """Add the gradients of the pieces' summed loss ÷ ``num_labels``; return that loss.

    Raises:
        OutOfMemory: A piece does not fit; gradients are incomplete.
    """
    total = torch.zeros((), device=composed.resident.device)
    # A batch may hold nothing to learn, where prompts fill it: its loss is zero then.
    divisor = max(1, num_labels)
    with memory_errors("training"):
        for piece in pieces:
            loss = composed.losses(piece).sum() / divisor
            torch.autograd.backward(loss)
            total += loss.detach()
    return total


def pieces_of(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch, ``size`` sequences at a time."""
    num_rows = len(batch.lengths)
    if size >= num_rows:
        return iter((batch,))
    return (rows_of(batch, start, min(start + size, num_rows)) for start in range(0, num_rows, size))
