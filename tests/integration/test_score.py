"""`weft eval`: bits per byte of bases and adapters."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import TEXT, tiny_recipe, write_tiny_base

from weft.client.device import Device
from weft.client.score import Scorer
from weft.common.composition import describe
from weft.common.errors import InputError, UsageError
from weft.common.export import write_peft
from weft.common.ids import ModuleKey
from weft.common.initial import initial_tensors

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


def quiet(num_done: int, num_total: int) -> None:
    """Progress is not looked at."""


def test_an_adapter_that_changes_nothing_scores_as_its_base(
    base: Path, data: list[Path], tmp_path: Path
) -> None:
    scorer = Scorer(data, base=str(base), sequence_length=16, device=CPU)
    bare = scorer.score(base, quiet)
    same = scorer.score(write_adapter(tmp_path / "same", base, trained=False), quiet)
    other = scorer.score(write_adapter(tmp_path / "other", base, trained=True), quiet)
    assert same.together.loss == pytest.approx(bare.together.loss, abs=1e-6)
    assert abs(other.together.loss - bare.together.loss) > 1e-4


def test_together_is_one_text(base: Path, data: list[Path]) -> None:
    scores = Scorer(data, base=None, sequence_length=16, device=CPU).score(base, quiet)
    assert [score.data for score in scores.results] == [str(path) for path in data]
    assert [score.num_bytes for score in scores.results] == [800, 1600]
    bits = sum(score.loss * score.num_labels for score in scores.results) / math.log(2)
    assert scores.together.bits_per_byte == pytest.approx(bits / 2400)


def test_an_adapter_whose_base_is_nowhere_says_so(base: Path, data: list[Path], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, trained=False)
    with pytest.raises(UsageError) as caught:
        Scorer(data, base=None, sequence_length=16, device=CPU).score(adapter, quiet)
    assert "--base" in caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", '{"task_type": "SEQ_CLS"}', '{"task_type": "CAUSAL_LM"}'])
def test_what_is_no_adapter_is_refused(base: Path, data: list[Path], tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    with pytest.raises(InputError):
        Scorer(data, base=str(base), sequence_length=16, device=CPU).score(tmp_path / "adapter", quiet)


def test_adapters_of_other_programs_are_read_by_their_own_settings(
    base: Path, data: list[Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", base, trained=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    scorer = Scorer(data[:1], base=str(base), sequence_length=16, device=CPU)
    before = scorer.score(adapter, quiet).together.loss
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 80.0}))
    assert scorer.score(adapter, quiet).together.loss != pytest.approx(before)
