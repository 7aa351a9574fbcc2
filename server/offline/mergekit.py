"""mergekit's YAML, taken as it is, for the methods that both have.

What differs is refused by name: restacked slices, tokenizers that are merged, parameters that the engine has
no like for. Random methods (DARE) draw from Weft's own counter-based masks, so that they agree in
distribution and not element by element. Arithmetic is float32 also where ``dtype`` says bfloat16, which then
is what the result is stored as.

Parameters may be numbers, lists (**gradients**: interpolated over the blocks of the model, the value of a
tensor outside all blocks being the first), or lists of ``{filter, value}``, the first of which whose filter is
part of a tensor's name counts. An input's own parameters go before those of its slice, these before the
file's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped,unused-ignore]

from weft.common.errors import RunFileError
from weft.server.merge.settings import MergeSettings, Trim
from weft.server.offline.inputs import block_of
from weft.server.offline.recipe import (
    Choice,
    Dtype,
    InputRef,
    Recipe,
    check_labels,
    merge_settings,
    parse_size,
)

_TOP: Final = frozenset(
    {"merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source"}
)
_DTYPES: Final = {"float32": Dtype.FP32, "bfloat16": Dtype.BF16, "float16": Dtype.FP16}
_IGNORED: Final = frozenset({"int8_mask"})
"""Parameters that change no result here."""
_MULTIPLE_MAX: Final = 100.0


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of the file."""

    path: str
    """Directory or Hub id."""
    parameters: Mapping[str, Any]
    """Of its own."""


