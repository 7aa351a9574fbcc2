"""The documents agree with the program: links, commands, make targets, named tests, and the tables marked (tested)."""

from __future__ import annotations

import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import pytest
from tests.commandline import check_line, check_options

from weft.client.loop import NEXT, REMEDIES, Phase
from weft.common.errors import BY_NAME
from weft.common.protocol import Role, Status
from weft.common.wire import STATUS
from weft.server.metrics import StatusCollector
from weft.server.rounds import TRANSITIONS
from weft.server.service import ROLES

ROOT = Path(__file__).parents[2]
DOCUMENTS: Final = tuple(
    sorted(
        path
        for pattern in ("*.md", "docs/**/*.md", "deploy/*.md", "benchmarks/**/*.md")
        for path in ROOT.glob(pattern)
    )
)
NAMES: Final = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
LINK: Final = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
FENCE: Final = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE: Final = re.compile(r"(?<!`)`([^`]+)`(?!`)")
NO_COMMANDS: Final = frozenset({"python", "toml", "json"})
UNITS: Final = {"": 1.0, "s": 1.0, "KiB": 2.0**10, "MiB": 2.0**20}


@functools.cache
def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(name: str) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", read(name))


def slug(heading: str) -> str:
    """The anchor that a heading gets."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def table(name: str, heading: str) -> list[list[str]]:
    """The cells of the tables below a heading, header rows left out."""
    text = read(name)
    start = re.search(rf"^#+ {re.escape(heading)}$", text, re.MULTILINE)
    assert start is not None, f"{name} has no heading {heading!r}"
    depth = len(start[0]) - len(start[0].lstrip("#"))
    section = re.split(rf"^#{{1,{depth}}} ", text[start.end() :], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    separators = {index for index, line in enumerate(rows) if set(line) <= set("|-: ")}
    kept = [
        line for index, line in enumerate(rows) if index not in separators and index + 1 not in separators
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in kept]


def codes(cell: str) -> list[str]:
    """What a cell names in code."""
    return INLINE.findall(cell)


# ---- every document ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target in LINK.findall(prose(name)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.exists(), f"{name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{name} links to {target}"


def command_lines(name: str) -> Iterator[list[str]]:
    """The words after ``weft`` of every command line in a document's blocks."""
    for language, block in FENCE.findall(read(name)):
        if language in NO_COMMANDS:
            continue
        for line in block.splitlines():
            if not re.match(r"\s*(\$ )?(weft |docker compose .* weft |sudo .*/bin/weft )", line):
                continue
            words = shlex.split(line, comments=True)
            programs = [
                index for index, word in enumerate(words) if word == "weft" or word.endswith("/bin/weft")
            ]
            rest = words[programs[-1] + 1 :]
            yield rest[: rest.index(">")] if ">" in rest else rest


@pytest.mark.parametrize("name", NAMES)
def test_command_lines_would_be_accepted(name: str) -> None:
    for words in command_lines(name):
        check_line(words)


@pytest.mark.parametrize("name", NAMES)
def test_commands_in_the_text_exist(name: str) -> None:
    for code in INLINE.findall(prose(name)):
        words = [word for word in code.split() if word not in {"…", "..."}]
        if len(words) > 1 and words[0] == "weft" and "|" not in code:
            check_options(words[1:])


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), re.MULTILINE))
    lines = [
        *INLINE.findall(prose(name)),
        *(line for _, block in FENCE.findall(read(name)) for line in block.splitlines()),
    ]
    named = [line.partition("#")[0].split() for line in lines if re.match(r"make [a-z]", line)]
    for words in named:
        assert set(words[1:]) <= targets, f"{name}: {' '.join(words)}"


@pytest.mark.parametrize("name", NAMES)
def test_named_tests_and_scripts_exist(name: str) -> None:
    for code in INLINE.findall(prose(name)):
        path, _, function = code.partition("::")
        if re.fullmatch(r"(tests|benchmarks)/[\w/]+\.py", path):
            assert (ROOT / path).is_file(), f"{name} names {path}"
            assert not function or f"def {function}(" in read(path), f"{name} names {code}"


