"""The result on its way to disk: shards, the journal, what is believed after a crash, and what goes wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file
from tests.handmade import block_tensors, write_model

from weft.common.errors import ComputeError, DiskFull, StateLocked, StorageError, UsageError
from weft.common.modules import TensorSpec
from weft.server.offline import merging
from weft.server.offline.output import JOURNAL, Done, Output, Shard, plan_shards
from weft.server.offline.recipe import InputSpec, RecipeFile, understand

SPECS = (
    TensorSpec("a", "F32", (5, 2)),
    TensorSpec("b", "BF16", (3,)),
    TensorSpec("c", "I64", (2,)),
    TensorSpec("d", "F16", (4,)),
    TensorSpec("empty", "F32", (0, 3)),
)
LONG = 1 << 30


def opened(to: Path, *, shards: Sequence[Shard] | None = None, identity: str = "x") -> Output:
    cut = shards or plan_shards(SPECS, stem="model", shard_bytes_max=LONG)
    return Output(to, cut, identity, advance=lambda count: None)


def fill(into: Output, names: Sequence[str] = ("a", "b", "c", "d", "empty")) -> None:
    def write_a() -> None:
        for start in (5, 0):
            into.write("a", start, np.arange(start, start + 5, dtype=np.float32))

    values: dict[str, Callable[[], None]] = {
        "a": write_a,
        "b": lambda: into.write("b", 0, np.array([1.0, 1.00390625, -1.01171875], np.float32)),
        "c": lambda: into.store("c", 0, np.array([7, -7])),
        "d": lambda: into.write("d", 0, np.array([0.1, 1e-9, 65504, -2], np.float32)),
        "empty": lambda: None,
    }
    for name in names:
        values[name]()
        outputs = {name: into.digest(name)}
        into.finish_unit(name, Done(outputs=outputs, inputs={}, lost_square_sum=0.5, total_square_sum=2.0))


# ---- shards ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("longest", "names"),
    [
        (LONG, [["a", "b", "c", "d", "empty"]]),
        (46, [["a", "b"], ["c", "d", "empty"]]),
        (1, [["a"], ["b"], ["c"], ["d"], ["empty"]]),
    ],
)
def test_tensors_are_cut_into_files_in_their_order(longest: int, names: list[list[str]]) -> None:
    shards = plan_shards(SPECS, stem="model", shard_bytes_max=longest)
    assert [sorted(shard.entries) for shard in shards] == [sorted(each) for each in names]
    assert [shard.name for shard in shards] == (
        ["model.safetensors"]
        if len(names) == 1
        else [f"model-{n:05d}-of-{len(names):05d}.safetensors" for n in range(1, len(names) + 1)]
    )


@pytest.mark.parametrize("longest", [LONG, 1])
def test_what_is_written_is_what_safetensors_reads(longest: int, tmp_path: Path) -> None:
    shards = plan_shards(SPECS[:1] + SPECS[2:], stem="model", shard_bytes_max=longest)
    with opened(tmp_path / "out", shards=shards) as into:
        fill(into, ("a", "c", "d", "empty"))
        into.publish({"note.txt": b"hello", "copy.txt": Path(__file__)})
    found: dict[str, Any] = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    np.testing.assert_array_equal(found["a"], np.arange(10).reshape(5, 2))
    np.testing.assert_array_equal(found["c"], [7, -7])
    np.testing.assert_array_equal(found["d"], np.array([0.1, 1e-9, 65504, -2], np.float16))
    assert found["empty"].shape == (0, 3)
    assert (tmp_path / "out/note.txt").read_bytes() == b"hello"
    assert (tmp_path / "out/copy.txt").read_bytes() == Path(__file__).read_bytes()
    assert not (tmp_path / "out" / JOURNAL).exists()
    assert not (tmp_path / "out.partial").exists()
    if longest == 1:
        index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 40 + 16 + 8
        assert set(index["weight_map"]) == {"a", "c", "d", "empty"}
        assert all((tmp_path / "out" / name).exists() for name in index["weight_map"].values())


def test_bfloat16_is_rounded_to_the_nearest_even(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as into:
        fill(into, ("b",))
    wanted = np.array([0x3F80, 0x3F80, 0xBF82], "<u2")
    assert into.done["b"].outputs["b"] == blake3(wanted.tobytes()).hexdigest()


@pytest.mark.parametrize(("name", "value"), [("a", np.nan), ("a", np.inf), ("b", 3.4e38), ("d", 65520.0)])
def test_what_is_not_finite_once_it_is_stored_is_refused(name: str, value: float, tmp_path: Path) -> None:
    with opened(tmp_path / "out") as into, pytest.raises(ComputeError, match=f"merged {name} is not finite"):
        into.write(name, 0, np.array([value], np.float32))


# ---- the journal -------------------------------------------------------------------------------------------------


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as into:
        fill(into, ("a", "b"))
    with opened(tmp_path / "out") as again:
        assert set(again.done) == {"a", "b"}
        assert again.done["a"] == into.done["a"]
        assert again.done["a"].lost_square_sum == 0.5


@pytest.mark.parametrize("place", [0, 39])
def test_what_the_disk_lost_is_done_again(place: int, tmp_path: Path) -> None:
    with opened(tmp_path / "out") as into:
        fill(into, ("a", "b"))
    shard = tmp_path / "out.partial/model.safetensors"
    content = bytearray(shard.read_bytes())
    start = len(content) - (40 + 6 + 16 + 8) + 16  # c is stored first: its elements are the longest
    content[start + place] ^= 1
    shard.write_bytes(content)
    with opened(tmp_path / "out") as again:
        assert set(again.done) == {"b"}


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as into:
        fill(into)
    os.truncate(tmp_path / "out.partial/model.safetensors", 20)
    with opened(tmp_path / "out") as again:
        assert set(again.done) <= {"empty"}


@pytest.mark.parametrize("torn", [b"", b'{"mer', b'{"merge": "x"}'])
def test_a_journal_that_never_began(torn: bytes, tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / JOURNAL).write_bytes(torn)
    with opened(tmp_path / "out") as into:
        assert not into.done
        fill(into, ("a",))
    with opened(tmp_path / "out") as again:
        assert set(again.done) == {"a"}


def test_a_line_that_was_torn(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as into:
        fill(into, ("a", "b"))
    journal = tmp_path / "out.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-5])
    with opened(tmp_path / "out") as again:
        assert set(again.done) == {"a"}
        fill(again, ("b",))
    with opened(tmp_path / "out") as third:
        assert set(third.done) == {"a", "b"}


def test_remains_of_another_merge(tmp_path: Path) -> None:
    with opened(tmp_path / "out", identity="x"):
        pass
    with pytest.raises(UsageError, match="begun by another merge"):
        opened(tmp_path / "out", identity="y")


def test_two_at_once(tmp_path: Path) -> None:
    with opened(tmp_path / "out"), pytest.raises(StateLocked, match="another process"):
        opened(tmp_path / "out")


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_place_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    opened(tmp_path / "empty").__exit__()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "file").touch()
    for name in ("full", "file"):
        with pytest.raises(UsageError, match="exists"):
            opened(tmp_path / name)


def test_too_little_space_is_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match="free"):
        opened(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, DiskFull), (errno.EIO, StorageError)])
def test_a_disk_that_fails_leaves_what_is_done(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    with opened(tmp_path / "out") as into:
        fill(into, ("a",))
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", fail)
            with pytest.raises(error):
                fill(into, ("b",))
    with opened(tmp_path / "out") as again:
        assert set(again.done) == {"a"}


def test_a_merge_that_fails_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_GROUP_ELEMENTS", 1)
    monkeypatch.setattr(merging, "_GROUP_TURNS", 1)
    rng = np.random.default_rng(0)
    inputs = [
        InputSpec(path=str(write_model(tmp_path / name, block_tensors(rng)))) for name in ("one", "two")
    ]
    recipe = understand(RecipeFile(inputs=tuple(inputs)), resolve=Path)
    options = merging.Options(threads=1, digests=True)
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 3:
            raise KeyboardInterrupt

    plan = merging.make_plan(recipe, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        merging.merge(recipe, plan, tmp_path / "out", options, advance=stop)
    told: list[int] = []
    result = merging.merge(recipe, plan, tmp_path / "out", options, advance=told.append)
    assert result.num_resumed == 2
    merging.merge(recipe, plan, tmp_path / "whole", options, advance=lambda _: None)
    for name in ("model.safetensors", "merge.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sum(told) == sum(spec.size * 4 for spec in plan.specs)


def test_inputs_that_changed_meanwhile_are_another_merge(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write_model(tmp_path / "one", block_tensors(rng))
    recipe = understand(RecipeFile(inputs=(InputSpec(path=str(path)),)), resolve=Path)
    options = merging.Options(threads=1, digests=False)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merging.merge(
            recipe, merging.make_plan(recipe, device="cpu"), tmp_path / "out", options, advance=stop
        )
    os.utime(path / "model.safetensors", ns=(1, 1))
    with pytest.raises(UsageError, match="or its inputs have changed since"):
        merging.merge(
            recipe, merging.make_plan(recipe, device="cpu"), tmp_path / "out", options, advance=stop
        )
