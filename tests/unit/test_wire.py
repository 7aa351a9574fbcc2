import dataclasses
import enum
import types
import typing
from typing import Any, cast

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.common import errors, protocol, wire
from weft.common.errors import UsageError, WeftError
from weft.common.ids import Digest
from weft.v1 import blob_pb2, identity_pb2, status_pb2, task_pb2

NAMES = {domain: name for name, domain in wire.ANSWERS.items()}
MODULES = (blob_pb2, identity_pb2, status_pb2, task_pb2)
DOMAIN = [item for item in vars(protocol).values() if dataclasses.is_dataclass(item)]
TEXT = st.text(st.characters(blacklist_categories=("Cc", "Cs", "Cf", "Zl", "Zp")), max_size=8)
TIMES = st.integers(0, 4 * 10**12).map(lambda milliseconds: milliseconds / 1000)


def values(hint: Any, field: Any) -> st.SearchStrategy[Any]:
    """Values of a field of a domain class, within what its message can hold."""
    if isinstance(hint, types.UnionType):
        inner = next(item for item in typing.get_args(hint) if item is not type(None))
        return st.none() | values(inner, field)
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0], field), max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return objects(hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return st.sampled_from(hint)
    if hint is Digest:
        return st.binary(min_size=32, max_size=32).map(bytes.hex)
    if hint is float:
        is_time = field.message_type is not None
        return TIMES if is_time else st.floats(allow_nan=False, allow_infinity=False)
    if hint is int:
        return st.integers(0, 2**32 - 1)
    plain = {bool: st.booleans(), bytes: st.binary(max_size=8)}
    return plain.get(hint, TEXT)


def objects(domain: Any) -> st.SearchStrategy[Any]:
    message = message_type(domain).DESCRIPTOR
    hints = typing.get_type_hints(domain)
    return st.builds(
        domain, **{name: values(hint, message.fields_by_name[name]) for name, hint in hints.items()}
    )


def message_type(domain: Any) -> Any:
    name = NAMES.get(domain, domain.__name__)
    module_pb2 = __import__("weft.v1.module_pb2", fromlist=["module_pb2"])
    return next(getattr(module, name) for module in (*MODULES, module_pb2) if hasattr(module, name))


@pytest.mark.parametrize("domain", DOMAIN, ids=lambda domain: domain.__name__)
@given(data=st.data())
@settings(max_examples=15)
def test_every_domain_class_survives_the_wire(domain: Any, data: st.DataObject) -> None:
    value = data.draw(objects(domain))
    kind = message_type(domain)
    sent = wire.to_message(value, kind).SerializeToString()
    assert domain(**wire.fields(kind.FromString(sent))) == value


@given(
    time_s=st.floats(2**23, wire.TIME_MAX_S, exclude_max=True, allow_nan=False),
    index=st.integers(0, 2**32 - 1),
)
def test_times_keep_every_bit_since_1970(time_s: float, index: int) -> None:
    point = protocol.Receipt(receipt_blake3=Digest("ab" * 32), accepted_at=time_s)
    message = wire.to_message(point, task_pb2.SubmitUpdateResponse)
    assert wire.answer(message) == point


def test_response_carries_header_and_stands_for_its_class() -> None:
    answer = protocol.PollAnswer(task=None, wait_reason="nothing yet", finished=False)
    message = wire.to_response(answer, task_pb2.PollTaskResponse, time_s=12.5)
    assert wire.answer(message) == answer
    assert wire.server_time(message) == 12.5
    assert message.header.server_version


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (b"n" * 32, identity_pb2.StartSessionResponse),
        (None, task_pb2.ReleaseTaskResponse),
        ("WEFT1", identity_pb2.CreateTokenResponse),
        ((), status_pb2.ListRoundsResponse),
        (
            protocol.BlobManifest(blake3=Digest("ab" * 32), size_bytes=1, chunk_blake3=()),
            blob_pb2.GetBlobResponse,
        ),
    ],
    ids=["bytes", "empty", "text", "tuple", "class"],
)
def test_response_of_one_field_stands_for_it(value: object, kind: Any) -> None:
    assert wire.answer(wire.to_response(value, kind, time_s=0.0)) == value


def test_response_without_fields_takes_nothing() -> None:
    with pytest.raises(ValueError, match="longer"):
        wire.to_response(("a", "b"), task_pb2.ReleaseTaskResponse, time_s=0.0)


def test_mapping_may_stand_for_any_response() -> None:
    message = wire.to_response({"token": "WEFT1"}, identity_pb2.CreateTokenResponse, time_s=0.0)
    assert wire.answer(message) == "WEFT1"


