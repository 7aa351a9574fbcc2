"""What a worker's process keeps at hand between tasks, whatever their purpose.

    <state>/key, member.json, worker.json   who this worker is (client.home)
    <state>/versions/<digest>               module versions that tasks started from, the newest few
    <state>/shards/<digest>.jsonl           documents of paths, where the coordinator gives them, the newest few
    <state>/routers/<digest>                routers, and in routes/ where they send this worker's documents
    <state>/runs/<run>/<path>/              AdamW's state, residuals, the position in the data (client.kept)
    <state>/outbox/                         updates on their way
    <state>/inner.checkpoint                how far the inner loop of the task in hand is
    <state>/uplink.json                     how fast finished uploads were

A base is loaded once and stays resident; of the data, that of the paths used last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Final

from blake3 import blake3

from weft.client.abilities import Ability, find_ability, least_of, training_bytes
from weft.client.bases import find_base
from weft.client.data import TokenDataset, dataset_of, sequences_of
from weft.client.device import available_bytes, check_memory
from weft.client.documents import Documents, Routes, RoutesFile, keep_newest
from weft.client.kept import PATHS_IN_MEMORY, PathStates
from weft.client.setup import Calls, Setup
from weft.client.tasks.inhand import Progress, TaskInHand, concerns_path
from weft.client.trainer.training import Trainer
from weft.client.uplink import Uplink
from weft.common.composition import ResidentBase, describe
from weft.common.errors import CorruptState, DataError
from weft.common.identity.files import private_directory
from weft.common.ids import Digest, ModuleKey, Path
from weft.common.manifest import Signed, parse_json
from weft.common.modules import Kind, Schema
from weft.common.protocol import BlobRef, Limit, Stage, Task
from weft.common.recipe import RECIPE_TYPE, Recipe, RoutingMode, TaskSettings
from weft.common.routing import Router, check_router, read_router
from weft.common.sequences import Sequences
from weft.common.settings import from_table

RECIPE_BYTES_MAX: Final = 4 << 20
VERSIONS_KEPT: Final = 8
SHARDS_KEPT: Final = 4
ROUTERS_KEPT: Final = 2


@dataclass(slots=True)
class RunOnWorker:
    """What a worker keeps of a run."""

    recipe: Recipe
    recipe_digest: Digest
    base_dir: FilePath
    states: PathStates
    schemas: dict[ModuleKey, Schema] = field(default_factory=dict)
    """Of all modules; known once something was loaded."""
    ability: Ability | None = None
    """What fits of it here; known then too."""
    trainer: Trainer | None = None
    shared: Sequences | None = None
    """All of the worker's data, where every path learns from it."""
    datasets: OrderedDict[tuple[Path, Digest | None], TokenDataset] = field(default_factory=OrderedDict)
    """Of the paths used last, by path and what their documents follow from."""

    def schemas_of(self, task: Task) -> dict[ModuleKey, Schema]:
        """Of the modules of a task, at its rank."""
        keys = [ModuleKey.parse(start.module) for start in task.modules]
        return {key: self.schemas[key].at_rank(task.rank) if task.rank else self.schemas[key] for key in keys}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a task's documents come from, on this machine."""

    shard: FilePath | None = None
    router: FilePath | None = None
    digest: Digest | None = None
    """Of the one of them that there is."""


