"""The merge rules: updates → one movement, tile by tile.

A rule is a row of ``RULES``; families of them have a file each. Its function sees one tile of every update
after clipping and trimming, sorted by worker, and returns the merged movement, elements [T]. It adds up over
workers row by row (``Movements.rows``, or ``weighted_sum`` on a stack) and in no other way, so that the
result does not depend on how the module was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from weft.common.errors import UsageError
from weft.server.merge import curvature, linear, robust, sparse, subspace
from weft.server.merge.rule import MergeRule
from weft.server.merge.settings import LoraSpace, MergeRuleName, MergeSettings
from weft.server.outer import OuterSettings

RULES: Final[Mapping[MergeRuleName, MergeRule[Any]]] = {
    MergeRuleName(row.name): row
    for family in (linear, sparse, curvature, robust, subspace)
    for row in family.ROWS
}


def lora_space(settings: MergeSettings, outer: OuterSettings) -> LoraSpace:
    """Where LoRA factors are merged under these settings.

    Raises:
        UsageError: ``merge.lora = "exact"`` with a rule or an outer optimiser that cannot work on ΔW.
    """
    linear_rule = LoraSpace.EXACT in RULES[settings.rule].spaces
    if settings.lora is None:
        return LoraSpace.EXACT if linear_rule and not outer.num_slots else LoraSpace.FACTORS
    if settings.lora is LoraSpace.EXACT and not linear_rule:
        raise UsageError(
            f'merge.lora is "exact" and merge.rule is "{settings.rule}", which is not linear in the updates',
            hint='set merge.lora = "factors", or merge.rule = "mean": others need a dense ΔW of every worker',
        )
    if settings.lora is LoraSpace.EXACT and outer.num_slots:
        raise UsageError(
            f'merge.lora is "exact" and outer.name is "{outer.name}", whose momentum has no bounded rank',
            hint='set merge.lora = "factors", or outer.name = "sgd"',
        )
    return settings.lora
