"""The resident trainer: one process a node that outlives Flower's processes, with the base in its memory.

    python -m weft.client.flower.resident --state DIR --idle-minutes 30

It is started by the first message and leaves by itself. A lock in the node's directory keeps it alone; who comes
second leaves at once, and whoever started it talks to the first. It closes its standard output when it listens.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from weft.client.flower.host import Host
from weft.client.flower.line import check_peer, receive_question, socket_path
from weft.client.flower.settings import read_settings
from weft.client.home import Home
from weft.client.join import alone
from weft.common.errors import StateLocked, WeftError
from weft.common.parcel import Parcel, error_parcel, write_parcel

logger = logging.getLogger(__name__)

BACKLOG: Final = 16


class Resident:
    """Listens, and lets a host answer; each connection in a thread of its own."""

    def __init__(self, listener: socket.socket, host: Host, *, idle_s: float) -> None:
        self._listener = listener
        self._host = host
        self._idle_s = idle_s
        self._lock = threading.Lock()
        self._num_open = 0

    def serve(self) -> None:
        """Answer until nothing was asked for the idle time."""
        self._listener.settimeout(self._idle_s)
        while True:
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                with self._lock:
                    if not self._num_open:
                        return
                continue
            connection.settimeout(None)
            with self._lock:
                self._num_open += 1
            threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()

    def _serve_one(self, connection: socket.socket) -> None:
        try:
            with connection, contextlib.suppress(ConnectionError):
                check_peer(connection)
                write_parcel(self._answer(connection), connection.sendall)
        except WeftError as error:
            logger.error("%s", error)
        finally:
            with self._lock:
                self._num_open -= 1

    def _answer(self, connection: socket.socket) -> Parcel:
        try:
            table, parcel = receive_question(connection)
            return self._host.answer(read_settings(table), parcel)
        except WeftError as error:
            logger.error("%s", error)
            return error_parcel(error)
        except Exception as error:
            # The trainer must outlive a bug: the message fails, and the log says why.
            logger.exception("a message failed")
            return error_parcel(WeftError(f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def listening(state: Path) -> Iterator[socket.socket]:
    """Listen for a node's messages; the node's lock is held, so a socket that is there is a dead one's."""
    path = socket_path(state)
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(BACKLOG)
        try:
            yield listener
        finally:
            path.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve; the exit code."""
    parser = argparse.ArgumentParser(prog="weft.client.flower.resident")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--idle-minutes", type=float, required=True)
    parser.add_argument("--many", action="store_true", help="Serve many clients, one after another.")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        lock = alone(given.state)
    except StateLocked as error:
        logger.info("%s", error)
        return 0
    host = Host(keep=not given.many, home=Home.of(os.environ))
    with lock, listening(given.state) as listener:
        # Who started this process waits for the end of its output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        Resident(listener, host, idle_s=60 * given.idle_minutes).serve()
    logger.info("nothing to do for %s minutes: leaving", given.idle_minutes)
    host.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
