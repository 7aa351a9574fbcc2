"""Full modules in a resident base: the weights of its transformer blocks, exchanged in place.

The model's parameters hold one path at a time. A named slot keeps the arrays of its path in the host's memory, by
reference, so that paths which share a module share its bytes; activating a slot copies in what differs from
what the parameters hold. The unnamed slot keeps nothing: a worker that trains has no second copy of its path.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from weft.common.anatomy import Anatomy
from weft.common.base import base_tensors
from weft.common.modules import TensorSpec
from weft.common.recipe import Recipe

Float32Array = npt.NDArray[np.float32]


@dataclass(slots=True)
class _Slot:
    """A path that can be activated again."""

    recipe: Recipe
    """Of its run."""
    tensors: dict[str, Float32Array]
    """The path's, by name."""


class Blocks:
    """Exchanges the weights of a model's blocks.

    Args:
        model: On its device, in float32, with the base's weights.
        anatomy: Of the model.
        base_dir: Where the base's weights can be read again.
    """

    def __init__(self, model: Any, anatomy: Anatomy, base_dir: Path) -> None:
        self._model = model
        self._anatomy = anatomy
        self._base_dir = base_dir
        self._parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        self._slots: dict[str, _Slot] = {}
        self._active = ""
        self._holds: dict[str, Float32Array] = {}
        """Arrays of the active named slot whose values the parameters still have."""
        self._trained: set[str] = set()
        """Names of parameters that may have been trained since the active path was put in."""
        self._changed: set[str] = set()
        """Names of parameters that may differ from the base's."""
        self._bare: dict[str, Tensor] = {}
        """The base's own weights of changed parameters, on the device, read when they were first asked for."""

    def compose(
        self, recipe: Recipe, tensors: Mapping[str, Float32Array], slot: str, rank: int
    ) -> dict[str, nn.Parameter]:
        """Put a path's weights in; return its parameters. Raises as ``ResidentBase.compose``."""
        if rank:
            raise ValueError("full modules have no rank")
        parameters = self._of_path(recipe)
        check_fit(tensors, parameters)
        self._leave()
        self._restore(self._changed - parameters.keys())
        self._put(tensors)
        self._active = slot
        self._holds = dict(tensors) if slot else {}
        if slot:
            self._slots[slot] = _Slot(recipe, dict(tensors))
        return parameters

    def activate(self, recipe: Recipe, slot: str) -> dict[str, nn.Parameter]:
        """Put the weights of a named slot in; raises ValueError when it was not composed for this run."""
        if slot not in self._slots or self._slots[slot].recipe != recipe:
            raise ValueError(f"nothing of {recipe.run} was composed as {slot!r}")
        if slot == self._active:
            return self._of_path(recipe)
        return self.compose(recipe, self._slots[slot].tensors, slot, 0)

    def drop(self, slot: str) -> None:
        """Forget a named slot; its weights stay in the model until the next path is put in."""
        self._slots.pop(slot, None)
        if slot == self._active:
            self._active = ""
            self._holds = {}

    def trains(self, names: Collection[str]) -> None:
        """Hear which of the active path's parameters are about to be trained."""
        self._trained.update(names)

    def bare_hidden(self, **inputs: Any) -> Tensor:
        """The base model's last hidden state [B, T, d] with the base's own weights."""
        inner = self._model.base_model
        prefix = f"{self._model.base_model_prefix}."
        own = {name.removeprefix(prefix): tensor for name, tensor in self._bare_weights(prefix).items()}
        hidden: Tensor = torch.func.functional_call(inner, own, (), inputs).last_hidden_state
        return hidden

    def folded(self) -> Any:
        """The model as it is, which holds its path already."""
        return self._model

    def _of_path(self, recipe: Recipe) -> dict[str, nn.Parameter]:
        names = self._anatomy.full_levels(recipe.topology, num_labels=recipe.task.num_labels)
        return {name: self._parameters[name] for name in names}

    def _bare_weights(self, prefix: str) -> dict[str, Tensor]:
        # A head is not part of the base model, and new where the base has none.
        changed = {name for name in self._changed if name.startswith(prefix)}
        for name, array in self._of_base(changed - self._bare.keys()).items():
            self._bare[name] = torch.from_numpy(array).to(self._parameters[name].device)
        return {name: self._bare[name] for name in changed}

    def _leave(self) -> None:
        """Take what was trained in a named slot back into it, so that activating it again finds it."""
        if self._active and self._trained:
            kept = self._slots[self._active].tensors
            kept.update({name: _host_copy(self._parameters[name]) for name in self._trained})
        for name in self._trained:
            self._holds.pop(name, None)
        self._trained.clear()
        self._active = ""

    def _restore(self, names: Collection[str]) -> None:
        """Give parameters that belong to no module of the coming path the base's weights again."""
        copy_into(self._of_base(names), self._parameters)
        self._changed.difference_update(names)

    def _put(self, tensors: Mapping[str, Float32Array]) -> None:
        new = {name: array for name, array in tensors.items() if self._holds.get(name) is not array}
        self._changed.update(new)
        copy_into(new, self._parameters)

    def _of_base(self, names: Collection[str]) -> dict[str, Float32Array]:
        specs = [TensorSpec(name, "F32", tuple(self._parameters[name].shape)) for name in sorted(names)]
        return base_tensors(self._base_dir, specs) if specs else {}


def check_fit(tensors: Mapping[str, Float32Array], parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError unless there is an array of the right shape for each parameter, and no other."""
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())
        raise ValueError(f"{len(odd)} tensors are missing or unknown, for example {odd[0]}")
    for name, parameter in parameters.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(f"{name} has shape {tensors[name].shape}, not {tuple(parameter.shape)}")


def copy_into(tensors: Mapping[str, Float32Array], parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy arrays into the parameters of their names."""
    with torch.no_grad():
        for name, array in tensors.items():
            # A copy first: arrays that are views of a mapped file are read-only, which torch warns of.
            parameters[name].copy_(torch.from_numpy(np.array(array, np.float32)))


def _host_copy(parameter: nn.Parameter) -> Float32Array:
    array: Float32Array = parameter.detach().to("cpu", copy=True).numpy()
    return array
