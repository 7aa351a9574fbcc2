"""Who shares the jobs of a merge: threads of this process, or processes that were forked from it.

Threads share memory and the interpreter's lock, which they wait for between the calls that a tile is made of: two
take a fifth longer than two processes where those are few (TIES, means), and more elsewhere. Forked processes have a
lock each. They all run the same program, down to each ``map``, where one takes the jobs that no other has taken and
gets the results of all; nothing else is shared but open files.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, Final, Protocol, TypeVar

import scipy.linalg  # noqa: F401 - has a pool of its own, which is to be known before pools are counted
import torch
from threadpoolctl import ThreadpoolController

from weft.common.errors import EngineFailed, WeftError

J = TypeVar("J")
R = TypeVar("R")
_BATCH_ELEMENTS: Final = 1 << 17
"""Jobs smaller than this share a turn of the crew."""


class Crew(Protocol):
    """Those who share jobs."""

    @property
    def rank(self) -> int:
        """This one's number among processes; 0 where there is one."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def map(self, do: Callable[[J], R], jobs: Sequence[J]) -> list[R]:
        """``do`` of every job, in their order; raises the error of the first of them that failed."""
        ...


@dataclass(frozen=True, slots=True)
class Threads:
    """Threads of this process, which do their linear algebra alone: libraries round by how they split the work."""

    size: int = 1
    rank: int = 0

    def map(self, do: Callable[[J], R], jobs: Sequence[J]) -> list[R]:
        """As ``Crew.map``."""
        with (
            one_thread_each(),
            ThreadPoolExecutor(self.size, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            return list(pool.map(do, jobs))


ALONE: Final = Threads()


def map_batches(crew: Crew, jobs: Sequence[J], do: Callable[[J], R], size: Callable[[J], int]) -> list[R]:
    """``do`` of every job, in order; small ones share a turn of the crew, which costs as much as they do."""
    batches: list[list[J]] = [[]]
    elements = 0
    for job in jobs:
        batches[-1].append(job)
        elements += size(job)
        if elements >= _BATCH_ELEMENTS:
            batches.append([])
            elements = 0
    done = crew.map(lambda batch: [do(job) for job in batch], batches)
    return [result for batch in done for result in batch]


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Torch, numpy and scipy compute with one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _thread_pools().limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _thread_pools() -> ThreadpoolController:
    """Of numpy's and scipy's linear algebra."""
    return ThreadpoolController()


class _Over(Exception):
    """The first process has ended, or given up."""


@dataclass(slots=True, kw_only=True)
class Forked:
    """One of several processes that run the same program: what a job does to memory, only its own process sees."""

    rank: int
    """0 is the one that forked the others."""
    size: int
    tickets: int
    """A file whose offset all share: the next job's number, whoever takes it, and whoever dies."""
    pipes: Sequence[Connection]
    """To all the others at rank 0, elsewhere to rank 0."""
    first: int = 0
    """Ticket of the first job of the next ``map``."""

    def map(self, do: Callable[[J], R], jobs: Sequence[J]) -> list[R]:
        """As ``Crew.map``; ``do`` writes to files, or returns what it finds."""
        own: dict[int, R] = {}
        failed: tuple[int, Exception] | None = None
        while (index := os.lseek(self.tickets, 1, os.SEEK_CUR) - 1 - self.first) < len(jobs):
            try:
                own[index] = do(jobs[index])
            except Exception as error:
                failed = (index, error)
                break
        # Each has taken one ticket more than there are jobs, and learned by it that there are none left.
        self.first += len(jobs) + self.size
        done = self._gather(own, failed) if self.rank == 0 else self._send(own, failed)
        return [done[index] for index in range(len(jobs))]

    def _gather(self, done: dict[int, R], failed: tuple[int, Exception] | None) -> dict[int, R]:
        failures = [failed] if failed else []
        for pipe in self.pipes:
            try:
                theirs, failure = pipe.recv()
            except (EOFError, OSError) as error:
                raise EngineFailed(
                    "a process of the merge was killed, perhaps for want of memory",
                    hint="run the same command again with --threads 1: what is done is kept",
                ) from error
            done.update(theirs)
            failures += [failure] if failure else []
        if failures:
            raise min(failures, key=lambda failure: failure[0])[1]
        for pipe in self.pipes:
            pipe.send(done)
        return done

    def _send(self, done: dict[int, R], failed: tuple[int, Exception] | None) -> dict[int, R]:
        if failed and not isinstance(failed[1], WeftError):
            # A bug's own class may not travel; its traceback does.
            failed = (failed[0], RuntimeError("".join(traceback.format_exception(failed[1]))))
        try:
            self.pipes[0].send((done, failed))
            everything: dict[int, R] = self.pipes[0].recv()
        except (EOFError, OSError) as error:
            raise _Over from error
        return everything


def can_fork() -> bool:
    """Whether processes may be forked here: macOS has the call, and libraries there that do not survive it."""
    return sys.platform == "linux"


def run_forked(size: int, program: Callable[[Forked], R]) -> R:
    """Run ``program`` in this process and ``size`` − 1 forks of it; return what it returns here.

    Raises:
        EngineFailed: One of the processes was killed.
    """
    with tempfile.TemporaryFile() as tickets, one_thread_each(), contextlib.ExitStack() as ending:
        crew = Forked(rank=0, size=size, tickets=tickets.fileno(), pipes=())
        forks: list[Connection] = []
        for rank in range(1, size):
            forks.append(_fork(crew, rank, program, forks, ending))
        crew.pipes = forks
        return program(crew)


def _fork(
    crew: Forked,
    rank: int,
    program: Callable[[Forked], Any],
    earlier: Sequence[Connection],
    ending: contextlib.ExitStack,
) -> Connection:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    fork = context.Process(target=_follow, args=(crew, rank, theirs, program, [*earlier, ours]), daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads. Ours neither print nor log nor take locks of other threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        fork.start()
    theirs.close()
    ending.callback(_end, fork, ours)
    return ours


def _follow(
    crew: Forked,
    rank: int,
    pipe: Connection,
    program: Callable[[Forked], Any],
    inherited: Sequence[Connection],
) -> None:
    # Ctrl-C is for the first process, which ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for end in inherited:  # as long as these are open here, nobody notices that the first process is gone
        end.close()
    crew.rank, crew.pipes = rank, (pipe,)
    with contextlib.suppress(_Over):
        program(crew)


def _end(fork: ForkProcess, pipe: Connection) -> None:
    pipe.close()
    fork.terminate()
    fork.join()
