"""The loop over paths and outer steps: everything that learns, merges, routes or encodes is Weft's own.

A *shard* is what one worker trains a path on. Each round every shard is a task: ``Trainer.train`` from the path's
current modules; then each module is merged from the updates of the paths through it, and stepped by its outer
optimiser. AdamW's state stays with the shard, as it does on a worker.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath

import numpy as np
import numpy.typing as npt
import torch
from benchmarks.quality.corpus import Documents

from weft.client.data import TokenDataset
from weft.client.trainer.optimiser import OptimiserState
from weft.client.trainer.training import Trainer
from weft.common.codec.feedback import ErrorFeedback
from weft.common.codec.section import seed_of
from weft.common.codec.update import UpdateFile, encode_update
from weft.common.composition import ResidentBase, describe
from weft.common.evaluation import Evaluation, evaluate
from weft.common.ids import ModuleKey, Path
from weft.common.initial import initial_module
from weft.common.modules import Schema
from weft.common.recipe import Recipe
from weft.common.sequences import Sequences
from weft.server.merge.engine import OuterState, merge_module
from weft.server.merge.settings import MergeSettings, Weights
from weft.server.merge.tiles import Arrays, ArrayUpdate
from weft.server.outer import OuterSettings, outer_schema

Tensors = Mapping[str, npt.NDArray[np.float32]]
EVALUATION_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """What one worker trains one path on."""

    worker: str
    """Its name."""
    path: Path
    """Which path."""
    sequences: Sequences
    """Its documents."""
    validation: Sequences | None = None
    """Documents of it that are held out, for early stopping."""

    @property
    def num_documents(self) -> int:
        """What its updates weigh."""
        return len(self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How updates become versions."""

    merge: MergeSettings
    """The rule; its weights are equal, or else the sizes of the shards."""
    outer: OuterSettings
    """The outer optimiser."""
    dropped: float = 0.0
    """Share of the updates that are lost on their way."""
    encode: bool = False
    """Send updates through the recipe's codec, as files, and count their bytes."""
    seed: int = 0
    """Of the losses."""


@dataclass(slots=True)
class _Worker:
    shard: Shard
    trainer: Trainer
    states: Mapping[ModuleKey, OptimiserState] = field(default_factory=dict)
    feedback: dict[ModuleKey, ErrorFeedback] = field(default_factory=dict)


