"""LoRA adapters: what is refused, and the units of their merge (``adapter_units``)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final

from weft.common.errors import InputError, UsageError
from weft.common.modules import TensorSpec
from weft.server.merge.rule import Scope
from weft.server.merge.rules import RULES
from weft.server.merge.settings import Clip, LoraSpace, MergeRuleName
from weft.server.offline.adapter_units import DenseLayer, LinearLayer, Part, WholeAdapter, factor_names
from weft.server.offline.checkpoints import model_files
from weft.server.offline.inputs import (
    ADAPTER_CONFIG,
    BASE_FOLDER,
    OWN_BASE,
    PREFIX,
    Adapter,
    Checkpoint,
    tokenizer_files,
)
from weft.server.offline.plan import Plan
from weft.server.offline.recipe import Choice, Dtype, LoraMode, Recipe, is_module_wide
from weft.server.offline.residual import ResidualLayer, base_specs, check_base, kept_units, weight_name
from weft.server.offline.sources import FLOATS, stored_dtype
from weft.server.offline.units import (
    Coordinates,
    Source,
    Unit,
    refuse_device,
)

_SELECTION: Final = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Keys of adapter_config.json that narrow target_modules down."""


def plan_adapters(
    adapters: Sequence[Adapter], base: Checkpoint | None, recipe: Recipe, *, device: str
) -> Plan:
    """The merge of adapters.

    Raises:
        InputError: They do not fit together.
        UsageError: Options that do not go with each other.
    """
    if recipe.onto is not None:
        raise UsageError("onto is for models, and the inputs are adapters", hint="remove --onto")
    choice = recipe.uniform
    if choice is None:
        raise UsageError(
            "parameters that differ by layer are for models", hint="merge adapters with a recipe"
        )
    notes = [*_check_bases(adapters, any_base=recipe.any_base), *_check_layers(adapters)]
    mode = lora_mode(adapters, choice, recipe)
    ranks = [layer.rank for each in adapters for layer in each.layers.values()]
    rank = recipe.rank or _default_rank(adapters, mode)
    if mode is LoraMode.EXACT and _weighs_adapters(choice) and rank < max(ranks):
        raise UsageError(
            f"rule {choice.settings.rule} keeps at least the inputs' rank {max(ranks)}, and rank is {rank}",
            hint="leave --rank out",
        )
    notes.append(f"lora: {mode.value}, rank {rank}")
    others, copied = _other_units(adapters, base, recipe)
    specs = [_stored(spec, recipe.dtype, adapters) for spec in _result_specs(adapters, rank)]
    plan = Plan(
        units=tuple(others),
        specs=(*specs, *copied),
        stem="adapter_model",
        files=_files(adapters, rank, base_name=adapters[0].base_name),
        notes=tuple(notes),
        library="peft",
        base_name=adapters[0].base_name,
    )
    if mode is LoraMode.RESIDUAL:
        refuse_device(device, RULES[choice.settings.rule].name)
        changed = check_base(base, adapters, _layer_names(adapters))
        return _with_residual(plan, adapters, changed, choice, recipe, rank=rank)
    units = _layer_units(adapters, recipe, choice, mode, rank, device=device)
    return dataclasses.replace(plan, units=(*units, *others))


def _with_residual(
    plan: Plan, adapters: Sequence[Adapter], base: Checkpoint, choice: Choice, recipe: Recipe, *, rank: int
) -> Plan:
    """A plan with the layers, and the base that they belong to in a folder of the result."""
    names = _layer_names(adapters)
    of_base = base_specs(base, recipe.dtype)
    stored = {spec.name: spec.dtype for spec in (*plan.specs, *of_base)}
    layers = [
        ResidualLayer(
            name=name,
            parts=_parts(adapters, name),
            choice=recipe.choose(name, 0),
            rank=rank,
            base=base.weights,
            base_label=base.label,
            stored=stored,
        )
        for name in names
    ]
    files = {f"{BASE_FOLDER}/{name}": content for name, content in model_files(base, recipe.dtype).items()}
    return dataclasses.replace(
        plan,
        units=(*layers, *kept_units(base, of_base, names, choice), *plan.units),
        files=files | _files(adapters, rank, base_name=OWN_BASE),
        notes=(*plan.notes, *_residual_notes(adapters, {stored[weight_name(name)] for name in names})),
        base_name="",
        loses="rounding of the base",
        base_specs=of_base,
    )


def _residual_notes(adapters: Sequence[Adapter], dtypes: Collection[str]) -> list[str]:
    old = adapters[0].base_name or "the old one"
    notes = [
        f"load the adapter onto the model in its folder {BASE_FOLDER}, never onto {old}",
        f"{ADAPTER_CONFIG} names {OWN_BASE}, which PEFT finds by itself from within the result's directory only",
    ]
    if narrow := sorted(set(dtypes) - {"F32"}):
        notes.append(
            f"the base is stored as {' and '.join(narrow)}, "
            "whose last bit can be larger than a residual: --dtype fp32 keeps all of it"
        )
    return notes


