"""A reader of updates written from docs/update-format.md alone agrees with Weft, on the committed vectors and beyond.

It knows struct, JSON and zstd, and works one value at a time: what a port to another language would look like.
"""

from __future__ import annotations

import functools
import json
import math
import struct
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backports import zstd
from tests.vectors.generate import CASES, FOLDER, SCHEMA, decode, module, write

from weft.common.codec import (
    CodecKind,
    CodecSettings,
    UpdateFile,
    encode_update,
    lossless,
    screen_update,
)
from weft.common.modules import Schema, TensorSpec

Shapes = list[tuple[str, tuple[int, ...]]]
VECTORS = json.loads((FOLDER / "vectors.json").read_text())
MASK_64 = (1 << 64) - 1


class Reader:
    """One file."""

    def __init__(self, content: bytes, shapes: Shapes) -> None:
        (length,) = struct.unpack_from("<Q", content)
        self.header: dict[str, Any] = json.loads(content[8 : 8 + length])
        self.data = content[8 + length :]
        self.shapes = shapes
        self.codec = json.loads(self.header["__metadata__"]["weft.update"])["codec"]
        self.array = functools.cache(self.read)

    def read(self, name: str) -> tuple[Any, ...]:
        entry = self.header[name]
        letter = {"F32": "f", "BF16": "H", "I32": "i", "U32": "I", "U8": "B"}[entry["dtype"]]
        return struct.unpack(
            f"<{math.prod(entry['shape'])}{letter}", self.data[slice(*entry["data_offsets"])]
        )

    def decoded(self) -> dict[str, list[float]]:
        if self.codec["kind"] == "fp32":
            return {name: list(self.array(f"delta/{name}")) for name, _ in self.shapes}
        sizes = [math.prod(shape) for _, shape in self.shapes]
        row = [0.0] * sum(sizes)
        for position, value in self.kept(sizes):
            row[position] = value
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        return {
            name: row[start : start + size]
            for (name, _), start, size in zip(self.shapes, starts, sizes, strict=True)
        }

    def fisher(self) -> dict[str, list[float]]:
        lengths, data = "fisher#frame_bytes", self.array("fisher#codes")
        codes = b"".join(zstd.decompress(bytes(piece)) for piece in self.pieces(lengths, data))
        decoded, start = {}, 0
        for (name, shape), scale in zip(self.shapes, self.array("fisher#scales"), strict=True):
            (bits,) = struct.unpack("<I", struct.pack("<f", scale))
            values = [
                struct.unpack("<f", struct.pack("<I", ((bits >> 20) + code - 255) << 20 | 0x80000))[0]
                if code and scale
                else 0.0
                for code in codes[start : start + math.prod(shape)]
            ]
            decoded[name], start = values, start + math.prod(shape)
        return decoded

    def kept(self, sizes: list[int]) -> Iterator[tuple[int, float]]:
        kind = self.codec["kind"]
        sparse = kind in {"topk", "ternary", "shared-mask"}
        width = 1 << (20 if sparse else 18)
        coder = {"ternary": "sign"}.get(kind, self.codec.get("values", kind))
        pieces = self.pieces("delta#value_bytes", self.array("delta#values"))
        for block in range(-(-sum(sizes) // width)):
            positions = self.positions(block, min(width, sum(sizes) - block * width))
            codes = unpack(coder, bytes(pieces[block]), len(positions))
            for position, code in zip(positions, codes, strict=True):
                element = block * width + position
                yield element, self.value(coder, code, element, sizes)

    def value(self, coder: str, code: int, element: int, sizes: list[int]) -> float:
        if coder == "bf16":
            return bfloat(code)
        first, tensor = 0, 0
        while element >= sizes[tensor]:
            per_scale = self.codec["scale_elements"] or sizes[tensor]
            first += -(-sizes[tensor] // per_scale) if sizes[tensor] else 0
            element -= sizes[tensor]
            tensor += 1
        scale = bfloat(
            self.array("delta#scales")[first + element // (self.codec["scale_elements"] or sizes[tensor])]
        )
        if coder == "sign":
            return -scale if code else scale
        return (code - {"int8": 127, "int4": 7}[coder]) * scale

    def positions(self, block: int, size: int) -> list[int]:
        if self.codec["kind"] == "shared-mask":
            threshold = math.floor(self.codec["density"] * 2**32)
            draws = philox(int(self.codec["round_seed"]), block, size)
            return [element for element, draw in enumerate(draws) if draw < threshold]
        if "density" not in self.codec:
            return list(range(size))
        words = self.pieces("delta#gap_words", self.array("delta#gaps"))[block]
        symbols = decode_symbols(
            list(words), self.array("delta#gap_symbols")[block], frequencies(self.array("delta#gap_model"))
        )
        positions, reached = [], 0
        for symbol in symbols:
            reached += symbol
            if symbol < 255:
                positions.append(reached)
                reached += 1
        assert len(positions) == self.array("delta#counts")[block]
        return positions

    def pieces(self, lengths: str, data: tuple[int, ...]) -> list[tuple[int, ...]]:
        pieces, start = [], 0
        for length in self.array(lengths):
            pieces.append(data[start : start + length])
            start += length
        return pieces


def bfloat(bits: int) -> float:
    value: float = struct.unpack("<f", struct.pack("<I", bits << 16))[0]
    return value


def unpack(coder: str, piece: bytes, count: int) -> list[int]:
    if coder == "bf16":
        exponents, rest = zstd.decompress(piece[: len(piece) - count]), piece[len(piece) - count :]
        return [high << 7 | low & 0x7F | (low & 0x80) << 8 for high, low in zip(exponents, rest, strict=True)]
    if coder == "sign":
        return [piece[index // 8] >> 7 - index % 8 & 1 for index in range(count)]
    content = zstd.decompress(piece)
    if coder == "int8":
        return list(content)
    return [half for byte in content for half in (byte >> 4, byte & 15)][:count]


def frequencies(model: tuple[int, ...]) -> list[int]:
    weights = [0 if code == 0 else (8 + (code - 1) % 8) << (code - 1) // 8 for code in model]
    if not any(weights):
        weights = [1] * 256
    shares = [weight * (2**24 - 256) // sum(weights) for weight in weights]
    shares[weights.index(max(weights))] += 2**24 - 256 - sum(shares)
    return [share + 1 for share in shares]


def decode_symbols(words: list[int], count: int, of_symbol: list[int]) -> list[int]:
    below = [sum(of_symbol[:symbol]) for symbol in range(256)]
    state, symbols = 0, []
    for _ in range(2):
        state = state << 32 | (words.pop() if words else 0) if state < 1 << 32 and words else state
    for _ in range(count):
        slot = state % 2**24
        symbol = bisect_right(below, slot) - 1
        state = (state >> 24) * of_symbol[symbol] + slot - below[symbol]
        if state < 1 << 32 and words:
            state = state << 32 | words.pop()
        symbols.append(symbol)
    assert (state, words) == (0, [])
    return symbols


def encode_symbols(symbols: list[int], of_symbol: list[int]) -> list[int]:
    below = [sum(of_symbol[:symbol]) for symbol in range(256)]
    state, words = 0, []
    for symbol in reversed(symbols):
        if state >> 40 >= of_symbol[symbol]:
            words.append(state % 2**32)
            state >>= 32
        state = (state // of_symbol[symbol] << 24) + below[symbol] + state % of_symbol[symbol]
    while state:
        words.append(state % 2**32)
        state >>= 32
    return words


def philox(seed: int, block: int, count: int) -> Iterator[int]:
    """The first ``count`` halves of Philox4x64-10's words, low half first; counters begin at 1."""
    for counter in range(1, -(-count // 8) + 1):
        x, (k0, k1) = [counter, 0, 0, 0], (seed, block)
        for _ in range(10):
            low, high = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
            x = [high >> 64 ^ x[1] ^ k0, high & MASK_64, low >> 64 ^ x[3] ^ k1, low & MASK_64]
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK_64, (k1 + 0xBB67AE8584CAA73B) & MASK_64
        halves = [half for word in x for half in (word & 0xFFFFFFFF, word >> 32)]
        yield from halves[: count - 8 * (counter - 1)]


def floats(text: str) -> list[float]:
    return list(struct.unpack(f"<{len(text) // 8}f", bytes.fromhex(text)))


@pytest.mark.parametrize("name", VECTORS["updates"])
def test_another_reader_reads_the_committed_vectors(name: str) -> None:
    shapes = [(tensor["name"], tuple(tensor["shape"])) for tensor in VECTORS["schema"]]
    reader = Reader((FOLDER / name).read_bytes(), shapes)
    expected = {
        section: {tensor: floats(text) for tensor, text in tensors.items()}
        for section, tensors in VECTORS["updates"][name]["decoded"].items()
    }
    assert reader.decoded() == expected["delta"]
    if "fisher" in expected:
        assert reader.fisher() == expected["fisher"]


@pytest.mark.parametrize("name", VECTORS["updates"])
def test_weft_reads_the_committed_vectors(name: str) -> None:
    codec = CASES[name.removesuffix(".update")]
    fisher = codec.kind is CodecKind.FP32
    path = FOLDER / name
    screen_update(path, SCHEMA, [codec], wants_fisher=fisher, size_bytes_max=1 << 16)
    assert decode(path) == VECTORS["updates"][name]["decoded"]


def test_weft_writes_what_is_in_the_vectors(tmp_path: Path) -> None:
    assert write(tmp_path) == VECTORS
    # Frames of zstd may differ between its releases; nothing else may.
    for name in ("sign.update", "ternary.update"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()
    assert {path.stem for path in FOLDER.glob("*.update")} == set(CodecKind)


def test_the_vectors_hold_what_the_document_says() -> None:
    delta, fisher = module()
    assert VECTORS["given"]["delta"] == {name: array.tobytes().hex() for name, array in delta.items()}
    assert VECTORS["given"]["fisher"] == {name: array.tobytes().hex() for name, array in fisher.items()}


@pytest.mark.parametrize(
    "symbols", [[], [9], [1, 5, 255, 255, 87], [5] * 3000 + [87] * 500 + list(range(256))]
)
def test_another_writer_writes_the_same_words(symbols: list[int]) -> None:
    model = lossless.model_of(np.bincount(np.array(symbols, np.int64), minlength=256))
    of_symbol = frequencies(tuple(model.tolist()))
    assert of_symbol == lossless.frequencies(model).tolist()
    words = lossless.GapEncoder(model).encode(np.array(symbols, np.uint8)).tolist()
    assert encode_symbols(symbols, of_symbol) == words
    assert decode_symbols(words, len(symbols), of_symbol) == symbols


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (CodecSettings(kind=CodecKind.TERNARY, density=0.0005), (1 << 20) + 3000),
        (CodecSettings(kind=CodecKind.INT4), (1 << 18) + 1001),
    ],
    ids=["sparse", "dense"],
)
def test_another_reader_crosses_blocks(tmp_path: Path, codec: CodecSettings, size: int) -> None:
    schema = Schema((TensorSpec("a", "F32", (777,)), TensorSpec("b", "F32", (size,))))
    rng = np.random.default_rng(0)
    deltas = {spec.name: rng.standard_normal(spec.shape, dtype=np.float32) for spec in schema.tensors}
    encode_update(tmp_path / "u", schema, deltas, codec)
    reader = Reader((tmp_path / "u").read_bytes(), [(spec.name, spec.shape) for spec in schema.tensors])
    decoded = reader.decoded()
    with UpdateFile(tmp_path / "u", schema) as update:
        for spec in schema.tensors:
            assert decoded[spec.name] == update.tile(spec.name, 0, spec.size).tolist()
