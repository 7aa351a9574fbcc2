"""Flower's grid as a post: parcels in messages, answers pulled by the messages' ids."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Final

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from weft.common.errors import InputError
from weft.common.parcel import Parcel
from weft.common.records import from_records, to_records
from weft.server.flower.gateway import Lost

GROUP: Final = "weft"


class FlowerPost:
    """Carries messages over a SuperLink, or within a simulation."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def nodes(self) -> Collection[int]:
        """Nodes that Flower says are online."""
        return frozenset(self._grid.get_node_ids())

    def send(self, node: int, parcel: Parcel, *, ttl_s: float, is_task: bool) -> str:
        """Push one message; a task is a train message, a hello a query."""
        kind = MessageType.TRAIN if is_task else MessageType.QUERY
        message = Message(to_records(parcel), node, kind, ttl=ttl_s, group_id=GROUP)
        # A grid gives None for a message that the SuperLink refused, and nothing at all for one that is too large.
        return next(iter(self._grid.push_messages([message])), "") or ""

    def receive(self, messages: Collection[str]) -> Iterable[tuple[str, Parcel | Lost]]:
        """Pull the answers that are there."""
        for reply in self._grid.pull_messages(list(messages)):
            yield reply.metadata.reply_to_message_id, _outcome(reply)


def _outcome(reply: Message) -> Parcel | Lost:
    if reply.has_error():
        return Lost(reason=f"Flower's error {reply.error.code}: {reply.error.reason or 'without a reason'}")
    try:
        return from_records(reply.content)
    except InputError as error:
        return Lost(reason=str(error))