def lora_mode(adapters: Sequence[Adapter], choice: Choice, recipe: Recipe) -> LoraMode:
    """The mode that was asked for, or that the rule is right with; raises UsageError if they do not go together."""
    rule = RULES[choice.settings.rule]
    exact = LoraSpace.EXACT in rule.spaces
    mode = recipe.lora or (LoraMode.EXACT if exact else LoraMode.DENSE)
    if mode is not LoraMode.EXACT and rule.scope is Scope.MATRIX:
        raise UsageError(
            f"lora is {mode.value}, and rule {rule.name} works on ΔW by its factors", hint="use --lora exact"
        )
    if (mode is LoraMode.EXACT and not exact) or (mode is LoraMode.STACK and not rule.linear):
        raise UsageError(
            f"lora is {mode.value}, and rule {rule.name} is not linear in ΔW", hint="use --lora dense"
        )
    if mode is LoraMode.STACK and (rule.choose or is_module_wide(choice.settings)):
        raise UsageError(
            f"lora is stack, and rule {rule.name} with these settings weighs by distances or norms",
            hint="use --lora exact",
        )
    if mode is LoraMode.STACK and recipe.rank:
        raise UsageError("with stack the rank is the sum of the inputs'", hint="remove --rank")
    if mode is LoraMode.DENSE and is_module_wide(choice.settings):
        raise UsageError(
            f"rule {rule.name} with these settings weighs whole adapters, which dense ΔW is not kept for",
            hint="use --lora exact" if rule.linear else "use --lora factors",
        )
    if mode is LoraMode.FACTORS:
        _check_factors(adapters, recipe)
    if mode is LoraMode.RESIDUAL:
        _check_residual(choice, recipe)
    return mode


def _weighs_adapters(choice: Choice) -> bool:
    """Whether ΔW is merged by more than given coefficients, so that the engine has to see all of the inputs."""
    rule = RULES[choice.settings.rule]
    clipped = choice.settings.clip is not Clip.NONE
    return rule.choose is not None or rule.scope is Scope.MATRIX or clipped


def _check_factors(adapters: Sequence[Adapter], recipe: Recipe) -> None:
    if recipe.rank:
        raise UsageError("A and B apart keep their rank", hint="remove --rank, or use --lora exact")
    first = adapters[0]
    for each in adapters:
        if {name: layer.rank for name, layer in each.layers.items()} != {
            name: layer.rank for name, layer in first.layers.items()
        }:
            raise UsageError(
                f"{each.label} and {first.label} have different layers or ranks: their factors cannot be merged apart",
                hint="use --lora exact or dense",
            )


def _check_residual(choice: Choice, recipe: Recipe) -> None:
    rule = choice.settings.rule
    if rule is not MergeRuleName.MEAN or choice.settings.clip is not Clip.NONE:
        said = f"rule {rule}" if rule is not MergeRuleName.MEAN else "clipping"
        raise UsageError(
            f"lora is residual, which is what a mean of factors gets wrong, and {said} is no mean",
            hint="use --lora factors or dense, or rule mean by itself",
        )
    if recipe.rank:
        raise UsageError("A and B keep their rank, the base takes the rest", hint="remove --rank")


def _default_rank(adapters: Sequence[Adapter], mode: LoraMode) -> int:
    names = _layer_names(adapters)
    by_layer = [[each.layers[name].rank for each in adapters if name in each.layers] for name in names]
    return max(sum(ranks) if mode is LoraMode.STACK else max(ranks) for ranks in by_layer)


def _layer_names(adapters: Sequence[Adapter]) -> list[str]:
    return sorted({name for each in adapters for name in each.layers})


def _check_bases(adapters: Sequence[Adapter], *, any_base: bool) -> list[str]:
    first = adapters[0]
    for each in adapters:
        if bool(each.config.get("fan_in_fan_out")) != bool(first.config.get("fan_in_fan_out")):
            raise InputError(f"{each.label} and {first.label} differ in fan_in_fan_out")
        if each.base_name != first.base_name and not any_base:
            raise InputError(
                f"{each.label} is for {each.base_name!r} and {first.label} for {first.base_name!r}",
                hint="if these are one model under two names, add --any-base",
            )
    names = {each.base_name for each in adapters}
    return (
        [f"the inputs name {len(names)} bases; the result names {first.base_name}"] if len(names) > 1 else []
    )


def _check_layers(adapters: Sequence[Adapter]) -> list[str]:
    names = _layer_names(adapters)
    for name in names:
        shapes = {each.layers[name].shape: each.label for each in adapters if name in each.layers}
        if len(shapes) > 1:
            (one, here), (other, there) = list(shapes.items())[:2]
            raise InputError(
                f"{here} adapts {name} as {list(one)} and {there} as {list(other)}",
                hint="only adapters of one base can be merged",
            )
    return [
        f"{each.label} adapts {len(each.layers)} of {len(names)} layers; its ΔW of the others is 0"
        for each in adapters
        if len(each.layers) < len(names)
    ]


