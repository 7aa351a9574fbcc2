"""The commands: fit a router, cut shards, re-seed, ask for a path, generate; and what they say when they cannot."""

from __future__ import annotations

import json
from pathlib import Path as FilePath
from typing import Any

import pytest
import typer
from click.testing import Result
from tests.grids import WORDS, documents, grid_recipe, make_grid
from tests.tiny import write_tiny_base
from typer.testing import CliRunner

from weft.client.commands import routes
from weft.client.grid import Grid
from weft.common.errors import RouterMismatch, UsageError, WeftError
from weft.common.routing import RouterKind, read_router, read_shards, write_router
from weft.common.routing.fit import random_router

APP = typer.Typer()
routes.register(APP)
CPU = ("--device", "cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any) -> FilePath:
    """A base, a corpus and a grid in one directory."""
    root: FilePath = tmp_path_factory.mktemp("world")
    write_tiny_base(root / "base")
    lines = [json.dumps({"text": row.columns["text"]}) for row in documents(60)]
    (root / "corpus.jsonl").write_text("\n".join(lines))
    make_grid(root / "pulled" / "grid", root / "base", grid_recipe(root / "base"))
    return root


def run(*words: object) -> Result:
    return CliRunner().invoke(APP, [str(word) for word in words])


def answer(*words: object) -> Any:
    result = run(*words, "--json")
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


def refusal(*words: object) -> WeftError:
    result = run(*words)
    assert isinstance(result.exception, WeftError), result.output
    return result.exception


def fit(world: FilePath, to: FilePath, *words: object) -> Any:
    return answer(
        *("route", "fit", world / "corpus.jsonl", "--base", world / "base", "--experts", "2x2", "--to", to),
        *("--prefix-tokens", 8, *CPU, *words),
    )


@pytest.mark.parametrize("method", ["kmeans", "product", "random"])
def test_a_router_is_fitted_to_documents(world: FilePath, tmp_path: FilePath, method: str) -> None:
    found = fit(world, tmp_path / "a.router", "--method", method)
    router = read_router(tmp_path / "a.router")
    assert router.kind is RouterKind(method)
    assert found["digest"] == router.digest
    assert found["base"] == grid_recipe(world / "base").base.digest
    assert sum(found["traffic"].values()) == found["documents"] == 60
    assert found["empty"] == [path for path, count in found["traffic"].items() if not count]
    assert list(found["traffic"]) == ["0.0", "0.1", "1.0", "1.1"]


def test_kinds_of_documents_find_their_paths(world: FilePath, tmp_path: FilePath) -> None:
    assert set(fit(world, tmp_path / "a.router")["traffic"].values()) == {15}
    few = fit(world, tmp_path / "b.router", "--documents", 20, "--seed", 3)
    assert few["documents"] == 20


def test_shards_are_cut_by_a_router(world: FilePath, tmp_path: FilePath) -> None:
    fit(world, tmp_path / "a.router")
    words = (
        "route",
        "shard",
        world / "corpus.jsonl",
        "--router",
        tmp_path / "a.router",
        "--base",
        world / "base",
    )
    options = ("--overlap", 2, "--validation-share", 0.2, "--router-share", 0.1, *CPU)
    found = answer(*words, "--to", tmp_path / "shards", *options)
    index = read_shards(tmp_path / "shards", grid_recipe(world / "base"))
    assert found["router"] == index.router == read_router(tmp_path / "a.router").digest
    kept = sum(len(path.read_text().splitlines()) for path in (tmp_path / "shards/heldout").iterdir())
    written = sum(shard.num_documents for shard in index.shards)
    assert 0 < kept < 30
    assert written % 2 == 0
    assert written // 2 + kept < 60
    assert "is not empty" in str(refusal(*words, "--to", tmp_path / "shards", *options))
    assert "--overlap is 9" in str(refusal(*words, "--to", tmp_path / "new", "--overlap", 9, *CPU))


def test_a_discriminative_router_asks_the_paths(world: FilePath, tmp_path: FilePath) -> None:
    words = ("route", "fit", world / "corpus.jsonl", "--method", "discriminative", "--to")
    found = answer(*words, tmp_path / "a.router", "--model", world / "pulled/grid", *CPU)
    router = read_router(tmp_path / "a.router")
    assert router.kind is RouterKind.LINEAR
    assert (router.paths, router.num_prefix_tokens) == (Grid.open(world / "pulled/grid").paths, 8)
    assert sum(found["traffic"].values()) == found["documents"] == 60
    again = ("--share", 0.5, "--router", tmp_path / "a.router")
    half = answer(*words, tmp_path / "b.router", "--model", world / "pulled/grid", *again, *CPU)
    assert 15 < half["documents"] < 45


def test_empty_paths_are_named_and_reseeded(world: FilePath, tmp_path: FilePath) -> None:
    fit(world, tmp_path / "a.router")
    router = read_router(tmp_path / "a.router")
    router.bias[2] = -1e6
    write_router(tmp_path / "b.router", router)
    words = (world / "corpus.jsonl", "--router", tmp_path / "b.router", "--base", world / "base")
    said = run("route", "shard", *words, "--to", tmp_path / "shards", *CPU).stdout
    assert "! no documents: 1.0" in said
    assert f"next: weft route reseed {world / 'corpus.jsonl'}" in said
    found = answer("route", "reseed", *words, "--to", tmp_path / "c.router", *CPU)
    assert found["empty"] == []
    assert read_router(tmp_path / "c.router").digest == found["digest"]


def test_people_are_told_the_traffic(world: FilePath, tmp_path: FilePath) -> None:
    words = ("route", "fit", world / "corpus.jsonl", "--base", world / "base", "--experts", "2x2", *CPU)
    said = run(*words, "--to", tmp_path / "a.router").stdout
    assert "kmeans, 4 paths, 60 documents" in said
    assert said.count("25.0 %") == 4
    words = ("route", "fit", world / "corpus.jsonl", "--base", world / "base", "--experts", "9x8", *CPU)
    assert "72 paths was to be fitted to 60 documents" in str(refusal(*words, "--to", tmp_path / "b.router"))


def test_a_prompt_is_routed(world: FilePath) -> None:
    words = ("route", "prompt", WORDS[0] * 3 + WORDS[3] * 6, "--model", world / "pulled/grid", *CPU)
    found = answer(*words, "--every", 8)
    assert found["path"] == max(found["scores"], key=found["scores"].get)
    assert "".join(chunk["text"] for chunk in found["chunks"]) == WORDS[0] * 3 + WORDS[3] * 6
    said = run(*words).stdout
    assert said.startswith(f"path {found['path']}\n")


def test_text_goes_to_stdout_and_its_path_to_stderr(world: FilePath) -> None:
    words = ("generate", WORDS[1] * 3, "--model", world / "pulled/grid", "--max-new-tokens", 5, *CPU)
    found = answer(*words)
    said = run(*words)
    assert said.stdout == found["text"] + "\n"
    assert said.stderr == f"[path {found['pieces'][0]['path']}]\n"
    named = answer(*words, "--path", "1.0")
    assert {piece["path"] for piece in named["pieces"]} == {"1.0"}


@pytest.mark.parametrize(
    ("words", "cause"),
    [
        (("--method", "kmeans"), "fitted to documents"),
        (("--method", "kmeans", "--base", "b"), "fitted to documents"),
        (("--method", "discriminative"), "fitted to trained paths"),
        (("--method", "discriminative", "--model", "m", "--base", "b"), "fitted to trained paths"),
        (("--base", "b", "--experts", "4by4"), "not levels × experts"),
    ],
)
def test_options_that_do_not_go_together(tmp_path: FilePath, words: tuple[str, ...], cause: str) -> None:
    error = refusal("route", "fit", tmp_path, "--to", tmp_path / "a.router", *words)
    assert isinstance(error, UsageError)
    assert cause in str(error)


def test_what_cannot_be_used_is_said(world: FilePath, tmp_path: FilePath) -> None:
    fit(world, tmp_path / "a.router")
    assert "exists already" in str(
        refusal(
            "route",
            "fit",
            world / "corpus.jsonl",
            "--to",
            tmp_path / "a.router",
            "--base",
            "b",
            "--experts",
            "2x2",
        )
    )
    write_tiny_base(tmp_path / "other", num_layers=2)
    words = (world / "corpus.jsonl", "--router", tmp_path / "a.router", "--base", tmp_path / "other", *CPU)
    assert isinstance(refusal("route", "shard", *words, "--to", tmp_path / "s"), RouterMismatch)
    assert isinstance(refusal("route", "reseed", *words, "--to", tmp_path / "b.router"), RouterMismatch)
    recipe = grid_recipe(world / "base")
    chance = random_router(paths=recipe.topology.paths, base_digest=recipe.base.digest, width=32, seed=0)
    write_router(tmp_path / "r.router", chance)
    words = (world / "corpus.jsonl", "--router", tmp_path / "r.router", "--base", world / "base", *CPU)
    assert "random router" in str(refusal("route", "reseed", *words, "--to", tmp_path / "b.router"))
    assert "no path 7.7" in str(
        refusal("generate", "over", "--model", world / "pulled/grid", "--path", "7.7", *CPU)
    )
