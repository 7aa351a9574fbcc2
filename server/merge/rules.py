"""The merge rules: updates → one movement, tile by tile.

A rule is a row of ``RULES``; families of them have a file each. Its function sees one tile of every update
after clipping and trimming, sorted by worker, and returns the merged movement, elements [T]. It adds up over
workers row by row (``Movements.rows``, or ``weighted_sum`` on a stack) and in no other way, so that the
result does not depend on how the module was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from weft.server.merge import curvature, linear, robust, sparse, subspace
from weft.server.merge.rule import MergeRule
from weft.server.merge.settings import MergeRuleName

RULES: Final[Mapping[MergeRuleName, MergeRule[Any]]] = {
    MergeRuleName(row.name): row
    for family in (linear, sparse, curvature, robust, subspace)
    for row in family.ROWS
}
