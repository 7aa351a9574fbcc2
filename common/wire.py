"""Between messages and domain types: the one place that knows both.

What arrives is checked here, once: past :func:`fields` and :func:`answer` there are no protobuf types,
digests have 32 bytes, numbers are finite, enums have a value, what must be there is there. The rules are read
from the descriptors and from the annotations of ``common.protocol``: a field added to a message and to its
class needs nothing here.

    message                      domain
    bytes blake3, *_blake3       Digest (hex)
    google.protobuf.Timestamp    float, Unix seconds
    enum                         enum.Enum of common.protocol, by name without prefix
    message X                    dataclass X of common.protocol, or the class that ``ANSWERS`` names
    repeated                     tuple
    absent                       None where the class allows it, refused elsewhere

Errors cross the wire as status code, message, class name and hint; :func:`abort_details` takes one apart and
:func:`error_from_rpc` raises the same class on the other side.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import importlib.metadata
import ipaddress
import math
import re
import typing
from collections.abc import Callable, Mapping, MutableSequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import grpc
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp

from weft.common import errors, protocol
from weft.common.errors import UsageError, WeftError
from weft.v1 import coordinator_service_pb2, identity_pb2

M = TypeVar("M", bound=Message)

ANSWERS: Final[Mapping[str, type]] = {
    "JoinResponse": protocol.Joined,
    "OpenSessionResponse": protocol.Session,
    "PollTaskResponse": protocol.PollAnswer,
    "ReportProgressResponse": protocol.ProgressAnswer,
    "SubmitUpdateResponse": protocol.Receipt,
    "FindMissingResponse": protocol.Missing,
    "ResolveModuleResponse": protocol.ResolvedModule,
}
"""Responses whose class in ``common.protocol`` has a name of its own."""

DIGEST_BYTES: Final = 32
TIME_MAX_S: Final = 253_402_300_799
"""Last second of the year 9999, beyond which a Timestamp is not valid."""

# What could move a terminal's cursor or turn its text around: words of others are printed to terminals.
_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")

_NANOSECONDS: Final = 1_000_000_000


# --- methods ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One RPC of the service."""

    name: str
    """As in the proto: PollTask."""
    snake_name: str
    """As in Python: poll_task."""
    request: type[Message]
    response: type[Message]
    streams: bool
    """Whether it answers with a stream."""


SERVICE_NAME: Final = coordinator_service_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].full_name


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


METHODS: Final[Mapping[str, Method]] = {
    method.name: Method(
        name=method.name,
        snake_name=_snake(method.name),
        request=GetMessageClass(method.input_type),
        response=GetMessageClass(method.output_type),
        streams=method.server_streaming,
    )
    for method in coordinator_service_pb2.DESCRIPTOR.services_by_name["CoordinatorService"].methods
}
"""Every RPC, by its name in the proto."""

SESSIONLESS: Final = frozenset({"Join", "StartSession", "OpenSession"})
"""RPCs that come before a session."""


# --- messages to domain types ---


def fields(message: Message) -> dict[str, Any]:
    """Check a message and take it apart; its header, if it has one, is left out.

    Raises:
        UsageError: A field is missing or malformed. The message names it.
    """
    return {
        name: field.read(message) for name, field in _plan(message.DESCRIPTOR).items() if name != "header"
    }


def answer(message: Message) -> Any:
    """Check a response and give what it stands for.

    That is its class where it has one (see ``ANSWERS``), its one field where it has only one beside the
    header, None where it has none. Raises UsageError when it is malformed.
    """
    found = fields(message)
    domain = _class_of(message.DESCRIPTOR.name)
    if domain is not None:
        return domain(**found)
    if len(found) > 1:
        raise TypeError(f"{message.DESCRIPTOR.name} needs a class in ANSWERS")
    return next(iter(found.values()), None)


def server_time(message: Message) -> float:
    """The coordinator's clock when it sent this response, Unix seconds; raises UsageError without one."""
    if not message.HasField("header"):
        raise UsageError(f"{message.DESCRIPTOR.name} has no header")
    header: identity_pb2.Header = getattr(message, "header")  # noqa: B009 - Message has no such attribute
    time_s: float = fields(header)["server_time"]
    return time_s


# --- domain types to messages ---


