"""Codecs: what goes into an update comes out, within its size, and nothing hostile gets past the gate."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import struct
import threading
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from backports import zstd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from weft.common.codec import (
    CODECS,
    CodecKind,
    CodecSettings,
    ErrorFeedback,
    UpdateFile,
    UpdateStatistics,
    encode_update,
    lossless,
    screen_update,
    update_bytes_max,
)
from weft.common.codec.blocks import BLOCK_SIZE
from weft.common.codec.fisher import SCALE_MAX, SCALE_MIN
from weft.common.codec.ternary import largest, num_kept
from weft.common.codec.update import STATEMENT
from weft.common.errors import CodecError, TensorFileError, UpdateRejected, UsageError, WeftError
from weft.common.modules import Schema, TensorSpec
from weft.common.tensors import Bf16, Float32Array, TensorFile, float32_to_bf16, to_float32, write_tensors

FP32 = CodecSettings(kind=CodecKind.FP32)
BF16 = CodecSettings(kind=CodecKind.BF16)
TERNARY = CodecSettings(kind=CodecKind.TERNARY, density=0.1)
ALL = [FP32, BF16, TERNARY]
Arrays = dict[str, Float32Array]


def schema_of(*shapes: tuple[int, ...]) -> Schema:
    return Schema(tuple(TensorSpec(f"t{index:03}", "F32", shape) for index, shape in enumerate(shapes)))


def gaussian(schema: Schema, seed: int = 0) -> Arrays:
    rng = np.random.default_rng(seed)
    return {spec.name: rng.standard_normal(spec.shape, dtype=np.float32) for spec in schema.tensors}


def zeros(schema: Schema) -> Arrays:
    return {spec.name: np.zeros(spec.shape, np.float32) for spec in schema.tensors}


def decoded(path: Path, schema: Schema, *, fisher: bool = False) -> Arrays:
    with UpdateFile(path, schema) as update:
        tile = update.fisher_tile if fisher else update.tile
        return {
            spec.name: tile(spec.name, 0, spec.size).reshape(spec.shape).copy() for spec in schema.tensors
        }


def screen(path: Path, schema: Schema, codec: CodecSettings, *, fisher: bool = False) -> UpdateStatistics:
    quota = update_bytes_max(schema, codec, fisher=fisher)
    return screen_update(path, schema, codec, wants_fisher=fisher, size_bytes_max=quota)


def ternary_reference(values: Float32Array, density: float) -> Float32Array:
    """Plain top-k with the first of equals, and the least-squares scale, one value at a time."""
    flat = values.reshape(-1).astype(np.float64)
    order = sorted(range(flat.size), key=lambda index: (-abs(flat[index]), index))
    kept = [index for index in order[: num_kept(flat.size, density)] if flat[index] != 0]
    result = np.zeros(flat.size, np.float32)
    if kept:
        scale = np.float32(np.mean(np.abs(flat[kept])))
        result[kept] = np.sign(flat[kept]).astype(np.float32) * scale
    return result.reshape(values.shape)


# -- round trips

shapes = st.lists(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=40), min_size=1, max_size=4)
values = st.floats(-(2.0**13), 2.0**13, width=32)


@st.composite
def modules(draw: st.DrawFn) -> tuple[Schema, Arrays]:
    schema = schema_of(*draw(shapes))
    fill = draw(st.sampled_from([st.just(0.0), st.sampled_from([0.0, -0.0, 1.0, -1.0]), values]))
    return schema, {s.name: draw(hnp.arrays(np.float32, s.shape, elements=fill)) for s in schema.tensors}


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(module=modules(), codec=st.sampled_from(ALL))
def test_an_update_decodes_to_what_its_codec_promises(
    tmp_path: Path, module: tuple[Schema, Arrays], codec: CodecSettings
) -> None:
    schema, deltas = module
    wanted: Mapping[CodecKind, Callable[[Float32Array], Float32Array]] = {
        CodecKind.FP32: lambda array: array,
        CodecKind.BF16: lambda array: to_float32(float32_to_bf16(array), "BF16"),
        CodecKind.TERNARY: lambda array: ternary_reference(array, codec.density),
    }
    encoded = encode_update(tmp_path / "u", schema, deltas, codec)
    statistics = screen(tmp_path / "u", schema, codec)
    result = decoded(tmp_path / "u", schema)
    for name, array in deltas.items():
        np.testing.assert_array_equal(result[name], wanted[codec.kind](array))
    norm = math.sqrt(sum(float(np.square(array.astype(np.float64)).sum()) for array in result.values()))
    assert statistics.norm == pytest.approx(norm, rel=1e-9)
    assert statistics.size_bytes == encoded.size_bytes == (tmp_path / "u").stat().st_size
    assert statistics.bits_per_parameter == encoded.bits_per_parameter


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(module=modules(), codec=st.sampled_from(ALL))
def test_a_fisher_is_kept_within_a_sixteenth(
    tmp_path: Path, module: tuple[Schema, Arrays], codec: CodecSettings
) -> None:
    schema, deltas = module
    fisher = {name: np.abs(array) for name, array in deltas.items()}
    encode_update(tmp_path / "u", schema, deltas, codec, fisher=fisher)
    screen(tmp_path / "u", schema, codec, fisher=True)
    for name, array in decoded(tmp_path / "u", schema, fisher=True).items():
        largest_value = fisher[name].max(initial=0)
        floor = largest_value * 2.0**-31 if largest_value >= SCALE_MIN else SCALE_MIN
        kept = fisher[name] > floor
        np.testing.assert_allclose(array[kept], fisher[name][kept], rtol=1 / 16)
        assert (array[~kept] <= floor).all()
        assert (array[fisher[name] == 0] == 0).all()


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.kind.value)
@pytest.mark.parametrize("fisher", [False, True])
def test_tiles_cut_anywhere_are_the_whole(tmp_path: Path, codec: CodecSettings, fisher: bool) -> None:
    schema = schema_of((BLOCK_SIZE - 3,), (), (0,), (2, 700_000), (5,))
    deltas = gaussian(schema)
    statistics = {name: np.square(array) for name, array in deltas.items()} if fisher else None
    encode_update(tmp_path / "u", schema, deltas, codec, fisher=statistics)
    screen(tmp_path / "u", schema, codec, fisher=fisher)
    with UpdateFile(tmp_path / "u", schema) as update:
        assert update.sparse is (codec.kind is CodecKind.TERNARY)
        assert update.has_fisher is fisher
        for spec in schema.tensors:
            tile = update.fisher_tile if fisher else update.tile
            cuts = sorted({0, 1, 3, 524_288, 699_999, BLOCK_SIZE - 5, spec.size} & set(range(spec.size + 1)))
            pieces = [tile(spec.name, low, high) for low, high in itertools.pairwise(cuts)]
            np.testing.assert_array_equal(np.concatenate([*pieces, []]), tile(spec.name, 0, spec.size))
            assert tile(spec.name, 0, 0).shape == (0,)


def test_threads_may_read_one_update(tmp_path: Path) -> None:
    schema = schema_of((6 * BLOCK_SIZE + 5,))
    encode_update(
        tmp_path / "u", schema, gaussian(schema), CodecSettings(kind=CodecKind.TERNARY, density=0.01)
    )
    whole = decoded(tmp_path / "u", schema)["t000"]
    wrong: list[int] = []
    with UpdateFile(tmp_path / "u", schema) as update:

        def read(offset: int) -> None:
            for start in range(offset * 1000, schema.num_parameters, 400_000):
                tile = update.tile("t000", start, min(start + 1000, schema.num_parameters))
                wrong.extend(np.flatnonzero(tile != whole[start : start + 1000]))

        threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_every_kind_has_a_codec() -> None:
    assert set(CODECS) == set(CodecKind)


# -- size


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
def test_ternary_is_within_three_percent_of_the_entropy(tmp_path: Path, density: float) -> None:
    schema = schema_of((1500, 1000), (1500, 1000))
    codec = CodecSettings(kind=CodecKind.TERNARY, density=density)
    encoded = encode_update(tmp_path / "u", schema, gaussian(schema), codec)
    bound = density - density * math.log2(density) - (1 - density) * math.log2(1 - density)
    assert bound < encoded.bits_per_parameter < 8 * encoded.size_bytes / schema.num_parameters <= 1.03 * bound


@pytest.mark.parametrize("codec", [*ALL, CodecSettings(kind=CodecKind.TERNARY, density=1.0)])
@pytest.mark.parametrize("shapes", [((1,),), ((3,),) * 300, ((2000, 1100),)], ids=["one", "many", "large"])
def test_no_update_is_larger_than_its_quota(
    tmp_path: Path, codec: CodecSettings, shapes: tuple[tuple[int, ...], ...]
) -> None:
    schema = schema_of(*shapes)
    fisher = {name: np.exp(8 * array) for name, array in gaussian(schema).items()}
    size_bytes = encode_update(tmp_path / "u", schema, gaussian(schema), codec, fisher=fisher).size_bytes
    quota = update_bytes_max(schema, codec, fisher=True)
    assert (
        size_bytes
        <= quota
        <= 2 * size_bytes + (12 << 10) + 512 * len(schema.tensors) + 2 * schema.num_parameters
    )
    with pytest.raises(UpdateRejected, match="at most"):
        screen_update(tmp_path / "u", schema, codec, wants_fisher=True, size_bytes_max=size_bytes - 1)


def test_many_small_tensors_cost_no_header_each(tmp_path: Path) -> None:
    schema = schema_of(*((16, 64) for _ in range(308)))
    encoded = encode_update(tmp_path / "u", schema, gaussian(schema), TERNARY)
    assert encoded.size_bytes < 1.07 * schema.num_parameters * 0.569 / 8 + 2000


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.kind.value)
def test_equal_updates_are_equal_bytes(tmp_path: Path, codec: CodecSettings) -> None:
    schema = schema_of((30, 40), (7,))
    deltas = gaussian(schema)
    transposed = {name: np.asfortranarray(array) for name, array in reversed(deltas.items())}
    for path, arrays in (("a", deltas), ("b", transposed)):
        encode_update(tmp_path / path, schema, arrays, codec, fisher={n: a * a for n, a in arrays.items()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- ternary


@pytest.mark.parametrize(
    ("given_values", "count", "kept"),
    [
        ([1, 1, 1, 1], 2, [0, 1]),
        ([1, -2, 2, 1, -1], 3, [0, 1, 2]),
        ([0, 0, 0], 1, []),
        ([0, 5, 0, -1], 3, [1, 3]),
        ([-0.0, 1e-45, -0.0], 2, [1]),
        ([3, -4], 2, [0, 1]),
        ([], 0, []),
    ],
    ids=["ties", "ties-at-threshold", "zeros", "fewer-than-k", "denormal", "all", "empty"],
)
def test_the_largest_are_kept(given_values: list[float], count: int, kept: list[int]) -> None:
    assert largest(np.array(given_values, np.float32), count).tolist() == kept


@pytest.mark.parametrize(
    ("size", "density", "count"), [(0, 0.5, 0), (1, 0.001, 1), (10, 0.25, 3), (10, 1.0, 10)]
)
def test_how_many_are_kept(size: int, density: float, count: int) -> None:
    assert num_kept(size, density) == count


def test_each_tensor_keeps_its_share_on_its_own_scale(tmp_path: Path) -> None:
    schema = schema_of((1000,), (1000,))
    deltas = gaussian(schema)
    deltas["t001"] *= np.float32(1e-3)
    encode_update(tmp_path / "u", schema, deltas, TERNARY)
    small = decoded(tmp_path / "u", schema)["t001"]
    assert np.count_nonzero(small) == 100
    assert 1e-3 < np.abs(small).max() < 3e-3


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 100_000])
def test_gaps_of_any_length_come_back(gap: int) -> None:
    positions = np.array([gap, 2 * gap + 1, 2 * gap + 2])
    data = lossless.encode_gaps(positions)
    assert data.size <= lossless.gap_bytes_max(3, 2 * gap + 3)
    assert lossless.decode_gaps(data, count=3, size=2 * gap + 3).tolist() == positions.tolist()
    with pytest.raises(CodecError, match="past the end"):
        lossless.decode_gaps(data, count=3, size=2 * gap + 2)


@pytest.mark.parametrize(
    ("data", "count"), [([1, 2], 1), ([1, 2], 3), ([1, 255], 1), ([255], 0), ([], 1)], ids=str
)
def test_gaps_of_another_count_are_refused(data: list[int], count: int) -> None:
    with pytest.raises(CodecError, match="positions"):
        lossless.decode_gaps(np.array(data, np.uint8), count=count, size=1000)


def test_sign_bits_beyond_the_last_are_zero() -> None:
    assert lossless.decode_signs(np.array([0b10100000], np.uint8), count=3).tolist() == [-1, 1, -1]
    for count in (2, 9):
        with pytest.raises(CodecError, match="sign bits"):
            lossless.decode_signs(np.array([0b10100000], np.uint8), count=count)


# -- error feedback


@pytest.mark.parametrize("codec", [BF16, TERNARY], ids=lambda codec: codec.kind.value)
def test_all_that_is_held_back_is_sent_or_kept(tmp_path: Path, codec: CodecSettings) -> None:
    schema = schema_of((40, 30), (50,))
    feedback = ErrorFeedback(schema)
    true, sent = ({spec.name: np.zeros(spec.shape) for spec in schema.tensors} for _ in range(2))
    for round_number in range(20):
        deltas = gaussian(schema, seed=round_number)
        corrected = feedback.apply(deltas)
        encode_update(tmp_path / "u", schema, corrected, codec)
        feedback.keep(corrected, tmp_path / "u")
        feedback.save(tmp_path / "residual")
        feedback = ErrorFeedback.load(tmp_path / "residual", schema)
        for name, array in decoded(tmp_path / "u", schema).items():
            true[name] += deltas[name]
            sent[name] += array
    held_back = feedback.apply(zeros(schema))
    for name, total in true.items():
        lost = sent[name] + held_back[name] - total
        assert np.linalg.norm(lost) <= 1e-6 * np.linalg.norm(total)
    assert feedback.norm == pytest.approx(
        np.linalg.norm(np.concatenate([a.ravel() for a in held_back.values()]))
    )
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def test_a_refused_update_leaves_the_residual(tmp_path: Path) -> None:
    schema = schema_of((10,))
    feedback = ErrorFeedback(schema)
    feedback.apply(gaussian(schema))
    assert feedback.norm == 0


def test_the_residual_of_another_module_is_refused(tmp_path: Path) -> None:
    ErrorFeedback(schema_of((10,))).save(tmp_path / "residual")
    with pytest.raises(TensorFileError):
        ErrorFeedback.load(tmp_path / "residual", schema_of((11,)))


# -- settings and misuse


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_an_impossible_density_names_its_key(density: float) -> None:
    with pytest.raises(UsageError, match=r"codec\.density"):
        CodecSettings(kind=CodecKind.TERNARY, density=density)


def test_only_codecs_that_lose_something_keep_a_residual() -> None:
    assert [codec.keeps_residual for codec in ALL] == [False, True, True]
    assert not dataclasses.replace(TERNARY, error_feedback=False).keeps_residual


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["delta", "fisher"])
def test_values_that_are_not_finite_are_not_encoded(tmp_path: Path, value: float, where: str) -> None:
    schema = schema_of((3,))
    arrays = {"delta": zeros(schema), "fisher": zeros(schema)}
    arrays[where]["t000"][1] = value
    with pytest.raises(CodecError, match=f"{where} of t000 is not finite at element 1"):
        encode_update(tmp_path / "u", schema, arrays["delta"], FP32, fisher=arrays["fisher"])


@pytest.mark.parametrize("value", [-1e-9, SCALE_MAX * 2])
def test_an_absurd_fisher_is_not_encoded(tmp_path: Path, value: float) -> None:
    schema = schema_of((3,))
    fisher = {"t000": np.array([0, value, 0], np.float32)}
    with pytest.raises(CodecError, match="below zero or above"):
        encode_update(tmp_path / "u", schema, zeros(schema), FP32, fisher=fisher)


@pytest.mark.parametrize("value", [SCALE_MIN, SCALE_MAX, SCALE_MIN / 2, -0.0])
def test_a_fisher_at_the_edges_is_kept_or_zero(tmp_path: Path, value: float) -> None:
    schema = schema_of((2,))
    encode_update(
        tmp_path / "u", schema, zeros(schema), FP32, fisher={"t000": np.array([value, 0], np.float32)}
    )
    screen(tmp_path / "u", schema, FP32, fisher=True)
    kept = decoded(tmp_path / "u", schema, fisher=True)["t000"][0]
    assert kept == (value * 1.0625 if value >= SCALE_MIN else 0)


def test_a_closed_update_and_an_absent_fisher_are_mistakes_of_the_caller(tmp_path: Path) -> None:
    schema = schema_of((2,))
    encode_update(tmp_path / "u", schema, zeros(schema), FP32)
    update = UpdateFile(tmp_path / "u", schema)
    with pytest.raises(ValueError, match="fisher"):
        update.fisher_tile("t000", 0, 1)
    update.close()
    with pytest.raises(ValueError, match="closed"):
        update.tile("t000", 0, 1)


# -- the gate

SCHEMA = schema_of((20, 30), (50,))
Tensors = dict[str, Any]


def forge(path: Path, codec: CodecSettings, change: Callable[[Tensors], object]) -> Path:
    """Write a valid update, change its tensors, and write them again with a statement that fits."""
    deltas = gaussian(SCHEMA)
    squares = {name: array * array for name, array in deltas.items()}
    encode_update(path, SCHEMA, deltas, codec, fisher=squares)
    with TensorFile(path) as file:
        statement = json.loads(file.header.metadata[STATEMENT])
        tensors: Tensors = {
            spec.name: Bf16(file.array(spec.name).copy())
            if spec.dtype == "BF16"
            else file.array(spec.name).copy()
            for spec in file.header.specs
        }
    change(tensors)
    for section, fields in statement["sections"].items():
        sizes = [_num_bytes(tensor) for name, tensor in tensors.items() if name.startswith(section)]
        fields["bytes"] = sum(sizes)
        fields["bits_per_parameter"] = 8 * sum(sizes) / SCHEMA.num_parameters
    write_tensors(path, tensors, {STATEMENT: json.dumps(statement)})
    return path


def _num_bytes(tensor: Any) -> int:
    return int((tensor.bits if isinstance(tensor, Bf16) else tensor).nbytes)


def put(name: str, value: Any, index: Any = 0) -> Callable[[Tensors], object]:
    return lambda tensors: np.asarray(tensors[name]).__setitem__(index, value)


def replace(name: str, array: npt.NDArray[Any]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, array)


def frames(section: str, what: str, content: bytes) -> Callable[[Tensors], object]:
    """Replace the frames of a section by one."""

    def change(tensors: Tensors) -> None:
        tensors[f"{section}#{what}"] = np.frombuffer(content, np.uint8)
        tensors[f"{section}#frame_bytes"] = np.array([len(content)], np.int32)

    return change


def unsized(data: bytes) -> bytes:
    compressor = zstd.ZstdCompressor()
    return bytes(compressor.compress(data) + compressor.flush())


BOMB = zstd.compress(bytes(1 << 28))
GAPS = bytes([9] * 65)
LIES = b"\x28\xb5\x2f\xfd\x20\x41" + zstd.compress(bytes(1 << 20))[9:]
"""A frame that states 65 bytes and goes on to a mebibyte."""

FORGERIES: dict[str, tuple[CodecSettings, Callable[[Tensors], object], str]] = {
    "nan-at-the-start": (FP32, put("delta/t000", np.nan, (0, 0)), "t000 is not finite at element 0"),
    "nan-at-the-end": (FP32, put("delta/t001", np.nan, 49), "t001 is not finite at element 49"),
    "infinity": (FP32, put("delta/t000", -np.inf, (19, 29)), "t000 is not finite at element 599"),
    "large": (FP32, put("delta/t000", 1.001e4, (0, 1)), "larger than 10000"),
    "large-negative": (FP32, put("delta/t000", -1.001e4, (0, 1)), "larger than 10000"),
    "bf16-nan": (
        BF16,
        lambda t: t["delta/t001"].bits.__setitem__(3, 0x7FC1),
        "t001 is not finite at element 3",
    ),
    "dtype": (FP32, replace("delta/t001", np.zeros(50, np.float16)), "delta/t001 is not F32"),
    "shape": (FP32, replace("delta/t001", np.zeros((5, 10), np.float32)), "delta/t001 is not F32"),
    "missing": (FP32, lambda t: t.pop("delta/t001"), "lacks delta/t001"),
    "extra": (FP32, replace("delta/t002", np.zeros(1, np.float32)), "delta/t002, which"),
    "extra-section": (FP32, replace("other", np.zeros(1, np.float32)), "other, which"),
    "path-like": (FP32, replace("../../etc", np.zeros(1, np.float32)), "which the task does not ask for"),
    "no-fisher": (FP32, lambda t: t.pop("fisher#scales"), "lacks fisher#scales"),
    "fisher-scale-nan": (FP32, put("fisher#scales", np.nan), "scale nan"),
    "fisher-scale-negative": (FP32, put("fisher#scales", -1), "scale -1"),
    "fisher-scale-minus-zero": (FP32, put("fisher#scales", -0.0), "scale -0"),
    "fisher-scale-huge": (FP32, put("fisher#scales", 2.0**101), "no encoder"),
    "fisher-scale-tiny": (FP32, put("fisher#scales", 2.0**-96), "no encoder"),
    "fisher-scale-uneven": (FP32, put("fisher#scales", 1.01), "no encoder"),
    "fisher-bomb": (FP32, frames("fisher", "codes", BOMB), "does not state a size"),
    "fisher-short": (FP32, frames("fisher", "codes", zstd.compress(bytes(649))), "649 codes for 650"),
    "fisher-frame-length": (FP32, put("fisher#frame_bytes", 1), "do not add up"),
    "scale-nan": (TERNARY, put("delta#scales", np.nan), "not finite"),
    "scale-infinite": (TERNARY, put("delta#scales", np.inf), "not finite"),
    "scale-large": (TERNARY, put("delta#scales", 1e5), "larger than 10000"),
    "scale-negative": (TERNARY, put("delta#scales", -1), "does not fit"),
    "scale-zero": (TERNARY, put("delta#scales", 0), "does not fit"),
    "scales-short": (TERNARY, replace("delta#scales", np.ones(1, np.float32)), "delta#scales is not F32"),
    "count-higher": (TERNARY, put("delta#counts", 66), "positions"),
    "count-negative": (TERNARY, put("delta#counts", -1), "do not add up"),
    "count-barely-negative": (
        TERNARY,
        lambda t: t.update({"delta#counts": np.array([-1], np.int32), "delta#signs": np.zeros(0, np.uint8)}),
        "cannot keep",
    ),
    "count-huge": (TERNARY, put("delta#counts", 2**31 - 1), "do not add up"),
    "signs-short": (TERNARY, lambda t: t.update({"delta#signs": t["delta#signs"][:-1]}), "do not add up"),
    "signs-left-over": (TERNARY, put("delta#signs", 255, -1), "sign bits"),
    "signs-two-dimensions": (
        TERNARY,
        replace("delta#signs", np.zeros((1, 9), np.uint8)),
        "delta#signs is not U8",
    ),
    "frame-length-negative": (TERNARY, put("delta#frame_bytes", -1), "do not add up"),
    "bomb": (TERNARY, frames("delta", "gaps", BOMB), "does not state a size"),
    "bomb-of-unstated-size": (
        TERNARY,
        frames("delta", "gaps", unsized(bytes(1 << 24))),
        "does not state a size",
    ),
    "bomb-that-lies": (TERNARY, frames("delta", "gaps", LIES), "frame"),
    "two-frames": (
        TERNARY,
        frames("delta", "gaps", zstd.compress(GAPS) + zstd.compress(b"")),
        "does not hold",
    ),
    "bytes-after-the-frame": (TERNARY, frames("delta", "gaps", zstd.compress(GAPS) + b"x"), "does not hold"),
    "torn-frame": (TERNARY, frames("delta", "gaps", zstd.compress(GAPS)[:-1]), "frame"),
    "skippable-frame": (
        TERNARY,
        frames("delta", "gaps", b"\x50\x2a\x4d\x18\0\0\0\0"),
        "does not state a size",
    ),
    "not-a-frame": (TERNARY, frames("delta", "gaps", b"hello"), "does not state a size"),
    "no-frame": (TERNARY, frames("delta", "gaps", b""), "does not state a size"),
    "gaps-past-the-end": (TERNARY, frames("delta", "gaps", zstd.compress(bytes([10] * 65))), "past the end"),
    "one-tensor-keeps-all": (
        TERNARY,
        frames("delta", "gaps", zstd.compress(bytes(65))),
        "t000 keeps 65 of 600",
    ),
    "unfinished-gap": (TERNARY, frames("delta", "gaps", zstd.compress(bytes(65) + b"\xff")), "positions"),
}


@pytest.mark.parametrize(("codec", "change", "message"), FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_is_refused_and_costs_no_memory(
    tmp_path: Path, codec: CodecSettings, change: Callable[[Tensors], object], message: str
) -> None:
    path = forge(tmp_path / "u", codec, change)
    tracemalloc.start()
    with pytest.raises((UpdateRejected, CodecError), match=message):
        screen_update(path, SCHEMA, codec, wants_fisher=True, size_bytes_max=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("codec", ALL, ids=lambda codec: codec.kind.value)
def test_an_unchanged_forgery_passes(tmp_path: Path, codec: CodecSettings) -> None:
    screen(forge(tmp_path / "u", codec, lambda _: None), SCHEMA, codec, fisher=True)


def restate(path: Path, statement: Any, metadata: Mapping[str, str] | None = None) -> Path:
    encode_update(path, SCHEMA, gaussian(SCHEMA), TERNARY)
    with TensorFile(path) as file:
        tensors = {spec.name: file.array(spec.name).copy() for spec in file.header.specs}
        stated = statement(json.loads(file.header.metadata[STATEMENT]))
    write_tensors(
        path,
        tensors,
        {STATEMENT: stated if isinstance(stated, str) else json.dumps(stated)} | dict(metadata or {}),
    )
    return path


@pytest.mark.parametrize(
    "statement",
    [
        lambda stated: stated | {"codec": {"kind": "ternary", "density": 0.2}},
        lambda stated: stated | {"codec": {"kind": "bf16"}},
        lambda stated: stated | {"codec": {"kind": "zip"}},
        lambda stated: stated | {"codec": None},
        lambda stated: stated | {"format": 2},
        lambda stated: stated | {"num_parameters": 1},
        lambda stated: stated | {"more": 1},
        lambda stated: stated | {"sections": {}},
        lambda stated: stated | {"sections": {"delta": stated["sections"]["delta"] | {"bytes": 1}}},
        lambda stated: {key: value for key, value in stated.items() if key != "format"},
        lambda _: [],
        lambda _: "{",
        lambda _: "[" * 3000,
        lambda _: '{"format":1,"format":1}',
        lambda _: '{"format":NaN}',
    ],
)  # fmt: skip
def test_a_statement_that_is_not_the_tasks_is_refused(tmp_path: Path, statement: Any) -> None:
    with pytest.raises((CodecError, TensorFileError)):
        screen(restate(tmp_path / "u", statement), SCHEMA, TERNARY)


@pytest.mark.parametrize(
    "codec",
    [
        None,
        {},
        {"kind": "zip"},
        {"kind": []},
        {"kind": "ternary", "density": 10**400},
        {"kind": "bf16", "density": 0},
    ],
)
def test_a_file_that_was_not_screened_and_names_no_codec_does_not_open(tmp_path: Path, codec: Any) -> None:
    path = restate(tmp_path / "u", lambda stated: stated | {"codec": codec})
    with pytest.raises(CodecError, match="names no codec"):
        UpdateFile(path, SCHEMA)


def test_a_statement_may_spell_its_numbers_differently(tmp_path: Path) -> None:
    path = restate(tmp_path / "u", lambda stated: json.dumps(stated | {"format": 1.0}, indent=1))
    assert screen(path, SCHEMA, TERNARY).norm > 0


def test_there_is_no_other_metadata(tmp_path: Path) -> None:
    path = restate(tmp_path / "u", lambda stated: stated, {"note": "hello"})
    with pytest.raises(CodecError, match="alone"):
        screen(path, SCHEMA, TERNARY)


@pytest.mark.parametrize("codec", [FP32, BF16, dataclasses.replace(TERNARY, density=0.2)])
def test_an_update_of_another_codec_is_refused(tmp_path: Path, codec: CodecSettings) -> None:
    encode_update(tmp_path / "u", SCHEMA, gaussian(SCHEMA), TERNARY)
    with pytest.raises((CodecError, UpdateRejected)):
        screen_update(tmp_path / "u", SCHEMA, codec, wants_fisher=False, size_bytes_max=1 << 20)


def test_a_fisher_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    path = forge(tmp_path / "u", TERNARY, lambda _: None)
    with pytest.raises(UpdateRejected, match="fisher"):
        screen_update(path, SCHEMA, TERNARY, wants_fisher=False, size_bytes_max=1 << 20)


def test_an_update_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="cannot read"):
        screen(tmp_path / "u", SCHEMA, TERNARY)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[CodecKind, bytes]:
    """A good update with a Fisher, by codec."""
    path = tmp_path_factory.mktemp("valid") / "u"
    return {codec.kind: forge(path, codec, lambda _: None).read_bytes() for codec in ALL}


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), codec=st.sampled_from(ALL))
def test_flipped_bits_raise_nothing_else_and_let_nothing_else_in(
    tmp_path: Path, valid: dict[CodecKind, bytes], data: st.DataObject, codec: CodecSettings
) -> None:
    content = bytearray(valid[codec.kind])
    for bit in data.draw(st.lists(st.integers(0, len(content) * 8 - 1), min_size=1, max_size=3)):
        content[bit // 8] ^= 1 << bit % 8
    (tmp_path / "u").write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        screen(tmp_path / "u", SCHEMA, codec, fisher=True)
    except WeftError:
        return
    for array in decoded(tmp_path / "u", SCHEMA).values():
        assert np.abs(array).max() <= 1e4
    for array in decoded(tmp_path / "u", SCHEMA, fisher=True).values():
        assert np.isfinite(array).all()
        assert (array >= 0).all()


# -- the vector of docs/update-format.md

VECTOR_SCHEMA = Schema(
    (TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F32", (600,)), TensorSpec("c", "F32", (2,)))
)
VECTOR_CODEC = CodecSettings(kind=CodecKind.TERNARY, density=0.004)
VECTOR_HEADER = (
    r'{"__metadata__":{"weft.update":"{\"codec\":{\"density\":0.004,\"kind\":\"ternary\"},\"format\":1,'
    r"\"num_parameters\":608,\"sections\":{\"delta\":{\"bits_per_parameter\":0.4605263157894737,\"bytes\":35,"
    r"\"codec\":\"ternary\"},\"fisher\":{\"bits_per_parameter\":0.5921052631578947,\"bytes\":45,"
    r'\"codec\":\"log8\"}}}"},"delta#counts":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},'
    r'"delta#frame_bytes":{"dtype":"I32","shape":[1],"data_offsets":[4,8]},'
    r'"delta#scales":{"dtype":"F32","shape":[3],"data_offsets":[8,20]},'
    r'"fisher#frame_bytes":{"dtype":"I32","shape":[1],"data_offsets":[20,24]},'
    r'"fisher#scales":{"dtype":"F32","shape":[3],"data_offsets":[24,36]},'
    r'"delta#gaps":{"dtype":"U8","shape":[14],"data_offsets":[36,50]},'
    r'"delta#signs":{"dtype":"U8","shape":[1],"data_offsets":[50,51]},'
    r'"fisher#codes":{"dtype":"U8","shape":[29],"data_offsets":[51,80]}}   '
)
VECTOR_DATA = bytes.fromhex(
    "03000000 0e000000 0000803f 00004040 00000000 1d000000 00004040 00008040 00000000"
    "28b52ffd 20 05 290000 01 05 ff ff 57 c0"
    "28b52ffd 6060019d000060f3ebe300ffa3dff700ff00000100512a7004"
)


def vector_module() -> tuple[Arrays, Arrays]:
    b = np.zeros(600, np.float32)
    b[[0, 1, 599]] = [0.25, -2, 4]
    a = np.array([[0.5, -1, 0.25], [0, 1, -0.5]], np.float32)
    fisher = np.array([[1, 0.5, 0.25], [0, 3, 1e-3]], np.float32)
    c = np.zeros(2, np.float32)
    return {"a": a, "b": b, "c": c}, {"a": fisher, "b": np.abs(b), "c": c}


def test_the_documented_vector_decodes(tmp_path: Path) -> None:
    header = VECTOR_HEADER.encode()
    (tmp_path / "u").write_bytes(struct.pack("<Q", len(header)) + header + VECTOR_DATA)
    statistics = screen(tmp_path / "u", VECTOR_SCHEMA, VECTOR_CODEC, fisher=True)
    assert statistics.norm == pytest.approx(math.sqrt(1 + 9 + 9))
    delta = decoded(tmp_path / "u", VECTOR_SCHEMA)
    assert delta["a"].reshape(-1).tolist() == [0, -1, 0, 0, 0, 0]
    assert {int(i): float(delta["b"][i]) for i in np.flatnonzero(delta["b"])} == {1: -3, 599: 3}
    fisher = decoded(tmp_path / "u", VECTOR_SCHEMA, fisher=True)
    assert fisher["a"].reshape(-1).tolist() == [1.0625, 0.53125, 0.265625, 0, 3.125, 0.00103759765625]
    assert {int(i): float(fisher["b"][i]) for i in np.flatnonzero(fisher["b"])} == {
        0: 0.265625,
        1: 2.125,
        599: 4.25,
    }


def test_the_documented_vector_is_what_is_written(tmp_path: Path) -> None:
    delta, fisher = vector_module()
    encode_update(tmp_path / "u", VECTOR_SCHEMA, delta, VECTOR_CODEC, fisher=fisher)
    written = (tmp_path / "u").read_bytes()
    # The Fisher's frame, the last 29 bytes, is compressed: another zstd may find a shorter one.
    assert written[8 + len(VECTOR_HEADER) :][:51] == VECTOR_DATA[:51]
