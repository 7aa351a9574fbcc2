"""Searches for weights: what they try, what they find, what they keep."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.handmade import adapter_product, merge_recipe, write_adapter, write_model
from tests.tiny import TEXT, write_tiny_base

from weft.common.cli import main
from weft.common.errors import ComputeError, StateLocked, UsageError
from weft.server.offline.merging import Options
from weft.server.offline.recipe import InputSpec, LoraMode, Recipe, RecipeFile, merge_settings, understand
from weft.server.offline.scoring import CommandScorer, HeldoutScorer
from weft.server.offline.search import Found, Method, Trial, search

OPTIONS = Options(threads=1, digests=False)
PRINT_SUM = (
    "import sys; from safetensors.numpy import load_file; print('a line'); "
    "print(load_file(sys.argv[1] + '/model.safetensors')['w'].sum())"
)


class Scores:
    """Scores the one tensor ``w`` of a model, and counts."""

    higher_is_better = True
    description: Mapping[str, Any] = {"evaluate": "test"}

    def __init__(self, score: Any, *, dies_at: int = 0) -> None:
        self._score, self._dies_at, self.count = score, dies_at, 0

    def score(self, directory: Path) -> float | None:
        self.count += 1
        if self.count == self._dies_at:
            raise ComputeError("killed")
        found = self._score(load_file(directory / "model.safetensors")["w"])
        return None if found is None else float(found)


def recipe_of(tmp_path: Path, values: Mapping[str, list[float]], **options: Any) -> Recipe:
    for name, each in {"base": [0.0] * 3, **values}.items():
        write_model(tmp_path / name, {"w": np.array(each, np.float32)})
    specs = tuple(InputSpec(path=str(tmp_path / name)) for name in values)
    defaults: dict[str, Any] = {"base": str(tmp_path / "base"), "merge": merge_settings("mean", {})}
    return understand(RecipeFile(inputs=specs, **defaults | options), resolve=Path)


def nearness(target: list[float]) -> Any:
    return lambda w: -float(np.square(w - np.array(target)).sum())


def run(recipe: Recipe, to: Path, scorer: Any, method: Method, num_trials_max: int = 0) -> Found:
    return search(recipe, to, scorer, OPTIONS, method=method, num_trials_max=num_trials_max)


def test_greedy_takes_who_helps_in_the_order_of_their_own_scores(tmp_path: Path) -> None:
    values = {"far": [9.0, 9, 9], "one": [2.0, 0, 0], "two": [0.0, 2, 0], "copy": [2.0, 0, 0]}
    found = run(recipe_of(tmp_path, values), tmp_path / "out", Scores(nearness([1, 1, 0])), Method.GREEDY)
    assert [trial.weights for trial in found.trials] == [
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (0, 1, 1, 0),  # one is first of those that score alike; two joins
        (0, 1, 1, 1),  # copy does not
        (1, 1, 1, 0),  # nor far
    ]
    assert found.best == Trial(weights=(0, 1, 1, 0), score=0.0)
    np.testing.assert_allclose(merge_recipe(found.recipe, tmp_path / "out")["w"], [1, 1, 0])


def test_greedy_leaves_out_what_is_only_as_good(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"a": [1.0, 0, 0], "b": [1.0, 0, 0]})
    found = run(recipe, tmp_path / "out", Scores(nearness([1, 0, 0])), Method.GREEDY)
    assert found.best.weights == (1, 0)


def test_greedy_keeps_the_rule_and_its_weights(tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path,
        {"a": [4.0, 0, 0], "b": [0.0, 4, 0]},
        merge=merge_settings("task_arithmetic", {"scale": 0.5}),
    )
    found = run(recipe, tmp_path / "out", Scores(nearness([2, 2, 0])), Method.GREEDY)
    np.testing.assert_allclose(merge_recipe(found.recipe, tmp_path / "out")["w"], [2, 2, 0])


def test_lorahub_begins_at_nothing_and_each_alone_and_finds_the_sum(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"a": [10.0, 0, 0], "b": [0.0, 10, 0]})
    scorer = Scores(nearness([8, -5, 0]))
    found = run(recipe, tmp_path / "out", scorer, Method.LORAHUB, 40)
    assert [trial.weights for trial in found.trials[:3]] == [(0, 0), (1, 0), (0, 1)]
    assert found.best.weights == pytest.approx((0.8, -0.5), abs=0.05)
    assert scorer.count == len(found.trials) <= 40
    assert all(abs(weight) <= 1.5 for trial in found.trials for weight in trial.weights)
    assert merge_recipe(found.recipe, tmp_path / "out")["w"] == pytest.approx([8, -5, 0], abs=0.5)


def test_lorahub_prefers_small_weights(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"a": [1.0, 0, 0], "b": [1.0, 0, 0]})
    found = run(recipe, tmp_path / "out", Scores(lambda w: 0.0), Method.LORAHUB)
    assert found.best.weights == (0, 0)


def test_the_budget_is_kept(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"a": [10.0, 0, 0], "b": [0.0, 10, 0]})
    for method in Method:
        scorer = Scores(nearness([8, -5, 0]))
        found = run(recipe, tmp_path / method.value, scorer, method, 2)
        assert scorer.count == len(found.trials) == 2


@pytest.mark.parametrize("method", list(Method))
def test_a_search_that_was_broken_off_goes_on_where_it_was(tmp_path: Path, method: Method) -> None:
    recipe = recipe_of(tmp_path, {"a": [3.0, 0, 0], "b": [0.0, 3, 0], "c": [0.0, 0, 3]})
    score = nearness([1, 1, 0.5])
    whole = run(recipe, tmp_path / "whole", Scores(score), method, 20)
    to = tmp_path / "out"
    with pytest.raises(ComputeError):
        run(recipe, to, Scores(score, dies_at=4), method, 20)
    record = tmp_path / "out.search.jsonl"
    record.write_bytes(record.read_bytes() + b'{"weights": [0.1')  # torn
    (tmp_path / ".out.trial").mkdir()
    (tmp_path / ".out.trial" / "model.safetensors").write_bytes(b"half")
    scorer = Scores(score)
    resumed = run(recipe, to, scorer, method, 20)
    assert resumed.trials == whole.trials
    assert resumed.num_resumed == 3
    assert scorer.count == len(whole.trials) - 3
    assert resumed.recipe.table == whole.recipe.table
    assert not list(tmp_path.glob(".*trial*"))


def test_the_record_of_another_search_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"a": [3.0, 0, 0], "b": [0.0, 3, 0]})
    run(recipe, tmp_path / "out", Scores(nearness([1, 1, 0])), Method.GREEDY)
    with pytest.raises(UsageError, match="of another search"):
        run(recipe, tmp_path / "out", Scores(nearness([1, 1, 0])), Method.LORAHUB)


def test_a_record_without_trials_stands_in_nobodys_way(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"a": [3.0, 0, 0], "b": [0.0, 3, 0]})
    with pytest.raises(ComputeError):
        run(recipe, tmp_path / "out", Scores(nearness([1, 1, 0]), dies_at=1), Method.GREEDY)
    run(recipe, tmp_path / "out", Scores(nearness([1, 1, 0])), Method.LORAHUB, 3)


def test_two_searches_for_one_result_are_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"a": [3.0, 0, 0], "b": [0.0, 3, 0]})

    def search_again(_values: object) -> float:
        with pytest.raises(StateLocked):
            run(recipe, tmp_path / "out", Scores(nearness([1, 1, 0])), Method.GREEDY)
        return 1.0

    scorer = Scores(search_again)
    run(recipe, tmp_path / "out", scorer, Method.GREEDY)
    assert scorer.count == 3


def test_a_trial_without_a_finite_score_is_the_worst(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"a": [3.0, 0, 0], "b": [0.0, 3, 0]})
    for method in Method:
        scorer = Scores(lambda w: None if w[0] > 1 else -abs(w[1] - 3))
        found = run(recipe, tmp_path / method.value, scorer, method)
        assert found.best.score is not None
        assert any(trial.score is None for trial in found.trials)
    with pytest.raises(ComputeError, match="no trial has a finite score"):
        run(recipe, tmp_path / "none", Scores(lambda w: None), Method.GREEDY)


@pytest.mark.parametrize(
    ("options", "method", "said"),
    [
        ({"expression": "a + b"}, Method.GREEDY, "gives by tensor or expression"),
        ({"merge": merge_settings("ties", {})}, Method.LORAHUB, "weights of a sum itself"),
    ],
)
def test_a_recipe_that_leaves_nothing_to_find_is_refused(
    tmp_path: Path, options: dict[str, Any], method: Method, said: str
) -> None:
    recipe = recipe_of(tmp_path, {"a": [3.0, 0, 0], "b": [0.0, 3, 0]}, **options)
    with pytest.raises(UsageError, match=said):
        run(recipe, tmp_path / "out", Scores(nearness([1, 1, 0])), method)


def test_one_input_and_a_place_that_is_taken_are_refused(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, {"a": [3.0, 0, 0]})
    with pytest.raises(UsageError, match="there are 1"):
        run(recipe, tmp_path / "out", Scores(nearness([1, 1, 0])), Method.GREEDY)
    with pytest.raises(UsageError, match="exists"):
        run(recipe, tmp_path / "a", Scores(nearness([1, 1, 0])), Method.GREEDY)


# -- scores --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import sys; sys.exit('out of memory')", "ended with 1: out of memory"),
        ("print('accuracy: 0.5')", "no number: 'accuracy: 0.5'"),
        ("pass", "no number: ''"),
    ],
)
def test_a_command_that_gives_no_score_says_why(tmp_path: Path, program: str, said: str) -> None:
    scorer = CommandScorer(f'{sys.executable} -c "{program}" {{model}}', higher_is_better=True)
    with pytest.raises(ComputeError) as raised:
        scorer.score(tmp_path)
    assert said in raised.value.message


def test_a_command_is_no_shell(tmp_path: Path) -> None:
    place = tmp_path / "a model; with $signs"
    scorer = CommandScorer(
        f'{sys.executable} -c "import sys; print(len(sys.argv[1]))" {{model}}', higher_is_better=True
    )
    assert scorer.score(place) == len(str(place))
    nan = CommandScorer(f"{sys.executable} -c \"print('nan')\" {{model}}", higher_is_better=True)
    assert nan.score(place) is None


@pytest.mark.parametrize("command", ["python score.py", 'python "score.py {model}'])
def test_a_command_that_cannot_be_meant_is_refused(command: str) -> None:
    with pytest.raises(UsageError):
        CommandScorer(command, higher_is_better=True)
    with pytest.raises(ComputeError, match="cannot run"):
        CommandScorer("/nowhere/at-all {model}", higher_is_better=True).score(Path("x"))


def test_heldout_text_scores_adapters_on_their_base_and_models_alike(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    text = tmp_path / "heldout.txt"
    text.write_text(TEXT)
    rng = np.random.default_rng(0)
    layer = "model.layers.1.mlp.down_proj"
    pair = (rng.standard_normal((2, 48)), 0.3 * rng.standard_normal((32, 2)))
    adapter = write_adapter(tmp_path / "adapter", {layer: pair}, lora_alpha=4)
    scorer = HeldoutScorer(text, base)
    before, bare = scorer.score(adapter), scorer.score(base)
    assert before is not None
    assert bare is not None
    assert abs(before - bare) > 1e-4
    assert scorer.score(adapter) == before  # the base is as it was

    tensors = load_file(base / "model.safetensors")
    tensors[f"{layer}.weight"] += np.float32(2) * (pair[1] @ pair[0]).astype(np.float32)
    merged = tmp_path / "merged"
    merged.mkdir()
    for path in base.iterdir():
        (merged / path.name).write_bytes(path.read_bytes())
    save_file(tensors, merged / "model.safetensors", {"format": "pt"})
    assert scorer.score(merged) == pytest.approx(before, rel=1e-5)
    with pytest.raises(UsageError, match="on their base"):
        HeldoutScorer(text, None).score(adapter)


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_searches_and_writes_what_it_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe_of(tmp_path, {"a": [3.0, 0, 0], "b": [1.0, 1, 1]})
    to = tmp_path / "out"
    command = f'{sys.executable} -c "{PRINT_SUM}" {{model}}'
    said = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--search", "greedy", "--minimise"]
    assert main([*said, "--evaluate", command, "--to", str(to), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    manifest = json.loads((to / "merge.json").read_text())
    assert printed["search"] == manifest["recipe"]["search"]
    assert printed["search"]["weights"] == {"a": 1.0, "b": 0.0}
    assert [trial["score"] for trial in printed["search"]["trials"]] == [3.0, 3.0, 3.0]
    assert "trials" not in (to / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "out"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--search", "greedy"], "either a command or held-out text"),
        (["--evaluate", "x {model}"], "without a search"),
        (["--search", "random", "--evaluate", "x {model}"], "no search 'random'"),
        (["--search", "greedy", "--evaluate", "x"], "has no {model}"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    recipe_of(tmp_path, {"a": [3.0, 0, 0], "b": [1.0, 1, 1]})
    given = ["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--to", str(tmp_path / "out")]
    assert main([*given, *options]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("mode", [LoraMode.EXACT, LoraMode.FACTORS])
def test_lorahub_of_adapters_weighs_their_products(tmp_path: Path, mode: LoraMode) -> None:
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((1, 4)), rng.standard_normal((3, 1))) for _ in range(2)]
    for name, pair in zip("ab", pairs, strict=True):
        write_adapter(tmp_path / name, {"fc": pair})
    specs = tuple(InputSpec(path=str(tmp_path / name)) for name in "ab")
    file = RecipeFile(inputs=specs, lora=mode, merge=merge_settings("mean", {}))

    class Products(Scores):
        def score(self, directory: Path) -> float | None:
            product = adapter_product(load_file(directory / "adapter_model.safetensors"), "fc")
            return -float(np.square(product + pairs[1][1] @ pairs[1][0] / 2).sum())

    found = run(understand(file, resolve=Path), tmp_path / "out", Products(None), Method.LORAHUB, 40)
    assert found.trials[0].score == pytest.approx(-np.square(pairs[1][1] @ pairs[1][0] / 2).sum())
    assert found.best.weights[1] == pytest.approx(-0.5, abs=0.1)
