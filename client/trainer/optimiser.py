"""AdamW over modules, its state in and out as plain arrays, so that it can rest in a tensor file between tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from weft.common.composition import to_numpy
from weft.common.ids import ModuleKey
from weft.common.recipe import InnerSettings

Float32Array = npt.NDArray[np.float32]
OptimiserState = Mapping[str, Float32Array]
"""Of one module: ``exp_avg/NAME`` and ``exp_avg_sq/NAME`` in the tensor's shape, ``step/NAME`` of shape [1]."""
_MOMENTS: Final = ("exp_avg", "exp_avg_sq")


class ModuleOptimiser:
    """AdamW with one learning rate a module.

    Args:
        modules: Parameters by module and name; float32 leaves that get gradients.
        inner: Decay rates, weight decay and the norm at which gradients are clipped.
    """

    def __init__(self, modules: Mapping[ModuleKey, Mapping[str, nn.Parameter]], inner: InnerSettings) -> None:
        self._modules = modules
        self._grad_norm_max = inner.grad_norm_max
        self._parameters = [parameter for module in modules.values() for parameter in module.values()]
        device = self._parameters[0].device.type
        self._adamw = torch.optim.AdamW(
            [{"params": list(module.values())} for module in modules.values()],
            lr=inner.learning_rate,
            betas=(inner.beta1, inner.beta2),
            weight_decay=inner.weight_decay,
            fused=device in {"cuda", "cpu"},
        )

    def step(self, learning_rates: Mapping[ModuleKey, float]) -> None:
        """Clip the gradients' norm over all modules, update, and clear the gradients."""
        for key, group in zip(self._modules, self._adamw.param_groups, strict=True):
            group["lr"] = learning_rates[key]
        nn.utils.clip_grad_norm_(self._parameters, self._grad_norm_max)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)

    def restore(self, states: Mapping[ModuleKey, OptimiserState]) -> None:
        """Go on from states that ``state`` returned; modules without one start afresh."""
        for key, module in self._modules.items():
            if state := states.get(key):
                for name, parameter in module.items():
                    self._adamw.state[parameter] = _restored(state, name, parameter)

    def state(self) -> dict[ModuleKey, dict[str, Float32Array]]:
        """Copies of the moments and step counts of each module."""
        return {key: self._module_state(module) for key, module in self._modules.items()}

    def _module_state(self, module: Mapping[str, nn.Parameter]) -> dict[str, Float32Array]:
        arrays: dict[str, Float32Array] = {}
        for name, parameter in module.items():
            state = self._adamw.state[parameter]
            for moment in _MOMENTS:
                arrays[f"{moment}/{name}"] = to_numpy(state[moment])
            arrays[f"step/{name}"] = to_numpy(state["step"].reshape(1))
        return arrays


def _restored(state: OptimiserState, name: str, parameter: nn.Parameter) -> dict[str, Any]:
    restored: dict[str, Any] = {}
    for moment in _MOMENTS:
        array = state[f"{moment}/{name}"]
        if array.shape != parameter.shape:
            raise ValueError(f"{moment}/{name} has shape {array.shape}, not {tuple(parameter.shape)}")
        restored[moment] = torch.from_numpy(np.array(array, np.float32)).to(parameter.device)
    # A fused AdamW counts its steps on the device.
    restored["step"] = torch.tensor(float(state[f"step/{name}"][0]), device=parameter.device)
    return restored
