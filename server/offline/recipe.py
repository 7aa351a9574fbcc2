"""What to merge and how: from the command line, a TOML recipe, or a mergekit YAML (``mergekit``).

A recipe's ``[merge]`` table is that of a run file, with two other defaults: nothing is clipped, and weights
are taken as they are given, since they are one person's choice here.

```toml
base = "./Llama-3.2-1B"

[[inputs]]
path = "./math"
weight = 0.7

[[inputs]]
path = "./german"

[merge]
rule = "ties"

[merge.ties]
density = 0.2
```
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from weft.common.errors import RunFileError, UsageError
from weft.common.settings import from_table, to_table
from weft.server.merge.rules import RULES
from weft.server.merge.settings import Clip, MergeRuleName, MergeSettings, Trim
from weft.server.merge.tiles import InputGrams
from weft.server.offline.arithmetic import parse_expression
from weft.server.offline.grams import open_grams
from weft.server.offline.layers import LayersSpec, check_layers, layer_weights

_UNBOUNDED: Final = 1e9
_MULTIPLE_MAX: Final = 100.0
"""What the engine multiplies a movement by at most."""
_BASE_FREE: Final = frozenset(
    {
        MergeRuleName.MEAN,
        MergeRuleName.SLERP,
        MergeRuleName.MEDIAN,
        MergeRuleName.TRIMMED_MEAN,
        MergeRuleName.REGMEAN,
        MergeRuleName.LEAST_SQUARES,
    }
)
"""Rules that mean the same of whole weights as of movements, or are defined for whole weights."""
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", re.IGNORECASE)
_POWERS: Final = {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}


class Dtype(enum.StrEnum):
    """How floating-point results are stored; arithmetic is float32 whatever is chosen."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"

    @property
    def safetensors(self) -> str:
        """Its name in tensor files."""
        return {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}[self.value]


class LoraMode(enum.StrEnum):
    """What a rule is applied to when the inputs are adapters, and how the result becomes factors again."""

    EXACT = "exact"
    DENSE = "dense"
    STACK = "stack"
    FACTORS = "factors"
    RESIDUAL = "residual"


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpec:
    """One ``[[inputs]]`` table."""

    path: str
    """An adapter directory, or a model directory or its id on the Hub."""
    name: str = ""
    """What messages, expressions and the manifest call it; unset: the directory's name."""
    weight: float = 1.0
    """What it counts for, beside the others; at least 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeFile:
    """A TOML recipe; the command line fills in the same."""

    inputs: tuple[InputSpec, ...] = ()
    """What is merged."""
    base: str = ""
    """The model that whole models were trained from; rules about movements need it."""
    onto: str = ""
    """Another version of the base, to which the movements are transferred; unset: the base itself."""
    expression: str = ""
    """Arithmetic on the inputs' names instead of a rule, such as 2*math - toxic."""
    dtype: Dtype | None = None
    """fp32, bf16 or fp16; unset: that of each tensor of the base, or of the first input."""
    lora: LoraMode | None = None
    """exact, dense, stack, factors or residual; unset: exact where the rule can, dense for others."""
    rank: int = 0
    """Rank of the merged adapter; 0: the largest of the inputs, and with stack their sum."""
    shard_size: str = "5GB"
    """Longest weight file."""
    any_base: bool = False
    """Merge adapters that name different bases."""
    layers: tuple[LayersSpec, ...] = ()
    """Layers that are taken from inputs of their own."""
    merge: MergeSettings = field(default_factory=lambda: merge_settings(MergeRuleName.MEAN.value, {}))
    """The rule and its parameters."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= 65536:
            raise UsageError(f"rank is {self.rank}", hint="use 1 to 65536, or leave it out")
        parse_size(self.shard_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Elements of a movement are dropped by chance, and those that stay divided by their chance."""

    density: float
    """The chance to stay; the mean one where chances differ."""
    spread: float | None = None
    """None: all have the same (DARE). Otherwise by rank in the row, density ± spread (DELLA)."""
    seed: int = 0
    """Another one leaves others."""