class Grid:
    """Modules in training.

    Args:
        resident: The base.
        base: Its directory.
        recipe: Topology, inner settings and codec.
        plan: Merging.
        shards: At least one for each path that is to move; any number for the same path.
    """

    def __init__(
        self, resident: ResidentBase, base: FilePath, recipe: Recipe, plan: Plan, shards: Sequence[Shard]
    ) -> None:
        self.recipe = recipe
        self.plan = plan
        self.schemas: Mapping[ModuleKey, Schema] = describe(base, recipe)
        self.versions: dict[ModuleKey, Tensors] = {
            key: initial_module(base, recipe, self.schemas, key) for key in recipe.topology.modules
        }
        self.rounds_done = 0
        self.bytes_sent = 0
        self._resident = resident
        self._outer: dict[ModuleKey, Arrays | None] = dict.fromkeys(self.versions)
        self._rng = np.random.default_rng([plan.seed, 77])
        self._workers: list[_Worker] = []
        self.assign(shards)

    def assign(self, shards: Sequence[Shard]) -> None:
        """Give the workers these shards; a worker known by name keeps its optimiser state."""
        before = {worker.shard.worker: worker for worker in self._workers}
        inner = self.recipe.inner
        workers = []
        for shard in shards:
            data = TokenDataset(
                shard.sequences, seed=inner.seed, worker=shard.worker, batch_size=inner.batch_size
            )
            trainer = Trainer(self._resident, self.recipe, data, clock=time.monotonic)
            known = before.get(shard.worker)
            worker = _Worker(shard, trainer)
            if known is not None:
                worker.states, worker.feedback = known.states, known.feedback
            workers.append(worker)
        self._workers = workers

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What the workers have."""
        return tuple(worker.shard for worker in self._workers)

    @property
    def num_workers(self) -> int:
        """Tasks of a round."""
        return len(self._workers)

    def tensors(self, path: Path) -> dict[str, npt.NDArray[np.float32]]:
        """All tensors of a path."""
        return {name: array for key in path.modules for name, array in self.versions[key].items()}

    def round(self) -> None:
        """One task for every shard, then one version for every module that got an update."""
        updates: dict[ModuleKey, list[tuple[Path, ArrayUpdate]]] = {key: [] for key in self.versions}
        for worker in self._workers:
            deltas = self._train(worker)
            if self._rng.random() < self.plan.dropped:
                continue
            for key, delta in deltas.items():
                sent = self._send(worker, key, delta) if self.plan.encode else delta
                weight = (
                    1.0 if self.plan.merge.weights is Weights.EQUAL else float(worker.shard.num_documents)
                )
                update = ArrayUpdate(worker_id=worker.shard.worker, deltas=Arrays(sent), weight=weight)
                updates[key].append((worker.shard.path, update))
        for key, arrived in updates.items():
            if arrived:
                self._merge(key, arrived)
        self.rounds_done += 1

    def evaluate(self, path: Path, sequences: Sequences, tensors: Tensors | None = None) -> Evaluation:
        """Losses of a path, or of tensors kept from earlier, on documents."""
        composed = self._resident.compose(self.recipe, tensors or self.tensors(path))
        return evaluate(composed, sequences, batch_size=EVALUATION_BATCH)

    def token_losses(self, path: Path, sequences: Sequences) -> npt.NDArray[np.float64]:
        """Nats of every label under a path, [N, T]; none may be ignored."""
        composed = self._resident.compose(self.recipe, self.tensors(path))
        batch = sequences.select(np.arange(len(sequences)))
        with torch.inference_mode():
            log_probs = composed.logits(batch).double().log_softmax(-1)
        labels = torch.from_numpy(batch.labels)[:, :, None]
        losses: npt.NDArray[np.float64] = -log_probs.gather(2, labels)[:, :, 0].numpy()
        return losses

    def _train(self, worker: _Worker) -> dict[ModuleKey, dict[str, npt.NDArray[np.float32]]]:
        path, steps = worker.shard.path, self.recipe.inner.steps
        done = self.rounds_done * steps
        result = worker.trainer.train(
            self.tensors(path),
            dict.fromkeys(path.modules, done),
            num_steps=steps,
            first_batch=done,
            optimiser_states=worker.states,
            on_step=lambda report: False,
        )
        worker.states = result.optimiser_states
        return result.deltas

    def _send(self, worker: _Worker, key: ModuleKey, delta: Tensors) -> dict[str, npt.NDArray[np.float32]]:
        """Through an update file, with error feedback where the codec keeps a residual; what arrives."""
        schema, codec = self.schemas[key], self.recipe.codec
        feedback = worker.feedback.setdefault(key, ErrorFeedback(schema))
        corrected = feedback.apply(delta) if codec.keeps_residual else dict(delta)
        with tempfile.TemporaryDirectory() as folder:
            file = FilePath(folder) / "update"
            encoded = encode_update(
                file,
                schema,
                corrected,
                codec,
                round_seed=seed_of("quality", str(key), self.rounds_done),
                worker_seed=seed_of("quality", str(key), self.rounds_done, worker.shard.worker),
            )
            self.bytes_sent += encoded.size_bytes
            if codec.keeps_residual:
                feedback.keep(corrected, file)
            arrived = {spec.name: np.zeros(spec.shape, np.float32) for spec in schema.tensors}
            with UpdateFile(file, schema) as update:
                for name, start, stop, values in update.tiles():
                    arrived[name].reshape(-1)[start:stop] = values
        return arrived

    def _merge(self, key: ModuleKey, arrived: Sequence[tuple[Path, ArrayUpdate]]) -> None:
        schema, outer = self.schemas[key], self.plan.outer
        following, state, next_state = Arrays.zeros(schema), None, None
        if outer.num_slots:
            next_state = Arrays.zeros(outer_schema(schema, outer))
            state = OuterState(before=self._outer[key], after=next_state)
        merge_module(
            [update for _, update in arrived],
            Arrays(dict(self.versions[key])),
            schema,
            following,
            settings=self.plan.merge,
            outer=outer,
            outer_state=state,
            scaling=self.recipe.topology.lora.scaling,
            num_paths=len({path for path, _ in arrived}),
        )
        self.versions[key], self._outer[key] = following.arrays, next_state


def shard_of(path: Path, documents: Documents, prefix: int, *, worker: str, batch_size: int) -> Shard:
    """All of ``documents`` as a path's shard, repeated where they are fewer than a batch."""
    repeats = -(-batch_size // max(1, len(documents)))
    indices = np.tile(np.arange(len(documents)), repeats)
    return Shard(worker=worker, path=path, sequences=documents.select(indices).sequences(prefix))
