"""Running arms: shards, rounds, evaluation; every result is kept as a JSON file, so that a campaign resumes."""

# ruff: noqa: N803, N806
from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import numpy.typing as npt
from benchmarks.quality import arms
from benchmarks.quality.arms import Arm, Routing
from benchmarks.quality.base import Shape, load, pretrained_base, pretraining
from benchmarks.quality.corpus import Corpus, CorpusSettings, Documents
from benchmarks.quality.grid import Grid, Plan, Shard, shard_of

from weft.common.base import pin_base
from weft.common.codec import CodecSettings
from weft.common.composition import ResidentBase
from weft.common.evaluation import Evaluation
from weft.common.ids import Path, run_id
from weft.common.recipe import BasePin, InnerSettings, Recipe, TaskSettings
from weft.common.routing import Router, fit_discriminative, fit_kmeans, fit_product, random_router

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

HELDOUT_DOCUMENTS = 30
"""Of each domain."""
ROUTER_DOCUMENTS = 20
"""Of each domain, reserved for the discriminative router: neither trained on nor evaluated."""
DRIFTING_DOCUMENTS = 320
CHANGE = 1 / 24
"""Probability that a drifting document's domain is drawn anew, at each token behind the prefix."""
REROUTE_TOKENS = (64, 32, 16, 8)
"""How often the path is chosen; 64 are all that a document has behind its prefix, that is: once."""
_VALIDATION_SHARE = 0.25
_FEATURE_ROWS = 256


@dataclass(frozen=True, slots=True)
class Job:
    """One arm with one seed."""

    name: str
    arm: Arm
    seed: int

    def file(self, folder: FilePath) -> FilePath:
        """Where its result is kept."""
        return folder / "results" / f"{self.name}-{self.seed}-{self.arm.digest(self.seed)}.json"


def result(job: Job, folder: FilePath) -> dict[str, Any]:
    """The job's result, from its file, or else computed and written there."""
    file = job.file(folder)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        begin_s = time.process_time()
        found = synthetic(job, folder) | {"arm": job.name, "seed": job.seed}
        found["cpu_s"] = round(time.process_time() - begin_s, 2)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(found, indent=1))
        partial.rename(file)
    known: dict[str, Any] = json.loads(file.read_text())
    return known


def base_settings(job: Job) -> CorpusSettings:
    """The corpus that the job's base is pre-trained on; arms with less data begin with the same base."""
    usual = arms.SINGLE if job.arm.corpus.num_domains == 1 else arms.CORPUS
    return dataclasses.replace(usual, seed=job.seed)