def to_message(value: object, message_type: type[M]) -> M:
    """Make a message of a dataclass with the same fields, or of a mapping of field names.

    A header is not asked for. None stands for what is absent.

    Raises:
        TypeError, ValueError: ``value`` does not fit: our own mistake, not the other side's.
    """
    given = _given(value)
    plan = _plan(message_type.DESCRIPTOR)
    lacking = {name for name, field in plan.items() if not field.optional and name != "header"}
    if not lacking <= given.keys() <= plan.keys():
        odd = sorted((lacking - given.keys()) | (given.keys() - plan.keys()))
        raise TypeError(f"{message_type.DESCRIPTOR.name}: {', '.join(odd)} missing or unknown")
    return message_type(**{name: plan[name].write(item) for name, item in given.items()})


def to_response(value: object, message_type: type[M], *, time_s: float) -> M:
    """Make a response of what it stands for, as :func:`answer` gives it, or of a mapping; with its header."""
    names = [name for name in _plan(message_type.DESCRIPTOR) if name != "header"]
    if not isinstance(value, Mapping) and _class_of(message_type.DESCRIPTOR.name) is None:
        value = dict(zip(names, () if value is None else (value,), strict=True))
    message = to_message(value, message_type)
    header = identity_pb2.Header(server_time=_timestamp(time_s), server_version=_version())
    getattr(message, "header").CopyFrom(header)  # noqa: B009 - Message has no such attribute
    return message


def _given(value: object) -> Mapping[str, Any]:
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"{type(value).__name__} is neither a dataclass nor a mapping")


@functools.cache
def _version() -> str:
    return importlib.metadata.version("weft")


# --- one field ---

