"""The worker on paths: a state for each, three kinds of tasks, three sources of documents, ranks, fragments, a kill."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.stage import NUM_STEPS, Coordinator, Part, Site
from tests.tiny import tiny_recipe, write_tiny_base

from weft.client.heartbeat import TaskProgress
from weft.client.kept import PATHS_IN_MEMORY, Ahead
from weft.client.loop import Phase
from weft.client.tasks import training
from weft.client.tasks.streaming import train_ahead
from weft.client.trainer.training import Trainer
from weft.common.codec import CodecKind, CodecSettings, UpdateFile
from weft.common.errors import RoundClosed
from weft.common.ids import Digest, ModuleKey
from weft.common.modules import Kind, LoraSettings, Topology
from weft.common.protocol import Limit, Purpose, Stage
from weft.common.recipe import Recipe, RoutingMode, RoutingSettings, SlowUplink, StreamingSettings
from weft.common.routing import random_router, write_router

TERNARY = CodecSettings(kind=CodecKind.TERNARY, density=0.2)
FP32 = CodecSettings(kind=CodecKind.FP32)
GIVEN = RoutingSettings(mode=RoutingMode.GIVEN, validation_share=0.3)
LOCAL = RoutingSettings(mode=RoutingMode.LOCAL, validation_share=0.2)
WIDTH = 32
"""Of the microscopic base's hidden states."""

MakeSite = Callable[..., Site]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("paths") / "base")


