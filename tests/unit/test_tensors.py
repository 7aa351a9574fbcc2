"""The strict tensor file: what it writes, what it reads, and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.common.errors import DiskFull, TensorFileError
from weft.common.modules import Schema, TensorSpec
from weft.common.tensors import (
    DTYPES,
    FOREIGN,
    SLICE_BYTES,
    STRICT,
    Bf16,
    TensorData,
    TensorFile,
    first_non_finite,
    first_non_finite_of,
    float32_to_bf16,
    open_module,
    parse_header,
    read_header,
    render_header,
    to_float32,
    write_module,
    write_tensors,
)

SCHEMA = Schema((TensorSpec("a.lora_A.weight", "F32", (2, 3)), TensorSpec("a.lora_B.weight", "F32", (4, 2))))
ARRAYS = {spec.name: np.arange(spec.size, dtype=np.float32).reshape(spec.shape) for spec in SCHEMA.tensors}


def raw(path: Path, header: Any, data: bytes = b"", *, pad: bool = True) -> Path:
    """Write a file whose header is ``header``, text or JSON, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8 if pad else 0)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# -- both ways with the safetensors library


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "t"
    tensors: dict[str, npt.NDArray[Any]] = {
        "odd": np.arange(3, dtype=np.uint8),
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "half": np.array([1, 2], np.float16),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 3), np.float32),
        "flags": np.array([True, False]),
    }
    size = write_tensors(path, {**tensors, "brain": Bf16(np.array([0x3F80], np.uint16))}, {"note": "é"})
    assert size == path.stat().st_size
    loaded = safetensors.torch.load_file(path)
    assert loaded["brain"].dtype == torch.bfloat16
    assert float(loaded["brain"][0]) == 1.0
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name].numpy(), array)
    with TensorFile(path) as file:
        assert file.header.metadata == {"note": "é"}
        for name, array in tensors.items():
            np.testing.assert_array_equal(file.array(name), array)
            assert file.array(name).flags.aligned


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t"
    tensors = {
        "z": torch.arange(5, dtype=torch.bfloat16),
        "a": torch.ones(2, 2),
        "i": torch.arange(3, dtype=torch.int32),
    }
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "other": "x"})
    with TensorFile(path, FOREIGN) as file:
        assert file.header.metadata["format"] == "pt"
        assert file.tile("z", 1, 4).tolist() == [1, 2, 3]
        assert file.array("a").shape == (2, 2)


def test_float32_tensors_get_the_bytes_that_the_library_gives_them(tmp_path: Path) -> None:
    write_module(tmp_path / "t", ARRAYS, SCHEMA)
    assert (tmp_path / "t").read_bytes() == safetensors.numpy.save(ARRAYS)


def test_bytes_do_not_depend_on_the_order_of_the_mapping() -> None:
    one, other = io.BytesIO(), io.BytesIO()
    write_tensors(one, ARRAYS, {"a": "1", "b": "2"})
    write_tensors(other, dict(reversed(ARRAYS.items())), {"b": "2", "a": "1"})
    assert one.getvalue() == other.getvalue()


@settings(max_examples=50)
@given(
    st.dictionaries(
        st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(sorted(set(DTYPES) - {"BF16"})), st.lists(st.integers(0, 3), max_size=3)),
        max_size=5,
    )
)
def test_any_tensors_come_back(tensors: dict[str, tuple[str, list[int]]]) -> None:
    arrays = {name: np.zeros(shape, DTYPES[dtype]) for name, (dtype, shape) in tensors.items()}
    file = io.BytesIO()
    write_tensors(file, arrays)
    data = file.getvalue()
    (length,) = struct.unpack("<Q", data[:8])
    header = parse_header(data[8 : 8 + length], len(data) - 8 - length)
    assert {s.name: (s.dtype, list(s.shape)) for s in header.specs} == tensors
    assert len(data[: header.data_start]) % 8 == 0


# -- what is refused

