"""How the merge process uses its cores, and what it is told of updates."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.harness import SCHEMA as MODULE_SCHEMA
from tests.harness import DeferredEngine, Site, fake_job, memory_directory, run_file

from weft.common.codec import UpdateFile
from weft.common.modules import Schema, TensorSpec
from weft.server import engine_process
from weft.server.merge.crew import Crew, Forked, Threads, can_fork
from weft.server.merge.engine import MergeReport, merge_module
from weft.server.merge.settings import MergeSettings
from weft.server.merge.tiles import Arrays, ArrayUpdate
from weft.server.outer import OuterSettings

SCHEMA = Schema((TensorSpec("weight", "F32", (300, 400)),))


@pytest.mark.skipif(not can_fork(), reason="processes are not forked here")
def test_a_large_merge_is_forked_and_a_small_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rng = np.random.default_rng(0)
    updates = [
        ArrayUpdate(
            worker_id=name, deltas=Arrays({"weight": rng.standard_normal((300, 400)).astype(np.float32)})
        )
        for name in "abc"
    ]
    seen: list[type] = []

    def merged(num_elements: int) -> bytes:
        sink = Arrays.shared(SCHEMA)

        def merge(crew: Crew) -> MergeReport:
            seen.append(type(crew))
            return merge_module(
                updates,
                Arrays.zeros(SCHEMA),
                SCHEMA,
                sink,
                settings=MergeSettings(),
                outer=OuterSettings(),
                crew=crew,
            )

        report = engine_process._by_all(merge, num_elements)
        assert [each.worker_id for each in report.contributions] == ["a", "b", "c"]
        return sink.arrays["weight"].tobytes()

    small, large = merged(0), merged(engine_process._FORKED_ELEMENTS)
    assert seen == [Threads, Forked]
    assert any(small)
    assert large == small


@pytest.fixture
def site() -> Iterator[Site]:
    directory = memory_directory()
    made = Site(directory, job=fake_job, make_engine=DeferredEngine)
    made.add_run(run_file(rounds="count = 1\nquorum = 2\ntarget = 2"))
    yield made
    made.crash()
    shutil.rmtree(directory)


def norm_in(path: Path) -> float:
    with UpdateFile(path, MODULE_SCHEMA) as file:
        tiles = [file.tile(spec.name, 0, spec.size) for spec in MODULE_SCHEMA.tensors]
    return float(np.linalg.norm(np.concatenate(tiles).astype(np.float64)))


def test_a_round_is_clipped_by_the_norms_that_were_measured_at_arrival(site: Site) -> None:
    for worker in site.workers("a", "b"):
        worker.work()
    assert isinstance(site.engine, DeferredEngine)
    ((job, _),) = site.engine.waiting
    norms = {item["worker_id"]: norm_in(Path(item["path"])) for item in job["updates"]}
    assert {item["worker_id"]: item["norm"] for item in job["updates"]} == pytest.approx(norms)
    largest = max(job["updates"], key=lambda item: norms[item["worker_id"]])
    found = engine_process.Jobs().run(job)["contributions"]
    assert {each["worker_id"]: each["parameter_norm"] for each in found} == pytest.approx(norms)
    largest["norm"] *= 1000  # as if it had been: nothing is measured again
    again = {each["worker_id"]: each for each in engine_process.Jobs().run(job)["contributions"]}
    assert again[largest["worker_id"]]["clip_factor"] < 0.002
