"""Flower's simulation engine, started for one gateway."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from weft.server.flower.gateway import Post
from weft.server.flower.post import FlowerPost


def run_on_ray(
    client_app: ClientApp,
    play: Callable[[Post], None],
    *,
    num_clients: int,
    num_processes: int,
    gpus: float,
) -> None:
    """Run a ServerApp and ``num_clients`` virtual SuperNodes, of which ``num_processes`` answer at a time.

    Args:
        client_app: Answers messages, in an actor.
        play: Plays the server's part, in a thread of its own.
        num_clients: Virtual SuperNodes.
        num_processes: Actors.
        gpus: Part of a GPU for each actor.

    Raises:
        WeftError: What ``play`` raised.
        RuntimeError: Ray's own trouble.
    """
    # It tells people of deprecated functions and of each message.
    logging.getLogger("flwr").setLevel(logging.ERROR)
    # Without a share of a GPU an actor sees none, which is what is meant.
    warnings.filterwarnings("ignore", message=".*accelerator visible devices", category=FutureWarning)
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, _: Context) -> None:
        play(FlowerPost(grid))

    run_simulation(
        server_app,
        client_app,
        num_clients,
        backend_config={
            "init_args": {
                "num_cpus": num_processes,
                "include_dashboard": False,
                "log_to_driver": False,
                "logging_level": logging.ERROR,
            },
            "client_resources": {"num_cpus": 1, "num_gpus": gpus},
        },
    )
