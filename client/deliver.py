"""The second half of ``weft pull``: from verified tensors to a directory that other programs open."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from weft.client.bases import Source, find_base
from weft.client.home import Home
from weft.client.pull import (
    Progress,
    Published,
    Resolved,
    base_name,
    check_whole,
    documents,
    fetch,
    lineage,
    lineage_lines,
    resolve,
)
from weft.common.errors import UsageError
from weft.common.export import model_card, write_hf, write_peft
from weft.common.ids import ModuleRef
from weft.common.manifest import VersionManifest
from weft.common.modules import Kind
from weft.common.recipe import Recipe, TaskKind


class Form(enum.StrEnum):
    """What is written."""

    PEFT = "peft"
    HF = "hf"


class Coordinator(Published, Source, Protocol):
    """Both: documents and blobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """What was pulled, and where it lies."""

    to: Path
    resolved: Resolved
    merged: bool
    base: str
    """Where the base is: a directory, a Hub id, or a placeholder."""

    def table(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "directory": str(self.to),
            "form": "hf" if self.merged else "peft",
            "run": self.resolved.recipe.run,
            "base_digest": self.resolved.recipe.base.digest,
            "modules": [version_table(manifest) for manifest in self.resolved.manifests],
        }

    def lines(self) -> list[str]:
        """For people: where it is, and the lines of Python that load it."""
        recipe = self.resolved.recipe
        names = ", ".join(f"{manifest.module}@{manifest.version}" for manifest in self.resolved.manifests)
        kind = "AutoModelForCausalLM"
        labels = ""
        if recipe.task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
            kind, labels = "AutoModelForSequenceClassification", f", num_labels={recipe.task.num_labels}"
        said = [f"✓ signatures, digests and shapes of {recipe.run} {names} are right", f"✓ {self.to}", ""]
        if self.merged:
            return [*said, f"from transformers import {kind}", f'model = {kind}.from_pretrained("{self.to}")']
        return [
            *said,
            f"from peft import PeftModel; from transformers import {kind}",
            f'base = {kind}.from_pretrained("{self.base}"{labels})',
            f'model = PeftModel.from_pretrained(base, "{self.to}")',
        ]


def deliver(
    coordinator: Coordinator,
    ref: ModuleRef,
    to: Path,
    *,
    home: Home,
    ca_pem: str,
    form: Form | None,
    base: Path | None,
    progress: Progress,
) -> Delivered:
    """Resolve, verify, fetch and write.

    Args:
        coordinator: The connection.
        ref: What is wanted.
        to: A directory that does not exist or is empty.
        home: For what arrives, and for bases.
        ca_pem: The pinned authority.
        form: What to write; None takes an adapter for LoRA and a whole model for full modules.
        base: Directory of the base, if it is here; used for a whole model, and for the lines that load an adapter.
        progress: Told bytes there and bytes in all.

    Raises:
        UsageError: ``to`` is not empty, or the modules are not a whole path.
        NotFound, AccessError, StorageError, NetworkError: See :mod:`weft.client.pull`.
    """
    to = free_directory(to)
    resolved = resolve(coordinator, ref, ca_pem=ca_pem)
    check_whole(resolved, ref)
    merged = _form(resolved.recipe, form, ref) is Form.HF
    cache = home.root / "pulls"
    tensors = fetch(coordinator, resolved, cache, progress)
    recipe, named, files = resolved.recipe, base_name(resolved.recipe), documents(resolved)
    ancestors = lineage_lines(_ancestors(coordinator, resolved, ca_pem))
    card = model_card(
        title=str(ref), recipe=recipe, base_name=named, lineage=ancestors, is_adapter=not merged
    )
    if merged:
        directory = find_pinned_base(coordinator, recipe, home, base, progress)
        write_hf(to, directory, recipe, tensors, card=card, extra_files=files)
    else:
        write_peft(to, recipe, tensors, card=card, base_name=named, extra_files=files)
    for manifest in resolved.manifests:
        (cache / manifest.content_digest).unlink(missing_ok=True)
    return Delivered(
        to=to, resolved=resolved, merged=merged, base=str(base or recipe.base.hub_id or "BASE DIRECTORY")
    )


def version_table(manifest: VersionManifest) -> dict[str, Any]:
    """One version that was pulled, for scripts."""
    return {
        "module": str(manifest.module),
        "version": manifest.version,
        "blake3": manifest.content_digest,
        "sha256": manifest.content_sha256,
        "manifest_blake3": manifest.digest,
        "gate": manifest.gate.outcome.value,
    }


def free_directory(to: Path) -> Path:
    """The directory to make, absolute; raises UsageError unless it is free, before anything is downloaded."""
    to = to.expanduser().absolute()
    if to.is_file() or (to.is_dir() and any(to.iterdir())):
        raise UsageError(f"{to} is not empty", hint="give --to a directory that does not exist yet")
    return to


def _form(recipe: Recipe, form: Form | None, ref: ModuleRef) -> Form:
    if recipe.topology.kind is Kind.LORA:
        return form or Form.PEFT
    if form is Form.PEFT:
        raise UsageError(
            f"the modules of {recipe.run} are whole transformer blocks, and no adapter holds those",
            hint=f"weft pull {ref} --to DIR writes the whole model",
        )
    return Form.HF


def find_pinned_base(
    source: Source, recipe: Recipe, home: Home, given: Path | None, progress: Progress
) -> Path:
    """The run's base on this machine, fetched if need be: see :func:`weft.client.bases.find_base`."""
    return find_base(
        recipe.base,
        given=given,
        cache=home.base_directory(recipe.base.digest),
        source=source,
        idle_s=recipe.idle_s,
        progress=progress,
        pause=time.sleep,
    )


def _ancestors(coordinator: Coordinator, resolved: Resolved, ca_pem: str) -> list[VersionManifest]:
    """The versions that led to those that were resolved, by module, oldest first."""
    found: list[VersionManifest] = []
    for newest in resolved.manifests:
        ref = ModuleRef(resolved.recipe.run, module=newest.module)
        versions = lineage(coordinator, ref, ca_pem=ca_pem)
        found += [manifest for manifest in versions if manifest.version <= newest.version]
    return found
