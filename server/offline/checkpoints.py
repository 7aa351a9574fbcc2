"""Whole models: what is refused, and the units of their merge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from weft.common.base import CONFIG
from weft.common.errors import InputError, UsageError
from weft.common.modules import TensorSpec
from weft.server.offline.inputs import HEADS, Checkpoint, tokenizer_files
from weft.server.offline.plan import Plan
from weft.server.offline.recipe import Dtype, Recipe, is_module_wide
from weft.server.offline.sources import FLOAT8, FLOATS, stored_dtype
from weft.server.offline.units import Coordinates, Copied, Source, Unit, refuse_device

_SAME: Final = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
"""Keys of config.json without which tensors of one shape may still mean different things."""
_DTYPE_KEYS: Final = ("dtype", "torch_dtype")
_TORCH_NAMES: Final = {Dtype.FP32: "float32", Dtype.BF16: "bfloat16", Dtype.FP16: "float16"}


def plan_checkpoints(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    onto: Checkpoint | None,
    recipe: Recipe,
    *,
    device: str,
) -> Plan:
    """The merge of whole models.

    Raises:
        InputError: They do not fit together: names the tensor or the key, and who differs.
        UsageError: The rule is about movements and there is no base, or options are for adapters.
    """
    rule = recipe.uniform.settings.rule.value if recipe.uniform else "of this recipe"
    refuse_device(device, rule)
    if recipe.relative and base is None:
        raise UsageError(
            f"rule {rule} is about movements, and there is no base to measure them from",
            hint="add --base DIR: what the models were trained from",
        )
    if recipe.lora is not None or recipe.rank:
        raise UsageError("lora and rank are for adapters, and the inputs are models", hint="remove them")
    everyone = [*models, *(each for each in (base, onto) if each is not None)]
    first = onto or base or models[0]
    _check_configs(everyone, first)
    names = _common_names(everyone, first)
    specs = {name: _common_spec(everyone, first, name) for name in sorted(names)}
    stored = [stored_spec(spec, recipe.dtype) for spec in specs.values()]
    return Plan(
        units=tuple(_units(models, base if recipe.relative else None, onto, specs, recipe)),
        specs=tuple(stored),
        stem="model",
        files=model_files(first, recipe.dtype),
        notes=tuple(_notes(everyone, first, specs)),
        library="transformers",
        base_name=str(base.directory.name) if base else "",
    )


def _units(
    models: Sequence[Checkpoint],
    base: Checkpoint | None,
    onto: Checkpoint | None,
    specs: Mapping[str, TensorSpec],
    recipe: Recipe,
) -> list[Unit]:
    sources = tuple(Source(each.label, each.weights, {}) for each in models)
    from_base = None if base is None else Source(base.label, base.weights, {})
    to = from_base if onto is None else Source(onto.label, onto.weights, {})
    merged = [TensorSpec(spec.name, "F32", spec.shape) for spec in specs.values() if spec.dtype in FLOATS]
    num_blocks = int(models[0].config.get("num_hidden_layers") or 0)

    def coordinates(group: Sequence[TensorSpec]) -> Unit:
        choice = recipe.choose(group[0].name, num_blocks)
        taken = choice.whole and any(choice.weights)
        return Coordinates(
            name=group[0].name,
            specs=tuple(group),
            sources=sources,
            base=None if taken else from_base,
            onto=None if taken else to,
            choice=choice,
        )

    whole = recipe.uniform is not None and is_module_wide(recipe.uniform.settings)
    groups = [merged] if whole and merged else [[spec] for spec in merged]
    copied = [Copied(name=name, sources=sources) for name, spec in specs.items() if spec.dtype not in FLOATS]
    return [*(coordinates(group) for group in groups), *copied]


def _check_configs(everyone: Sequence[Checkpoint], first: Checkpoint) -> None:
    for each in everyone:
        for key in _SAME:
            own, wanted = each.config.get(key), first.config.get(key)
            if own != wanted:
                raise InputError(
                    f"{each.label} has {key} {own} and {first.label} has {wanted}",
                    hint="only models of one architecture, trained from one base, can be merged",
                )
        if each.tied != first.tied:
            tied, untied = (each, first) if each.tied else (first, each)
            raise InputError(
                f"{tied.label} shares its output layer with its embeddings and {untied.label} does not",
                hint="save both with the same tie_word_embeddings",
            )


def _common_names(everyone: Sequence[Checkpoint], first: Checkpoint) -> set[str]:
    wanted = first.merged_names()
    for each in everyone:
        own = each.merged_names()
        if missing := sorted(wanted - own):
            raise InputError(
                f"{each.label} lacks {_some(missing)}, which {first.label} has",
                hint=_hint(missing),
            )
        if extra := sorted(own - wanted):
            raise InputError(f"{each.label} has {_some(extra)}, which {first.label} lacks", hint=_hint(extra))
    return wanted


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def _hint(names: Sequence[str]) -> str:
    if any(name in HEADS for name in names):
        return "set tie_word_embeddings in the config.json of the one that leaves it out"
    return "merge models of one class: save them with save_pretrained of the same class"


def _common_spec(everyone: Sequence[Checkpoint], first: Checkpoint, name: str) -> TensorSpec:
    """What the result's tensor is like: that of ``first``."""
    wanted = first.weights.specs[name]
    for each in everyone:
        own = each.weights.specs[name]
        if own.shape != wanted.shape:
            raise InputError(
                f"{each.label} holds {name} as {list(own.shape)} and {first.label} as {list(wanted.shape)}",
                hint="vocabularies differ: give both the same tokens first"
                if "embed" in name or name in HEADS
                else "only models trained from one base can be merged",
            )
        if (own.dtype in FLOATS) != (wanted.dtype in FLOATS):
            raise InputError(f"{each.label} holds {name} as {own.dtype} and {first.label} as {wanted.dtype}")
        if own.dtype not in FLOATS and not np.array_equal(each.weights.raw(name), first.weights.raw(name)):
            raise InputError(
                f"{each.label} and {first.label} hold different {name}, which is {wanted.dtype} and no weight",
                hint="make it the same in all of them",
            )
    return wanted


