"""Layers that are taken from inputs of their own, ``[[layers]]`` of a recipe.

Layer swapping (arXiv 2410.01335) makes a model of one expert's bottom and top blocks and another's middle ones,
with the mean of both in between. What no table names is merged by the recipe's rule.

```toml
[[layers]]
blocks = "0-3, 28-31"
weights = { german = 1 }

[[layers]]
blocks = "4, 27"
weights = { german = 1, math = 1 }

[[layers]]
tensors = ["embed_tokens", "lm_head"]
weights = {}                             # the base's own
```
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from weft.common.errors import UsageError
from weft.server.offline.inputs import block_of

_SPAN: Final = re.compile(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?")
_EXAMPLE: Final = 'write for example blocks = "0-3, 28-31"'


@dataclass(frozen=True, slots=True, kw_only=True)
class LayersSpec:
    """One ``[[layers]]`` table; of several that fit a tensor the first one counts."""

    blocks: str = ""
    """Transformer blocks, counted from 0, both ends included, such as 0-3, 28-31; unset: wherever it is."""
    tensors: tuple[str, ...] = ()
    """Parts of names, of which a tensor has to have one; unset: whatever it is called."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """What its mean is of, by name of the input; empty: the base's own."""

    def __post_init__(self) -> None:
        if not self.blocks and not self.tensors:
            raise UsageError("a table of layers says neither blocks nor tensors", hint=_EXAMPLE)
        parse_blocks(self.blocks)
        for name, weight in self.weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UsageError(f"the weight of {name} in layers is {weight}", hint="use 0 or more")
        if self.weights and not any(self.weights.values()):
            raise UsageError(
                "all weights of a table of layers are 0", hint="weights = {} takes the base's own"
            )

    def fits(self, tensor: str) -> bool:
        """Whether a tensor, or a layer of an adapter, is among those it is about."""
        block = block_of(f"{tensor}.")
        in_blocks = not self.blocks or any(block in span for span in parse_blocks(self.blocks))
        return in_blocks and (not self.tensors or any(part in tensor for part in self.tensors))


def parse_blocks(text: str) -> tuple[range, ...]:
    """Read ``0-3, 28-31``; raises UsageError."""
    spans = []
    for part in text.split(",") if text.strip() else []:
        found = _SPAN.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UsageError(f"{part.strip()!r} names no blocks", hint=_EXAMPLE)
        spans.append(range(first, last + 1))
    return tuple(spans)


def check_layers(layers: Sequence[LayersSpec], labels: Sequence[str]) -> None:
    """Raise UsageError for a weight of no input."""
    for name in (name for each in layers for name in each.weights):
        if name not in labels:
            raise UsageError(
                f"layers weigh {name}, which is no input", hint=f"inputs are {', '.join(labels)}"
            )


def layer_weights(
    layers: Sequence[LayersSpec], tensor: str, num_blocks: int, labels: Sequence[str]
) -> tuple[float, ...] | None:
    """What each input counts for in a tensor; None where no table is about it.

    Args:
        layers: The tables.
        tensor: Name of a tensor, or of a layer of an adapter.
        num_blocks: Transformer blocks of the models; 0: not known.
        labels: The inputs.

    Raises:
        UsageError: A table names a block that the models do not have.
    """
    for each in layers:
        for span in parse_blocks(each.blocks):
            if num_blocks and span[-1] >= num_blocks:
                raise UsageError(
                    f"layers name block {span[-1]}, and the models have {num_blocks}",
                    hint=f"the last block is {num_blocks - 1}",
                )
        if each.fits(tensor):
            return tuple(each.weights.get(label, 0.0) for label in labels)
    return None
