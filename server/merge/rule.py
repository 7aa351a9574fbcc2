"""What a merge rule is.

Legend: W = updates, T = elements of a tile.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

from weft.server.merge.movements import Movements
from weft.server.merge.settings import LoraSpace, MergeRuleName, RuleParameters
from weft.server.merge.spaces import spaces_of
from weft.server.merge.tiles import Float32, Float64
from weft.server.merge.whole import WholeRule

Grams: TypeAlias = Mapping[str, Float64]
"""⟨v_i, v_j⟩ of the clipped movements of a tensor, float64 [W, W], by name; of ΔW, under the name of its A."""
Merged: TypeAlias = Float32 | Float64
"""A merged movement of a tile [T]."""
P = TypeVar("P", bound=RuleParameters)


class Scope(enum.Enum):
    """What a rule has to see at once."""

    TILE = "tile"
    """The same slice of every update."""
    TENSOR = "tensor"
    """A tensor of one update after the other; scalars as tiles."""
    MATRIX = "matrix"
    """The same, of matrices, and LoRA as ΔW; other tensors as tiles."""


@dataclass(frozen=True, slots=True)
class Otherwise:
    """Where a tile's movement is another if the sum of the survey is not positive."""

    changes: Mapping[int, float] | None
    """What it is there, float32, by place in the tile; None: too many, so that the tile has to be merged again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRule(Generic[P]):
    """One row of ``RULES``."""

    name: str
    """What ``merge.rule`` says."""
    title: str
    """One line for people."""
    paper: str
    """Where it is defined."""
    merge: Callable[[Movements, int, P], Merged]
    """(a tile of every update, what the survey counted, parameters) → the merged movement [T]."""
    scope: Scope = Scope.TILE
    """Where it is not a tile, ``merge`` is for the tensors that do not have to be seen whole."""
    whole: WholeRule | None = None
    """(a tensor of every update, parameters) → the merged movement of all of it; where the scope is not a tile."""
    survey: Callable[[Movements, P], tuple[int, Merged, Otherwise | None]] | None = None
    """If the parameters say so: (a tile, parameters) → a whole number, added up over the module; the movement
    merged as if the sum were positive; and what it would be if it is not, where that is something else."""
    linear: Callable[[int, P], float] | None = None
    """(updates, parameters) → what the weighted mean is multiplied by, for rules that are nothing else: they
    alone can merge LoRA as ΔW. Others would need a dense ΔW."""
    choose: Callable[[Grams, Float64, P], Mapping[str, Float64]] | None = None
    """(inner products of the updates by tensor [W, W], weights [W], parameters) → weights by tensor [W], that
    the rule is then run with."""
    keeps_nan: bool = False
    """NaN or infinity in an update is still NaN or infinity in what is merged: nobody has to look for it before."""
    row_by_row: bool = False
    """It takes one update after the other, so that tiles need not be shorter where there are more."""
    needs_fisher: bool = False
    """Workers send the diagonal Fisher beside the update: 8 bits a parameter."""
    needs_grams: bool = False
    """Second moments of every layer's inputs come beside the updates: i² numbers for a matrix [o, i]. No worker
    sends them."""
    robust: bool = False
    """Bounded under a minority of arbitrary updates even without clipping."""
    secure_aggregation: bool = False
    """Can be computed from sums over workers alone."""

    @property
    def spaces(self) -> frozenset[LoraSpace]:
        """Where it can merge LoRA factors."""
        return spaces_of(MergeRuleName(self.name))