def test_every_decision_is_listed() -> None:
    pages = {path.name for path in (ROOT / "docs/decisions").glob("[0-9]*.md")}
    assert pages == set(LINK.findall(read("docs/decisions/README.md")))
    assert [int(page[:4]) for page in sorted(pages)] == list(range(1, len(pages) + 1))


# ---- docs/protocol.md --------------------------------------------------------------------------------------------


def test_table_of_a_round_is_the_one_in_the_code() -> None:
    rows = [[codes(cell) for cell in row] for row in table("docs/protocol.md", "A round *(tested)*")]
    documented = {(state[0], event[0]): following[0] for state, event, following, _ in rows}
    assert documented == {
        (state.name, event.__name__): following.name for (state, event), following in TRANSITIONS.items()
    }


def test_tables_of_a_worker_are_the_ones_in_the_code() -> None:
    rows = table("docs/protocol.md", "A worker's life *(tested)*")
    phases = {codes(row[0])[0]: codes(row[2]) for row in rows if codes(row[0])[0] in Phase.__members__}
    assert phases.keys() == Phase.__members__.keys()
    assert {phase: following[0] for phase, following in phases.items() if following} == {
        **{phase.name: following.name for phase, following in NEXT.items()},
        "POLLING": "FETCHING",
    }
    remedies = {codes(row[0])[0]: row[1] for row in rows if codes(row[0])[0] in BY_NAME}
    assert remedies == {error.__name__: remedy.value for error, remedy in REMEDIES.items()}


def test_table_of_errors_is_the_one_in_the_code() -> None:
    rows = table("docs/protocol.md", "Errors *(tested)*")
    documented = {codes(error)[0]: codes(status)[0] for error, status in rows}
    assert documented == {error.__name__: status.name for error, status in STATUS.items()}


def test_table_of_roles_is_the_one_in_the_code() -> None:
    rows = table("docs/protocol.md", "Who may call what *(tested)*")
    documented = {
        rpc: None
        if roles == "no session needed"
        else {Role[role.strip().upper()] for role in roles.split(",")}
        for rpcs, roles in rows
        for rpc in codes(rpcs)
    }
    assert documented == ROLES


def test_table_of_limits_is_the_one_in_the_code() -> None:
    rows = table("docs/protocol.md", "Limits *(tested)*")
    assert rows
    for what, value, where in rows:
        module, _, constant = codes(where)[0].rpartition(".")
        found = getattr(importlib.import_module(f"weft.{module}"), constant)
        if isinstance(found, timedelta):
            found = found.total_seconds()
        number, _, unit = value.partition(" ")
        assert float(number) * UNITS[unit] == float(found), what


# ---- docs/operate.md ---------------------------------------------------------------------------------------------


def test_table_of_metrics_is_complete() -> None:
    status = Status(coordinator="", started_at=0.0, taken_at=0.0, runs=(), workers=())
    families = list(StatusCollector(lambda: status).collect())
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in families}
    assert {codes(row[0])[0] for row in table("docs/operate.md", "Metrics")} == names


def test_messages_of_the_troubleshooting_table_are_said_by_the_program() -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8")
        for folder in ("common", "client", "server")
        for path in sorted((ROOT / folder).rglob("*.py"))
    )
    rows = table("docs/operate.md", "Troubleshooting")
    assert len(rows) > 30
    for message, _, _ in rows:
        for part in codes(message)[0].split("…"):
            assert part.strip() in sources, message


def test_files_of_the_state_directory_have_the_names_in_the_code() -> None:
    sources = "\n".join(read(f"server/{name}.py") for name in ("app", "store/ledger"))
    sources += read("common/identity/authority.py") + read("common/blobs.py")
    for row in table("docs/operate.md", "What is where"):
        for code in codes(row[0]):
            stem = Path(code.rstrip("/").removesuffix("-wal").removesuffix("-shm")).name
            assert stem == "ab12…" or f'"{stem}"' in sources or f'"{stem}.' in sources, code
