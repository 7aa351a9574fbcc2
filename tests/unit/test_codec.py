"""Codecs: what goes into an update comes out, within its size, and nothing hostile gets past the gate."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
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
    ValueKind,
    encode_update,
    lossless,
    screen_update,
    seed_of,
    update_bytes_max,
)
from weft.common.codec.blocks import DENSE_BLOCK, SPARSE_BLOCK
from weft.common.codec.fisher import SCALE_MAX, SCALE_MIN
from weft.common.codec.positions import largest, num_kept
from weft.common.codec.settings import KEEPS_A_SHARE
from weft.common.codec.update import STATEMENT
from weft.common.codec.values import VALUES
from weft.common.errors import CodecError, TensorFileError, UpdateRejected, UsageError, WeftError
from weft.common.modules import Schema, TensorSpec
from weft.common.tensors import Bf16, Float32Array, TensorFile, write_tensors

FP32 = CodecSettings(kind=CodecKind.FP32)
BF16 = CodecSettings(kind=CodecKind.BF16)
INT8 = CodecSettings(kind=CodecKind.INT8)
INT4 = CodecSettings(kind=CodecKind.INT4, scale_elements=64)
SIGN = CodecSettings(kind=CodecKind.SIGN)
TOPK = CodecSettings(kind=CodecKind.TOPK, density=0.1, values=ValueKind.INT4)
TERNARY = CodecSettings(kind=CodecKind.TERNARY, density=0.1)
MASK = CodecSettings(kind=CodecKind.SHARED_MASK, density=0.1)
ONE_OF_EACH = [FP32, BF16, INT8, INT4, SIGN, TOPK, TERNARY, MASK]
ALL = [
    *ONE_OF_EACH,
    CodecSettings(kind=CodecKind.INT4, stochastic_rounding=True),
    CodecSettings(kind=CodecKind.BF16, stochastic_rounding=True),
    CodecSettings(kind=CodecKind.TOPK, density=0.02, values=ValueKind.BF16),
    CodecSettings(kind=CodecKind.TERNARY, density=0.3, scale_elements=100),
    CodecSettings(kind=CodecKind.SHARED_MASK, density=1.0, values=ValueKind.SIGN),
]
IDS = [f"{codec.kind}-{index}" for index, codec in enumerate(ALL)]
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
    quota = update_bytes_max(schema, [codec], fisher=fisher)
    return screen_update(path, schema, [codec], wants_fisher=fisher, size_bytes_max=quota)


# -- round trips

shapes = st.lists(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=40), min_size=1, max_size=4)
values = st.floats(-(2.0**13), 2.0**13, width=32)


@st.composite
def modules(draw: st.DrawFn) -> tuple[Schema, Arrays]:
    schema = schema_of(*draw(shapes))
    fill = draw(st.sampled_from([st.just(0.0), st.sampled_from([0.0, -0.0, 1.0, -1.0]), values]))
    return schema, {s.name: draw(hnp.arrays(np.float32, s.shape, elements=fill)) for s in schema.tensors}


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(module=modules(), codec=st.sampled_from(ALL), seed=st.integers(0, 2**64 - 1))
def test_an_update_passes_the_gate_and_is_what_it_says(
    tmp_path: Path, module: tuple[Schema, Arrays], codec: CodecSettings, seed: int
) -> None:
    schema, deltas = module
    encoded = encode_update(tmp_path / "u", schema, deltas, codec, round_seed=seed, worker_seed=seed)
    statistics = screen(tmp_path / "u", schema, codec)
    result = decoded(tmp_path / "u", schema)
    norm = math.sqrt(sum(float(np.square(array.astype(np.float64)).sum()) for array in result.values()))
    assert statistics.norm == pytest.approx(norm, rel=1e-9)
    assert statistics.size_bytes == encoded.size_bytes == (tmp_path / "u").stat().st_size
    assert statistics.bits_per_parameter == encoded.bits_per_parameter
    assert encoded.size_bytes <= update_bytes_max(schema, [codec], fisher=False)


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


@pytest.mark.parametrize("codec", [*ALL, None], ids=[*IDS, "fisher"])
def test_tiles_cut_anywhere_are_the_whole(tmp_path: Path, codec: CodecSettings | None) -> None:
    schema = schema_of((SPARSE_BLOCK - 3,), (), (0,), (2, 350_000), (5,))
    deltas = gaussian(schema)
    squares = {name: np.square(array) for name, array in deltas.items()} if codec is None else None
    encode_update(tmp_path / "u", schema, deltas, codec or FP32, fisher=squares)
    with UpdateFile(tmp_path / "u", schema) as update:
        assert update.has_fisher is (codec is None)
        tile = update.fisher_tile if codec is None else update.tile
        for spec in schema.tensors:
            cuts = {0, 1, 3, DENSE_BLOCK, 524_288, 699_999, SPARSE_BLOCK - 5, spec.size}
            pieces = [
                tile(spec.name, low, high)
                for low, high in itertools.pairwise(sorted(cuts & set(range(spec.size + 1))))
            ]
            np.testing.assert_array_equal(np.concatenate([*pieces, []]), tile(spec.name, 0, spec.size))
            assert tile(spec.name, 0, 0).shape == (0,)


@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_a_sparse_tile_is_the_tile_without_its_zeros(tmp_path: Path, codec: CodecSettings) -> None:
    schema = schema_of((SPARSE_BLOCK + 7,), (0,), (90,))
    deltas = gaussian(schema)
    deltas["t000"][::3] = 0
    encode_update(tmp_path / "u", schema, deltas, codec)
    with UpdateFile(tmp_path / "u", schema) as update:
        assert update.sparse is (codec.kind in KEEPS_A_SHARE)
        for name, start, stop in [
            ("t000", 0, 1000),
            ("t000", SPARSE_BLOCK - 500, SPARSE_BLOCK + 7),
            ("t000", 5, 5),
            ("t001", 0, 0),
            ("t002", 1, 90),
        ]:
            indices, kept = update.sparse_tile(name, start, stop)
            assert (indices.dtype, kept.dtype) == (np.dtype(np.int64), np.dtype(np.float32))
            assert kept.all()
            dense = np.zeros(stop - start, np.float32)
            dense[indices] = kept
            np.testing.assert_array_equal(dense, update.tile(name, start, stop))
            assert (np.diff(indices) > 0).all()


@pytest.mark.parametrize("codec", [TERNARY, INT8], ids=["sparse", "dense"])
def test_threads_may_read_one_update(tmp_path: Path, codec: CodecSettings) -> None:
    schema = schema_of((SPARSE_BLOCK + 5 * DENSE_BLOCK + 5,))
    encode_update(tmp_path / "u", schema, gaussian(schema), codec)
    whole = decoded(tmp_path / "u", schema)["t000"]
    wrong: list[int] = []
    with UpdateFile(tmp_path / "u", schema) as update:

        def read(offset: int) -> None:
            for start in range(offset * 1000, schema.num_parameters, 200_000):
                tile = update.tile("t000", start, min(start + 1000, schema.num_parameters))
                wrong.extend(np.flatnonzero(tile != whole[start : start + 1000]))

        threads = [threading.Thread(target=read, args=(offset,)) for offset in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_every_kind_has_a_codec() -> None:
    assert set(CODECS) == set(CodecKind) == {codec.kind for codec in ALL}
    assert set(VALUES) == set(ValueKind)


# -- size


def entropy_bits(share: float) -> float:
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2])
def test_ternary_is_within_half_a_percent_of_the_entropy(tmp_path: Path, density: float) -> None:
    schema = schema_of((1500, 1000), (1500, 1000))
    codec = CodecSettings(kind=CodecKind.TERNARY, density=density)
    encoded = encode_update(tmp_path / "u", schema, gaussian(schema), codec)
    bound = entropy_bits(density) + density
    assert 0.999 * bound < encoded.bits_per_parameter <= 1.005 * bound


@pytest.mark.parametrize(
    ("codec", "bits", "bits_max"),
    [
        (BF16, 11.1, 16.01),
        (INT8, 7.6, 8.13),
        (CodecSettings(kind=CodecKind.INT4), 3.45, 4.13),
        (SIGN, 1.01, 1.01),
        (MASK, 0.1 * 7.8, 0.1 * 8.5),
    ],
    ids=lambda value: value.kind.value if isinstance(value, CodecSettings) else "",
)
def test_how_many_bits_a_gaussian_takes_and_noise_at_most(
    tmp_path: Path, codec: CodecSettings, bits: float, bits_max: float
) -> None:
    schema = schema_of((1000, 1000))
    assert encode_update(tmp_path / "u", schema, gaussian(schema), codec).bits_per_parameter < bits
    # Uniform values, or exponents, leave nothing to a lossless stage.
    rng = np.random.default_rng(0)
    noise = rng.uniform(-1, 1, (1000, 1000)).astype(np.float32)
    if codec is BF16:
        noise = np.ldexp(noise, rng.integers(-120, 100, noise.shape)).astype(np.float32)
    assert encode_update(tmp_path / "u", schema, {"t000": noise}, codec).bits_per_parameter < bits_max


@pytest.mark.parametrize("codec", [*ALL, CodecSettings(kind=CodecKind.TERNARY, density=1.0)])
@pytest.mark.parametrize("shapes", [((1,),), ((3,),) * 300, ((2000, 1100),)], ids=["one", "many", "large"])
def test_no_update_is_larger_than_its_quota(
    tmp_path: Path, codec: CodecSettings, shapes: tuple[tuple[int, ...], ...]
) -> None:
    schema = schema_of(*shapes)
    fisher = {name: np.exp(8 * array) for name, array in gaussian(schema).items()}
    size_bytes = encode_update(tmp_path / "u", schema, gaussian(schema), codec, fisher=fisher).size_bytes
    quota = update_bytes_max(schema, [codec], fisher=True)
    slack = (12 << 10) + 640 * len(schema.tensors) + 2 * schema.num_parameters
    assert size_bytes <= quota <= 2 * size_bytes + slack
    assert update_bytes_max(schema, [FP32, codec], fisher=True) >= quota
    with pytest.raises(UpdateRejected, match="at most"):
        screen_update(tmp_path / "u", schema, [codec], wants_fisher=True, size_bytes_max=size_bytes - 1)


def test_gaps_as_good_as_random_bytes_are_within_the_quota(tmp_path: Path) -> None:
    schema, codec = schema_of((300_000,)), CodecSettings(kind=CodecKind.TERNARY, density=1 / 128)
    positions = np.cumsum(np.random.default_rng(0).integers(1, 255, 2300))
    delta = np.zeros(300_000, np.float32)
    delta[positions] = 1
    size_bytes = encode_update(tmp_path / "u", schema, {"t000": delta}, codec).size_bytes
    assert size_bytes <= update_bytes_max(schema, [codec], fisher=False)


def test_many_small_tensors_cost_no_header_each(tmp_path: Path) -> None:
    schema = schema_of(*((16, 64) for _ in range(308)))
    encoded = encode_update(tmp_path / "u", schema, gaussian(schema), TERNARY)
    assert encoded.size_bytes < 1.07 * schema.num_parameters * 0.569 / 8 + 2400


@pytest.mark.parametrize("codec", ALL, ids=IDS)
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


def test_sign_bits_beyond_the_last_are_zero() -> None:
    assert lossless.decode_signs(np.array([0b10100000], np.uint8), count=3).tolist() == [1, 0, 1]
    for count in (2, 9):
        with pytest.raises(CodecError, match="sign bits"):
            lossless.decode_signs(np.array([0b10100000], np.uint8), count=count)


def test_a_model_is_a_count_with_three_bits_of_mantissa() -> None:
    counts = np.zeros(256, np.int64)
    counts[:12] = [1, 2, 3, 9, 15, 16, 17, 18, 1000, 2**31, 2**40, 0]
    model = lossless.model_of(counts)
    assert model[:12].tolist() == [1, 9, 13, 26, 32, 33, 33, 34, 80, 249, 255, 0]
    frequencies = lossless.frequencies(model)
    assert frequencies.sum() == 1 << 24
    assert frequencies.min() >= 1


# -- seeds


def test_a_mask_is_the_same_for_a_seed_and_another_for_the_next(tmp_path: Path) -> None:
    schema = schema_of((1000, 30), (30, 100))
    kept = []
    for values_seed, round_seed in [(0, 5), (1, 5), (0, 6)]:
        encode_update(tmp_path / "u", schema, gaussian(schema, values_seed), MASK, round_seed=round_seed)
        kept.append(
            np.concatenate([array.ravel() != 0 for array in decoded(tmp_path / "u", schema).values()])
        )
    assert 0.09 < kept[0].mean() < 0.11
    # A value that is kept may still be rounded to zero.
    assert (kept[0] == kept[1]).mean() > 0.99
    assert (kept[0] & kept[2]).mean() < 0.02


def test_a_mask_from_another_seed_than_the_rounds_is_refused(tmp_path: Path) -> None:
    encode_update(tmp_path / "u", SCHEMA, gaussian(SCHEMA), MASK, round_seed=7)
    screen_update(tmp_path / "u", SCHEMA, [MASK], wants_fisher=False, size_bytes_max=1 << 20, round_seed=7)
    with pytest.raises(CodecError, match="not the task's: codec"):
        screen_update(
            tmp_path / "u", SCHEMA, [MASK], wants_fisher=False, size_bytes_max=1 << 20, round_seed=8
        )


@pytest.mark.parametrize("seed", [7, "", "07", "+7", "18446744073709551616", "٧", None])
def test_a_seed_that_is_not_one_is_refused(tmp_path: Path, seed: Any) -> None:
    encode_update(tmp_path / "u", SCHEMA, gaussian(SCHEMA), MASK, round_seed=7)
    with TensorFile(tmp_path / "u") as file:
        stated = json.loads(file.header.metadata[STATEMENT])
        tensors: Tensors = {name: file.array(name).copy() for name in file.header.entries}
    stated["codec"]["round_seed"] = seed
    tensors["delta#scales"] = Bf16(tensors["delta#scales"])
    write_tensors(tmp_path / "u", tensors, {STATEMENT: json.dumps(stated)})
    with pytest.raises(CodecError, match="codec"):
        screen(tmp_path / "u", SCHEMA, MASK)


def test_a_seed_follows_from_names() -> None:
    assert seed_of("run", "0.1", 3) == 0xD7520019143E0740 != seed_of("run", "0.1", 4)


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_a_seed_has_sixty_four_bits(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match="seeds"):
        encode_update(tmp_path / "u", SCHEMA, gaussian(SCHEMA), MASK, round_seed=seed)


def test_stochastic_rounding_follows_its_seed_and_is_right_on_average(tmp_path: Path) -> None:
    schema = schema_of((4096,))
    deltas = {"t000": np.full(4096, 0.3, np.float32)}
    deltas["t000"][0] = 7
    for codec in (CodecSettings(kind=CodecKind.INT4, scale_elements=0, stochastic_rounding=True), ALL[9]):
        results = []
        for seed in (1, 1, 2):
            encode_update(tmp_path / "u", schema, deltas, codec, worker_seed=seed)
            results.append(decoded(tmp_path / "u", schema)["t000"])
        np.testing.assert_array_equal(results[0], results[1])
        assert (results[0] != results[2]).any()
        step = np.unique(results[0][1:])
        assert step.size == 2
        assert results[0][1:].mean() == pytest.approx(0.3, abs=float(step[1] - step[0]) / 20)


# -- error feedback


@pytest.mark.parametrize("codec", [codec for codec in ALL if codec.keeps_residual], ids=IDS[1:])
def test_all_that_is_held_back_is_sent_or_kept(tmp_path: Path, codec: CodecSettings) -> None:
    schema = schema_of((40, 30), (50,))
    feedback = ErrorFeedback(schema)
    true, sent = ({spec.name: np.zeros(spec.shape) for spec in schema.tensors} for _ in range(2))
    for round_number in range(20):
        deltas = gaussian(schema, seed=round_number)
        corrected = feedback.apply(deltas)
        encode_update(
            tmp_path / "u", schema, corrected, codec, round_seed=round_number, worker_seed=round_number
        )
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


def test_a_residual_that_decays_is_a_momentum(tmp_path: Path) -> None:
    schema = schema_of((100,))
    feedback, momentum = ErrorFeedback(schema, decay=0.5), np.zeros(100, np.float32)
    for round_number in range(5):
        delta = gaussian(schema, seed=round_number)["t000"]
        corrected = feedback.apply({"t000": delta})
        momentum = np.float32(0.5) * momentum + delta
        np.testing.assert_array_equal(corrected["t000"], momentum)
        encode_update(tmp_path / "u", schema, corrected, TERNARY)
        feedback.keep(corrected, tmp_path / "u")
        momentum -= decoded(tmp_path / "u", schema)["t000"]


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


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize("key", ["density", "residual_decay"])
def test_an_impossible_share_names_its_key(key: str, value: float) -> None:
    with pytest.raises(UsageError, match=rf"codec\.{key}"):
        CodecSettings(**{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("elements", [-1, 1, 15, (1 << 30) + 1])
def test_an_impossible_group_names_its_key(elements: int) -> None:
    with pytest.raises(UsageError, match=r"codec\.scale_elements"):
        CodecSettings(scale_elements=elements)


@pytest.mark.parametrize("kind", [CodecKind.FP32, CodecKind.SIGN, CodecKind.TERNARY])
def test_where_nothing_is_rounded_stochastic_rounding_is_refused(kind: CodecKind) -> None:
    with pytest.raises(UsageError, match="nothing to round"):
        CodecSettings(kind=kind, stochastic_rounding=True)


def test_how_many_elements_share_a_scale() -> None:
    assert [codec.elements_per_scale for codec in ONE_OF_EACH] == [0, 0, 256, 64, 0, 4096, 0, 4096]


def test_only_codecs_that_lose_something_keep_a_residual() -> None:
    assert [codec.keeps_residual for codec in ONE_OF_EACH] == [False] + 7 * [True]
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
    with pytest.raises(ValueError, match="section"):
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


def bits(name: str, value: int, index: int = 0) -> Callable[[Tensors], object]:
    """Set bits of a bfloat16."""
    return lambda tensors: tensors[name].bits.__setitem__(index, value)


def replace(name: str, array: npt.NDArray[Any]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.__setitem__(name, array)


def frames(section: str, what: str, content: bytes) -> Callable[[Tensors], object]:
    """Replace the frames of a section by one."""

    def change(tensors: Tensors) -> None:
        tensors[f"{section}#{what}"] = np.frombuffer(content, np.uint8)
        tensors[f"{section}#frame_bytes"] = np.array([len(content)], np.int32)

    return change


def of_values(content: bytes) -> Callable[[Tensors], object]:
    """Replace the values of the one block by one frame."""

    def change(tensors: Tensors) -> None:
        tensors["delta#values"] = np.frombuffer(content, np.uint8)
        tensors["delta#value_bytes"] = np.array([len(content)], np.int32)

    return change


def of_gaps(symbols: list[int], counts: int | None = None) -> Callable[[Tensors], object]:
    """Replace the gaps of the one block, under the model that is there."""

    def change(tensors: Tensors) -> None:
        coded = np.array(symbols, np.uint8)
        words = lossless.GapEncoder(tensors["delta#gap_model"]).encode(coded)
        tensors["delta#gaps"] = words
        tensors["delta#gap_words"] = np.array([words.size], np.int32)
        tensors["delta#gap_symbols"] = np.array([coded.size], np.int32)
        if counts is not None:
            tensors["delta#counts"] = np.array([counts], np.int32)

    return change


def unsized(data: bytes) -> bytes:
    compressor = zstd.ZstdCompressor()
    return bytes(compressor.compress(data) + compressor.flush())


BOMB = zstd.compress(bytes(1 << 28))
CODES = bytes([127] * 650)
LIES = b"\x28\xb5\x2f\xfd\x60\x8a\x01" + zstd.compress(bytes(1 << 20))[9:]
"""A frame that states 650 bytes and goes on to a mebibyte."""

FORGERIES: dict[str, tuple[CodecSettings, Callable[[Tensors], object], str]] = {
    "nan-at-the-start": (FP32, put("delta/t000", np.nan, (0, 0)), "t000 is not finite at element 0"),
    "nan-at-the-end": (FP32, put("delta/t001", np.nan, 49), "t001 is not finite at element 49"),
    "infinity": (FP32, put("delta/t000", -np.inf, (19, 29)), "t000 is not finite at element 599"),
    "large": (FP32, put("delta/t000", 1.001e4, (0, 1)), "larger than 10000"),
    "large-negative": (FP32, put("delta/t000", -1.001e4, (0, 1)), "larger than 10000"),
    "bf16-nan": (BF16, of_values(zstd.compress(bytes([255] * 650)) + bytes([1] * 650)), "t000 is not finite"),
    "bf16-short": (BF16, of_values(b"x"), "does not hold 650 values"),
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
    "scale-nan": (TERNARY, bits("delta#scales", 0x7FC0), "t000 has a scale"),
    "scale-infinite": (INT8, bits("delta#scales", 0x7F80, 3), "t001 has a scale"),
    "scale-negative": (TERNARY, bits("delta#scales", 0xBF80, 1), "t001 has a scale"),
    "scale-minus-zero": (SIGN, bits("delta#scales", 0x8000), "t000 has a scale"),
    "scale-large": (TERNARY, bits("delta#scales", 0x47C3), "t000 has a scale"),
    "scale-large-of-integers": (INT8, bits("delta#scales", 0x42F0), "t000 holds a value larger than 10000"),
    "scales-short": (
        TERNARY,
        lambda t: t.update({"delta#scales": Bf16(t["delta#scales"].bits[:1])}),
        "is not BF16",
    ),
    "count-higher": (TERNARY, put("delta#counts", 66), "does not fit"),
    "count-lower": (TERNARY, put("delta#counts", 64), "positions"),
    "count-negative": (TERNARY, put("delta#counts", -1), "keeps more values than it has"),
    "count-huge": (TERNARY, put("delta#counts", 2**31 - 1), "keeps more values than it has"),
    "symbols-fewer": (TERNARY, put("delta#gap_symbols", 64), "does not fit"),
    "symbols-negative": (TERNARY, put("delta#gap_symbols", -1), "does not fit"),
    "symbols-huge": (TERNARY, put("delta#gap_symbols", 2**31 - 1), "does not fit"),
    "words-negative": (TERNARY, put("delta#gap_words", -1), "do not add up"),
    "words-more": (
        TERNARY,
        lambda t: t.update({"delta#gaps": np.append(t["delta#gaps"], np.uint32(1))}),
        "add up",
    ),
    "words-zero-at-the-end": (TERNARY, put("delta#gaps", 0, -1), "end in zero"),
    "words-changed": (TERNARY, put("delta#gaps", 12345, 0), "are not those of|positions|past the end|keeps"),
    "model-short": (TERNARY, lambda t: t.update({"delta#gap_model": t["delta#gap_model"][:-1]}), "is not U8"),
    "model-changed": (TERNARY, put("delta#gap_model", 0, slice(None)), "are not those of"),
    "gaps-two-dimensions": (
        TERNARY,
        replace("delta#gaps", np.zeros((1, 9), np.uint32)),
        "delta#gaps is not U32",
    ),
    "gaps-past-the-end": (TERNARY, of_gaps([10] * 65), "past the end"),
    "unfinished-gap": (TERNARY, of_gaps([1] * 64 + [255]), "positions"),
    "only-escapes": (TERNARY, of_gaps([255, 255], counts=0), "positions"),
    "one-tensor-keeps-all": (TERNARY, of_gaps([0] * 65), "t000 keeps 65 of 600"),
    "signs-short": (TERNARY, of_values(bytes(8)), "sign bits"),
    "signs-left-over": (TERNARY, put("delta#values", 255, -1), "sign bits"),
    "values-length-negative": (TERNARY, put("delta#value_bytes", -1), "do not add up"),
    "code-too-high": (INT8, of_values(zstd.compress(CODES[:-1] + b"\xff")), "no encoder writes"),
    "nibble-too-high": (INT4, of_values(zstd.compress(bytes([0x7F] * 325))), "no encoder writes"),
    "too-few-codes": (INT8, of_values(zstd.compress(CODES[:-1])), "649 bytes and not 650"),
    "bomb": (INT8, of_values(BOMB), "does not state a size"),
    "bomb-of-unstated-size": (INT8, of_values(unsized(bytes(1 << 24))), "does not state a size"),
    "bomb-that-lies": (INT8, of_values(LIES), "frame"),
    "two-frames": (INT8, of_values(zstd.compress(CODES) + zstd.compress(b"")), "does not hold"),
    "bytes-after-the-frame": (INT8, of_values(zstd.compress(CODES) + b"x"), "does not hold"),
    "torn-frame": (INT8, of_values(zstd.compress(CODES)[:-1]), "frame"),
    "skippable-frame": (INT8, of_values(b"\x50\x2a\x4d\x18\0\0\0\0"), "does not state a size"),
    "not-a-frame": (INT8, of_values(b"hello"), "does not state a size"),
    "no-frame": (INT8, of_values(b""), "does not state a size"),
    "mask-of-too-few": (MASK, of_values(zstd.compress(CODES[:3])), "bytes and not"),
}


@pytest.fixture(scope="module")
def loops_in_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The compiler and what it compiles: once a process, whatever arrives."""
    path = forge(tmp_path_factory.mktemp("good") / "u", TERNARY, lambda _: None)
    screen(path, SCHEMA, TERNARY, fisher=True)


