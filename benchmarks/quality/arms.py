"""The arms of the campaign: each a way to train, on a corpus, with a seed."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from benchmarks.quality.corpus import CorpusSettings

from weft.common.codec import CodecSettings
from weft.common.modules import Kind, LoraSettings, Topology
from weft.common.recipe import InnerSettings, Schedule
from weft.server.merge.settings import Clip, LoraSpace, MergeSettings, Rescale, Weights
from weft.server.outer import OuterName, OuterSettings

VERSION: Final = 1
"""Raised when a change of the campaign's code makes earlier results useless."""
STEPS: Final = 192
"""Optimiser steps of every path, in all arms; a third as many went into the base before."""
PRETRAINING_STEPS: Final = 64
BATCH_SIZE: Final = 4
LEARNING_RATE: Final = {Kind.FULL: 4e-3, Kind.LORA: 1e-2}
LORA: Final = LoraSettings(rank=8, alpha=16.0)
CORPUS: Final = CorpusSettings()
SMALL_DOCUMENTS: Final = 32
"""Documents of the mean domain where data is short: each is seen about 30 times."""
SINGLE: Final = CorpusSettings(num_vocabularies=1, num_grammars=1, documents=16 * CORPUS.documents)
"""The negative control: one domain, as much data."""


class Routing(enum.StrEnum):
    """How documents come to shards."""

    GIVEN = "given"
    SHUFFLED = "shuffled"
    RANDOM = "random"
    KMEANS = "kmeans"
    PRODUCT = "product"
    DISCRIMINATIVE = "discriminative"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to train."""

    experts: tuple[int, ...] = (4, 4)
    """Of each level."""
    shards: int = 0
    """Workers that share the one path, each with a shuffled part of the data; 0: one worker a path, routed."""
    routing: Routing = Routing.GIVEN
    """given: by the true domain."""
    kind: Kind = Kind.FULL
    """Blocks, or LoRA factors over the frozen base."""
    inner_steps: int = 8
    """H: steps between two merges."""
    outer: OuterSettings = OuterSettings(name=OuterName.NESTEROV)
    """Outer optimiser."""
    rescale: Rescale = Rescale.SQRT_PATHS
    """Of the merged movement."""
    weights: Weights = Weights.SHARD
    """What an update counts for."""
    lora: LoraSpace | None = None
    """Where LoRA factors are merged; None: as ΔW where the outer optimiser lets it."""
    dropped: float = 0.0
    """Share of updates that are lost."""
    codec: CodecSettings | None = None
    """How updates are sent; None: as they are."""
    corpus: CorpusSettings = CORPUS
    """Its seed is the arm's."""
    validates: bool = False
    """Hold out a quarter of each shard and keep each path's best version (early stopping)."""
    reroutes: bool = False
    """Evaluate drifting documents too, with the path chosen anew every so many tokens."""

    @property
    def topology(self) -> Topology:
        """Of the recipe."""
        return Topology(experts=self.experts, kind=self.kind, lora=LORA)

    @property
    def inner(self) -> InnerSettings:
        """Of the recipe."""
        return InnerSettings(
            steps=self.inner_steps,
            batch_size=BATCH_SIZE,
            learning_rate=LEARNING_RATE[self.kind],
            schedule=Schedule.COSINE,
            warmup_steps=10,
            beta2=0.99,
        )

    @property
    def merge(self) -> MergeSettings:
        """Of the run file; without clipping, as in the papers."""
        return MergeSettings(clip=Clip.NONE, rescale=self.rescale, weights=self.weights, lora=self.lora)

    def digest(self, seed: int) -> str:
        """Names the arm's result: everything that it is a function of, but for Weft's code."""
        constants = [
            VERSION,
            STEPS,
            PRETRAINING_STEPS,
            BATCH_SIZE,
            {str(key): rate for key, rate in LEARNING_RATE.items()},
        ]
        text = json.dumps(
            [dataclasses.asdict(self), constants, dataclasses.asdict(LORA), seed], sort_keys=True
        )
        return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


SGD: Final = OuterSettings(name=OuterName.SGD)
SMALL: Final = dataclasses.replace(CORPUS, documents=SMALL_DOCUMENTS)
DENSE: Final = Arm(experts=(1,), shards=1, inner_steps=STEPS, outer=SGD, rescale=Rescale.NONE)
DILOCO: Final = Arm(experts=(1,), shards=16, rescale=Rescale.NONE)

FULL: Final[Mapping[str, Arm]] = {
    "dense": DENSE,
    "diloco": DILOCO,
    "given": Arm(),
    "kmeans": Arm(routing=Routing.KMEANS),
    "product": Arm(routing=Routing.PRODUCT),
    "discriminative": Arm(routing=Routing.DISCRIMINATIVE, reroutes=True),
    "random": Arm(routing=Routing.RANDOM),
    "flat": Arm(experts=(16,)),
    "small-grid": Arm(corpus=SMALL, validates=True),
    "small-flat": Arm(experts=(16,), corpus=SMALL, validates=True),
    "averaging": Arm(outer=SGD, rescale=Rescale.NONE),
    "adam": Arm(outer=OuterSettings(name=OuterName.FEDADAM), rescale=Rescale.NONE),
    "every-step": Arm(inner_steps=1, outer=SGD, rescale=Rescale.NONE),
    "dropped": Arm(dropped=0.5),
    "one-domain-dense": dataclasses.replace(DENSE, corpus=SINGLE),
    "one-domain-diloco": dataclasses.replace(DILOCO, corpus=SINGLE),
    "one-domain-grid": Arm(corpus=SINGLE, routing=Routing.RANDOM),
}
"""Kind full."""

ABLATION: Final[Mapping[str, Arm]] = {
    f"{weights}-{rescale}": Arm(rescale=rescale, weights=weights)
    for weights in (Weights.EQUAL, Weights.SHARD)
    for rescale in Rescale
    if (weights, rescale) != (Weights.SHARD, Rescale.SQRT_PATHS)
}
"""Weights × rescaling, with Nesterov and the true domains as shards; arm ``given`` is the sixth."""


def with_lora(arm: Arm) -> Arm:
    """The same with LoRA modules over the frozen base."""
    return dataclasses.replace(arm, kind=Kind.LORA)


LORA_ARMS: Final[Mapping[str, Arm]] = {
    f"lora-{name}": with_lora(arm)
    for name, arm in {**FULL, **ABLATION}.items()
    if name
    in {"dense", "diloco", "given", "random", "flat", "averaging", "dropped", "product"}
    | {"shard-none", "shard-rda", "equal-sqrt_paths"}
} | {
    "lora-factors": with_lora(dataclasses.replace(FULL["averaging"], lora=LoraSpace.FACTORS)),
    "lora-averaging-dropped": with_lora(dataclasses.replace(FULL["averaging"], dropped=0.5)),
    "lora-averaging-diloco": with_lora(dataclasses.replace(DILOCO, outer=SGD)),
}
"""Kind lora. What is to be told apart: the outer optimiser, and where factors are merged."""

SHORT: Final[Mapping[str, Arm]] = {
    name: FULL[name] for name in ("dense", "given", "random", "one-domain-dense", "one-domain-grid")
}
"""What shows the largest effects."""
