"""Signed statements and version manifests: strict JSON, exact bytes, one way to write everything.

A **manifest** says what a module's version is and how it came to be: parents, contributors, rule, outer
optimiser, gate, digests. It is canonical JSON (keys sorted, no blanks, ASCII, finite numbers), so that equal
manifests are equal bytes, and reading refuses all bytes but these: what is verified, stored, shown and
recomputed is one thing.

The signature is over the bytes, in a DSSE envelope (`weft.common.identity.signing`). Lineage is a chain: each
parent is named by the digest of its manifest, and through it of all before it.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NewType, TypeAlias, TypeVar

import blake3

from weft.common.errors import CorruptState, IdentityMismatch, InputError, UsageError
from weft.common.identity.signing import SigningKey, key_id, verify
from weft.common.ids import Digest, ModuleKey, RunId, TaskId, WorkerId, digest, run_id
from weft.common.modules import Kind, Schema

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""What canonical JSON is made of."""
Table: TypeAlias = Mapping[str, Any]
"""An open table of settings, as ``weft.common.settings.to_table`` writes it and ``from_table`` reads it."""
Sha256 = NewType("Sha256", str)
"""SHA-256 of exact stored bytes, 64 lower-case hex digits: the digest that other tools compute too."""
Instant = NewType("Instant", str)
"""A time in UTC as RFC 3339 writes it, to the second: ``2031-05-06T07:08:09Z``."""

FORMAT: Final = 1
"""Of :class:`VersionManifest`. A change of its keys or their meaning is another number."""
VERSION_TYPE: Final = "application/vnd.weft.version+json"
MANIFEST_BYTES_MAX: Final = 4 << 20
"""A contributor takes about 300 bytes: room for ten thousand."""
DEPTH_MAX: Final = 32
INTEGER_MAX: Final = 2**63 - 1

# A string (closed or not: a run to the end keeps the search linear) or a bracket outside of strings.
_NESTING: Final = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_STEPS: Final = {"[": 1, "{": 1, "]": -1, "}": -1}
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_INSTANT_FORM: Final = "%Y-%m-%dT%H:%M:%SZ"
_T = TypeVar("_T")