@pytest.mark.usefixtures("loops_in_memory")
@pytest.mark.parametrize(("codec", "change", "message"), FORGERIES.values(), ids=FORGERIES)
def test_a_forgery_is_refused_and_costs_no_memory(
    tmp_path: Path, codec: CodecSettings, change: Callable[[Tensors], object], message: str
) -> None:
    path = forge(tmp_path / "u", codec, change)
    tracemalloc.start()
    with pytest.raises((UpdateRejected, CodecError), match=message):
        screen_update(path, SCHEMA, [codec], wants_fisher=True, size_bytes_max=1 << 20)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("codec", ALL, ids=IDS)
def test_an_unchanged_forgery_passes(tmp_path: Path, codec: CodecSettings) -> None:
    screen(forge(tmp_path / "u", codec, lambda _: None), SCHEMA, codec, fisher=True)


def restate(path: Path, statement: Any, metadata: Mapping[str, str] | None = None) -> Path:
    encode_update(path, SCHEMA, gaussian(SCHEMA), TERNARY)
    with TensorFile(path) as file:
        tensors: Tensors = {
            spec.name: Bf16(file.array(spec.name).copy())
            if spec.dtype == "BF16"
            else file.array(spec.name).copy()
            for spec in file.header.specs
        }
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
        lambda stated: stated | {"codec": stated["codec"] | {"round_seed": "1"}},
        lambda stated: stated | {"codec": stated["codec"] | {"scale_elements": 16}},
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
        {"kind": "topk", "values": "zip"},
        {"kind": "int8", "scale_elements": 7},
        {"kind": "int8", "scale_elements": []},
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


