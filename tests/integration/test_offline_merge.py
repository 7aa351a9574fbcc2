"""``weft merge`` on what transformers and peft save: they load what it writes, and the logits are the right ones."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tests.running import main
from tests.tiny import write_tiny_base
from transformers import AutoModelForCausalLM, AutoTokenizer

# peft 0.21 asks transformers 5.23 under a name that is to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TOKENS = torch.arange(24).reshape(2, 12) + 40
State = dict[str, torch.Tensor]
Made = Mapping[str, Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A base, three models trained from it (one in shards, one bfloat16) and three adapters with little in common."""
    directory = tmp_path_factory.mktemp("made")
    base = write_tiny_base(directory / "base", num_layers=2, tied=False)
    generator = torch.Generator().manual_seed(1)
    for name, options in {
        "a": {},
        "b": {"max_shard_size": "60KB"},
        "c": {},
    }.items():
        model = load(base)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        model.to(torch.bfloat16 if name == "c" else torch.float32).save_pretrained(
            directory / name, **options
        )
    for name, config in {
        "x": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "y": LoraConfig(r=6, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_rslora=True),
        "z": LoraConfig(
            r=3,
            lora_alpha=5,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"layers.0.self_attn.q_proj": 7},
            alpha_pattern={"v_proj": 9},
            modules_to_save=["lm_head"],
        ),
    }.items():
        save_adapter(base, directory / name, config, generator)
    return {each.name: each for each in directory.iterdir()}


