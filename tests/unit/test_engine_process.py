"""How the merge process uses its cores."""

from __future__ import annotations

import numpy as np
import pytest
import torch

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
