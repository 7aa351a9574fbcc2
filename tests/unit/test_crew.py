"""Jobs shared by threads and by forked processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch

from weft.common.errors import EngineFailed, InputError
from weft.server.merge.crew import ALONE, Crew, Forked, Threads, can_fork, run_forked

forks = pytest.mark.skipif(not can_fork(), reason="processes are not forked here")


def squares(crew: Crew, jobs: Sequence[int]) -> list[int]:
    return crew.map(lambda job: job * job, jobs)


@pytest.mark.parametrize("crew", [ALONE, Threads(3)])
@pytest.mark.parametrize("count", [0, 1, 50])
def test_threads_return_results_in_order(crew: Crew, count: int) -> None:
    assert squares(crew, range(count)) == [job * job for job in range(count)]


@forks
@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_processes_get_all_results(size: int) -> None:
    def program(crew: Forked) -> list[list[int]]:
        # What one of them got wrong in a round would be missing in the next.
        first = squares(crew, range(20))
        empty = squares(crew, [])
        return [first, empty, crew.map(lambda number: number + sum(first), range(3)), squares(crew, [7])]

    first = [job * job for job in range(20)]
    assert run_forked(size, program) == [first, [], [sum(first) + n for n in range(3)], [49]]


@forks
def test_processes_work_at_the_same_time() -> None:
    ends = [os.pipe(), os.pipe()]

    def meet(job: int) -> bytes:
        # Each waits for the other: one process alone would wait for ever.
        os.write(ends[1 - job][1], b"here")
        return os.read(ends[job][0], 4)

    assert run_forked(2, lambda crew: crew.map(meet, range(2))) == [b"here", b"here"]
    for end in (*ends[0], *ends[1]):
        os.close(end)


@forks
def test_the_first_error_in_the_order_of_jobs_is_raised_as_it_is() -> None:
    def fail(job: int) -> None:
        raise InputError(f"job {job}", hint="none")

    with pytest.raises(InputError, match="job 0") as raised:
        run_forked(3, lambda crew: crew.map(fail, range(9)))
    assert raised.value.hint == "none"


@forks
def test_a_bug_in_another_process_comes_with_its_traceback() -> None:
    def program(crew: Forked) -> None:
        def divide(_job: int) -> float:
            return 1 / (0 if crew.rank else 1)

        # Rank 0 takes none before the other has taken one: its own first job waits for that.
        began, told = pipe

        def job(number: int) -> float:
            if crew.rank:
                os.write(told, b".")
            else:
                os.read(began, 1)
            return divide(number)

        crew.map(job, range(2))

    pipe = os.pipe()
    with pytest.raises(RuntimeError, match="in divide"):
        run_forked(2, program)
    for end in pipe:
        os.close(end)


@forks
def test_a_process_that_is_killed_is_reported() -> None:
    def program(crew: Forked) -> None:
        if crew.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        squares(crew, range(4))

    with pytest.raises(EngineFailed, match="was killed"):
        run_forked(2, program)


@forks
def test_no_process_outlives_the_first() -> None:
    code = """
import os, signal
from weft.server.merge.crew import run_forked
def program(crew):
    if crew.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    crew.map(abs, range(3))
run_forked(3, program)
"""
    read, write = os.pipe()
    done = subprocess.run([sys.executable, "-c", code], pass_fds=[write], check=False)
    os.close(write)
    assert done.returncode == -signal.SIGKILL
    # The end of the pipe shows once nobody holds its other end: all of them are gone.
    assert os.read(read, 1) == b""
    os.close(read)


@forks
def test_forking_leaves_the_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    assert run_forked(2, lambda crew: crew.map(lambda _: torch.get_num_threads(), range(4))) == [1] * 4
    assert torch.get_num_threads() == before