Thinning: TypeAlias = Trim | Drop | None
"""What is dropped of a movement before the rule sees it; None: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How one tensor, or one layer of an adapter, is merged."""

    settings: MergeSettings
    """The rule and its parameters."""
    weights: tuple[float, ...]
    """One for each input; only their proportions count. Negative: turned round."""
    multiple: float = 1.0
    """What the merged movement is multiplied by."""
    thinnings: tuple[Thinning, ...] | None = None
    """What of each input reaches the rule, which then drops nothing itself; None: what the rule asks for."""
    whole: bool = False
    """The inputs themselves are merged, also where others are merged as movements."""
    input_grams: InputGrams | None = None
    """Of the inputs' layers, where the rule needs them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRef:
    """An input that was asked for."""

    label: str
    """What it is called."""
    path: Path
    """Where it lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All that was asked for, wherever it was written."""

    inputs: tuple[InputRef, ...]
    """What is merged, in the order of the weights of a choice."""
    base: Path | None
    """What whole models were trained from."""
    onto: Path | None
    """What their movements are added to, if not to the base."""
    relative: bool
    """Whole models are merged as movements from the base; otherwise as they are."""
    choose: Callable[[str, int], Choice]
    """(tensor or layer, transformer blocks of the model) → how it is merged."""
    uniform: Choice | None
    """The choice for every tensor that nothing was said about in particular; None: each has its own."""
    dtype: Dtype | None
    """How results are stored."""
    lora: LoraMode | None
    """For adapters."""
    rank: int
    """For adapters."""
    shard_bytes_max: int
    """Longest weight file."""
    any_base: bool
    """Merge adapters that name different bases."""
    table: Mapping[str, Any]
    """The same in plain types, for the manifest; with the inputs' files it decides the result."""
    notes: tuple[str, ...] = ()
    """What a person should know about how it was understood."""


def load_recipe(path: Path) -> RecipeFile:
    """Read a TOML recipe; paths in it are relative to where the command runs.

    Raises:
        RunFileError: Not TOML, an unknown key, a wrong value.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RunFileError(
            f"cannot read {path}: {error}", hint="write TOML: docs/merge.md has one"
        ) from error
    return from_table(RecipeFile, table | {"merge": offline_merge(table.get("merge", {}))})


def offline_merge(table: Any) -> Any:
    """A ``[merge]`` table with the defaults of offline merging."""
    if not isinstance(table, Mapping):
        return table
    if "lora" in table:
        raise RunFileError("merge.lora is for rounds", hint="set lora at the top of the recipe")
    return {"clip": Clip.NONE.value, "weight_multiple_max": _UNBOUNDED} | dict(table)


def merge_settings(rule: str, parameters: Mapping[str, Any]) -> MergeSettings:
    """Settings of a rule by name, with parameters of its table; raises RunFileError."""
    table: dict[str, Any] = {"rule": rule}
    if parameters:
        table[rule] = dict(parameters)
        if rule in set(MergeRuleName) and not hasattr(MergeSettings, rule):
            raise UsageError(
                f"rule {rule} has no parameters: {', '.join(parameters)}", hint="weft merge --list"
            )
    return from_table(MergeSettings, offline_merge(table), where="merge")


def understand(file: RecipeFile, *, resolve: Callable[[str], Path]) -> Recipe:
    """What a recipe asks for.

    Args:
        file: The recipe.
        resolve: The directory of a path or a Hub id.

    Raises:
        UsageError: Nothing to merge, a name twice, a rule that needs a base, a weight that cannot be.
    """
    inputs = tuple(
        InputRef(label=each.name or Path(each.path).resolve().name, path=resolve(each.path))
        for each in file.inputs
    )
    check_labels(inputs)
    choice = _expression_choice(file, inputs) if file.expression else _rule_choice(file)
    if RULES[choice.settings.rule].needs_grams:
        choice = dataclasses.replace(choice, input_grams=open_grams([each.path for each in inputs]))
    base, onto = (resolve(text) if text else None for text in (file.base, file.onto))
    if onto is not None and base is None:
        raise UsageError("onto needs the base that the inputs were trained from", hint="add --base DIR")
    return Recipe(
        inputs=inputs,
        base=base,
        onto=onto,
        relative=_is_relative(file, choice.settings),
        choose=_chooser(file, inputs, choice),
        uniform=choice,
        dtype=file.dtype,
        lora=file.lora,
        rank=file.rank,
        shard_bytes_max=parse_size(file.shard_size),
        any_base=file.any_base,
        table=to_table(file),
    )


def _chooser(file: RecipeFile, inputs: Sequence[InputRef], choice: Choice) -> Callable[[str, int], Choice]:
    if not file.layers:
        return lambda _name, _num_blocks: choice
    if file.onto:
        raise UsageError("layers are taken as they are, and onto adds movements", hint="merge in two steps")
    if is_module_wide(choice.settings):
        raise UsageError(
            f"rule {choice.settings.rule} weighs whole models, and layers are taken one by one",
            hint="use another rule for the other layers, such as mean",
        )
    labels = [each.label for each in inputs]
    check_layers(file.layers, labels)
    swapped = merge_settings(MergeRuleName.MEAN.value, {})

    def choose(name: str, num_blocks: int) -> Choice:
        weights = layer_weights(file.layers, name, num_blocks, labels)
        return choice if weights is None else Choice(settings=swapped, weights=weights, whole=True)

    return choose


def is_module_wide(settings: MergeSettings) -> bool:
    """Whether a tensor's result depends on other tensors, so that a model has to be merged as one unit."""
    rule = RULES[settings.rule]
    return settings.clip is not Clip.NONE or (rule.choose is not None and rule.robust)


