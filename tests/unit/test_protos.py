"""The rules that make the protos readable and extensible, read from the sources and the committed descriptors."""

import dataclasses
import re
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor, FileDescriptor

from weft.common import protocol, wire
from weft.server.service import ROLES
from weft.v1 import blob_pb2, coordinator_service_pb2, identity_pb2, module_pb2, status_pb2, task_pb2

FILES: list[FileDescriptor] = [
    module.DESCRIPTOR
    for module in (blob_pb2, coordinator_service_pb2, identity_pb2, module_pb2, status_pb2, task_pb2)
]
SOURCES = Path(__file__).parents[2] / "protos"
MESSAGES: list[Descriptor] = [message for file in FILES for message in file.message_types_by_name.values()]
ENUMS = [item for file in FILES for item in file.enum_types_by_name.values()]
SERVICE = coordinator_service_pb2.DESCRIPTOR.services_by_name["CoordinatorService"]

DECLARATION = re.compile(r"^\s*(?:message|enum|service|rpc|(?:optional |repeated )?[\w.]+ \w+ =|[A-Z_]+ =)")
CODES = {
    "UNAUTHENTICATED",
    "PERMISSION_DENIED",
    "NOT_FOUND",
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
    "ALREADY_EXISTS",
    "DATA_LOSS",
    "RESOURCE_EXHAUSTED",
    "UNAVAILABLE",
    "INTERNAL",
}


def lines_of(file: FileDescriptor) -> list[str]:
    return (SOURCES / file.name).read_text().splitlines()


def rpc_comments() -> dict[str, str]:
    comments: dict[str, str] = {}
    held: list[str] = []
    for line in lines_of(coordinator_service_pb2.DESCRIPTOR):
        if line.strip().startswith("//"):
            held.append(line.strip("/ "))
        else:
            if found := re.match(r"\s*rpc (\w+)", line):
                comments[found[1]] = " ".join(held)
            held = []
    return comments


def test_every_source_is_looked_at() -> None:
    assert {file.name for file in FILES} == {
        str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.proto")
    }


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_directory_is_package_and_names_are_snake_case(file: FileDescriptor) -> None:
    assert file.package == "weft.v1"
    assert re.fullmatch(r"weft/v1/[a-z]+(_[a-z]+)*\.proto", file.name)


def test_service_is_alone_in_its_file() -> None:
    for file in FILES:
        is_service = file.name.endswith("_service.proto")
        assert bool(file.services_by_name) == is_service
        assert not (is_service and (file.message_types_by_name or file.enum_types_by_name))


def test_every_rpc_has_a_request_and_a_response_of_its_own() -> None:
    for method in SERVICE.methods:
        assert method.input_type.name == f"{method.name}Request"
        assert method.output_type.name == f"{method.name}Response"
    endings = ("Request", "Response")
    named = {message.name for message in MESSAGES if message.name.endswith(endings)}
    assert named == {f"{method.name}{ending}" for method in SERVICE.methods for ending in endings}


@pytest.mark.parametrize("name", wire.METHODS)
def test_every_response_begins_with_the_header(name: str) -> None:
    response = wire.METHODS[name].response.DESCRIPTOR
    first = response.fields_by_number[1]
    assert first.name == "header"
    assert first.message_type is not None
    assert first.message_type.name == "Header"


@pytest.mark.parametrize("item", ENUMS, ids=lambda item: item.name)
def test_enums_are_prefixed_and_zero_is_never_sent(item: object) -> None:
    descriptor = next(enum for enum in ENUMS if enum is item)
    prefix = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", descriptor.name).upper() + "_"
    assert descriptor.values_by_number[0].name == f"{prefix}UNSPECIFIED"
    assert all(value.name.startswith(prefix) for value in descriptor.values)
    text = "\n".join(line for file in FILES for line in lines_of(file))
    assert re.search(rf"// Never sent[^\n]*\n\s*{prefix}UNSPECIFIED = 0", text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_everything_is_commented(file: FileDescriptor) -> None:
    lines = lines_of(file)
    declared = [number for number, line in enumerate(lines) if DECLARATION.match(line)]
    bare = [lines[number] for number in declared if not lines[number - 1].strip().startswith("//")]
    assert bare == []
    wanted = sum(1 + len(message.fields) for message in file.message_types_by_name.values())
    wanted += sum(1 + len(item.values) for item in file.enum_types_by_name.values())
    wanted += sum(1 + len(service.methods) for service in file.services_by_name.values())
    assert len([line for line in declared if not lines[line].startswith(("syntax", "package"))]) == wanted


def test_every_rpc_says_whether_it_is_idempotent_and_which_codes_it_gives() -> None:
    comments = rpc_comments()
    assert comments.keys() == wire.METHODS.keys()
    for name, comment in comments.items():
        assert re.search(r"Idempotent|A repeat|Streams", comment), name
        assert set(re.findall(r"\b[A-Z]+_[A-Z_]+\b|UNAUTHENTICATED", comment)) <= CODES, name


def test_times_sizes_and_digests_have_their_types() -> None:
    for message in MESSAGES:
        for field in message.fields:
            where = f"{message.name}.{field.name}"
            if field.name.endswith("_at"):
                assert field.message_type is not None, where
                assert field.message_type.full_name == "google.protobuf.Timestamp", where
            if field.name.endswith("blake3"):
                assert field.type == field.TYPE_BYTES, where
            if field.name.endswith("_bytes"):
                assert field.type == field.TYPE_UINT64, where


def test_committed_code_is_of_these_sources() -> None:
    for file in FILES:
        text = "\n".join(lines_of(file))
        for message in file.message_types_by_name.values():
            body = re.search(rf"message {message.name} {{(.*?)}}", text, re.DOTALL)
            assert body is not None, message.name
            found = dict(re.findall(r"(\w+) = (\d+);", body[1]))
            assert found == {field.name: str(field.number) for field in message.fields}, message.name


def test_domain_classes_have_the_fields_of_their_messages() -> None:
    by_class = {name: message for message, name in ((k, v.__name__) for k, v in wire.ANSWERS.items())}
    messages = {message.name: message for message in MESSAGES}
    classes = [item for item in vars(protocol).values() if dataclasses.is_dataclass(item)]
    assert len(classes) >= len(wire.ANSWERS)
    for item in classes:
        assert isinstance(item, type)
        message = messages[by_class.get(item.__name__, item.__name__)]
        fields = {field.name for field in dataclasses.fields(item)}
        assert fields == {field.name for field in message.fields} - {"header"}, item.__name__


def test_role_table_is_complete_and_agrees_with_the_sessionless_ones() -> None:
    assert ROLES.keys() == wire.METHODS.keys()
    assert {name for name, roles in ROLES.items() if roles is None} == wire.SESSIONLESS
