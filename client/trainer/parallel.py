"""Several processes on one machine that share each batch of one worker, a GPU for each.

Rank 0 is the worker: it alone talks to the coordinator and has the data, AdamW, the schedule and the checkpoint. The
others follow. They hold the same base and keep nothing else: with each batch come the parameters, and the gradient of
their share of it goes back, each loss divided by the labels of the whole batch, so that the sum is the gradient that
one process would have had. Orders are JSON lines through a follower's standard input, where waiting may take days
and the end of rank 0 shows at once; arrays go by torch.distributed (NCCL on CUDA, gloo on a CPU) as plain numbers,
never pickled, over the loopback interface.

This is data parallelism without DistributedDataParallel, which accelerate's ``prepare`` would put around the model.
DDP sums gradients *during* backward: where one process runs out of memory there, the others wait for it for ever, so
that a batch size could not be found. Here gradients meet only after every process has said that its share fitted.
``Accelerator`` also takes its place from the environment of processes that a launcher started, and rank 0 here is the
command that a person typed. What is sent is the same: parameters down and gradients up are an all-reduce in two
halves. A follower that dies costs its speed and nothing else: rank 0 goes on alone with the batch at hand. (On CUDA
its death is only noticed between batches; within one, NCCL ends rank 0 too after SILENCE_MAX.) Every process holds
the whole base: one that does not fit into a GPU needs 4 bits.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from accelerate.utils import check_cuda_p2p_ib_support, release_memory
from torch import Tensor, nn

from weft.client.data import rows_of
from weft.client.trainer.gradients import Gradients, accumulate
from weft.common.composition import Composed, Quantisation, ResidentBase
from weft.common.errors import ComputeError, OutOfMemory, UsageError
from weft.common.ids import ModuleKey
from weft.common.recipe import Recipe
from weft.common.sequences import Batch
from weft.common.settings import from_table, to_table

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")
Int64Array = npt.NDArray[np.int64]

SILENCE_MAX: Final = timedelta(minutes=30)
"""How long one process waits for another within a task; the first batch waits for followers to load the base."""
ENDING_S: Final = 10.0
"""What followers get to leave by themselves."""
_BUCKET_BYTES: Final = 64 << 20
"""Tensors are sent this much at a time: few enough messages, and little memory beside the tensors."""
_READY: Final = b"ready\n"
_LOOPBACK: Final = {"linux": "lo", "darwin": "lo0"}


class _GroupBroken(Exception):
    """Another process is gone."""


@dataclass(slots=True, kw_only=True)
class Group:
    """The processes that share a batch, seen from one of them."""

    rank: int
    """0 is the worker."""
    size: int
    """Number of processes."""
    device: torch.device
    """This process's."""
    followers: Sequence[subprocess.Popen[bytes]] = ()
    """The others, where this is rank 0."""
    broken: bool = field(default=False, init=False)
    """A process is gone, and nothing can be shared any more."""

    def gradients(self, base_dir: Path, *, dtype: torch.dtype, quantise: Quantisation) -> Gradients:
        """Gradients for the trainer of a run whose base rank 0 has loaded from ``base_dir`` in this way."""
        name = str(dtype).removeprefix("torch.")
        return _Shared(self, {"base": str(base_dir), "dtype": name, "quantise": quantise})

    def order(self, order: dict[str, Any]) -> None:
        """Say something to all followers."""
        line = json.dumps(order).encode() + b"\n"
        with self._failures():
            for follower in self.followers:
                assert follower.stdin is not None  # noqa: S101 - launched so
                follower.stdin.write(line)
                follower.stdin.flush()

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors, all of one dtype, by those of rank 0."""
        with self._failures():
            _in_buckets(tensors, lambda flat: torch.distributed.broadcast(flat, 0))

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors, all of one dtype, by their sum over all processes."""
        with self._failures():
            _in_buckets(tensors, torch.distributed.all_reduce)

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        for follower in self.followers:
            if follower.poll() is not None:
                raise _GroupBroken(f"a process beside this one ended with exit code {follower.returncode}")
        try:
            yield
        except (RuntimeError, OSError) as error:
            cause = str(error).strip().splitlines()[0][:200]
            raise _GroupBroken(f"a process beside this one is gone: {cause}") from error


def _in_buckets(tensors: Sequence[Tensor], collective: Callable[[Tensor], object]) -> None:
    with torch.no_grad():
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            collective(flat)
            for tensor, part in zip(
                bucket, torch.split(flat, [tensor.numel() for tensor in bucket]), strict=True
            ):
                tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        if bucket and num_bytes + tensor.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(tensor)
        num_bytes += tensor.nbytes
    if bucket:
        yield bucket


