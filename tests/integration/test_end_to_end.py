"""Several runs on one coordinator, three workers, over real TLS: what was trained, merged, judged, pulled and shown.

All runs are done once, by the fixture; each test looks at one side of what came out.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.running import Hand, Site, ThreadEngine, eventually, main, operator_home, working, write_run
from tests.tiny import TEXT

from weft.common.composition import ResidentBase
from weft.common.ids import ModuleKey, RunId
from weft.common.protocol import RoundState
from weft.common.recipe import TaskSettings
from weft.common.sequences import Batch
from weft.common.tensors import Float32Array
from weft.server.engine_process import Jobs, read_module

ROUNDS = 2
RUNS = {
    "mean": '[codec]\nkind = "fp32"',
    "ties": '[merge]\nrule = "ties"\n[codec]\nkind = "bf16"\n[gate]\nheldout = "heldout.txt"\ntolerance = 10.0',
    "fisher": '[merge]\nrule = "fisher"\n[statistics]\nfisher_examples = 4\n[codec]\nkind = "ternary"\ndensity = 0.2\n'
    '[outer]\nname = "nesterov"\nlearning_rate = 0.7\nmomentum = 0.9',
    "shards": '[topology]\nexperts = [1, 1]\nlevels_per_task = 1\n[codec]\nkind = "ternary"\ndensity = 0.3',
    "tsv": '[merge]\nrule = "tsv"\n[codec]\nkind = "int8"',
    "labels": '[task]\nkind = "sequence-classification"\nnum_labels = 3\n'
    '[gate]\nheldout = "labels.jsonl"\ntolerance = 10.0',
}
MODULES = {name: ("0.0", "1.0") if name == "shards" else ("0.0",) for name in RUNS}


@dataclass
class Finished:
    """What is left when all runs are done."""

    site: Site
    hands: tuple[Hand, ...]
    directory: Path
    loads: Counter[tuple[str, str]]
    """How often a base was loaded, by thread and task kind."""


def _write_data(directory: Path) -> list[Path]:
    """Text with labels, text alone, and prompts with completions: what the workers hold."""
    words = TEXT.split(". ")
    rows = [{"text": f"{word} {index}", "label": index % 3} for index, word in enumerate(words)]
    (directory / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (directory / "text.txt").write_text(TEXT + "a shuttle crosses the warp. " * 40)
    pairs = [{"prompt": f"row {index}: ", "completion": "over and under"} for index in range(60)]
    (directory / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (directory / "heldout.txt").write_text("the warp is fixed, the weft is woven. " * 30)
    return [directory / "labels.jsonl", directory / "text.txt", directory / "pairs.jsonl"]


@pytest.fixture(scope="module")
def finished(tiny_base: Path, jobs: Jobs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    directory = tmp_path_factory.mktemp("site")
    data = _write_data(directory)
    # The classification run has one worker: the others' data has no labels.
    run_files = [
        write_run(
            directory / f"{name}.toml", tiny_base, more, count=ROUNDS, quorum=1 if name == "labels" else 2
        )
        for name, more in RUNS.items()
    ]
    loads: Counter[tuple[str, str]] = Counter()
    load = ResidentBase.load

    def counted(base: Path, task: TaskSettings, **options: Any) -> ResidentBase:
        loads[threading.current_thread().name.partition("_")[0], task.kind.value] += 1
        return load(base, task, **options)

    with pytest.MonkeyPatch.context() as patch, Site(directory, jobs) as site:
        patch.setattr(ResidentBase, "load", counted)
        operator_home(site, patch)
        site.start(*run_files)
        hands = tuple(
            Hand(site.address, site.token, path, site.home, name)
            for path, name in zip(data, ("ada", "ben", "cy"), strict=True)
        )
        ada, *others = hands
        with working(*others, leave_when_finished=False):
            # Before somebody comes who can do it, so that both are asked.
            eventually(
                lambda: all("labels" in [item.run_id for item in hand.worker.life.unable] for hand in others),
                site.picture,
            )
            with working(ada, leave_when_finished=False):
                eventually(
                    lambda: all(
                        site.version(run, key) == ROUNDS for run, keys in MODULES.items() for key in keys
                    ),
                    site.picture,
                )
        yield Finished(site, hands, directory, loads)


def test_every_module_got_its_versions_and_every_update_is_in(finished: Finished) -> None:
    for run, modules in MODULES.items():
        for module in modules:
            ended = finished.site.rounds(run, module)[:ROUNDS]
            assert [round_.state for round_ in ended] == [RoundState.PUBLISHED] * ROUNDS
            assert all(len(round_.updates) == (1 if run == "labels" else 2) for round_ in ended)


def test_the_gate_measured_where_there_is_held_out_data(finished: Finished) -> None:
    for run in MODULES:
        for module in MODULES[run]:
            first = finished.site.rounds(run, module)[0]
            assert first.gate is not None
            assert (first.gate.loss_after is not None) == (run in ("ties", "labels"))


def test_the_base_is_loaded_once_in_a_process_however_many_rounds(finished: Finished) -> None:
    assert {number for (who, _), number in finished.loads.items() if who != "engine"} == {1}
    assert finished.loads["ben", "causal-lm"] == finished.loads["ada", "sequence-classification"] == 1


def test_a_worker_whose_data_does_not_fit_a_run_works_for_the_others(finished: Finished) -> None:
    for hand, columns in zip(finished.hands[1:], ("text", "completion, prompt"), strict=True):
        (unable,) = hand.worker.life.unable
        assert f"has the columns {columns}" in unable.reason
        assert hand.worker.life.num_accepted > 0


def test_the_base_came_from_the_coordinator_once_for_all_workers(finished: Finished, tiny_base: Path) -> None:
    (directory,) = [path for path in (finished.site.home.root / "bases").iterdir() if path.is_dir()]
    assert (directory / "model.safetensors").read_bytes() == (tiny_base / "model.safetensors").read_bytes()


def test_error_feedback_and_optimiser_state_are_on_the_workers(finished: Finished) -> None:
    kept = {
        path.name.rpartition("-")[0] for path in finished.site.home.root.glob("workers/*/runs/fisher-*/0/*")
    }
    assert {"0.0.optimiser", "0.0.residual"} <= kept
    assert not list(finished.site.home.root.glob("workers/*/outbox/*"))


# ---- verify ------------------------------------------------------------------------------------------------------


def test_every_version_is_recomputed_byte_for_byte(
    finished: Finished, monkeypatch: pytest.MonkeyPatch, jobs: Jobs, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("weft.server.engine.EngineProcess", lambda: ThreadEngine(jobs))
    for run in MODULES:
        for version in range(ROUNDS + 1):
            assert main(["verify", f"{run}@{version}", "--state", str(finished.site.state), "--json"]) == 0
            found = json.loads(capsys.readouterr().out)
            assert [item["module"] for item in found] == list(MODULES[run])
            assert {item["num_updates"] for item in found} == {
                0 if version == 0 else (1 if run == "labels" else 2)
            }


# ---- pull --------------------------------------------------------------------------------------------------------


def _own_logits(finished: Finished, base: Path, run: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the logits that the coordinator's own composition of the newest versions gives for them."""
    known = finished.site.coordinator.runs[RunId(run)]
    tensors: dict[str, Float32Array] = {}
    for key in MODULES[run]:
        tensors |= read_module(finished.site.file(run, key), known.schema(ModuleKey.parse(key)))
    resident = ResidentBase.load(base, known.recipe.task, device=torch.device("cpu"), dtype=torch.float32)
    tokens = np.arange(1, 25).reshape(2, 12)
    batch = Batch(tokens=tokens, labels=np.zeros(2, np.int64), lengths=np.array([12, 12]))
    with torch.no_grad():
        return torch.from_numpy(tokens), resident.compose(known.recipe, tensors).logits(batch)


