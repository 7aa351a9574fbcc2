"""LoRA adapters: what is refused, and the units of their merge.

An adapter stands for ΔW = scaling · B A of each layer it adapts, and for 0 elsewhere. Scalings, which alpha,
rsLoRA and patterns make different, are folded in as factors are read; the result has scaling 1. What a rule
is applied to is the **mode**:

* ``exact``: Σ κ_i s_i B_i A_i by stacked factors, recompressed to a rank without forming it (``merge.lora``).
  For rules that are linear, or that come down to weights by distances of ΔW.
* ``dense``: any rule, on the ΔW of one layer after the other. A layer's result is dense for a moment and then
  truncated to a rank; the inputs' ΔW are only ever formed a few rows at a time.
* ``stack``: [κ_1 s_1 B_1 …] [A_1; …], exact at a rank that is the sum of the inputs' (FLoRA, arXiv 2409.05976).
* ``factors``: any rule on A's and B's apart, for adapters that began with the same A (FedIT, arXiv 2305.05644).

Legend: o = out_features, i = in_features, r = rank of an input, R = rank of the result, n = stacked rank.
"""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from weft.common.errors import InputError, UsageError
from weft.common.modules import LORA_A, LORA_B, Schema, TensorSpec
from weft.server.merge import lora
from weft.server.merge.rules import RULES
from weft.server.merge.settings import LoraSpace
from weft.server.merge.tiles import Arrays, Float32, Sink, Tiles
from weft.server.offline.inputs import ADAPTER_CONFIG, PREFIX, Adapter, Checkpoint, Layer, tokenizer_files
from weft.server.offline.plan import Plan
from weft.server.offline.recipe import Choice, Dtype, LoraMode, Recipe
from weft.server.offline.sources import FLOATS, WHOLE, Movement, Weights, Zeros, is_finite, not_finite
from weft.server.offline.units import (
    Coordinates,
    Loss,
    Source,
    Store,
    Unit,
    is_module_wide,
    merge_coordinates,
    refuse_device,
)

_BLOCK_ELEMENTS: Final = 1 << 16
"""ΔW is formed in blocks of rows of about this size, always the same: products depend on the shape by a bit."""
_SELECTION: Final = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Keys of adapter_config.json that narrow target_modules down."""
_SEPARATE: Final = 1e-7
"""Singular values below this share of the largest are what the Gram matrix lost to rounding."""


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
    if mode is LoraMode.EXACT and RULES[choice.settings.rule].choose and rank < max(ranks):
        raise UsageError(
            f"rule {choice.settings.rule} keeps at least the inputs' rank {max(ranks)}, and rank is {rank}",
            hint="leave --rank out",
        )
    units = _layer_units(adapters, choice, mode, rank, device=device)
    others, copied = _other_units(adapters, base, recipe, choice)
    specs = [_stored(spec, recipe.dtype, adapters) for spec in _result_specs(adapters, rank)]
    return Plan(
        units=(*units, *others),
        specs=(*specs, *copied),
        stem="adapter_model",
        files=_files(adapters, rank),
        notes=(*notes, f"lora: {mode.value}, rank {rank}"),
        library="peft",
        base_name=adapters[0].base_name,
    )


def lora_mode(adapters: Sequence[Adapter], choice: Choice, recipe: Recipe) -> LoraMode:
    """The mode that was asked for, or that the rule is right with; raises UsageError if they do not go together."""
    rule = RULES[choice.settings.rule]
    mode = recipe.lora or (LoraMode.EXACT if rule.linear else LoraMode.DENSE)
    if mode in (LoraMode.EXACT, LoraMode.STACK) and not rule.linear:
        raise UsageError(
            f"lora is {mode.value}, and rule {rule.name} is not linear in ΔW", hint="use --lora dense"
        )
    if mode is LoraMode.STACK and rule.choose:
        raise UsageError(f"lora is stack, and rule {rule.name} weighs by distances", hint="use --lora exact")
    if mode is LoraMode.STACK and recipe.rank:
        raise UsageError("with stack the rank is the sum of the inputs'", hint="remove --rank")
    if mode is LoraMode.DENSE and is_module_wide(choice.settings):
        raise UsageError(
            f"rule {rule.name} with these settings weighs whole adapters, which dense ΔW is not kept for",
            hint="use --lora exact" if rule.linear else "use --lora factors",
        )
    if mode is LoraMode.FACTORS:
        _check_factors(adapters, choice, recipe)
    return mode


def _check_factors(adapters: Sequence[Adapter], choice: Choice, recipe: Recipe) -> None:
    if recipe.rank or any(weight < 0 for weight in choice.weights):
        raise UsageError(
            "A and B apart keep their rank, and cannot be subtracted: a product of two minuses is a plus",
            hint="use --lora exact",
        )
    first = adapters[0]
    for each in adapters:
        if {name: layer.rank for name, layer in each.layers.items()} != {
            name: layer.rank for name, layer in first.layers.items()
        }:
            raise UsageError(
                f"{each.label} and {first.label} have different layers or ranks: their factors cannot be merged apart",
                hint="use --lora exact or dense",
            )


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


# -- factors as they are read ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Part:
    """One adapter's share of a layer."""

    place: int
    """Its place among the inputs."""
    label: str
    weights: Weights
    layer: Layer

    def factors(self, device: torch.device) -> lora.Factors:
        """B with the scaling folded in, and A; float64."""
        return lora.Factors(
            self._tensor(self.layer.b, device) * self.layer.scaling,
            self._tensor(self.layer.a, device),
        )

    def _tensor(self, spec: TensorSpec, device: torch.device) -> torch.Tensor:
        values = self.weights.tile(spec.name, 0, spec.size)
        if not is_finite(values):
            raise not_finite(self.label, spec.name, 0, values)
        tensor = torch.empty(spec.shape, dtype=torch.float64)
        tensor.view(-1).numpy()[:] = values
        return tensor.to(device)


