"""Canonical JSON, strict reading, envelopes and version manifests."""

import base64
import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.common.errors import CorruptState, IdentityMismatch, InputError
from weft.common.identity.signing import SigningKey
from weft.common.ids import Digest, ModuleKey, RunId, TaskId, WorkerId
from weft.common.manifest import (
    DEPTH_MAX,
    INTEGER_MAX,
    VERSION_TYPE,
    Contributor,
    Gate,
    GateOutcome,
    Instant,
    Measurement,
    MergeStep,
    OuterStep,
    Parent,
    Sha256,
    Signed,
    VersionManifest,
    canonical_json,
    instant,
    open_version,
    parse_json,
    schema_digest,
    sign_version,
)
from weft.common.modules import Kind, LoraSettings, Schema, TensorSpec
from weft.common.settings import from_table, to_table

KEY = SigningKey.generate()
JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-INTEGER_MAX, INTEGER_MAX)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def digest_of(text: str) -> Digest:
    return Digest(blake3.blake3(text.encode()).hexdigest())


START = VersionManifest(
    run=RunId("demo"),
    module=ModuleKey(0, 0),
    version=0,
    parents=(),
    base_digest=digest_of("base"),
    schema_digest=digest_of("schema"),
    content_digest=digest_of("start"),
    content_bytes=1234,
    content_sha256=Sha256("ab" * 32),
    kind=Kind.LORA,
    settings=to_table(LoraSettings()),
    contributors=(),
    merge=None,
    outer=None,
    gate=Gate(outcome=GateOutcome.SKIPPED, reason="the start of a run"),
    code_version="0.1.0",
    round_number=0,
    created=Instant("2031-05-06T07:08:09Z"),
)
NEXT = dataclasses.replace(
    START,
    version=1,
    parents=(Parent(version=0, manifest_digest=START.digest),),
    content_digest=digest_of("next"),
    contributors=(
        Contributor(
            worker_id=WorkerId("w-1"),
            task_id=TaskId("t-1"),
            update_digest=digest_of("update 1"),
            weight=1024.0,
            steps=20,
            tokens=40960,
            norm=0.731,
        ),
    ),
    merge=MergeStep(rule="ties", parameters={"rule": "ties", "ties": {"density": 0.2, "signs": ["+", "-"]}}),
    outer=OuterStep(name="nesterov", parameters={"learning_rate": 0.7, "momentum": 0.9}),
    gate=Gate(
        outcome=GateOutcome.PASSED,
        reason="published: 2.31 to 2.27",
        measurement=Measurement(
            metric="loss",
            baseline=2.31,
            candidate=2.27,
            difference=-0.04,
            interval=(-0.05, -0.03),
            tolerance=0.0,
            num_examples=128,
        ),
    ),
    round_number=1,
)


# Canonical JSON and strict reading


