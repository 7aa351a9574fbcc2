"""A worker with its real trainer on a microscopic base, and a coordinator that only plays its part.

The coordinator answers what a test says and remembers what it was told; updates that it gets go through the real ingest
gate.
"""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from weft.client.device import Device
from weft.client.heartbeat import TaskProgress
from weft.client.loop import Action, Life, Phase
from weft.client.worker import Setup, Worker
from weft.common.blobs import manifest_of
from weft.common.codec import UpdateFile, screen_update, update_bytes_max
from weft.common.composition import describe
from weft.common.errors import NotFound, WeftError
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, ModuleKey, TaskId, WorkerId
from weft.common.ids import Path as PathOfModules
from weft.common.initial import initial_module
from weft.common.manifest import Signed, canonical_json, parse_json
from weft.common.protocol import (
    BlobManifest,
    BlobRef,
    Limit,
    LossPoint,
    ModuleStart,
    PollAnswer,
    ProgressAnswer,
    Purpose,
    Receipt,
    Session,
    Stage,
    Task,
    Unable,
)
from weft.common.recipe import RECIPE_TYPE, Recipe
from weft.common.settings import from_table, to_table
from weft.common.statements import UPDATE_TYPE, UpdateStatement
from weft.common.tensors import Float32Array, write_module

KEY = ModuleKey(0, 0)
OPERATOR = SigningKey.generate()
ME = SigningKey.generate()
WAIT = PollAnswer(task=None, wait_reason="nothing to do", finished=False)
FINISHED = PollAnswer(task=None, wait_reason="all runs are finished", finished=True)
NUM_STEPS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One task that the coordinator gives out."""

    path: str = "0"
    purpose: Purpose = Purpose.TRAIN
    send: Sequence[int] | None = None
    """Levels whose modules are trained and sent; None for all."""
    shard: Path | None = None
    router: Path | None = None
    rank: int = 0
    num_steps: int = NUM_STEPS


class Coordinator:
    """Plays the coordinator of one run."""

    def __init__(self, directory: Path, base: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.signed = Signed.sign(OPERATOR, RECIPE_TYPE, canonical_json(to_table(recipe)))
        self.schemas = describe(base, recipe)
        self.directory = directory
        self.base = base
        self.files = {manifest_of(path).blake3: path for path in base.iterdir()}
        self.starts: dict[ModuleKey, Path] = {}
        self.versions: dict[ModuleKey, int] = {}
        for key in self.schemas:
            self.publish(key, initial_module(base, recipe, self.schemas, key))
        self.plan: list[Part] = []
        """Tasks in order, also when one was given back; without it the same one again and again."""
        self.num_tasks = 1
        self.vanished: set[str] = set()
        """Names of files that are not there any more."""
        self.submit_errors: list[WeftError] = []
        self.polled: list[tuple[Unable, ...]] = []
        self.limits: tuple[Limit, ...] = ()
        self.reports: list[tuple[Stage, int, tuple[LossPoint, ...]]] = []
        self.statements: list[Signed] = []
        self.accepted: list[UpdateStatement] = []
        self.updates: dict[Digest, bytes] = {}
        self.released: list[str] = []
        self.downloaded: list[Digest] = []
        self.on_report: Callable[[Stage, int], ProgressAnswer] = lambda *_: ProgressAnswer(
            stop=False, reason=""
        )
        self.on_poll: Callable[[], None] = lambda: None

    def publish(self, key: ModuleKey, tensors: Mapping[str, Float32Array]) -> None:
        """Make these the newest version of a module."""
        self.versions[key] = self.versions.get(key, -1) + 1
        path = self.directory / f"{key}@{self.versions[key]}.module"
        write_module(path, tensors, self.schemas[key])
        self.files[manifest_of(path).blake3] = path
        self.starts[key] = path

    @property
    def start(self) -> Path:
        """The newest version of the first module."""
        return self.starts[KEY]

    @property
    def schema(self) -> Any:
        """Of the first module."""
        return self.schemas[KEY]

    @property
    def num_given(self) -> int:
        """Tasks that are over."""
        return len(self.accepted) + len(self.released)

    @property
    def part(self) -> Part:
        """What the next task is."""
        return self.plan[self.num_given] if self.plan else Part()

    def offer(self, path: Path | None) -> BlobRef | None:
        """A file that a task refers to."""
        if path is None:
            return None
        blob = manifest_of(path)
        self.files[blob.blake3] = path
        return BlobRef(blake3=blob.blake3, size_bytes=blob.size_bytes)

    @property
    def task(self) -> Task:
        part, number = self.part, self.num_given + 1
        keys = PathOfModules.parse(part.path).modules if part.purpose is not Purpose.ROUTE else ()
        trains = part.purpose is Purpose.TRAIN
        return Task(
            task_id=TaskId(f"t-{number}"),
            run_id=self.recipe.run,
            lease_token="lease",
            lease_epoch=number,
            lease_s=1.0,
            path=part.path,
            modules=tuple(
                self._start(key, number, trains and (part.send is None or key.level in part.send))
                for key in keys
            ),
            recipe_blake3=Digest(blake3(self.signed.payload).hexdigest()),
            num_steps=part.num_steps,
            update_bytes_max=update_bytes_max(self.schema, [self.recipe.codec], fisher=True),
            purpose=part.purpose,
            shard=self.offer(part.shard),
            router=self.offer(part.router),
            rank=part.rank,
        )

    def _start(self, key: ModuleKey, number: int, train: bool) -> ModuleStart:
        path = self.starts[key]
        return ModuleStart(
            module=str(key),
            version=self.versions[key],
            blake3=manifest_of(path).blake3,
            size_bytes=path.stat().st_size,
            train=train,
            round_number=number,
            steps_before=NUM_STEPS * len(self.accepted),
        )

    # ---- what a worker calls -------------------------------------------------------------------------------------

    def open_session(self, worker_id: WorkerId, signing_key: SigningKey, pin: bytes) -> Session:
        assert (worker_id, signing_key.public, pin) == ("w-1", ME.public, bytes(32))
        return Session(session_token="session", expires_at=0.0)

    def poll_task(
        self,
        *,
        wait_s: float,
        unable: tuple[Unable, ...] = (),
        tokens_per_s: float = 0.0,
        limits: tuple[Limit, ...] = (),
    ) -> PollAnswer:
        self.polled.append(unable)
        self.limits = limits
        self.on_poll()
        if self.num_given >= len(self.plan) if self.plan else len(self.accepted) >= self.num_tasks:
            return FINISHED
        if unable:
            return WAIT
        return PollAnswer(task=self.task, wait_reason="", finished=False)

    def report_progress(
        self,
        *,
        lease_token: str,
        stage: Stage,
        num_done: int,
        num_total: int,
        tokens_per_s: float = 0.0,
        losses: tuple[LossPoint, ...] = (),
    ) -> ProgressAnswer:
        self.reports.append((stage, num_done, losses))
        return self.on_report(stage, num_done)

    def submit_update(self, *, lease_token: str, statement: Signed) -> Receipt:
        self.statements.append(statement)
        if self.submit_errors:
            raise self.submit_errors.pop(0)
        assert statement.is_from(ME.public, UPDATE_TYPE)
        self.accepted.append(from_table(UpdateStatement, parse_json(statement.payload, 10**6)))
        return Receipt(receipt_blake3=Digest(digest_of_bytes(statement.payload)), accepted_at=0.0)

    def release_task(self, *, lease_token: str, reason: str) -> None:
        self.released.append(reason)

    def get_recipe(self, run_id: str) -> Signed:
        return self.signed

    def upload(self, path: Path, lease_token: str, *, idle_s: float, progress: Any = None) -> BlobManifest:
        blob = manifest_of(path)
        self.updates[blob.blake3] = path.read_bytes()
        progress(blob.size_bytes, blob.size_bytes)
        return blob

    def download(
        self,
        blake3: Digest,
        to: Path,
        *,
        idle_s: float,
        size_bytes: int | None = None,
        progress: Any = None,
    ) -> Path:
        self.downloaded.append(blake3)
        if blake3 not in self.files or self.files[blake3].name in self.vanished:
            raise NotFound(f"there is no blob {blake3[:12]}")
        shutil.copyfile(self.files[blake3], to)
        progress(to.stat().st_size, to.stat().st_size)
        return to

    def delta(self, number: int, directory: Path, *, index: int = 0) -> dict[str, np.ndarray[Any, Any]]:
        """A decoded update of an accepted statement, screened as a coordinator does."""
        said = self.accepted[number]
        update = said.updates[index]
        rank = self.plan[number].rank if self.plan else 0
        schema = self.schemas[ModuleKey.parse(update.module)]
        schema = schema.at_rank(rank) if rank else schema
        path = directory / "screened"
        path.write_bytes(self.updates[Digest(update.digest)])
        wants_fisher = self.recipe.fisher.num_examples > 0
        screen_update(path, schema, self.recipe.codecs, wants_fisher=wants_fisher, size_bytes_max=10**7)
        with UpdateFile(path, schema) as file:
            return {
                spec.name: file.tile(spec.name, 0, spec.size).reshape(spec.shape).copy()
                for spec in schema.tensors
            }


class Watching:
    """Remembers what a person would see, and lets a test act at that moment."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self.lines: list[str] = []
        self.on_turn: Callable[[Action], None] = lambda action: None
        self.on_progress: Callable[[TaskProgress], None] = lambda progress: None

    def turn(self, action: Action) -> None:
        self.phases.append(action.phase)
        self.on_turn(action)

    def progress(self, progress: TaskProgress) -> None:
        self.on_progress(progress)

    def said(self, text: str) -> None:
        self.lines.append(text)


