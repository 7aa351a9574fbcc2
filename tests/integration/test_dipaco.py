"""DiPaCo from a corpus to text: route, shard, serve, train two grids, watch, pull, generate, verify; over real TLS.

A grid of full modules over given data and one of LoRA modules over the workers' own data are trained once, by the
fixture; each test looks at one side of what came out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.running import OPERATORS, Hand, Site, eventually, main, operator_home, working, write_run

from weft.common.composition import ResidentBase
from weft.common.ids import ModuleKey, RunId
from weft.common.ids import Path as ModulePath
from weft.common.recipe import TaskSettings
from weft.common.routing import read_router
from weft.server.engine_process import Jobs, read_module

ROUNDS = 2
PATHS = ("0.0", "0.1", "1.0", "1.1")
TOPICS = {
    "warp": "the warp is held fixed on the loom and ",
    "digits": "1 2 3 5 8 13 21 34 55 89 ",
    "shout": "OVER AND UNDER, ROW BY ROW! ",
    "code": "for (i = 0; i < n; i++) { x[i] = y[i]; } ",
}
FULL = """
[task]
prefix_tokens = 8
[topology]
kind = "full"
experts = [2, 2]
[outer]
name = "nesterov"
[merge]
rescale = "sqrt_paths"
weights = "shard"
[paths]
evaluate_every = 1
[routing]
mode = "given"
router = "grid.router"
shards = "shards"
validation_share = 0.3
[gate]
heldout = "shards/heldout"
tolerance = 10.0
"""
LORA = """
[task]
prefix_tokens = 8
[topology]
kind = "lora"
experts = [2, 2]
[outer]
name = "nesterov"
[codec]
kind = "ternary"
density = 0.2
[routing]
mode = "local"
router = "grid.router"
validation_share = 0.2
[paths]
evaluate_every = 1
"""


@dataclass
class Finished:
    """What is left when both runs are done."""

    site: Site
    hands: tuple[Hand, ...]
    directory: Path


def write_corpus(directory: Path) -> Path:
    """Four kinds of documents, which differ from their first tokens on."""
    rows = [
        {"text": f"{text * 4}{number} {text * (3 + number % 3)}"}
        for number in range(16)
        for text in TOPICS.values()
    ]
    path = directory / "corpus.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def finished(tiny_base: Path, jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    directory = tmp_path_factory.mktemp("dipaco")
    corpus, router = write_corpus(directory), directory / "grid.router"
    fit = ["route", "fit", str(corpus), "--base", str(tiny_base), "--experts", "2x2"]
    assert main([*fit, "--prefix-tokens", "8", "--to", str(router), "--device", "cpu"]) == 0
    shard = ["route", "shard", str(corpus), "--router", str(router), "--base", str(tiny_base)]
    assert main([*shard, "--validation-share", "0.2", "--to", str(directory / "shards")]) == 0
    with pytest.MonkeyPatch.context() as patch, Site(directory, jobs) as site:
        operator_home(site, patch)
        site.start(
            write_run(directory / "full.toml", tiny_base, FULL, count=ROUNDS, quorum=1),
            write_run(directory / "lora.toml", tiny_base, LORA, count=ROUNDS, quorum=1),
        )
        hands = tuple(Hand(site.address, site.token, corpus, site.home, name) for name in ("ada", "ben"))
        with working(*hands):
            eventually(lambda: all(hand.gone for hand in hands), site.picture, within_s=75)
        yield Finished(site, hands, directory)


def picture(finished: Finished, run: str) -> dict[str, Any]:
    status = finished.site.coordinator.get_status(OPERATORS, run_id=run)
    return {path.path: path for path in status.runs[0].paths}


@pytest.mark.parametrize("run", ["full", "lora"])
def test_every_module_got_an_update_of_each_path_through_it(finished: Finished, run: str) -> None:
    for module in ("0.0", "0.1", "1.0", "1.1"):
        ended = finished.site.rounds(run, module)[:ROUNDS]
        for round_ in ended:
            assert {str(update.path) for update in round_.updates} == {
                path for path in PATHS if path.split(".")[int(module[0])] == module[2]
            }


@pytest.mark.parametrize("run", ["full", "lora"])
def test_every_path_was_evaluated_on_held_out_data_and_got_better(finished: Finished, run: str) -> None:
    for path in picture(finished, run).values():
        assert path.best_loss is not None
        assert path.validation_loss is not None
        record = finished.site.coordinator.runs[RunId(run)].paths[ModulePath.parse(path.path)]
        assert record.evaluations[0].versions == (0, 0)
        assert record.evaluations[-1].versions == (ROUNDS, ROUNDS)
        by_source: dict[str, list[float]] = {}
        for item in record.evaluations:
            by_source.setdefault(item.source, []).append(item.loss)
        assert path.best_loss in {min(losses) for losses in by_source.values()}
        assert all(losses[-1] < losses[0] for losses in by_source.values() if len(losses) > 1)


def test_documents_stay_where_they_are_in_local_mode(finished: Finished) -> None:
    run = finished.site.coordinator.runs[RunId("lora")]
    assert run.routing is not None
    assert not run.routing.shards
    assert {worker: sum(item.documents.values()) for worker, item in run.holdings.items()} == {
        hand.worker_id: 64 for hand in finished.hands
    }


def test_the_gate_judged_each_module_on_the_documents_of_its_paths(finished: Finished) -> None:
    gates = [finished.site.rounds("full", module)[0].gate for module in ("0.0", "1.1")]
    assert all(gate is not None and gate.num_sequences >= 2 for gate in gates)


def expected_logits(
    finished: Finished, base: Path, run: str, path: str, tokens: torch.Tensor
) -> torch.Tensor:
    """Of the path, composed by hand from the coordinator's own files."""
    held = finished.site.coordinator.runs[RunId(run)]
    resident = ResidentBase.load(
        base,
        held.recipe.task,
        device=torch.device("cpu"),
        dtype=torch.float32,
        kind=held.recipe.topology.kind,
    )
    tensors: dict[str, Any] = {}
    for key in ModulePath.parse(path).modules:
        tensors |= read_module(finished.site.file(run, str(key)), held.schema(key))
    composed = resident.compose(held.recipe, tensors)
    with torch.inference_mode():
        return composed.resident.model(input_ids=tokens).logits  # type: ignore[no-any-return]


