"""The update file: what a worker sends for one module, and the one gate that looks at it.

An update is a canonical tensor file (common/tensors.py) with one or two sections: ``delta``, trained minus
start, and ``fisher``, the diagonal Fisher, when the task asks for it. Its only metadata is a statement of the
format, the codec and the exact size. docs/update-format.md describes the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from weft.common.codec.dense import Dense
from weft.common.codec.fisher import LogScale
from weft.common.codec.section import Expected, SectionCodec, SectionReader
from weft.common.codec.settings import CodecKind, CodecSettings
from weft.common.codec.ternary import Ternary
from weft.common.errors import CodecError, UpdateRejected, UsageError
from weft.common.modules import Schema
from weft.common.tensors import (
    STRICT,
    Float32Array,
    Header,
    TensorFile,
    canonical_json,
    check_arrays,
    first_non_finite,
    parse_json,
    slices,
    write_tensors,
)

FORMAT: Final = 1
STATEMENT: Final = "weft.update"
"""Key of the statement in the file's metadata."""
DELTA: Final = "delta"
FISHER: Final = "fisher"
MAGNITUDE_MAX: Final = 1e4
"""Largest absolute value of a delta that the gate lets through."""

CODECS: Final[Mapping[CodecKind, SectionCodec]] = {
    codec.name: codec for codec in (Dense(CodecKind.FP32, "F32"), Dense(CodecKind.BF16, "BF16"), Ternary())
}
"""How the delta is written, by the run's setting."""
FISHER_CODEC: Final[SectionCodec] = LogScale()
"""How the Fisher is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedUpdate:
    """An update file that was written."""

    path: Path
    """Where it is."""
    size_bytes: int
    """Size of the file."""
    bits_per_parameter: float
    """Bits of the delta section for each parameter, exactly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateStatistics:
    """What the gate learned of an update that it let through."""

    size_bytes: int
    """Size of the file."""
    bits_per_parameter: float
    """Bits of the delta section for each parameter, exactly."""
    norm: float
    """L2 norm of the decoded delta over all tensors, accumulated in float64."""
    fisher_norm: float
    """L2 norm of the decoded Fisher; 0 without one."""


def encode_update(
    to: Path,
    schema: Schema,
    deltas: Mapping[str, Float32Array],
    codec: CodecSettings,
    *,
    fisher: Mapping[str, Float32Array] | None = None,
) -> EncodedUpdate:
    """Write the update file of one module.

    Args:
        to: File to write; durability is the caller's.
        schema: The module's tensors.
        deltas: Trained minus start, float32 in each tensor's shape.
        codec: The run's setting.
        fisher: Diagonal Fisher, float32 in each tensor's shape, non-negative.

    Raises:
        CodecError: A value is not finite, or a Fisher value negative or absurd.
        DiskFull: No space left.
        ValueError: Names, dtypes or shapes are not the schema's.
    """
    sections = {DELTA: (CODECS[codec.kind], deltas)} | (
        {FISHER: (FISHER_CODEC, fisher)} if fisher is not None else {}
    )
    tensors: dict[str, Any] = {}
    for section, (section_codec, arrays) in sections.items():
        _check_finite(section, schema, arrays)
        tensors |= section_codec.encode(section, schema, arrays, codec)
    sizes = dict.fromkeys(sections, 0)
    for name, tensor in tensors.items():
        sizes[_section_of(name)] += getattr(tensor, "bits", tensor).nbytes
    size_bytes = write_tensors(to, tensors, {STATEMENT: canonical_json(_statement(schema, codec, sizes))})
    return EncodedUpdate(
        path=to, size_bytes=size_bytes, bits_per_parameter=_bits_per_parameter(sizes[DELTA], schema)
    )


def screen_update(
    path: Path,
    schema: Schema,
    codec: CodecSettings,
    *,
    wants_fisher: bool,
    size_bytes_max: int,
    magnitude_max: float = MAGNITUDE_MAX,
) -> UpdateStatistics:
    """Check everything about an update file that a worker sent: the one gate, cheapest checks first.

    Memory stays within a few slices of 8 MiB whatever the file claims.

    Raises:
        TensorFileError: Not a canonical tensor file.
        CodecError: Not an update file of this codec, or its data decode to nothing.
        UpdateRejected: Too large; not the schema's tensors; a value not finite, too large or negative.
    """
    size_bytes = path.stat().st_size if path.is_file() else 0
    if size_bytes > size_bytes_max:
        raise UpdateRejected(f"the update has {size_bytes} bytes and at most {size_bytes_max} are taken")
    with TensorFile(path) as file:
        sections = {DELTA: CODECS[codec.kind]} | ({FISHER: FISHER_CODEC} if wants_fisher else {})
        _check_tensors(file.header, schema, sections)
        sizes = _section_sizes(file.header, sections)
        _check_statement(file.header, _statement(schema, codec, sizes))
        sums = {
            section: section_codec.screen(section, file, schema, settings=codec, magnitude_max=magnitude_max)
            for section, section_codec in sections.items()
        }
    return UpdateStatistics(
        size_bytes=size_bytes,
        bits_per_parameter=_bits_per_parameter(sizes[DELTA], schema),
        norm=math.sqrt(sums[DELTA]),
        fisher_norm=math.sqrt(sums.get(FISHER, 0.0)),
    )


def update_bytes_max(schema: Schema, codec: CodecSettings, *, fisher: bool) -> int:
    """More bytes than an update ever has, to be used as its quota."""
    sections = {DELTA: CODECS[codec.kind]} | ({FISHER: FISHER_CODEC} if fisher else {})
    names = [name for section, row in sections.items() for name in row.expected(section, schema)]
    header = 8 + STRICT.metadata_bytes_max + sum(len(name) + 256 for name in names)
    return header + sum(row.data_bytes_max(schema, codec) for row in sections.values())