HOSTILE: dict[str, tuple[Any, bytes]] = {
    "not-json": (b"{", b""),
    "not-utf8": (b'{"\xff":1}', b""),
    "not-an-object": (b"[]", b""),
    "number": (b"1", b""),
    "deep": (b"[" * 100_000, b""),
    "huge-number": (b'{"a":' + b"9" * 10_000 + b"}", b""),
    "not-a-number": (b'{"a":NaN}', b""),
    "key-twice": (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{}}', b"\0" * 4),
    "key-twice-inside": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
    "unknown-dtype": ({"a": entry("F8_E8M0", (4,))}, b"\0" * 4),
    "dtype-is-a-list": ({"a": entry([])}, b"\0" * 4),
    "extra-field": ({"a": entry() | {"x": 1}}, b"\0" * 4),
    "no-shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4),
    "entry-is-a-list": ({"a": []}, b""),
    "negative-dimension": ({"a": entry(shape=(-1,), offsets=(0, 4))}, b"\0" * 4),
    "two-negative-dimensions": ({"a": entry(shape=(-1, -1))}, b"\0" * 4),
    "boolean-dimension": ({"a": entry(shape=(True,))}, b"\0" * 4),
    "fractional-dimension": ({"a": entry(shape=(1.0,))}, b"\0" * 4),
    "huge-dimension": ({"a": entry(shape=(1 << 62, 1 << 62))}, b"\0" * 4),
    "many-dimensions": ({"a": entry(shape=(1,) * 9)}, b"\0" * 4),
    "size-differs": ({"a": entry(shape=(2,))}, b"\0" * 4),
    "three-offsets": ({"a": entry(offsets=(0, 4, 8))}, b"\0" * 4),
    "backward-offsets": ({"a": entry(offsets=(4, 0))}, b"\0" * 4),
    "gap": ({"a": entry(), "b": entry(offsets=(8, 12))}, b"\0" * 12),
    "overlap": ({"a": entry(), "b": entry()}, b"\0" * 4),
    "past-the-end": ({"a": entry()}, b"\0" * 3),
    "bytes-left-over": ({"a": entry()}, b"\0" * 5),
    "empty-name": ({"": entry()}, b"\0" * 4),
    "long-name": ({"a" * 257: entry()}, b"\0" * 4),
    "control-character": ({"a\n": entry()}, b"\0" * 4),
    "not-ascii": ({"é": entry()}, b"\0" * 4),
    "surrogate": (b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
    "metadata-is-a-list": ({"__metadata__": [], "a": entry()}, b"\0" * 4),
    "metadata-holds-a-number": ({"__metadata__": {"k": 1}, "a": entry()}, b"\0" * 4),
}


@pytest.mark.parametrize(("header", "data"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("rules", [STRICT, FOREIGN], ids=["strict", "foreign"])
def test_a_malformed_file_is_refused(tmp_path: Path, rules: Any, header: Any, data: bytes) -> None:
    with pytest.raises(TensorFileError):
        read_header(raw(tmp_path / "t", header, data), rules)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + b" " * 18,
        b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"shape":[1],"dtype":"F32","data_offsets":[0,4]}}',
        b'{"\\u0061":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":{},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"__metadata__":{"k":"v"}}',
    ],
    ids=["more-padding", "spaces", "field-order", "escapes", "empty-metadata", "metadata-last"],
)
def test_a_second_spelling_is_foreign_and_not_strict(tmp_path: Path, header: bytes) -> None:
    path = raw(tmp_path / "t", header, b"\0" * 4)
    assert read_header(path, FOREIGN).entries["a"].spec == TensorSpec("a", "F32", (1,))
    with pytest.raises(TensorFileError, match="canonical"):
        read_header(path)


def test_metadata_is_bounded(tmp_path: Path) -> None:
    path = raw(tmp_path / "t", {"__metadata__": {"k": "v" * 4096}, "a": entry()}, b"\0" * 4)
    read_header(path, FOREIGN)
    with pytest.raises(TensorFileError, match="4096"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 8, struct.pack("<Q", 9) + b"{}      "])
def test_a_torn_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TensorFileError):
        TensorFile(tmp_path / "t")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="No such file"):
        read_header(tmp_path / "t")


def test_a_header_as_long_as_is_allowed_costs_little(tmp_path: Path) -> None:
    tensors = {f"{index:05}": entry("U8", (0,), (0, 0)) for index in range(17_000)}
    path = raw(tmp_path / "t", tensors)
    assert (1 << 19) < path.stat().st_size < (1 << 20)
    tracemalloc.start()
    assert len(read_header(path).entries) == 17_000
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_a_header_that_would_not_be_read_is_not_written() -> None:
    with pytest.raises(TensorFileError, match="metadata"):
        write_tensors(io.BytesIO(), {}, {"k": "v" * 5000})
    with pytest.raises(ValueError, match="complex"):
        write_tensors(io.BytesIO(), {"a": np.zeros(1, np.complex64)})


