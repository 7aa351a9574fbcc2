"""The update file: what a worker sends for one module, and the one gate that looks at it.

An update is a canonical tensor file (common/tensors.py) with one or two sections: ``delta``, trained minus
start, and ``fisher``, the diagonal Fisher, when the task asks for it. Its only metadata is a statement of the
format, the codec and the exact size. docs/update-format.md describes the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, TypeVar

from weft.common.codec.composed import Composed
from weft.common.codec.dense import Dense
from weft.common.codec.fisher import LogScale
from weft.common.codec.positions import All, Largest, SharedMask
from weft.common.codec.section import (
    Coding,
    DeltaCodec,
    DeltaReader,
    Expected,
    Indices,
    SectionCodec,
    SectionReader,
)
from weft.common.codec.settings import CHOOSES_VALUES, KEEPS_A_SHARE, CodecKind, CodecSettings, ValueKind
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

CODECS: Final[Mapping[CodecKind, DeltaCodec]] = {
    CodecKind.FP32: Dense(),
    CodecKind.BF16: Composed(All()),
    CodecKind.INT8: Composed(All()),
    CodecKind.INT4: Composed(All()),
    CodecKind.SIGN: Composed(All()),
    CodecKind.TOPK: Composed(Largest()),
    CodecKind.TERNARY: Composed(Largest()),
    CodecKind.SHARED_MASK: Composed(SharedMask()),
}
"""How the delta is written, by the run's setting."""
FISHER_CODEC: Final[SectionCodec] = LogScale()
"""How the Fisher is written."""
_FISHER_NAME: Final = "log8"


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
    round_seed: int = 0,
    worker_seed: int = 0,
) -> EncodedUpdate:
    """Write the update file of one module.

    Args:
        to: File to write; durability is the caller's.
        schema: The module's tensors.
        deltas: Trained minus start, float32 in each tensor's shape.
        codec: The run's setting.
        fisher: Diagonal Fisher, float32 in each tensor's shape, non-negative.
        round_seed: Which positions shared-mask keeps; the same for all updates of a round, below 2⁶⁴.
        worker_seed: How stochastic rounding falls; another for each update, below 2⁶⁴.

    Raises:
        CodecError: A value is not finite, or a Fisher value negative or absurd.
        DiskFull: No space left.
        ValueError: Names, dtypes or shapes are not the schema's.
    """
    coding = Coding(settings=codec, round_seed=round_seed, worker_seed=worker_seed)
    sections: dict[str, tuple[SectionCodec, Mapping[str, Float32Array]]] = {
        DELTA: (CODECS[codec.kind], deltas)
    }
    if fisher is not None:
        sections[FISHER] = (FISHER_CODEC, fisher)
    tensors: dict[str, Any] = {}
    for section, (section_codec, arrays) in sections.items():
        _check_finite(section, schema, arrays)
        tensors |= section_codec.encode(section, schema, arrays, coding)
    sizes = dict.fromkeys(sections, 0)
    for name, tensor in tensors.items():
        sizes[_section_of(name)] += getattr(tensor, "bits", tensor).nbytes
    size_bytes = write_tensors(to, tensors, {STATEMENT: canonical_json(_statement(schema, coding, sizes))})
    return EncodedUpdate(
        path=to, size_bytes=size_bytes, bits_per_parameter=_bits_per_parameter(sizes[DELTA], schema)
    )


