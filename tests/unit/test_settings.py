"""Tables become frozen dataclasses, or a message that names the key."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.common.errors import RunFileError, UsageError
from weft.common.ids import RunId
from weft.common.settings import INTEGER_MAX, field_docs, from_table, to_table


class Colour(enum.StrEnum):
    RED = "red"
    GREEN = "green"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    """Inside."""

    size: int = 1
    """How
    large."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise UsageError(f"size is {self.size}", hint="use 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """Outside."""

    name: str
    """What it is called."""
    rate: float = 0.5
    on: bool = False
    """Whether."""
    colour: Colour = Colour.RED
    inner: Inner = Inner()
    maybe: Inner | None = None
    sizes: tuple[int, ...] = (1, 2)
    by_name: Mapping[str, tuple[Inner, ...]] = field(default_factory=dict)
    run: RunId | None = None


WHOLE = Outer(
    name="x",
    rate=2.0,
    on=True,
    colour=Colour.GREEN,
    inner=Inner(size=3),
    maybe=Inner(),
    sizes=(),
    by_name={"a": (Inner(size=5),)},
    run=RunId("r"),
)


@pytest.mark.parametrize("value", [Outer(name="x"), WHOLE])
def test_what_is_written_is_read_back(value: Outer) -> None:
    assert from_table(Outer, to_table(value)) == value


def test_a_whole_number_is_a_number_and_nothing_else_is() -> None:
    assert from_table(Outer, {"name": "x", "rate": 3}).rate == 3.0
    assert type(from_table(Outer, {"name": "x", "rate": 3}).rate) is float


@pytest.mark.parametrize(
    ("table", "message", "hint"),
    [
        ({}, "name is missing", "add name = … to [the top]"),
        ({"name": "x", "clour": "red"}, "unknown key clour", "did you mean colour?"),
        ({"name": "x", "zzz": 1}, "unknown key zzz", "known here: "),
        ({"name": "x", "inner": {"sise": 1}}, "unknown key inner.sise", "did you mean inner.size?"),
        ({"name": 1}, "name must be a text, not 1", ""),
        ({"name": "x", "on": 1}, "on must be true or false, not 1", ""),
        ({"name": "x", "rate": True}, "rate must be a number, not True", ""),
        ({"name": "x", "rate": "fast"}, "rate must be a number, not 'fast'", ""),
        ({"name": "x", "inner": {"size": 1.0}}, "inner.size must be a whole number, not 1.0", ""),
        ({"name": "x", "inner": {"size": True}}, "inner.size must be a whole number, not True", ""),
        ({"name": "x", "inner": 5}, "inner must be a table, not 5", ""),
        ({"name": "x", "maybe": []}, "maybe must be a table, not []", ""),
        ({"name": "x", "sizes": "12"}, "sizes must be a list, not '12'", ""),
        ({"name": "x", "sizes": [1, "2"]}, "sizes[1] must be a whole number, not '2'", ""),
        ({"name": "x", "by_name": [1]}, "by_name must be a table, not [1]", ""),
        (
            {"name": "x", "by_name": {"a": [{"size": "s"}]}},
            "by_name.a[0].size must be a whole number, not 's'",
            "",
        ),
        ({"name": "x", "colour": "gren"}, "colour is 'gren'", "did you mean 'green'?"),
        ({"name": "x", "colour": "qqq"}, "colour is 'qqq'", "choose from red, green"),
        ({"name": "x", "colour": ["red"]}, "colour is ['red']", ""),
        ({"name": "x", "inner": {"size": -1}}, "size is -1", "use 0 or more"),
        (
            {"name": "x", "inner": {"size": INTEGER_MAX + 1}},
            "inner.size is too large a number",
            "use at most",
        ),
        ({"name": "x", "rate": 10**400}, "rate is too large a number", "use at most"),
        ({"name": 10**400}, "name is too large a number", "use at most"),
        (5, "the whole must be a table, not 5", ""),
        ([["name", "x"]], "the whole must be a table, not [['name', 'x']]", ""),
        (None, "the whole must be a table, not None", ""),
    ],
)
def test_what_does_not_belong_is_refused_by_name(table: Any, message: str, hint: str) -> None:
    with pytest.raises(RunFileError) as refused:
        from_table(Outer, table)
    assert refused.value.message == message
    assert refused.value.hint.startswith(hint) or hint in refused.value.hint


def test_a_message_stays_one_short_line() -> None:
    with pytest.raises(RunFileError) as refused:
        from_table(Outer, {"name": ["\n" * 100_000]})
    assert len(refused.value.message) < 150
    assert "\n" not in refused.value.message


def test_a_field_that_settings_cannot_hold_is_our_own_mistake() -> None:
    @dataclass(frozen=True)
    class Wrong:
        value: bytes = b""

    Wrong.__annotations__["value"] = bytes
    with pytest.raises(TypeError, match="settings cannot hold"):
        from_table(Wrong, {"value": b"x"})


def test_field_docs_are_those_written_under_the_fields() -> None:
    assert field_docs(Outer) == {"name": "What it is called.", "on": "Whether."}
    assert field_docs(Inner) == {"size": "How large."}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from([*Outer.__dataclass_fields__, "other"]), JSON, max_size=5) | JSON)
def test_whatever_the_table_says_only_a_run_file_error_comes_out(table: Any) -> None:
    with contextlib.suppress(RunFileError):
        assert isinstance(from_table(Outer, table), Outer)