@dataclass(frozen=True, slots=True)
class Place:
    """What parameters are evaluated for."""

    tensor: str
    """Name of the tensor."""
    num_blocks: int
    """Transformer blocks of the model."""

    @property
    def depth(self) -> float:
        """0 at the first block and outside all, 1 at the last."""
        block = block_of(self.tensor)
        if block is None:
            return 0.0
        return block / (self.num_blocks - 1) if self.num_blocks > 1 else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """The parameters of a file: an input's own, and those that all share."""

    shared: Sequence[Mapping[str, Any]]
    """Of the slice, then of the file."""
    entries: Sequence[Entry]
    """The inputs, without the base."""

    def shared_value(self, key: str, default: Any, place: Place) -> Any:
        """A parameter that all inputs share."""
        return _first(self.shared, key, default, place)

    def own_values(self, key: str, default: float | None, place: Place) -> list[float]:
        """A parameter of each input; raises RunFileError if one has none and there is no default."""
        values = [_first([entry.parameters, *self.shared], key, default, place) for entry in self.entries]
        for entry, value in zip(self.entries, values, strict=True):
            if value is None:
                raise RunFileError(f"{entry.path} has no {key} for {place.tensor}", hint=f"give it a {key}")
        return [float(value) for value in values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of ``METHODS``."""

    choose: Callable[[Parameters, Place], Choice]
    """How a tensor is merged."""
    parameters: frozenset[str]
    """What the method knows."""
    with_base: bool
    """Movements from the base are merged; otherwise the models themselves."""
    base_first: bool = False
    """The base is one of the inputs, the first."""
    note: str = ""
    """What a person should know."""


def load_mergekit(path: Path, *, resolve: Callable[[str], Path]) -> Recipe:
    """Read a file of mergekit's.

    Raises:
        RunFileError: Not YAML, or something that is not done here, by name.
        UsageError: Nothing to merge.
    """
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunFileError(f"cannot read {path}: {error}") from error
    if not isinstance(table, Mapping):
        raise RunFileError(f"{path} is not a merge: it holds no keys", hint="see docs/merge.md")
    _refuse(table.keys() - _TOP, "key", _TOP)
    method = _method(table)
    entries, shared = _entries(table)
    base = _reference(table["base_model"]) if table.get("base_model") else None
    if table.get("tokenizer_source", "base") not in (None, "base", base):
        raise RunFileError(
            "tokenizer_source is not the base: vocabularies are not merged here",
            hint="remove it: the result gets the tokenizer of the base, or of the first model",
        )
    return _recipe(table, method, entries, shared, base, resolve)


def _recipe(
    table: Mapping[str, Any],
    method: Method,
    entries: Sequence[Entry],
    shared: Sequence[Mapping[str, Any]],
    base: str | None,
    resolve: Callable[[str], Path],
) -> Recipe:
    if (method.with_base or method.base_first) and base is None:
        raise RunFileError(f"{table['merge_method']} needs base_model", hint="add base_model: DIR")
    others = [entry for entry in entries if entry.path != base] if method.with_base else list(entries)
    if method.base_first:
        others = [Entry(str(base), {}), *(entry for entry in entries if entry.path != base)]
    elif base is not None and not method.with_base and base not in {entry.path for entry in entries}:
        raise RunFileError(
            f"{table['merge_method']} has a base_model that is none of its models",
            hint="list it among the models with a weight, or remove base_model",
        )
    for mapping in (*shared, *(entry.parameters for entry in entries)):
        _refuse(mapping.keys() - method.parameters - _IGNORED, "parameter", method.parameters)
    parameters = Parameters(shared=shared, entries=others)
    inputs = tuple(InputRef(label=_label(entry.path, others), path=resolve(entry.path)) for entry in others)
    check_labels(inputs)
    dtype = table.get("out_dtype") or table.get("dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise RunFileError(f"dtype is {dtype}", hint=f"use {', '.join(_DTYPES)}")
    return Recipe(
        inputs=inputs,
        base=resolve(base) if base is not None and method.with_base else None,
        onto=None,
        relative=method.with_base,
        choose=lambda tensor, num_blocks: method.choose(parameters, Place(tensor, num_blocks)),
        uniform=None,
        dtype=_DTYPES.get(str(dtype)),
        lora=None,
        rank=0,
        shard_bytes_max=parse_size("5GB"),
        any_base=False,
        table={"mergekit": table},
        notes=(method.note,) if method.note else (),
    )


def _refuse(unknown: set[str], kind: str, known: frozenset[str]) -> None:
    if unknown:
        raise RunFileError(
            f"the {kind} {min(unknown)} is not understood here", hint=f"known: {', '.join(sorted(known))}"
        )


def _method(table: Mapping[str, Any]) -> Method:
    name = str(table.get("merge_method"))
    if name not in METHODS:
        raise RunFileError(f"merge_method {name} is not done here", hint=f"use {', '.join(sorted(METHODS))}")
    return METHODS[name]


def _entries(table: Mapping[str, Any]) -> tuple[list[Entry], list[Mapping[str, Any]]]:
    """The models, and the parameters that they share."""
    shared = [table.get("parameters") or {}]
    if ("models" in table) == ("slices" in table):
        raise RunFileError("there must be either models or slices", hint="list the models under models:")
    if "models" in table:
        return [_entry(each) for each in table["models"]], shared
    if len(table["slices"]) != 1:
        raise RunFileError(
            "slices that put layers together anew are not done here", hint="use one slice of all layers"
        )
    slice_ = table["slices"][0]
    _refuse(slice_.keys() - {"sources", "parameters"}, "key of a slice", frozenset({"sources", "parameters"}))
    ranges = [tuple(source.get("layer_range", ())) for source in slice_["sources"]]
    if any(len(each) != 2 or each[0] != 0 or each != ranges[0] for each in ranges):
        raise RunFileError(
            "slices that are not all layers of each model are not done here",
            hint="write layer_range: [0, N] with all N layers",
        )
    return [_entry(each) for each in slice_["sources"]], [slice_.get("parameters") or {}, *shared]


def _entry(table: Any) -> Entry:
    if not isinstance(table, Mapping) or "model" not in table:
        raise RunFileError(f"{table!r} is not a model", hint="write - model: DIR")
    return Entry(_reference(table["model"]), table.get("parameters") or {})


def _reference(value: Any) -> str:
    text = value.get("model") if isinstance(value, Mapping) else value
    text = text.get("path") if isinstance(text, Mapping) else text
    if (
        not isinstance(text, str)
        or "+" in Path(text).name
        or (isinstance(value, Mapping) and value.get("lora"))
    ):
        raise RunFileError(
            f"{value!r} is not a model by itself",
            hint="merge the adapter into its base first, or merge adapters",
        )
    return text


def _label(path: str, entries: Sequence[Entry]) -> str:
    name = Path(path).resolve().name
    return name if sum(Path(entry.path).resolve().name == name for entry in entries) == 1 else path


# -- values ------------------------------------------------------------------------------------------------


def _first(sources: Sequence[Mapping[str, Any]], key: str, default: Any, place: Place) -> Any:
    for source in sources:
        if key in source:
            value = evaluate(source[key], place)
            if value is not None:
                return value
    return default


def evaluate(setting: Any, place: Place) -> Any:
    """The value of a parameter for a tensor: a number, a gradient, or the first filter that fits; None if none."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if any(isinstance(each, Mapping) for each in setting):
        for each in setting:
            wanted = each.get("filter")
            if wanted in (None, "*") or wanted in place.tensor:
                return evaluate(each["value"], place)
        return None
    return _interpolate(setting, place.depth)


def _interpolate(values: Sequence[Any], depth: float) -> Any:
    if not values:
        return None
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values[int(depth * (len(values) - 1))]
    at = depth * (len(values) - 1)
    low = int(at)
    high = min(len(values) - 1, low + 1)
    return (1 - (at - low)) * values[low] + (at - low) * values[high]


# -- methods -----------------------------------------------------------------------------------------------


def _scaled(
    settings: MergeSettings,
    weights: Sequence[float],
    multiple: float,
    trims: tuple[Trim | None, ...] | None = None,
) -> Choice:
    """``multiple`` · Σ w τ: the engine divides by Σ |w|."""
    sign = -1.0 if multiple < 0 else 1.0
    total = abs(multiple) * math.fsum(abs(weight) for weight in weights)
    if not total:
        return Choice(settings=settings, weights=(0.0,) * len(weights))
    if not total <= _MULTIPLE_MAX:
        raise RunFileError(
            f"the weights {list(weights)} multiply movements by {total:g}",
            hint="their sum is nearly 0, or too large",
        )
    return Choice(
        settings=settings, weights=tuple(sign * weight for weight in weights), multiple=total, trims=trims
    )


def _divisor(parameters: Parameters, weights: Sequence[float], place: Place, *, normalize: bool) -> float:
    """Σ w where weights are normalised (1 where that is 0), else 1."""
    if not parameters.shared_value("normalize", normalize, place):
        return 1.0
    total = math.fsum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def _linear(parameters: Parameters, place: Place) -> Choice:
    weights = parameters.own_values("weight", None, place)
    return _scaled(
        merge_settings("mean", {}), weights, 1 / _divisor(parameters, weights, place, normalize=True)
    )


def _task_arithmetic(parameters: Parameters, place: Place) -> Choice:
    weights = parameters.own_values("weight", None, place)
    scale = float(parameters.shared_value("lambda", 1.0, place))
    divisor = _divisor(parameters, weights, place, normalize=False)
    return _scaled(merge_settings("mean", {}), weights, scale / divisor)


def _breadcrumbs(parameters: Parameters, place: Place) -> Choice:
    densities = parameters.own_values("density", 1.0, place)
    gammas = parameters.own_values("gamma", 0.01, place)
    choice = _task_arithmetic(parameters, place)
    trims = tuple(
        None if density >= 1 else Trim(density=density, keeps_ties=False, outliers=min(gamma, 1 - density))
        for density, gamma in zip(densities, gammas, strict=True)
    )
    _refuse_rescale(parameters, place, default=False)
    return Choice(settings=choice.settings, weights=choice.weights, multiple=choice.multiple, trims=trims)


def _refuse_rescale(parameters: Parameters, place: Place, *, default: bool) -> None:
    if bool(parameters.shared_value("rescale", default, place)) is not default:
        raise RunFileError(
            f"rescale is {not default}", hint=f"only rescale: {str(default).lower()} is done here"
        )


def _ties(parameters: Parameters, place: Place) -> Choice:
    weights = parameters.own_values("weight", None, place)
    densities = parameters.own_values("density", 1.0, place)
    _refuse_rescale(parameters, place, default=False)
    if not parameters.shared_value("normalize", True, place):
        raise RunFileError("normalize is false, and ties is an average here", hint="set normalize: true")
    if any(weight < 0 for weight in weights):
        raise RunFileError(
            "ties has a negative weight, and divides by the weights", hint="use task_arithmetic"
        )
    weights = [weight if density > 0 else 0.0 for weight, density in zip(weights, densities, strict=True)]
    same = len(set(densities)) == 1 and 0 < densities[0] < 1
    table = {"convention": "mergekit", "density": densities[0] if same else 1.0}
    choice = Choice(settings=merge_settings("ties", table), weights=tuple(weights))
    scale = float(parameters.shared_value("lambda", 1.0, place))
    if not scale:
        return Choice(settings=choice.settings, weights=(0.0,) * len(weights))
    trims = tuple(
        Trim(density=density, keeps_ties=False) if 0 < density < 1 else None for density in densities
    )
    return Choice(
        settings=choice.settings,
        weights=tuple(math.copysign(weight, weight * scale) for weight in weights),
        multiple=abs(scale),
        trims=None if same else trims,
    )


def _dare_linear(parameters: Parameters, place: Place) -> Choice:
    densities = parameters.own_values("density", 1.0, place)
    if len(set(densities)) > 1:
        raise RunFileError("dare_linear has different densities", hint="give all models the same density")
    _refuse_rescale(parameters, place, default=True)
    choice = _task_arithmetic(parameters, place)
    settings = merge_settings("dare", {"density": min(1.0, densities[0])})
    return Choice(settings=settings, weights=choice.weights, multiple=choice.multiple)


def _slerp(parameters: Parameters, place: Place) -> Choice:
    if len(parameters.entries) != 2:
        raise RunFileError("slerp takes two models, one of them the base", hint="list both under models:")
    t = parameters.shared_value("t", None, place)
    if t is None or not 0 <= float(t) <= 1:
        raise RunFileError(f"t of slerp is {t} for {place.tensor}", hint="use 0 to 1")
    return Choice(settings=merge_settings("slerp", {}), weights=(1 - float(t), float(t)))


def _model_stock(parameters: Parameters, place: Place) -> Choice:
    if parameters.shared_value("filter_wise", False, place):
        raise RunFileError("filter_wise is not done here", hint="remove it: tensors are weighed whole")
    if len(parameters.entries) < 2:
        raise RunFileError("model_stock takes two models or more beside the base", hint="list them")
    return Choice(settings=merge_settings("model_stock", {}), weights=(1.0,) * len(parameters.entries))


METHODS: Final[Mapping[str, Method]] = {
    "linear": Method(choose=_linear, parameters=frozenset({"weight", "normalize"}), with_base=False),
    "task_arithmetic": Method(
        choose=_task_arithmetic, parameters=frozenset({"weight", "normalize", "lambda"}), with_base=True
    ),
    "ties": Method(
        choose=_ties,
        parameters=frozenset({"weight", "density", "normalize", "lambda", "rescale"}),
        with_base=True,
    ),
    "breadcrumbs": Method(
        choose=_breadcrumbs,
        parameters=frozenset({"weight", "density", "gamma", "normalize", "lambda", "rescale"}),
        with_base=True,
    ),
    "dare_linear": Method(
        choose=_dare_linear,
        parameters=frozenset({"weight", "density", "normalize", "lambda", "rescale"}),
        with_base=True,
        note="DARE draws from Weft's own masks and divides by the density: the same on average, not element by element",
    ),
    "slerp": Method(choose=_slerp, parameters=frozenset({"t"}), with_base=False, base_first=True),
    "model_stock": Method(choose=_model_stock, parameters=frozenset({"filter_wise"}), with_base=True),
}
"""The methods that both have."""
