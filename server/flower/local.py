"""A post without Flower: nodes are answered in threads of this process, each by what it is given."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from weft.common.errors import WeftError
from weft.common.parcel import Parcel
from weft.server.flower.gateway import Lost

logger = logging.getLogger(__name__)

Answer = Callable[[int, Parcel], Parcel]
"""A node's: takes a message, gives what it answers."""


class LocalPost:
    """Carries messages to nodes that are functions; a few at a time, the others wait."""

    def __init__(self, num_nodes: int, answer: Answer, *, num_threads: int) -> None:
        self._nodes = range(num_nodes)
        self._answer = answer
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="node")
        self._under_way: dict[str, Future[Parcel]] = {}
        self._num_sent = 0
        self._arrived = threading.Event()

    def close(self) -> None:
        """Take no more messages; those that are being answered are waited for."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def wait(self, seconds: float) -> None:
        """Wait until an answer arrives, so long at most."""
        self._arrived.wait(seconds)
        self._arrived.clear()

    def nodes(self) -> Collection[int]:
        """All of them."""
        return self._nodes

    def send(self, node: int, parcel: Parcel, *, ttl_s: float, is_task: bool) -> str:
        """Have a message answered."""
        self._num_sent += 1
        message = f"m-{self._num_sent}"
        future = self._under_way[message] = self._pool.submit(self._answer, node, parcel)
        future.add_done_callback(lambda _: self._arrived.set())
        return message

    def receive(self, messages: Collection[str]) -> Iterable[tuple[str, Parcel | Lost]]:
        """What was answered."""
        done = [message for message in messages if self._under_way[message].done()]
        for message in done:
            yield message, _outcome(self._under_way.pop(message))


def _outcome(future: Future[Parcel]) -> Parcel | Lost:
    try:
        return future.result()
    except WeftError as error:
        return Lost(reason=f"{type(error).__name__}: {error}")
    except Exception as error:
        # A node's own bug must look as it would from far away.
        logger.exception("a node failed")
        return Lost(reason=f"{type(error).__name__}: {error}")