def _write_documents(path: Path, count: int, words: str = "over and under the warp") -> Path:
    rows = [{"text": f"{words} {index} " * 6} for index in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_site(tmp_path: Path, base: Path) -> MakeSite:
    data = _write_documents(tmp_path / "data.jsonl", 60)

    def make(*plan: Part, experts: tuple[int, ...] = (1, 2), kind: Kind = Kind.LORA, **changes: Any) -> Site:
        lora = LoraSettings(rank=4, alpha=8.0)
        topology = Topology(experts=experts, kind=kind, lora=lora)
        recipe = dataclasses.replace(tiny_recipe(base), topology=topology, **changes)
        directory = tmp_path / f"site-{len([*tmp_path.iterdir()])}"
        directory.mkdir()
        site = Site(directory, Coordinator(directory, base, recipe), data, base)
        site.coordinator.plan = [*plan]
        return site

    return make


def _digests(site: Site) -> list[list[str]]:
    return [[update.digest for update in said.updates] for said in site.coordinator.accepted]


# ---- a state for each path ---------------------------------------------------------------------------------------


def test_a_path_goes_on_where_it_was_whatever_was_trained_in_between(make_site: MakeSite) -> None:
    """AdamW's state, residual and position are the path's; those used last are in memory, the others on disk."""
    others = [Part(path=f"0.{expert}") for expert in range(1, PATHS_IN_MEMORY + 1)]
    between = make_site(Part(path="0.0"), *others, Part(path="0.0"), experts=(1, 3), codec=TERNARY)
    alone = make_site(Part(path="0.0"), Part(path="0.0"), experts=(1, 3), codec=TERNARY)
    between.live()
    alone.live()
    first, second = _digests(alone)
    assert _digests(between)[0] == first
    assert _digests(between)[-1] == second
    assert first != second


def test_paths_that_share_their_data_see_it_in_different_orders(make_site: MakeSite) -> None:
    site = make_site(Part(path="0.0"), Part(path="0.1"))
    site.live()
    shared = [digests[0] for digests in _digests(site)]
    assert shared[0] != shared[1]
    assert sum("tokens" in line for line in site.view.lines) == 1


def test_full_modules_train_and_are_evaluated(make_site: MakeSite, tmp_path: Path) -> None:
    shard = _write_documents(tmp_path / "shard.jsonl", 40)
    given = Part(path="0.1", shard=shard)
    site = make_site(
        given, dataclasses.replace(given, purpose=Purpose.EVALUATE), kind=Kind.FULL, routing=GIVEN
    )
    assert site.live().num_accepted == 2
    delta = site.coordinator.delta(0, tmp_path, index=1)
    assert any(name.endswith("q_proj.weight") and np.abs(value).max() > 0 for name, value in delta.items())


# ---- purposes and documents --------------------------------------------------------------------------------------


def test_an_evaluation_says_the_loss_on_what_is_held_out(make_site: MakeSite, tmp_path: Path) -> None:
    shard = _write_documents(tmp_path / "shard.jsonl", 60)
    evaluation = Part(path="0.1", purpose=Purpose.EVALUATE, shard=shard)
    site = make_site(evaluation, Part(path="0.1", shard=shard), evaluation, routing=GIVEN)
    assert site.live().num_accepted == 3
    before, trained, after = site.coordinator.accepted
    assert before.validation_loss == after.validation_loss
    assert before.validation_labels == after.validation_labels > 0
    assert (before.updates, before.num_steps, trained.validation_loss) == ((), 0, None)
    assert before.validation_loss == pytest.approx(np.log(300), rel=0.2)
    stages = [stage for stage, _, _ in site.coordinator.reports]
    assert Stage.TRAINING in stages


def test_a_worker_routes_its_documents_and_tells_counts(make_site: MakeSite, tmp_path: Path) -> None:
    router = _write_router(tmp_path, make_site().coordinator.recipe)
    route = Part(purpose=Purpose.ROUTE, router=router)
    trains = Part(path="0.1", router=router)
    evaluates = dataclasses.replace(trains, purpose=Purpose.EVALUATE)
    site = make_site(route, trains, evaluates, routing=LOCAL)
    assert site.live().num_accepted == 3
    holdings = site.coordinator.accepted[0].holdings
    assert sorted(holding.path for holding in holdings) == ["0.0", "0.1"]
    assert sum(holding.num_documents for holding in holdings) == 60
    read = next(line for line in site.view.lines if "for path 0.1" in line)
    said = next(holding for holding in holdings if holding.path == "0.1")
    assert f" {said.num_sequences} sequences" in read
    assert site.coordinator.accepted[2].validation_labels > 0


def test_routes_are_kept_from_process_to_process(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = _write_router(tmp_path, make_site().coordinator.recipe)
    route = Part(purpose=Purpose.ROUTE, router=router)
    site = make_site(route, route, routing=LOCAL)
    site.coordinator.plan = [route]
    site.live()

    def unwanted(*_: object, **__: object) -> None:
        raise AssertionError("the documents were routed again")

    monkeypatch.setattr("weft.client.documents.route_documents", unwanted)
    site.coordinator.plan = [route, route]
    assert site.live().num_accepted == 1
    assert site.coordinator.accepted[0].holdings == site.coordinator.accepted[1].holdings


def _write_router(directory: Path, recipe: Recipe, *, base_digest: Digest | None = None) -> Path:
    router = random_router(
        paths=recipe.topology.paths, base_digest=base_digest or recipe.base.digest, width=WIDTH, seed=1
    )
    path = directory / "router"
    write_router(path, router)
    return path


def test_a_router_of_another_base_ends_the_run_here_and_names_both(
    make_site: MakeSite, tmp_path: Path
) -> None:
    other = Digest("f" * 64)
    router = _write_router(tmp_path, make_site().coordinator.recipe, base_digest=other)
    site = make_site(Part(purpose=Purpose.ROUTE, router=router), Part(), routing=LOCAL)
    site.live()
    assert other[:12] in site.coordinator.released[0]
    assert site.coordinator.recipe.base.digest[:12] in site.coordinator.released[0]
    assert site.coordinator.polled[-1][0].run_id == "tiny"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda shard, site: site.coordinator.vanished.add("shard.jsonl"), "there is no blob"),
        (lambda shard, site: shard.write_text('{"text": '), "is not JSON"),
        (lambda shard, site: shard.write_text('{"text": "short"}\n'), "one batch needs"),
    ],
    ids=["vanished", "damaged", "too-short"],
)
def test_a_shard_that_cannot_be_used_leaves_the_run_to_its_other_paths(
    make_site: MakeSite, tmp_path: Path, damage: Callable[[Path, Site], object], reason: str
) -> None:
    bad, good = tmp_path / "shard.jsonl", _write_documents(tmp_path / "good.jsonl", 40)
    _write_documents(bad, 40)
    site = make_site(Part(path="0.0", shard=bad), Part(path="0.1", shard=good), routing=GIVEN)
    damage(bad, site)
    assert site.live().num_accepted == 1
    assert reason in site.coordinator.released[0]
    assert site.coordinator.polled[-1] == ()