# -- rank 0 ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launch(num_processes: int, device: torch.device) -> Iterator[Group]:
    """Start followers beside this process, which becomes rank 0, and end them afterwards.

    Args:
        num_processes: With this one; on CUDA rank r computes on GPU r.
        device: Of the kind that all of them use.

    Raises:
        UsageError: There are not that many GPUs, or this kind of device takes one process.
        ComputeError: A process did not start.
    """
    _check_devices(num_processes, device)
    with tempfile.TemporaryDirectory(prefix="weft-") as private, contextlib.ExitStack() as ending:
        place = [str(num_processes), device.type, f"{private}/rendezvous"]
        followers = [_start(rank, place, num_processes) for rank in range(1, num_processes)]
        ending.callback(_end, followers)
        for follower in followers:
            assert follower.stdout is not None  # noqa: S101 - started so
            if follower.stdout.readline() != _READY:
                raise ComputeError("a process beside this one did not start", hint="leave --processes out")
        group = _enter(0, num_processes, device.type, place[2])
        ending.callback(torch.distributed.destroy_process_group)
        group.followers = followers
        yield group


def _check_devices(num_processes: int, device: torch.device) -> None:
    if num_processes < 1:
        raise UsageError(f"--processes is {num_processes}", hint="use 1 or more, one for each GPU")
    if device.type == "cuda" and num_processes > torch.cuda.device_count():
        raise UsageError(
            f"--processes is {num_processes} and this machine has {torch.cuda.device_count()} GPUs",
            hint=f"use --processes {torch.cuda.device_count()}",
        )
    if device.type not in {"cuda", "cpu"} and num_processes > 1:
        raise UsageError(f"--processes is {num_processes} on {device.type}", hint="leave --processes out")


