"""A module's lineage, drawn: newest first, each version with who contributed and what the gate said."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from weft.common.manifest import GateOutcome, VersionManifest

_GATE_STYLES = {GateOutcome.PASSED: "green", GateOutcome.FAILED: "red", GateOutcome.SKIPPED: "yellow"}


def draw(manifests: Sequence[VersionManifest]) -> RenderableType:
    """One tree a module; the manifests are verified and sorted by module, then version."""
    trees = []
    for module, versions in groupby(manifests, key=lambda manifest: manifest.module):
        newest_first = list(versions)[::-1]
        tree = Tree(
            Text(f"{newest_first[0].run}/{module} over base {newest_first[0].base_digest[:12]}", style="bold")
        )
        for manifest in newest_first:
            _add(tree, manifest)
        trees.append(tree)
    return Group(*trees)


def _add(tree: Tree, manifest: VersionManifest) -> None:
    parents = ", ".join(f"@{parent.version}" for parent in manifest.parents)
    title = Text.assemble(
        (f"@{manifest.version}", "bold cyan"),
        f"  {manifest.content_digest[:12]}  {manifest.created}",
        (f"  from {parents}" if parents else "  the start", "dim"),
    )
    branch = tree.add(title)
    if manifest.merge is not None and manifest.outer is not None:
        outer = _parameters(manifest.outer.parameters)
        branch.add(
            Text(
                f"round {manifest.round_number}: {manifest.merge.rule}{_parameters(manifest.merge.parameters)}, "
                f"then {manifest.outer.name}{outer}"
            )
        )
    for contributor in manifest.contributors:
        branch.add(
            Text(
                f"{contributor.worker_id}: {contributor.steps} steps, {contributor.tokens:,} tokens, "
                f"norm {contributor.norm:.4g}, weight {contributor.weight:g}, update {contributor.update_digest[:12]}"
            )
        )
    branch.add(
        Text.assemble(
            "gate ",
            (manifest.gate.outcome.value, _GATE_STYLES[manifest.gate.outcome]),
            f": {manifest.gate.reason}",
        )
    )


def _parameters(parameters: object) -> str:
    """Settings as ``(name=value, …)``; nothing without any."""
    if not isinstance(parameters, dict) or not parameters:
        return ""
    return f"({', '.join(f'{name}={value}' for name, value in sorted(parameters.items()))})"