def check_labels(inputs: Sequence[InputRef]) -> None:
    """Raise UsageError unless there are inputs, each with a name of its own."""
    if not inputs:
        raise UsageError("there is nothing to merge", hint="name the directories: weft merge a/ b/ --to OUT")
    labels = [each.label for each in inputs]
    for label in labels:
        if labels.count(label) > 1:
            raise UsageError(f"two inputs are called {label}", hint="name them: one=a/ two=b/")


def needs_base(settings: MergeSettings) -> bool:
    """Whether whole models can only be merged as movements."""
    return settings.rule not in _BASE_FREE or settings.clip is not Clip.NONE


def _is_relative(file: RecipeFile, settings: MergeSettings) -> bool:
    about_base = bool(file.expression or file.onto or any(not each.weights for each in file.layers))
    # The mean of the movements is the movement of the mean: reading the base would be for nothing.
    return about_base or needs_base(settings) or bool(file.base and settings.rule is not MergeRuleName.MEAN)


def _rule_choice(file: RecipeFile) -> Choice:
    if RULES[file.merge.rule].needs_fisher:
        raise UsageError(
            f"rule {file.merge.rule} needs a Fisher beside each update, which models do not carry",
            hint="choose another rule: weft merge --list",
        )
    if file.merge.rule is MergeRuleName.SLERP and len(file.inputs) != 2:
        raise UsageError(
            f"slerp goes from one model to another, and there are {len(file.inputs)}",
            hint="give it two, or use rule mean or model_stock",
        )
    for each in file.inputs:
        if not (math.isfinite(each.weight) and each.weight >= 0):
            raise UsageError(
                f"the weight of {each.path} is {each.weight}",
                hint='use 0 or more; to subtract, write --expr "a - b"',
            )
    if not any(each.weight for each in file.inputs):
        raise UsageError("all weights are 0", hint="give at least one input a weight")
    return Choice(settings=file.merge, weights=tuple(each.weight for each in file.inputs))


def _expression_choice(file: RecipeFile, inputs: Sequence[InputRef]) -> Choice:
    """PEM arithmetic (arXiv 2306.14870) on movements, of adapters on ΔW."""
    if file.merge.rule is not MergeRuleName.MEAN:
        raise UsageError("an expression takes the place of a rule", hint="remove one of them")
    coefficients = parse_expression(file.expression)
    labels = [each.label for each in inputs]
    if set(labels) != set(coefficients):
        odd = sorted(set(labels) ^ set(coefficients))[0]
        where = "is no input" if odd in coefficients else "is not in the expression"
        quoted = next((label for label in labels if not re.fullmatch(r"[^\W\d][\w.]*", label)), "")
        rename = (
            f"name them with {odd}=DIR" if not quoted else f"in the expression write '{quoted}' in quotes"
        )
        raise UsageError(f"{odd} {where}", hint=f"inputs are {', '.join(labels)}: {rename}")
    return sum_choice([coefficients[label] for label in labels])


def sum_choice(coefficients: Sequence[float]) -> Choice:
    """Σ coefficient · movement, as a multiple of the mean that the engine makes."""
    multiple = math.fsum(abs(coefficient) for coefficient in coefficients)
    if multiple > _MULTIPLE_MAX:
        raise UsageError(f"the coefficients add up to {multiple:g}", hint=f"keep within {_MULTIPLE_MAX:g}")
    settings = merge_settings(MergeRuleName.MEAN.value, {})
    return Choice(settings=settings, weights=tuple(coefficients), multiple=multiple)


def parse_size(text: str) -> int:
    """Read ``5GB`` or ``500M`` into bytes; raises UsageError."""
    found = _SIZE.fullmatch(text.strip())
    size = int(float(found[1]) * 10 ** _POWERS[found[2].upper()]) if found else 0
    if size < 1:
        raise UsageError(f"{text!r} is not a size", hint="write for example 5GB or 500MB")
    return size