def _layer_units(
    adapters: Sequence[Adapter], recipe: Recipe, choice: Choice, mode: LoraMode, rank: int, *, device: str
) -> list[Unit]:
    if mode is LoraMode.FACTORS or (mode is LoraMode.EXACT and _weighs_adapters(choice)):
        space = LoraSpace.FACTORS if mode is LoraMode.FACTORS else LoraSpace.EXACT
        settings = dataclasses.replace(choice.settings, lora=space)
        if any(recipe.choose(name, 0) is not choice for name in _layer_names(adapters)):
            raise UsageError(
                f"rule {choice.settings.rule} merges adapters as one here, and layers are taken one by one",
                hint="use --lora exact, and a rule such as mean for the other layers",
            )
        specs = tuple(sorted(_result_specs(adapters, rank)))
        whole = dataclasses.replace(choice, settings=settings)
        refuse_device(device, RULES[choice.settings.rule].name)
        return [WholeAdapter(name="factors", adapters=tuple(adapters), choice=whole, specs=specs, rank=rank)]
    units: list[Unit] = []
    for name in _layer_names(adapters):
        parts = _parts(adapters, name)
        own = recipe.choose(name, 0)
        if mode is LoraMode.DENSE and not own.whole:
            units.append(DenseLayer(name=name, parts=parts, choice=own, rank=rank, device=device))
        else:
            stacked = mode is LoraMode.STACK
            units.append(
                LinearLayer(name=name, parts=parts, choice=own, rank=rank, stacked=stacked, device=device)
            )
    return units


def _parts(adapters: Sequence[Adapter], layer: str) -> tuple[Part, ...]:
    return tuple(
        Part(place, each.label, each.weights, each.layers[layer])
        for place, each in enumerate(adapters)
        if layer in each.layers
    )


def _result_specs(adapters: Sequence[Adapter], rank: int) -> list[TensorSpec]:
    specs = []
    for name in _layer_names(adapters):
        o, i = next(each.layers[name].shape for each in adapters if name in each.layers)
        a_name, b_name = factor_names(name)
        specs += [TensorSpec(a_name, "F32", (rank, i)), TensorSpec(b_name, "F32", (o, rank))]
    return specs


def _stored(spec: TensorSpec, dtype: Dtype | None, adapters: Sequence[Adapter]) -> TensorSpec:
    first = next(iter(adapters[0].layers.values())).a.dtype
    return TensorSpec(spec.name, dtype.safetensors if dtype else stored_dtype(first), spec.shape)


def _other_units(
    adapters: Sequence[Adapter], base: Checkpoint | None, recipe: Recipe
) -> tuple[list[Unit], list[TensorSpec]]:
    """Tensors that adapters replace whole, such as classifier heads: merged as those of models are."""
    names = sorted({name for each in adapters for name in each.others})
    units: list[Unit] = []
    specs = []
    for name in names:
        spec = _other_spec(adapters, name)
        choice = recipe.choose(name, 0)
        moves = recipe.relative and not (choice.whole and any(choice.weights))
        source = _base_source(base, name, spec) if moves else None
        if moves and source is None:
            raise UsageError(
                f"the adapters replace {name}, and rule {choice.settings.rule} needs the base's",
                hint="add --base DIR of a base that has it, or use rule mean",
            )
        sources = tuple(Source(each.label, each.weights, {}) for each in adapters)
        units.append(
            Coordinates(
                name=name,
                specs=(TensorSpec(name, "F32", spec.shape),),
                sources=sources,
                base=source,
                onto=source,
                choice=choice,
            )
        )
        specs.append(_stored(spec, recipe.dtype, adapters))
    return units, specs


def _other_spec(adapters: Sequence[Adapter], name: str) -> TensorSpec:
    for each in adapters:
        if name not in each.others:
            raise InputError(
                f"{each.label} lacks {name}, which other inputs replace", hint="leave modules_to_save alike"
            )
        spec = each.others[name]
        if spec.shape != adapters[0].others[name].shape or spec.dtype not in FLOATS:
            raise InputError(
                f"{each.label} holds {name} as {spec.dtype} {list(spec.shape)}, unlike the others"
            )
    return adapters[0].others[name]


def _base_source(base: Checkpoint | None, name: str, spec: TensorSpec) -> Source | None:
    own = name.removeprefix(PREFIX)
    held = base.weights.specs.get(own) if base is not None else None
    if base is None or held is None or held.shape != spec.shape:
        return None
    return Source(base.label, base.weights, {name: own})


def _files(adapters: Sequence[Adapter], rank: int, *, base_name: str) -> dict[str, bytes | Path]:
    config: dict[str, Any] = dict(adapters[0].config)
    config.update(
        base_model_name_or_path=base_name or None,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        inference_mode=True,
    )
    if any(each.layers.keys() != adapters[0].layers.keys() for each in adapters):
        # Their full names: what selects the layers of one adapter does not select those of all.
        config |= dict.fromkeys(_SELECTION) | {"target_modules": _layer_names(adapters)}
    files: dict[str, bytes | Path] = dict(tokenizer_files(adapters[0].directory))
    files[ADAPTER_CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    return files
