"""Tensor files: a strict reader and a canonical writer of the safetensors container.

A file is an 8-byte little-endian length, that many bytes of JSON naming each tensor's dtype, shape and byte
range, then the tensors themselves. The format cannot carry code; what it leaves open (duplicate keys,
padding, order, size of the header) is closed here, so that equal tensors are equal bytes and nothing hostile
costs more than its size. ``STRICT`` reads only what ``write_tensors`` writes; ``FOREIGN`` reads what the
safetensors library writes, for bases and adapters that others made.

Tensors are mapped, never copied as a whole: a tile is the unit of work. bfloat16, which numpy lacks, is held
as its upper sixteen bits in uint16.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from weft.common.errors import DiskFull, TensorFileError
from weft.common.modules import Schema, TensorSpec

Float32Array: TypeAlias = npt.NDArray[np.float32]
Uint8Array: TypeAlias = npt.NDArray[np.uint8]
Uint16Array: TypeAlias = npt.NDArray[np.uint16]

DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("<i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("<u1"),
    "BOOL": np.dtype("?"),
}
"""Dtypes that are exchanged, by their safetensors name, and how numpy holds them."""
FOREIGN_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    **DTYPES,
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
}
"""Those, and what others store; eight-bit floats are held as their bits."""

SLICE_BYTES: Final = 8 << 20
"""How much of a tensor is looked at in one go."""
_NAME_LENGTH_MAX: Final = 256
_NUM_DIMENSIONS_MAX: Final = 8
_DIMENSION_MAX: Final = 1 << 40
_DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}
_METADATA: Final = "__metadata__"
_BF16_NAN: Final = 0x7FC0


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderRules:
    """How much freedom a header has."""

    header_bytes_max: int
    """Longest JSON header."""
    metadata_bytes_max: int
    """Longest metadata, as JSON."""
    dtypes: Mapping[str, np.dtype[Any]]
    """What tensors may hold."""
    canonical: bool
    """The header must be, byte for byte, what ``write_tensors`` would have written."""


STRICT: Final = HeaderRules(header_bytes_max=1 << 20, metadata_bytes_max=4096, dtypes=DTYPES, canonical=True)
"""For what workers and coordinators exchange."""
FOREIGN: Final = HeaderRules(
    header_bytes_max=16 << 20, metadata_bytes_max=1 << 20, dtypes=FOREIGN_DTYPES, canonical=False
)
"""For files that other programs wrote."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file."""

    spec: TensorSpec
    """Name, dtype and shape."""
    start: int
    """First byte, counted from the start of the data section."""
    stop: int
    """One past the last byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of itself, checked."""

    entries: Mapping[str, Entry]
    """By name, in the order in which they lie in the file."""
    metadata: Mapping[str, str]
    """Free text by key."""
    data_start: int
    """Offset of the data section in the file."""

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """The tensors, in the order in which they lie in the file."""
        return tuple(entry.spec for entry in self.entries.values())


@dataclass(frozen=True, slots=True)
class Bf16:
    """A bfloat16 array on its way into a file."""

    bits: Uint16Array
    """The upper half of each float32."""


TensorData: TypeAlias = npt.NDArray[Any] | Bf16


# -- reading ---------------------------------------------------------------------------------------------


def read_header(path: Path, rules: HeaderRules = STRICT) -> Header:
    """Read and check the header of a tensor file; raises TensorFileError."""
    with _open(path) as file:
        return _read_header(file, path, rules)


def parse_header(text: bytes, data_bytes: int, rules: HeaderRules = STRICT) -> Header:
    """Check a JSON header against the number of data bytes that follow it; raises TensorFileError."""
    fields = parse_json(text)
    if not isinstance(fields, dict):
        raise TensorFileError("the header is not a JSON object")
    metadata = _parse_metadata(fields.pop(_METADATA, {}), rules)
    entries = sorted(
        (_parse_entry(name, value, rules) for name, value in fields.items()), key=lambda e: (e.start, e.stop)
    )
    _check_contiguous(entries, data_bytes)
    if rules.canonical and render_header((entry.spec for entry in entries), metadata) != text:
        raise TensorFileError("the header is not in canonical form")
    by_name = {entry.spec.name: entry for entry in entries}
    return Header(entries=by_name, metadata=metadata, data_start=8 + len(text))


