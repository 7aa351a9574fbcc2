"""Where LoRA is merged: as its factors A and B, or as what they compute, ΔW = B A.

Known without torch, unlike the rules themselves: the coordinator reads run files.
"""

from __future__ import annotations

from typing import Final

from weft.common.errors import UsageError
from weft.server.merge.settings import LoraSpace, MergeRuleName, MergeSettings
from weft.server.outer import OuterSettings

WEIGHING: Final = frozenset(
    {
        MergeRuleName.MEAN,
        MergeRuleName.TASK_ARITHMETIC,
        MergeRuleName.NEGATION,
        MergeRuleName.KRUM,
        MergeRuleName.MULTI_KRUM,
        MergeRuleName.GEOMETRIC_MEDIAN,
        MergeRuleName.CENTRED_CLIPPING,
        MergeRuleName.SLERP,
        MergeRuleName.MODEL_STOCK,
    }
)
"""Rules that come down to weights: they can merge ΔW, whose factors they stack."""
OF_MATRICES: Final = frozenset(
    {
        MergeRuleName.KNOTS,
        MergeRuleName.TSV,
        MergeRuleName.ISO,
        MergeRuleName.REGMEAN,
        MergeRuleName.LEAST_SQUARES,
    }
)
"""Rules that see a matrix whole: of LoRA, ΔW and nothing else."""
NEEDING_GRAMS: Final = frozenset({MergeRuleName.REGMEAN, MergeRuleName.LEAST_SQUARES})
"""Rules that need second moments of each layer's inputs, which no worker sends."""


def spaces_of(rule: MergeRuleName) -> frozenset[LoraSpace]:
    """Where a rule can merge LoRA."""
    if rule in OF_MATRICES:
        return frozenset({LoraSpace.EXACT})
    return frozenset(LoraSpace) if rule in WEIGHING else frozenset({LoraSpace.FACTORS})


def lora_space(settings: MergeSettings, outer: OuterSettings) -> LoraSpace:
    """Where LoRA factors are merged under these settings.

    Raises:
        UsageError: A rule or an outer optimiser cannot work on ΔW, or on nothing else.
    """
    spaces = spaces_of(settings.rule)
    if settings.lora is None:
        either = LoraSpace.EXACT if LoraSpace.EXACT in spaces and not outer.num_slots else LoraSpace.FACTORS
        space = either if either in spaces else next(iter(spaces))
    else:
        space = settings.lora
    if space not in spaces:
        raise _wrong_space(settings.rule, space)
    if space is LoraSpace.EXACT and outer.num_slots:
        asked = f'merge.lora is "{space}"' if settings.lora else f'merge.rule is "{settings.rule}", for ΔW,'
        instead = 'merge.lora = "factors"' if LoraSpace.FACTORS in spaces else "a rule that merges factors"
        raise UsageError(
            f'{asked} and outer.name is "{outer.name}", whose momentum has no bounded rank',
            hint=f'set {instead}, or outer.name = "sgd"',
        )
    return space


def _wrong_space(rule: MergeRuleName, space: LoraSpace) -> UsageError:
    if space is LoraSpace.FACTORS:
        return UsageError(
            f'merge.lora is "factors" and merge.rule is "{rule}", which works on the matrix ΔW',
            hint="remove merge.lora",
        )
    return UsageError(
        f'merge.lora is "exact" and merge.rule is "{rule}", which is not linear in the updates',
        hint='set merge.lora = "factors", or merge.rule = "mean": others need a dense ΔW of every worker',
    )