SIGNED = identity_pb2.Signed(payload=b"{}", payload_type="t", signature=b"s", key_id="k")
MALFORMED = {
    "message-absent": (
        task_pb2.SubmitUpdateRequest(lease_token="t"),
        "SubmitUpdateRequest.statement is missing",
    ),
    "enum-unspecified": (task_pb2.ReportProgressRequest(), "ReportProgressRequest.stage is missing"),
    "enum-unknown": (task_pb2.ReportProgressRequest(stage=99), "stage has the value 99"),  # type: ignore[arg-type]
    "digest-absent": (blob_pb2.GetBlobRequest(), "GetBlobRequest.blake3 has 0 bytes"),
    "digest-long": (blob_pb2.GetBlobRequest(blake3=b"x" * 33), "blake3 has 33 bytes"),
    "not-a-number": (task_pb2.PollTaskRequest(wait_s=float("nan")), "PollTaskRequest.wait_s is not finite"),
    "infinite": (identity_pb2.CreateTokenRequest(role=1, ttl_s=float("inf")), "ttl_s is not finite"),  # type: ignore[arg-type]
    "nested": (
        blob_pb2.FindMissingRequest(blob=blob_pb2.BlobManifest(blake3=b"x" * 32, chunk_blake3=[b"y"])),
        "BlobManifest.chunk_blake3 has 1 bytes",
    ),
    "time-absent": (identity_pb2.TokenStatus(role=1), "TokenStatus.expires_at is missing"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("message", "cause"), MALFORMED.values(), ids=MALFORMED)
def test_malformed_messages_are_refused_by_field(message: Any, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        wire.fields(message)


def test_times_outside_the_calendar_are_refused() -> None:
    message = identity_pb2.TokenStatus(role=identity_pb2.ROLE_WORKER)
    for seconds, nanos in ((-1, 0), (wire.TIME_MAX_S + 1, 0), (0, -1), (0, 10**9)):
        message.expires_at.seconds, message.expires_at.nanos = seconds, nanos
        with pytest.raises(UsageError, match="expires_at"):
            wire.fields(message)


def test_words_of_others_cannot_steer_a_terminal() -> None:
    message = task_pb2.ReleaseTaskRequest(reason="\x1b[2Jgone\u202e\n\x9b")
    assert wire.fields(message)["reason"] == " [2Jgone   "


def test_unknown_fields_are_ignored() -> None:
    newer = identity_pb2.StartSessionRequest(worker_id="w").SerializeToString() + b"\xf8\x06\x01"
    assert wire.fields(identity_pb2.StartSessionRequest.FromString(newer)) == {"worker_id": "w"}


@pytest.mark.parametrize(
    "given",
    [
        {"lease_token": "t"},
        {"lease_token": "t", "reason": "r", "more": 1},
        {"lease_token": "t", "reason": None},
        {"lease_token": 3, "reason": "r"},
        "text",
    ],
    ids=["missing", "unknown", "none", "type", "neither"],
)
def test_our_own_mistakes_are_type_errors(given: object) -> None:
    with pytest.raises(TypeError):
        wire.to_message(given, task_pb2.ReleaseTaskRequest)


def test_our_own_mistakes_in_values_are_value_errors() -> None:
    with pytest.raises(ValueError, match="finite"):
        wire.to_message({"step": 1, "loss": float("nan")}, task_pb2.LossPoint)
    with pytest.raises(TypeError, match="takes a tuple"):
        wire.to_message(
            {"request_id": "r", "role": protocol.Role.ADMIN, "ttl_s": 0, "num_uses": 1, "runs": "abc"}
            | {"needs_approval": False, "label": ""},
            identity_pb2.CreateTokenRequest,
        )
    with pytest.raises(TypeError, match="is not a Role"):
        wire.to_message(
            {"request_id": "r", "role": "admin", "ttl_s": 0, "num_uses": 1, "runs": ()}
            | {"needs_approval": False, "label": ""},
            identity_pb2.CreateTokenRequest,
        )


# --- errors ---


class FailedCall(grpc.RpcError, grpc.Call):
    """What gRPC raises, as far as it is looked at."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: wire.Metadata = ()) -> None:
        super().__init__()
        self._answer = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> Any:
        return self._answer[2]


def failed_call(code: grpc.StatusCode, details: str, metadata: wire.Metadata = ()) -> grpc.RpcError:
    FailedCall.__abstractmethods__ = frozenset()
    made: grpc.RpcError = cast("Any", FailedCall)(code, details, metadata)
    return made


CODES = {
    "UsageError": "INVALID_ARGUMENT",
    "CodecError": "INVALID_ARGUMENT",
    "UpdateRejected": "INVALID_ARGUMENT",
    "SessionExpired": "UNAUTHENTICATED",
    "TokenRefused": "UNAUTHENTICATED",
    "TooManyAttempts": "RESOURCE_EXHAUSTED",
    "PermissionRefused": "PERMISSION_DENIED",
    "ApprovalPending": "PERMISSION_DENIED",
    "ForgedUpdate": "PERMISSION_DENIED",
    "NotFound": "NOT_FOUND",
    "LeaseLost": "FAILED_PRECONDITION",
    "RoundClosed": "FAILED_PRECONDITION",
    "ConflictingUpdate": "ALREADY_EXISTS",
    "CorruptState": "DATA_LOSS",
    "DiskFull": "RESOURCE_EXHAUSTED",
    "Unreachable": "UNAVAILABLE",
    "StorageError": "UNAVAILABLE",
    "EngineFailed": "INTERNAL",
    "WeftError": "INTERNAL",
}


@pytest.mark.parametrize("name", errors.BY_NAME)
def test_every_error_survives_the_wire(name: str) -> None:
    error = errors.BY_NAME[name]("cause — with a dash", hint="weft … ‘next’")
    code, message, metadata = wire.abort_details(error)
    back = wire.error_from_rpc(failed_call(code, message, metadata))
    assert type(back) is type(error)
    assert (back.message, back.hint) == (error.message, error.hint)
    assert code is not grpc.StatusCode.OK


@pytest.mark.parametrize(("name", "code"), CODES.items())
def test_status_codes(name: str, code: str) -> None:
    assert wire.status_of(errors.BY_NAME[name]("")).name == code


def test_class_of_somebody_else_travels_as_its_nearest_known_base() -> None:
    class Private(errors.LeaseLost):
        pass

    code, _, metadata = wire.abort_details(Private("lost"))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert metadata == (("weft-error", "LeaseLost"),)


def test_long_words_are_cut() -> None:
    _, message, metadata = wire.abort_details(WeftError("m" * 10_000, hint="h" * 10_000))
    assert len(message) == wire.TEXT_MAX
    assert len(dict(metadata)["weft-hint-bin"]) == wire.TEXT_MAX


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        ("UNAVAILABLE", "Connection refused", errors.Unreachable),
        ("DEADLINE_EXCEEDED", "", errors.Unreachable),
        ("CANCELLED", "", errors.Unreachable),
        ("UNAVAILABLE", "handshake failed: CERTIFICATE_VERIFY_FAILED", errors.IdentityMismatch),
        ("UNAVAILABLE", "x is not in peer certificate", errors.IdentityMismatch),
        ("UNAVAILABLE", "Hostname Verification Check failed.", errors.IdentityMismatch),
        ("UNIMPLEMENTED", "", WeftError),
        ("INTERNAL", "", WeftError),
    ],
)
def test_failures_without_our_word(code: str, details: str, kind: type[WeftError]) -> None:
    error = wire.error_from_rpc(failed_call(grpc.StatusCode[code], details))
    assert type(error) is kind
    assert error.hint


def test_names_and_words_of_a_hostile_answer_are_harmless() -> None:
    metadata: wire.Metadata = (("weft-error", "KeyboardInterrupt"), ("weft-hint-bin", b"\xff\x1b[2J"))
    error = wire.error_from_rpc(failed_call(grpc.StatusCode.NOT_FOUND, "gone\x1b[2J", metadata))
    assert type(error) is WeftError
    known = wire.error_from_rpc(
        failed_call(grpc.StatusCode.NOT_FOUND, "\x1b", (("weft-error", "NotFound"), *metadata[1:]))
    )
    assert "\x1b" not in error.message + known.message + known.hint


def test_errors_that_are_no_calls() -> None:
    assert type(wire.error_from_rpc(grpc.RpcError("odd"))) is WeftError


# --- addresses ---


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("host.example:7443", ("host.example", 7443)),
        ("127.0.0.1:1", ("127.0.0.1", 1)),
        ("[::1]:80", ("::1", 80)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert wire.parse_address(text) == address


@pytest.mark.parametrize("text", ["", "host", "host:", ":80", "host:port", "::1:80", "host:-1", "host:１"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        wire.parse_address(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True)]
    + [(host, False) for host in ("192.0.2.1", "::", "10.0.0.1", "example.org", "localhost.example.org", "")],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert wire.is_loopback(host) is loopback
