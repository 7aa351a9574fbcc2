"""A coordinator in one directory under virtual time, and workers that really sign, encode and upload.

Only the merge process is replaced: a function of the start and the updates, so that no torch is needed and a
merged module says exactly which updates went into it, and in which order.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from weft.common.blobs import FILES, BlobStore, Files, manifest_of
from weft.common.codec import UpdateFile, encode_update, seed_of
from weft.common.errors import WeftError
from weft.common.identity.authority import CoordinatorIdentity
from weft.common.identity.session import SESSION_TYPE, session_statement
from weft.common.identity.signing import SigningKey
from weft.common.identity.token import JoinToken, join_proof
from weft.common.ids import Digest, ModuleKey, TaskId, WorkerId
from weft.common.manifest import Signed, canonical_json
from weft.common.modules import Schema, TensorSpec, Topology
from weft.common.protocol import (
    CHUNK_BYTES,
    BlobManifest,
    PollAnswer,
    ProgressAnswer,
    Purpose,
    Receipt,
    Role,
    Stage,
    Task,
    Unable,
)
from weft.common.recipe import BaseFile, BasePin
from weft.common.routing import RoutedDocument, random_router, write_router, write_shards
from weft.common.sequences import Row
from weft.common.settings import to_table
from weft.common.statements import (
    JOIN_TYPE,
    UPDATE_TYPE,
    Holding,
    JoinStatement,
    UpdateOfModule,
    UpdateStatement,
)
from weft.common.tensors import Float32Array, open_module, write_module, write_tensors
from weft.server.backend import Caller
from weft.server.coordinator import Coordinator
from weft.server.engine import Engine, InlineEngine
from weft.server.roster import OPERATOR, Roster
from weft.server.rounds import Accepted
from weft.server.run import Run
from weft.server.runfile import RunFile, parse_run_file
from weft.server.store.ledger import Ledger, StateLock

SCHEMA = Schema(
    (
        TensorSpec("model.layers.0.q_proj.lora_A.weight", "F32", (2, 8)),
        TensorSpec("model.layers.0.q_proj.lora_B.weight", "F32", (6, 2)),
    )
)
JobRunner = Callable[[dict[str, Any]], dict[str, Any]]


class VirtualClock:
    """Both clocks; they move when a test says so."""

    def __init__(self) -> None:
        self.wall = 1_800_000_000.0
        self.seconds = 1000.0

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.seconds

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.seconds += seconds

    def jump(self, seconds: float) -> None:
        """What NTP does: only the wall clock moves."""
        self.wall += seconds


class DeferredEngine:
    """Jobs wait until the test runs them, in the order that the test wants."""

    def __init__(self, run: JobRunner) -> None:
        self._run = run
        self.waiting: list[tuple[dict[str, Any], Future[dict[str, Any]]]] = []

    def submit(self, job: dict[str, Any]) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        self.waiting.append((job, future))
        return future

    def step(self, index: int = 0) -> None:
        job, future = self.waiting.pop(index)
        try:
            result = self._run(job)
        except WeftError as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    def close(self) -> None:
        self.waiting.clear()


def fake_job(job: dict[str, Any]) -> dict[str, Any]:
    """``merge``: the start and what the updates add to it. ``gate``: slightly better.

    The sum forgets a little with every update, so that the order in which they are given shows in the bytes.
    """
    if job["job"] == "gate":
        return {
            "losses": {
                "before": 2.0,
                "after": 1.9,
                "difference": -0.1,
                "half_width": 0.05,
                "num_sequences": 8,
            }
        }
    with open_module(Path(job["start"]), SCHEMA) as start:
        merged = {spec.name: np.array(start.array(spec.name)) for spec in SCHEMA.tensors}
    for item in job["updates"]:
        with UpdateFile(Path(item["path"]), SCHEMA) as update:
            for spec in SCHEMA.tensors:
                delta = update.tile(spec.name, 0, spec.size).reshape(spec.shape)
                merged[spec.name] = np.float32(0.9) * merged[spec.name] + np.float32(item["weight"]) * delta
    write_module(Path(job["candidate"]), merged, SCHEMA)
    result: dict[str, Any] = {"candidate": job["candidate"], "clipped": [], "truncation_error": None}
    if job["outer"]["name"] == "nesterov":
        if job["outer_state"]:
            assert Path(job["outer_state"]).is_file(), "the outer state of the parent version is gone"
        write_module(Path(job["outer_state_to"]), {key: 2 * value for key, value in merged.items()}, SCHEMA)
        result["outer_state"] = job["outer_state_to"]
    return result


def run_file(
    text: str = "", *, name: str = "alpha", rounds: str = "count = 3\nquorum = 2\ntarget = 2"
) -> RunFile:
    """A small run; ``text`` adds sections."""
    inner = "[inner]\nsteps = 4\nbatch_size = 1\nsequence_length = 8"
    codec = '[codec]\nkind = "fp32"'
    head = f'[run]\nname = "{name}"\n[base]\nsource = "base"\n[rounds]\n{rounds}\n{inner}\n'
    return parse_run_file(head + (codec if "[codec]" not in text else "") + "\n" + text)


@cache
def worker_key(name: str) -> SigningKey:
    """The same key for the same name, so that ids and order are the same in two sites."""
    return SigningKey(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


@cache
def keys_of(now: float) -> dict[str, bytes]:
    """One coordinator identity for all sites: making one costs as much as a whole test."""
    with tempfile.TemporaryDirectory() as directory:
        keys = Path(directory) / "keys"
        CoordinatorIdentity.create_or_load(keys, ["localhost"], datetime.fromtimestamp(now, UTC))
        return {path.name: path.read_bytes() for path in keys.iterdir()}


@dataclass
class Site:
    """A state directory, and the coordinator that runs on it now."""

    directory: Path
    clock: VirtualClock = field(default_factory=VirtualClock)
    files: Files = FILES
    job: JobRunner = fake_job
    make_engine: Callable[[JobRunner], Engine] = InlineEngine
    life: str = ""
    """Names a process's turn on the directory, where several have one."""
    engine: Engine = field(init=False)
    ledger: Ledger = field(init=False)
    blobs: BlobStore = field(init=False)
    coordinator: Coordinator = field(init=False)
    lock: StateLock = field(init=False)

    def __post_init__(self) -> None:
        self._seed = 0
        for part in ("", "base", "scratch", "out"):
            (self.directory / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        keys = self.directory / "keys"
        if not keys.exists():
            keys.mkdir(mode=0o700)
            for name, data in keys_of(VirtualClock().wall).items():
                (keys / name).write_bytes(data)
                (keys / name).chmod(0o600)
        (self.directory / "base" / "config.json").write_bytes(b"{}")
        self.open()

    def open(self) -> None:
        """Start a coordinator on the directory."""
        self.lock = StateLock(self.directory)
        now = datetime.fromtimestamp(VirtualClock().wall, UTC)
        identity = CoordinatorIdentity.create_or_load(self.directory / "keys", ["localhost"], now)
        self.ledger = Ledger(self.directory / "ledger.sqlite")
        self.blobs = BlobStore(self.directory / "blobs", self.files)
        self.engine = self.make_engine(self.job)
        roster = Roster(self.ledger, identity, self.clock, rng_bytes=self.rng_bytes)
        self.pin = identity.pin
        self.coordinator = Coordinator(
            name="test",
            ledger=self.ledger,
            blobs=self.blobs,
            scratch=self.directory / "scratch",
            identity=identity,
            roster=roster,
            engine=self.engine,
            clock=self.clock,
            rng_bytes=self.rng_bytes,
        )

    def rng_bytes(self, size: int) -> bytes:
        """Bytes that never repeat within the directory's life."""
        self._seed += 1
        return hashlib.shake_128(f"{self.life}/{self._seed}/{self.clock.seconds}".encode()).digest(size)

    def crash(self) -> None:
        """What kill -9 leaves: nothing is closed in order, the lock is free."""
        self.ledger.close()
        self.lock.release()

    def restart(self) -> None:
        """Crash and start again on the same directory."""
        self.crash()
        self.open()

    @property
    def run(self) -> Run:
        return next(iter(self.coordinator.runs.values()))

    @property
    def operator(self) -> Caller:
        return Caller(worker_id=OPERATOR, role=Role.ADMIN, runs=(), peer="")

    def add_run(self, wanted: RunFile) -> None:
        """Start a run whose version 0 is zeros in A and B."""
        prepared = prepare(wanted, self.directory / "scratch")
        self.coordinator.add_run(wanted, base_pin(self.directory / "base"), self.directory / "base", prepared)

    def token(self, **wanted: Any) -> str:
        """A join token, as its text."""
        settings: dict[str, Any] = {
            "request_id": self.rng_bytes(8).hex(),
            "role": Role.WORKER,
            "ttl_s": 0.0,
            "num_uses": 0,
            "needs_approval": False,
            "runs": (),
            "label": "",
        }
        return str(bare(self.coordinator.create_token(self.operator, **(settings | wanted))))

    def workers(self, *names: str) -> list[Worker]:
        """Workers who joined and have a session."""
        token = self.token(num_uses=1000)
        members = [Worker(self, name) for name in names]
        for member in members:
            member.join(token)
            member.open_session()
        return members

    def current(self, module: str = "0.0") -> Any:
        return self.run.current(ModuleKey.parse(module))

    def accepted(self) -> list[tuple[str, int, str, str]]:
        """Every accepted update in a round: module, round, worker, digest."""
        return [
            (str(round_.module), round_.number, update.worker_id, update.update_digest)
            for run in self.coordinator.runs.values()
            for rounds in run.rounds.values()
            for round_ in rounds
            for update in round_.updates
        ]


def bare(answer: Any) -> Any:
    """The value of an answer that has only one."""
    return next(iter(answer.values()), None) if isinstance(answer, dict) else answer


def base_pin(directory: Path) -> BasePin:
    """A base of one file."""
    found = manifest_of(directory / "config.json")
    file = BaseFile(name="config.json", size_bytes=found.size_bytes, digest=found.blake3)
    return BasePin(digest=Digest("0" * 64), files=(file,))


def prepare(wanted: RunFile, to: Path) -> dict[str, Any]:
    """What the engine's ``prepare`` job answers."""
    files = {}
    for module in wanted.topology.modules:
        path = to / f"{wanted.name}-{module}-0.module"
        start = {spec.name: np.full(spec.shape, module.level, np.float32) for spec in SCHEMA.tensors}
        write_module(path, start, SCHEMA)
        files[str(module)] = str(path)
    return {
        "files": files,
        "schemas": {str(module): to_table(SCHEMA.tensors) for module in wanted.topology.modules},
    }


def accepted_update(
    worker: str, *, duration_s: float = 100.0, task: str = "", path: tuple[int, ...] = (0,), start: int = 0
) -> Accepted:
    """An update as a round remembers it."""
    return Accepted(
        worker_id=WorkerId(worker),
        task_id=TaskId(task or f"t-{worker}"),
        epoch=1,
        update_digest=Digest("0" * 64),
        size_bytes=1,
        weight=1.0,
        num_tokens=1,
        num_steps=1,
        norm=1.0,
        loss=1.0,
        duration_s=duration_s,
        accepted_at=0.0,
        experts=path,
        start_version=start,
    )


def routed(directory: Path, experts: tuple[int, ...], *, mode: str = "local", seed: int = 0) -> str:
    """Sections of a run file over several paths, with a router (and shards, in mode given) below ``directory``."""
    topology = Topology(experts=experts)
    router = random_router(paths=topology.paths, base_digest=Digest("0" * 64), width=4, seed=seed)
    path = directory / f"{mode}{seed}.router"
    write_router(path, router)
    sections = f'[topology]\nexperts = {list(experts)}\n[routing]\nmode = "{mode}"\nrouter = "{path}"\n'
    if mode == "local":
        return sections
    rows = (
        RoutedDocument(
            row=Row({"text": f"text {number}"}, where=""),
            routes=(number % len(router.paths),),
            scores=np.zeros(1),
        )
        for number in range(4 * len(router.paths))
    )
    write_shards(directory / f"shards{seed}", rows, router, overlap=1, validation_share=0.0, router_share=0.0)
    return f'{sections}shards = "{directory / f"shards{seed}"}"\n'


def chunks_of(path: Path) -> Iterator[bytes]:
    """The file in pieces of the protocol's size."""
    data = path.read_bytes()
    return (data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES))