class UpdateFile:
    """An update that was screened, read tile by tile.

    A tile of a dense delta comes from the mapped file. Of a ternary delta, and of the Fisher, the blocks
    of 2²⁰ elements that the tile lies in are decoded and the last few remembered: 1 MiB of positions and
    signs at density 0.05 (20 MiB at density 1), and 2 MiB of Fisher codes. Several threads may read tiles.

    Raises:
        TensorFileError, CodecError: The file is not an update; cannot happen to one that was screened.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self._file = TensorFile(path)
        self.codec, sections = _read_statement(self._file.header)
        row = CODECS[self.codec.kind]
        self.sparse: bool = row.sparse
        """Whether the codec has already trimmed the delta."""
        self.has_fisher: bool = FISHER in sections
        """Whether the worker sent a Fisher."""
        rows = {DELTA: row} | ({FISHER: FISHER_CODEC} if self.has_fisher else {})
        _check_tensors(self._file.header, schema, rows)
        self._readers = {name: codec.open(name, self._file, schema) for name, codec in rows.items()}
        self._schema = schema

    def __enter__(self) -> UpdateFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; tiles already read stay valid."""
        self._readers = {}
        self._file.close()

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        """Elements ``start`` to ``stop`` of the delta, C order, as float32; not to be written to."""
        return self._reader(DELTA).tile(name, start, stop)

    def fisher_tile(self, name: str, start: int, stop: int) -> Float32Array:
        """The same of the Fisher; raises ValueError without one."""
        return self._reader(FISHER).tile(name, start, stop)

    def tiles(self) -> Iterator[tuple[str, int, int, Float32Array]]:
        """The whole delta, in pieces: name, start, stop, values."""
        for spec in self._schema.tensors:
            for start, stop in slices(spec.size):
                yield spec.name, start, stop, self.tile(spec.name, start, stop)

    def _reader(self, section: str) -> SectionReader:
        if section not in self._readers:
            raise ValueError(f"the update is closed or has no {section}")
        return self._readers[section]


# -- the statement ---------------------------------------------------------------------------------------


def _statement(schema: Schema, codec: CodecSettings, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What the file says of itself; follows from the task and the file's own header."""
    density = {"density": codec.density} if codec.kind is CodecKind.TERNARY else {}
    return {
        "codec": density | {"kind": codec.kind.value},
        "format": FORMAT,
        "num_parameters": schema.num_parameters,
        "sections": {
            section: {
                "bits_per_parameter": _bits_per_parameter(size, schema),
                "bytes": size,
                "codec": FISHER_CODEC.name if section == FISHER else codec.kind.value,
            }
            for section, size in sorted(sizes.items())
        },
    }


def _check_statement(header: Header, expected: Mapping[str, Any]) -> None:
    stated = _parse_statement(header)
    if stated == expected:
        return
    wrong = next((key for key in expected if stated.get(key) != expected[key]), "more than it should")
    raise CodecError(
        f"the update's statement is not the task's: {wrong}", hint=f"expected {canonical_json(expected)}"
    )


def _read_statement(header: Header) -> tuple[CodecSettings, tuple[str, ...]]:
    """Codec and sections of an update that was screened."""
    stated = _parse_statement(header)
    try:
        codec = stated["codec"]
        settings = CodecSettings(kind=CodecKind(codec["kind"]), density=float(codec.get("density", 1)))
        return settings, tuple(stated["sections"])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError, UsageError) as error:
        raise CodecError("the update's statement names no codec") from error


def _parse_statement(header: Header) -> dict[str, Any]:
    if header.metadata.keys() != {STATEMENT}:
        raise CodecError(f"the file's metadata is not the {STATEMENT} statement alone")
    stated = parse_json(header.metadata[STATEMENT])
    if not isinstance(stated, dict):
        raise CodecError("the update's statement is not a JSON object")
    return stated


def _bits_per_parameter(size_bytes: int, schema: Schema) -> float:
    return 8 * size_bytes / max(schema.num_parameters, 1)


# -- the tensors -----------------------------------------------------------------------------------------


def _section_of(name: str) -> str:
    """``delta`` of ``delta/model.norm.weight`` and of ``delta#gaps``."""
    return name.split("/", 1)[0].split("#", 1)[0]


def _section_sizes(header: Header, sections: Mapping[str, SectionCodec]) -> dict[str, int]:
    sizes = dict.fromkeys(sections, 0)
    for name, entry in header.entries.items():
        sizes[_section_of(name)] += entry.stop - entry.start
    return sizes


def _check_tensors(header: Header, schema: Schema, sections: Mapping[str, SectionCodec]) -> None:
    expected: dict[str, Expected] = {}
    for section, codec in sections.items():
        expected |= codec.expected(section, schema)
    for name, tensor in expected.items():
        if name not in header.entries:
            raise UpdateRejected(f"the update lacks {name}")
        if not tensor.matches(header.entries[name]):
            raise UpdateRejected(f"{name} is not {tensor.dtype} {tensor.shape or ''}".rstrip())
    for name in header.entries.keys() - expected.keys():
        raise UpdateRejected(f"the update holds {name}, which the task does not ask for")


def _check_finite(section: str, schema: Schema, arrays: Mapping[str, Float32Array]) -> None:
    check_arrays(arrays, schema)
    for name, array in arrays.items():
        index = first_non_finite(array)
        if index is not None:
            raise CodecError(f"{section} of {name} is not finite at element {index}")