def _auto_class(run: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if run == "labels" else AutoModelForCausalLM


# PEFT 0.21 asks transformers 5 by the attribute's old name.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("run", ["ties", "shards", "labels"])
def test_a_pulled_adapter_gives_the_coordinators_own_logits(
    finished: Finished, tiny_base: Path, tmp_path: Path, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    ref = f"{run}/path:0.0" if run == "shards" else run
    assert main(["pull", ref, "--to", str(tmp_path / "adapter")]) == 0
    assert "signatures, digests and shapes" in capsys.readouterr().out
    labels = {"num_labels": 3, "pad_token_id": 0} if run == "labels" else {}
    model = PeftModel.from_pretrained(
        _auto_class(run).from_pretrained(tiny_base, **labels), tmp_path / "adapter"
    )
    tokens, own = _own_logits(finished, tiny_base, run)
    with torch.no_grad():
        theirs = model.eval()(input_ids=tokens).logits
    assert (theirs - own).abs().max() <= 1e-5
    with torch.no_grad(), model.disable_adapter():
        assert (model(input_ids=tokens).logits - own).abs().max() > 1e-3


@pytest.mark.parametrize("run", ["fisher", "labels"])
def test_a_pulled_model_gives_the_coordinators_own_logits(
    finished: Finished, tiny_base: Path, tmp_path: Path, run: str
) -> None:
    words = [
        "pull",
        f"{run}@{ROUNDS}",
        "--as",
        "hf",
        "--to",
        str(tmp_path / "model"),
        "--base",
        str(tiny_base),
    ]
    assert main(words) == 0
    tokens, own = _own_logits(finished, tiny_base, run)
    labels = {"pad_token_id": 0} if run == "labels" else {}
    with torch.no_grad():
        theirs = (
            _auto_class(run).from_pretrained(tmp_path / "model", **labels).eval()(input_ids=tokens).logits
        )
    assert (theirs - own).abs().max() <= 1e-4


def test_an_adapter_brings_its_documents_and_its_lineage(finished: Finished, tmp_path: Path) -> None:
    assert main(["pull", "mean", "--to", str(tmp_path / "adapter"), "--quiet"]) == 0
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"weft-manifest.json", "weft-recipe.json", "adapter_config.json", "README.md"} <= names
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"mean/0.0@{ROUNDS}" in card
    assert "merged by mean" in card


def test_eval_measures_the_base_and_the_adapter(
    finished: Finished, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pull", "mean", "--to", str(tmp_path / "adapter")]) == 0
    capsys.readouterr()
    heldout = str(finished.directory / "heldout.txt")
    words = ["eval", str(tiny_base), str(tmp_path / "adapter"), "--base", str(tiny_base), "--data", heldout]
    assert main([*words, "--sequence-length", "16", "--json"]) == 0
    bare, adapted = json.loads(capsys.readouterr().out)
    assert adapted["together"]["loss"] < bare["together"]["loss"]
    assert adapted["together"]["num_labels"] == bare["together"]["num_labels"]


# ---- looking -----------------------------------------------------------------------------------------------------


def test_the_lineage_names_parents_contributors_rule_and_gate(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["modules", "show", "fisher", "--json"]) == 0
    manifests = json.loads(capsys.readouterr().out)
    assert [manifest["version"] for manifest in manifests] == list(range(ROUNDS + 1))
    assert manifests[-1]["merge"]["rule"] == "fisher"
    assert manifests[-1]["outer"]["name"] == "nesterov"
    assert len(manifests[-1]["contributors"]) == 2
    assert main(["modules", "show", "fisher/0.0"]) == 0
    assert "fisher" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["runs", "list"], ["rounds", "list"], ["modules", "list"], ["workers", "list"], ["token", "list"]],
    ids=lambda words: words[0],
)
def test_the_lists_show_what_there_is(
    finished: Finished, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out.strip()
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_watch_shows_versions_reasons_and_workers(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", "--once", "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert {run["run_id"] for run in status["runs"]} == set(RUNS)
    assert all(run["finished"] for run in status["runs"])
    names = {worker["display_name"] for worker in status["workers"]}
    assert {"ada", "ben", "cy"} <= names
    assert main(["watch", "--until-finished"]) == 0
    assert "round" in capsys.readouterr().out


# ---- other ways in -----------------------------------------------------------------------------------------------


def test_who_needs_approval_waits_for_it(
    tiny_base: Path, text: Path, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Site(tmp_path, jobs) as site:
        operator_home(site, monkeypatch)
        site.start(write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=1))
        token = site.create_token(needs_approval=True)
        hand = Hand(site.address, token, text, site.home, "hand", base=tiny_base)
        with working(hand):
            eventually(lambda: hand.view.has("waits for approval"))
            assert not site.coordinator.leases
            assert main(["workers", "approve", hand.worker_id]) == 0
            eventually(lambda: site.version("one") == 1, site.picture)


def test_without_tls_on_one_machine(
    tiny_base: Path, text: Path, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Site(tmp_path, jobs, insecure=True) as site:
        operator_home(site, monkeypatch)
        site.start(write_run(tmp_path / "one.toml", tiny_base, count=1, quorum=1))
        assert site.join_line[-1] == "--insecure"
        words = ["join", site.address, site.token, "--insecure", "--data", str(text), "--threads", "1"]
        assert main([*words, "--exit-when-finished", "--state", str(tmp_path / "worker")]) == 0
        eventually(lambda: site.version("one") == 1, site.picture)
        assert main(["pull", "one@1", "--to", str(tmp_path / "adapter")]) == 0


# ---- coming back -------------------------------------------------------------------------------------------------


def test_a_worker_resumes_with_nothing_but_its_directory(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    ada = finished.hands[0]
    before = len(finished.site.coordinator.roster.workers)
    assert main(["join", "--state", str(ada.state), "--exit-when-finished"]) == 0
    assert f"resuming as {ada.worker_id}" in capsys.readouterr().out
    assert len(finished.site.coordinator.roster.workers) == before