class Workshop:
    """Recipes, bases, data and states of the runs that a worker serves.

    Args:
        me: Who works, with what.
        calls: The connection to the coordinator.
        say: Told what a person may like to know.
        clock: Monotonic seconds.
        pause: Waits that many seconds; may raise to break off.
    """

    def __init__(
        self,
        me: Setup,
        calls: Calls,
        *,
        say: Callable[[str], None],
        clock: Callable[[], float],
        pause: Callable[[float], object],
    ) -> None:
        self.me = me
        self.calls = calls
        self.say = say
        self.clock = clock
        self.uplink = Uplink(me.state / "uplink.json")
        self.tokens_per_s = 0.0
        """Of the last training; 0 before."""
        self.told: frozenset[str] = frozenset()
        """Runs whose limits the coordinator was told."""
        self._pause = pause
        self._runs: dict[str, RunOnWorker] = {}
        private_directory(me.state)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """What the coordinator should know before it gives out another task."""
        found = (run.ability.limit(run.recipe) for run in self._runs.values() if run.ability)
        return tuple(limit for limit in found if limit is not None)

    # ---- what is fetched -----------------------------------------------------------------------------------------

    def run_of(self, task: Task, on_bytes: Progress) -> RunOnWorker:
        """The run of a task, its recipe verified and its base on this machine.

        Raises:
            IdentityMismatch, CorruptState: The recipe is not the one that the task names.
            BaseModelError, NetworkError, StorageError: The base.
        """
        known = self._runs.get(task.run_id)
        if known is not None and known.recipe_digest == task.recipe_blake3:
            return known
        signed = self.calls.get_recipe(task.run_id)
        recipe = read_recipe(signed, self.me.coordinator_key)
        if recipe.run != task.run_id or blake3(signed.payload).hexdigest() != task.recipe_blake3:
            raise CorruptState(f"the recipe of run {task.run_id} is not the one that the task names")
        base_dir = self._base_dir(recipe, on_bytes)
        # A run that began anew under an old name has another recipe: nothing of the old one may be taken up.
        directory = self.me.state / "runs" / f"{recipe.run}-{task.recipe_blake3[:8]}"
        states = PathStates(directory, decay=recipe.codec.residual_decay)
        run = RunOnWorker(recipe, task.recipe_blake3, base_dir, states)
        self._runs[task.run_id] = run
        return run

    def _base_dir(self, recipe: Recipe, on_bytes: Progress) -> FilePath:
        return find_base(
            recipe.base,
            given=self.me.base,
            cache=self.me.bases(recipe.base.digest),
            source=self.calls,
            idle_s=recipe.idle_s,
            progress=on_bytes,
            pause=self._pause,
        )

    def versions_of(self, task: Task, run: RunOnWorker, on_bytes: Progress) -> dict[ModuleKey, FilePath]:
        """Files of the versions that a task starts from."""
        found = {}
        for start in task.modules:
            ref = BlobRef(blake3=start.blake3, size_bytes=start.size_bytes)
            found[ModuleKey.parse(start.module)] = self._fetch(ref, "versions", run, on_bytes)
        if found:
            keep_newest(self.me.state / "versions", set(found.values()), num_kept=VERSIONS_KEPT)
        return found

    def sources_of(self, task: Task, run: RunOnWorker, on_bytes: Progress) -> Sources:
        """What a task's documents come from; a shard that cannot be had raises OfPath."""
        if task.shard is not None and run.recipe.routing.mode is RoutingMode.GIVEN:
            with concerns_path():
                shard = self._fetch(task.shard, "shards", run, on_bytes, suffix=".jsonl")
            keep_newest(shard.parent, {shard}, num_kept=SHARDS_KEPT)
            return Sources(shard=shard, digest=task.shard.blake3)
        if task.router is not None and run.recipe.routing.mode is RoutingMode.LOCAL:
            router = self._fetch(task.router, "routers", run, on_bytes)
            keep_newest(router.parent, {router}, num_kept=ROUTERS_KEPT)
            return Sources(router=router, digest=task.router.blake3)
        return Sources()

    def _fetch(
        self, ref: BlobRef, room: str, run: RunOnWorker, on_bytes: Progress, *, suffix: str = ""
    ) -> FilePath:
        directory = self.me.state / room
        private_directory(directory)
        return self.calls.download(
            ref.blake3,
            directory / f"{ref.blake3}{suffix}",
            idle_s=run.recipe.idle_s,
            size_bytes=ref.size_bytes,
            progress=on_bytes,
        )

    # ---- what is loaded ------------------------------------------------------------------------------------------

    def ability_of(self, run: RunOnWorker) -> Ability:
        """How much of the run fits here; its modules are described at the first time.

        Raises:
            OutOfMemory: Not even the least of it fits.
            BaseModelError: The base cannot carry the run's modules.
        """
        if run.ability is None:
            run.schemas = describe(run.base_dir, run.recipe)
            run.ability = self._find_ability(run)
        return run.ability

    def _find_ability(self, run: RunOnWorker) -> Ability:
        me, topology = self.me, run.recipe.topology

        def needs(ability: Ability) -> int:
            return training_bytes(
                run.base_dir,
                run.recipe,
                run.schemas,
                ability,
                dtype=me.device.dtype,
                quantise=me.quantise,
                num_shares=me.num_shares,
            )

        # A base that is there already has taken its memory.
        is_loaded = _resident_key(run.recipe) in self.me.residents
        available = None if is_loaded else available_bytes(me.device.torch_device)
        check_memory(needs(least_of(topology)), available, quantise=me.quantise)
        found = find_ability(topology, rank_max=me.rank_max, needs=needs, available=available)
        assert found is not None  # noqa: S101 - the least was checked
        return found

    def resident_of(self, run: RunOnWorker) -> ResidentBase:
        """The run's base in memory, loaded once per process."""
        me, key = self.me, _resident_key(run.recipe)
        if key not in me.residents:
            me.residents[key] = me.load(
                run.base_dir,
                run.recipe.task,
                device=me.device.torch_device,
                dtype=me.device.dtype,
                kind=run.recipe.topology.kind,
                quantise=me.quantise,
            )
            self.say(f"base {run.recipe.base.digest[:12]} is loaded and stays resident")
        return me.residents[key]

    def own_data(self, run: RunOnWorker) -> FilePath:
        """This worker's data; raises DataError when it was started without."""
        if self.me.data is None:
            raise DataError(
                f"run {run.recipe.run} learns from its workers' own data, and this one has none",
                hint="join again with --data PATH: .txt, .jsonl, .parquet, or a directory",
            )
        return self.me.data

    def routes_of(self, run: RunOnWorker, sources: Sources, hand: TaskInHand, stage: Stage) -> Routes:
        """Where the run's router sends this worker's documents.

        Raises:
            RouterMismatch: It was fitted to another base, or to other paths.
            InputError: It is no router.
            DataError: The data cannot be read.
        """
        if sources.router is None or sources.digest is None:
            raise CorruptState(
                f"run {run.recipe.run} has its documents routed, and the task brings no router"
            )
        file, follow = sources.router, hand.follow(stage)
        resident = self.resident_of(run)

        def router() -> Router:
            found = read_router(file)
            check_router(found, run.recipe)
            return found

        kept = RoutesFile(self.me.state / "routes", self.own_data(run), run.recipe, sources.digest)
        return kept.read_or_make(resident, router, lambda num_documents: follow(num_documents, 0))

    def documents_of(self, run: RunOnWorker, sources: Sources, hand: TaskInHand) -> Documents:
        """The documents of a task's path."""
        mode, path = run.recipe.routing.mode, Path.parse(hand.task.path)
        if mode is RoutingMode.LOCAL:
            routes = self.routes_of(run, sources, hand, Stage.LOADING)
            return Documents(recipe=run.recipe, path=path, data=self.own_data(run), routes=routes)
        if mode is RoutingMode.GIVEN and sources.shard is None:
            raise CorruptState(f"run {run.recipe.run} gives its data, and the task brings no shard")
        return Documents(recipe=run.recipe, path=path, data=sources.shard or self.own_data(run))

    def dataset_of(self, run: RunOnWorker, sources: Sources, hand: TaskInHand) -> TokenDataset:
        """What a task's path learns from, in this worker's order.

        Raises:
            OfPath: It is too little, or what the coordinator gave cannot be read.
            DataError: This worker's own data cannot be read or, where all paths learn from it, are too little.
        """
        key = (Path.parse(hand.task.path), sources.digest)
        if key not in run.datasets:
            run.datasets[key] = self._make_dataset(run, sources, hand)
        run.datasets.move_to_end(key)
        while len(run.datasets) > PATHS_IN_MEMORY:
            run.datasets.popitem(last=False)
        return run.datasets[key]

    def _make_dataset(self, run: RunOnWorker, sources: Sources, hand: TaskInHand) -> TokenDataset:
        documents, recipe = self.documents_of(run, sources, hand), run.recipe
        tokenizer = self.resident_of(run).tokenizer
        # Paths that share their data visit it in different orders, or their modules would see each batch twice.
        worker = f"{self.me.worker_id} {hand.task.path}"
        if recipe.routing.mode is RoutingMode.NONE:
            if run.shared is None:
                run.shared = sequences_of(
                    documents.learnt(), tokenizer, recipe, on_tokenised=hand.on_tokenised
                )
                data = dataset_of(run.shared, recipe, worker=worker, where=documents.where)
                self._say_read(documents, run.shared)
                return data
            return dataset_of(run.shared, recipe, worker=worker, where=documents.where)
        with concerns_path():
            sequences = sequences_of(documents.learnt(), tokenizer, recipe, on_tokenised=hand.on_tokenised)
            data = dataset_of(sequences, recipe, worker=worker, where=documents.where)
        self._say_read(documents, sequences)
        return data

    def _say_read(self, documents: Documents, sequences: Sequences) -> None:
        self.say(f"{documents.where}: {sequences.num_tokens:,} tokens, {len(sequences):,} sequences")


def read_recipe(signed: Signed, coordinator_key: bytes) -> Recipe:
    """Verify a recipe, then read it strictly.

    Raises:
        IdentityMismatch, CorruptState: Not signed by the coordinator.
        InputError, UsageError: Signed, and not a recipe that this version reads.
    """
    payload = signed.open(coordinator_key, RECIPE_TYPE)
    return from_table(Recipe, parse_json(payload, RECIPE_BYTES_MAX))


def _resident_key(recipe: Recipe) -> tuple[Digest, TaskSettings, Kind]:
    return recipe.base.digest, recipe.task, recipe.topology.kind
