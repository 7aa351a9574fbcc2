"""Read a table (TOML, JSON) into frozen dataclasses, refusing what does not belong there.

The dataclass is the schema: its annotations are checked, its ``__post_init__`` validates values, its field
docstrings are what ``weft init`` prints. Unknown keys are refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Final, TypeVar, Union, cast

from weft.common.errors import RunFileError, UsageError

T = TypeVar("T")

INTEGER_MAX: Final = 2**63 - 1
"""What messages and the ledger hold."""


def from_table(cls: type[T], table: Mapping[str, Any], *, where: str = "") -> T:
    """Build ``cls`` from ``table``.

    Args:
        cls: A dataclass; fields may be str, int, float, bool, enums, tuples of these, mappings to them, other
            dataclasses, and any of them or None.
        table: What the file says.
        where: Dotted key of the table, for messages.

    Raises:
        RunFileError: An unknown key (with the nearest right one), a missing one, a wrong type or value.
    """
    if not isinstance(table, Mapping):
        raise _wrong(where or "the whole", "a table", table)
    fields = {field.name: field for field in dataclasses.fields(cast("Any", cls))}
    for key in table:
        if key not in fields:
            raise _unknown_key(key, sorted(fields), where)
    hints = _hints(cast("Any", cls))
    values = {key: _convert(hints[key], value, _dotted(where, key)) for key, value in table.items()}
    for name, field in fields.items():
        if (
            name not in values
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            raise RunFileError(
                f"{_dotted(where, name)} is missing", hint=f"add {name} = … to [{where or 'the top'}]"
            )
    try:
        return cls(**values)
    except RunFileError:
        raise
    except UsageError as error:
        raise RunFileError(error.message, hint=error.hint) from error


def to_table(value: Any) -> Any:
    """The inverse of ``from_table``: plain JSON types, every field written out, None left out."""
    if dataclasses.is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: to_table(item) for name, item in pairs if item is not None}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): to_table(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [to_table(item) for item in value]
    return value


def field_docs(cls: type[Any]) -> dict[str, str]:
    """Docstrings written under the fields of a dataclass, by field name, each on one line."""
    import ast

    tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    body = cast("ast.ClassDef", tree.body[0]).body
    docs = {}
    for field, below in itertools.pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
            and isinstance(below.value.value, str)
        ):
            docs[field.target.id] = " ".join(below.value.value.split())
    return docs


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    # Evaluating them costs more than reading a record, and a ledger has many thousands.
    return typing.get_type_hints(cls)


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _unknown_key(key: str, known: list[str], where: str) -> RunFileError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {_dotted(where, near[0])}?" if near else f"known here: {', '.join(known)}"
    return RunFileError(f"unknown key {_dotted(where, key)}", hint=hint)


def _wrong(where: str, wanted: str, value: Any) -> RunFileError:
    said = repr(value)
    return RunFileError(f"{where} must be {wanted}, not {said if len(said) <= 80 else f'{said[:80]}…'}")


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (Union, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not type(None)]
        return _convert(inner[0], value, where)
    if origin is tuple:
        return _convert_tuple(typing.get_args(hint), value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _wrong(where, "a table", value)
        return {
            str(key): _convert(typing.get_args(hint)[1], item, _dotted(where, key))
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise _wrong(where, "a table", value)
        return from_table(cast("type[Any]", hint), value, where=where)
    return _convert_scalar(hint, value, where)


def _convert_tuple(arguments: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(where, "a list", value)
    return tuple(_convert(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    hint = getattr(hint, "__supertype__", hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        choices = [member.value for member in hint]
        if value not in choices:
            shown = [str(choice) for choice in choices]
            near = difflib.get_close_matches(str(value), shown, n=1, cutoff=0.4)
            hint_text = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(shown)}"
            raise RunFileError(f"{where} is {value!r}", hint=hint_text)
        return hint(value)
    if type(value) is int and abs(value) > INTEGER_MAX:
        raise RunFileError(f"{where} is too large a number", hint=f"use at most {INTEGER_MAX}")
    if hint is float and type(value) is int:
        return float(value)
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
    if hint in names:
        if type(value) is not hint:
            raise _wrong(where, names[hint], value)
        return value
    raise TypeError(f"{where}: settings cannot hold {hint!r}")
