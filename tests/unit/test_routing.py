from __future__ import annotations

import dataclasses
import struct
import subprocess
import sys
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import tiny_tokenizer

from weft.common.errors import DataError, InputError, RouterMismatch, UsageError
from weft.common.ids import Digest, Path, run_id
from weft.common.modules import Topology
from weft.common.recipe import BasePin, Recipe
from weft.common.routing import (
    Router,
    RouterKind,
    check_router,
    check_shard,
    empty_paths,
    fit_discriminative,
    fit_kmeans,
    fit_product,
    random_router,
    read_router,
    read_shards,
    reseed,
    route_documents,
    traffic,
    write_router,
    write_shards,
)
from weft.common.sequences import Row

BASE = Digest("ab" * 32)
GRID = Topology(experts=(2, 3))
RNG = np.random.default_rng(0)


def clusters(num: int, each: int = 40, *, width: int = 5, seed: int = 0) -> tuple[Any, Any]:
    """Well separated Gaussian clusters: features [N, d] and their true cluster [N]."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(0, 10, (num, width))
    labels = np.repeat(np.arange(num), each)
    return (centres[labels] + rng.normal(0, 0.3, (len(labels), width))).astype(np.float32), labels


def a_router(paths: tuple[Path, ...] = GRID.paths, *, width: int = 5, seed: int = 1) -> Router:
    rng = np.random.default_rng(seed)
    return Router(
        kind=RouterKind.LINEAR,
        paths=paths,
        base_digest=BASE,
        centre=rng.normal(size=width).astype(np.float32),
        weights=rng.normal(size=(len(paths), width)),
        bias=rng.normal(size=len(paths)),
    )


def recipe(topology: Topology = GRID, base: Digest = BASE) -> Recipe:
    return Recipe(run=run_id("routed"), base=BasePin(digest=base), topology=topology)


# -- routing ---------------------------------------------------------------------------------------------------


def test_the_best_paths_come_best_first() -> None:
    router = a_router()
    features = RNG.normal(size=(50, 5)).astype(np.float32)
    scores = router.scores(features)
    routes = router.route(features, top_n=3)
    assert routes.shape == (50, 3)
    for row, chosen in zip(scores, routes, strict=True):
        assert row[chosen].tolist() == sorted(row, reverse=True)[:3]


@pytest.mark.parametrize("top_n", [0, 7])
def test_more_paths_than_there_are_cannot_be_asked_for(top_n: int) -> None:
    with pytest.raises(ValueError, match="of 6 paths"):
        a_router().route(np.zeros((1, 5), np.float32), top_n=top_n)


@pytest.mark.parametrize("shape", [(5,), (2, 4)])
def test_features_of_another_width_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="features have shape"):
        a_router().scores(np.zeros(shape, np.float32))


def test_traffic_counts_every_path_and_names_the_empty_ones() -> None:
    counts = traffic(np.array([[0, 2], [2, 0], [2, 5]]), GRID.paths)
    assert counts == dict(zip(GRID.paths, [2, 0, 3, 0, 0, 1], strict=True))
    assert empty_paths(counts) == (GRID.paths[1], GRID.paths[3], GRID.paths[4])


# -- fitting ---------------------------------------------------------------------------------------------------


def test_every_cluster_gets_a_path_of_its_own() -> None:
    features, labels = clusters(6)
    router = fit_kmeans(features, paths=GRID.paths, base_digest=BASE, seed=3)
    routes = router.route(features)[:, 0]
    assert len({(route, label) for route, label in zip(routes.tolist(), labels.tolist(), strict=True)}) == 6
    assert set(traffic(routes, GRID.paths).values()) == {40}


def test_fitting_is_a_function_of_documents_and_seed() -> None:
    features, _ = clusters(6)
    digests = {fit_kmeans(features, paths=GRID.paths, base_digest=BASE, seed=3).digest for _ in range(2)}
    digests |= {fit_product(features, topology=GRID, base_digest=BASE, seed=3).digest for _ in range(2)}
    assert len(digests) == 2


def test_a_product_router_finds_factors() -> None:
    rng = np.random.default_rng(5)
    row, column = rng.integers(0, 2, 400), rng.integers(0, 3, 400)
    plane = np.array([[0, 0], [6, 0], [3, 5]])[column]
    latent = np.column_stack([8 * row, plane]) + rng.normal(0, 0.3, (400, 3))
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0][:3]
    router = fit_product((latent @ rotation).astype(np.float32), topology=GRID, base_digest=BASE, seed=0)
    routes = router.route((latent @ rotation).astype(np.float32))[:, 0]
    agreeing = sum(max(np.bincount(routes[(row == r) & (column == c)])) for r in range(2) for c in range(3))
    assert agreeing / 400 > 0.7


def test_path_specific_levels_have_no_part_in_a_product_router() -> None:
    features, _ = clusters(6)
    topology = Topology(experts=(2, 0, 3))
    router = fit_product(features, topology=topology, base_digest=BASE, seed=0)
    shared = fit_product(features, topology=GRID, base_digest=BASE, seed=0)
    assert router.paths == topology.paths
    assert [path.experts[1] for path in router.paths] == list(range(6))
    assert np.array_equal(router.scores(features), shared.scores(features))


def test_too_few_documents_are_refused() -> None:
    few = np.zeros((5, 4), np.float32)
    with pytest.raises(DataError, match="6 paths was to be fitted to 5 documents"):
        fit_kmeans(few, paths=GRID.paths, base_digest=BASE, seed=0)
    with pytest.raises(DataError, match="6 paths was to be fitted to 5 documents"):
        fit_product(few, topology=GRID, base_digest=BASE, seed=0)


def test_features_that_are_not_finite_are_refused() -> None:
    features = np.full((9, 4), np.nan, np.float32)
    with pytest.raises(DataError, match="not finite"):
        fit_kmeans(features, paths=GRID.paths, base_digest=BASE, seed=0)


def test_equal_documents_give_a_router_with_empty_paths() -> None:
    router = fit_kmeans(np.ones((9, 4), np.float32), paths=GRID.paths, base_digest=BASE, seed=0)
    counts = traffic(router.route(np.ones((9, 4), np.float32)), GRID.paths)
    assert len(empty_paths(counts)) == 5


def test_a_random_router_spreads_documents_and_repeats_itself() -> None:
    router = random_router(paths=GRID.paths, base_digest=BASE, width=5, seed=4)
    features, labels = clusters(2, each=600)
    routes = router.route(features)[:, 0]
    assert np.array_equal(routes, router.route(features + np.float32(1e-7))[:, 0])
    for label in range(2):
        assert np.bincount(routes[labels == label], minlength=6).min() > 60
    other = random_router(paths=GRID.paths, base_digest=BASE, width=5, seed=5)
    assert (other.route(features)[:, 0] != routes).mean() > 0.7


def test_a_discriminative_router_learns_who_predicts_best() -> None:
    features, labels = clusters(6)
    wanted = np.array([4, 2, 0, 5, 3, 1])[labels]
    losses = np.where(np.arange(6) == wanted[:, None], 1.0, 2.0)
    router = fit_discriminative(features, losses, like=a_router())
    assert router.kind is RouterKind.LINEAR
    assert router.route(features)[:, 0].tolist() == wanted.tolist()


@pytest.mark.parametrize("present", [[3], [1, 4], [0, 2, 5]])
def test_paths_that_are_never_best_get_nothing(present: list[int]) -> None:
    features, labels = clusters(len(present))
    wanted = np.array(present)[labels]
    losses = np.where(np.arange(6) == wanted[:, None], 1.0, 2.0)
    routes = fit_discriminative(features, losses, like=a_router()).route(features)[:, 0]
    assert routes.tolist() == wanted.tolist()


def test_losses_must_fit_and_be_finite() -> None:
    features = np.zeros((2, 5), np.float32)
    with pytest.raises(ValueError, match="losses have shape"):
        fit_discriminative(features, np.zeros((2, 5)), like=a_router())
    with pytest.raises(DataError, match="not finite"):
        fit_discriminative(features, np.full((2, 6), np.inf), like=a_router())
    with pytest.raises(DataError, match="no documents"):
        fit_discriminative(features[:0], np.zeros((0, 6)), like=a_router())


def test_reseeding_moves_documents_of_the_busiest_path_only() -> None:
    features, labels = clusters(4, each=50)
    losses = np.where(np.arange(6) == labels[:, None] // 2, 1.0, 2.0)  # paths 2 to 5 are never best
    router = fit_discriminative(features, losses, like=a_router())
    before = router.route(features)[:, 0]
    seeded = reseed(router, features, seed=0)
    after = seeded.route(features)[:, 0]
    assert np.bincount(before, minlength=6).tolist() == [100, 100, 0, 0, 0, 0]
    assert np.bincount(after, minlength=6).min() > 0
    origin = {path: set(before[after == path].tolist()) for path in range(6)}
    assert all(len(paths) == 1 for paths in origin.values())


def test_a_router_without_empty_paths_is_left_alone() -> None:
    features, _ = clusters(6)
    router = fit_kmeans(features, paths=GRID.paths, base_digest=BASE, seed=3)
    assert reseed(router, features, seed=0) is router


def test_what_cannot_be_reseeded_is_refused() -> None:
    router = fit_kmeans(np.ones((9, 4), np.float32), paths=GRID.paths, base_digest=BASE, seed=0)
    with pytest.raises(DataError, match="too alike to share"):
        reseed(router, np.ones((9, 4), np.float32), seed=0)
    with pytest.raises(ValueError, match="random router"):
        reseed(
            random_router(paths=GRID.paths, base_digest=BASE, width=4, seed=0),
            np.ones((9, 4), np.float32),
            seed=0,
        )


# -- files -----------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back(tmp_path: FilePath) -> None:
    router = a_router()
    size = write_router(tmp_path / "a.router", router)
    found = read_router(tmp_path / "a.router")
    assert size == (tmp_path / "a.router").stat().st_size
    for field in dataclasses.fields(Router):
        assert np.array_equal(getattr(found, field.name), getattr(router, field.name))
    features = RNG.normal(size=(9, 5)).astype(np.float32)
    assert np.array_equal(found.scores(features), router.scores(features))


def test_the_digest_is_that_of_the_file(tmp_path: FilePath) -> None:
    from blake3 import blake3

    router = random_router(paths=GRID.paths, base_digest=BASE, width=3, seed=11)
    write_router(tmp_path / "a.router", router)
    assert router.digest == blake3((tmp_path / "a.router").read_bytes()).hexdigest()
    assert read_router(tmp_path / "a.router").digest == router.digest


@settings(max_examples=150)
@given(st.data())
def test_damaged_files_are_refused_or_are_routers(tmp_path_factory: Any, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.router"
    write_router(path, a_router())
    content = bytearray(path.read_bytes())
    match data.draw(st.sampled_from(["flip", "cut", "grow", "header"])):
        case "flip":
            for _ in range(data.draw(st.integers(1, 4))):
                content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        case "cut":
            del content[data.draw(st.integers(0, len(content) - 1)) :]
        case "grow":
            content += data.draw(st.binary(min_size=1, max_size=16))
        case _:
            content[:8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    path.write_bytes(content)
    try:
        router = read_router(path)
    except InputError:
        return
    assert len(router.paths) == len(router.bias) == len(router.weights)
    assert np.isfinite(router.weights).all()


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"kind": "oracle"}, "kind is not known"),
        ({"format": "weft router 2"}, "metadata"),
        ({"feature": "first-token"}, "feature is not known"),
        ({"base": "AB" * 32}, "not a digest"),
        ({"prefix_tokens": "0"}, "prefix_tokens is not a number"),
        ({"prefix_tokens": "032"}, "prefix_tokens is not a number"),
        ({"seed": "-1"}, "seed is not a number"),
        ({"more": "x"}, "metadata"),
    ],
)
def test_metadata_that_no_router_has(tmp_path: FilePath, changed: dict[str, str], cause: str) -> None:
    from weft.common.routing.file import _metadata, _tensors
    from weft.common.tensors import write_tensors

    router = a_router()
    write_tensors(tmp_path / "a.router", _tensors(router), _metadata(router) | changed)
    with pytest.raises(InputError, match=cause):
        read_router(tmp_path / "a.router")


@pytest.mark.parametrize(
    ("name", "tensor", "cause"),
    [
        ("weights", np.full((6, 5), np.nan), "not finite"),
        ("weights", np.zeros((6, 5), np.float32), "do not fit one another"),
        ("weights", np.zeros((6, 0)), "do not fit one another"),
        ("weights", np.zeros(6), "lacks weights"),
        ("bias", np.zeros(5), "do not fit one another"),
        ("paths", np.zeros((6, 2), np.int64), "names a path twice"),
        ("paths", np.full((6, 2), -1, np.int64), "out of range"),
        ("paths", np.zeros((6, 0), np.int64), "0 levels"),
        ("another", np.zeros(1), "do not fit one another"),
    ],
)
def test_tensors_that_no_router_has(
    tmp_path: FilePath, name: str, tensor: np.ndarray[Any, Any], cause: str
) -> None:
    from weft.common.routing.file import _metadata, _tensors
    from weft.common.tensors import write_tensors

    router = a_router()
    write_tensors(tmp_path / "a.router", _tensors(router) | {name: tensor}, _metadata(router))
    with pytest.raises(InputError, match=cause):
        read_router(tmp_path / "a.router")


def test_a_file_that_is_not_there_is_named(tmp_path: FilePath) -> None:
    with pytest.raises(InputError, match=r"none\.router"):
        read_router(tmp_path / "none.router")


def test_a_router_of_another_base_or_other_paths_is_refused() -> None:
    check_router(a_router(), recipe())
    with pytest.raises(RouterMismatch, match="abababababab and the run's is cdcdcdcdcdcd"):
        check_router(a_router(), recipe(base=Digest("cd" * 32)))
    with pytest.raises(
        RouterMismatch, match=r"knows 6 paths \(0.0 to 1.2\) and the run's 4 are 0.0 to 1.1"
    ) as caught:
        check_router(a_router(), recipe(Topology(experts=(2, 2))))
    assert "--experts 2x2" in caught.value.hint


# -- documents and shards --------------------------------------------------------------------------------------


class FakeBase:
    """Features that follow from the first token alone."""

    tokenizer: Any = tiny_tokenizer()

    def features(self, tokens: Any, lengths: Any) -> Any:
        assert (lengths >= 1).all()
        return np.stack([tokens[:, 0] % 7, tokens[:, 0] % 5, lengths], 1).astype(np.float32)


def documents(count: int = 90) -> list[Row]:
    return [Row({"text": f"{chr(97 + n % 26)} document {n}", "n": n}, f"row {n}") for n in range(count)]


def test_documents_are_routed_as_their_features_are() -> None:
    router = a_router(width=3)
    routed = list(route_documents(documents(), FakeBase(), router, top_n=2))
    assert [item.row for item in routed] == documents()
    for item in routed:
        assert list(item.routes) == np.argsort(-item.scores, kind="stable")[:2].tolist()


def test_shards_hold_each_document_in_its_paths(tmp_path: FilePath) -> None:
    import json

    router = a_router(width=3)
    routed = list(route_documents(documents(), FakeBase(), router, top_n=2))
    index = write_shards(tmp_path / "s", routed, router, overlap=2, validation_share=0.2, router_share=0.1)
    assert read_shards(tmp_path / "s", recipe()) == index
    assert (index.router, index.base, index.overlap) == (router.digest, BASE, 2)
    trained: dict[int, set[str]] = {}
    for shard in index.shards:
        lines = (tmp_path / "s" / shard.file).read_text().splitlines()
        assert len(lines) == shard.num_documents
        check_shard(tmp_path / "s", shard)
        for line in lines:
            trained.setdefault(json.loads(line)["n"], set()).add(shard.path)
    heldout = {
        json.loads(line)["n"]
        for file in (tmp_path / "s/heldout").iterdir()
        for line in file.read_text().splitlines()
    }
    assert heldout
    assert not heldout & trained.keys()
    assert 0 < len(heldout | trained.keys()) < 90  # some are reserved
    expected = {item.row.columns["n"]: {str(router.paths[r]) for r in item.routes} for item in routed}
    assert all(expected[number] == paths for number, paths in trained.items())


def test_a_shard_that_vanished_or_changed_is_named(tmp_path: FilePath) -> None:
    router = a_router(width=3)
    routed = list(route_documents(documents(), FakeBase(), router))
    index = write_shards(tmp_path, routed, router, overlap=1, validation_share=0, router_share=0)
    full = max(index.shards, key=lambda shard: shard.num_documents)
    path = tmp_path / full.file
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"x\n")
    assert read_shards(tmp_path) == index
    with pytest.raises(InputError, match=f"shard of path {full.path} is damaged"):
        check_shard(tmp_path, full)
    path.write_bytes(content[:-1])
    with pytest.raises(InputError, match=f"shard of path {full.path} is not the one"):
        read_shards(tmp_path)
    path.unlink()
    with pytest.raises(InputError, match=f"shard of path {full.path} is missing"):
        read_shards(tmp_path)


def test_shards_of_another_run_are_refused(tmp_path: FilePath) -> None:
    write_shards(tmp_path, [], a_router(), overlap=1, validation_share=0, router_share=0)
    with pytest.raises(InputError, match="other paths"):
        read_shards(tmp_path, recipe(Topology(experts=(3, 2, 1))))
    with pytest.raises(InputError, match="made with base"):
        read_shards(tmp_path, recipe(base=Digest("cd" * 32)))
    with pytest.raises(UsageError, match="not empty"):
        write_shards(tmp_path, [], a_router(), overlap=1, validation_share=0, router_share=0)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"path-0.0.jsonl"', '"../../etc/passwd"'),
        ('"0.0"', '"0,0"'),
        ('"overlap": 1', '"overlap": "1"'),
        ('"format"', '"fromat"'),
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path: FilePath, old: str, new: str) -> None:
    write_shards(tmp_path, [], a_router(), overlap=1, validation_share=0, router_share=0)
    index = tmp_path / "index.json"
    assert old in index.read_text()
    index.write_text(index.read_text().replace(old, new, 1))
    with pytest.raises(InputError, match="not an index of shards"):
        read_shards(tmp_path)


def test_a_directory_without_an_index_says_what_to_do(tmp_path: FilePath) -> None:
    with pytest.raises(InputError, match="cannot read") as caught:
        read_shards(tmp_path)
    assert "weft route shard" in caught.value.hint


def test_routers_are_read_without_torch_and_without_scikit_learn() -> None:
    code = (
        "import weft.common.routing, sys; sys.exit(bool({'torch', 'sklearn', 'scipy'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