def test_canonical_json_is_sorted_ascii_without_blanks() -> None:
    assert canonical_json({"b": [1, 2.0, True, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.0,true,null]}'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_canonical_json_refuses_what_is_no_number(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"a": [number]})


@given(JSON_VALUES)
def test_canonical_json_reads_back_and_is_the_only_form(value: Any) -> None:
    data = canonical_json(value)
    again = parse_json(data, len(data))
    assert again == value
    assert canonical_json(again) == data


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b'{"a":1,"a":2}', "a key occurs twice"),
        (b'{"a":{"b":1,"b":1}}', "a key occurs twice"),
        (b"NaN", "not a finite number"),
        (b"[Infinity]", "not a finite number"),
        (b"-Infinity", "not a finite number"),
        (b"1e999", "not a finite number"),
        (b"-1e999", "not a finite number"),
        (b"9223372036854775808", "more than 64 bits"),
        (b"1" * 5000, "more than 64 bits"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'{"\\udfff":1}', "surrogates not allowed"),
        (b'"\xff"', "invalid start byte"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"a":1}'.encode("utf-16"), "utf-8"),
        (b"[" * 33 + b"]" * 33, "nested deeper than 32"),
        (b"[" * 100_000, "nested deeper than 32"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "nested deeper than 32"),
        (b'"' + b"\\" * 9999, "Unterminated"),
        (b'"\\"' * 30_000, "not strict JSON"),
        (b"{'a':1}", "not strict JSON"),
        (b"[1,]", "not strict JSON"),
        (b'"a\nb"', "Invalid control character"),
    ],
)
def test_what_is_not_strict_json_is_refused(data: bytes, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        parse_json(data, 200_000)


def test_the_limits_themselves_are_allowed() -> None:
    assert parse_json(b"[" * DEPTH_MAX + b"]" * DEPTH_MAX, 100)
    assert parse_json(str(-INTEGER_MAX).encode(), 100) == -INTEGER_MAX
    brackets = '"' + "[{" * 100 + '\\"' + "]" * 50 + '"'
    assert parse_json(brackets.encode(), 1000) == json.loads(brackets)


def test_a_long_text_is_refused_unread() -> None:
    assert parse_json(b"[1]", 3) == [1]
    with pytest.raises(InputError, match="4 bytes where at most 3"):
        parse_json(b"[12]", 3)


@given(st.binary(max_size=200))
def test_noise_is_refused_or_read_and_nothing_else(data: bytes) -> None:
    with contextlib.suppress(InputError):
        parse_json(data, 100)
    with contextlib.suppress(InputError):
        Signed.from_envelope(data)


# Signed bytes and their envelope


def test_signed_bytes_open_for_their_key_and_purpose_alone() -> None:
    signed = Signed.sign(KEY, "type/a", b"payload")
    assert signed.open(KEY.public, "type/a") == b"payload"
    assert signed.key_id == KEY.key_id
    with pytest.raises(CorruptState, match="does not fit"):
        signed.open(KEY.public, "type/b")
    other = SigningKey.generate()
    with pytest.raises(IdentityMismatch, match=f"coordinator's key is {other.key_id}"):
        signed.open(other.public, "type/a")
    assert not dataclasses.replace(signed, payload_type="type/b").is_from(KEY.public, "type/b")


def test_a_borrowed_key_id_proves_nothing() -> None:
    forged = dataclasses.replace(Signed.sign(SigningKey.generate(), "type/a", b"payload"), key_id=KEY.key_id)
    assert not forged.is_from(KEY.public, "type/a")
    with pytest.raises(CorruptState, match="does not fit"):
        forged.open(KEY.public, "type/a")


@given(st.binary(max_size=100), st.text(max_size=20))
def test_an_envelope_reads_back(payload: bytes, payload_type: str) -> None:
    signed = Signed.sign(KEY, payload_type, payload)
    assert Signed.from_envelope(signed.to_envelope()) == signed


def test_an_envelope_is_the_one_of_dsse() -> None:
    signed = Signed.sign(KEY, "type/a", b"payload")
    envelope = json.loads(signed.to_envelope())
    assert envelope == {
        "payload": base64.b64encode(b"payload").decode(),
        "payloadType": "type/a",
        "signatures": [{"keyid": KEY.key_id, "sig": base64.b64encode(signed.signature).decode()}],
    }
    assert Signed.from_envelope(json.dumps(envelope, indent=2).encode()) == signed


@pytest.mark.parametrize(
    "change",
    [
        {"payload": 1},
        {"payload": "a"},
        {"payload": "YR=="},
        {"payload": "YQ==\n"},
        {"payload": "é"},
        {"payloadType": None},
        {"signatures": []},
        {"signatures": [{"keyid": "a", "sig": "YQ=="}] * 2},
        {"signatures": [{"keyid": "a"}]},
        {"signatures": [{"keyid": "a", "sig": "YQ==", "cert": ""}]},
        {"signatures": {"keyid": "a", "sig": "YQ=="}},
        {"extra": 1},
    ],
    ids=lambda change: json.dumps(change)[:40],
)
def test_what_is_not_such_an_envelope_is_refused(change: dict[str, Any]) -> None:
    envelope = json.loads(Signed.sign(KEY, "type/a", b"payload").to_envelope())
    with pytest.raises(InputError):
        Signed.from_envelope(json.dumps(envelope | change).encode())


# Version manifests


@pytest.mark.parametrize("manifest", [START, NEXT], ids=["start", "next"])
def test_a_manifest_reads_back_the_same(manifest: VersionManifest) -> None:
    data = manifest.to_bytes()
    again = VersionManifest.from_bytes(data)
    assert again == manifest
    assert again.to_bytes() == data
    assert manifest.digest == blake3.blake3(data).hexdigest()
    assert open_version(sign_version(manifest, KEY), KEY.public) == manifest


def test_settings_read_back_with_the_reader_of_run_files() -> None:
    again = VersionManifest.from_bytes(START.to_bytes())
    assert from_table(LoraSettings, again.settings) == LoraSettings()


def test_lineage_is_by_the_digest_of_the_parents_manifest() -> None:
    changed = dataclasses.replace(START, code_version="0.1.1")
    assert NEXT.parents[0].manifest_digest == START.digest != changed.digest


def test_whole_numbers_where_a_float_belongs_are_written_as_floats() -> None:
    contributor = dataclasses.replace(NEXT.contributors[0], weight=3, norm=0)
    manifest = dataclasses.replace(NEXT, contributors=(contributor,))
    assert b'"weight":3.0' in manifest.to_bytes()
    assert VersionManifest.from_bytes(manifest.to_bytes()) == manifest


def test_every_changed_byte_of_a_signed_manifest_is_noticed() -> None:
    signed = sign_version(START, KEY)
    for position in range(len(signed.payload)):
        changed = bytearray(signed.payload)
        changed[position] ^= 1
        with pytest.raises(CorruptState):
            open_version(dataclasses.replace(signed, payload=bytes(changed)), KEY.public)


def test_every_changed_byte_of_an_envelope_is_noticed() -> None:
    envelope = sign_version(START, KEY).to_envelope()
    for position in range(len(envelope)):
        for bit in (1, 32):
            changed = bytearray(envelope)
            changed[position] ^= bit
            with pytest.raises((InputError, CorruptState, IdentityMismatch)):
                open_version(Signed.from_envelope(bytes(changed)), KEY.public)


def test_an_envelope_cut_anywhere_is_refused() -> None:
    envelope = sign_version(START, KEY).to_envelope()
    for length in range(len(envelope)):
        with pytest.raises(InputError):
            Signed.from_envelope(envelope[:length])


def test_a_signed_payload_of_another_kind_is_no_manifest() -> None:
    as_recipe = Signed.sign(KEY, "application/vnd.weft.recipe+json", START.to_bytes())
    with pytest.raises(CorruptState):
        open_version(as_recipe, KEY.public)
    with pytest.raises(CorruptState):
        open_version(dataclasses.replace(as_recipe, payload_type=VERSION_TYPE), KEY.public)


def edited(change: Mapping[str, Any], *, drop: str = "") -> bytes:
    table = json.loads(NEXT.to_bytes()) | change
    table.pop(drop, None)
    return canonical_json(table)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (edited({"extra": 1}), r"manifest\.extra is unknown"),
        (edited({}, drop="gate"), r"manifest\.gate is missing"),
        (edited({"format": 2}), "format is not 1"),
        (edited({"format": 2, "news": 1}), "format is not 1"),
        (edited({}, drop="format"), "format is not 1"),
        (edited({"format": True}), r"manifest\.format: not a whole number"),
        (edited({"format": 1.0}), r"manifest\.format: not a whole number"),
        (edited({"version": -1}), r"manifest\.version: not a whole number"),
        (edited({"version": True}), r"manifest\.version: not a whole number"),
        (edited({"version": "1"}), r"manifest\.version: not a whole number"),
        (edited({"content_bytes": 1.5}), r"manifest\.content_bytes: not a whole number"),
        (edited({"run": "No Run"}), r"manifest\.run: 'No Run' is not a run name"),
        (edited({"run": 1}), r"manifest\.run: not a text"),
        (edited({"module": "0"}), r"manifest\.module: '0' is not a module"),
        (edited({"module": "00.0"}), "not canonical"),
        (edited({"base_digest": "AB" * 32}), r"manifest\.base_digest: .* is not a BLAKE3"),
        (edited({"content_sha256": "ab" * 31}), r"manifest\.content_sha256: not a SHA-256"),
        (edited({"kind": "lora+"}), r"manifest\.kind: 'lora\+' is not a valid Kind"),
        (edited({"kind": []}), r"manifest\.kind: "),
        (edited({"settings": []}), r"manifest\.settings: not an object"),
        (edited({"parents": {}}), r"manifest\.parents is not a list"),
        (edited({"parents": [1]}), r"manifest\.parents\[0\] is not an object"),
        (edited({"contributors": [{}]}), r"manifest\.contributors\[0\]\.norm is missing"),
        (edited({"merge": {"rule": "mean"}}), r"manifest\.merge\.parameters is missing"),
        (edited({"gate": None}), r"manifest\.gate is not an object"),
        (edited({"created": "2031-05-06"}), r"manifest\.created: "),
        (edited({"created": "2031-05-06T07:08:09+00:00"}), r"manifest\.created: "),
        (edited({"created": "2031-5-6T7:8:9Z"}), "not canonical"),
        (edited({"created": "2031-02-30T07:08:09Z"}), r"manifest\.created: "),
        (b"[]", "manifest is not an object"),
        (b"null", "manifest is not an object"),
        (b"", "not strict JSON"),
        (NEXT.to_bytes() + b"\n", "not canonical"),
        (json.dumps(json.loads(NEXT.to_bytes())).encode(), "not canonical"),
        (NEXT.to_bytes().replace(b'"weight":1024.0', b'"weight":1024'), "not canonical"),
        (NEXT.to_bytes().replace(b"0.731", b"7.31e-1"), "not canonical"),
        (NEXT.to_bytes().replace(b"0.731", b"true"), r"contributors\[0\]\.norm: not a number"),
        (NEXT.to_bytes().replace(b"[-0.05,-0.03]", b"[-0.05]"), r"interval has 1 items where 2"),
    ],
)
def test_a_manifest_that_is_not_exactly_one_is_refused_by_key(data: bytes, cause: str) -> None:
    with pytest.raises(InputError, match=cause):
        VersionManifest.from_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        {"version": -1},
        {"content_bytes": INTEGER_MAX + 1},
        {"created": "today"},
        {"base_digest": "0"},
        {"settings": {"alpha": math.nan}},
        {"settings": {"text": "x" * (4 << 20)}},
        {"format": "1"},
    ],
    ids=["negative", "too-big", "time", "digest", "nan", "too-long", "format"],
)
def test_a_manifest_that_could_not_be_read_is_never_signed(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        sign_version(dataclasses.replace(NEXT, **change), KEY)


def test_instants_are_utc_to_the_second() -> None:
    moment = datetime(2031, 5, 6, 9, 8, 9, 999_999, tzinfo=timezone(timedelta(hours=2)))
    assert instant(moment) == "2031-05-06T07:08:09Z"
    assert instant(datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)) == START.created
    with pytest.raises(ValueError, match="time zone"):
        instant(moment.replace(tzinfo=None))


def test_a_schema_is_named_by_all_it_says() -> None:
    schemas = [
        Schema(()),
        Schema((TensorSpec("a", "F32", (2, 3)),)),
        Schema((TensorSpec("a", "F32", (3, 2)),)),
        Schema((TensorSpec("a", "BF16", (2, 3)),)),
        Schema((TensorSpec("b", "F32", (2, 3)),)),
        Schema((TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F32", ()))),
    ]
    assert len({schema_digest(schema) for schema in schemas}) == len(schemas)
    written = b'{"tensors":[{"dtype":"F32","name":"a","shape":[2,3]}]}'
    assert schema_digest(schemas[1]) == blake3.blake3(written).hexdigest()