def _coefficients(choice: Choice) -> list[float]:
    """What multiplies each input's ΔW under a linear rule."""
    linear = RULES[choice.settings.rule].linear
    assert linear is not None  # noqa: S101
    total = math.fsum(abs(weight) for weight in choice.weights)
    count = sum(weight != 0 for weight in choice.weights)
    multiple = linear(count, choice.settings.parameters) * choice.multiple
    return [multiple * weight / total if total else 0.0 for weight in choice.weights]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayer:
    """One layer of Σ κ_i ΔW_i, recompressed to a rank or stacked."""

    name: str
    """Of the layer in the base."""
    parts: tuple[_Part, ...]
    """Adapters that have it."""
    choice: Choice
    """How."""
    rank: int
    """R."""
    stacked: bool
    """The factors themselves, one above the other."""
    device: str
    """Where the linear algebra runs: cpu or cuda."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """A and B."""
        return factor_names(self.name)

    @property
    def num_elements(self) -> int:
        """Of the factors that are stacked."""
        return sum(part.layer.a.size + part.layer.b.size for part in self.parts)

    @property
    def reads(self) -> tuple[tuple[str, Weights, str], ...]:
        """The factors."""
        return _reads(self.parts)

    def sample(self, num_elements: int) -> Unit:
        """All of it."""
        return self

    def merge(self, store: Store, *, threads: int) -> Loss:
        """Write A and B of rank R."""
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return self._merge(store)
        finally:
            torch.set_num_threads(before)

    def _merge(self, store: Store) -> Loss:
        coefficients = _coefficients(self.choice)
        factors = [part.factors(torch.device(self.device)) for part in self.parts]
        scaled = [
            each.B_or * coefficients[part.place] for part, each in zip(self.parts, factors, strict=True)
        ]
        left_on, right_ni = torch.cat(scaled, dim=1), torch.cat([each.A_ri for each in factors])
        if self.stacked:
            _write_factors(store, self.name, lora.Factors(left_on, right_ni), self.rank)
            return Loss()
        near_ri = self._average(factors, right_ni)
        done = lora.recompress(left_on, right_ni, near_ri=near_ri)
        _write_factors(store, self.name, done.factors, self.rank)
        return Loss(done.lost_square_sum, done.total_square_sum)

    def _average(self, factors: Sequence[lora.Factors], right_ni: torch.Tensor) -> torch.Tensor:
        """The inputs' mean A at the result's rank, [min(R, i, o), i]: what the new A stays near to."""
        rank = min(self.rank, *self.parts[0].layer.shape)
        near_ri = right_ni.new_zeros((rank, right_ni.shape[1]))
        weights = [abs(self.choice.weights[part.place]) for part in self.parts]
        total = math.fsum(weights) or 1.0
        for weight, each in zip(weights, factors, strict=True):
            rows = min(rank, len(each.A_ri))
            near_ri[:rows] += each.A_ri[:rows] * (weight / total)
        return near_ri


def _reads(parts: Sequence[_Part]) -> tuple[tuple[str, Weights, str], ...]:
    return tuple(
        (part.label, part.weights, spec.name) for part in parts for spec in (part.layer.a, part.layer.b)
    )


def factor_names(layer: str) -> tuple[str, str]:
    """Names of A and B in an adapter's file."""
    return f"{PREFIX}{layer}{LORA_A}", f"{PREFIX}{layer}{LORA_B}"


