"""Adapters merged factor by factor, and what that gets wrong folded into the base (FedEx, arXiv 2410.09432).

The mean of A's and the mean of B's has the inputs' rank, and is not the mean of the BA's. The difference,

    ΔW_res = Σ κ_i s_i B_i A_i − B̄ Ā,

has a rank of its own, too high for an adapter, but a base can take it: base + ΔW_res under (B̄, Ā) computes
what base + Σ κ_i s_i B_i A_i does. Since B̄ = Σ κ_i s_i B_i, it is

    ΔW_res = Σ κ_i s_i B_i (A_i − Ā),

which is exactly 0 where all A's are the same, and loses nothing to cancellation elsewhere.

Row p of Ā is the mean over the inputs that adapt the layer with a rank beyond p: where ranks and layers are the
same, over all. A row that only one input has is that input's own, and adds nothing to the residual.

Legend: o = out_features, i = in_features, r = rank, n = stacked rank, b = rows of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from weft.common.errors import InputError, UsageError
from weft.common.modules import TensorSpec
from weft.server.merge.crew import Crew
from weft.server.merge.lora import Factors, product_square_sum
from weft.server.offline.adapter_units import Part, coefficients, factor_names, read_names, write_factors
from weft.server.offline.checkpoints import stored_spec
from weft.server.offline.inputs import HEADS, PREFIX, Adapter, Checkpoint
from weft.server.offline.recipe import Choice, Dtype
from weft.server.offline.sources import FLOATS, Weights
from weft.server.offline.units import Coordinates, Copied, Loss, Source, Store, Undivided, Unit

_BLOCK_ELEMENTS: Final = 1 << 16
"""The base is read and written in blocks of rows of about this size, always the same."""
_ROUNDED: Final = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def weight_name(layer: str) -> str:
    """Name of a linear layer's weight in the files of the base."""
    return f"{layer}.weight"


def check_base(base: Checkpoint | None, adapters: Sequence[Adapter], layers: Sequence[str]) -> Checkpoint:
    """The base that residuals of layers can be folded into.

    Raises:
        InputError: It does not have what the adapters adapt, as they adapt it.
        UsageError: There is none.
    """
    if base is None:
        raise UsageError("lora residual changes the base, and none is given", hint="add --base DIR")
    for each in adapters:
        if each.config.get("fan_in_fan_out"):
            raise InputError(
                f"{each.label} has fan_in_fan_out: its base keeps weights the other way round",
                hint="use --lora stack, which is exact without touching the base",
            )
    for name in base.weights.specs:
        if name.startswith(PREFIX):
            raise InputError(f"the base holds {name}, which is an adapter's", hint="give the base by itself")
    for layer in layers:
        _check_weight(
            base, layer, next(each.layers[layer].shape for each in adapters if layer in each.layers)
        )
    return base


def _check_weight(base: Checkpoint, layer: str, shape: tuple[int, int]) -> None:
    name = weight_name(layer)
    if base.tied and name in HEADS:
        raise InputError(
            f"the adapters adapt {layer}, which the base shares with its embeddings",
            hint="use --lora stack, which is exact without touching the base",
        )
    spec = base.weights.specs.get(name)
    if spec is None:
        raise InputError(
            f"the adapters adapt {layer}, and the base has no {name}",
            hint="save the base with save_pretrained, by the class that the adapters were trained with",
        )
    if spec.shape != shape or spec.dtype not in FLOATS:
        raise InputError(
            f"the adapters adapt {layer} as {list(shape)}, and the base holds {spec.dtype} {list(spec.shape)}",
            hint="give the base that the adapters were trained on",
        )


def base_specs(base: Checkpoint, dtype: Dtype | None) -> tuple[TensorSpec, ...]:
    """All tensors of the new base, in their order."""
    return tuple(stored_spec(spec, dtype) for spec in base.weights.specs.values())


