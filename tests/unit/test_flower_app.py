"""The app in ``deploy/flower``: its settings, its parts, and a post over Flower's grid."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import pytest
from flwr.app import Error, Message, Metadata
from flwr.app.message import make_message
from flwr.serverapp import Grid

from weft.common.errors import UsageError
from weft.common.parcel import Parcel
from weft.common.records import to_records
from weft.server.flower.app import read_settings
from weft.server.flower.gateway import Lost
from weft.server.flower.post import FlowerPost

APP = Path(__file__).parents[2] / "deploy" / "flower"
PARCEL = Parcel(documents={"a": b"1"})


def test_the_apps_own_settings_are_read() -> None:
    table = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    found = read_settings(table["config"])
    assert found.task_s == 3600.0
    for reference in table["components"].values():
        module, name = reference.split(":")
        assert f"import {name}" in (APP / f"{module.replace('.', '/')}.py").read_text()


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"run": "run.toml", "state": "/s"},
        {"run": "/r", "state": "/s", "task-s": 0},
        {"run": "/r", "sate": "/s"},
    ],
    ids=["empty", "relative", "no time", "unknown"],
)
def test_wrong_settings_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        read_settings(config)


class SmallGrid:
    """A grid with two nodes, whose replies a test puts there."""

    def __init__(self) -> None:
        self.pushed: list[str | None] = ["m-1"]
        self.replies: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return [7, 8]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        return self.pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.replies


def reply(content: Any) -> Message:
    metadata = Metadata(
        run_id=1,
        message_id="r",
        src_node_id=7,
        dst_node_id=1,
        reply_to_message_id="m-1",
        group_id="weft",
        created_at=1.0,
        ttl=9.0,
        message_type="train",
    )
    if isinstance(content, Error):
        return make_message(metadata=metadata, error=content)
    return make_message(metadata=metadata, content=content)


def test_replies_are_parcels_or_lost() -> None:
    grid = SmallGrid()
    post = FlowerPost(cast("Grid", grid))
    assert post.nodes() == {7, 8}
    grid.replies = [reply(to_records(PARCEL)), reply(Error(code=3, reason="gone")), reply(to_records(PARCEL))]
    grid.replies[2].content.clear()
    outcomes = [outcome for _, outcome in post.receive(["m-1"])]
    assert outcomes[0] == PARCEL
    assert isinstance(outcomes[1], Lost)
    assert "gone" in outcomes[1].reason
    assert isinstance(outcomes[2], Lost)
