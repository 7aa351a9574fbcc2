"""The worker: does what the loop says, with a transport, a trainer and a clock that it is given.

    <state>/key, member.json, worker.json   who this worker is (client.home)
    <state>/versions/<digest>               module versions it started from, the newest few
    <state>/outbox/                         updates on their way
    <state>/runs/<run>/                     per module AdamW's state and the codec's residual; batches seen

The base of a run is loaded once and stays resident; a run's data is tokenised once. AdamW's state, the residual and
the position in the data move on only when an update is accepted: what was dropped has not happened. They are saved
then, so that a worker that starts again goes on as the same one.

While a task is in hand a second thread reports how far it is, which keeps the lease, and takes note when the
coordinator says that the task is over; training then ends after its current step.
"""

from __future__ import annotations

import logging
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from blake3 import blake3

from weft.client.bases import find_base
from weft.client.data import TokenDataset, load_dataset
from weft.client.device import Device, available_bytes, check_memory, needed_bytes
from weft.client.heartbeat import Heartbeat, Reports
from weft.client.heartbeat import TaskProgress as TaskProgress
from weft.client.kept import RunOnWorker
from weft.client.loop import (
    UNTRAINED,
    Action,
    Done,
    Event,
    Failed,
    Life,
    Phase,
    Polled,
    StopRequested,
    after,
    next_action,
)
from weft.client.trainer.training import StepReport, Trainer, TrainResult
from weft.common.blobs import storage_errors
from weft.common.codec import encode_update
from weft.common.composition import Quantisation, ResidentBase, describe
from weft.common.errors import (
    CorruptState,
    UpdateRejected,
    WeftError,
)
from weft.common.identity.files import private_directory
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, ModuleKey, WorkerId
from weft.common.manifest import Signed, canonical_json, parse_json
from weft.common.modules import Schema
from weft.common.protocol import (
    BlobManifest,
    LossPoint,
    ModuleStart,
    PollAnswer,
    Receipt,
    Session,
    Stage,
    Task,
    Unable,
)
from weft.common.recipe import RECIPE_TYPE, Recipe, TaskSettings
from weft.common.settings import from_table, to_table
from weft.common.statements import UPDATE_TYPE, UpdateOfModule, UpdateStatement
from weft.common.tensors import Float32Array, open_module, to_float32

logger = logging.getLogger(__name__)

VERSIONS_KEPT: Final = 8
RECIPE_BYTES_MAX: Final = 4 << 20
AT_ONCE_S: Final = 0.5
"""A poll that is answered sooner was not held ..."""
ASK_AGAIN_S: Final = 2.0
"""... and is repeated after this pause."""
_WITHOUT_TRAINING: Final = UNTRAINED | {Phase.CONNECTING, Phase.POLLING}

Progress = Callable[[int, int], None]


class Calls(Reports, Protocol):
    """What a worker needs of the transport."""

    def open_session(self, worker_id: WorkerId, signing_key: SigningKey, pin: bytes) -> Session:
        """Open a session, kept and renewed from now on."""

    def poll_task(
        self, *, wait_s: float, unable: tuple[Unable, ...] = ..., tokens_per_s: float = ...
    ) -> PollAnswer:
        """Get work."""

    def submit_update(self, *, lease_token: str, statement: Signed) -> Receipt:
        """Hand in updates whose blobs were sent."""

    def release_task(self, *, lease_token: str, reason: str) -> None:
        """Give a lease back."""

    def get_recipe(self, run_id: str) -> Signed:
        """Get a run's recipe."""

    def upload(
        self, path: Path, lease_token: str, *, idle_s: float, progress: Progress | None = ...
    ) -> BlobManifest:
        """Send a file that belongs to a leased task."""

    def download(
        self,
        blake3: Digest,
        to: Path,
        *,
        idle_s: float,
        size_bytes: int | None = ...,
        progress: Progress | None = ...,
    ) -> Path:
        """Get a blob."""


class View(Protocol):
    """What follows a worker, to show it to a person."""

    def turn(self, action: Action) -> None:
        """The worker begins something."""

    def progress(self, progress: TaskProgress) -> None:
        """A task got further; called often."""

    def said(self, text: str) -> None:
        """Something to know, said once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Who works, with what, where: fixed for the life of a worker."""

    worker_id: WorkerId
    key: SigningKey
    pin: bytes
    """Of the coordinator, 32 bytes."""
    coordinator_key: bytes
    """Ed25519 public key that signs recipes, endorsed by the pinned authority."""
    state: Path
    """This worker's directory."""
    bases: Callable[[Digest], Path]
    """Where this machine caches a base."""
    data: Path
    """The training data."""
    base: Path | None
    """What ``--base`` named."""
    device: Device
    quantise: Quantisation = "none"