def test_nothing_is_evaluated_on_what_is_learnt(make_site: MakeSite) -> None:
    site = make_site(Part(path="0.0", purpose=Purpose.EVALUATE), Part(path="0.0"))
    assert site.live().num_accepted == 1
    assert "holds none of them out" in site.coordinator.released[0]


# ---- abilities ---------------------------------------------------------------------------------------------------


def test_a_worker_of_a_smaller_rank_trains_slices(make_site: MakeSite, tmp_path: Path) -> None:
    site = make_site(Part(path="0.0"), Part(path="0.0", rank=2), codec=TERNARY)
    site.rank_max = 2
    life = site.live()
    assert (life.num_accepted, life.troubles) == (1, {})
    assert site.coordinator.released == ["this worker trains rank 2 of 2 modules at most"]
    assert site.coordinator.limits == (Limit(run_id="tiny", rank_max=2, levels_max=0),)
    schema = site.coordinator.schemas[ModuleKey(0, 0)].at_rank(2)
    update = tmp_path / "update"
    update.write_bytes(site.coordinator.updates[Digest(site.coordinator.accepted[0].updates[0].digest)])
    with UpdateFile(update, schema) as file:
        assert any(file.tile(spec.name, 0, spec.size).any() for spec in schema.tensors)


def test_a_coordinator_that_asks_for_more_than_it_was_told_gets_nothing(make_site: MakeSite) -> None:
    site = make_site(Part(path="0.0"), Part(path="0.0"), Part(path="0.0"))
    site.rank_max = 2
    assert site.live().num_accepted == 0
    assert "was told so" in site.coordinator.released[1]


def test_a_slow_line_writes_with_its_own_codec(make_site: MakeSite, tmp_path: Path) -> None:
    site = make_site(Part(path="0.0"), slow_uplink=SlowUplink(below_mbit_s=1.0, codec=TERNARY))
    (site.directory / "state").mkdir(mode=0o700)
    (site.directory / "state" / "uplink.json").write_text("[1000.0]")
    site.live()
    said = site.coordinator.accepted[0].updates[0]
    update = tmp_path / "update"
    update.write_bytes(site.coordinator.updates[Digest(said.digest)])
    with UpdateFile(update, site.coordinator.schemas[ModuleKey.parse(said.module)]) as file:
        assert file.codec.kind is CodecKind.TERNARY


# ---- a kill within the inner loop --------------------------------------------------------------------------------


class Killed(BaseException):
    """The end of a process, as far as one process can play it."""


@pytest.mark.parametrize("streaming", [None, StreamingSettings(overlap_steps=0)], ids=["plain", "streaming"])
def test_a_worker_that_is_killed_within_the_inner_loop_does_no_step_twice(
    make_site: MakeSite, streaming: StreamingSettings | None
) -> None:
    parts = [Part(path="0.0", send=[0]), Part(path="0.0", send=[1])]
    whole = make_site(*parts, codec=TERNARY, streaming=streaming)
    whole.live()
    site = make_site(*parts, codec=TERNARY, streaming=streaming)
    site.checkpoint_s, site.clock = 0.0, lambda: 0.0
    steps: list[int] = []

    def kill(progress: TaskProgress) -> None:
        if progress.stage is Stage.TRAINING and progress.num_done:
            if len(steps) == NUM_STEPS + 2:
                steps.append(0)
                raise Killed
            steps.append(progress.num_done)

    site.view.on_progress = kill
    with pytest.raises(Killed):
        site.live()
    assert site.live().num_accepted == 1
    # The step during which it was killed was done, and not saved.
    assert steps == [1, 2, 3, 4, 1, 2, 0, 3, 4]
    assert _digests(site) == _digests(whole)
    assert not (site.directory / "state" / "inner.checkpoint").exists()


