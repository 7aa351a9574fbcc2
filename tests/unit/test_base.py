from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from weft.common.base import base_tensors, check_base, num_base_parameters, pin_base, resolve_source
from weft.common.errors import BaseModelError
from weft.common.modules import TensorSpec
from weft.common.recipe import BasePin
from weft.common.tensors import Bf16, float32_to_bf16, to_float32, write_tensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_base(to: Path) -> Path:
    to.mkdir(parents=True)
    (to / "config.json").write_text("{}")
    (to / "tokenizer.json").write_text("{}")
    (to / "picture.png").write_bytes(b"not part of it")
    (to / "pytorch_model.bin").write_bytes(b"a pickled copy, ignored beside safetensors")
    write_tensors(to / "model.safetensors", {"w": np.zeros((3, 5), np.float32)})
    return to


def test_pin_lists_what_transformers_reads_sorted_with_digests(tmp_path: Path) -> None:
    pin = pin_base(write_base(tmp_path / "base"))
    assert [file.name for file in pin.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert pin.files[0].digest == blake3(b"{}").hexdigest()
    listed = [[file.name, file.size_bytes, file.digest] for file in pin.files]
    assert pin.digest == blake3(json.dumps(listed, separators=(",", ":")).encode()).hexdigest()


def test_pin_does_not_depend_on_the_place(tmp_path: Path) -> None:
    assert pin_base(write_base(tmp_path / "a")) == pin_base(write_base(tmp_path / "b"))


def test_sharded_weights_follow_the_index(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    write_tensors(base / "consolidated.safetensors", {"w": np.zeros(9, np.float32)})
    index = {"weight_map": {"w": "model-00001-of-00001.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    names = [file.name for file in pin_base(base).files]
    assert "model-00001-of-00001.safetensors" in names
    assert "consolidated.safetensors" not in names
    assert num_base_parameters(base) == 15


def test_tensors_are_read_from_whichever_file_holds_them_as_float32(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    values = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    bits = float32_to_bf16(values)
    write_tensors(base / "one.safetensors", {"model.a": Bf16(bits), "model.b": values.astype(np.float16)})
    write_tensors(base / "two.safetensors", {"c": values})
    where = {"model.a": "one.safetensors", "model.b": "one.safetensors", "c": "two.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    found = base_tensors(base, [TensorSpec(name, "F32", (3, 5)) for name in ("model.a", "model.c")])
    assert found.keys() == {"model.a", "model.c"}
    np.testing.assert_array_equal(found["model.a"], to_float32(bits, "BF16"))
    np.testing.assert_array_equal(found["model.c"], values)
    assert all(array.dtype == np.float32 and array.flags.owndata for array in found.values())
    half = base_tensors(base, [TensorSpec("model.b", "F32", (3, 5))])["model.b"]
    np.testing.assert_array_equal(half, values.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "model.bin"])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(BaseModelError, match="is not a safetensors file"):
        pin_base(base)


def test_check_accepts_what_was_pinned(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    check_base(base, pin_base(base))


def corrupt(base: Path) -> None:
    data = bytearray((base / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (base / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (corrupt, "model.safetensors differs"),
        (lambda base: (base / "config.json").write_text("{ }"), "config.json differs"),
        (lambda base: (base / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda base: (base / "vocab.json").write_text("{}"), "vocab.json is not part of"),
    ],
    ids=["one-bit", "another-size", "missing", "one-too-many"],
)
def test_check_names_the_file_that_differs(
    tmp_path: Path, change: Callable[[Path], object], cause: str
) -> None:
    base = write_base(tmp_path / "base")
    pin = pin_base(base)
    change(base)
    with pytest.raises(BaseModelError, match=cause):
        check_base(base, pin)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_by_name_with_a_way_out(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").rename(base / name)
    with pytest.raises(BaseModelError, match=f"{name} is a pickle") as caught:
        pin_base(base)
    assert "save_pretrained" in caught.value.hint


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"has no config\.json"):
        pin_base(tmp_path)
    with pytest.raises(BaseModelError, match="is not a directory"):
        pin_base(tmp_path / "nowhere")


def hub_cache(root: Path) -> Path:
    """The layout of the Hub's cache: snapshots of links into blobs."""
    repository = root / "models--org--tiny"
    real = write_base(repository / "blobs")
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in real.iterdir():
        (snapshot / file.name).symlink_to(file)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_a_hub_id_resolves_to_its_snapshot_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = hub_cache(tmp_path)
    found = resolve_source("org/tiny", revision=revision, cache=tmp_path)
    assert found == snapshot
    pin = pin_base(found)
    assert (pin.hub_id, pin.revision) == ("org/tiny", COMMIT)
    elsewhere = pin_base(write_base(tmp_path / "copy"))
    assert replace(pin, hub_id="", revision="") == elsewhere
    check_base(found, pin)


def test_a_hub_id_that_is_not_here_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="cannot get org/other from the Hub") as caught:
        resolve_source("org/other", cache=tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize("source", ["./missing", "/missing/dir", "a/b/c"])
def test_a_missing_directory_is_not_asked_for_on_the_hub(source: str) -> None:
    with pytest.raises(BaseModelError, match="there is no directory"):
        resolve_source(source)


def test_a_directory_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve_source(str(tmp_path)) == tmp_path


def test_an_empty_pin_covers_nothing(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    with pytest.raises(BaseModelError, match="is not part of"):
        check_base(base, BasePin(digest=pin_base(base).digest))