def deltas(seed: str) -> dict[str, Float32Array]:
    """An update that follows from its seed alone."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big"))
    return {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in SCHEMA.tensors}


class Worker:
    """One worker of a site. Its updates follow from its name, the module and the start version."""

    def __init__(self, site: Site, name: str) -> None:
        self.site = site
        self.name = name
        self.key = worker_key(name)
        self.worker_id = ""
        self.session = ""
        self.holdings: tuple[Holding, ...] = ()
        """What it says when it is asked to route its documents."""
        self.validation_loss: Callable[[Task], float | None] = lambda task: 2.0

    # --- who ---

    def join_request(self, token_text: str) -> dict[str, Any]:
        token = JoinToken.parse(token_text)
        claim = JoinStatement(public_key=self.key.public.hex(), nonce="n", display_name=self.name)
        statement = Signed.sign(self.key, JOIN_TYPE, canonical_json(to_table(claim)))
        proof = join_proof(token, hashlib.sha256(statement.payload).digest())
        return {"token_id": token.token_id, "statement": statement, "proof": proof}

    def join(self, token_text: str, *, peer: str = "10.0.0.1") -> Any:
        joined = self.site.coordinator.join(peer, **self.join_request(token_text))
        self.worker_id = joined.worker_id
        return joined

    def session_proof(self) -> Signed:
        nonce = bare(self.site.coordinator.start_session("peer", worker_id=self.worker_id))
        payload = session_statement(nonce, self.site.pin, self.worker_id)  # type: ignore[arg-type]
        return Signed.sign(self.key, SESSION_TYPE, payload)

    def open_session(self) -> None:
        answer = self.site.coordinator.open_session(
            "peer", worker_id=self.worker_id, statement=self.session_proof()
        )
        self.session = answer.session_token

    @property
    def caller(self) -> Caller:
        return self.site.coordinator.authenticate(self.session)

    # --- work ---

    def poll(self, *, unable: tuple[Unable, ...] = ()) -> PollAnswer:
        return self.site.coordinator.poll_task(self.caller, unable=unable, tokens_per_s=0.0)

    def task(self) -> Task:
        task = self.poll().task
        assert task is not None
        return task

    def report(
        self, task: Task, *, stage: Stage = Stage.TRAINING, done: int = 1, total: int = 4
    ) -> ProgressAnswer:
        return self.site.coordinator.report_progress(
            self.caller,
            lease_token=task.lease_token,
            stage=stage,
            num_done=done,
            num_total=total,
            tokens_per_s=10.0,
            losses=(),
        )

    def encode(self, task: Task, *, salt: str = "") -> dict[str, Path]:
        """The update file of each module that the task trains."""
        paths = {}
        for start in task.modules:
            if start.train:
                path = self.site.directory / "out" / f"{self.name}-{task.task_id}-{start.module}{salt}"
                seed = f"{self.name}/{task.run_id}/{task.path}/{start.module}/{start.version}{salt}"
                codec = self.site.coordinator.runs[task.run_id].recipe.codec
                round_seed = seed_of(task.run_id, start.module, start.round_number)
                encode_update(path, SCHEMA, deltas(seed), codec, round_seed=round_seed)
                paths[start.module] = path
        return paths

    def upload(self, task: Task, path: Path) -> BlobManifest:
        blob = manifest_of(path)
        coordinator, caller = self.site.coordinator, self.caller
        missing = coordinator.find_missing(caller, lease_token=task.lease_token, blob=blob)
        pieces = list(chunks_of(path))
        for index in missing.missing:
            coordinator.put_chunk(
                caller, lease_token=task.lease_token, blake3=blob.blake3, index=index, data=pieces[index]
            )
        coordinator.commit_blob(caller, lease_token=task.lease_token, blake3=blob.blake3)
        return blob

    def statement(
        self, task: Task, blobs: dict[str, BlobManifest], changes: dict[str, Any] | None = None
    ) -> Signed:
        """The signed statement of a task; ``changes`` forge fields of it."""
        starts = {start.module: start.version for start in task.modules}
        trains, evaluates = task.purpose is Purpose.TRAIN, task.purpose is Purpose.EVALUATE
        table = to_table(
            UpdateStatement(
                run=task.run_id,
                task=task.task_id,
                worker=self.worker_id,  # type: ignore[arg-type]
                epoch=task.lease_epoch,
                recipe=task.recipe_blake3,
                updates=tuple(
                    UpdateOfModule(
                        module=module,
                        start_version=starts[module],
                        digest=blob.blake3,
                        size_bytes=blob.size_bytes,
                    )
                    for module, blob in blobs.items()
                ),
                num_steps=task.num_steps if blobs else 0,
                num_tokens=task.num_steps * 8,
                loss_first=3.0 if trains else 0.0,
                loss_last=2.5 if trains else 0.0,
                validation_loss=self.validation_loss(task) if evaluates else None,
                validation_labels=8 if evaluates else 0,
                holdings=self.holdings if task.purpose is Purpose.ROUTE else (),
            )
        )
        return Signed.sign(self.key, UPDATE_TYPE, canonical_json(table | (changes or {})))

    def submit(self, task: Task, statement: Signed) -> Receipt:
        return self.site.coordinator.submit_update(
            self.caller, lease_token=task.lease_token, statement=statement
        )

    def ready(self, task: Task, *, salt: str = "") -> Signed:
        """Train, encode and upload; the statement to submit."""
        self.report(task, stage=Stage.SENDING)
        return self.statement(
            task, {key: self.upload(task, path) for key, path in self.encode(task, salt=salt).items()}
        )

    def work(self, task: Task | None = None) -> Receipt:
        """A whole task."""
        task = task or self.task()
        return self.submit(task, self.ready(task))


def write_update(path: Path, arrays: dict[str, Float32Array]) -> Path:
    """A tensor file that says it is no update."""
    write_tensors(path, arrays)
    return path


def memory_directory() -> Path:
    """A directory where fsync costs nothing: what is tested is the order of things, not the disk."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(dir=shared if shared.is_dir() else None))