def parse_json(text: bytes | str) -> Any:
    """Parse JSON that holds no key twice, no NaN and no infinity; raises TensorFileError."""
    try:
        decoded = text if isinstance(text, str) else text.decode()
        return json.loads(decoded, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise TensorFileError("the file holds malformed JSON") from error


def canonical_json(value: Any) -> str:
    """JSON in the one form that Weft writes: ASCII, no spaces, keys in the order given."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


class TensorFile:
    """A tensor file mapped into memory; arrays and tiles are read-only.

    The file must not change while it is open. Views keep the mapping alive after ``close``.

    Raises:
        TensorFileError: Not readable, or not well-formed under ``rules``.
    """

    def __init__(self, path: Path, rules: HeaderRules = STRICT) -> None:
        with _open(path) as file:
            self.header = _read_header(file, path, rules)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data: Uint8Array | None = np.frombuffer(mapped, np.uint8)[self.header.data_start :]

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; it is unmapped with the last array that views it."""
        self._data = None

    def array(self, name: str) -> npt.NDArray[Any]:
        """The whole tensor in its own shape, as a view; bfloat16 as uint16 bits."""
        spec = self.header.entries[name].spec
        return self._flat(name).reshape(spec.shape)

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        """Elements ``start`` to ``stop`` of the tensor in C order, as float32 [stop - start]."""
        return to_float32(self._flat(name)[start:stop], self.header.entries[name].spec.dtype)

    def _flat(self, name: str) -> npt.NDArray[Any]:
        if self._data is None:
            raise ValueError("the tensor file is closed")
        entry = self.header.entries[name]
        return self._data[entry.start : entry.stop].view(FOREIGN_DTYPES[entry.spec.dtype])


def to_float32(values: npt.NDArray[Any], dtype: str) -> Float32Array:
    """Widen ``F32``, ``F16`` or ``BF16`` (as uint16 bits) to float32, exactly; float32 is passed through."""
    if dtype == "F32":
        return cast("Float32Array", values)
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return values.astype(np.float32)
    raise ValueError(f"{dtype} is not held as float32")


def float8_to_float32(bits: Uint8Array, dtype: str) -> Float32Array:
    """Widen ``F8_E4M3`` or ``F8_E5M2`` bits to float32 of the same shape, exactly (arXiv 2209.05433)."""
    return _FLOAT8[dtype][bits]


def _e4m3() -> Float32Array:
    """Every value by its bits: four bits of exponent, no infinity, one NaN of either sign."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    subnormal = exponent == 0
    sizes = np.ldexp(np.where(subnormal, mantissa, 8 + mantissa), np.where(subnormal, 1, exponent) - 10)
    sizes[bits & 127 == 127] = np.nan
    values: Float32Array = np.where(bits < 128, sizes, -sizes).astype(np.float32)
    return values


def _e5m2() -> Float32Array:
    """Every value by its bits, which are the upper half of a float16."""
    return (np.arange(256, dtype=np.uint16) << 8).view(np.float16).astype(np.float32)


_FLOAT8: Final = {"F8_E4M3": _e4m3(), "F8_E5M2": _e5m2()}


def float32_to_bf16(values: Float32Array) -> Uint16Array:
    """Round to bfloat16 bits of the same shape, to nearest, ties to even; NaN stays NaN, as in PyTorch."""
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    rounded = np.empty(flat.size, np.uint16)
    for start, stop in slices(flat.size):
        part = flat[start:stop]
        bits = part.view(np.uint32)
        np.right_shift(
            bits + (((bits >> 16) & 1) + np.uint32(0x7FFF)), 16, out=rounded[start:stop], casting="unsafe"
        )
        rounded[start:stop][np.isnan(part)] = _BF16_NAN
    return rounded.reshape(values.shape)


def first_non_finite(values: Float32Array) -> int | None:
    """Flat index of the first NaN or infinity, or None."""
    flat = values.reshape(-1)
    for start, stop in slices(flat.size):
        finite = np.isfinite(flat[start:stop])
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def first_non_finite_of(file: TensorFile) -> tuple[str, int] | None:
    """Name and flat index of the first NaN or infinity in a file's F32, F16 and BF16 tensors, or None."""
    for spec in file.header.specs:
        if spec.dtype not in {"F32", "F16", "BF16"}:
            continue
        for start, stop in slices(spec.size):
            index = first_non_finite(file.tile(spec.name, start, stop))
            if index is not None:
                return spec.name, start + index
    return None


def slices(size: int) -> Iterator[tuple[int, int]]:
    """Cut ``size`` float32 elements into pieces of at most ``SLICE_BYTES``."""
    step = SLICE_BYTES // 4
    return ((start, min(start + step, size)) for start in range(0, size, step))


# -- writing ---------------------------------------------------------------------------------------------


def write_tensors(
    to: Path | BinaryIO, tensors: Mapping[str, TensorData], metadata: Mapping[str, str] | None = None
) -> int:
    """Write a canonical tensor file and return its size in bytes.

    Tensors lie wider dtypes first, then by name, so that each is aligned; the safetensors library reads the
    file. Equal tensors and metadata give equal bytes. Durability is the caller's.

    Raises:
        TensorFileError: The header would be too long to be read back.
        DiskFull: No space left.
    """
    arrays = {name: _array_and_dtype(tensor) for name, tensor in tensors.items()}
    specs = sorted(
        (TensorSpec(name, dtype, array.shape) for name, (array, dtype) in arrays.items()),
        key=_canonical_order,
    )
    header = render_header(specs, metadata or {})
    parse_header(header, sum(array.nbytes for array, _ in arrays.values()))
    if not isinstance(to, Path):
        return _write(to, header, (arrays[spec.name][0] for spec in specs))
    with _disk_errors(to), to.open("wb") as file:
        return _write(file, header, (arrays[spec.name][0] for spec in specs))


def render_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """The one header that a file with these tensors and this metadata has, padded to 8 bytes."""
    fields: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for spec in sorted(specs, key=_canonical_order):
        stop = offset + spec.size * DTYPES[spec.dtype].itemsize
        fields[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (offset, stop)}
        offset = stop
    text = canonical_json(fields).encode("ascii")
    return text + b" " * (-len(text) % 8)


# -- module states ---------------------------------------------------------------------------------------


def write_module(
    to: Path | BinaryIO,
    arrays: Mapping[str, Float32Array],
    schema: Schema,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write the state of a module: float32 arrays, rounded where the schema says BF16; returns the bytes."""
    check_arrays(arrays, schema)
    tensors: dict[str, TensorData] = {
        spec.name: Bf16(float32_to_bf16(arrays[spec.name])) if spec.dtype == "BF16" else arrays[spec.name]
        for spec in schema.tensors
    }
    return write_tensors(to, tensors, metadata)


def open_module(path: Path, schema: Schema) -> TensorFile:
    """Open the state of a module; raises TensorFileError unless names, dtypes and shapes are the schema's."""
    file = TensorFile(path)
    found = {spec.name: spec for spec in file.header.specs}
    for spec in schema.tensors:
        if found.pop(spec.name, None) != spec:
            raise TensorFileError(f"{path.name} does not hold {spec.name} as {spec.dtype} {list(spec.shape)}")
    if found:
        raise TensorFileError(f"{path.name} holds {min(found)}, which the module does not have")
    return file


def check_arrays(arrays: Mapping[str, npt.NDArray[Any]], schema: Schema) -> None:
    """Raise ValueError unless ``arrays`` holds float32 in each of the schema's shapes, and nothing else."""
    if arrays.keys() != {spec.name for spec in schema.tensors}:
        raise ValueError(f"tensors {sorted(arrays)[:3]}… are not those of the schema")
    for spec in schema.tensors:
        array = arrays[spec.name]
        if array.dtype != np.float32 or array.shape != spec.shape:
            raise ValueError(f"{spec.name} is {array.dtype} {array.shape}, not float32 {spec.shape}")


# -- pieces ----------------------------------------------------------------------------------------------


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise TensorFileError(f"cannot read {path}: {error.strerror}") from error


def _read_header(file: BinaryIO, path: Path, rules: HeaderRules) -> Header:
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    if len(prefix) < 8:
        raise TensorFileError(f"{path.name} is too short for a tensor file")
    (length,) = struct.unpack("<Q", prefix)
    if length > min(rules.header_bytes_max, file_bytes - 8):
        raise TensorFileError(f"{path.name} is not a tensor file: it claims a header of {length} bytes")
    return parse_header(file.read(length), file_bytes - 8 - length, rules)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise TensorFileError("the file holds JSON that names a key twice")
    return fields


def _refuse_constant(text: str) -> None:
    raise TensorFileError(f"the file holds JSON with {text}")


def _parse_metadata(value: Any, rules: HeaderRules) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise TensorFileError("the metadata is not a map from text to text")
    if len(canonical_json(value)) > rules.metadata_bytes_max:
        raise TensorFileError(f"the metadata is longer than {rules.metadata_bytes_max} bytes")
    return value


def _parse_entry(name: str, value: Any, rules: HeaderRules) -> Entry:
    if not (name.isascii() and name.isprintable() and 1 <= len(name) <= _NAME_LENGTH_MAX):
        raise TensorFileError(f"a tensor's name is not 1 to {_NAME_LENGTH_MAX} printable ASCII characters")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise TensorFileError(f"{name} is not described by dtype, shape and data_offsets")
    shape, offsets, dtype = value["shape"], value["data_offsets"], value["dtype"]
    if not isinstance(dtype, str) or dtype not in rules.dtypes:
        raise TensorFileError(
            f"{name} has a dtype that is not read here", hint=f"use one of {', '.join(rules.dtypes)}"
        )
    if not _are_sizes(shape) or len(shape) > _NUM_DIMENSIONS_MAX:
        raise TensorFileError(f"{name} has no valid shape")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise TensorFileError(f"{name} has no valid offsets")
    return Entry(TensorSpec(name, dtype, tuple(shape)), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item <= _DIMENSION_MAX for item in value
    )


def _check_contiguous(entries: list[Entry], data_bytes: int) -> None:
    offset = 0
    for entry in entries:
        if entry.start != offset:
            raise TensorFileError(f"{entry.spec.name} does not begin where the tensor before it ends")
        offset += math.prod(entry.spec.shape) * FOREIGN_DTYPES[entry.spec.dtype].itemsize
        if entry.stop != offset:
            raise TensorFileError(f"{entry.spec.name} does not have the size of its shape")
    if offset != data_bytes:
        raise TensorFileError(f"the header describes {offset} bytes of data and there are {data_bytes}")


def _canonical_order(spec: TensorSpec) -> tuple[int, str]:
    return -DTYPES[spec.dtype].itemsize, spec.name


def _array_and_dtype(tensor: TensorData) -> tuple[npt.NDArray[Any], str]:
    if isinstance(tensor, Bf16):
        return tensor.bits, "BF16"
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"tensor files do not hold {tensor.dtype}")
    return tensor, _DTYPE_NAMES[tensor.dtype]


def _write(file: BinaryIO, header: bytes, arrays: Iterable[npt.NDArray[Any]]) -> int:
    size = file.write(struct.pack("<Q", len(header)) + header)
    for array in arrays:
        size += file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return size


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise DiskFull(f"no space left to write {path}", hint="free some space and try again") from error
        raise