def prepare(settings: CorpusSettings, folder: FilePath) -> FilePath:
    """Make the pre-trained base of a corpus, if it is not there yet; return its directory."""
    seed, shape = settings.seed, Shape()
    inner = pretraining(arms.BATCH_SIZE, arms.PRETRAINING_STEPS, learning_rate=4e-3, seed=seed)
    named = hashlib.blake2b(repr((settings, inner, shape)).encode(), digest_size=10).hexdigest()
    return pretrained_base(folder / "bases" / named, Corpus(settings), inner, shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class Material:
    """The documents of a run."""

    train: Documents
    """To learn from, and to fit the first router to."""
    heldout: Documents
    """To evaluate on."""
    reserved: Documents
    """For the discriminative router: neither of the others."""
    prefix: int
    """First tokens, which are read and neither learnt nor counted."""


def synthetic(job: Job, folder: FilePath) -> dict[str, Any]:
    """Train and evaluate an arm on the corpus of known entropy."""
    corpus = Corpus(dataclasses.replace(job.arm.corpus, seed=job.seed))
    material = Material(
        train=corpus.train,
        heldout=corpus.heldout(HELDOUT_DOCUMENTS),
        reserved=corpus.reserved(ROUTER_DOCUMENTS),
        prefix=corpus.settings.prefix,
    )
    base = prepare(base_settings(job), folder)
    inner = dataclasses.replace(job.arm.inner, seed=job.seed)
    run = Run(job.arm, material, base, inner, num_rounds=arms.STEPS // inner.steps)
    found = run.result()
    found["floor"], found["floor_inferred"] = corpus.floors(material.heldout)
    found["identified"] = corpus.identified(material.heldout)
    if job.arm.reroutes:
        found["reroute"] = run.rerouted(corpus.drifting(DRIFTING_DOCUMENTS, CHANGE))
        found["reroute_still"] = run.rerouted(material.heldout)
    return found


class Run:
    """An arm's training and what it comes to.

    Args:
        arm: How to train.
        material: On what.
        base: Directory of the pre-trained base.
        inner: Steps between merges, batch size, rate and seed.
        num_rounds: Merges.
    """

    def __init__(
        self, arm: Arm, material: Material, base: FilePath, inner: InnerSettings, *, num_rounds: int
    ) -> None:
        self.arm, self.material, self.seed = arm, material, inner.seed
        self.pin: BasePin = pin_base(base)
        self.resident: ResidentBase = load(base, TaskSettings(), arm.kind)
        self.recipe = Recipe(
            run=run_id("quality"),
            base=self.pin,
            topology=arm.topology,
            inner=inner,
            codec=arm.codec or CodecSettings(),
            num_rounds=num_rounds,
        )
        self.paths: tuple[Path, ...] = self.recipe.topology.paths
        self.rng = np.random.default_rng([inner.seed, 5])
        self.router = self._first_router()
        plan = Plan(
            merge=arm.merge,
            outer=arm.outer,
            dropped=arm.dropped,
            encode=arm.codec is not None,
            seed=inner.seed,
        )
        self.grid = Grid(self.resident, base, self.recipe, plan, self._shards())
        self.best: dict[Path, tuple[float, Mapping[str, Float32]]] = {}

    def result(self) -> dict[str, Any]:
        """Train and evaluate."""
        before = self.heldout().loss
        for _ in range(self.recipe.num_rounds):
            if self.arm.routing is Routing.DISCRIMINATIVE and self._is_time_to_reshard():
                self.router = self._discriminative()
                self.grid.assign(self._shards())
            self.grid.round()
            if self.arm.validates:
                self._validate()
        routes = self._routes(self.material.heldout)
        found: dict[str, Any] = {
            "loss": self.heldout().loss,
            "loss_before": before,
            "agreement": agreement(routes, self.material.heldout.domains_N),
            "traffic": np.bincount(routes, minlength=len(self.paths)).tolist(),
            "bytes_per_worker": self.grid.bytes_sent / self.grid.num_workers,
            "num_parameters": sum(self.grid.schemas[key].num_parameters for key in self.paths[0].modules),
        }
        if self.arm.validates:
            found["loss_best"] = self.heldout({path: best for path, (_, best) in self.best.items()}).loss
        return found

    # -- routing ---------------------------------------------------------------------------------------------

    def _first_router(self) -> Router | None:
        arm, digest = self.arm, self.pin.digest
        if arm.shards or arm.routing is Routing.GIVEN:
            return None
        features = self._features(self.material.train.tokens_NT)
        if arm.routing in {Routing.KMEANS, Routing.DISCRIMINATIVE}:
            return fit_kmeans(features, paths=self.paths, base_digest=digest, seed=self.seed)
        if arm.routing is Routing.RANDOM:
            width = features.shape[1]
            return random_router(paths=self.paths, base_digest=digest, width=width, seed=self.seed)
        return fit_product(features, topology=self.recipe.topology, base_digest=digest, seed=self.seed)

    def _is_time_to_reshard(self) -> bool:
        """After a quarter of the rounds, once, as in all of DiPaCo's main results."""
        return self.grid.rounds_done == self.recipe.num_rounds // 4

    def _discriminative(self) -> Router:
        reserved = self.material.reserved
        sequences = reserved.sequences(self.material.prefix)
        losses_NP = np.stack([self.grid.evaluate(path, sequences).losses for path in self.paths], 1)
        assert self.router is not None
        return fit_discriminative(self._features(reserved.tokens_NT), losses_NP, like=self.router)

    def _features(self, tokens_NT: Int64) -> Float32:
        prefix = self.material.prefix
        rows = [
            tokens_NT[start : start + _FEATURE_ROWS, :prefix]
            for start in range(0, len(tokens_NT), _FEATURE_ROWS)
        ]
        return np.concatenate([self.resident.features(part, np.full(len(part), prefix)) for part in rows])

    def _routes(self, documents: Documents) -> Int64:
        """Index of each document's path."""
        if self.arm.shards:
            return np.zeros(len(documents), np.int64)
        if self.router is None:
            return documents.domains_N
        return self.router.route(self._features(documents.tokens_NT))[:, 0]

    def _shards(self) -> list[Shard]:
        train = self.material.train
        if self.arm.shards:
            parts = np.array_split(self.rng.permutation(len(train)), self.arm.shards)
            return [
                self._shard(self.paths[0], train.select(part), f"worker-{index}")
                for index, part in enumerate(parts)
            ]
        routes = self._routes(train)
        return [
            self._shard(path, train.select(np.flatnonzero(routes == index)), f"path-{path}")
            for index, path in enumerate(self.paths)
            if (routes == index).any()
        ]

    def _shard(self, path: Path, documents: Documents, worker: str) -> Shard:
        prefix, batch_size = self.material.prefix, self.recipe.inner.batch_size
        if not self.arm.validates:
            return shard_of(path, documents, prefix, worker=worker, batch_size=batch_size)
        order = np.random.default_rng([self.seed, 6]).permutation(len(documents))
        held = max(1, round(_VALIDATION_SHARE * len(documents)))
        shard = shard_of(path, documents.select(order[held:]), prefix, worker=worker, batch_size=batch_size)
        return dataclasses.replace(shard, validation=documents.select(order[:held]).sequences(prefix))

    # -- evaluation ------------------------------------------------------------------------------------------

    def heldout(self, kept: Mapping[Path, Mapping[str, Float32]] | None = None) -> Evaluation:
        """Losses of the held-out documents in their order, each under its path, or under what was kept of it."""
        documents = self.material.heldout
        routes = self._routes(documents)
        losses, num_labels = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
        for index, path in enumerate(self.paths):
            mine = np.flatnonzero(routes == index)
            if len(mine):
                tensors = None if kept is None else kept.get(path)
                sequences = documents.select(mine).sequences(self.material.prefix)
                found = self.grid.evaluate(path, sequences, tensors)
                losses[mine], num_labels[mine] = found.losses, found.num_labels
        return Evaluation(losses=losses, num_labels=num_labels, num_bytes=0)

    def _validate(self) -> None:
        """Keep each path as it was when its validation loss was lowest (DiPaCo, section 2.7)."""
        for shard in self.grid.shards:
            assert shard.validation is not None
            loss = self.grid.evaluate(shard.path, shard.validation).loss
            if shard.path not in self.best or loss < self.best[shard.path][0]:
                self.best[shard.path] = loss, self.grid.tensors(shard.path)

    def rerouted(self, documents: Documents) -> dict[str, float]:
        """Loss when the path is chosen anew every W tokens from the 32 tokens before."""
        assert self.router is not None
        prefix, length = self.material.prefix, documents.tokens_NT.shape[1]
        everything = documents.sequences(prefix=1)
        losses_PNT = np.stack([self.grid.token_losses(path, everything) for path in self.paths])
        found = {}
        for every in REROUTE_TOKENS:
            chosen = []
            for start in range(prefix, length, every):
                window_NT = documents.tokens_NT[:, start - prefix : start]
                routes_N = self.router.route(self._features(window_NT))[:, 0]
                # Position t of the losses is that of token t + 1.
                span = slice(start - 1, min(start + every, length) - 1)
                chosen.append(losses_PNT[routes_N, np.arange(len(documents)), span])
            found[str(every)] = float(np.concatenate(chosen, 1).mean())
        return found


def agreement(routes: Sequence[int] | Int64, domains: Sequence[int] | Int64) -> float:
    """Share of documents that are in the path where most of their domain are, each path for one domain at most."""
    from scipy.optimize import linear_sum_assignment

    counts = np.zeros((int(np.max(routes)) + 1, int(np.max(domains)) + 1))
    np.add.at(counts, (np.asarray(routes), np.asarray(domains)), 1)
    rows, columns = linear_sum_assignment(-counts)
    return float(counts[rows, columns].sum() / counts.sum())
