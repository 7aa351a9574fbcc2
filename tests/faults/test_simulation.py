"""The production coordinator in a seeded world: any interleaving of workers, faults and restarts.

Virtual time, four workers, one seed for everything. Messages come twice, late and to the wrong coordinator's life;
workers die and come back; clocks jump; merges fail; the coordinator is killed. Whatever happens:

* a receipt stands for one update in one round, and a repeat gets the same one;
* versions are consecutive, and every round that ended says why;
* the bytes of every version follow from the accepted sets alone;
* when the faults stop, the run comes to its end.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from tests.harness import DeferredEngine, Site, Worker, fake_job, memory_directory, routed, run_file

from weft.common.errors import (
    ConflictingUpdate,
    EngineFailed,
    ForgedUpdate,
    LeaseLost,
    PermissionRefused,
    RoundClosed,
    SessionExpired,
)
from weft.common.ids import ModuleKey
from weft.common.manifest import Signed
from weft.common.protocol import Purpose, Receipt, RoundState, Stage, Task
from weft.common.statements import Holding
from weft.server.rounds import ENDED

NAMES = ("a", "b", "c", "d")
COUNT = 3
MODULE = ModuleKey(0, 0)
POLICY = f"count = {COUNT}\nquorum = 2\ntarget = 3\nstraggler_factor = 0.5"
FAULT_RATE = 0.2
FAULTS = frozenset(
    {
        "restart",
        "death",
        "silence",
        "wall jump",
        "merge failed",
        "submit twice",
        "report twice",
        "late submit",
    }
    | {"another payload", "foreign lease", "given back", "upload cut"}
)
REFUSED = (LeaseLost, RoundClosed, ConflictingUpdate, ForgedUpdate, PermissionRefused)


class Simulated:
    """One worker's view: its task, what it has ready, and what it once sent."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.task: Task | None = None
        self.statement: Signed | None = None
        self.sent: list[tuple[Task, Signed]] = []
        self.done = 0


