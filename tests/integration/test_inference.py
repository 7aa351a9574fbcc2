"""Inference on a grid equals composing each path by hand; routing, re-routing, generation and damaged grids."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
import torch
from tests.grids import CPU, PREFIX, WORDS, documents, grid_recipe, make_grid
from tests.tiny import write_tiny_base

from weft.client import inference as module
from weft.client.grid import GRID_FILE, Grid, GridModule, is_grid, write_grid
from weft.client.inference import Inference
from weft.common.composition import ResidentBase
from weft.common.errors import DataError, InputError, RouterMismatch, UsageError
from weft.common.ids import Path
from weft.common.modules import Kind
from weft.common.recipe import TaskSettings
from weft.common.routing import read_router, write_router
from weft.common.sequences import IGNORED, Batch, Row, read_documents, text_tokens

KINDS = pytest.mark.parametrize("kind", [Kind.LORA, Kind.FULL])


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> FilePath:
    return write_tiny_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture(scope="module")
def grids(tmp_path_factory: Any, base: FilePath) -> dict[Kind, FilePath]:
    root = tmp_path_factory.mktemp("grids")
    for kind in Kind:
        make_grid(root / kind / "grid", base, grid_recipe(base, kind=kind), with_best=True)
    return {kind: root / kind / "grid" for kind in Kind}


@functools.cache
def another_base(base: FilePath, kind: Kind) -> ResidentBase:
    task = TaskSettings(prefix_tokens=PREFIX)
    return ResidentBase.load(base, task, device=CPU.torch_device, dtype=torch.float32, kind=kind)


def by_hand(base: FilePath, grid: Grid, path: Path, batch: Batch) -> Any:
    """Logits of a path, composed alone on another copy of the base."""
    composed = another_base(base, grid.recipe.topology.kind).compose(grid.recipe, grid.tensors(path))
    with torch.no_grad():
        return composed.logits(batch).numpy()


def label_losses(base: FilePath, grid: Grid, path: Path, document: Any) -> dict[int, float]:
    """Nats of each label of a document under a path, by its position in the document, in float64."""
    sequences = document.sequences
    batch = sequences.select(np.arange(len(sequences)))
    logits = by_hand(base, grid, path, batch).astype(np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    found = {}
    for window, labels in enumerate(batch.labels):
        for place, label in enumerate(labels):
            if label != IGNORED:
                position = int(document.positions[window, place])
                found[position] = -float(log_probabilities[window, place, label])
    return found


# -- paths -----------------------------------------------------------------------------------------------------


@KINDS
def test_every_path_computes_what_it_computes_alone(base: FilePath, grids: Any, kind: Kind) -> None:
    tokens = np.array([[5, 17, 99, 4, 250, 31]], np.int64)
    batch = Batch(tokens=tokens, labels=tokens, lengths=np.array([6]))
    with Inference.open(grids[kind], device=CPU) as model:
        assert len({by_hand(base, model.grid, path, batch).tobytes() for path in model.paths}) == 4
        for path in (*model.paths, *reversed(model.paths)):  # composed first, then switched back to
            with torch.no_grad():
                found = model.use(path).logits(batch).numpy()
            np.testing.assert_allclose(found, by_hand(base, model.grid, path, batch), rtol=1e-5, atol=1e-5)


def test_the_path_used_longest_ago_makes_room(grids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATHS_RESIDENT_MAX", 2)
    tokens = np.array([[5, 17, 99]], np.int64)
    batch = Batch(tokens=tokens, labels=tokens, lengths=np.array([3]))
    with Inference.open(grids[Kind.LORA], device=CPU) as model, torch.no_grad():
        seen = {path: model.use(path).logits(batch).numpy() for path in model.paths}
        for path in model.paths:
            np.testing.assert_allclose(model.use(path).logits(batch).numpy(), seen[path], atol=1e-6)
        assert len(model._slots) == 2


def test_best_versions_are_used_where_a_path_has_them(grids: Any) -> None:
    grid = Grid.open(grids[Kind.LORA])
    first, second = Path((0, 1)), Path((1, 1))
    assert [item.version for item in grid.versions(first, best=True)] == [3, 1]
    assert [item.version for item in grid.versions(first)] == [3, 3]
    assert [item.version for item in grid.versions(second, best=True)] == [3, 3]
    with Inference.open(grids[Kind.LORA], device=CPU, best=True) as model:
        best = model.perplexity(documents(4), path=first).loss
    with Inference.open(grids[Kind.LORA], device=CPU) as model:
        assert model.perplexity(documents(4), path=first).loss != best


# -- routing ---------------------------------------------------------------------------------------------------


def test_texts_of_a_kind_go_along_one_path(grids: Any) -> None:
    with Inference.open(grids[Kind.LORA], device=CPU) as model:
        paths = [model.route(word * 5).path for word in WORDS]
        assert len(set(paths)) == 4
        again = [model.route(word * 9 + "and more").path for word in WORDS]
        routed = model.route(WORDS[0] * 5)
    assert again == paths
    scores = [score for _, score in routed.scores]
    assert scores == sorted(scores, reverse=True)
    assert {path for path, _ in routed.scores} == set(model.paths)


def test_routing_does_not_depend_on_the_path_in_use(grids: Any) -> None:
    with Inference.open(grids[Kind.FULL], device=CPU) as model:
        before = model.route(WORDS[1] * 5)
        model.use(model.paths[3])
        after = model.route(WORDS[1] * 5)
    assert before.path == after.path
    np.testing.assert_allclose(
        [score for _, score in before.scores], [score for _, score in after.scores], rtol=1e-4, atol=1e-4
    )


def test_chunks_are_routed_by_the_chunk_before(grids: Any) -> None:
    text = WORDS[0] * 12 + WORDS[3] * 30
    with Inference.open(grids[Kind.LORA], device=CPU) as model:
        tokens = text_tokens(text, model._resident.tokenizer)
        chunks = model.route_along(text, every=16)
        own = [
            model.choose([tokens[start : start + 16][-PREFIX:]])[0]
            for start in range(PREFIX, len(tokens), 16)
        ]
        prefix = model.route(text).path
    assert "".join(chunk for chunk, _ in chunks) == text
    assert [path for _, path in chunks] == [prefix, prefix, *own[:-1]]
    assert len({path for _, path in chunks}) > 1


# -- judging ---------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("every", [None, 5, 16])
def test_perplexity_is_that_of_each_label_along_its_own_path(
    base: FilePath, grids: Any, kind: Kind, every: int | None
) -> None:
    rows = [Row({"text": WORDS[0] * 4 + WORDS[3] * 5}, "1"), Row({"text": WORDS[2] * 6}, "2")]
    with Inference.open(grids[kind], device=CPU) as model:
        found = model.perplexity(rows, every=every)
        grid, tokenizer = model.grid, model._resident.tokenizer
        losses, num_bytes = [], 0
        for document in read_documents(rows, tokenizer, sequence_length=16, prefix_tokens=PREFIX):
            num_bytes += int(document.sequences.num_bytes.sum())
            tokens = document.tokens.tolist()
            under = {path: label_losses(base, grid, path, document) for path in grid.paths}
            for position in under[grid.paths[0]]:
                chunk = 0 if every is None else (position - PREFIX) // every
                source = tokens[:PREFIX]
                if chunk:
                    start = PREFIX + (chunk - 1) * (every or 0)
                    source = tokens[start : start + (every or 0)][-PREFIX:]
                losses.append(under[model.choose([source])[0]][position])
    assert found.num_labels == len(losses)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.num_bytes == num_bytes
    assert found.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / num_bytes, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert sum(item.num_labels for item in found.paths) == len(losses)
    assert found.num_documents == 2


def test_blocks_and_batches_change_nothing(grids: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Inference.open(grids[Kind.LORA], device=CPU) as model:
        whole = model.perplexity(documents(9), every=8)
        monkeypatch.setattr(module, "_BLOCK_DOCUMENTS", 2)
        told: list[int] = []
        parts = model.perplexity(documents(9), every=8, progress=lambda done, total: told.append(done))
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.num_labels == whole.num_labels
    assert told == [2, 4, 6, 8, 9]


def test_documents_within_the_prefix_count_for_nothing(grids: Any) -> None:
    with Inference.open(grids[Kind.LORA], device=CPU) as model:
        with pytest.raises(DataError, match="no document is longer than the 8 tokens"):
            model.perplexity([Row({"text": "over"}, "1")])
        both = model.perplexity([Row({"text": "over"}, "1"), *documents(1)])
        assert both.loss == pytest.approx(model.perplexity(documents(1)).loss, rel=1e-6)
        assert both.num_documents == 1


def test_losses_of_every_path_are_what_a_discriminative_router_is_fitted_to(grids: Any) -> None:
    rows = documents(5)
    with Inference.open(grids[Kind.LORA], device=CPU) as model:
        features, losses = model.path_losses(rows, like=model.router)
        assert features.shape[0] == 5
        for index, path in enumerate(model.paths):
            score = model.perplexity(rows, path=path)
            assert losses[:, index].sum() == pytest.approx(score.loss * score.num_labels, rel=1e-5)


# -- writing ---------------------------------------------------------------------------------------------------


@KINDS
def test_greedy_text_is_what_the_whole_context_says(base: FilePath, grids: Any, kind: Kind) -> None:
    with Inference.open(grids[kind], device=CPU) as model:
        prompt = WORDS[1] * 4
        pieces = list(model.generate(prompt, max_new_tokens=10))
        path = model.route(prompt).path
        assert {piece.path for piece in pieces} == {path}
        tokens = text_tokens(prompt, model._resident.tokenizer)
        num_prompt = len(tokens)
        for _ in range(10):
            batch = Batch(
                tokens=np.array([tokens]), labels=np.array([tokens]), lengths=np.array([len(tokens)])
            )
            with torch.no_grad():
                token = int(model.use(path).logits(batch)[0, -1].argmax())
            if token == model._resident.tokenizer.eos_token_id:
                break
            tokens.append(token)
        expected = model._resident.tokenizer.decode(tokens)[len(prompt) :]
    assert len(tokens) > num_prompt
    assert "".join(piece.text for piece in pieces) == expected


def test_drawn_text_follows_from_the_seed(grids: Any) -> None:
    with Inference.open(grids[Kind.LORA], device=CPU) as model:

        def text(seed: int) -> str:
            drawn = model.generate(WORDS[0], max_new_tokens=16, temperature=1.0, seed=seed)
            return "".join(piece.text for piece in drawn)

        assert text(1) == text(1)
        assert text(1) != text(2)


def test_a_text_that_turns_goes_along_another_path(grids: Any) -> None:
    prompt = WORDS[0] * 6 + WORDS[3] * 6
    with Inference.open(grids[Kind.LORA], device=CPU) as model:
        kept = next(iter(model.generate(prompt, max_new_tokens=4))).path
        anew = next(iter(model.generate(prompt, max_new_tokens=4, every=8))).path
        named = next(iter(model.generate(prompt, max_new_tokens=4, path=model.paths[2]))).path
        assert (kept, anew) == (model.route(WORDS[0] * 4).path, model.route(WORDS[3] * 8).path)
        assert kept != anew
        assert named == model.paths[2]


def test_two_texts_may_be_written_by_turns(grids: Any) -> None:
    with Inference.open(grids[Kind.FULL], device=CPU) as model:
        alone = [
            "".join(piece.text for piece in model.generate(word * 3, max_new_tokens=6)) for word in WORDS[:2]
        ]
        both = [model.generate(word * 3, max_new_tokens=6) for word in WORDS[:2]]
        texts = ["", ""]
        left = {0, 1}
        while left:
            for index in sorted(left):
                piece = next(both[index], None)
                if piece is None:
                    left.discard(index)
                else:
                    texts[index] += piece.text
    assert texts == alone


def test_a_prompt_without_room_is_refused(grids: Any) -> None:
    with (
        Inference.open(grids[Kind.LORA], device=CPU) as model,
        pytest.raises(UsageError, match="the base reads 128"),
    ):
        list(model.generate("0123456789" * 40))


# -- grids -----------------------------------------------------------------------------------------------------


def test_a_grid_without_router_needs_a_path(tmp_path: FilePath, base: FilePath) -> None:
    make_grid(tmp_path / "grid", base, grid_recipe(base), with_router=False)
    with Inference.open(tmp_path / "grid", device=CPU) as model:
        with pytest.raises(UsageError, match="4 paths and no router"):
            model.route("over")
        with pytest.raises(UsageError, match="4 paths and no router"):
            next(model.generate("over"))
        assert model.perplexity(documents(2), path=model.paths[1]).num_documents == 2


def test_a_grid_of_one_path_needs_no_router(tmp_path: FilePath, base: FilePath) -> None:
    make_grid(tmp_path / "grid", base, grid_recipe(base, experts=(1, 1)), with_router=False)
    with Inference.open(tmp_path / "grid", device=CPU) as model:
        assert model.perplexity(documents(2)).num_documents == 2
        assert next(model.generate("over ", max_new_tokens=8)).path == Path((0, 0))


def test_damaged_grids_are_refused(tmp_path: FilePath, base: FilePath) -> None:
    directory = tmp_path / "grid"
    assert not is_grid(directory)
    with pytest.raises(InputError, match="is not a grid") as caught:
        Grid.open(directory)
    assert "--all" in caught.value.hint
    index = make_grid(directory, base, grid_recipe(base))
    assert is_grid(directory)
    assert Grid.open(directory).index == index
    file = directory / index.modules[0].file
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    with pytest.raises(InputError, match="is not the file that was pulled"):
        Grid.open(directory).tensors(index.recipe.topology.paths[0])
    file.unlink()
    with pytest.raises(InputError, match="is missing"):
        Grid.open(directory)


@pytest.mark.parametrize(
    ("old", "new", "cause"),
    [
        ('"format": 1', '"format": 2', "format 2 is not known"),
        ('"module": "0.1"', '"module": "0.0"', "lacks module 0.1"),
        ('"module": "0.1"', '"module": "../../x"', "does not describe a grid"),
        ('"version": 3', '"version": -3', "does not describe a grid"),
        ('"modules"', '"moduels"', "does not describe a grid"),
    ],
)
def test_an_index_that_is_none_is_refused(
    tmp_path: FilePath, base: FilePath, old: str, new: str, cause: str
) -> None:
    make_grid(tmp_path / "grid", base, grid_recipe(base))
    path = tmp_path / "grid" / GRID_FILE
    lines = path.read_text().splitlines()
    last = max(number for number, line in enumerate(lines) if old in line)
    lines[last] = lines[last].replace(old, new)
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=cause):
        Grid.open(tmp_path / "grid")


def test_a_router_of_another_run_is_refused(tmp_path: FilePath, base: FilePath) -> None:
    import dataclasses

    from blake3 import blake3

    make_grid(tmp_path / "grid", base, grid_recipe(base))
    path = tmp_path / "grid/router.router"
    router = read_router(path)
    other = dataclasses.replace(router, paths=(*router.paths[:3], Path((7, 7))))
    write_router(path, other)
    with pytest.raises(InputError, match="not the file that was pulled"):
        Grid.open(tmp_path / "grid")
    index = json.loads((tmp_path / "grid" / GRID_FILE).read_text())
    index["router"] = blake3(path.read_bytes()).hexdigest()
    (tmp_path / "grid" / GRID_FILE).write_text(json.dumps(index))
    with pytest.raises(RouterMismatch):
        Grid.open(tmp_path / "grid")


def test_what_is_not_verified_is_not_written(tmp_path: FilePath, base: FilePath) -> None:
    index = make_grid(tmp_path / "grid", base, grid_recipe(base))
    sources = {item: tmp_path / "grid" / item.file for item in index.modules}
    first = index.modules[0]
    swapped = {**sources, first: sources[index.modules[-1]]}
    with pytest.raises(InputError, match="not the file that was pulled"):
        write_grid(tmp_path / "new", index, modules=swapped, router=tmp_path / "grid/router.router")
    assert not (tmp_path / "new").exists()
    write_grid(tmp_path / "new", index, modules=sources, router=tmp_path / "grid/router.router")
    assert Grid.open(tmp_path / "new").index == index
    assert sorted(path.name for path in tmp_path.iterdir() if "partial" in path.name) == []
    with pytest.raises(UsageError, match="not empty"):
        write_grid(tmp_path / "new", index, modules=sources)


def test_names_of_files_follow_from_module_and_version(grids: Any) -> None:
    grid = Grid.open(grids[Kind.LORA])
    assert (
        GridModule(module="1.0", version=3, blake3=grid.index.modules[0].blake3).file
        == "modules/1.0@3.module"
    )
    assert grid.tensors(Path((0, 0))).keys() == grid.tensors(Path((1, 1))).keys()


def test_another_base_is_refused(tmp_path: FilePath, grids: Any) -> None:
    other = write_tiny_base(tmp_path / "other", num_layers=2)
    with pytest.raises(InputError, match="differs from the run's base"):
        Inference.open(grids[Kind.LORA], device=CPU, base=str(other))


def test_a_path_that_takes_over_reads_all_that_was_written(grids: Any) -> None:
    prompt = WORDS[0] * 3 + WORDS[3]
    with Inference.open(grids[Kind.LORA], device=CPU) as model:
        pieces = list(model.generate(prompt, max_new_tokens=24, every=4, temperature=1.5, seed=4))
        tokens = text_tokens(prompt, model._resident.tokenizer)
        chooser, paths = torch.Generator().manual_seed(4), []
        for _ in range(24):
            chunk = max(0, (len(tokens) - PREFIX) // 4)
            source = tokens[:PREFIX] if not chunk else tokens[PREFIX + 4 * (chunk - 1) : PREFIX + 4 * chunk]
            paths.append(model.choose([source])[0])
            batch = Batch(
                tokens=np.array([tokens]), labels=np.array([tokens]), lengths=np.array([len(tokens)])
            )
            with torch.no_grad():
                logits = model.use(paths[-1]).logits(batch)[0, -1]
            token = int(torch.multinomial(torch.softmax(logits / 1.5, 0), 1, generator=chooser))
            if token == model._resident.tokenizer.eos_token_id:
                break
            tokens.append(token)
        expected = model._resident.tokenizer.decode(tokens)[len(prompt) :]
    assert len(set(paths)) > 1
    assert "".join(piece.text for piece in pieces) == expected


def test_grids_that_cannot_be_run_say_why(
    tmp_path: FilePath, base: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_grid(tmp_path / "grid", base, grid_recipe(base))
    path = tmp_path / "grid" / GRID_FILE
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "base": ""}))
    with pytest.raises(UsageError, match="does not say where its base is"):
        Inference.open(tmp_path / "grid", device=CPU)
    with Inference.open(tmp_path / "grid", device=CPU, base=str(base)) as model:
        assert model.route("over").path in model.paths
        with pytest.raises(UsageError, match="every 0 tokens"):
            model.perplexity(documents(1), every=0)
        monkeypatch.setattr(Grid, "tensors", lambda *given, **named: {})
        with pytest.raises(InputError, match=r"modules of path 1\.1 do not fit the base"):
            model.use(Path((1, 1)))
    task = {"kind": "sequence-classification", "num_labels": 3}
    path.write_text(json.dumps({**index, "recipe": {**index["recipe"], "task": task}}))
    with pytest.raises(UsageError, match="a grid for sequence-classification"):
        Inference.open(tmp_path / "grid", device=CPU)
