"""mergekit's YAML, taken as it is, for the methods that both have.

What differs is refused by name: slices that move layers to another place, tokenizers that are merged,
parameters that the engine has no like for. Random methods (DARE, DELLA) draw from Weft's own counter-based
masks, so that they agree on average and not element by element. Arithmetic is float32 also where ``dtype``
says bfloat16, which then is what the result is stored as.

Parameters may be numbers, lists (**gradients**: interpolated over the blocks of the model, the value of a
tensor outside all blocks being the first), or lists of ``{filter, value}``, the first of which whose filter is
part of a tensor's name counts. An input's own parameters go before those of its slice, these before the
file's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml  # type: ignore[import-untyped,unused-ignore]

from weft.common.errors import RunFileError
from weft.server.merge.settings import MergeRuleName, MergeSettings, Trim
from weft.server.offline.inputs import HEADS, block_of
from weft.server.offline.mergekit_shape import check_shape
from weft.server.offline.recipe import (
    Choice,
    Drop,
    Dtype,
    InputRef,
    Recipe,
    Thinning,
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
_STRAIGHT_ABOVE: Final = 0.9995
"""Cosines beyond this are interpolated along a straight line."""


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
        return [_number(key, value) for value in values]

    def shared_number(self, key: str, default: float, place: Place) -> float:
        """A number that all inputs share; raises RunFileError if it is none."""
        return _number(key, self.shared_value(key, default, place))


def _number(key: str, value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        raise RunFileError(f"{key} is {value!r}", hint="write a number") from None


Chooser: TypeAlias = Callable[[Parameters, Place], Choice]
"""How a tensor is merged."""
Thinner: TypeAlias = Callable[[Parameters, Place], list[Thinning]]
"""What of each input's movement of a tensor is dropped first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row of ``METHODS``."""

    choose: Chooser
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
    check_shape(table)
    _refuse(table.keys() - _TOP, "key", _TOP)
    method = _method(table)
    entries, shared = _stacked_entries(table) if method.choose is _passthrough else _entries(table)
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
    inputs = tuple(InputRef(label=_label(entry, others), path=resolve(entry.path)) for entry in others)
    check_labels(inputs)
    dtype = table.get("out_dtype") or table.get("dtype")
    if dtype is not None and dtype not in _DTYPES:
        raise RunFileError(f"dtype is {dtype}", hint=f"use {', '.join(_DTYPES)}")
    return Recipe(
        inputs=inputs,
        base=resolve(base) if base is not None and method.with_base else None,
        onto=None,
        relative=method.with_base,
        choose=partial(_choose, method, parameters, _depth(table)),
        uniform=None,
        dtype=_DTYPES.get(str(dtype)),
        lora=None,
        rank=0,
        shard_bytes_max=parse_size("5GB"),
        any_base=False,
        table={"mergekit": table},
        notes=(method.note,) if method.note else (),
    )


def _choose(
    method: Method, parameters: Parameters, depth: int | None, tensor: str, num_blocks: int
) -> Choice:
    if depth not in (None, num_blocks):
        raise RunFileError(
            f"the slices end at layer {depth} and the models have {num_blocks}",
            hint="models of another depth are not made here: take all layers",
        )
    return method.choose(parameters, Place(tensor, num_blocks))


def _depth(table: Mapping[str, Any]) -> int | None:
    """Layers of the model that slices make."""
    sources = [source for slice_ in table.get("slices", ()) for source in slice_["sources"]]
    return max((source["layer_range"][1] for source in sources), default=None)