def test_an_update_of_any_allowed_codec_passes(tmp_path: Path) -> None:
    for codec in ONE_OF_EACH:
        encode_update(tmp_path / "u", SCHEMA, gaussian(SCHEMA), codec)
        screen_update(tmp_path / "u", SCHEMA, ONE_OF_EACH, wants_fisher=False, size_bytes_max=1 << 20)
        others = [other for other in ONE_OF_EACH if other is not codec]
        with pytest.raises(CodecError, match="not the task's: codec"):
            screen_update(tmp_path / "u", SCHEMA, others, wants_fisher=False, size_bytes_max=1 << 20)


@pytest.mark.parametrize("codec", [FP32, BF16, dataclasses.replace(TERNARY, density=0.2)])
def test_an_update_of_another_codec_is_refused(tmp_path: Path, codec: CodecSettings) -> None:
    encode_update(tmp_path / "u", SCHEMA, gaussian(SCHEMA), TERNARY)
    with pytest.raises((CodecError, UpdateRejected)):
        screen_update(tmp_path / "u", SCHEMA, [codec], wants_fisher=False, size_bytes_max=1 << 20)


def test_a_fisher_that_nobody_asked_for_is_refused(tmp_path: Path) -> None:
    path = forge(tmp_path / "u", TERNARY, lambda _: None)
    with pytest.raises(UpdateRejected, match="fisher"):
        screen_update(path, SCHEMA, [TERNARY], wants_fisher=False, size_bytes_max=1 << 20)


def test_an_update_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TensorFileError, match="cannot read"):
        screen(tmp_path / "u", SCHEMA, TERNARY)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> dict[CodecKind, bytes]:
    """A good update with a Fisher, by codec."""
    path = tmp_path_factory.mktemp("valid") / "u"
    return {codec.kind: forge(path, codec, lambda _: None).read_bytes() for codec in ONE_OF_EACH}


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), codec=st.sampled_from(ONE_OF_EACH))
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
