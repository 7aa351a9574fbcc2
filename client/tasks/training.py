"""A training task: inner steps on a path's modules, then one encoded, signed update of each module that is sent.

Where a run streams fragments, all modules of the path train whatever is sent (``weft.client.tasks.streaming``).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path as FilePath

from weft.client.kept import Ahead, PathState, Sent
from weft.client.loop import Event, TooMuch
from weft.client.tasks.inhand import Halted, TaskInHand
from weft.client.tasks.steps import Steps
from weft.client.tasks.streaming import take_up, to_carry, train_ahead, trained, with_ahead
from weft.client.trainer.checkpoint import InnerCheckpoint, binding_of
from weft.client.trainer.training import StepReport, Trainer, TrainResult
from weft.client.uplink import choose_codec
from weft.client.workshop import Workshop
from weft.common.blobs import storage_errors
from weft.common.codec import encode_update, seed_of
from weft.common.errors import OutOfMemory, UpdateRejected
from weft.common.identity.files import private_directory
from weft.common.ids import ModuleKey, Path
from weft.common.modules import Schema
from weft.common.protocol import BlobManifest, LossPoint, ModuleStart, Stage
from weft.common.statements import UpdateOfModule, UpdateStatement
from weft.common.tensors import Float32Array

Tensors = Mapping[str, Float32Array]


class TrainingSteps(Steps):
    """Train, encode, send."""

    def __init__(self, shop: Workshop, hand: TaskInHand) -> None:
        super().__init__(shop, hand)
        self._starts = {ModuleKey.parse(start.module): start for start in hand.task.modules}
        self._schemas: dict[ModuleKey, Schema] = {}
        self._trainer: Trainer | None = None
        self._state: PathState | None = None
        self._batches_before = 0
        self._result: TrainResult | None = None
        self._ahead: Ahead | None = None
        self._sent: dict[ModuleKey, Sent] = {}
        self._blobs: dict[ModuleKey, BlobManifest] = {}
        self._is_kept = False

    @property
    def _to_send(self) -> dict[ModuleKey, ModuleStart]:
        """The modules that an update is sent of."""
        return {key: start for key, start in self._starts.items() if start.train}

    @property
    def trainer(self) -> Trainer:
        """The run's, with the data of the task's path."""
        assert self._trainer is not None  # noqa: S101 - loaded before
        return self._trainer

    @property
    def state(self) -> PathState:
        """What is kept of the path."""
        assert self._state is not None  # noqa: S101 - loaded before
        return self._state

    @property
    def result(self) -> TrainResult:
        """What the training came to, steps that were done ahead of the task among them."""
        assert self._result is not None  # noqa: S101 - trained before
        return self._result

    # ---- load ----------------------------------------------------------------------------------------------------

    def load(self) -> Event | None:
        """Also read the path's documents and what is kept of it; a task that is too large goes back."""
        ability = self.shop.ability_of(self.run)
        if not ability.allows(self.task, self.run.recipe.topology):
            return self._too_much(
                f"this worker trains rank {ability.rank} of {ability.levels} modules at most"
            )
        super().load()
        self._schemas = self.run.schemas_of(self.task)
        self._state = self.run.states.of(Path.parse(self.task.path), self._schemas)
        data = self.shop.dataset_of(self.run, self.sources, self.hand)
        if self.run.trainer is None:
            resident = self.shop.resident_of(self.run)
            self.run.trainer = Trainer(
                resident,
                self.run.recipe,
                data,
                clock=self.shop.clock,
                gradients=self.shop.me.gradients,
            )
        # One trainer for all paths: it knows how large a batch fits.
        self.run.trainer.data = data
        self._trainer = self.run.trainer
        return None

    def _too_much(self, reason: str) -> Event:
        if self.task.run_id in self.shop.told:
            raise OutOfMemory(f"{reason}, and the coordinator, which was told so, asks for more")
        return TooMuch(reason)

    # ---- perform -------------------------------------------------------------------------------------------------

    def perform(self) -> Event | None:
        """Train, from where an earlier process of this worker was where there is a checkpoint of it."""
        ahead, task = self.state.ahead, self.task
        num_ahead = ahead.num_steps if ahead else 0
        wanted = max(1, task.num_steps - num_ahead)
        self._batches_before = self.state.num_batches
        first_batch = self._batches_before + num_ahead
        self.hand.reached(Stage.TRAINING, num_ahead, task.num_steps)
        result = self.trainer.train(
            self.start,
            {key: self._starts[key].steps_before + num_ahead for key in self._trained()},
            num_steps=wanted,
            first_batch=first_batch,
            optimiser_states=ahead.optimiser_states if ahead else self.state.optimiser_states,
            on_step=self._on_step(num_ahead),
            rank=task.rank,
            carried=self._carried(),
            checkpoint=self._checkpoint(first_batch),
        )
        if result.num_steps < wanted:
            raise Halted
        self._result = with_ahead(result, ahead)
        return None

    def _trained(self) -> Iterable[ModuleKey]:
        """The modules that move here, sent or not."""
        return self._starts if self.run.recipe.streaming else self._to_send

    def _carried(self) -> dict[str, Float32Array]:
        """The worker's own parameters to go on from; none where a task begins at its start."""
        streaming = self.run.recipe.streaming
        if streaming is None:
            return {}
        return take_up(self.state, self.start, self._starts, self._schemas, streaming)

    def _checkpoint(self, first_batch: int) -> InnerCheckpoint:
        me = self.shop.me
        return InnerCheckpoint(
            me.state / "inner.checkpoint",
            binding=binding_of(self.task, first_batch=first_batch),
            every_s=me.checkpoint_s,
            clock=self.shop.clock,
        )

    def _on_step(self, num_ahead: int) -> Callable[[StepReport], bool]:
        hand, shop, num_steps = self.hand, self.shop, self.task.num_steps
        first_step = num_ahead + max(start.steps_before for start in self._to_send.values())
        began_s, num_tokens = shop.clock(), 0

        def on_step(report: StepReport) -> bool:
            nonlocal num_tokens
            num_tokens += report.num_tokens
            hand.tokens_per_s = shop.tokens_per_s = num_tokens / max(1e-9, shop.clock() - began_s)
            loss = LossPoint(step=first_step + report.step, loss=report.loss)
            hand.reached(Stage.TRAINING, num_ahead + report.step, num_steps, (loss,))
            return hand.must_halt()

        return on_step

    # ---- encode, send --------------------------------------------------------------------------------------------

    def encode(self) -> Event | None:
        """Write the update of each module to send, in the codec that the line calls for."""
        self.hand.reached(Stage.ENCODING, 0, len(self._to_send))
        fisher = self._fisher()
        outbox = self.shop.me.state / "outbox"
        private_directory(outbox)
        with storage_errors(outbox):
            for index, key in enumerate(sorted(self._to_send), start=1):
                path = outbox / f"{self.task.task_id}-{self.task.lease_epoch}-{key}.update"
                self._sent[key] = self._encoded(key, path, fisher.get(key))
                self.hand.reached(Stage.ENCODING, index, len(self._to_send))
        return None

    def _encoded(self, key: ModuleKey, path: FilePath, fisher: Tensors | None) -> Sent:
        task, deltas, residual = self.task, self.result.deltas[key], self.state.residuals.get(key)
        corrected = residual.apply(deltas) if residual else deltas
        codec = choose_codec(self.run.recipe, self.shop.uplink.bytes_per_s)
        encoded = encode_update(
            path,
            self._schemas[key],
            corrected,
            codec,
            fisher=fisher,
            round_seed=seed_of(task.run_id, str(key), self._starts[key].round_number),
            worker_seed=seed_of(
                task.run_id, str(key), task.task_id, task.lease_epoch, self.shop.me.worker_id
            ),
        )
        if encoded.size_bytes > task.update_bytes_max:
            path.unlink()
            raise UpdateRejected(
                f"the update has {encoded.size_bytes} bytes and at most {task.update_bytes_max} are taken"
            )
        return Sent(schema=self._schemas[key], corrected=corrected, update=path, codec=codec)

    def _fisher(self) -> Mapping[ModuleKey, Tensors]:
        """The diagonal Fisher at the trained tensors, where the recipe asks for it."""
        recipe = self.run.recipe
        if not recipe.fisher.num_examples:
            return {}
        return self.trainer.fisher_diagonal(
            trained(self.start, self.result.deltas.values()),
            frozenset(self._to_send),
            num_examples=recipe.fisher.num_examples,
            first_example=self._batches_before * recipe.inner.batch_size,
            rank=self.task.rank,
        )

    def send(self) -> Event | None:
        """Send the updates; what has been sent is not sent again."""
        on_bytes = self.hand.on_bytes(Stage.SENDING)
        self.hand.reached(Stage.SENDING)
        for key, sent in self._sent.items():
            if key not in self._blobs:
                began_s = self.shop.clock()
                self._blobs[key] = self.shop.calls.upload(
                    sent.update, self.task.lease_token, idle_s=self.run.recipe.idle_s, progress=on_bytes
                )
                self.shop.uplink.took(self._blobs[key].size_bytes, self.shop.clock() - began_s)
        return None

    # ---- submit --------------------------------------------------------------------------------------------------

    def statement(self) -> UpdateStatement:
        """The updates, and how the training went."""
        task, result = self.task, self.result
        first, last = loss_summary(result.losses)
        return UpdateStatement(
            run=task.run_id,
            task=task.task_id,
            worker=self.shop.me.worker_id,
            epoch=task.lease_epoch,
            recipe=task.recipe_blake3,
            updates=tuple(
                UpdateOfModule(
                    module=start.module,
                    start_version=start.version,
                    digest=self._blobs[key].blake3,
                    size_bytes=self._blobs[key].size_bytes,
                )
                for key, start in self._to_send.items()
            ),
            num_steps=result.num_steps,
            num_tokens=result.num_tokens,
            loss_first=first,
            loss_last=last,
        )

    def accepted(self) -> None:
        """The path's state moves on and is saved."""
        states, result = self.run.states, self.result
        if not self._is_kept:
            first, last = loss_summary(result.losses)
            self.shop.say(
                f"update of {self.task.run_id} accepted: loss {first:.3f} → {last:.3f}, "
                f"{sum(blob.size_bytes for blob in self._blobs.values()):,} bytes"
            )
            carried = to_carry(self.start, result, self._starts) if self.run.recipe.streaming else {}
            states.advance(self.state, result, self._sent, carried)
            self._is_kept = True
        # Once more where the disk was full before.
        states.save(Path.parse(self.task.path), self.state, changed=self._trained())
        self._checkpoint(0).remove()

    def put_down(self) -> None:
        """Also remove the updates."""
        super().put_down()
        for sent in self._sent.values():
            sent.update.unlink(missing_ok=True)

    # ---- ahead of the next task ----------------------------------------------------------------------------------

    @property
    def can_train_ahead(self) -> bool:
        """Whether there is something to train while the update is on its way."""
        streaming = self.run.recipe.streaming if self._run else None
        return self._result is not None and self._num_ahead() > 0 and streaming is not None

    def _num_ahead(self) -> int:
        streaming = self.run.recipe.streaming
        # The next task trains at least one step of its own.
        return min(streaming.overlap_steps, self.task.num_steps - 1) if streaming else 0

    def train_ahead(self, is_over: Callable[[], bool]) -> None:
        """Go on from the trained parameters until ``is_over``, for as many steps as the recipe allows at most."""
        result = self.result
        self._ahead = train_ahead(
            self.trainer,
            trained(self.start, result.deltas.values()),
            {key: self._starts[key].steps_before + result.num_steps for key in self._trained()},
            result.optimiser_states,
            num_steps=self._num_ahead(),
            first_batch=self._batches_before + result.num_steps,
            rank=self.task.rank,
            is_over=is_over,
        )

    def keep_ahead(self) -> None:
        """Leave what was trained ahead to the path's next task, unless the update was dropped."""
        if self._is_kept:
            self.state.ahead = self._ahead


def loss_summary(losses: Sequence[float]) -> tuple[float, float]:
    """Mean of the first tenth and of the second half of a task's losses, nats."""
    return statistics.fmean(losses[: max(1, len(losses) // 10)]), statistics.fmean(losses[len(losses) // 2 :])