class World:
    """A site and its workers, moved by one random generator."""

    def __init__(
        self, directory: Path, seed: int, text: str = "", *, policy: str = POLICY, routes: str = ""
    ) -> None:
        self.rng = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.chaos = True
        self.receipts: dict[tuple[str, str], Receipt] = {}
        self.others: set[str] = set()
        """Tasks that were to evaluate or to route."""
        self.site = Site(directory, job=self._job, make_engine=DeferredEngine)
        sections = routed(self.site.directory, (2, 2), mode=routes) if routes else ""
        self.site.add_run(run_file(f"{text}\n{sections}", rounds=policy))
        self.members = [Simulated(worker) for worker in self.site.workers(*NAMES)]
        for number, member in enumerate(self.members):
            # Every path is held by two workers.
            paths = ("0.0", "0.1", "1.0", "1.1")
            held = (paths[number], paths[(number + 1) % 4])
            member.worker.holdings = tuple(
                Holding(path=path, num_documents=9, num_sequences=9) for path in held
            )
            # Deaf to versions: some paths stop early where that is asked for.
            member.worker.validation_loss = lambda task: 2.0 + int(task.task_id[2:]) % 3

    def _job(self, job: dict[str, Any]) -> dict[str, Any]:
        if self.chaos and self.rng.random() < 0.5:
            self.faults["merge failed"] += 1
            raise EngineFailed("injected")
        return fake_job(job)

    @property
    def finished(self) -> bool:
        return self.site.coordinator.state.view(self.site.run).finished

    def step(self) -> None:
        """One random thing happens."""
        member = self.rng.choice(self.members)
        ordinary = [self.work, self.work, self.work, self.work, self.engine_step, self.pass_time]
        faults = [
            self.restart,
            self.die,
            self.be_silent,
            self.jump,
            self.send_old,
            self.steal,
            self.contradict,
            self.repeat_report,
            self.give_back,
            self.cut_upload,
        ]
        action = self.rng.choice(faults if self.chaos and self.rng.random() < FAULT_RATE else ordinary)
        try:
            action(member)
        except SessionExpired:
            member.worker.open_session()
        except (LeaseLost, RoundClosed):
            member.task = member.statement = None

    # --- what should happen ---

    def work(self, member: Simulated) -> None:
        worker = member.worker
        if member.task is None:
            member.task, member.statement, member.done = worker.poll().task, None, 0
        elif member.done < 2:
            member.done += 1
            if worker.report(member.task, stage=Stage.TRAINING, done=member.done).stop:
                member.task = None
        elif member.statement is None:
            member.statement = worker.ready(member.task)
        else:
            self.submit(member, member.task, member.statement)
            if self.chaos and self.rng.random() < 0.3:
                self.faults["submit twice"] += 1
                self.submit(member, member.task, member.statement)
            member.task = member.statement = None

    def submit(self, member: Simulated, task: Task, statement: Signed) -> None:
        if (task, statement) not in member.sent:
            member.sent.append((task, statement))
        if task.purpose is not Purpose.TRAIN:
            self.others.add(task.task_id)
        receipt = member.worker.submit(task, statement)
        assert self.receipts.setdefault((member.worker.worker_id, task.task_id), receipt) == receipt

    def engine_step(self, _: Simulated) -> None:
        engine = self.site.engine
        assert isinstance(engine, DeferredEngine)
        if engine.waiting:
            engine.step(self.rng.randrange(len(engine.waiting)))

    def pass_time(self, _: Simulated) -> None:
        self.site.clock.advance(self.rng.choice((0.1, 1.0, 3.0)))
        self.site.coordinator.tick()

    # --- what may happen ---

    def restart(self, _: Simulated) -> None:
        self.faults["restart"] += 1
        self.site.restart()

    def die(self, member: Simulated) -> None:
        self.faults["death"] += 1
        member.task = member.statement = None

    def be_silent(self, _: Simulated) -> None:
        self.faults["silence"] += 1
        self.site.clock.advance(self.rng.choice((14.0, 16.0, 200.0)))

    def jump(self, _: Simulated) -> None:
        self.faults["wall jump"] += 1
        self.site.clock.jump(self.rng.choice((-3600.0, 3600.0)))

    def send_old(self, member: Simulated) -> None:
        """A message that was under way for long arrives, perhaps not for the first time."""
        if not member.sent:
            return
        self.faults["late submit"] += 1
        task, statement = self.rng.choice(member.sent)
        key = (member.worker.worker_id, task.task_id)
        try:
            # It may be the first to arrive: the one before found no session.
            receipt = member.worker.submit(task, statement)
        except REFUSED:
            assert key not in self.receipts, "a receipt was taken back"
        else:
            assert self.receipts.setdefault(key, receipt) == receipt

    def steal(self, member: Simulated) -> None:
        other = self.rng.choice([item for item in self.members if item is not member])
        if other.task is None or other.statement is None:
            return
        self.faults["foreign lease"] += 1
        before = self.site.accepted()
        with pytest.raises(REFUSED):
            member.worker.submit(other.task, other.statement)
        with pytest.raises(REFUSED):
            member.worker.report(other.task)
        assert self.site.accepted() == before

    def contradict(self, member: Simulated) -> None:
        """Another payload for a task that was accepted."""
        for task, _ in member.sent:
            if (member.worker.worker_id, task.task_id) in self.receipts and task.num_steps:
                self.faults["another payload"] += 1
                blobs = {start.module: start for start in task.modules}
                updates = [
                    {"module": key, "start_version": start.version, "digest": "0" * 64, "size_bytes": 9}
                    for key, start in blobs.items()
                ]
                forged = member.worker.statement(task, {}, {"updates": updates, "num_steps": task.num_steps})
                before = self.site.accepted()
                with pytest.raises(ConflictingUpdate):
                    member.worker.submit(task, forged)
                assert self.site.accepted() == before
                return

    def repeat_report(self, member: Simulated) -> None:
        if member.task is not None:
            self.faults["report twice"] += 1
            for _ in range(2):
                if member.worker.report(member.task, done=member.done).stop:
                    member.task = member.statement = None
                    return

    def give_back(self, member: Simulated) -> None:
        if member.task is not None:
            self.faults["given back"] += 1
            for _ in range(2):
                self.site.coordinator.release_task(
                    member.worker.caller, lease_token=member.task.lease_token, reason="simulated"
                )
            member.task = member.statement = None

    def cut_upload(self, member: Simulated) -> None:
        """An upload is declared and never sent."""
        if member.task is not None and member.statement is None:
            from weft.common.blobs import manifest_of

            updates = member.worker.encode(member.task, salt="cut")
            if not updates:
                return
            path = next(iter(updates.values()))
            self.site.coordinator.find_missing(
                member.worker.caller, lease_token=member.task.lease_token, blob=manifest_of(path)
            )
            self.faults["upload cut"] += 1

    # --- what must hold ---

    def check(self) -> None:
        run = self.site.run
        held = Counter(
            (update.worker_id, update.task_id, str(round_.module))
            for rounds in run.rounds.values()
            for round_ in rounds
            # What was kept for the next round is in it once there is one.
            for update in (*round_.updates, *(round_.kept if round_ is rounds[-1] else ()))
        )
        assert set(held.values()) <= {1}, "an update is in two rounds"
        trained = {key for key in self.receipts if key[1] not in self.others}
        assert {(worker, task) for worker, task, _ in held} == trained, (
            "a receipt without update, or the reverse"
        )
        policy = run.run_file.rounds
        for module, rounds in run.rounds.items():
            assert [round_.number for round_ in rounds] == list(range(1, len(rounds) + 1))
            for round_ in rounds:
                assert (
                    len({(item.worker_id, item.path) for item in round_.updates}) == len(round_.updates)
                    or policy.asynchronous
                )
                for update in round_.updates:
                    assert (
                        0
                        <= round_.base_version - update.start_version
                        <= (policy.staleness_max + 1 if policy.asynchronous else 0)
                    )
                assert (round_.state in ENDED) == (round_.ended_at is not None)
                assert round_.reason
                assert round_.state is RoundState.COLLECTING or len(round_.updates) >= policy.quorum
            published = [round_ for round_ in rounds if round_.state is RoundState.PUBLISHED]
            assert [version.version for version in run.versions[module]] == list(range(len(published) + 1))
            assert [version.round_number for version in run.versions[module][1:]] == [
                item.number for item in published
            ]


