"""``weft pull RUN --all``: every module of a run and its router as one directory, for inference over all paths.

A module is in it at its newest version and at each that is the best of some path, every file once. What is said and
checked of single modules in ``weft.client.pull`` holds here too. The router is not signed: its digest comes over the
channel to the pinned coordinator.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Protocol

from weft.client.bases import Source
from weft.client.deliver import find_pinned_base, free_directory, version_table
from weft.client.grid import BestVersions, GridIndex, GridModule, write_grid
from weft.client.home import Home
from weft.client.pull import RECIPE_FILE, Progress, Published, Resolved, VersionKey, fetch_files, resolve
from weft.common.errors import UsageError
from weft.common.identity.files import private_directory
from weft.common.ids import ModuleRef, Path
from weft.common.manifest import Signed, VersionManifest
from weft.common.protocol import BlobRef, PathStatus, Status
from weft.common.recipe import Recipe
from weft.common.routing import check_router, read_router


class Coordinator(Published, Source, Protocol):
    """Published modules, the base, and what is known of the paths."""

    def get_status(self, run_id: str = ...) -> Status:
        """The status of a run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """What goes into a grid directory, verified."""

    recipe: Recipe
    recipe_signed: Signed
    versions: Mapping[VersionKey, tuple[VersionManifest, Signed]]
    """Every module's newest version, and those that are the best of some path."""
    best: tuple[BestVersions, ...]
    """Of the paths that were evaluated."""
    router: BlobRef | None
    """None where nothing is routed."""

    @property
    def manifests(self) -> tuple[VersionManifest, ...]:
        """Of all versions."""
        return tuple(manifest for manifest, _ in self.versions.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveredGrid:
    """What was pulled, and where it lies."""

    to: FilePath
    gathered: Gathered

    def table(self) -> dict[str, Any]:
        """For scripts."""
        gathered = self.gathered
        return {
            "directory": str(self.to),
            "form": "grid",
            "run": gathered.recipe.run,
            "base_digest": gathered.recipe.base.digest,
            "paths": [str(path) for path in gathered.recipe.topology.paths],
            "best": {item.path: list(item.versions) for item in gathered.best},
            "router_blake3": gathered.router.blake3 if gathered.router else None,
            "modules": [version_table(manifest) for manifest in gathered.manifests],
        }

    def lines(self) -> list[str]:
        """For people: where it is, and what to do with it."""
        recipe, num_versions = self.gathered.recipe, len(self.gathered.versions)
        said = [
            f"✓ signatures, digests and shapes of {num_versions} module versions of {recipe.run} are right",
            f"✓ {self.to}: {recipe.topology.num_paths} paths",
        ]
        if self.gathered.router is None:
            return said
        return [*said, "", f'weft generate "…" --model {self.to}', f"weft eval {self.to} --data FILE"]


def gather(coordinator: Coordinator, ref: ModuleRef, *, ca_pem: str) -> Gathered:
    """Ask for all modules of a run, and for the best versions of its paths, and verify what comes.

    Args:
        coordinator: The connection.
        ref: A run, without module, path or version.
        ca_pem: The pinned authority.

    Raises:
        UsageError: ``ref`` names less than a run.
        NotFound, IdentityMismatch, CorruptState: See :func:`weft.client.pull.resolve`.
    """
    if ref != ModuleRef(ref.run):
        raise UsageError(f"--all takes a whole run, not {ref}", hint=f"weft pull {ref.run} --all --to DIR")
    newest = resolve(coordinator, ref, ca_pem=ca_pem)
    versions = _by_version(newest)
    best = []
    for path in _evaluated(coordinator.get_status(ref.run), ref):
        resolved = resolve(
            coordinator, ModuleRef(ref.run, path=Path.parse(path.path), best=True), ca_pem=ca_pem
        )
        versions |= _by_version(resolved)
        best.append(
            BestVersions(
                path=path.path,
                versions=tuple(manifest.version for manifest in resolved.manifests),
                validation_loss=path.best_loss or 0.0,
            )
        )
    return Gathered(
        recipe=newest.recipe,
        recipe_signed=newest.recipe_signed,
        versions=versions,
        best=tuple(best),
        router=newest.router,
    )


def deliver_grid(
    coordinator: Coordinator,
    ref: ModuleRef,
    to: FilePath,
    *,
    home: Home,
    ca_pem: str,
    base: FilePath | None,
    progress: Progress,
) -> DeliveredGrid:
    """Gather, fetch and write; the base is fetched too where this machine lacks it.

    Arguments and errors are those of :func:`weft.client.deliver.deliver`; RouterMismatch when the router is not the
    run's.
    """
    to = free_directory(to)
    gathered = gather(coordinator, ref, ca_pem=ca_pem)
    recipe, cache = gathered.recipe, home.root / "pulls"
    router = _fetch_router(coordinator, gathered, cache)
    files = fetch_files(coordinator, gathered.manifests, cache, recipe.idle_s, progress)
    directory = find_pinned_base(coordinator, recipe, home, base, progress)
    modules = {
        GridModule(module=str(module), version=version, blake3=manifest.content_digest): files[
            module, version
        ]
        for (module, version), (manifest, _) in gathered.versions.items()
    }
    index = GridIndex(
        recipe=recipe,
        base=recipe.base.hub_id if base is None and recipe.base.hub_id else str(directory),
        modules=tuple(modules),
        router=gathered.router.blake3 if gathered.router else None,
        best=gathered.best,
    )
    write_grid(to, index, modules=modules, router=router, documents=_documents(gathered))
    for path in {*files.values(), *((router,) if router else ())}:
        path.unlink(missing_ok=True)
    return DeliveredGrid(to=to, gathered=gathered)


def _by_version(resolved: Resolved) -> dict[VersionKey, tuple[VersionManifest, Signed]]:
    return {
        (manifest.module, manifest.version): (manifest, signed)
        for manifest, signed in zip(resolved.manifests, resolved.manifests_signed, strict=True)
    }


def _evaluated(status: Status, ref: ModuleRef) -> list[PathStatus]:
    """The paths of which it is known how good they are."""
    return [
        path
        for run in status.runs
        if run.run_id == ref.run
        for path in run.paths
        if path.best_loss is not None
    ]


def _fetch_router(coordinator: Coordinator, gathered: Gathered, cache: FilePath) -> FilePath | None:
    router = gathered.router
    if router is None:
        return None
    private_directory(cache)
    path = coordinator.download(
        router.blake3,
        cache / router.blake3,
        idle_s=gathered.recipe.idle_s,
        size_bytes=router.size_bytes,
        progress=None,
    )
    check_router(read_router(path), gathered.recipe)
    return path


def _documents(gathered: Gathered) -> dict[str, bytes]:
    """The signed recipe and manifests, in the form that other DSSE tools verify."""
    manifests = {
        f"weft-manifest-{module}@{version}.json": signed.to_envelope()
        for (module, version), (_, signed) in gathered.versions.items()
    }
    return manifests | {RECIPE_FILE: gathered.recipe_signed.to_envelope()}
