"""Processes on one machine that compute for one worker, a GPU for each: started, told what to do, joined, ended.

Rank 0 is the worker: it alone talks to the coordinator and has the data, AdamW, the schedule and the checkpoint. The
others follow (``weft.client.trainer.follower``). Orders are JSON lines through a follower's standard input, where
waiting may take days and the end of rank 0 shows at once; arrays go by torch.distributed (NCCL on CUDA, gloo on a CPU)
as plain numbers, never pickled, over the loopback interface.

``accelerate.Accelerator`` takes its place from the environment of processes that a launcher started, once in a
process's life. Here rank 0 is the command that a person typed, and a group may have to be ended and started again.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed
from accelerate.utils import check_cuda_p2p_ib_support
from torch import Tensor

from weft.common.errors import ComputeError, UsageError

Int64Array = npt.NDArray[np.int64]

SILENCE_MAX: Final = timedelta(minutes=30)
"""How long one process waits for another within a task; the first batch waits for followers to load the base."""
ENDING_S: Final = 10.0
"""What followers get to leave by themselves."""
MEMORY_CODE: Final = errno.ENOMEM
"""Exit code of a follower whose memory was too short for what it had to do in step with the others."""
BROKEN_CODE: Final = errno.EPIPE
"""Exit code of a follower that another process's end left alone."""
READY: Final = b"ready\n"
"""What a follower says first."""
PROGRAM: Final = ("-m", "weft.client.trainer.follower")
_LAST_WORDS_S: Final = 5.0
"""A connection ends before its process does: what is waited for exit codes."""
_GLANCE_S: Final = 0.02
_BUCKET_BYTES: Final = 64 << 20
"""Tensors are sent this much at a time: few enough messages, and little memory beside the tensors."""
_LOOPBACK: Final = {"linux": "lo", "darwin": "lo0"}


class GroupBroken(Exception):
    """Another process is gone."""


@dataclass(slots=True, kw_only=True)
class Group:
    """The processes that compute for one worker, seen from one of them."""

    rank: int
    """0 is the worker."""
    size: int
    """Number of processes."""
    device: torch.device
    """This process's."""
    silence_max: timedelta = SILENCE_MAX
    """How long one process waits for another within a task."""
    followers: list[subprocess.Popen[bytes]] = field(default_factory=list, init=False)
    """The others, where this is rank 0."""
    broken: bool = field(default=False, init=False)
    """Processes are gone or out of step: nothing can be computed together any more."""
    number: int = field(default=0, init=False)
    """How often followers were started."""
    _rendezvous: tempfile.TemporaryDirectory[str] | None = field(default=None, init=False)

    # ---- life, for rank 0 ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the followers and meet them; raises ComputeError when one does not come."""
        self._rendezvous = tempfile.TemporaryDirectory(prefix="weft-")
        file = f"{self._rendezvous.name}/meet"
        place = [str(self.size), self.device.type, str(self.silence_max.total_seconds()), file]
        try:
            for rank in range(1, self.size):
                self.followers.append(_start(rank, place, self.size))
            for follower in self.followers:
                assert follower.stdout is not None  # noqa: S101 - started so
                if follower.stdout.readline() != READY:
                    raise ComputeError(
                        "a process beside this one did not start", hint="leave --processes out"
                    )
            self.meet(file)
        except BaseException:
            self.end(at_once=True)
            raise
        self.number += 1
        self.broken = False

    def end(self, *, at_once: bool = False) -> None:
        """End the followers, without waiting for them where they cannot be in a state to leave."""
        self.broken = True
        for follower in self.followers if at_once else ():
            follower.kill()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        _end(self.followers)
        self.followers.clear()
        if self._rendezvous is not None:
            self._rendezvous.cleanup()
            self._rendezvous = None

    def restart(self) -> None:
        """End all followers as they are and start new ones; raises as ``start``."""
        self.end(at_once=True)
        self.start()

    @property
    def is_whole(self) -> bool:
        """Whether everybody is there, as far as is known."""
        return not self.broken and all(follower.poll() is None for follower in self.followers)

    def exit_codes(self) -> list[int]:
        """Of the followers that ended, the cause before what followed from it; waits a moment for them."""
        ends_s = time.monotonic() + _LAST_WORDS_S
        while True:
            codes = [code for follower in self.followers if (code := follower.poll()) is not None]
            if len(codes) == len(self.followers) or MEMORY_CODE in codes or time.monotonic() > ends_s:
                # A signal's number is negative: who was killed comes before those whom that left alone.
                return sorted(codes, key=lambda code: (code != MEMORY_CODE, code == BROKEN_CODE, code > 0))
            time.sleep(_GLANCE_S)

    # ---- what is said and sent -----------------------------------------------------------------------------------

    def meet(self, rendezvous: str) -> None:
        """Join the others at a file."""
        if loopback := _LOOPBACK.get(sys.platform):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            if not check_cuda_p2p_ib_support():
                os.environ.update(NCCL_P2P_DISABLE="1", NCCL_IB_DISABLE="1")
        torch.distributed.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            init_method=f"file://{rendezvous}",
            rank=self.rank,
            world_size=self.size,
            timeout=self.silence_max,
        )

    def order(self, order: dict[str, Any]) -> None:
        """Say something to all followers."""
        line = json.dumps(order).encode() + b"\n"
        with self._failures():
            for follower in self.followers:
                assert follower.stdin is not None  # noqa: S101 - started so
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

    def send_numbers(self, numbers: Int64Array) -> None:
        """Give the others what they receive with ``receive_numbers``."""
        self.broadcast([torch.tensor(numbers, dtype=torch.int64, device=self.device)])

    def receive_numbers(self, count: int) -> Int64Array:
        """What rank 0 sends with ``send_numbers``: [count]."""
        numbers = torch.empty(count, dtype=torch.int64, device=self.device)
        self.broadcast([numbers])
        array: Int64Array = numbers.cpu().numpy()
        return array

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        for follower in self.followers:
            if follower.poll() is not None:
                raise GroupBroken(f"a process beside this one ended with exit code {follower.returncode}")
        try:
            yield
        except (RuntimeError, OSError) as error:
            cause = str(error).strip().splitlines()[0][:200]
            raise GroupBroken(f"a process beside this one is gone: {cause}") from error


@contextlib.contextmanager
def launch(
    num_processes: int, device: torch.device, *, silence_max: timedelta = SILENCE_MAX
) -> Iterator[Group]:
    """Start followers beside this process, which becomes rank 0, and end them afterwards.

    Args:
        num_processes: With this one; on CUDA rank r computes on GPU r.
        device: Of the kind that all of them use.
        silence_max: How long one process waits for another within a task.

    Raises:
        UsageError: There are not that many GPUs, or this kind of device takes one process.
        ComputeError: A process did not start.
    """
    _check_devices(num_processes, device)
    group = Group(rank=0, size=num_processes, device=device_of(0, device.type), silence_max=silence_max)
    group.start()
    try:
        yield group
    finally:
        group.end(at_once=group.broken)


def device_of(rank: int, device_type: str) -> torch.device:
    """Where a process computes."""
    return torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)


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
        [sys.executable, *PROGRAM, str(rank), *place],
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