# ---- fragments ---------------------------------------------------------------------------------------------------


def _fragments(overlap_steps: int) -> dict[str, Any]:
    streaming = StreamingSettings(overlap_steps=overlap_steps, mixing=0.5)
    return {"experts": (1, 1), "codec": FP32, "streaming": streaming}


def test_what_is_not_sent_goes_on_in_the_next_task(make_site: MakeSite, tmp_path: Path) -> None:
    """Two tasks that send one module each move both as far as one task of twice the steps."""
    streams = make_site(Part(path="0.0", send=[0]), Part(path="0.0", send=[1]), **_fragments(0))
    streams.live()
    whole = make_site(Part(path="0.0", num_steps=2 * NUM_STEPS), experts=(1, 1), codec=FP32)
    whole.live()
    assert [[update.module for update in said.updates] for said in streams.coordinator.accepted] == [
        ["0.0"],
        ["1.0"],
    ]
    ours, theirs = (
        streams.coordinator.delta(1, tmp_path),
        whole.coordinator.delta(0, tmp_path, index=1),
    )
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], atol=2e-6)


def test_a_version_that_was_published_since_is_mixed_in(make_site: MakeSite, tmp_path: Path) -> None:
    key = ModuleKey(0, 0)
    site = make_site(Part(path="0.0", send=[0]), Part(path="0.0", send=[0], num_steps=1), **_fragments(0))
    coordinator = site.coordinator
    specs = coordinator.schemas[key].tensors
    published = {spec.name: np.full(spec.shape, 0.25, np.float32) for spec in specs}
    begun: list[dict[str, Any]] = []

    def publish() -> None:
        if coordinator.num_given == 1:
            coordinator.publish(key, published)

    coordinator.on_poll = publish
    train = Trainer.train

    def watched(self: Any, start: Any, *arguments: Any, **options: Any) -> Any:
        begun.append({**start, **options["carried"]})
        return train(self, start, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", watched)
        site.live()
    moved = coordinator.delta(0, tmp_path)
    for name, value in moved.items():
        local = begun[0][name] + value
        np.testing.assert_allclose(begun[1][name], 0.5 * local + 0.5 * published[name], atol=1e-6)


@pytest.mark.parametrize("dropped", [False, True], ids=["accepted", "dropped"])
def test_steps_ahead_of_a_task_count_towards_it(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dropped: bool
) -> None:
    """Training ahead while an update is on its way changes when steps are done, not what they come to."""
    parts = [Part(path="0.0", send=[level]) for level in (0, 1, 0)]
    waits = make_site(*parts, **_fragments(0))
    waits.live()
    overlaps = make_site(*parts, **_fragments(2))
    ahead: list[Ahead | None] = []
    done = threading.Event()

    def watched(*arguments: Any, **options: Any) -> Ahead | None:
        ahead.append(train_ahead(*arguments, **options))
        done.set()
        return ahead[-1]

    monkeypatch.setattr(training, "train_ahead", watched)
    upload = overlaps.coordinator.upload

    def slow_upload(*arguments: Any, **options: Any) -> Any:
        assert done.wait(20)
        done.clear()
        return upload(*arguments, **options)

    monkeypatch.setattr(overlaps.coordinator, "upload", slow_upload)
    if dropped:
        overlaps.coordinator.submit_errors = [RoundClosed("late")]
    assert overlaps.live().num_accepted == 3
    assert [item.num_steps for item in ahead if item] == [2] * (3 + dropped)
    assert [said.num_steps for said in overlaps.coordinator.accepted] == [NUM_STEPS] * 3
    for number in range(3):
        expected = waits.coordinator.delta(number, tmp_path)
        for name, value in overlaps.coordinator.delta(number, tmp_path).items():
            np.testing.assert_allclose(value, expected[name], atol=2e-5)
    assert overlaps.view.phases.count(Phase.TRAINING) == 3 + dropped
