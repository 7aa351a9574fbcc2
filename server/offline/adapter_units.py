"""The pieces that a merge of LoRA adapters is made of: layers, or all of them.

An adapter stands for ΔW = scaling · B A of each layer it adapts, and for 0 elsewhere. Scalings, which alpha,
rsLoRA and patterns make different, are folded in as factors are read; the result has scaling 1. What a rule
is applied to is the **mode**:

* ``exact``: Σ κ_i s_i B_i A_i by stacked factors, recompressed to a rank without forming it (``merge.lora``).
  For rules that are linear, that come down to weights by distances of ΔW, or that see matrices whole.
* ``dense``: any rule, on the ΔW of one layer after the other. A layer's result is dense for a moment and then
  truncated to a rank; the inputs' ΔW are only ever formed a few rows at a time.
* ``stack``: [κ_1 s_1 B_1 …] [A_1; …], exact at a rank that is the sum of the inputs' (FLoRA, arXiv 2409.05976).
* ``factors``: any rule on A's and B's apart, for adapters that began with the same A (FedIT, arXiv 2305.05644).
  Arithmetic turns and multiplies B only: of both, minus times minus would be plus (arXiv 2306.14870, section 3).
* ``residual``: the means of A's and B's, and what that gets wrong in the base (``residual``).

Legend: o = out_features, i = in_features, r = rank of an input, R = rank of the result, n = stacked rank.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import scipy.linalg
import torch

from weft.common.modules import LORA_A, LORA_B, Schema, TensorSpec
from weft.server.merge import lora
from weft.server.merge.crew import Crew
from weft.server.merge.rules import RULES
from weft.server.merge.settings import LoraSpace
from weft.server.merge.tiles import OWN, Arrays, Float32, Sink, Tiles
from weft.server.offline.inputs import PREFIX, Adapter, Layer
from weft.server.offline.recipe import Choice
from weft.server.offline.sources import Movement, Weights, Zeros, is_finite, not_finite
from weft.server.offline.units import (
    Loss,
    Store,
    Undivided,
    Unit,
    copy_start,
    merge_coordinates,
)

_BLOCK_ELEMENTS: Final = 1 << 15
"""ΔW is formed in blocks of rows of about this size, always the same: products depend on the shape by a bit."""
_SEPARATE: Final = 1e-7
"""Singular values below this share of the largest are what the Gram matrix lost to rounding."""


# -- factors as they are read ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter's share of a layer."""

    place: int
    """Its place among the inputs."""
    label: str
    """What it is called."""
    weights: Weights
    """Its tensors."""
    layer: Layer
    """Its factors."""

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


def coefficients(choice: Choice) -> list[float]:
    """What multiplies each input's ΔW under a linear rule."""
    linear = RULES[choice.settings.rule].linear
    assert linear is not None  # noqa: S101
    total = math.fsum(abs(weight) for weight in choice.weights)
    count = sum(weight != 0 for weight in choice.weights)
    multiple = linear(count, choice.settings.parameters) * choice.multiple
    return [multiple * weight / total if total else 0.0 for weight in choice.weights]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayer(Undivided):
    """One layer of Σ κ_i ΔW_i, recompressed to a rank or stacked."""

    name: str
    """Of the layer in the base."""
    parts: tuple[Part, ...]
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
        return read_names(self.parts)

    def merge(self, store: Store, crew: Crew) -> Loss:
        """Write A and B of rank R."""
        kappas = coefficients(self.choice)
        factors = [part.factors(torch.device(self.device)) for part in self.parts]
        scaled = [each.B_or * kappas[part.place] for part, each in zip(self.parts, factors, strict=True)]
        left_on, right_ni = torch.cat(scaled, dim=1), torch.cat([each.A_ri for each in factors])
        if self.stacked:
            write_factors(store, self.name, lora.Factors(left_on, right_ni), self.rank)
            return Loss()
        near_ri = self._average(factors, right_ni)
        done = lora.recompress(left_on, right_ni, near_ri=near_ri)
        write_factors(store, self.name, done.factors, self.rank)
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


def read_names(parts: Sequence[Part]) -> tuple[tuple[str, Weights, str], ...]:
    """(input, its tensors, name of one) of all factors."""
    return tuple(
        (part.label, part.weights, spec.name) for part in parts for spec in (part.layer.a, part.layer.b)
    )


def factor_names(layer: str) -> tuple[str, str]:
    """Names of A and B in an adapter's file."""
    return f"{PREFIX}{layer}{LORA_A}", f"{PREFIX}{layer}{LORA_B}"


