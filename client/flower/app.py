"""The ClientApp: what a SuperNode runs for each message."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from weft.client.flower.settings import FLOWERS_OWN, read_settings
from weft.client.flower.shim import ask
from weft.client.home import Home
from weft.common.errors import WeftError
from weft.common.parcel import Parcel, error_parcel
from weft.common.records import from_records, to_records

Answer = Callable[[Context, Parcel], Parcel]


def make_app(answer: Answer) -> ClientApp:
    """A ClientApp that answers Weft's messages: queries greet, train messages carry tasks."""
    app = ClientApp()

    def handle(message: Message, context: Context) -> Message:
        try:
            reply = answer(context, from_records(message.content))
        except WeftError as error:
            reply = error_parcel(error)
        return Message(to_records(reply), reply_to=message)

    app.query()(handle)
    app.train()(handle)
    return app


def answer_by_resident(context: Context, parcel: Parcel) -> Parcel:
    """Let the node's resident trainer answer."""
    config = dict(context.node_config)
    settings = read_settings(config)
    state = Path(settings.state).expanduser().absolute() if settings.state else node_directory(context)
    table = {key: value for key, value in config.items() if key not in FLOWERS_OWN}
    return ask(table | {"state": str(state)}, parcel, state=state, idle_minutes=settings.idle_minutes)


def node_directory(context: Context) -> Path:
    """Where a node keeps what it needs when nobody says otherwise."""
    return Home.of(os.environ).root / "flower" / str(context.node_id)


app = make_app(answer_by_resident)
