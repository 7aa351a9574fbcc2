"""The shape that a YAML of mergekit's has to have before anybody asks what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.common.errors import RunFileError

_EXAMPLE = "docs/merge.md has an example"


def check_shape(table: Mapping[str, Any]) -> None:
    """Check lists, mappings and the values of parameters; their names and numbers are others' business.

    Raises:
        RunFileError: Something has another shape, by its place in the file.
    """
    _check_parameters(table, "the file")
    for key in ("dtype", "out_dtype", "merge_method"):
        if not isinstance(table.get(key), str | None):
            raise RunFileError(f"{key} is {table[key]!r}", hint=_EXAMPLE)
    for number, model in enumerate(_list(table, "models", "the file")):
        _check_source(model, f"models[{number}]")
    for number, slice_ in enumerate(_list(table, "slices", "the file")):
        where = f"slices[{number}]"
        _check_parameters(slice_, where)
        if not isinstance(slice_.get("sources"), list):
            raise RunFileError(f"{where} has no list of sources", hint=_EXAMPLE)
        for place, source in enumerate(slice_["sources"]):
            _check_source(source, f"{where}.sources[{place}]")


def _list(table: Mapping[str, Any], key: str, where: str) -> list[Any]:
    if key not in table:
        return []
    if not isinstance(table[key], list):
        raise RunFileError(f"{key} of {where} is no list", hint=_EXAMPLE)
    found: list[Any] = table[key]
    return found


def _check_source(source: Any, where: str) -> None:
    _check_parameters(source, where)
    if "model" not in source:
        raise RunFileError(f"{where} is not a model", hint="write - model: DIR")
    layers = source.get("layer_range", [0, 1])
    if not (isinstance(layers, list) and len(layers) == 2 and all(type(each) is int for each in layers)):
        raise RunFileError(f"layer_range of {where} is {layers!r}", hint="write layer_range: [0, 16]")


def _check_parameters(table: Any, where: str) -> None:
    if not isinstance(table, Mapping):
        raise RunFileError(f"{where} is {table!r}, which is not a model", hint=_EXAMPLE)
    parameters = table.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise RunFileError(f"parameters of {where} are {parameters!r}", hint=_EXAMPLE)
    for name, setting in (parameters or {}).items():
        if not (isinstance(name, str) and _is_setting(setting)):
            raise RunFileError(f"parameter {name} of {where} is {setting!r}", hint=_EXAMPLE)


def _is_setting(setting: Any) -> bool:
    """Whether it is a value, a gradient, or filters."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _is_value(setting)
    return all(map(_is_value, setting)) or all(map(_is_filter, setting))


def _is_value(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _is_filter(table: Any) -> bool:
    return (
        isinstance(table, Mapping)
        and {"value"} <= table.keys() <= {"value", "filter"}
        and isinstance(table.get("filter"), str | None)
        and not isinstance(table["value"], Mapping)
        and _is_setting(table["value"])
    )