def kept_units(
    base: Checkpoint, specs: Sequence[TensorSpec], layers: Sequence[str], choice: Choice
) -> list[Unit]:
    """The tensors of the base that no adapter touches: byte for byte, unless another dtype is asked for."""
    adapted = {weight_name(layer) for layer in layers}
    source = Source(base.label, base.weights, {})
    nothing = dataclasses.replace(choice, weights=())
    units: list[Unit] = []
    for spec in specs:
        if spec.name in adapted:
            continue
        if spec.dtype == base.weights.specs[spec.name].dtype:
            units.append(Copied(name=spec.name, sources=(source,)))
        else:
            own = TensorSpec(spec.name, "F32", spec.shape)
            units.append(
                Coordinates(name=spec.name, specs=(own,), sources=(), base=None, onto=source, choice=nothing)
            )
    return units


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidualLayer(Undivided):
    """One layer: the means of its factors, and its weight in the base with the residual."""

    name: str
    """Of the layer in the base."""
    parts: tuple[Part, ...]
    """Adapters that have it."""
    choice: Choice
    """The weights of the mean."""
    rank: int
    """That factors are padded to."""
    base: Weights
    """What holds the layer's weight."""
    base_label: str
    """What it is called."""
    stored: Mapping[str, str]
    """Dtype that each of the outputs is stored as."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """A, B and the weight."""
        return (*factor_names(self.name), weight_name(self.name))

    @property
    def num_elements(self) -> int:
        """Of ΔW."""
        return self.base.specs[weight_name(self.name)].size

    @property
    def reads(self) -> tuple[tuple[str, Weights, str], ...]:
        """The factors and the weight."""
        return (*read_names(self.parts), (self.base_label, self.base, weight_name(self.name)))

    def merge(self, store: Store, crew: Crew) -> Loss:
        """Write A, B and the weight; lost is what rounding the weight to its dtype lost."""
        kappas = coefficients(self.choice)
        scaled = []
        for part in self.parts:
            factors = part.factors(torch.device("cpu"))
            scaled.append(Factors(factors.B_or * kappas[part.place], factors.A_ri))
        mean = mean_factors(scaled, [abs(self.choice.weights[part.place]) for part in self.parts])
        write_factors(store, self.name, mean, self.rank)
        left_on, right_ni = self._residual(scaled, mean)
        lefts, rights = [each.B_or for each in scaled], [each.A_ri for each in scaled]
        total = product_square_sum(torch.cat(lefts, dim=1), torch.cat(rights))
        return Loss(self._fold(left_on, right_ni, store), total)

    def _residual(self, scaled: Sequence[Factors], mean: Factors) -> tuple[torch.Tensor, torch.Tensor]:
        """ΔW_res as [o, n] and [n, i], of the mean factors as they are stored."""
        a_name, b_name = factor_names(self.name)
        stored_a_ri = _rounded(mean.A_ri, self.stored[a_name])
        lefts = [each.B_or for each in scaled]
        rights = [each.A_ri - stored_a_ri[: len(each.A_ri)] for each in scaled]
        if self.stored[b_name] != "F32":
            # What B loses when it is stored is large beside a residual, unless that is the last bit of float32.
            lefts.append(mean.B_or - _rounded(mean.B_or, self.stored[b_name]))
            rights.append(stored_a_ri)
        return torch.cat(lefts, dim=1), torch.cat(rights)

    def _fold(self, left_on: torch.Tensor, right_ni: torch.Tensor, store: Store) -> float:
        """Write base + left @ right a few rows at a time; the square sum of what rounding lost."""
        o, i = left_on.shape[0], right_ni.shape[1]
        name, rows, lost = weight_name(self.name), max(1, _BLOCK_ELEMENTS // i), 0.0
        for first in range(0, o, rows):
            change_bi = left_on[first : first + rows] @ right_ni
            start, stop = first * i, first * i + change_bi.numel()
            exact = torch.from_numpy(np.array(self.base.tile(name, start, stop))).double()
            if change_bi.any():  # else it stays as it is, to the sign of a zero
                exact += change_bi.view(-1)
            store.write(name, start, exact.float().numpy())
            lost += float((_rounded(exact, self.stored[name]) - exact).square().sum())
        return lost


def mean_factors(scaled: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """B̄ = Σ κ_i s_i B_i and Ā, row by row the weighted mean of those that have the row.

    Args:
        scaled: κ_i s_i B_i and A_i, float64, each of its own rank.
        weights: What each A counts for, at least 0.
    """
    first = scaled[0]
    r = max(len(each.A_ri) for each in scaled)
    b_or = first.B_or.new_zeros((first.B_or.shape[0], r))
    anchor_ri, total_r = first.A_ri.new_zeros((r, first.A_ri.shape[1])), first.A_ri.new_zeros(r)
    for each, weight in reversed(list(zip(scaled, weights, strict=True))):
        k = len(each.A_ri)
        b_or[:, :k] += each.B_or
        anchor_ri[:k] = each.A_ri
        total_r[:k] += weight
    # From one of them on, so that the mean of equal rows is that row to the last bit.
    a_ri = anchor_ri.clone()
    for each, weight in zip(scaled, weights, strict=True):
        k = len(each.A_ri)
        share_r = torch.where(total_r[:k] > 0, weight / total_r[:k], 0.0)
        a_ri[:k] += share_r[:, None] * (each.A_ri - anchor_ri[:k])
    return Factors(b_or, a_ri)


def _rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """As they are read again once they are stored, float64."""
    return values.float().to(_ROUNDED[dtype]).double()