@dataclasses.dataclass
class Site:
    """A worker's machine."""

    directory: Path
    coordinator: Coordinator
    data: Path | None
    base: Path | None
    rank_max: int = 0
    checkpoint_s: float = 1e9
    prepare: Callable[[Setup], Setup] = lambda setup: setup
    clock: Callable[[], float] = dataclasses.field(default_factory=lambda: iter(range(10**9)).__next__)
    view: Watching = dataclasses.field(default_factory=Watching)

    def worker(self) -> Worker:
        setup = Setup(
            worker_id=WorkerId("w-1"),
            key=ME,
            pin=bytes(32),
            coordinator_key=OPERATOR.public,
            state=self.directory / "state",
            bases=lambda digest: self.directory / "bases" / digest,
            data=self.data,
            base=self.base,
            device=Device(torch_device=torch.device("cpu"), dtype=torch.float32, name="test"),
            rank_max=self.rank_max,
            checkpoint_s=self.checkpoint_s,
        )
        return Worker(
            self.prepare(setup),
            self.coordinator,
            view=self.view,
            stop_waits=threading.Event(),
            clock=self.clock,
            chance=lambda: 0.0,
            leave_when_finished=True,
        )

    def live(self) -> Life:
        return self.worker().run()


def digest_of_bytes(payload: bytes) -> Digest:
    """BLAKE3 of a payload."""
    return Digest(blake3(payload).hexdigest())