def canonical_json(value: Json) -> bytes:
    """Write JSON in the one way that is signed: keys sorted by code point, no blanks, ASCII, shortest floats.

    Raises:
        ValueError: A number is NaN or infinite.
        TypeError: Something is not JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii")


def parse_json(data: bytes, max_bytes: int) -> Any:
    """Read JSON from anyone.

    Refused: more than ``max_bytes`` bytes, anything but UTF-8, a key twice, NaN and numbers that overflow to
    infinity, integers of more than 64 bits, nesting deeper than ``DEPTH_MAX``, half a surrogate pair, a rest.

    Raises:
        InputError: With what is wrong.
    """
    if len(data) > max_bytes:
        raise InputError(f"JSON of {len(data)} bytes where at most {max_bytes} are expected")
    try:
        text = data.decode("utf-8")
        _check_depth(text)
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_integer, parse_float=_finite, parse_constant=_finite
        )
        # Half a surrogate pair is legal in JSON's escapes and fails much later, where the string is printed.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise InputError(f"not strict JSON: {error}") from error
    return value


def schema_digest(schema: Schema) -> Digest:
    """Name a schema: BLAKE3 of its tensors' names, dtypes and shapes as canonical JSON."""
    return _blake3(canonical_json(dataclasses.asdict(schema)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """Exact bytes with a signature; nothing is checked until it is asked for."""

    payload: bytes
    """What was signed, byte for byte."""
    payload_type: str
    """For which purpose; under the signature too."""
    signature: bytes
    """Ed25519 over DSSE's encoding, 64 bytes."""
    key_id: str
    """First 16 hex digits of the SHA-256 of the public key. It selects a key and proves nothing."""

    @classmethod
    def sign(cls, key: SigningKey, payload_type: str, payload: bytes) -> Signed:
        """Sign ``payload`` for one purpose."""
        signature = key.sign(payload_type, payload)
        return cls(payload=payload, payload_type=payload_type, signature=signature, key_id=key.key_id)

    def is_from(self, public: bytes, payload_type: str) -> bool:
        """Say whether ``public`` [32 bytes] signed these bytes for this purpose; never raises."""
        return self.payload_type == payload_type and verify(
            public, payload_type, self.payload, self.signature
        )

    def open(self, public: bytes, payload_type: str) -> bytes:
        """Give the payload, if ``public`` [32 bytes] signed it for this purpose.

        For what the coordinator signed. Of a worker's update ask :meth:`is_from` and raise ForgedUpdate.

        Raises:
            IdentityMismatch: It names another key than ``public``.
            CorruptState: It names this key, and the signature does not fit the bytes or the purpose.
        """
        if self.key_id != (expected := key_id(public)):
            raise IdentityMismatch(
                f"signed by key {self.key_id[:16]!r}, and the coordinator's key is {expected}",
                hint="fetch it again from the coordinator that made it",
            )
        if not self.is_from(public, payload_type):
            raise CorruptState(
                "the signature does not fit the bytes", hint="fetch it again from the coordinator"
            )
        return self.payload

    def to_envelope(self) -> bytes:
        """Write a DSSE JSON envelope: the form of a file, which other tools can verify."""
        signature = {"keyid": self.key_id, "sig": _base64(self.signature)}
        body: Json = {
            "payload": _base64(self.payload),
            "payloadType": self.payload_type,
            "signatures": [signature],
        }
        return canonical_json(body)

    @classmethod
    def from_envelope(cls, data: bytes, max_bytes: int = 2 * MANIFEST_BYTES_MAX) -> Signed:
        """Read a DSSE JSON envelope with one signature; blanks and the order of keys do not matter.

        Raises:
            InputError: It is not such an envelope. The signature is not checked here.
        """
        match parse_json(data, max_bytes):
            case {
                "payload": str(payload),
                "payloadType": str(payload_type),
                "signatures": [{"keyid": str(signer), "sig": str(signature), **inner}],
                **outer,
            } if not inner and not outer:
                return cls(
                    payload=_unbase64(payload),
                    payload_type=payload_type,
                    signature=_unbase64(signature),
                    key_id=signer,
                )
        raise InputError("not a signed envelope: it has payload, payloadType and one signature")


class GateOutcome(enum.StrEnum):
    """What the gate said of a candidate."""

    PASSED = "passed"
    """No worse than the tolerance allows: published."""
    FAILED = "failed"
    """Worse: rolled back."""
    SKIPPED = "skipped"
    """Not judged, for the reason given: published."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A version that this one was made from."""

    version: int
    """Its number."""
    manifest_digest: Digest
    """BLAKE3 of its manifest's bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contributor:
    """One accepted update."""

    worker_id: WorkerId
    """Who sent it."""
    task_id: TaskId
    """For which task."""
    update_digest: Digest
    """BLAKE3 of the update's stored bytes."""
    weight: float
    """What the merge rule was given."""
    steps: int
    """Inner steps taken."""
    tokens: int
    """Tokens trained on."""
    norm: float
    """Frobenius norm of the update before clipping; of ΔW where the module is LoRA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeStep:
    """How updates became one delta."""

    rule: str
    """Its name in the registry."""
    parameters: Table
    """All of them, defaults included, so that the version can be recomputed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterStep:
    """How the delta became the next version."""

    name: str
    """The outer optimiser's name."""
    parameters: Table
    """All of them, defaults included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What the gate measured on held-out examples."""

    metric: str
    """What is measured, lower is better: ``bits_per_byte``, ``loss``."""
    baseline: float
    """Of the current version."""
    candidate: float
    """Of the candidate."""
    difference: float
    """Candidate − baseline, the mean over the same examples."""
    interval: tuple[float, float]
    """Confidence interval of the difference, low and high."""
    tolerance: float
    """How much worse a candidate may be."""
    num_examples: int
    """How many held-out examples."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """The gate's decision."""

    outcome: GateOutcome
    """What it said."""
    reason: str
    """Why, one line for people."""
    measurement: Measurement | None = None
    """None when nothing (finite) was measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionManifest:
    """What a version of a module is and how it came to be."""

    format: int = FORMAT
    """Of this manifest."""
    run: RunId
    """The run's name."""
    module: ModuleKey
    """Level and expert."""
    version: int
    """0 is the start."""
    parents: tuple[Parent, ...]
    """Empty for version 0."""
    base_digest: Digest
    """Of the base's files."""
    schema_digest: Digest
    """:func:`schema_digest` of the tensors."""
    content_digest: Digest
    """BLAKE3 of the stored tensor file."""
    content_bytes: int
    """Its size."""
    content_sha256: Sha256
    """SHA-256 of the same bytes."""
    kind: Kind
    """LoRA factors or full parameters."""
    settings: Table
    """LoRA's rank, alpha, rslora, target_modules; empty when kind is full."""
    contributors: tuple[Contributor, ...]
    """In the order in which they were merged; empty for version 0."""
    merge: MergeStep | None
    """None for version 0."""
    outer: OuterStep | None
    """None for version 0."""
    gate: Gate
    """The decision that let it be published, or not."""
    code_version: str
    """Of Weft."""
    round_number: int
    """The round that made it; 0 for version 0."""
    created: Instant
    """When it was made."""

    def to_bytes(self) -> bytes:
        """Write canonical JSON, whole numbers in float fields as floats.

        Raises:
            ValueError: :meth:`from_bytes` would refuse it: a number is not finite, a count is negative, a
                digest or a time is not well formed, it is too large.
        """
        try:
            checked = _read(
                VersionManifest, parse_json(canonical_json(_plain(self)), MANIFEST_BYTES_MAX), "manifest"
            )
        except InputError as error:
            raise ValueError(error.message) from error
        return canonical_json(_plain(checked))

    @property
    def digest(self) -> Digest:
        """BLAKE3 of the manifest's bytes: how children name it."""
        return _blake3(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> VersionManifest:
        """Read exactly what :meth:`to_bytes` writes.

        Raises:
            InputError: A key is missing, unknown or of the wrong type, the format is another, or the bytes
                are not canonical.
        """
        value = parse_json(data, MANIFEST_BYTES_MAX)
        # The format first: keys that a later format added are its news, not a mistake.
        if isinstance(value, dict) and value.get("format") != FORMAT:
            raise InputError(f"the manifest's format is not {FORMAT}", hint="upgrade Weft")
        manifest = _read(cls, value, "manifest")
        if canonical_json(_plain(manifest)) != data:
            raise InputError("the manifest is not canonical JSON")
        return manifest


def instant(moment: datetime) -> Instant:
    """Write a time (with a time zone) in UTC, to the second."""
    if moment.tzinfo is None:
        raise ValueError("a time without a time zone is not an instant")
    return Instant(moment.astimezone(UTC).strftime(_INSTANT_FORM))


def sign_version(manifest: VersionManifest, key: SigningKey) -> Signed:
    """Sign a manifest with the coordinator's key; raises ValueError where ``to_bytes`` does."""
    return Signed.sign(key, VERSION_TYPE, manifest.to_bytes())


def open_version(signed: Signed, public: bytes) -> VersionManifest:
    """Verify, then read: nothing of a manifest is looked at before ``public`` [32 bytes] is known to sign it.

    Raises:
        IdentityMismatch: Another key signed it.
        CorruptState: The bytes are not what was signed.
        InputError: They were signed and are no manifest that this Weft reads.
    """
    return VersionManifest.from_bytes(signed.open(public, VERSION_TYPE))


def _plain(value: Any) -> Any:
    """What JSON is made of, from a record: every field written out, None included."""
    if isinstance(value, ModuleKey):
        return str(value)
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


def _read(hint: type[_T], value: Any, where: str) -> _T:
    """Read parsed JSON as a record; raises InputError that names the key."""
    return typing.cast("_T", _read_any(hint, value, where))


def _read_any(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _read_any(arguments[0], value, where)
    if origin is tuple:
        return _read_tuple(arguments, value, where)
    if hint not in _SCALARS and dataclasses.is_dataclass(hint):
        return _read_record(hint, value, where)
    try:
        return _SCALARS[hint](value)
    except (ValueError, UsageError) as error:
        raise InputError(f"{where}: {error}") from error


def _read_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where} is not a list")
    hints = arguments[:1] * len(value) if arguments[-1] is ... else arguments
    if len(hints) != len(value):
        raise InputError(f"{where} has {len(value)} items where {len(hints)} are expected")
    return tuple(
        _read_any(hint, item, f"{where}[{i}]")
        for i, (hint, item) in enumerate(zip(hints, value, strict=True))
    )


def _read_record(cls: Any, value: Any, where: str) -> Any:
    hints = _hints(cls)
    if not isinstance(value, dict):
        raise InputError(f"{where} is not an object")
    if wrong := sorted(hints.keys() ^ value.keys()):
        what = "is unknown" if wrong[0] in value else "is missing"
        raise InputError(f"{where}.{wrong[0]} {what}")
    return cls(**{name: _read_any(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("not a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("not a whole number from 0")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("not a number")
    return float(value)


def _table(value: Any) -> Table:
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value


def _sha256(value: Any) -> Sha256:
    if not _SHA256.fullmatch(_text(value)):
        raise ValueError("not a SHA-256 digest")
    return Sha256(value)


def _instant(value: Any) -> Instant:
    moment = datetime.strptime(_text(value), _INSTANT_FORM).replace(tzinfo=UTC)
    return instant(moment)


_SCALARS: Final[Mapping[Any, Callable[[Any], Any]]] = {
    str: _text,
    int: _count,
    float: _number,
    Table: _table,
    Sha256: _sha256,
    Instant: _instant,
    Digest: lambda value: digest(_text(value)),
    RunId: lambda value: run_id(_text(value)),
    WorkerId: _text,
    TaskId: _text,
    ModuleKey: lambda value: ModuleKey.parse(_text(value)),
    Kind: Kind,
    GateOutcome: GateOutcome,
}
"""How each kind of value in a manifest is read; raises ValueError or UsageError."""


def _check_depth(text: str) -> None:
    depth = 0
    for token in _NESTING.finditer(text):
        depth += _STEPS.get(token[0], 0)
        if depth > DEPTH_MAX:
            raise ValueError(f"nested deeper than {DEPTH_MAX}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _integer(text: str) -> int:
    # The length first: the time to read digits grows with their square.
    value = int(text) if len(text) <= len(str(-INTEGER_MAX)) else None
    if value is None or abs(value) > INTEGER_MAX:
        raise ValueError("a whole number has more than 64 bits")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def _blake3(data: bytes) -> Digest:
    return Digest(blake3.blake3(data).hexdigest())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _unbase64(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise InputError("not base64") from error
    # Spare bits of the last character may be set in other encodings of the same bytes.
    if _base64(data) != text:
        raise InputError("not canonical base64")
    return data
