"""How a node works: what its operator gave as ``--node-config``, or what a simulation says of a client."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from weft.common.errors import RunFileError, UsageError
from weft.common.settings import from_table

FLOWERS_OWN: Final = frozenset({"partition-id", "num-partitions"})
"""Keys that Flower adds to a node's configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """One node's settings; paths are absolute, or relative to where the SuperNode was started."""

    data: str = ""
    """The training data: a file or a directory. Empty where only runs that give their data are served."""
    base: str = ""
    """Directory of the base; empty uses this machine's cache or the Hub. It never comes through Flower."""
    state: str = ""
    """Where this node keeps its key and its training state; empty takes one below WEFT_HOME."""
    name: str = ""
    """Display name; empty takes the host's."""
    coordinator: str = ""
    """Pin of the coordinator to work for, hex; empty takes the first that asks, and no other after it."""
    device: str = ""
    """cpu, cuda or mps; empty finds the best."""
    dtype: str = ""
    """Of the frozen base: float32 or bfloat16; empty takes what the device does best."""
    quantise: str = ""
    """4bit, or empty."""
    threads: int = 0
    """CPU threads; 0 leaves it to torch."""
    rank: int = 0
    """Largest LoRA rank to train; 0 for any that fits into memory."""
    idle_minutes: float = 30.0
    """The resident trainer leaves after this long without a message."""

    def __post_init__(self) -> None:
        if not 0 < self.idle_minutes <= 1e6:
            raise UsageError("idle_minutes is how long the trainer stays, more than 0")


def read_settings(config: Mapping[str, object]) -> NodeSettings:
    """Settings from a node's configuration; ``idle-minutes`` and ``idle_minutes`` are the same.

    Raises:
        UsageError: A key is unknown or a value is wrong.
    """
    table = {key.replace("-", "_"): value for key, value in config.items() if key not in FLOWERS_OWN}
    try:
        return from_table(NodeSettings, table, where="node-config")
    except RunFileError as error:
        known = ", ".join(field.name for field in fields(NodeSettings))
        raise UsageError(f"--node-config: {error.message}", hint=f"known: {known}") from error