class _Halted(Exception):
    """Breaks off what is under way."""


@dataclass(slots=True)
class TaskInHand:
    """What has been done of a task."""

    task: Task
    heartbeat: Heartbeat
    run: RunOnWorker | None = None
    versions: dict[ModuleKey, Path] = field(default_factory=dict)
    start: dict[str, Float32Array] = field(default_factory=dict)
    result: TrainResult | None = None
    corrected: dict[ModuleKey, dict[str, Float32Array]] = field(default_factory=dict)
    """Deltas with the residual added, which the updates were encoded from."""
    updates: dict[ModuleKey, Path] = field(default_factory=dict)
    sent: dict[ModuleKey, BlobManifest] = field(default_factory=dict)
    tokens_per_s: float = 0.0

    @property
    def trained(self) -> tuple[ModuleStart, ...]:
        """The modules that the task trains."""
        return tuple(start for start in self.task.modules if start.train)


class Worker:
    """Works for one coordinator until it is stopped. ``request_stop`` may be called from any thread."""

    def __init__(
        self,
        me: Setup,
        calls: Calls,
        *,
        view: View,
        stop_waits: threading.Event,
        clock: Callable[[], float],
        chance: Callable[[], float],
        leave_when_finished: bool = False,
    ) -> None:
        """Prepare; nothing is sent yet.

        Args:
            me: Who works, with what.
            calls: The connection to the coordinator.
            view: Follows what happens.
            stop_waits: The event that ends the waits of ``calls``.
            clock: Monotonic seconds.
            chance: Uniform in [0, 1), spreads retries.
            leave_when_finished: End when the coordinator will never have work again.
        """
        self.life = Life(leave_when_finished=leave_when_finished)
        self._me = me
        self._calls = calls
        self._view = view
        self._stop_waits = stop_waits
        self._clock = clock
        self._chance = chance
        self._num_stops = 0
        self._woken = threading.Event()
        self._runs: dict[str, RunOnWorker] = {}
        self._residents: dict[tuple[Digest, TaskSettings], ResidentBase] = {}
        self._in_hand: TaskInHand | None = None
        self._tokens_per_s = 0.0
        self._actions: Mapping[Phase, Callable[[Action], Event]] = {
            Phase.CONNECTING: self._connect,
            Phase.POLLING: self._poll,
            Phase.RELEASING: self._release,
            **{phase: self._with_task(step) for phase, step in self._steps().items()},
        }
        private_directory(me.state)

    def run(self) -> Life:
        """Live; returns the life when it is over."""
        try:
            while (action := next_action(self.life)).phase is not Phase.GONE:
                self._view.turn(action)
                event = self._perform(action)
                if event is not None:
                    self.life = after(self.life, event, chance=self._chance())
                self._take_note_of_stops()
                if self.life.task is None:
                    self._put_down()
        finally:
            self._put_down()
        return self.life

    def request_stop(self) -> None:
        """Ask the worker to finish; the second time, to leave at once."""
        self._num_stops += 1
        if self._num_stops > 1 or self.life.phase in _WITHOUT_TRAINING:
            self._stop_waits.set()
        self._woken.set()

    # ---- the loop ------------------------------------------------------------------------------------------------

    def _perform(self, action: Action) -> Event | None:
        """Do it; None when the person broke it off."""
        try:
            if action.wait_s:
                self._pause(action.wait_s)
            return self._actions[action.phase](action)
        except _Halted:
            return self._in_hand.heartbeat.verdict if self._in_hand else None
        except WeftError as error:
            logger.debug("%s failed", action.phase.value, exc_info=True)
            return Failed(error)
        except Exception as error:
            # The one place that must not end with a bug: a worker is left alone for weeks.
            logger.exception("%s failed unexpectedly", action.phase.value)
            return Failed(WeftError(f"{type(error).__name__} while {action.phase.value}: {error}"))

    def _take_note_of_stops(self) -> None:
        self._woken.clear()
        while self.life.num_stops < self._num_stops and self.life.phase is not Phase.GONE:
            self.life = after(self.life, StopRequested())

    def _pause(self, seconds: float) -> None:
        """Wait; raises _Halted when the person or the coordinator wants something else meanwhile."""
        if self._woken.wait(seconds):
            raise _Halted
        self._check_halt()

    def _check_halt(self) -> None:
        if self._must_halt():
            raise _Halted

    def _must_halt(self) -> bool:
        """Whether what is under way is to be broken off."""
        if self._in_hand is not None and self._in_hand.heartbeat.verdict is not None:
            return True
        return self._num_stops > 1 or (self._num_stops > 0 and self.life.phase in _WITHOUT_TRAINING)

    def _put_down(self) -> None:
        """The task is no longer in hand: end its reports, remove its files."""
        if self._in_hand is not None:
            self._in_hand.heartbeat.end()
            for path in self._in_hand.updates.values():
                path.unlink(missing_ok=True)
            self._in_hand = None

    # ---- without a task ------------------------------------------------------------------------------------------

    def _connect(self, _: Action) -> Event:
        self._calls.open_session(self._me.worker_id, self._me.key, self._me.pin)
        return Done()

    def _poll(self, action: Action) -> Event:
        asked_at_s = self._clock()
        answer = self._calls.poll_task(
            wait_s=action.poll_wait_s, unable=action.unable, tokens_per_s=self._tokens_per_s
        )
        if answer.task is not None:
            self._in_hand = TaskInHand(answer.task, Heartbeat(self._calls, answer.task))
        elif (
            self._clock() - asked_at_s < AT_ONCE_S and after(self.life, Polled(answer)).phase is Phase.POLLING
        ):
            # A coordinator that does not hold the call must not be asked in circles.
            self._woken.wait(ASK_AGAIN_S)
        return Polled(answer)

    def _release(self, action: Action) -> Event:
        assert action.task is not None  # noqa: S101 - the loop says so
        self._calls.release_task(lease_token=action.task.lease_token, reason=action.reason[:200])
        return Done()

    # ---- the steps of a task -------------------------------------------------------------------------------------

    def _steps(self) -> Mapping[Phase, Callable[[TaskInHand], None]]:
        return {
            Phase.FETCHING: self._fetch,
            Phase.LOADING: self._load,
            Phase.TRAINING: self._train,
            Phase.ENCODING: self._encode,
            Phase.SENDING: self._send,
            Phase.SUBMITTING: self._submit,
        }

    def _with_task(self, step: Callable[[TaskInHand], None]) -> Callable[[Action], Event]:
        def act(_: Action) -> Event:
            assert self._in_hand is not None  # noqa: S101 - the loop says so
            self._check_halt()
            step(self._in_hand)
            return Done()

        return act

    def _reached(
        self, stage: Stage, num_done: int = 0, num_total: int = 0, losses: Sequence[LossPoint] = ()
    ) -> None:
        """Tell coordinator and view how far the task is."""
        assert self._in_hand is not None  # noqa: S101 - only steps of a task come here
        progress = TaskProgress(
            stage=stage,
            num_done=num_done,
            num_total=num_total,
            loss=losses[-1].loss if losses else None,
            tokens_per_s=self._in_hand.tokens_per_s,
        )
        self._in_hand.heartbeat.reached(progress, losses)
        self._view.progress(progress)

    def _on_bytes(self, stage: Stage) -> Progress:
        """Progress of one transfer after another, which breaks them off where need be."""
        before = last = 0

        def on_bytes(num_done: int, num_total: int) -> None:
            nonlocal before, last
            # A new transfer counts from zero: what is reported must grow, or it is no progress.
            before, last = before + (last if num_done < last else 0), num_done
            self._reached(stage, before + num_done, before + num_total)
            self._check_halt()

        return on_bytes

    def _fetch(self, work: TaskInHand) -> None:
        self._reached(Stage.FETCHING)
        on_bytes = self._on_bytes(Stage.FETCHING)
        work.run = self._run_of(work.task, on_bytes)
        directory = self._me.state / "versions"
        private_directory(directory)
        for start in work.task.modules:
            work.versions[ModuleKey.parse(start.module)] = self._calls.download(
                start.blake3,
                directory / start.blake3,
                idle_s=work.run.recipe.idle_s,
                size_bytes=start.size_bytes,
                progress=on_bytes,
            )
        _keep_newest(directory, set(work.versions.values()))

    def _run_of(self, task: Task, on_bytes: Progress) -> RunOnWorker:
        """The run with its recipe verified and its base on this machine."""
        known = self._runs.get(task.run_id)
        if known is not None and known.recipe_digest == task.recipe_blake3:
            return known
        signed = self._calls.get_recipe(task.run_id)
        recipe = read_recipe(signed, self._me.coordinator_key)
        if recipe.run != task.run_id or blake3(signed.payload).hexdigest() != task.recipe_blake3:
            raise CorruptState(f"the recipe of run {task.run_id} is not the one that the task names")
        # A run that began anew under an old name has another recipe: nothing of the old one may be taken up.
        state = self._me.state / "runs" / f"{recipe.run}-{task.recipe_blake3[:8]}"
        run = RunOnWorker(recipe, task.recipe_blake3, self._base_dir(recipe, on_bytes), state)
        self._runs[task.run_id] = run
        return run

    def _base_dir(self, recipe: Recipe, on_bytes: Progress) -> Path:
        return find_base(
            recipe.base,
            given=self._me.base,
            cache=self._me.bases(recipe.base.digest),
            source=self._calls,
            idle_s=recipe.idle_s,
            progress=on_bytes,
            pause=self._pause,
        )

    def _load(self, work: TaskInHand) -> None:
        run = work.run
        assert run is not None  # noqa: S101 - fetched before
        self._reached(Stage.LOADING)
        if run.trainer is None:
            run.schemas = describe(run.base_dir, run.recipe)
            resident = self._resident(run)
            run.recall()
            run.trainer = Trainer(resident, run.recipe, self._dataset(run, resident), clock=self._clock)
        for key, path in work.versions.items():
            work.start |= read_module(path, run.schemas[key])

    def _resident(self, run: RunOnWorker) -> ResidentBase:
        """The run's base in memory, loaded once per process."""
        key = (run.recipe.base.digest, run.recipe.task)
        if key not in self._residents:
            me = self._me
            needed = needed_bytes(run.base_dir, run.recipe, dtype=me.device.dtype, quantise=me.quantise)
            check_memory(needed, available_bytes(me.device.torch_device), quantise=me.quantise)
            self._residents[key] = ResidentBase.load(
                run.base_dir,
                run.recipe.task,
                device=me.device.torch_device,
                dtype=me.device.dtype,
                quantise=me.quantise,
            )
            self._view.said(f"base {key[0][:12]} is loaded and stays resident")
        return self._residents[key]

    def _dataset(self, run: RunOnWorker, resident: ResidentBase) -> TokenDataset:
        def on_tokenised(num_documents: int, num_tokens: int) -> None:
            self._reached(Stage.LOADING, num_documents)
            self._check_halt()

        data = load_dataset(
            self._me.data,
            resident.tokenizer,
            run.recipe,
            worker=self._me.worker_id,
            on_tokenised=on_tokenised,
        )
        self._view.said(f"{self._me.data}: {data.sequences.num_tokens:,} tokens, {len(data):,} sequences")
        return data

    def _train(self, work: TaskInHand) -> None:
        run, task = work.run, work.task
        assert run is not None  # noqa: S101 - loaded before
        assert run.trainer is not None  # noqa: S101
        steps_before = {ModuleKey.parse(start.module): start.steps_before for start in work.trained}
        first_step = max(steps_before.values())
        self._reached(Stage.TRAINING, 0, task.num_steps)
        began_s, num_tokens = self._clock(), 0

        def on_step(report: StepReport) -> bool:
            nonlocal num_tokens
            num_tokens += report.num_tokens
            work.tokens_per_s = self._tokens_per_s = num_tokens / max(1e-9, self._clock() - began_s)
            loss = LossPoint(step=first_step + report.step, loss=report.loss)
            self._reached(Stage.TRAINING, report.step, task.num_steps, (loss,))
            return self._must_halt()

        result = run.trainer.train(
            work.start,
            steps_before,
            num_steps=task.num_steps,
            first_batch=run.num_batches,
            optimiser_states={
                key: run.optimiser_states[key] for key in steps_before if key in run.optimiser_states
            },
            on_step=on_step,
        )
        if result.num_steps < task.num_steps:
            raise _Halted
        work.result = result

    def _encode(self, work: TaskInHand) -> None:
        run, result = work.run, work.result
        assert run is not None  # noqa: S101 - trained before
        assert result is not None  # noqa: S101
        self._reached(Stage.ENCODING, 0, len(result.deltas))
        fisher = self._fisher(work, run, result)
        outbox = self._me.state / "outbox"
        private_directory(outbox)
        with storage_errors(outbox):
            for index, (key, deltas) in enumerate(sorted(result.deltas.items()), start=1):
                path = outbox / f"{work.task.task_id}-{work.task.lease_epoch}-{key}.update"
                corrected = run.residuals[key].apply(deltas) if key in run.residuals else deltas
                encoded = encode_update(
                    path, run.schemas[key], corrected, run.recipe.codec, fisher=fisher.get(key)
                )
                if encoded.size_bytes > work.task.update_bytes_max:
                    raise UpdateRejected(
                        f"the update has {encoded.size_bytes} bytes and at most {work.task.update_bytes_max} are taken"
                    )
                work.corrected[key], work.updates[key] = corrected, path
                self._reached(Stage.ENCODING, index, len(result.deltas))

    def _fisher(
        self, work: TaskInHand, run: RunOnWorker, result: TrainResult
    ) -> Mapping[ModuleKey, Mapping[str, Float32Array]]:
        """The diagonal Fisher at the trained tensors, where the recipe asks for it."""
        num_examples = run.recipe.fisher.num_examples
        if not num_examples:
            return {}
        assert run.trainer is not None  # noqa: S101 - loaded before
        trained = dict(work.start)
        for deltas in result.deltas.values():
            trained |= {name: trained[name] + delta for name, delta in deltas.items()}
        return run.trainer.fisher_diagonal(
            trained,
            frozenset(result.deltas),
            num_examples=num_examples,
            first_example=run.num_batches * run.recipe.inner.batch_size,
        )

    def _send(self, work: TaskInHand) -> None:
        assert work.run is not None  # noqa: S101 - encoded before
        on_bytes = self._on_bytes(Stage.SENDING)
        self._reached(Stage.SENDING)
        for key, path in work.updates.items():
            if key not in work.sent:
                work.sent[key] = self._calls.upload(
                    path, work.task.lease_token, idle_s=work.run.recipe.idle_s, progress=on_bytes
                )

    def _submit(self, work: TaskInHand) -> None:
        statement = self._statement(work)
        payload = canonical_json(to_table(statement))
        signed = Signed.sign(self._me.key, UPDATE_TYPE, payload)
        self._calls.submit_update(lease_token=work.task.lease_token, statement=signed)
        self._view.said(
            f"update of {work.task.run_id} accepted: loss {statement.loss_first:.3f} → {statement.loss_last:.3f}, "
            f"{sum(blob.size_bytes for blob in work.sent.values()):,} bytes"
        )
        self._remember(work)

    def _statement(self, work: TaskInHand) -> UpdateStatement:
        result, task = work.result, work.task
        assert result is not None  # noqa: S101 - trained before
        first, last = loss_summary(result.losses)
        return UpdateStatement(
            run=task.run_id,
            task=task.task_id,
            worker=self._me.worker_id,
            epoch=task.lease_epoch,
            recipe=task.recipe_blake3,
            updates=tuple(
                UpdateOfModule(
                    module=start.module,
                    start_version=start.version,
                    digest=work.sent[ModuleKey.parse(start.module)].blake3,
                    size_bytes=work.sent[ModuleKey.parse(start.module)].size_bytes,
                )
                for start in work.trained
            ),
            num_steps=result.num_steps,
            num_tokens=result.num_tokens,
            loss_first=first,
            loss_last=last,
        )

    def _remember(self, work: TaskInHand) -> None:
        assert work.run is not None  # noqa: S101 - submitted before
        assert work.result is not None  # noqa: S101
        work.run.advance(work.result, work.corrected, work.updates)


