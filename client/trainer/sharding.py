"""A frozen base divided among the processes of a worker, for one that does not fit into a GPU.

Each process holds 1/N of every weight (torch's FSDP2: ``fully_shard`` on each transformer block, then on the rest).
Going through the model, forward and back, a process gathers a block from all others, uses it and lets it go. LoRA
factors and a classifier's head stay whole and plain in every process: FSDP does not know them, and their gradients meet
as those over a whole base do (``weft.client.trainer.parallel``).

Gathering is a collective in the middle of a pass, so that all processes must make the same passes at the same time:

* shares of a batch have equally many pieces, if need be one of no weight;
* what rank 0 computes alone (evaluation, features for routers) the others accompany with a pass over one token;
* a process that fails within a pass leaves the others waiting in it. Nothing can be agreed upon then: followers are
  killed, and at the next use started again, each to take its share from the base's files, which the kernel has in
  memory still. Short memory is one such failure, and costs a restart for each halving of the batch's pieces; a
  follower says so by its exit code. What is trained lives in rank 0, is small, and is not touched.

On gloo a dead process's connections end at once, and so do the waits of the others. Nothing of this has been run on
CUDA. NCCL is known to notice nothing before SILENCE_MAX, and to end rank 0 then too: where a batch's pieces turn out
too large in a follower, half an hour is lost, and the worker has to be started again with a smaller batch in the
recipe.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed
from accelerate.utils import release_memory
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from weft.client.trainer.group import MEMORY_CODE, Group, GroupBroken
from weft.client.trainer.parallel import Request, Shared, clear, name_of
from weft.common.anatomy import Anatomy
from weft.common.composition import (
    Composed,
    Float32Array,
    Int64Array,
    Quantisation,
    ResidentBase,
    load_model,
    memory_errors,
)
from weft.common.errors import ComputeError, OutOfMemory, UsageError
from weft.common.modules import Kind
from weft.common.recipe import Recipe, TaskSettings
from weft.common.sequences import Batch
from weft.common.settings import to_table

logger = logging.getLogger(__name__)

_CPU: Final = torch.device("cpu")


class ShardedBase(ResidentBase):
    """A resident base for LoRA modules, of which each process of a group holds its share.

    In rank 0 it is used like any other, without named slots; gradients go through ``InStep``.

    Args:
        group: Among whom it is divided; rank 0's followers load their shares meanwhile.
        base_dir: A directory that ``check_base`` has passed.
        task: Which head the model has.
        dtype: Of the frozen weights.

    Raises:
        BaseModelError: As ``load_model``.
        OutOfMemory, ComputeError: A process could not load its share.
    """

    def __init__(self, group: Group, base_dir: Path, task: TaskSettings, *, dtype: torch.dtype) -> None:
        self.group = group
        self.num_held: tuple[int, ...] = ()
        """Parameters of the base that each process holds."""
        self._number = 0
        """Number of the group that it is divided among."""
        self._in_step = False
        self._composed_of: tuple[Recipe, Mapping[str, nn.Parameter], int] | None = None
        self.named: dict[str, Any] = {
            "directory": str(base_dir),
            "dtype": name_of(dtype),
            "task": to_table(task),
            "sharded": True,
        }
        """How followers are told which base is meant."""
        self._revive()
        model, tokenizer = self._load(base_dir, task, dtype)
        super().__init__(
            model,
            tokenizer,
            base_dir=base_dir,
            task=task,
            kind=Kind.LORA,
            device=group.device,
            dtype=dtype,
        )

    def compose(
        self, recipe: Recipe, tensors: Mapping[str, Float32Array], *, slot: str = "", rank: int = 0
    ) -> Composed:
        """As in ``ResidentBase``, in the unnamed slot."""
        if slot:
            raise ValueError("a sharded base has no named slots")
        self._make_ready()
        composed = super().compose(recipe, tensors, rank=rank)
        self._composed_of = recipe, composed.parameters, rank
        return composed

    def forward(self, **inputs: Any) -> Any:
        """As in ``ResidentBase``; without gradients the others come along."""
        if self._in_step:
            return super().forward(**inputs)
        if torch.is_grad_enabled():
            raise ValueError("gradients over a sharded base are computed by InStep")
        # What is gathered in inference mode could not be used in training later.
        with self._accompanied("forward"), torch.inference_mode(mode=False), torch.no_grad():
            return super().forward(**inputs)

    def features(self, tokens: Int64Array, lengths: Int64Array) -> Float32Array:
        """As in ``ResidentBase``; the others come along."""
        with self._accompanied("features"):
            # The base model's blocks gather themselves, what is outside of them only when the whole is called.
            self.model.unshard()
            features = super().features(tokens, lengths)
            self.model.reshard()
        return features

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """Do something that all processes do; what is not finished ends the followers, who wait within it.

        Raises:
            OutOfMemory: In any of the processes.
            ComputeError: A process is gone.
        """
        self._make_ready()
        with self._watched():
            self._in_step = True
            try:
                yield
            finally:
                self._in_step = False

    @contextlib.contextmanager
    def _accompanied(self, order: str) -> Iterator[None]:
        with self.in_step(), memory_errors("computing"):
            self.group.order({"do": order, "base": self.named})
            yield

    def _revive(self) -> None:
        if not self.group.rank and not self.group.is_whole:
            logger.info("starting the processes beside this one again")
            self.group.restart()

    def _make_ready(self) -> None:
        """Divide the base among the group as it is now; what is composed stays, in the same parameters."""
        self._revive()
        if self._number == self.group.number:
            return
        for part in ("model", "anatomy", "_modules"):
            # Away with the old one first, so that there are never two.
            vars(self).pop(part, None)
        release_memory()
        model, _ = self._load(self.base_dir, self.task, self.dtype)
        self._take(model)
        if self._composed_of is not None:
            recipe, parameters, rank = self._composed_of
            self._adopt(recipe, parameters, rank)

    def _load(self, base_dir: Path, task: TaskSettings, dtype: torch.dtype) -> tuple[Any, Any]:
        group = self.group
        with self._watched(), memory_errors("loading the base"):
            group.order({"do": "load", "base": self.named})
            model, tokenizer = load_model(base_dir, task, device=_CPU, dtype=dtype)
            num_parameters = sum(parameter.numel() for parameter in model.parameters())
            shard(model, group, task)
            # FSDP sets itself up in the first pass, which must be one through the whole model.
            pass_one_token(model, group.device)
            held = torch.zeros(group.size, dtype=torch.int64, device=group.device)
            held[group.rank] = num_held(model)
            group.add_up([held])
        self._number = group.number
        self.num_held = tuple(held.tolist())
        logger.info("of %d parameters the processes hold %s", num_parameters, self.num_held)
        return model, tokenizer

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self.group.rank:
                raise
            is_theirs = isinstance(error, GroupBroken | RuntimeError)
            codes = self.group.exit_codes() if is_theirs else []
            self.group.end(at_once=True)
            if MEMORY_CODE in codes:
                raise OutOfMemory(
                    "a process beside this one ran out of memory", hint="use a smaller inner.sequence_length"
                ) from error
            if codes or isinstance(error, GroupBroken):
                cause = f"ended with exit code {codes[0]}" if codes else "is gone"
                raise ComputeError(
                    f"a process beside this one {cause}, and its share of the base with it",
                    hint="it is started again for the next task; its own words are above",
                ) from error
            raise


def open_sharded(
    group: Group,
    base_dir: Path,
    task: TaskSettings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kind: Kind,
    quantise: Quantisation,
) -> ShardedBase:
    """Like ``ResidentBase.load``, divided among a group.

    Raises:
        UsageError: The run trains the base itself.
        BaseModelError, OutOfMemory, ComputeError: As ``ShardedBase``.
    """
    assert device.type == group.device.type  # noqa: S101 - the group was started for it
    assert quantise == "none"  # noqa: S101 - refused with the settings
    if kind is Kind.FULL:
        raise UsageError(
            "--shard-base divides a frozen base, and this run trains the base's own blocks (full modules)",
            hint='weft join --no-shard-base, or use a run with topology.kind = "lora"',
        )
    return ShardedBase(group, base_dir, task, dtype=dtype)


def shard(model: Any, group: Group, task: TaskSettings) -> None:
    """Keep this process's share of a model on the group's device, taken block by block from where it is."""
    anatomy = Anatomy.of(model)
    mesh = DeviceMesh.from_group(_world(), group.device.type)
    for blocks in anatomy.block_lists:
        for block in model.get_submodule(blocks):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    heads = anatomy.heads if task.num_labels else ()
    whole = {parameter for head in heads for parameter in model.get_submodule(head).parameters()}
    fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for head in heads:
        model.get_submodule(head).to(group.device)


def pass_one_token(forward: Callable[..., object], device: torch.device) -> None:
    """Go through a model for the sake of the others alone."""
    tokens = torch.zeros((1, 1), dtype=torch.int64, device=device)
    with torch.no_grad():
        forward(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)


def num_held(model: nn.Module) -> int:
    """Parameters in this process's memory."""
    return sum(
        (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
        for parameter in model.parameters()
    )


def in_step(composed: Composed) -> AbstractContextManager[None]:
    """The context of a pass that all make; nothing, where each has the whole base."""
    resident = composed.resident
    return resident.in_step() if isinstance(resident, ShardedBase) else contextlib.nullcontext()


def _world() -> torch.distributed.ProcessGroup:
    world = torch.distributed.group.WORLD
    assert world is not None  # noqa: S101 - the group has met
    return world


class InStep(Shared):
    """``Gradients`` of rank 0 over sharded bases."""

    def compute(
        self, composed: Composed, parameters: Sequence[nn.Parameter], batch: Batch, *, micro_batch_size: int
    ) -> Tensor:
        """As ``Gradients.compute``; the base is divided anew first, where an earlier batch did not come to its end."""
        request = Request(
            batch=batch, num_labels=batch.num_labels, micro_batch_size=micro_batch_size, in_step=True
        )
        with resident_of(composed).in_step():
            return self._share(composed, parameters, request)

    def of_sum(
        self, composed: Composed, parameters: Sequence[nn.Parameter], batch: Batch
    ) -> tuple[Tensor, ...]:
        """As ``Gradients.of_sum``."""
        clear(parameters)
        request = Request(batch=batch, num_labels=1, micro_batch_size=1, in_step=True)
        with resident_of(composed).in_step():
            self._share(composed, parameters, request)
        gradients = tuple(parameter.grad for parameter in parameters if parameter.grad is not None)
        clear(parameters)
        return gradients

    def _base_of(self, composed: Composed) -> dict[str, Any]:
        return resident_of(composed).named


def resident_of(composed: Composed) -> ShardedBase:
    """The sharded base beneath a path."""
    assert isinstance(composed.resident, ShardedBase)  # noqa: S101 - Setup pairs them
    return composed.resident