@pytest.fixture
def directory() -> Iterator[Path]:
    made = memory_directory()
    yield made
    shutil.rmtree(made)


def simulate(
    directory: Path,
    seed: int,
    text: str = "",
    *,
    steps: int = 200,
    more: Mapping[str, str] = MappingProxyType({}),
) -> World:
    world = World(directory / f"world{seed}", seed, text, **more)
    for number in range(steps):
        world.step()
        if number % 25 == 0:
            world.check()
    world.chaos = False
    for _ in range(4000):
        if world.finished:
            break
        world.step()
    world.check()
    assert world.finished, (
        f"seed {seed} does not end: {[rounds[-1] for rounds in world.site.run.rounds.values()]}"
    )
    return world


def replay(directory: Path, world: World) -> Site:
    """The same accepted sets in the opposite order, without any fault."""
    rounds = [round_ for round_ in world.site.run.rounds[MODULE] if round_.number <= COUNT]
    failing = iter([round_.state is RoundState.ROLLED_BACK for round_ in rounds])

    def job(job: dict[str, Any]) -> dict[str, Any]:
        if next(failing):
            raise EngineFailed("as in the first world")
        return fake_job(job)

    site = Site(directory, job=job)
    site.add_run(
        run_file(rounds=f"count = {COUNT}\nquorum = 1\ntarget = {len(NAMES) + 1}\nstraggler_factor = 1000")
    )
    workers = {worker.worker_id: worker for worker in site.workers(*NAMES)}
    for round_ in rounds:
        for worker_id in sorted(round_.contributors, reverse=True):
            workers[worker_id].open_session()
            task = workers[worker_id].task()
            # Patience is a multiple of the time that an update took.
            site.clock.advance(1)
            workers[worker_id].work(task)
        site.clock.advance(10_000)
        site.coordinator.tick()
        site.coordinator.tick()
    return site


def test_fifty_seeds(directory: Path) -> None:
    faults: Counter[str] = Counter()
    for seed in range(50):
        world = simulate(directory, seed)
        faults += world.faults
        reference = replay(directory / f"replay{seed}", world)
        digests = [
            [version.digest for version in site.run.versions[MODULE]] for site in (world.site, reference)
        ]
        assert digests[0] == digests[1], f"seed {seed}: the order of arrival shows in the bytes"
        for site in (world.site, reference):
            site.crash()
            shutil.rmtree(site.directory)
    assert set(faults) == FAULTS
    assert min(faults.values()) >= 10, faults


@pytest.mark.parametrize(
    "text",
    ["[topology]\nexperts = [1, 1]\nlevels_per_task = 1", "[topology]\nexperts = [1, 1]"],
    ids=["shards", "path"],
)
def test_paths_of_two_levels(directory: Path, text: str) -> None:
    for seed in range(100, 108):
        world = simulate(directory, seed, text)
        world.site.crash()


@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("", {"routes": "given", "policy": f"count = {COUNT}\nbackups = 1"}),
        ("", {"routes": "given", "policy": f"count = {COUNT}\ntarget = 2\npaths_quorum = 0.5"}),
        ("[paths]\nevaluate_every = 1\nearly_stop = 2", {"routes": "local", "policy": f"count = {COUNT}"}),
        ("", {"policy": f"count = {COUNT}\nbuffer = 3\ntarget = 4\nstaleness_max = 1"}),
        (
            "[paths]\nevaluate_every = 2",
            {"routes": "local", "policy": f"count = {COUNT}\nbuffer = 2\ntarget = 2\nsteps_by_speed = true"},
        ),
    ],
    ids=["grid", "grid with replicas", "local data", "asynchronous", "asynchronous grid"],
)
def test_paths_that_share_modules(directory: Path, text: str, more: dict[str, str]) -> None:
    for seed in range(200, 206):
        world = simulate(directory, seed, text, more=more)
        world.site.crash()