def stored_spec(spec: TensorSpec, dtype: Dtype | None) -> TensorSpec:
    """A tensor as the result stores it: a float as ``dtype`` says, or as it is held if results can be."""
    if spec.dtype not in FLOATS:
        return spec
    return TensorSpec(spec.name, dtype.safetensors if dtype else stored_dtype(spec.dtype), spec.shape)


def model_files(first: Checkpoint, dtype: Dtype | None) -> dict[str, bytes | Path]:
    """The configuration, tokenizer and generation settings of a model that is stored as ``dtype``."""
    config = dict(first.config)
    for key in _DTYPE_KEYS:
        if dtype is not None and key in config:
            config[key] = _TORCH_NAMES[dtype]
        elif str(config.get(key)).startswith("float8"):
            config[key] = _TORCH_NAMES[Dtype.BF16]
    files: dict[str, bytes | Path] = dict(tokenizer_files(first.directory))
    files[CONFIG] = json.dumps(config, indent=2).encode() + b"\n"
    return files


def _notes(everyone: Sequence[Checkpoint], first: Checkpoint, specs: Mapping[str, TensorSpec]) -> list[str]:
    notes = []
    for each in everyone:
        if heads := [name for name in HEADS if each.tied and name in each.weights.specs]:
            notes.append(f"{each.label} stores {heads[0]}, which it shares with its embeddings: left out")
        if not _same_tokenizer(each, first):
            notes.append(f"{each.label} has another tokenizer than {first.label}, whose is kept")
    dtypes = {each.weights.specs[name].dtype for each in everyone for name in specs} & FLOATS
    if dtypes & FLOAT8:
        notes.append("eight-bit floats are read as they are, without scales; what is merged is kept as BF16")
    if len(dtypes) > 1:
        notes.append(f"inputs are stored as {', '.join(sorted(dtypes))}; arithmetic is float32")
    return notes


def _same_tokenizer(one: Checkpoint, other: Checkpoint) -> bool:
    def vocabulary(model: Checkpoint) -> Any:
        path = tokenizer_files(model.directory).get("tokenizer.json")
        return json.loads(path.read_bytes()).get("model") if path else None

    mine, theirs = vocabulary(one), vocabulary(other)
    return mine is None or theirs is None or mine == theirs
