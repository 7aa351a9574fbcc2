"""What docs/merge.md says can be typed as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from tests.handmade import block_tensors, write_adapter, write_model
from tests.running import main

from weft.server.offline.mergekit import METHODS

PAGE = (Path(__file__).parents[2] / "docs/merge.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
MODELS = ("base", "math", "german", "code", "Llama-old", "Llama-new", "tuned", "a", "b", "c", "d")


def block(kind: str, holding: str) -> str:
    """The one block of a language that holds a text."""
    (found,) = [text for language, text in BLOCKS if language == kind and holding in text]
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with all that the page names."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in MODELS:
        write_model(tmp_path / name, block_tensors(rng, num_blocks=32))
    for name in ("one", "two"):
        shapes = rng.standard_normal((2, 3)), rng.standard_normal((4, 2))
        write_adapter(tmp_path / "adapters" / name, {"model.layers.0.mlp": shapes})
    (tmp_path / "recipe.toml").write_text(block("toml", 'dtype = "bf16"'))
    (tmp_path / "layers.toml").write_text(block("toml", "[[layers]]"))
    (tmp_path / "mergekit.yml").write_text(block("yaml", "merge_method"))
    (tmp_path / "score.py").write_text("print(1.0)")
    return tmp_path


@pytest.mark.parametrize("line", [line for line in COMMANDS if "--heldout" not in line])
def test_commands_of_the_page_run(line: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(line.replace("python score.py", f"{sys.executable} score.py"))
    assert words[0] == "weft"
    assert main(words[1:]) == 0, capsys.readouterr().err
    if "--to" in words:
        out = place / words[words.index("--to") + 1]
        assert json.loads((out / "merge.json").read_text())["tensors"]


def test_layers_of_the_page(place: Path) -> None:
    assert main(["merge", "layers.toml", "--to", "out"]) == 0
    merged, german, base = (
        load_file(place / name / "model.safetensors") for name in ("out", "german", "base")
    )
    np.testing.assert_array_equal(merged["model.layers.28.mlp.weight"], german["model.layers.28.mlp.weight"])
    np.testing.assert_array_equal(merged["lm_head.weight"], base["lm_head.weight"])


def test_methods_of_mergekit_are_the_ones_that_the_page_names() -> None:
    said = PAGE.partition("is taken as it is for ")[2].partition(":")[0]
    assert set(re.findall(r"`(\w+)`", said)) == set(METHODS)