def test_a_full_path_pulls_as_an_ordinary_model(finished: Finished, tiny_base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert main(["pull", "full/path:1.0", "--to", str(tmp_path / "model"), "--base", str(tiny_base)]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.arange(12).reshape(1, 12) + 3
    expected = expected_logits(finished, tiny_base, "full", "1.0", tokens)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_lora_path_pulls_as_an_ordinary_adapter(
    finished: Finished, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert main(["pull", "lora/path:0.1@best", "--to", str(tmp_path / "adapter")]) == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_base), tmp_path / "adapter")
    tokens = torch.arange(12).reshape(1, 12) + 3
    best = picture(finished, "lora")["0.1"].best_versions
    assert best
    with torch.inference_mode():
        logits = model(input_ids=tokens).logits
    if best == (ROUNDS, ROUNDS):
        expected = expected_logits(finished, tiny_base, "lora", "0.1", tokens)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("run", ["full", "lora"])
def test_a_pulled_grid_routes_evaluates_and_writes(
    finished: Finished, tiny_base: Path, tmp_path: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = str(tmp_path / "grid")
    assert main(["pull", run, "--all", "--to", grid]) == 0
    capsys.readouterr()
    assert (
        main(["route", "prompt", TOPICS["digits"] * 3, "--model", grid, "--base", str(tiny_base), "--json"])
        == 0
    )
    routed = json.loads(capsys.readouterr().out)
    router = read_router(finished.directory / "grid.router")
    assert routed["path"] in {str(path) for path in router.paths}
    words = [
        "eval",
        grid,
        "--data",
        str(finished.directory / "corpus.jsonl"),
        "--base",
        str(tiny_base),
        "--json",
    ]
    assert main(words) == 0
    assert (
        main(["generate", TOPICS["warp"], "--model", grid, "--base", str(tiny_base), "--max-new-tokens", "4"])
        == 0
    )


def test_every_version_can_be_recomputed(finished: Finished) -> None:
    for module in ("0.0", "1.1"):
        for run in ("full", "lora"):
            words = ["verify", f"{run}/{module}@{ROUNDS}", "--state", str(finished.site.state), "--json"]
            assert main(words) == 0


def test_the_grid_can_be_watched(finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--once", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [path["path"] for path in shown["runs"][0]["paths"]] == list(PATHS)
    assert main(["watch", "--once"]) == 0
    assert main(["paths", "list", "--run", "full"]) == 0


def test_module_keys(finished: Finished) -> None:
    run = finished.site.coordinator.runs[RunId("full")]
    assert set(run.rounds) == {ModuleKey(level, expert) for level in range(2) for expert in range(2)}
    assert run.recipe.task == TaskSettings(prefix_tokens=8)
