"""The compute engine's front: merging and gating run in a process of their own.

The coordinator imports no torch and its RPC loop is never blocked by mathematics: jobs go as JSON lines to a child
process (``weft.server.engine_process``), results come back the same way. The child is started on first use, stays
resident (torch and the base are loaded once), and is started again when it dies.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from weft.common.errors import BY_NAME, EngineFailed, WeftError

logger = logging.getLogger(__name__)

ATTEMPTS = 3
"""How often a job is tried when the process dies under it."""
REPLY_BYTES_MAX = 64 * 1024 * 1024


class Engine(Protocol):
    """What the coordinator needs of the merge process."""

    def submit(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        """Queue a job; the future holds its result, or the WeftError that the child raised."""
        ...

    def close(self) -> None:
        """Stop the process; queued jobs fail with EngineFailed."""
        ...


class EngineProcess:
    """One resident child process, one job at a time, in order."""

    def __init__(self, command: list[str] | None = None) -> None:
        self._command = command or [sys.executable, "-m", "weft.server.engine_process"]
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False

    def submit(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        """See Engine."""
        return self._pool.submit(self._run, job)

    def close(self) -> None:
        """See Engine."""
        with self._lock:
            self._closed = True
            child = self._child
        if child is not None:
            child.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if child is not None:
            _reap(child)

    def _run(self, job: dict[str, Any]) -> dict[str, Any]:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return self._exchange(job)
            except (OSError, EOFError, ValueError) as error:
                status = self._discard()
                if self._closed:
                    raise EngineFailed("the coordinator is stopping") from error
                logger.warning(
                    "merge process died (status %s) in job %s, attempt %d", status, job["job"], attempt
                )
        raise EngineFailed(
            f"the merge process died {ATTEMPTS} times in job {job['job']}", hint="see the coordinator's log"
        )

    def _exchange(self, job: dict[str, Any]) -> dict[str, Any]:
        child = self._running()
        assert child.stdin is not None  # noqa: S101 - opened as pipes below
        assert child.stdout is not None  # noqa: S101
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdin.flush()
        line = child.stdout.readline(REPLY_BYTES_MAX)
        if not line.endswith(b"\n"):
            raise EOFError
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise BY_NAME.get(reply["error"], WeftError)(reply["message"], hint=reply["hint"])
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._closed:
                raise OSError("closed")
            if self._child is None:
                # A session of its own: Ctrl-C in the terminal must reach the coordinator, which drains first.
                self._child = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    start_new_session=True,
                    env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
                )
            return self._child

    def _discard(self) -> int | None:
        with self._lock:
            child, self._child = self._child, None
        if child is None:
            return None
        child.kill()
        _reap(child)
        return child.returncode


def _reap(child: subprocess.Popen[bytes]) -> None:
    child.wait()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            try:
                pipe.close()
            except BrokenPipeError:
                logger.debug("the merge process left unread input")


class InlineEngine:
    """Runs jobs in the caller's thread through a function; for tests and benchmarks of the coordinator alone."""

    def __init__(self, run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self._run = run

    def submit(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        """See Engine."""
        future: Future[dict[str, Any]] = Future()
        try:
            future.set_result(self._run(job))
        except WeftError as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """See Engine."""
