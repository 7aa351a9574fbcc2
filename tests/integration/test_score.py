"""`weft eval`: bits per byte of bases and adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import TEXT, tiny_recipe, write_tiny_base

from weft.client.device import Device
from weft.client.grid import GridIndex, GridModule, write_grid
from weft.client.score import Scorer, ScoreSettings
from weft.common.blobs import manifest_of
from weft.common.composition import describe
from weft.common.errors import InputError, UsageError
from weft.common.export import write_peft
from weft.common.ids import ModuleKey
from weft.common.initial import initial_tensors
from weft.common.routing import random_router, write_router
from weft.common.tensors import write_module

CPU = Device(torch_device=torch.device("cpu"), dtype=torch.float32, name="test")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("score") / "base")


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "one.txt", tmp_path / "two.txt"]
    paths[0].write_text(TEXT[:800])
    paths[1].write_text(TEXT[300:1900])
    return paths


def write_adapter(to: Path, base: Path, *, trained: bool) -> Path:
    recipe = tiny_recipe(base)
    tensors = initial_tensors(describe(base, recipe)[ModuleKey(0, 0)], seed=0)
    if trained:
        tensors = {name: np.full_like(array, 0.05) for name, array in tensors.items()}
    write_peft(to, recipe, tensors, card="", base_name="base")
    return to


def scorer_of(data: list[Path], **settings: Any) -> Scorer:
    return Scorer(data, ScoreSettings(sequence_length=16, **settings), device=CPU)


def quiet(num_done: int, num_total: int) -> None:
    """Progress is not looked at."""


def test_an_adapter_that_changes_nothing_scores_as_its_base(
    base: Path, data: list[Path], tmp_path: Path
) -> None:
    scorer = scorer_of(data, base=str(base))
    bare = scorer.score(base, quiet)
    same = scorer.score(write_adapter(tmp_path / "same", base, trained=False), quiet)
    other = scorer.score(write_adapter(tmp_path / "other", base, trained=True), quiet)
    assert same.together.loss == pytest.approx(bare.together.loss, abs=1e-6)
    assert abs(other.together.loss - bare.together.loss) > 1e-4


def test_together_is_one_text(base: Path, data: list[Path]) -> None:
    scores = scorer_of(data).score(base, quiet)
    assert [score.data for score in scores.results] == [str(path) for path in data]
    assert [score.num_bytes for score in scores.results] == [800, 1600]
    bits = sum(score.loss * score.num_labels for score in scores.results) / math.log(2)
    assert scores.together.bits_per_byte == pytest.approx(bits / 2400)


def write_inert_grid(to: Path, base: Path) -> Path:
    """Two paths that change nothing, and a router that sends documents to both."""
    recipe = tiny_recipe(base, experts=(2,))
    schemas = describe(base, recipe)
    files, modules = to.parent / "files", {}
    files.mkdir()
    for key in recipe.topology.modules:
        path = files / str(key)
        write_module(path, initial_tensors(schemas[key], seed=0), schemas[key])
        modules[GridModule(module=str(key), version=0, blake3=manifest_of(path).blake3)] = path
    router = random_router(
        paths=recipe.topology.paths, base_digest=recipe.base.digest, width=32, seed=0, num_prefix_tokens=4
    )
    write_router(files / "router", router)
    index = GridIndex(recipe=recipe, base=str(base), modules=tuple(modules), router=router.digest)
    write_grid(to, index, modules=modules, router=files / "router")
    return to


def test_a_grid_that_changes_nothing_scores_as_its_base_without_the_same_tokens(
    base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "documents.jsonl"
    rows = [{"text": TEXT[start : start + 90]} for start in range(0, 1200, 60)]
    data.write_text("\n".join(map(json.dumps, rows)))
    grid = write_inert_grid(tmp_path / "grid", base)
    bare = scorer_of([data], prefix_tokens=4).score(base, quiet).together
    found = scorer_of([data], prefix_tokens=4).score(grid, quiet)
    score = found.together
    assert (score.num_labels, score.num_bytes) == (bare.num_labels, bare.num_bytes)
    # A window of the base may begin with the end of the document before.
    assert score.loss == pytest.approx(bare.loss, rel=1e-3)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert [item.path for item in found.results[0].paths] == ["0", "1"]
    assert sum(item.num_documents for item in found.results[0].paths) == len(rows)


@pytest.mark.parametrize(
    ("wanted", "option"),
    [({"sequence_length": 32}, "--sequence-length 16"), ({"prefix_tokens": 8}, "--prefix-tokens 4")],
)
def test_a_grid_is_judged_at_its_own_lengths(
    base: Path, data: list[Path], tmp_path: Path, wanted: dict[str, Any], option: str
) -> None:
    grid = write_inert_grid(tmp_path / "grid", base)
    with pytest.raises(UsageError) as caught:
        Scorer(data, ScoreSettings(**wanted), device=CPU).score(grid, quiet)
    assert caught.value.hint == f"use {option}"


def test_an_adapter_whose_base_is_nowhere_says_so(base: Path, data: list[Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, trained=False)
    with pytest.raises(UsageError) as caught:
        scorer_of(data).score(adapter, quiet)
    assert "--base" in caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", '{"task_type": "SEQ_CLS"}', '{"task_type": "CAUSAL_LM"}'])
def test_what_is_no_adapter_is_refused(base: Path, data: list[Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(InputError):
        scorer_of(data, base=str(base)).score(tmp_path / "adapter", quiet)


def test_adapters_of_other_programs_are_read_by_their_own_settings(
    base: Path, data: list[Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, trained=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scorer = scorer_of(data[:1], base=str(base))
    before = scorer.score(adapter, quiet).together.loss
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 80.0}))
    assert scorer.score(adapter, quiet).together.loss != pytest.approx(before)