def save_adapter(base: Path, to: Path, config: LoraConfig, generator: torch.Generator) -> None:
    adapted = get_peft_model(load(base), config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(to)


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def state(directory: Path) -> State:
    """Float64, from the files themselves."""
    found: State = {}
    for path in directory.glob("*.safetensors"):
        found |= {name: each.double() for name, each in load_file(path).items()}
    return found


def logits(model: Any) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        found: npt.NDArray[np.float32] = model.eval()(TOKENS).logits.float().numpy()
    return found


def logits_of(base: Path, tensors: State) -> npt.NDArray[np.float32]:
    model = load(base)
    model.load_state_dict({name: each.float() for name, each in tensors.items()})
    return logits(model)


def run(*arguments: object) -> int:
    return main(["merge", *map(str, arguments)])


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run(*arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) != 0
    return capsys.readouterr().err


# ---- whole models ------------------------------------------------------------------------------------------------


def weighted(models: Sequence[State], weights: Sequence[float]) -> State:
    total = sum(weights)
    return {
        name: sum(
            (weight / total * each[name] for weight, each in zip(weights, models, strict=True)),
            torch.zeros(()),
        )
        for name in models[0]
    }


def ties(base: State, models: Sequence[State], density: float) -> State:
    """TIES as peft does it, equal weights, tensor by tensor."""
    merged = {}
    for name, start in base.items():
        deltas = torch.stack([(each[name] - start).float() for each in models]).double()
        for delta in deltas:
            kept = delta.abs().flatten().topk(max(1, int(density * delta.numel()))).indices
            mask = torch.zeros(delta.numel(), dtype=torch.bool)
            mask[kept] = True
            delta[~mask.reshape(delta.shape)] = 0
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        agree = deltas.sign() == sign
        merged[name] = start + (deltas * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


def test_mean_of_models_single_sharded_and_bfloat16(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(f"{made['a']}:1", f"{made['b']}:2", f"{made['c']}:0.5", "--to", out) == 0
    wanted = weighted([state(made[name]) for name in "abc"], [1, 2, 0.5])
    np.testing.assert_allclose(logits(load(out)), logits_of(made["base"], wanted), atol=1e-5)


def test_ties_of_models_with_digests_manifest_tokenizer_and_shards(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    rule = ("--rule", "ties", "--density", 0.2, "--param", "convention=peft", "--shard-size", "60KB")
    result = said(capsys, *rule, "--base", made["base"], made["a"], f"second={made['b']}", "--to", out)
    assert result["num_tensors"] == len(state(made["a"]))
    wanted = ties(state(made["base"]), [state(made["a"]), state(made["b"])], 0.2)
    for name, tensor in state(out).items():
        np.testing.assert_allclose(tensor, wanted[name], atol=1e-7)
    np.testing.assert_allclose(logits(load(out)), logits_of(made["base"], wanted), atol=1e-5)
    assert len(list(out.glob("model-*.safetensors"))) > 1
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (out, made["base"])]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    manifest = json.loads((out / "merge.json").read_text())
    assert sorted(manifest["inputs"]) == ["a", "second", "the base"]
    assert len(set(manifest["inputs"].values())) == 3
    assert manifest["recipe"]["merge"]["ties"]["density"] == 0.2
    assert set(manifest["versions"]) == {"weft", "torch", "numpy"}
    assert "merge.json" in (out / "README.md").read_text()
    again = tmp_path / "again"
    said(capsys, *rule[:-2], "--base", made["base"], made["a"], f"second={made['b']}", "--to", again)
    assert json.loads((again / "merge.json").read_text())["output"] == manifest["output"]  # however it is cut


def test_dtype_of_storage(made: Made, tmp_path: Path) -> None:
    assert run(made["a"], made["b"], "--dtype", "bf16", "--to", tmp_path / "out") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    wanted = weighted([state(made["a"]), state(made["b"])], [1, 1])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name].float().to(torch.bfloat16)), name


def test_tied_weights_stored_or_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_tiny_base(tmp_path / "first", num_layers=1)
    second = Path(shutil.copytree(first, tmp_path / "second"))
    tensors = load_file(second / "model.safetensors")
    head = tensors["model.embed_tokens.weight"] * 2
    save_file(
        {**tensors, "lm_head.weight": head, "model.embed_tokens.weight": head.clone()},
        second / "model.safetensors",
        {"format": "pt"},
    )
    result = said(capsys, first, second, "--to", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")
    assert any("lm_head.weight" in note for note in result["notes"])
    merged = load(tmp_path / "out")
    torch.testing.assert_close(merged.lm_head.weight, 0.75 * head)
    untied = write_tiny_base(tmp_path / "untied", num_layers=1, tied=False)
    assert "shares its output layer" in refusal(capsys, first, untied, "--to", tmp_path / "no")


# ---- adapters ----------------------------------------------------------------------------------------------------


def applied(made: Made, name: str) -> State:
    """The base with one adapter merged into it, by peft, float64."""
    model = PeftModel.from_pretrained(load(made["base"]).double(), made[name]).merge_and_unload()
    return {key: each.detach().double() for key, each in model.state_dict().items()}


def test_adapters_of_different_ranks_layers_and_scalings(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = weighted([applied(made, name) for name in "xy"], [1, 3])
    for mode in (["--lora", "stack"], ["--rank", 32]):
        out = tmp_path / str(mode[1])
        result = said(capsys, made["x"], f"{made['y']}:3", *mode, "--to", out)
        assert (result["truncation_error"] or 0) < 1e-6
        merged = PeftModel.from_pretrained(load(made["base"]), out)
        np.testing.assert_allclose(logits(merged), logits_of(made["base"], wanted), atol=2e-5)


def test_truncation_is_the_best_of_its_rank_and_reported(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    result = said(capsys, made["x"], made["y"], "--rank", 3, "--to", out)
    base, wanted = state(made["base"]), weighted([applied(made, name) for name in "xy"], [1, 1])
    model = PeftModel.from_pretrained(load(made["base"]), out).merge_and_unload().state_dict()
    lost = total = 0.0
    for name, start in base.items():
        delta = wanted[name] - start
        if not delta.any():
            continue
        values = torch.linalg.svdvals(delta)
        error = float(torch.linalg.norm(model[name].double() - wanted[name]))
        assert error == pytest.approx(float(torch.linalg.norm(values[3:])), rel=1e-4)
        lost, total = lost + error**2, total + float(values.square().sum())
    assert result["truncation_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_any_rule_on_dense_changes(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rule = ("--rule", "ties", "--density", 0.3, "--param", "convention=peft", "--rank", 32)
    assert run(*rule, made["x"], made["y"], "--to", out) == 0
    base, adapted = state(made["base"]), [applied(made, name) for name in "xy"]
    model = PeftModel.from_pretrained(load(made["base"]), out).merge_and_unload().state_dict()
    touched = [name for name in base if any(not torch.equal(each[name], base[name]) for each in adapted)]
    zeros = {name: torch.zeros_like(base[name]) for name in touched}
    deltas = [{name: each[name] - base[name] for name in touched} for each in adapted]
    wanted = ties(zeros, deltas, 0.3)
    for name in touched:
        np.testing.assert_allclose(model[name].double() - base[name], wanted[name], atol=2e-6)


def test_rank_and_alpha_patterns_and_modules_to_save(made: Made, tmp_path: Path) -> None:
    out, twice = tmp_path / "out", shutil.copytree(made["z"], tmp_path / "twice")
    path = Path(twice) / "adapter_model.safetensors"
    save_file({name: 2 * each for name, each in load_file(path).items()}, path, {"format": "pt"})
    assert run(made["z"], twice, "--lora", "stack", "--to", out) == 0
    one, two = applied(made, "z"), applied({**made, "twice": Path(twice)}, "twice")
    wanted = weighted([one, two], [1, 1])
    merged = PeftModel.from_pretrained(load(made["base"]), out)
    np.testing.assert_allclose(logits(merged), logits_of(made["base"], wanted), atol=2e-5)


def test_one_adapter_is_itself(made: Made, tmp_path: Path) -> None:
    for name in "xyz":
        assert run(made[name], "--to", tmp_path / name) == 0
        merged = PeftModel.from_pretrained(load(made["base"]), tmp_path / name)
        np.testing.assert_allclose(logits(merged), logits_of(made["base"], applied(made, name)), atol=2e-5)


def test_factors_with_their_residual_in_a_base_of_their_own(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    mode = ("--lora", "residual", "--base", made["base"], "--shard-size", "60KB")
    result = said(capsys, *mode, made["x"], f"{made['y']}:3", "--to", out)
    assert result["truncation_error"] < 1e-6
    assert any("never onto" in note for note in result["notes"])
    wanted = weighted([applied(made, name) for name in "xy"], [1, 3])
    out.rename(elsewhere)
    merged = PeftModel.from_pretrained(load(elsewhere / "base"), elsewhere)
    np.testing.assert_allclose(logits(merged), logits_of(made["base"], wanted), atol=1e-5)
    # What the factors alone get wrong is no rounding.
    assert (
        np.abs(logits(PeftModel.from_pretrained(load(made["base"]), elsewhere)) - logits(merged)).max() > 1e-3
    )
    monkeypatch.chdir(elsewhere)
    found = AutoPeftModelForCausalLM.from_pretrained(".", dtype=torch.float32)
    np.testing.assert_array_equal(logits(found), logits(merged))
    vocabularies = [AutoTokenizer.from_pretrained(each).get_vocab() for each in ("base", made["base"])]
    assert vocabularies[0] == vocabularies[1]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}])
def test_adapters_that_are_more_than_two_factors_are_refused(
    options: dict[str, Any], made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], **options)
    save_adapter(made["base"], tmp_path / "odd", config, torch.Generator().manual_seed(1))
    text = refusal(capsys, made["x"], tmp_path / "odd", "--to", tmp_path / "out")
    assert next(iter(options)) in text
    assert "merge_and_unload" in text
    assert not list(tmp_path.glob("out*"))


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers.:UserWarning")
def test_adapter_of_an_embedding_is_refused(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    save_adapter(made["base"], tmp_path / "odd", config, torch.Generator().manual_seed(1))
    assert "more than linear layers" in refusal(capsys, made["x"], tmp_path / "odd", "--to", tmp_path / "out")


def test_kinds_and_bases_are_not_mixed(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is an adapter" in refusal(capsys, made["x"], made["a"], "--to", tmp_path / "out")
    other = Path(shutil.copytree(made["y"], tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    assert "--any-base" in refusal(capsys, made["x"], other, "--to", tmp_path / "out")
    assert run(made["x"], other, "--any-base", "--to", tmp_path / "out") == 0


# ---- killed, and started again -----------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from weft.common.cli import main
from weft.server.offline.output import Output
finish = Output.finish_unit
left = int(sys.argv[1])
def finish_and_die(self, *given, **named):
    global left
    finish(self, *given, **named)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
Output.finish_unit = finish_and_die
main(sys.argv[2:])
"""


def test_killed_and_started_again_gives_the_same_bytes(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["merge", "--rule", "ties", "--base", made["base"], made["a"], made["b"], "--shard-size", "60KB"]
    command = [*map(str, words), "--to"]
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, "7", *command, str(out)],
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=100,
    )
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert (partial / "journal.jsonl").read_text().count("\n") == 8
    # What the journal names is believed only if it is there: one of the seven is damaged.
    shard = sorted(partial.glob("model-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    # The end of a line that was being written.
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"unit": "model.la')
    result = said(capsys, *command[1:], out)
    assert result["num_resumed"] in {6, 7}
    assert main([*command, str(tmp_path / "whole")]) == 0
    for path in (tmp_path / "whole").iterdir():
        if path.name != "README.md":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert not partial.exists()


def test_remains_of_another_merge_are_not_gone_on_with(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"merge": "of something else"}\n')
    assert "was begun by another merge" in refusal(capsys, made["a"], made["b"], "--to", tmp_path / "out")
    (partial / "journal.jsonl").rename(partial / "notes.txt")
    assert "is no merge of Weft's" in refusal(capsys, made["a"], made["b"], "--to", tmp_path / "out")


# ---- the command -------------------------------------------------------------------------------------------------


def test_dry_run_writes_nothing(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = said(
        capsys, "--rule", "ties", "--base", made["base"], made["a"], made["b"], "--dry-run", "--to", out
    )
    sizes = {name: sum(each.numel() for each in state(made[name]).values()) for name in ("base", "a")}
    assert found["num_parameters"] == sizes["a"]
    assert found["read_bytes"] == 3 * 4 * sizes["a"]
    assert 4 * sizes["a"] <= found["write_bytes"] < 4 * sizes["a"] + 10_000
    assert found["memory_bytes"] > 0
    assert not list(tmp_path.iterdir())
    assert run(made["x"], made["y"], "--dry-run") == 0
    assert "note: lora: exact, rank 6" in capsys.readouterr().out


def test_recipe_says_what_options_say(made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"""
        base = "{made["base"]}"
        dtype = "bf16"
        [[inputs]]
        path = "{made["a"]}"
        weight = 0.7
        [[inputs]]
        path = "{made["b"]}"
        [merge]
        rule = "breadcrumbs"
        [merge.breadcrumbs]
        density = 0.4
        """
    )
    options = ["--rule", "breadcrumbs", "--density", 0.4, "--dtype", "bf16", "--base", made["base"]]
    assert run(recipe, "--to", tmp_path / "one") == 0
    assert run(*options, f"{made['a']}:0.7", made["b"], "--to", tmp_path / "two") == 0
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert "given beside a file" in refusal(
        capsys, "--recipe", recipe, "--rule", "ties", "--to", tmp_path / "no"
    )


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "add --to DIR"),
        (["--to", "x", "--param", "density"], "--param density=0.2"),
        (["--to", "x", "--density", "0.1", "--param", "density=0.2"], "--param density=0.2"),
        (["--to", "x", "--device", "tpu"], "use cpu or cuda"),
        (["--to", "x", "--dtype", "bf17"], "bf16"),
        (["--to", "."], "give a name"),
    ],
)
def test_what_is_typed_wrong_is_answered_with_what_to_type(
    words: list[str], hint: str, made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hint in refusal(capsys, made["a"], made["b"], *words)


def test_rules_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["rule"]: row for row in said(capsys, "--list")}
    assert rows["mean"]["needs"] == "nothing"
    assert rows["ties"]["needs"] == "the base, for whole models"
    assert "density = 0.2" in rows["ties"]["parameters"]
    assert all(row["paper"].startswith("https://") for row in rows.values())
    assert [name for name, row in rows.items() if "residual" in row["adapters"]] == ["mean"]
