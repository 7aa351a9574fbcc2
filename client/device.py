"""The hardware of a worker: which device, which arithmetic, whether a run fits, and how fast it goes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from weft.client.trainer.training import Trainer
from weft.common.base import num_base_parameters
from weft.common.composition import Quantisation, read_config
from weft.common.errors import OutOfMemory
from weft.common.ids import ModuleKey
from weft.common.recipe import Recipe

_4BIT_BYTES: Final = 0.6
"""Per parameter: half a byte of NF4, its scales, and layers that are not quantised."""
_ACTIVATION_BYTES: Final = 40
"""Per token, layer and hidden unit: what a transformer block keeps for its backward pass in 16 bits (34 without
the attention matrix, arXiv 2205.05198, section 4.1) and the adapters' inputs."""
_LOGIT_BYTES: Final = 12
"""Per token and vocabulary entry: logits, their float32 copy and the gradient."""
_SPARE: Final = 1.1
_GIB: Final = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a worker computes."""

    torch_device: torch.device
    """As PyTorch names it."""
    dtype: torch.dtype
    """Of the frozen base."""
    name: str
    """Of the hardware, for people."""

    def describe(self) -> str:
        """One line, such as ``cpu: 2 threads, fp32``."""
        arithmetic = "bf16" if self.dtype == torch.bfloat16 else "fp32"
        return f"{self.torch_device.type}: {self.name}, {arithmetic}"


def find_device() -> Device:
    """The best device here: CUDA (bf16 where the hardware has it), else Apple's MPS, else the CPU, both fp32."""
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Device(
            torch_device=torch.device("cuda", torch.cuda.current_device()),
            dtype=torch.bfloat16 if has_bf16 else torch.float32,
            name=torch.cuda.get_device_name(),
        )
    if torch.backends.mps.is_available():
        return Device(torch_device=torch.device("mps"), dtype=torch.float32, name="Apple GPU")
    threads = torch.get_num_threads()
    name = f"{threads} thread{'s' * (threads != 1)}"
    return Device(torch_device=torch.device("cpu"), dtype=torch.float32, name=name)


def needed_bytes(
    base_dir: Path, recipe: Recipe, *, dtype: torch.dtype, quantise: Quantisation, num_shares: int = 1
) -> int:
    """Roughly what any training over the base takes at the least: its weights, and one sequence on its way.

    A batch goes through in pieces as small as they must be. What is trained is not counted. A base divided among
    processes takes its share, and what is gathered: two blocks (the next one comes while one is used), and what is
    outside of all blocks.
    """
    config = read_config(base_dir, recipe.task).get_text_config()
    bytes_per_parameter = _4BIT_BYTES if quantise == "4bit" else float(dtype.itemsize)
    num_tokens = recipe.inner.sequence_length
    activations = num_tokens * config.num_hidden_layers * config.hidden_size * _ACTIVATION_BYTES
    logits = num_tokens * (recipe.task.num_labels or config.vocab_size) * _LOGIT_BYTES
    num_held = num_parameters = num_base_parameters(base_dir)
    if num_shares > 1:
        num_outside = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
        num_gathered = num_outside + 2 * max(0, num_parameters - num_outside) // config.num_hidden_layers
        num_held = num_parameters // num_shares + num_gathered
    total = num_held * bytes_per_parameter + activations * dtype.itemsize / 2 + logits
    return int(total * _SPARE)


def available_bytes(device: torch.device) -> int | None:
    """Memory that the device has free, or None where it does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [value for value in (_system_bytes(), _container_bytes()) if value is not None]
    return min(found, default=None)


def check_memory(needed: int, available: int | None, *, quantise: Quantisation) -> None:
    """Raise OutOfMemory when a run would not fit, before minutes are spent on loading it."""
    if available is None or needed <= available:
        return
    smaller = "" if quantise == "4bit" else "; on CUDA --quantise 4bit takes about a quarter"
    smaller += ", --processes N --shard-base an N-th" if smaller else ""
    raise OutOfMemory(
        f"the run needs about {needed / _GIB:.1f} GiB and {available / _GIB:.1f} GiB are free",
        hint=f"free memory, or use a machine with more{smaller}",
    )


def measure_speed(
    trainer: Trainer,
    start: Mapping[str, npt.NDArray[np.float32]],
    keys: frozenset[ModuleKey],
    *,
    num_steps: int = 4,
) -> float:
    """Tokens per second of training, from a few steps whose result is thrown away."""

    def timed(count: int) -> float:
        began = trainer.clock()
        result = trainer.train(
            start,
            dict.fromkeys(keys, 0),
            num_steps=count,
            first_batch=0,
            optimiser_states={},
            on_step=lambda report: False,
        )
        return result.num_tokens / max(trainer.clock() - began, 1e-9)

    timed(1)  # memory is taken and kernels are chosen in the first step
    return timed(num_steps)


def _system_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container_bytes(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group (version 2) leaves, or None without a limit."""
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        # Cached file pages count as used and are given up on demand.
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("inactive_file", 0))