def _write_factors(sink: Sink, layer: str, factors: lora.Factors, rank: int) -> None:
    """Write factors, padded with zeros to the rank."""
    k, (o, i) = factors.A_ri.shape[0], (factors.B_or.shape[0], factors.A_ri.shape[1])
    a_values, b_values = np.zeros((rank, i), np.float32), np.zeros((o, rank), np.float32)
    a_values[:k], b_values[:, :k] = factors.A_ri.cpu().numpy(), factors.B_or.cpu().numpy()
    a_name, b_name = factor_names(layer)
    sink.write(a_name, 0, a_values.reshape(-1))
    sink.write(b_name, 0, b_values.reshape(-1))


# -- any rule on ΔW ----------------------------------------------------------------------------------------


class _Dense:
    """One adapter's ΔW of a layer, formed as it is read, float32."""

    def __init__(self, part: _Part) -> None:
        factors = part.factors(torch.device("cpu"))
        self._B_or, self._A_ri = factors.B_or.float(), factors.A_ri.float()
        self._rows = max(1, _BLOCK_ELEMENTS // self._A_ri.shape[1])
        self._local = threading.local()

    def tile(self, _name: str, start: int, stop: int) -> Float32:
        """Elements ``start:stop`` of ΔW in C order, float32 [stop − start]."""
        length = self._rows * self._A_ri.shape[1]
        tile = np.empty(stop - start, np.float32)
        for block in range(start // length, -(-stop // length)):
            values = self._block(block)
            first, last = max(start, block * length), min(stop, block * length + len(values))
            tile[first - start : last - start] = values[first - block * length : last - block * length]
        return tile

    def _block(self, block: int) -> Float32:
        if getattr(self._local, "block", None) != block:
            rows = self._B_or[block * self._rows : (block + 1) * self._rows]
            self._local.values = (rows @ self._A_ri).reshape(-1).numpy()
            self._local.block = block
        values: Float32 = self._local.values
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLayer:
    """One layer: a rule on the ΔW of each adapter, then the best factors of a rank."""

    name: str
    """Of the layer in the base."""
    parts: tuple[_Part, ...]
    """Adapters that have it."""
    choice: Choice
    """How."""
    rank: int
    """R."""
    device: str
    """Where the linear algebra runs: cpu or cuda."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """A and B."""
        return factor_names(self.name)

    @property
    def num_elements(self) -> int:
        """Of ΔW."""
        return math.prod(self.parts[0].layer.shape)

    @property
    def reads(self) -> tuple[tuple[str, Weights, str], ...]:
        """The factors."""
        return _reads(self.parts)

    def sample(self, num_elements: int) -> Unit:
        """All of it."""
        return self

    def merge(self, store: Store, *, threads: int) -> Loss:
        """Write A and B of rank R."""
        o, i = self.parts[0].layer.shape
        merged = Arrays({self.name: np.zeros((o, i), np.float32)})
        held: dict[int, Tiles] = {part.place: _Dense(part) for part in self.parts}
        labels = {part.place: part.label for part in self.parts}
        updates = [
            Movement(
                held.get(place, Zeros()),
                label=labels.get(place, ""),
                place=place,
                weight=weight,
                checked=False,
            )
            for place, weight in enumerate(self.choice.weights)
        ]
        schema = Schema((TensorSpec(self.name, "F32", (o, i)),))
        merge_coordinates(updates, Zeros(), schema, merged, choice=self.choice, threads=threads)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            delta_oi = torch.from_numpy(merged.arrays[self.name]).to(self.device)
            factors, loss = truncate(delta_oi, min(self.rank, o, i))
        finally:
            torch.set_num_threads(before)
        _write_factors(store, self.name, factors, self.rank)
        return loss


def truncate(delta_oi: torch.Tensor, rank: int) -> tuple[lora.Factors, Loss]:
    """The best factors of a rank of a dense matrix (Eckart-Young), as long as each other.

    From the eigenvectors of the smaller Gram matrix, in float64: a fraction of the cost of an SVD, and as
    exact for what is kept, the largest.
    """
    wide = delta_oi.shape[0] <= delta_oi.shape[1]
    short_sl = delta_oi.double() if wide else delta_oi.double().T
    squares, vectors_ss = torch.linalg.eigh(short_sl @ short_sl.T)
    total = float(squares.clamp(min=0).sum())
    kept_k = squares[-rank:].flip(0).clamp(min=0)
    left_sk = vectors_ss[:, -rank:].flip(1)
    lengths_k = kept_k.sqrt()
    used_k = lengths_k > _SEPARATE * lengths_k[0]
    roots_k = torch.where(used_k, lengths_k.sqrt(), 1.0)
    right_kl = torch.where(used_k[:, None], (left_sk.T @ short_sl) / roots_k[:, None], 0.0)
    left_sk = torch.where(used_k, left_sk * roots_k, 0.0)
    factors = lora.Factors(left_sk, right_kl) if wide else lora.Factors(right_kl.T, left_sk.T)
    return factors, Loss(max(0.0, total - float(kept_k.sum())), total)


# -- factors, coordinate by coordinate ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scaled:
    """An adapter's factors by the result's names, the scaling folded into B, padded with zeros to a rank."""

    adapter: Adapter
    rank: int

    def tile(self, name: str, start: int, stop: int) -> Float32:
        """Elements ``start:stop`` of A [R, i] or B [o, R]."""
        layer = self.adapter.layers.get(_layer_of(name))
        if layer is None:
            return Zeros().tile(name, start, stop)
        if name.endswith(LORA_A):
            held = min(stop, layer.a.size)
            values = self.adapter.weights.tile(layer.a.name, min(start, held), held)
            return np.concatenate([values, np.zeros(stop - start - len(values), np.float32)])
        return self._b_tile(layer, start, stop)

    def _b_tile(self, layer: Layer, start: int, stop: int) -> Float32:
        first, last = start // self.rank, -(-stop // self.rank)
        rows = np.zeros((last - first, self.rank), np.float32)
        own = self.adapter.weights.tile(layer.b.name, first * layer.rank, last * layer.rank)
        rows[:, : layer.rank] = own.reshape(-1, layer.rank) * np.float32(layer.scaling)
        return rows.reshape(-1)[start - first * self.rank : stop - first * self.rank]


def _layer_of(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(LORA_A).removesuffix(LORA_B)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeAdapter:
    """All factors at once, by the engine: A and B apart, or rules that weigh adapters by distances of ΔW."""

    name: str
    """What the journal calls it."""
    adapters: tuple[Adapter, ...]
    """The inputs."""
    choice: Choice
    """How; ``settings.lora`` says in which space."""
    specs: tuple[TensorSpec, ...]
    """Factors of the result."""
    rank: int
    """R."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """All factors."""
        return tuple(spec.name for spec in self.specs)

    @property
    def num_elements(self) -> int:
        """Of all factors."""
        return sum(spec.size for spec in self.specs)

    @property
    def reads(self) -> tuple[tuple[str, Weights, str], ...]:
        """All factors of all inputs."""
        return tuple(
            (each.label, each.weights, spec.name)
            for each in self.adapters
            for layer in each.layers.values()
            for spec in (layer.a, layer.b)
        )

    def sample(self, num_elements: int) -> Unit:
        """All of it."""
        return self

    def merge(self, store: Store, *, threads: int) -> Loss:
        """Write all factors."""
        updates = [
            Movement(_Scaled(each, self.rank), label=each.label, place=place, weight=weight)
            for place, (each, weight) in enumerate(zip(self.adapters, self.choice.weights, strict=True))
        ]
        report = merge_coordinates(
            updates, Zeros(), Schema(self.specs), store, choice=self.choice, threads=threads
        )
        return Loss(report.truncation_error**2, 1.0) if report.lora is LoraSpace.EXACT else Loss()


# -- units, files ------------------------------------------------------------------------------------------


def _layer_units(
    adapters: Sequence[Adapter], choice: Choice, mode: LoraMode, rank: int, *, device: str
) -> list[Unit]:
    if mode is LoraMode.FACTORS or (mode is LoraMode.EXACT and RULES[choice.settings.rule].choose):
        space = LoraSpace.FACTORS if mode is LoraMode.FACTORS else LoraSpace.EXACT
        settings = dataclasses.replace(choice.settings, lora=space)
        specs = tuple(sorted(_result_specs(adapters, rank)))
        whole = dataclasses.replace(choice, settings=settings)
        refuse_device(device, RULES[choice.settings.rule].name)
        return [WholeAdapter(name="factors", adapters=tuple(adapters), choice=whole, specs=specs, rank=rank)]
    units: list[Unit] = []
    for name in _layer_names(adapters):
        parts = tuple(
            _Part(place, each.label, each.weights, each.layers[name])
            for place, each in enumerate(adapters)
            if name in each.layers
        )
        if mode is LoraMode.DENSE:
            units.append(
                DenseLayer(
                    name=name,
                    parts=parts,
                    choice=choice,
                    rank=rank,
                    device=device,
                )
            )
        else:
            stacked = mode is LoraMode.STACK
            units.append(
                LinearLayer(name=name, parts=parts, choice=choice, rank=rank, stacked=stacked, device=device)
            )
    return units


def _result_specs(adapters: Sequence[Adapter], rank: int) -> list[TensorSpec]:
    specs = []
    for name in _layer_names(adapters):
        o, i = next(each.layers[name].shape for each in adapters if name in each.layers)
        a_name, b_name = factor_names(name)
        specs += [TensorSpec(a_name, "F32", (rank, i)), TensorSpec(b_name, "F32", (o, rank))]
    return specs


def _stored(spec: TensorSpec, dtype: Dtype | None, adapters: Sequence[Adapter]) -> TensorSpec:
    first = next(iter(adapters[0].layers.values())).a.dtype
    kept = first if first in WHOLE else "F32"
    return TensorSpec(spec.name, dtype.safetensors if dtype else kept, spec.shape)


def _other_units(
    adapters: Sequence[Adapter], base: Checkpoint | None, recipe: Recipe, choice: Choice
) -> tuple[list[Unit], list[TensorSpec]]:
    """Tensors that adapters replace whole, such as classifier heads: merged as those of models are."""
    names = sorted({name for each in adapters for name in each.others})
    units: list[Unit] = []
    specs = []
    for name in names:
        spec = _other_spec(adapters, name)
        source = _base_source(base, name, spec) if recipe.relative else None
        if recipe.relative and source is None:
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


def _files(adapters: Sequence[Adapter], rank: int) -> dict[str, bytes | Path]:
    config: dict[str, Any] = dict(adapters[0].config)
    config.update(
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
