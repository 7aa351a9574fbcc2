"""Several processes that share each batch of one worker, each with the whole base: rank 0's part, and what all do.

The followers hold the same base and keep nothing else: with each batch come the parameters, and the gradient of
their share of it goes back, each loss divided by the labels of the whole batch, so that the sum is the gradient that
one process would have had.

This is data parallelism without DistributedDataParallel, which accelerate's ``prepare`` would put around the model.
DDP sums gradients *during* backward: where one process runs out of memory there, the others wait for it for ever, so
that a batch size could not be found. Here gradients meet only after every process has said that its share fitted.
What is sent is the same: parameters down and gradients up are an all-reduce in two halves. A follower that dies costs
its speed and nothing else: rank 0 goes on alone with the batch at hand. (On CUDA its death is only noticed between
batches; within one, NCCL ends rank 0 too after SILENCE_MAX.) A base that does not fit into each GPU as a whole needs 4
bits, or is divided among them (``weft.client.trainer.sharding``).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from weft.client.data import rows_of
from weft.client.trainer.gradients import ALONE, accumulate, pieces_of
from weft.client.trainer.group import Group, GroupBroken
from weft.common.composition import Composed, Quantisation
from weft.common.errors import OutOfMemory
from weft.common.ids import ModuleKey
from weft.common.recipe import Recipe
from weft.common.sequences import IGNORED, Batch
from weft.common.settings import to_table

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")


class Shared:
    """``Gradients`` of rank 0.

    Args:
        group: Who shares.
        quantise: How rank 0 has loaded the base.
    """

    def __init__(self, group: Group, *, quantise: Quantisation = "none") -> None:
        self._group = group
        self._quantise = quantise
        self._task: dict[str, Any] = {}
        self._told = 0
        """Number of the group that was told of the task."""

    @property
    def num_processes(self) -> int:
        """All of the group."""
        return self._group.size

    def begin(self, composed: Composed, recipe: Recipe, keys: Collection[ModuleKey], *, rank: int) -> None:
        """The followers hear of it with the first batch."""
        self._task = {
            "do": "compose",
            "base": self._base_of(composed),
            "recipe": to_table(recipe),
            "train": [str(key) for key in keys],
            "tensors": [[name, list(parameter.shape)] for name, parameter in composed.parameters.items()],
            "rank": rank,
        }
        self._told = 0

    def compute(
        self, composed: Composed, parameters: Sequence[nn.Parameter], batch: Batch, *, micro_batch_size: int
    ) -> Tensor:
        """As ``Gradients.compute``; alone, once followers are gone."""
        request = Request(batch=batch, num_labels=batch.num_labels, micro_batch_size=micro_batch_size)
        loss = self._together(lambda: self._share(composed, parameters, request))
        if loss is None:
            clear(parameters)
            loss = ALONE.compute(composed, parameters, batch, micro_batch_size=micro_batch_size)
        return loss

    def of_sum(
        self, composed: Composed, parameters: Sequence[nn.Parameter], batch: Batch
    ) -> tuple[Tensor, ...]:
        """As ``Gradients.of_sum``; here, since one sequence cannot be shared."""
        return ALONE.of_sum(composed, parameters, batch)

    def _base_of(self, composed: Composed) -> dict[str, Any]:
        """What followers load."""
        resident = composed.resident
        return {
            "directory": str(resident.base_dir),
            "task": to_table(resident.task),
            "dtype": name_of(resident.dtype),
            "kind": resident.kind.value,
            "quantise": self._quantise,
        }

    def _share(self, composed: Composed, parameters: Sequence[nn.Parameter], request: Request) -> Tensor:
        group = self._group
        if self._told != group.number:
            group.order(self._task)
            group.broadcast([*composed.parameters.values()])
            self._told = group.number
        request.send(group)
        group.broadcast(parameters)
        return share_gradient(group, composed, parameters, request)

    def _together(self, share: Callable[[], _Result]) -> _Result | None:
        """What ``share`` comes to, or None when there is nobody to share with any more."""
        if self._group.broken:
            return None
        try:
            return share()
        except OutOfMemory:
            raise
        except GroupBroken as error:
            self._group.broken = True
            logger.warning("%s; going on alone", error)
            return None
        except BaseException:
            # The others wait for something that will never come: they cannot be used again.
            self._group.broken = True
            raise


def name_of(dtype: torch.dtype) -> str:
    """As followers look it up in torch."""
    return str(dtype).removeprefix("torch.")


# -- every rank --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A batch whose gradient is wanted."""

    batch: Batch
    num_labels: int
    """What losses are divided by: the labels of the whole batch."""
    micro_batch_size: int
    """Sequences that go through the model at once."""
    in_step: bool = False
    """Every process makes as many passes, since they gather the base for each other in each."""

    def send(self, group: Group) -> None:
        """Give it to the followers."""
        batch = self.batch
        group.order(
            {
                "do": "gradient",
                "shape": list(batch.tokens.shape),
                "labels_shape": list(batch.labels.shape),
                "num_labels": self.num_labels,
                "micro_batch_size": self.micro_batch_size,
                "in_step": self.in_step,
            }
        )
        group.send_numbers(np.concatenate([batch.tokens.ravel(), batch.labels.ravel(), batch.lengths]))

    @classmethod
    def receive(cls, group: Group, order: dict[str, Any]) -> Request:
        """What rank 0 sent with an order."""
        shape, labels_shape = order["shape"], order["labels_shape"]
        sizes = [int(np.prod(shape)), int(np.prod(labels_shape)), shape[0]]
        tokens, labels, lengths = np.split(group.receive_numbers(sum(sizes)), np.cumsum(sizes)[:2])
        return cls(
            batch=Batch(tokens=tokens.reshape(shape), labels=labels.reshape(labels_shape), lengths=lengths),
            num_labels=order["num_labels"],
            micro_batch_size=order["micro_batch_size"],
            in_step=order["in_step"],
        )

    def pieces_of(self, group: Group) -> list[Batch]:
        """What a process computes: its equal share of the rows as far as they go, in pieces."""
        num_rows = len(self.batch.lengths)
        start, stop = (num_rows * rank // group.size for rank in (group.rank, group.rank + 1))
        share = rows_of(self.batch, start, stop) if stop > start else None
        pieces = list(pieces_of(share, self.micro_batch_size)) if share else []
        if self.in_step:
            largest = -(-num_rows // group.size)
            num_missing = -(-largest // self.micro_batch_size) - len(pieces)
            pieces += itertools.repeat(_without_weight(self.batch), num_missing)
        return pieces


def _without_weight(batch: Batch) -> Batch:
    """A sequence that goes through the model and counts for nothing: loss and gradients are zero."""
    first = rows_of(batch, 0, 1)
    return Batch(tokens=first.tokens, labels=np.full_like(first.labels, IGNORED), lengths=first.lengths)


def share_gradient(
    group: Group, composed: Composed, parameters: Sequence[nn.Parameter], request: Request
) -> Tensor:
    """Leave the gradient of the whole batch in every process; return its mean loss.

    Raises:
        OutOfMemory: A share did not fit into one of them. All processes raise it, unless they work in step: then
            the one that it happened to has left the others waiting.
    """
    loss, short = torch.zeros((), device=group.device), 0.0
    try:
        loss = accumulate(composed, request.pieces_of(group), num_labels=request.num_labels)
    except OutOfMemory:
        if request.in_step:
            raise
        short = 1.0
    status = torch.stack([torch.tensor(short, device=group.device), loss])
    group.add_up([status])
    if num_short := int(status[0]):
        raise OutOfMemory(
            f"{num_short} of {group.size} processes ran out of memory while training",
            hint="use a smaller inner.sequence_length, or --quantise 4bit on CUDA",
        )
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    group.add_up([parameter.grad for parameter in parameters if parameter.grad is not None])
    return status[1]


def clear(parameters: Sequence[nn.Parameter]) -> None:
    """Forget gradients."""
    for parameter in parameters:
        parameter.grad = None