def write_factors(sink: Sink, layer: str, factors: lora.Factors, rank: int) -> None:
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

    def __init__(self, part: Part) -> None:
        factors = part.factors(torch.device("cpu"))
        self._B_or, self._A_ri = factors.B_or.float(), factors.A_ri.float()
        self._rows = max(1, _BLOCK_ELEMENTS // self._A_ri.shape[1])
        self._edges = threading.local()

    def tile(self, _name: str, start: int, stop: int) -> Float32:
        """Elements ``start:stop`` of ΔW in C order, float32 [stop − start]; the next of any takes its place."""
        width = self._A_ri.shape[1]
        length, size = self._rows * width, len(self._B_or) * width
        tile = OWN.scratch.take("dense", stop - start, np.float32)
        for block in range(start // length, -(-stop // length)):
            begin, end = block * length, min((block + 1) * length, size)
            first, last = max(start, begin), min(stop, end)
            part = tile[first - start : last - start]
            if (first, last) == (begin, end):
                torch.mm(self._rows_of(block), self._A_ri, out=torch.from_numpy(part).view(-1, width))
            else:
                part[:] = self._edge(block)[first - begin : last - begin]
        return tile

    def _edge(self, block: int) -> Float32:
        """A block of which tiles take parts; whole ones too are computed as one, so that all round alike."""
        if getattr(self._edges, "block", None) != block:
            self._edges.values = torch.mm(self._rows_of(block), self._A_ri).view(-1).numpy()
            self._edges.block = block
        values: Float32 = self._edges.values
        return values

    def _rows_of(self, block: int) -> torch.Tensor:
        return self._B_or[block * self._rows : (block + 1) * self._rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLayer(Undivided):
    """One layer: a rule on the ΔW of each adapter, then the best factors of a rank."""

    name: str
    """Of the layer in the base."""
    parts: tuple[Part, ...]
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
        return read_names(self.parts)

    def merge(self, store: Store, crew: Crew) -> Loss:
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
        merge_coordinates(updates, Zeros(), schema, merged, choice=self.choice, crew=crew)
        delta_oi = torch.from_numpy(merged.arrays[self.name]).to(self.device)
        factors, loss = truncate(delta_oi, min(self.rank, o, i))
        write_factors(store, self.name, factors, self.rank)
        return loss


def truncate(delta_oi: torch.Tensor, rank: int) -> tuple[lora.Factors, Loss]:
    """The best factors of a rank of a dense matrix (Eckart-Young), as long as each other.

    From the largest eigenvectors of the smaller Gram matrix, in float64: a fraction of the cost of an SVD, and
    as exact for what is kept.
    """
    wide = delta_oi.shape[0] <= delta_oi.shape[1]
    short_sl = delta_oi.double() if wide else delta_oi.double().T
    gram_ss = short_sl @ short_sl.T
    total = float(gram_ss.trace())
    squares_k, vectors_sk = _largest(gram_ss, rank)
    kept_k, left_sk = squares_k.flip(0).clamp(min=0), vectors_sk.flip(1)
    lengths_k = kept_k.sqrt()
    used_k = lengths_k > _SEPARATE * lengths_k[0]
    roots_k = torch.where(used_k, lengths_k.sqrt(), 1.0)
    right_kl = torch.where(used_k[:, None], (left_sk.T @ short_sl) / roots_k[:, None], 0.0)
    left_sk = torch.where(used_k, left_sk * roots_k, 0.0)
    factors = lora.Factors(left_sk, right_kl) if wide else lora.Factors(right_kl.T, left_sk.T)
    return factors, Loss(max(0.0, total - float(kept_k.sum())), total)


def _largest(gram_ss: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues, ascending, and their vectors."""
    if gram_ss.is_cuda:  # torch finds all or none
        squares, vectors_ss = torch.linalg.eigh(gram_ss)
        return squares[-count:], vectors_ss[:, -count:]
    s = len(gram_ss)
    squares, vectors = scipy.linalg.eigh(
        gram_ss.numpy(), subset_by_index=(s - count, s - 1), overwrite_a=True, check_finite=False
    )
    return torch.from_numpy(squares), torch.from_numpy(vectors)


# -- factors, coordinate by coordinate ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scaled:
    """An adapter's factors by the result's names, the scaling folded into B, padded with zeros to a rank."""

    adapter: Adapter
    rank: int
    multiple: float = 1.0
    """What B is multiplied by."""

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
        rows[:, : layer.rank] = own.reshape(-1, layer.rank) * np.float32(layer.scaling * self.multiple)
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

    @property
    def splits(self) -> bool:
        """The engine writes tensors and layers straight into the store."""
        return True

    def merge(self, store: Store, crew: Crew) -> Loss:
        """Write all factors."""
        if not any(self.choice.weights):
            return copy_start(self.specs, Zeros(), store)
        updates = [
            Movement(
                _Scaled(each, self.rank, math.copysign(self.choice.multiple, weight)),
                label=each.label,
                place=place,
                weight=abs(weight),
            )
            for place, (each, weight) in enumerate(zip(self.adapters, self.choice.weights, strict=True))
        ]
        choice = dataclasses.replace(self.choice, multiple=1.0)
        report = merge_coordinates(updates, Zeros(), Schema(self.specs), store, choice=choice, crew=crew)
        return Loss(report.truncation_error**2, 1.0) if report.lora is LoraSpace.EXACT else Loss()