Convert = Callable[[Any], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Field:
    name: str
    owner: str
    optional: bool
    repeated: bool
    present: Callable[[Message], bool]
    decode: Convert
    encode: Convert

    def read(self, message: Message) -> Any:
        value = getattr(message, self.name)
        try:
            if self.repeated:
                return tuple(self.decode(item) for item in value)
            if self.present(message):
                return self.decode(value)
        except ValueError as error:
            raise UsageError(f"{self.owner}.{self.name} {error}") from None
        if self.optional:
            return None
        raise UsageError(f"{self.owner}.{self.name} is missing")

    def write(self, value: Any) -> Any:
        if value is None:
            if self.optional:
                return None
            raise TypeError(f"{self.owner}.{self.name} must be given")
        if not self.repeated:
            return self.encode(value)
        if not isinstance(value, list | tuple):
            raise TypeError(f"{self.owner}.{self.name} takes a tuple, not {type(value).__name__}")
        return [self.encode(item) for item in value]


@functools.cache
def _plan(descriptor: Descriptor) -> Mapping[str, _Field]:
    """How each field of a message is converted."""
    domain = _class_of(descriptor.name)
    absent_allowed = _fields_with_none(domain) if domain else frozenset()
    empty = GetMessageClass(descriptor)()
    return {
        field.name: _field(
            field,
            owner=descriptor.name,
            # Whatever the version of protobuf: the descriptor's own word for it changed.
            repeated=isinstance(getattr(empty, field.name), MutableSequence),
            absent_allowed=field.name in absent_allowed,
        )
        for field in descriptor.fields
    }


def _field(field: FieldDescriptor, *, owner: str, repeated: bool, absent_allowed: bool) -> _Field:
    decode, encode = _converters(field)
    name = field.name
    present: Callable[[Message], bool] = lambda message: True  # noqa: E731
    if field.has_presence:
        present = lambda message: message.HasField(name)  # noqa: E731
    elif field.type == FieldDescriptor.TYPE_ENUM:
        present = lambda message: getattr(message, name) != 0  # noqa: E731
    # A scalar with presence is one that the proto calls optional.
    optional = absent_allowed or (field.has_presence and field.type != FieldDescriptor.TYPE_MESSAGE)
    return _Field(
        name=name,
        owner=owner,
        optional=optional,
        repeated=repeated,
        present=present,
        decode=decode,
        encode=encode,
    )


def _converters(field: FieldDescriptor) -> tuple[Convert, Convert]:
    if field.message_type is not None:
        return _message_converters(field.message_type)
    if field.enum_type is not None:
        return _enum_converters(field.enum_type)
    if field.type == FieldDescriptor.TYPE_BYTES and (
        field.name == "blake3" or field.name.endswith("_blake3")
    ):
        return _hex, _digest_bytes
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return _finite, _finite
    if field.type == FieldDescriptor.TYPE_STRING:
        return printable, _same
    return _same, _same


def _message_converters(descriptor: Descriptor) -> tuple[Convert, Convert]:
    if descriptor.full_name == Timestamp.DESCRIPTOR.full_name:
        return _unix_seconds, _timestamp
    domain, message_type = _class_of(descriptor.name), GetMessageClass(descriptor)
    make: Callable[..., object] = domain or dict
    return (lambda message: make(**fields(message))), (lambda value: to_message(value, message_type))


def _enum_converters(descriptor: EnumDescriptor) -> tuple[Convert, Convert]:
    domain: type[enum.Enum] = getattr(protocol, descriptor.name)
    prefix = _snake(descriptor.name).upper() + "_"
    by_number = {v.number: domain[v.name.removeprefix(prefix)] for v in descriptor.values if v.number}
    numbers = {member: number for number, member in by_number.items()}

    def decode(number: int) -> enum.Enum:
        if number not in by_number:
            raise ValueError(f"has the value {number}, which this version does not know")
        return by_number[number]

    def encode(member: object) -> int:
        if not isinstance(member, domain):
            raise TypeError(f"{member!r} is not a {domain.__name__}")
        return numbers[member]

    return decode, encode


def _class_of(name: str) -> type | None:
    """The domain class of a message; None for requests, the header and responses of at most one field."""
    found = ANSWERS.get(name) or getattr(protocol, name, None)
    return found if isinstance(found, type) else None


def _fields_with_none(domain: type) -> frozenset[str]:
    hints = typing.get_type_hints(domain)
    return frozenset(name for name, hint in hints.items() if type(None) in typing.get_args(hint))


def _same(value: Any) -> Any:
    return value


def printable(text: str) -> str:
    """Put blanks for what would steer a terminal."""
    return _CONTROL.sub(" ", text)


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("is not finite")
    return value


def _hex(value: bytes) -> str:
    if len(value) != DIGEST_BYTES:
        raise ValueError(f"has {len(value)} bytes and a BLAKE3-256 digest has {DIGEST_BYTES}")
    return value.hex()


def _digest_bytes(value: str) -> bytes:
    digest = bytes.fromhex(value)
    _hex(digest)
    return digest


def _unix_seconds(stamp: Timestamp) -> float:
    if not (0 <= stamp.seconds <= TIME_MAX_S and 0 <= stamp.nanos < _NANOSECONDS):
        raise ValueError("is not a time since 1970")
    # One division of whole numbers is rounded once, so that a time comes back as the same float.
    return (stamp.seconds * _NANOSECONDS + stamp.nanos) / _NANOSECONDS


def _timestamp(time_s: float) -> Timestamp:
    seconds = math.floor(_finite(time_s))
    nanoseconds = round((time_s - seconds) * _NANOSECONDS)
    stamp = Timestamp(
        seconds=seconds + nanoseconds // _NANOSECONDS,
        nanos=nanoseconds % _NANOSECONDS,
    )
    _unix_seconds(stamp)
    return stamp


# --- errors ---

STATUS: Final[Mapping[type[WeftError], grpc.StatusCode]] = {
    WeftError: grpc.StatusCode.INTERNAL,
    errors.UsageError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InputError: grpc.StatusCode.INVALID_ARGUMENT,
    errors.AccessError: grpc.StatusCode.PERMISSION_DENIED,
    errors.TokenRefused: grpc.StatusCode.UNAUTHENTICATED,
    errors.SessionExpired: grpc.StatusCode.UNAUTHENTICATED,
    errors.TooManyAttempts: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.SubmissionRefused: grpc.StatusCode.FAILED_PRECONDITION,
    errors.ConflictingUpdate: grpc.StatusCode.ALREADY_EXISTS,
    errors.ForgedUpdate: grpc.StatusCode.PERMISSION_DENIED,
    errors.UpdateRejected: grpc.StatusCode.INVALID_ARGUMENT,
    # A disk that failed may work again after the operator looked at it; it is no bug of the program.
    errors.StorageError: grpc.StatusCode.UNAVAILABLE,
    errors.DiskFull: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.CorruptState: grpc.StatusCode.DATA_LOSS,
    errors.NotFound: grpc.StatusCode.NOT_FOUND,
    errors.NetworkError: grpc.StatusCode.UNAVAILABLE,
    errors.OutOfMemory: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""Status code of each class; a class without a row has that of its nearest base."""

ERROR_KEY: Final = "weft-error"
HINT_KEY: Final = "weft-hint-bin"
SESSION_KEY: Final = "weft-session"
TEXT_MAX: Final = 400
"""Characters of a message or hint that travel: all metadata together has a limit of 8 KiB."""

_PASSING: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
)
# What gRPC says, in its several versions, when the certificate is not of the authority or has another name.
_WRONG_IDENTITY: Final = (
    "CERTIFICATE_VERIFY_FAILED",
    "Hostname Verification Check failed",
    "is not in peer certificate",
)

Metadata = tuple[tuple[str, str | bytes], ...]


def status_of(error: WeftError) -> grpc.StatusCode:
    """The status code that the error travels under."""
    return next(STATUS[base] for base in type(error).__mro__ if base in STATUS)


def abort_details(error: WeftError) -> tuple[grpc.StatusCode, str, Metadata]:
    """What to abort a call with: status code, message, trailing metadata."""
    metadata: Metadata = ((ERROR_KEY, _catalogued(type(error)).__name__),)
    if error.hint:
        metadata += ((HINT_KEY, error.hint[:TEXT_MAX].encode()),)
    return status_of(error), error.message[:TEXT_MAX], metadata


def error_from_rpc(error: grpc.RpcError) -> WeftError:
    """The error that the other side raised, or what the failure of the call means."""
    if not isinstance(error, grpc.Call):
        return WeftError(f"the call failed: {error}")
    found = dict(error.trailing_metadata() or ())
    message = printable(error.details() or "")[:TEXT_MAX]
    name = found.get(ERROR_KEY)
    if isinstance(name, str) and name in errors.BY_NAME:
        return errors.BY_NAME[name](message, hint=_hint(found.get(HINT_KEY)))
    return _failure(error.code(), message)


def _failure(code: grpc.StatusCode, message: str) -> WeftError:
    """What a call means that failed without a word of our own."""
    if any(sign in message for sign in _WRONG_IDENTITY):
        return errors.IdentityMismatch(
            "the coordinator does not have the key that it had when this machine joined",
            hint="ask the operator for a new `weft join` line",
        )
    if code in _PASSING:
        return errors.Unreachable(
            f"the coordinator does not answer: {message}", hint="check that it runs and that its port is open"
        )
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return WeftError(
            "the coordinator is of another version of Weft", hint="use the same version on both sides"
        )
    return WeftError(f"the coordinator failed: {message}", hint="the coordinator's log has the cause")


def _catalogued(kind: type[WeftError]) -> type[WeftError]:
    """The nearest class that the other side knows by name."""
    return next(base for base in kind.__mro__ if errors.BY_NAME.get(base.__name__) is base)


def _hint(value: str | bytes | None) -> str:
    text = value.decode(errors="replace") if isinstance(value, bytes) else value or ""
    return printable(text)[:TEXT_MAX]


# --- addresses, options of channels and servers ---


def parse_address(text: str) -> tuple[str, int]:
    """Read HOST:PORT, an IPv6 address in brackets; raises UsageError."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != host.startswith("[") or not port.isascii() or not port.isdigit():
        raise UsageError(f"{text!r} is not an address", hint="write HOST:PORT, for example 127.0.0.1:7443")
    return bare, int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


MESSAGE_BYTES_MAX: Final = 4 * 1024 * 1024
KEEPALIVE_MS: Final = 30_000
KEEPALIVE_TIMEOUT_MS: Final = 10_000

Options = tuple[tuple[str, int | str], ...]

_COMMON_OPTIONS: Final[Options] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", KEEPALIVE_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

SERVER_OPTIONS: Final[Options] = (
    *_COMMON_OPTIONS,
    # With it a second server on the same port would succeed and take half of the connections.
    ("grpc.so_reuseport", 0),
    # Without it the server answers the clients' pings with GOAWAY too_many_pings: its own limit is 300 s.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.max_concurrent_streams", 256),
    # So that a renewed certificate and a revocation reach everybody.
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 120_000),
    ("grpc.server_handshake_timeout_ms", 10_000),
)

CHANNEL_OPTIONS: Final[Options] = (
    *_COMMON_OPTIONS,
    # A coordinator restarts in a second; gRPC's own waits grow to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Retries are ours: they count as no progress, and a proxy would see a connection that the join did not.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