def read_recipe(signed: Signed, coordinator_key: bytes) -> Recipe:
    """Verify a recipe, then read it strictly.

    Raises:
        IdentityMismatch, CorruptState: Not signed by the coordinator.
        InputError, UsageError: Signed, and not a recipe that this version reads.
    """
    payload = signed.open(coordinator_key, RECIPE_TYPE)
    return from_table(Recipe, parse_json(payload, RECIPE_BYTES_MAX))


def read_module(path: Path, schema: Schema) -> dict[str, Float32Array]:
    """The tensors of a version in float32; raises TensorFileError unless they are the schema's."""
    with open_module(path, schema) as file:
        return {spec.name: to_float32(file.array(spec.name), spec.dtype) for spec in schema.tensors}


def loss_summary(losses: Sequence[float]) -> tuple[float, float]:
    """Mean of the first tenth and of the second half of a task's losses, nats."""
    return statistics.fmean(losses[: max(1, len(losses) // 10)]), statistics.fmean(losses[len(losses) // 2 :])


def _keep_newest(directory: Path, keep: set[Path]) -> None:
    """Remove versions that are neither in use nor among the newest."""
    with storage_errors(directory):
        by_age = sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        for path in by_age[VERSIONS_KEPT:]:
            if path not in keep:
                path.unlink()