def _start(rank: int, place: list[str], num_processes: int) -> subprocess.Popen[bytes]:
    threads = str(max(1, torch.get_num_threads() // num_processes))
    return subprocess.Popen(
        [sys.executable, "-m", "weft.client.trainer.parallel", str(rank), *place],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={"OMP_NUM_THREADS": threads, **os.environ},
        # Ctrl-C is for rank 0, which lets a task end first.
        start_new_session=True,
    )


def _end(followers: Sequence[subprocess.Popen[bytes]]) -> None:
    for follower in followers:
        assert follower.stdin is not None  # noqa: S101 - started so
        assert follower.stdout is not None  # noqa: S101
        with contextlib.suppress(OSError):
            follower.stdin.close()
        follower.stdout.close()
    for follower in followers:
        try:
            follower.wait(ENDING_S)
        except subprocess.TimeoutExpired:
            follower.kill()
            follower.wait()


def _enter(rank: int, size: int, device_type: str, rendezvous: str) -> Group:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if loopback := _LOOPBACK.get(sys.platform):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if not check_cuda_p2p_ib_support():
            os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")
    torch.distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=size,
        timeout=SILENCE_MAX,
    )
    return Group(rank=rank, size=size, device=device)


@dataclass(frozen=True, slots=True)
class _Shared:
    """``Gradients`` of rank 0."""

    group: Group
    base: dict[str, Any]

    @property
    def num_processes(self) -> int:
        return self.group.size

    def begin(self, composed: Composed, recipe: Recipe, keys: Collection[ModuleKey], *, rank: int) -> None:
        tensors = [[name, list(parameter.shape)] for name, parameter in composed.parameters.items()]
        order = {
            "recipe": to_table(recipe),
            "train": [str(key) for key in keys],
            "tensors": tensors,
            "rank": rank,
        }

        def share() -> None:
            self.group.order(self.base | order)
            self.group.broadcast([*composed.parameters.values()])

        self._together(share)

    def compute(
        self, composed: Composed, parameters: Sequence[nn.Parameter], batch: Batch, *, micro_batch_size: int
    ) -> Tensor:
        def share() -> Tensor:
            request = _Request(batch=batch, num_labels=batch.num_labels, micro_batch_size=micro_batch_size)
            request.send(self.group)
            self.group.broadcast(parameters)
            return _share_gradient(self.group, composed, parameters, request)

        loss = self._together(share)
        if loss is None:
            _clear(parameters)
            loss = accumulate(composed, batch, num_labels=batch.num_labels, micro_batch_size=micro_batch_size)
        return loss

    def end(self) -> None:
        self._together(lambda: _send_numbers(self.group, [0] * _HEADER_SIZE))

    def _together(self, share: Callable[[], _Result]) -> _Result | None:
        """What ``share`` comes to, or None when there is nobody to share with any more."""
        if self.group.broken:
            return None
        try:
            return share()
        except OutOfMemory:
            raise
        except _GroupBroken as error:
            self.group.broken = True
            logger.warning("%s; going on alone", error)
            return None
        except BaseException:
            # The others wait for something that will never come: they cannot be used again.
            self.group.broken = True
            raise


# -- every rank --------------------------------------------------------------------------------------------------

_HEADER_SIZE: Final = 5
"""Rows, width, width of the labels (0 for one a row), labels that count, sequences at a time; no rows: the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """A batch whose gradient is wanted."""

    batch: Batch
    num_labels: int
    """Of the whole batch."""
    micro_batch_size: int

    def send(self, group: Group) -> None:
        batch = self.batch
        labels_width = batch.labels.shape[1] if batch.labels.ndim == 2 else 0
        _send_numbers(group, [*batch.tokens.shape, labels_width, self.num_labels, self.micro_batch_size])
        _send_numbers(group, np.concatenate([batch.tokens.ravel(), batch.labels.ravel(), batch.lengths]))

    @classmethod
    def receive(cls, group: Group) -> _Request | None:
        """What rank 0 sent, or None at the end of the task."""
        num_rows, width, labels_width, num_labels, micro_batch_size = _receive_numbers(group, _HEADER_SIZE)
        if not num_rows:
            return None
        sizes = [num_rows * width, num_rows * (labels_width or 1), num_rows]
        tokens, labels, lengths = np.split(_receive_numbers(group, sum(sizes)), np.cumsum(sizes)[:2])
        batch = Batch(
            tokens=tokens.reshape(num_rows, width),
            labels=labels.reshape(num_rows, labels_width) if labels_width else labels,
            lengths=lengths,
        )
        return cls(batch=batch, num_labels=int(num_labels), micro_batch_size=int(micro_batch_size))

    def share_of(self, group: Group) -> Batch | None:
        """The rows of a process: equal shares, as far as they go."""
        num_rows = len(self.batch.lengths)
        start, stop = (num_rows * rank // group.size for rank in (group.rank, group.rank + 1))
        return rows_of(self.batch, start, stop) if stop > start else None


def _send_numbers(group: Group, numbers: Sequence[int] | Int64Array) -> None:
    group.broadcast([torch.tensor(numbers, dtype=torch.int64, device=group.device)])


def _receive_numbers(group: Group, count: int) -> Int64Array:
    numbers = torch.empty(count, dtype=torch.int64, device=group.device)
    group.broadcast([numbers])
    array: Int64Array = numbers.cpu().numpy()
    return array


def _share_gradient(
    group: Group, composed: Composed, parameters: Sequence[nn.Parameter], request: _Request
) -> Tensor:
    """Leave the gradient of the whole batch in every process; return its mean loss.

    Raises:
        OutOfMemory: In all processes, when a share did not fit into one of them.
    """
    loss, short = torch.zeros((), device=group.device), 0.0
    share = request.share_of(group)
    if share is not None:
        try:
            loss = accumulate(
                composed, share, num_labels=request.num_labels, micro_batch_size=request.micro_batch_size
            )
        except OutOfMemory:
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


def _clear(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


# -- followers ---------------------------------------------------------------------------------------------------


def follow(group: Group, orders: Iterable[bytes]) -> None:
    """Compute what rank 0 asks for until there are no more orders."""
    residents: dict[str, ResidentBase] = {}
    for line in orders:
        order = json.loads(line)
        recipe = from_table(Recipe, order["recipe"])
        name = json.dumps([order["base"], order["recipe"]["task"], recipe.topology.kind])
        if name not in residents:
            residents[name] = ResidentBase.load(
                Path(order["base"]),
                recipe.task,
                device=group.device,
                dtype=getattr(torch, order["dtype"]),
                kind=recipe.topology.kind,
                quantise=order["quantise"],
            )
        _follow_task(group, residents[name], recipe, order)


def _follow_task(group: Group, resident: ResidentBase, recipe: Recipe, order: dict[str, Any]) -> None:
    zeros = {name: np.zeros(shape, np.float32) for name, shape in order["tensors"]}
    composed = resident.compose(recipe, zeros, rank=order["rank"])
    group.broadcast([composed.parameters[name] for name in zeros])
    modules = composed.trainable([ModuleKey.parse(key) for key in order["train"]])
    parameters = [parameter for module in modules.values() for parameter in module.values()]
    while (request := _Request.receive(group)) is not None:
        _clear(parameters)
        group.broadcast(parameters)
        try:
            _share_gradient(group, composed, parameters, request)
        except OutOfMemory:
            _clear(parameters)
            release_memory()


def _main() -> None:
    """The program of a follower: RANK SIZE DEVICE RENDEZVOUS."""
    rank, size, device_type, rendezvous = sys.argv[1:]
    sys.stdout.buffer.write(_READY)
    sys.stdout.flush()
    # Nobody reads on: what libraries print from now on is for people.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(format="%(name)s rank %(process)d: %(message)s")
    group = _enter(int(rank), int(size), device_type, rendezvous)
    try:
        follow(group, sys.stdin.buffer)
    except _GroupBroken as error:
        # Rank 0 has left, or goes on alone.
        logger.info("%s", error)
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _main()