def screen_update(
    path: Path,
    schema: Schema,
    codecs: Sequence[CodecSettings],
    *,
    wants_fisher: bool,
    size_bytes_max: int,
    magnitude_max: float = MAGNITUDE_MAX,
    round_seed: int | None = None,
) -> UpdateStatistics:
    """Check everything about an update file that a worker sent: the one gate, cheapest checks first.

    Memory stays within a few slices of 8 MiB whatever the file claims. The update may be written with any one of
    ``codecs``; a shared mask must come from ``round_seed`` where that is given.

    Raises:
        TensorFileError: Not a canonical tensor file.
        CodecError: Not an update file of one of these codecs, or its data decode to nothing.
        UpdateRejected: Too large; not the schema's tensors; a value not finite, too large or negative.
    """
    size_bytes = path.stat().st_size if path.is_file() else 0
    if size_bytes > size_bytes_max:
        raise UpdateRejected(f"the update has {size_bytes} bytes and at most {size_bytes_max} are taken")
    with TensorFile(path) as file:
        coding = _match_codec(file.header, codecs, round_seed)
        sections = _sections(coding.settings, fisher=wants_fisher)
        _check_tensors(file.header, schema, sections, coding.settings)
        sizes = _section_sizes(file.header, sections)
        _check_statement(file.header, _statement(schema, coding, sizes))
        sums = {
            section: codec.screen(section, file, schema, coding=coding, magnitude_max=magnitude_max)
            for section, codec in sections.items()
        }
    return UpdateStatistics(
        size_bytes=size_bytes,
        bits_per_parameter=_bits_per_parameter(sizes[DELTA], schema),
        norm=math.sqrt(sums[DELTA]),
        fisher_norm=math.sqrt(sums.get(FISHER, 0.0)),
    )


def update_bytes_max(schema: Schema, codecs: Sequence[CodecSettings], *, fisher: bool) -> int:
    """More bytes than an update in any of ``codecs`` ever has, to be used as its quota."""
    return max(_bytes_max(schema, codec, fisher=fisher) for codec in codecs)


def _bytes_max(schema: Schema, codec: CodecSettings, *, fisher: bool) -> int:
    sections = _sections(codec, fisher=fisher)
    names = [name for section, row in sections.items() for name in row.expected(section, schema, codec)]
    header = 8 + STRICT.metadata_bytes_max + sum(len(name) + 256 for name in names)
    return header + sum(row.data_bytes_max(schema, codec) for row in sections.values())


def _sections(codec: CodecSettings, *, fisher: bool) -> dict[str, SectionCodec]:
    return {DELTA: CODECS[codec.kind]} | ({FISHER: FISHER_CODEC} if fisher else {})


class UpdateFile:
    """An update that was screened, read tile by tile.

    A tile of float32 comes from the mapped file. Of every other delta, and of the Fisher, the blocks that the tile
    lies in are decoded and the last few remembered: 2 MiB where all values are written, 1.6 MiB at density 0.05 (eight
    bytes a kept value). Several threads may read tiles.

    Raises:
        TensorFileError, CodecError: The file is not an update; cannot happen to one that was screened.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self._file = TensorFile(path)
        coding, sections = _read_statement(self._file.header)
        self.codec: CodecSettings = coding.settings
        """As far as a reader has to know it."""
        row = CODECS[self.codec.kind]
        self.sparse: bool = row.sparse
        """Whether the codec has already trimmed the delta."""
        self.has_fisher: bool = FISHER in sections
        """Whether the worker sent a Fisher."""
        _check_tensors(self._file.header, schema, _sections(self.codec, fisher=self.has_fisher), self.codec)
        self._delta: DeltaReader | None = row.open(DELTA, self._file, schema, coding)
        self._fisher: SectionReader | None = (
            FISHER_CODEC.open(FISHER, self._file, schema, coding) if self.has_fisher else None
        )
        self._schema = schema

    def __enter__(self) -> UpdateFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file; tiles already read stay valid."""
        self._delta = self._fisher = None
        self._file.close()

    def tile(self, name: str, start: int, stop: int) -> Float32Array:
        """Elements ``start`` to ``stop`` of the delta, C order, as float32; not to be written to."""
        return _opened(self._delta).tile(name, start, stop)

    def sparse_tile(self, name: str, start: int, stop: int) -> tuple[Indices, Float32Array]:
        """The non-zero elements of that tile: ascending indices from ``start`` on, int64 [k], and values [k]."""
        return _opened(self._delta).sparse_tile(name, start, stop)

    def fisher_tile(self, name: str, start: int, stop: int) -> Float32Array:
        """The same of the Fisher; raises ValueError without one."""
        return _opened(self._fisher).tile(name, start, stop)

    def tiles(self) -> Iterator[tuple[str, int, int, Float32Array]]:
        """The whole delta, in pieces: name, start, stop, values."""
        for spec in self._schema.tensors:
            for start, stop in slices(spec.size):
                yield spec.name, start, stop, self.tile(spec.name, start, stop)