def _refuse(unknown: set[str], kind: str, known: frozenset[str]) -> None:
    if unknown:
        raise RunFileError(
            f"the {kind} {min(map(str, unknown))} is not understood here",
            hint=f"known: {', '.join(sorted(known))}",
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


@dataclass(frozen=True, slots=True)
class Stacked(Entry):
    """A model of which some blocks are taken, where they are."""

    blocks: range
    """Which."""
    first: bool
    """Whether what is before the blocks, the embeddings, is taken too."""
    last: bool
    """Whether what is behind the blocks, the last norm and the head, is taken too."""

    def gives(self, place: Place) -> bool:
        """Whether a tensor is taken from it."""
        block = block_of(place.tensor)
        if block is not None:
            return block in self.blocks
        return self.first if "embed" in place.tensor and place.tensor not in HEADS else self.last


def _stacked_entries(table: Mapping[str, Any]) -> tuple[list[Entry], list[Mapping[str, Any]]]:
    """The slices of a model of the same depth, each a model's own."""
    shared = [table.get("parameters") or {}]
    if ("models" in table) == ("slices" in table):
        raise RunFileError("there must be either models or slices", hint="list the slices under slices:")
    if "models" in table:
        return [_entry(each) for each in table["models"]], shared
    entries: list[Entry] = []
    depth = 0
    for number, slice_ in enumerate(table["slices"]):
        _refuse(
            slice_.keys() - {"sources", "parameters"}, "key of a slice", frozenset({"sources", "parameters"})
        )
        if len(slice_["sources"]) != 1:
            raise RunFileError(
                "a slice of passthrough has one source", hint="use another merge_method to merge"
            )
        source = slice_["sources"][0]
        entry = _entry(source)
        start, stop = source.get("layer_range") or (None, None)
        if not (isinstance(start, int) and isinstance(stop, int) and start < stop):
            raise RunFileError(
                f"a slice of {entry.path} has no layer_range", hint="write layer_range: [0, 16]"
            )
        if start != depth:
            raise RunFileError(
                f"layers {start} to {stop} of {entry.path} would become {depth} to {depth + stop - start}",
                hint="models of another depth are not made here: layers keep their places",
            )
        depth = stop
        parameters = {**shared[0], **(slice_.get("parameters") or {}), **entry.parameters}
        if any(_is_gradient(each) for each in parameters.values()):
            raise RunFileError(
                "a slice of passthrough has a gradient", hint="cut it into slices with a number each"
            )
        last = number == len(table["slices"]) - 1
        entries.append(Stacked(entry.path, parameters, range(start, stop), first=number == 0, last=last))
    return entries, shared


def _is_gradient(setting: Any) -> bool:
    return isinstance(setting, list) and not any(isinstance(each, Mapping) for each in setting)


def _entry(table: Mapping[str, Any]) -> Entry:
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


def _label(entry: Entry, entries: Sequence[Entry]) -> str:
    name = Path(entry.path).resolve().name
    if len({each.path for each in entries if Path(each.path).resolve().name == name}) > 1:
        name = entry.path
    return f"{name}[{entry.blocks.start}:{entry.blocks.stop}]" if isinstance(entry, Stacked) else name


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


def _scaled(settings: MergeSettings, weights: Sequence[float], multiple: float) -> Choice:
    """``multiple`` · Σ w τ: the engine divides by Σ |w|."""
    total = abs(multiple) * math.fsum(abs(weight) for weight in weights)
    if not total:
        return Choice(settings=settings, weights=(0.0,) * len(weights))
    if not total <= _MULTIPLE_MAX:
        raise RunFileError(
            f"the weights {list(weights)} multiply movements by {total:g}",
            hint="their sum is nearly 0, or too large",
        )
    sign = math.copysign(1.0, multiple)
    return Choice(settings=settings, weights=tuple(sign * weight for weight in weights), multiple=total)


def _divisor(weights: Sequence[float]) -> float:
    """Σ w, or 1 where that is 0."""
    total = math.fsum(weights)
    return total if abs(total) >= 1e-8 else 1.0


def _linear(parameters: Parameters, place: Place) -> Choice:
    weights = parameters.own_values("weight", None, place)
    divisor = _divisor(weights) if parameters.shared_value("normalize", True, place) else 1.0
    return _scaled(merge_settings("mean", {}), weights, 1 / divisor)


def _refuse_rescale(parameters: Parameters, place: Place, *, default: bool) -> None:
    if bool(parameters.shared_value("rescale", default, place)) is not default:
        raise RunFileError(
            f"rescale is {not default}", hint=f"only rescale: {str(default).lower()} is done here"
        )


def _keep_all(parameters: Parameters, _place: Place) -> list[Thinning]:
    return [None] * len(parameters.entries)


def _magnitude(parameters: Parameters, place: Place) -> list[Thinning]:
    """The largest of each tensor."""
    _refuse_rescale(parameters, place, default=False)
    return [_trim(density) for density in parameters.own_values("density", 1.0, place)]


def _without_outliers(parameters: Parameters, place: Place) -> list[Thinning]:
    """The largest but for the very largest."""
    _refuse_rescale(parameters, place, default=False)
    densities = parameters.own_values("density", 1.0, place)
    gammas = parameters.own_values("gamma", 0.01, place)
    return [_trim(density, gamma) for density, gamma in zip(densities, gammas, strict=True)]


def _trim(density: float, outliers: float = 0.0) -> Trim | None:
    return None if density >= 1 else Trim(density=density, keeps_ties=False, outliers=outliers)


def _by_chance(parameters: Parameters, place: Place) -> list[Thinning]:
    """DARE."""
    _refuse_rescale(parameters, place, default=True)
    densities = parameters.own_values("density", 1.0, place)
    return [None if density >= 1 else Drop(density=density) for density in densities]


def _by_rank(parameters: Parameters, place: Place) -> list[Thinning]:
    """DELLA."""
    _refuse_rescale(parameters, place, default=True)
    densities = parameters.own_values("density", 1.0, place)
    spreads = parameters.own_values("epsilon", 0.15, place)
    return [_ranked(density, spread) for density, spread in zip(densities, spreads, strict=True)]


def _ranked(density: float, spread: float) -> Drop | None:
    if density >= 1:
        return None
    if density > 0 and not (0 <= spread < density and density + spread < 1):
        raise RunFileError(
            f"density {density} ± epsilon {spread} are no chances", hint="keep both between 0 and 1"
        )
    return Drop(density=density, spread=spread)


def _arithmetic(thin: Thinner, *, elect: bool = False, normalize: bool = False) -> Chooser:
    """Thin each movement, elect signs or not, add up with weights, divide by them or not, multiply by lambda."""

    def choose(parameters: Parameters, place: Place) -> Choice:
        weights = parameters.own_values("weight", None, place)
        densities = parameters.own_values("density", 1.0, place)
        scale = parameters.shared_number("lambda", 1.0, place)
        thinnings = tuple(thin(parameters, place))
        # An input of which nothing stays adds nothing, and still counts in what a sum is divided by.
        active = [weight if density > 0 else 0.0 for weight, density in zip(weights, densities, strict=True)]
        average = bool(parameters.shared_value("normalize", normalize, place))
        if not elect:
            divisor = _divisor(weights) if average else 1.0
            return _thinned(_scaled(merge_settings("mean", {}), active, scale / divisor), thinnings)
        if average:
            return _thinned(_agreeing_average(active, scale), thinnings)
        table = {"convention": "mergekit", "density": 1.0, "average": False}
        return _thinned(_scaled(merge_settings("ties", table), active, scale), thinnings)

    return choose


def _thinned(choice: Choice, thinnings: tuple[Thinning, ...]) -> Choice:
    """What is trimmed alike for TIES is trimmed by the engine, which does it on several threads."""
    first = thinnings[0]
    settings = choice.settings
    if settings.rule is MergeRuleName.TIES:
        alike = isinstance(first, Trim) and not first.outliers and first.density > 0
        if alike and thinnings.count(first) == len(thinnings):
            assert isinstance(first, Trim) and settings.ties is not None  # noqa: S101, PT018
            ties = dataclasses.replace(settings.ties, density=first.density)
            return dataclasses.replace(choice, settings=dataclasses.replace(settings, ties=ties))
        return dataclasses.replace(choice, thinnings=thinnings)
    return dataclasses.replace(choice, thinnings=thinnings) if any(thinnings) else choice


def _agreeing_average(weights: Sequence[float], scale: float) -> Choice:
    if any(weight < 0 for weight in weights):
        raise RunFileError(
            "a weight is negative, and what agrees is divided by the weights", hint="set normalize: false"
        )
    choice = _scaled(merge_settings("ties", {"convention": "mergekit", "density": 1.0}), weights, scale)
    return dataclasses.replace(choice, multiple=abs(scale)) if any(choice.weights) else choice


def _slerp(parameters: Parameters, place: Place) -> Choice:
    if len(parameters.entries) != 2:
        raise RunFileError("slerp takes two models, one of them the base", hint="list both under models:")
    t = parameters.shared_number("t", math.nan, place)
    if not 0 <= t <= 1:
        said = "missing" if math.isnan(t) else f"{t:g}"
        raise RunFileError(f"t of slerp is {said} for {place.tensor}", hint="use 0 to 1")
    settings = merge_settings("slerp", {"straight_above": _STRAIGHT_ABOVE})
    return Choice(settings=settings, weights=(1 - t, t))


def _model_stock(parameters: Parameters, place: Place) -> Choice:
    if parameters.shared_value("filter_wise", False, place):
        raise RunFileError("filter_wise is not done here", hint="remove it: tensors are weighed whole")
    if len(parameters.entries) < 2:
        raise RunFileError("model_stock takes two models or more beside the base", hint="list them")
    settings = merge_settings("model_stock", {"clamp": False})
    return Choice(settings=settings, weights=(1.0,) * len(parameters.entries))


def _passthrough(parameters: Parameters, place: Place) -> Choice:
    entries = parameters.entries
    if len(entries) != 1 and not isinstance(entries[0], Stacked):
        raise RunFileError(
            "passthrough takes one model, or slices", hint="write slices, or another merge_method"
        )
    scales = parameters.own_values("scale", 1.0, place)
    weights = [
        scale if not isinstance(each, Stacked) or each.gives(place) else 0.0
        for each, scale in zip(entries, scales, strict=True)
    ]
    return _scaled(merge_settings("mean", {}), weights, 1.0)


_SUMS: Final = frozenset({"weight", "density", "normalize", "rescale", "lambda"})
_CHANCE: Final = (
    "what is dropped is drawn from Weft's own masks, and what stays divided by its chance: "
    "the same on average as mergekit, not element by element"
)
METHODS: Final[Mapping[str, Method]] = {
    "linear": Method(choose=_linear, parameters=frozenset({"weight", "normalize"}), with_base=False),
    "task_arithmetic": Method(choose=_arithmetic(_keep_all), parameters=_SUMS, with_base=True),
    "ties": Method(
        choose=_arithmetic(_magnitude, elect=True, normalize=True), parameters=_SUMS, with_base=True
    ),
    "breadcrumbs": Method(
        choose=_arithmetic(_without_outliers), parameters=_SUMS | {"gamma"}, with_base=True
    ),
    "breadcrumbs_ties": Method(
        choose=_arithmetic(_without_outliers, elect=True), parameters=_SUMS | {"gamma"}, with_base=True
    ),
    "dare_linear": Method(choose=_arithmetic(_by_chance), parameters=_SUMS, with_base=True, note=_CHANCE),
    "dare_ties": Method(
        choose=_arithmetic(_by_chance, elect=True), parameters=_SUMS, with_base=True, note=_CHANCE
    ),
    "della": Method(
        choose=_arithmetic(_by_rank, elect=True, normalize=True),
        parameters=_SUMS | {"epsilon"},
        with_base=True,
        note=_CHANCE,
    ),
    "della_linear": Method(
        choose=_arithmetic(_by_rank), parameters=_SUMS | {"epsilon"}, with_base=True, note=_CHANCE
    ),
    "slerp": Method(choose=_slerp, parameters=frozenset({"t"}), with_base=False, base_first=True),
    "passthrough": Method(choose=_passthrough, parameters=frozenset({"scale"}), with_base=False),
    "model_stock": Method(choose=_model_stock, parameters=frozenset({"filter_wise"}), with_base=True),
}
"""The methods that both have."""
