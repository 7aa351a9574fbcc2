"""The steps of a task, whatever its purpose: one method a phase, called in this order by the worker's loop.

``fetch`` gets what the task names, ``load`` brings it into memory, ``perform`` does what the task is for, ``encode``
and ``send`` are for those that have something to send, ``submit`` hands in the signed statement. A step that is
repeated after a failure goes on where it was.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path as FilePath

from weft.client.loop import Event
from weft.client.tasks.inhand import TaskInHand
from weft.client.workshop import RunOnWorker, Sources, Workshop
from weft.common.ids import ModuleKey
from weft.common.manifest import Signed, canonical_json
from weft.common.modules import Schema
from weft.common.protocol import Stage
from weft.common.settings import to_table
from weft.common.statements import UPDATE_TYPE, UpdateStatement
from weft.common.tensors import Float32Array, open_module, to_float32


class Steps(ABC):
    """A task on its way.

    Args:
        shop: What this process keeps between tasks.
        hand: The task.
    """

    def __init__(self, shop: Workshop, hand: TaskInHand) -> None:
        self.shop = shop
        self.hand = hand
        self.task = hand.task
        self.sources = Sources()
        self.versions: dict[ModuleKey, FilePath] = {}
        self.start: dict[str, Float32Array] = {}
        """Tensors of the versions that the task starts from."""
        self._run: RunOnWorker | None = None

    @property
    def run(self) -> RunOnWorker:
        """The task's run; known once it was fetched."""
        assert self._run is not None  # noqa: S101 - phases come in their order
        return self._run

    def fetch(self) -> Event | None:
        """Get the recipe, the base, the versions and what the documents come from."""
        self.hand.reached(Stage.FETCHING)
        on_bytes = self.hand.on_bytes(Stage.FETCHING)
        self._run = self.shop.run_of(self.task, on_bytes)
        self.versions = self.shop.versions_of(self.task, self.run, on_bytes)
        self.sources = self.shop.sources_of(self.task, self.run, on_bytes)
        return None

    def load(self) -> Event | None:
        """Bring the base and the start into memory."""
        self.hand.reached(Stage.LOADING)
        self.shop.ability_of(self.run)
        schemas = self.run.schemas_of(self.task)
        for key, path in self.versions.items():
            self.start |= _slices(read_module(path, self.run.schemas[key]), schemas[key])
        self.shop.resident_of(self.run)
        return None

    @abstractmethod
    def perform(self) -> Event | None:
        """Do what the task is for."""

    def encode(self) -> Event | None:
        """Write what is to be sent."""
        return None

    def send(self) -> Event | None:
        """Send it."""
        return None

    def submit(self) -> Event | None:
        """Hand in what the task came to."""
        signed = Signed.sign(self.shop.me.key, UPDATE_TYPE, canonical_json(to_table(self.statement())))
        self.shop.calls.submit_update(lease_token=self.task.lease_token, statement=signed)
        self.accepted()
        return None

    @abstractmethod
    def statement(self) -> UpdateStatement:
        """What is signed."""

    @abstractmethod
    def accepted(self) -> None:
        """The statement was accepted."""

    def put_down(self) -> None:
        """The task is no longer in hand, one way or another."""
        self.hand.heartbeat.end()


def read_module(path: FilePath, schema: Schema) -> dict[str, Float32Array]:
    """The tensors of a version in float32; raises TensorFileError unless they are the schema's."""
    with open_module(path, schema) as file:
        return {spec.name: to_float32(file.array(spec.name), spec.dtype) for spec in schema.tensors}


def _slices(tensors: dict[str, Float32Array], schema: Schema) -> dict[str, Float32Array]:
    """The first rows and columns of each tensor, as ``Schema.at_rank`` makes them smaller."""
    return {
        spec.name: tensors[spec.name][tuple(slice(0, size) for size in spec.shape)] for spec in schema.tensors
    }
