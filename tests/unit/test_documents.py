"""Which documents a path learns from, which are held out, and what is told of them."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.tiny import tiny_tokenizer

from weft.client.data import sequences_of
from weft.client.documents import ROUTES_KEPT, Documents, Routes, RoutesFile, holdings_of, keep_newest
from weft.common.errors import DataError
from weft.common.ids import Digest, run_id
from weft.common.ids import Path as PathOfModules
from weft.common.modules import Topology
from weft.common.recipe import BasePin, InnerSettings, Recipe, RoutingMode, RoutingSettings
from weft.common.routing import Router, random_router
from weft.common.tensors import write_tensors

TOPOLOGY = Topology(experts=(2, 2))
WIDTH = 4


class Base:
    """A base that sees the tokens themselves."""

    def __init__(self) -> None:
        self.tokenizer: Any = tiny_tokenizer()
        self.num_seen = 0

    def features(
        self, tokens: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        self.num_seen += len(tokens)
        mask = np.arange(tokens.shape[1]) < lengths[:, None]
        sums = [(np.where(mask, tokens, 0) * (column + 1)).sum(1) for column in range(WIDTH)]
        return np.stack(sums, axis=1).astype(np.float32)


def _recipe(mode: RoutingMode, *, overlap: int = 1, batch_size: int = 4) -> Recipe:
    return Recipe(
        run=run_id("tiny"),
        base=BasePin(digest=Digest("0" * 64)),
        topology=TOPOLOGY,
        inner=InnerSettings(batch_size=batch_size, sequence_length=16),
        routing=RoutingSettings(mode=mode, overlap=overlap, validation_share=0.25),
    )


LOCAL = _recipe(RoutingMode.LOCAL)


def _router() -> Router:
    return random_router(paths=TOPOLOGY.paths, base_digest=Digest("0" * 64), width=WIDTH, seed=3)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"row {index}: over and under, row by row"} for index in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _tensor_file(tensors: dict[str, npt.NDArray[np.int64]]) -> bytes:
    buffer = io.BytesIO()
    write_tensors(buffer, tensors)
    return buffer.getvalue()


def _texts(rows: Any) -> list[str]:
    return [row.columns["text"] for row in rows]


def _routes(tmp_path: Path, data: Path, recipe: Recipe, base: Base) -> Routes:
    kept = RoutesFile(tmp_path / "routes", data, recipe, Digest("1" * 64))
    return kept.read_or_make(base, _router, lambda num_documents: None)


def test_without_routing_every_path_learns_from_everything(data: Path) -> None:
    recipe = _recipe(RoutingMode.NONE)
    documents = Documents(recipe=recipe, path=TOPOLOGY.paths[0], data=data)
    assert len(_texts(documents.learnt())) == 200
    with pytest.raises(DataError, match="holds none of them out"):
        documents.heldout()


def test_a_shard_is_learnt_or_held_out(data: Path) -> None:
    documents = Documents(recipe=_recipe(RoutingMode.GIVEN), path=TOPOLOGY.paths[0], data=data)
    learnt, heldout = _texts(documents.learnt()), _texts(documents.heldout())
    assert len(learnt) + len(heldout) == 200
    assert not set(learnt) & set(heldout)
    assert 25 < len(heldout) < 75
    assert _texts(documents.heldout()) == heldout


@pytest.mark.parametrize("overlap", [1, 2])
def test_own_documents_go_to_their_best_paths(tmp_path: Path, data: Path, overlap: int) -> None:
    recipe = _recipe(RoutingMode.LOCAL, overlap=overlap)
    routes = _routes(tmp_path, data, recipe, Base())
    seen: Counter[str] = Counter()
    heldout: set[str] = set()
    for path in TOPOLOGY.paths:
        documents = Documents(recipe=recipe, path=path, data=data, routes=routes)
        seen.update([*_texts(documents.learnt()), *_texts(documents.heldout())])
        heldout.update(_texts(documents.heldout()))
        assert not heldout & set(_texts(documents.learnt()))
    assert set(seen.values()) == {overlap}
    assert len(seen) == 200


def test_holdings_say_what_each_path_would_learn_from(tmp_path: Path, data: Path) -> None:
    base = Base()
    routes = _routes(tmp_path, data, LOCAL, base)
    reported: list[int] = []
    holdings = holdings_of(data, routes, LOCAL, base.tokenizer, reported.append)
    assert sum(holding.num_documents for holding in holdings) == 200
    assert reported == [200]
    for holding in holdings:
        path = PathOfModules.parse(holding.path)
        documents = Documents(recipe=LOCAL, path=path, data=data, routes=routes)
        assert holding.num_sequences == len(sequences_of(documents.learnt(), base.tokenizer, LOCAL)) > 4


def test_a_path_with_too_little_for_a_batch_has_nothing_to_train_on(tmp_path: Path, data: Path) -> None:
    base, recipe = Base(), _recipe(RoutingMode.LOCAL, batch_size=1000)
    routes = _routes(tmp_path, data, recipe, base)
    holdings = holdings_of(data, routes, recipe, base.tokenizer, lambda _: None)
    assert {holding.num_sequences for holding in holdings} == {0}
    routes[:] = 2
    (only,) = holdings_of(data, routes, recipe, base.tokenizer, lambda _: None)
    assert (only.path, only.num_documents) == ("1.0", 200)


def test_routes_are_computed_once_for_the_same_data_and_router(tmp_path: Path, data: Path) -> None:
    base = Base()
    routes = _routes(tmp_path, data, LOCAL, base)
    assert np.array_equal(_routes(tmp_path, data, LOCAL, base), routes)
    assert base.num_seen == 200
    with data.open("a") as file:
        file.write('{"text": "one more"}\n')
    assert len(_routes(tmp_path, data, LOCAL, base)) == 201
    two = _routes(tmp_path, data, _recipe(RoutingMode.LOCAL, overlap=2), base)
    assert two.shape == (201, 2)


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\xff" * 64,
        _tensor_file({"routes": np.full((200, 1), 4)}),
        _tensor_file({"routes": np.zeros((200, 2), np.int64)}),
        _tensor_file({"roots": np.zeros((200, 1), np.int64)}),
    ],
    ids=["empty", "noise", "unknown-path", "other-overlap", "other-tensor"],
)
def test_damaged_routes_are_computed_anew(
    tmp_path: Path, data: Path, damaged: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    base = Base()
    routes = _routes(tmp_path, data, LOCAL, base)
    (file,) = (tmp_path / "routes").iterdir()
    file.write_bytes(damaged)
    assert np.array_equal(_routes(tmp_path, data, LOCAL, base), routes)
    assert "routed anew" in caplog.text
    assert base.num_seen == 400


def test_data_without_a_document_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no document"):
        _routes(tmp_path, tmp_path / "empty.jsonl", LOCAL, Base())


def test_the_newest_files_stay_and_those_in_use(tmp_path: Path) -> None:
    for age in range(6):
        (tmp_path / f"{age}").write_text("")
        os.utime(tmp_path / f"{age}", (1000 - age, 1000 - age))
    keep_newest(tmp_path, {tmp_path / "5"}, num_kept=ROUTES_KEPT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "2", "3", "5"]
