"""The recipe: the part of a run file that workers follow, signed by the coordinator.

A recipe is declarative: numbers and names from fixed lists, never code. A worker reads it with the same strict
reader as the operator's file, so that nothing outside these classes can reach the trainer.
"""

from __future__ import annotations

import enum
import math
import re
from dataclasses import dataclass, field
from typing import Final

from weft.common.codec import CodecSettings
from weft.common.errors import UsageError
from weft.common.ids import Digest, RunId, digest, run_id
from weft.common.modules import Topology

RECIPE_TYPE: Final = "application/vnd.weft.recipe+json"
"""DSSE payload type of a signed recipe."""
_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class TaskKind(enum.StrEnum):
    """What the model learns."""

    CAUSAL_LM = "causal-lm"
    SEQUENCE_CLASSIFICATION = "sequence-classification"


class Schedule(enum.StrEnum):
    """How the learning rate moves within a module's whole history."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


def _check(key: str, value: float, low: float, high: float, example: str) -> None:
    if not (math.isfinite(value) and low <= value <= high):
        raise UsageError(f"{key} is {value}", hint=f"use {low:g} to {high:g}, for example {example}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """What the model learns."""

    kind: TaskKind = TaskKind.CAUSAL_LM
    """causal-lm or sequence-classification."""
    num_labels: int = 0
    """Number of classes; only for sequence-classification."""
    prefix_tokens: int = 0
    """First tokens of each document that are read and neither learnt nor counted: 32 where documents are routed."""

    def __post_init__(self) -> None:
        _check("task.prefix_tokens", self.prefix_tokens, 0, 4096, "32")
        if self.kind is TaskKind.SEQUENCE_CLASSIFICATION and not 2 <= self.num_labels <= 100_000:
            raise UsageError(
                f"task.num_labels is {self.num_labels}", hint="sequence-classification needs at least 2"
            )
        if self.kind is TaskKind.CAUSAL_LM and self.num_labels:
            raise UsageError(
                "task.num_labels is set for causal-lm",
                hint='remove it, or set task.kind = "sequence-classification"',
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class InnerSettings:
    """The training that a worker does between two merges (AdamW)."""

    steps: int = 50
    """Optimiser steps of one task."""
    batch_size: int = 8
    """Sequences per step."""
    sequence_length: int = 128
    """Tokens per sequence."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Schedule = Schedule.CONSTANT
    """constant, cosine or linear over steps × rounds.count of the module."""
    warmup_steps: int = 0
    """Steps of linear warm-up, counted from the module's first."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    beta1: float = 0.9
    """AdamW's first moment decay."""
    beta2: float = 0.999
    """AdamW's second moment decay."""
    grad_norm_max: float = 1.0
    """Gradients are clipped to this norm."""
    seed: int = 0
    """Seed of version 0 and of the order of the data."""

    def __post_init__(self) -> None:
        _check("inner.steps", self.steps, 1, 1_000_000, "50")
        _check("inner.batch_size", self.batch_size, 1, 65_536, "8")
        _check("inner.sequence_length", self.sequence_length, 8, 1_048_576, "128")
        _check("inner.learning_rate", self.learning_rate, 1e-9, 10, "1e-3")
        _check("inner.warmup_steps", self.warmup_steps, 0, 1_000_000, "10")
        _check("inner.weight_decay", self.weight_decay, 0, 10, "0.01")
        _check("inner.beta1", self.beta1, 0, 0.9999, "0.9")
        _check("inner.beta2", self.beta2, 0, 0.999999, "0.999")
        _check("inner.grad_norm_max", self.grad_norm_max, 1e-6, 1e6, "1.0")
        _check("inner.seed", self.seed, 0, 2**31 - 1, "0")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseFile:
    """One file of the base."""

    name: str
    """A plain file name; a base has no folders."""
    size_bytes: int
    """Exact size."""
    digest: str
    """BLAKE3-256 of its bytes."""

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.name):
            raise UsageError(f"{self.name!r} is not a base file's name")
        if self.size_bytes < 0:
            raise UsageError(f"{self.name} has a negative size")
        digest(self.digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class BasePin:
    """The frozen base, pinned by the digest of its files."""

    digest: Digest
    """BLAKE3-256 over the canonical list of files."""
    hub_id: str = ""
    """Where else it can be had: a Hugging Face Hub id, or empty."""
    revision: str = ""
    """The Hub's revision, or empty."""
    files: tuple[BaseFile, ...] = ()
    """The files that the digest covers, sorted by name."""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class FisherSettings:
    """The empirical diagonal Fisher that a worker computes when the merge rule asks for it."""

    num_examples: int = 0
    """Sequences it is taken over; 0 when the rule does not need it."""


class RoutingMode(enum.StrEnum):
    """Whose the documents are, and who sends them to their paths."""

    NONE = "none"
    GIVEN = "given"
    LOCAL = "local"


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSettings:
    """How documents come to paths, as far as workers take part in it."""

    mode: RoutingMode = RoutingMode.NONE
    """none: every path learns from all of a worker's data; given: the coordinator sends a path's shard with the task;
    local: a worker routes its own documents with the coordinator's router and tells how many each path gets."""
    overlap: int = 1
    """How many paths a training document belongs to: its best n."""
    validation_share: float = 0.05
    """Share of a path's documents that is held out where they lie, for evaluation tasks and early stopping."""
    reroute_tokens: int = 0
    """At inference, choose the path anew every so many tokens; 0 keeps the prompt's."""

    def __post_init__(self) -> None:
        _check("routing.overlap", self.overlap, 1, 64, "1")
        _check("routing.validation_share", self.validation_share, 0, 0.5, "0.05")
        _check("routing.reroute_tokens", self.reroute_tokens, 0, 1_000_000, "64")


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowUplink:
    """What a worker sends that is behind a slow line."""

    below_mbit_s: float
    """A worker whose uplink was measured below this many Mbit/s uses the codec of this table."""
    codec: CodecSettings
    """How it encodes its updates."""

    def __post_init__(self) -> None:
        _check("slow_uplink.below_mbit_s", self.below_mbit_s, 0.001, 1e6, "20")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamingSettings:
    """Streaming fragments (arXiv 2501.18512): all of a path's modules train, some of them are sent at a time."""

    overlap_steps: int = 5
    """Steps that a worker goes on training while an update is sent and new versions come in; 0 waits."""
    mixing: float = 0.5
    """Share of the worker's own parameters in what it goes on with when a new version comes in."""

    def __post_init__(self) -> None:
        _check("streaming.overlap_steps", self.overlap_steps, 0, 10_000, "5")
        _check("streaming.mixing", self.mixing, 0, 1, "0.5")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything a worker has to know of a run."""

    run: RunId
    """The run's name."""
    base: BasePin
    """The frozen base."""
    task: TaskSettings = TaskSettings()
    """What the model learns."""
    topology: Topology = Topology()
    """Modules and paths."""
    inner: InnerSettings = InnerSettings()
    """How a worker trains."""
    codec: CodecSettings = field(default_factory=CodecSettings)
    """How an update is encoded."""
    slow_uplink: SlowUplink | None = None
    """What workers behind a slow line send instead."""
    fisher: FisherSettings = FisherSettings()
    """Statistics sent beside the update."""
    routing: RoutingSettings = RoutingSettings()
    """How documents come to paths."""
    streaming: StreamingSettings | None = None
    """Fragments and overlap; unset sends all that was trained and waits."""
    num_rounds: int = 10
    """Versions that the run makes of each module."""
    idle_s: float = 120.0
    """Without any progress for this long, a transfer or a task has failed."""
    format: int = 1
    """Version of this document."""

    def __post_init__(self) -> None:
        run_id(self.run)
        _check("rounds.count", self.num_rounds, 1, 1_000_000, "10")
        _check("run.idle_s", self.idle_s, 5, 86_400, "120")
        if self.format != 1:
            raise UsageError(
                f"recipe format {self.format} is not known here", hint="upgrade weft on this machine"
            )

    @property
    def codecs(self) -> tuple[CodecSettings, ...]:
        """The codecs that an update may come in."""
        return (self.codec,) if self.slow_uplink is None else (self.codec, self.slow_uplink.codec)