ReaderT = TypeVar("ReaderT", bound=SectionReader)


def _opened(reader: ReaderT | None) -> ReaderT:
    if reader is None:
        raise ValueError("the update is closed or has no such section")
    return reader


# -- the statement ---------------------------------------------------------------------------------------


def _statement(schema: Schema, coding: Coding, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What the file says of itself; follows from the task and the file's own header."""
    return {
        "codec": _codec_statement(coding),
        "format": FORMAT,
        "num_parameters": schema.num_parameters,
        "sections": {
            section: {
                "bits_per_parameter": _bits_per_parameter(size, schema),
                "bytes": size,
                "codec": _FISHER_NAME if section == FISHER else coding.settings.kind.value,
            }
            for section, size in sorted(sizes.items())
        },
    }


def _codec_statement(coding: Coding) -> dict[str, Any]:
    """What a reader has to know of a codec."""
    settings = coding.settings
    stated: dict[str, Any] = {"kind": settings.kind.value}
    if settings.kind in KEEPS_A_SHARE:
        stated["density"] = settings.density
    if settings.kind in CHOOSES_VALUES:
        stated["values"] = settings.values.value
    if settings.value_kind not in {None, ValueKind.BF16}:
        stated["scale_elements"] = settings.elements_per_scale
    if settings.kind is CodecKind.SHARED_MASK:
        stated["round_seed"] = str(coding.round_seed)
    return dict(sorted(stated.items()))


def _match_codec(header: Header, codecs: Sequence[CodecSettings], round_seed: int | None) -> Coding:
    """The one of ``codecs`` that the file says it is written with, and its seed."""
    stated = _parse_statement(header).get("codec")
    seed = _stated_seed(stated) if round_seed is None else round_seed
    allowed = [Coding(settings=codec, round_seed=seed) for codec in codecs]
    for coding in allowed:
        if _codec_statement(coding) == stated:
            return coding
    raise CodecError(
        "the update's statement is not the task's: codec",
        hint=f"expected one of {canonical_json([_codec_statement(coding) for coding in allowed])}",
    )


def _stated_seed(stated: Any) -> int:
    """The seed that a statement names in decimal; 0 where it names none that can be one."""
    text = stated.get("round_seed") if isinstance(stated, dict) else None
    if not isinstance(text, str) or not text.isdecimal() or len(text) > 20:
        return 0
    return int(text) % (1 << 64)


def _check_statement(header: Header, expected: Mapping[str, Any]) -> None:
    stated = _parse_statement(header)
    if stated == expected:
        return
    wrong = next((key for key in expected if stated.get(key) != expected[key]), "more than it should")
    raise CodecError(
        f"the update's statement is not the task's: {wrong}", hint=f"expected {canonical_json(expected)}"
    )


def _read_statement(header: Header) -> tuple[Coding, tuple[str, ...]]:
    """Codec and sections of an update that was screened."""
    stated = _parse_statement(header)
    try:
        codec = stated["codec"]
        settings = CodecSettings(
            kind=CodecKind(codec["kind"]),
            density=float(codec.get("density", 1)),
            values=ValueKind(codec.get("values", ValueKind.BF16)),
            scale_elements=int(codec.get("scale_elements", 0)),
        )
        return Coding(settings=settings, round_seed=_stated_seed(codec)), tuple(stated["sections"])
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


def _check_tensors(
    header: Header, schema: Schema, sections: Mapping[str, SectionCodec], settings: CodecSettings
) -> None:
    expected: dict[str, Expected] = {}
    for section, codec in sections.items():
        expected |= codec.expected(section, schema, settings)
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
