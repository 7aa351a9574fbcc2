"""The program of a follower: RANK SIZE DEVICE SILENCE_S RENDEZVOUS, orders on standard input.

It holds bases and the factors that it was last sent, and is nobody without rank 0: when that ends, whatever it does is
over, in the middle of a collective too, where nothing else would tell it so.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed
from accelerate.utils import release_memory
from torch import nn

from weft.client.trainer.group import BROKEN_CODE, MEMORY_CODE, READY, Group, GroupBroken, device_of
from weft.client.trainer.parallel import Request, clear, share_gradient
from weft.client.trainer.sharding import ShardedBase, in_step, pass_one_token
from weft.common.composition import Composed, ResidentBase
from weft.common.errors import OutOfMemory, WeftError
from weft.common.ids import ModuleKey
from weft.common.modules import Kind
from weft.common.recipe import Recipe, TaskSettings
from weft.common.settings import from_table

logger = logging.getLogger(__name__)


class Follower:
    """Computes what rank 0 asks for."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._residents: dict[str, ResidentBase] = {}
        self._composed: Composed | None = None
        self._parameters: list[nn.Parameter] = []
        self._actions: Mapping[str, Callable[[dict[str, Any]], object]] = {
            "load": self._load,
            "compose": self._compose,
            "gradient": self._gradient,
            "forward": self._forward,
            "features": self._features,
        }

    def follow(self, orders: Iterable[bytes]) -> None:
        """Do as told until there are no more orders."""
        for line in orders:
            order = json.loads(line)
            self._actions[order["do"]](order)

    def _resident(self, order: dict[str, Any]) -> ResidentBase:
        name = json.dumps(order["base"])
        if name not in self._residents:
            self._load(order)
        return self._residents[name]

    def _load(self, order: dict[str, Any]) -> None:
        name = json.dumps(order["base"])
        # Rank 0 may ask for what is there: it divides a base when it loads it, and once only.
        self._residents.pop(name, None)
        self._residents[name] = self._loaded(order["base"])

    def _loaded(self, base: dict[str, Any]) -> ResidentBase:
        directory, dtype = Path(base["directory"]), getattr(torch, base["dtype"])
        task = from_table(TaskSettings, base["task"])
        if base.get("sharded"):
            return ShardedBase(self._group, directory, task, dtype=dtype)
        return ResidentBase.load(
            directory,
            task,
            device=self._group.device,
            dtype=dtype,
            kind=Kind(base["kind"]),
            quantise=base["quantise"],
        )

    def _compose(self, order: dict[str, Any]) -> None:
        zeros = {name: np.zeros(shape, np.float32) for name, shape in order["tensors"]}
        recipe = from_table(Recipe, order["recipe"])
        composed = self._resident(order).compose(recipe, zeros, rank=order["rank"])
        self._group.broadcast([composed.parameters[name] for name in zeros])
        modules = composed.trainable([ModuleKey.parse(key) for key in order["train"]])
        self._composed = composed
        self._parameters = [parameter for module in modules.values() for parameter in module.values()]

    def _gradient(self, order: dict[str, Any]) -> None:
        assert self._composed is not None  # noqa: S101 - ordered before
        request = Request.receive(self._group, order)
        clear(self._parameters)
        self._group.broadcast(self._parameters)
        try:
            with in_step(self._composed):
                share_gradient(self._group, self._composed, self._parameters, request)
        except OutOfMemory:
            if request.in_step:
                raise
            clear(self._parameters)
            release_memory()

    def _forward(self, order: dict[str, Any]) -> None:
        pass_one_token(self._resident(order).forward, self._group.device)

    def _features(self, order: dict[str, Any]) -> None:
        self._resident(order).features(np.zeros((1, 1), np.int64), np.ones(1, np.int64))


def _orders() -> Iterator[bytes]:
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        _leave(0)

    threading.Thread(target=read, name="weft-orders", daemon=True).start()
    return iter(lines.get, None)


def _leave(code: int) -> NoReturn:
    """End, without a word to the others: they may wait for this process, or be gone."""
    logging.shutdown()
    os._exit(code)


def _is_of_another(error: Exception) -> bool:
    """Whether a pass failed because another process is gone, which gloo says by its text alone."""
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)


def main() -> None:
    """Follow until rank 0 ends."""
    rank, size, device_type, silence_s, rendezvous = sys.argv[1:]
    sys.stdout.buffer.write(READY)
    sys.stdout.flush()
    # Nobody reads on: what libraries print from now on is for people.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    logging.basicConfig(format="%(name)s rank %(process)d: %(message)s")
    group = Group(
        rank=int(rank),
        size=int(size),
        device=device_of(int(rank), device_type),
        silence_max=timedelta(seconds=float(silence_s)),
    )
    group.meet(rendezvous)
    try:
        Follower(group).follow(_orders())
    except GroupBroken as error:
        logger.info("%s", error)
        _leave(BROKEN_CODE)
    except OutOfMemory as error:
        logger.warning("%s", error)
        _leave(MEMORY_CODE)
    except WeftError as error:
        logger.warning("%s", error)
        _leave(error.exit_code)
    except Exception as error:
        if _is_of_another(error):
            logger.info("%s", error)
            _leave(BROKEN_CODE)
        logger.exception("failed unexpectedly")
        _leave(1)


if __name__ == "__main__":
    main()