@settings(max_examples=300)
@given(st.data())
def test_no_flipped_bit_in_a_header_raises_anything_else(data: st.DataObject) -> None:
    header = bytearray(render_header(SCHEMA.tensors, {"k": "v"}))
    bit = data.draw(st.integers(0, len(header) * 8 - 1))
    header[bit // 8] ^= 1 << bit % 8
    for rules in (STRICT, FOREIGN):
        try:
            parsed = parse_header(bytes(header), 4 * SCHEMA.num_parameters, rules)
        except TensorFileError:
            continue
        assert sum(spec.size for spec in parsed.specs) == SCHEMA.num_parameters


# -- numbers


def test_bf16_rounds_as_torch_does() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    edges = np.array(
        [0, 1, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x3F808000, 0x3F818000, 0x80000000], np.uint32
    )
    values = np.concatenate([bits, edges]).view(np.float32)
    wanted = torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    rounded = float32_to_bf16(values)
    np.testing.assert_array_equal(rounded[~np.isnan(values)], wanted[~np.isnan(values)])
    assert np.isnan(to_float32(rounded[np.isnan(values)], "BF16")).all()


def test_widening_is_exact() -> None:
    halves = np.array([1.5, -2, 6e-8], np.float16)
    assert to_float32(halves, "F16").tolist() == halves.astype(float).tolist()
    every = np.arange(1 << 16).astype(np.uint16)
    finite = every[(every & 0x7F80) != 0x7F80]
    np.testing.assert_array_equal(float32_to_bf16(to_float32(finite, "BF16")), finite)
    with pytest.raises(ValueError, match="I32"):
        to_float32(np.zeros(1, np.int32), "I32")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("index", [0, SLICE_BYTES // 4 - 1, SLICE_BYTES // 4, SLICE_BYTES // 4 + 10])
def test_the_first_value_that_is_not_finite_is_found(value: float, index: int) -> None:
    values = np.zeros(SLICE_BYTES // 4 + 11, np.float32)
    assert first_non_finite(values) is None
    values[index:] = value
    assert first_non_finite(values) == index


def test_the_first_tensor_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tensors: dict[str, TensorData] = {
        "a": np.zeros(3, np.float32),
        "b": Bf16(np.array([0, 0x7FC0], np.uint16)),
        "i": np.zeros(1, np.int8),
    }
    write_tensors(tmp_path / "t", tensors)
    with TensorFile(tmp_path / "t") as file:
        assert first_non_finite_of(file) == ("b", 1)
    write_tensors(tmp_path / "t", {"a": tensors["a"], "i": tensors["i"]})
    with TensorFile(tmp_path / "t") as file:
        assert first_non_finite_of(file) is None


def test_tiles_are_slices_in_c_order_and_read_only(tmp_path: Path) -> None:
    write_module(tmp_path / "t", ARRAYS, SCHEMA)
    with TensorFile(tmp_path / "t") as file:
        tile = file.tile("a.lora_B.weight", 2, 5)
    assert tile.tolist() == [2, 3, 4]
    with pytest.raises(ValueError, match="read-only"):
        tile[0] = 1
    with pytest.raises(ValueError, match="closed"):
        file.tile("a.lora_B.weight", 0, 1)


# -- module states


def test_a_module_comes_back(tmp_path: Path) -> None:
    write_module(tmp_path / "t", ARRAYS, SCHEMA, {"version": "3"})
    with open_module(tmp_path / "t", SCHEMA) as file:
        assert file.header.metadata == {"version": "3"}
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(file.array(name), array)


def test_a_bf16_module_is_rounded(tmp_path: Path) -> None:
    schema = Schema((TensorSpec("w", "BF16", (2,)),))
    write_module(tmp_path / "t", {"w": np.array([1, 1 + 2**-9], np.float32)}, schema)
    with open_module(tmp_path / "t", schema) as file:
        assert file.tile("w", 0, 2).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ((SCHEMA.tensors[0],), "lora_B"),
        ((*SCHEMA.tensors, TensorSpec("b", "F32", (1,))), "does not have"),
        ((SCHEMA.tensors[0], TensorSpec("a.lora_B.weight", "F32", (2, 4))), r"\[4, 2\]"),
        ((SCHEMA.tensors[0], TensorSpec("a.lora_B.weight", "BF16", (4, 2))), "F32"),
    ],
    ids=["missing", "extra", "shape", "dtype"],
)
def test_a_module_of_another_schema_is_refused(
    tmp_path: Path, specs: tuple[TensorSpec, ...], message: str
) -> None:
    write_module(tmp_path / "t", {s.name: np.zeros(s.shape, np.float32) for s in specs}, Schema(specs))
    with pytest.raises(TensorFileError, match=message):
        open_module(tmp_path / "t", SCHEMA)


def test_arrays_of_another_schema_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="schema"):
        write_module(tmp_path / "t", {}, SCHEMA)
    with pytest.raises(ValueError, match="float64"):
        write_module(
            tmp_path / "t", {name: array.astype(np.float64) for name, array in ARRAYS.items()}, SCHEMA
        )


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DiskFull), (errno.EIO, OSError)])
def test_a_full_disk_has_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(number, "injected")

    monkeypatch.setattr(Path, "open", lambda *_: Full())
    with pytest.raises(error):
        write_module(tmp_path / "t", ARRAYS, SCHEMA)
