"""``weft pull``: published modules as ordinary files, with everything checked that is signed.

From the pin follows the authority, from it the key that signs, from it the recipe and the manifests, from them the
digests of the tensors. All of it is checked before anything is written at the target, and the target appears in one
step. Where the signatures come from is in ``weft.common.identity``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from weft.common.errors import CorruptState, IdentityMismatch, UsageError
from weft.common.identity.authority import verify_endorsement
from weft.common.identity.files import private_directory
from weft.common.ids import Digest, ModuleKey, ModuleRef
from weft.common.manifest import Signed, VersionManifest, open_version, parse_json, schema_digest
from weft.common.modules import Schema
from weft.common.protocol import BlobRef, ResolvedModule
from weft.common.recipe import RECIPE_TYPE, Recipe
from weft.common.settings import from_table, to_table
from weft.common.tensors import Float32Array, TensorFile, to_float32

RECIPE_FILE: Final = "weft-recipe.json"
MANIFEST_FILE: Final = "weft-manifest.json"
_RECIPE_BYTES_MAX: Final = 4 << 20

Progress = Callable[[int, int], None]
VersionKey = tuple[ModuleKey, int]
"""A module and its version."""


class Published(Protocol):
    """What is asked of the coordinator."""

    def resolve_module(self, ref: str) -> ResolvedModule:
        """The signed documents of a module or path."""

    def list_versions(self, run_id: str, module: str = ...) -> tuple[Signed, ...]:
        """The signed manifests of all versions."""

    def download(
        self,
        blake3: Digest,
        to: Path,
        *,
        idle_s: float,
        size_bytes: int | None = ...,
        progress: Progress | None = ...,
    ) -> Path:
        """Get a blob."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """Modules that were asked for, verified."""

    recipe: Recipe
    manifests: tuple[VersionManifest, ...]
    """By level, then expert."""
    recipe_signed: Signed
    manifests_signed: tuple[Signed, ...]
    key: bytes
    """Ed25519 public key that signed all of them, endorsed by the pinned authority."""
    router: BlobRef | None = None
    """The run's router, as the coordinator says over the pinned channel; it is not signed."""


def resolve(published: Published, ref: ModuleRef, *, ca_pem: str) -> Resolved:
    """Ask for a module or path and verify what comes.

    Args:
        published: The coordinator.
        ref: What is wanted.
        ca_pem: The pinned authority; empty when this coordinator was joined without TLS, on loopback.

    Raises:
        NotFound: There is no such run, module or version.
        IdentityMismatch, CorruptState: What came is not signed by the coordinator, or is not what was asked for.
    """
    answer = published.resolve_module(str(ref))
    key = answer.coordinator_public_key
    if ca_pem and not verify_endorsement(ca_pem, key, answer.endorsement):
        raise IdentityMismatch(
            "the coordinator's authority does not endorse the key that signs its modules",
            hint="join again with a new token",
        )
    recipe = from_table(Recipe, parse_json(answer.recipe.open(key, RECIPE_TYPE), _RECIPE_BYTES_MAX))
    manifests = tuple(open_version(signed, key) for signed in answer.manifests)
    _check_wanted(ref, recipe, manifests)
    return Resolved(
        recipe=recipe,
        manifests=manifests,
        recipe_signed=answer.recipe,
        manifests_signed=answer.manifests,
        key=key,
        router=answer.router,
    )


def lineage(published: Published, ref: ModuleRef, *, ca_pem: str) -> tuple[VersionManifest, ...]:
    """All versions of a module, or of all modules of a run, verified: signatures and the chain of parents.

    Raises:
        IdentityMismatch, CorruptState: A manifest is not signed by the coordinator, or its parent is another.
    """
    resolved = resolve(published, ref, ca_pem=ca_pem)
    # A module at a time: all versions of many modules would not fit one message.
    manifests = tuple(
        open_version(signed, resolved.key)
        for newest in resolved.manifests
        for signed in published.list_versions(ref.run, str(newest.module))
    )
    digests = {(manifest.module, manifest.version): manifest.digest for manifest in manifests}
    for manifest in manifests:
        for parent in manifest.parents:
            if digests.get((manifest.module, parent.version)) != parent.manifest_digest:
                raise CorruptState(
                    f"{manifest.run}/{manifest.module}@{manifest.version} names another parent than the one shown"
                )
    return manifests


def fetch(
    published: Published, resolved: Resolved, cache: Path, progress: Progress
) -> dict[str, Float32Array]:
    """Get the tensors of all resolved modules, float32 by name, each file checked against its manifest.

    Args and errors are those of :func:`fetch_files`.
    """
    files = fetch_files(published, resolved.manifests, cache, resolved.recipe.idle_s, progress)
    return {
        name: array
        for manifest in resolved.manifests
        for name, array in _read(files[manifest.module, manifest.version]).items()
    }


def fetch_files(
    published: Published,
    manifests: Sequence[VersionManifest],
    cache: Path,
    idle_s: float,
    progress: Progress,
) -> dict[VersionKey, Path]:
    """Get the files of published versions, each once and checked against its manifest.

    Args:
        published: The coordinator.
        manifests: Of what is wanted, verified.
        cache: Directory for what arrives, named by digest; a fetch that was interrupted is resumed from there.
        idle_s: Longest silence of a transfer.
        progress: Told bytes there and bytes in all.

    Raises:
        CorruptState: A file is not what its manifest says.
        NetworkError, StorageError: It cannot be fetched or kept.
    """
    private_directory(cache)
    # Experts that have not moved apart yet are one file.
    sizes = {manifest.content_digest: manifest.content_bytes for manifest in manifests}
    total, there = sum(sizes.values()), 0
    for content, size_bytes in sizes.items():

        def on_bytes(num_done: int, _: int, before: int = there) -> None:
            progress(before + num_done, total)

        published.download(content, cache / content, idle_s=idle_s, size_bytes=size_bytes, progress=on_bytes)
        there += size_bytes
    hashes = {content: _sha256(cache / content) for content in sizes}
    for manifest in manifests:
        _check_file(cache / manifest.content_digest, hashes[manifest.content_digest], manifest)
    return {(manifest.module, manifest.version): cache / manifest.content_digest for manifest in manifests}


def documents(resolved: Resolved) -> dict[str, bytes]:
    """The signed recipe and manifests as files, in the form that other DSSE tools verify."""
    if len(resolved.manifests) == 1:
        names = [MANIFEST_FILE]
    else:
        names = [f"weft-manifest-{manifest.module}.json" for manifest in resolved.manifests]
    files = {
        name: signed.to_envelope() for name, signed in zip(names, resolved.manifests_signed, strict=True)
    }
    return files | {RECIPE_FILE: resolved.recipe_signed.to_envelope()}


def lineage_lines(manifests: Sequence[VersionManifest]) -> list[str]:
    """One line a version, for a model card."""
    return [
        f"`{manifest.run}/{manifest.module}@{manifest.version}`: {describe(manifest)}"
        for manifest in manifests
    ]


def describe(manifest: VersionManifest) -> str:
    """How a version came to be, in one line."""
    if manifest.merge is None or manifest.outer is None:
        return f"the start, {manifest.created}"
    updates = len(manifest.contributors)
    workers = len({contributor.worker_id for contributor in manifest.contributors})
    tokens = sum(contributor.tokens for contributor in manifest.contributors)
    return (
        f"{updates} update{'s' * (updates != 1)} of {workers} worker{'s' * (workers != 1)} "
        f"({tokens:,} tokens) merged by {manifest.merge.rule}, {manifest.outer.name}; "
        f"gate {manifest.gate.outcome.value}: {manifest.gate.reason}; {manifest.created}"
    )


def base_name(recipe: Recipe) -> str:
    """What an export says that it belongs to: the Hub's id, or a name from the digest."""
    return recipe.base.hub_id or f"base-{recipe.base.digest[:12]}"


def _check_wanted(ref: ModuleRef, recipe: Recipe, manifests: Sequence[VersionManifest]) -> None:
    """The documents must be of what was asked for: signatures alone would allow any other module."""
    found = tuple(manifest.module for manifest in manifests)
    wanted = _modules(ref, recipe)
    fits = (
        recipe.run == ref.run
        and found == wanted
        and all(
            manifest.run == recipe.run
            and manifest.base_digest == recipe.base.digest
            and manifest.kind is recipe.topology.kind
            and dict(manifest.settings) == to_table(recipe.topology.lora)
            and ref.version in (None, manifest.version)
            for manifest in manifests
        )
    )
    if not fits:
        raise CorruptState(f"what the coordinator signed for {ref} is something else")


def _modules(ref: ModuleRef, recipe: Recipe) -> tuple[ModuleKey, ...]:
    if ref.module is not None:
        return (ref.module,)
    return recipe.topology.find_path(ref.path).modules if ref.path is not None else recipe.topology.modules


def check_whole(resolved: Resolved, ref: ModuleRef) -> None:
    """Raise UsageError unless the modules make up a whole path, which is what other programs can load."""
    topology, run = resolved.recipe.topology, resolved.recipe.run
    first = f"weft pull {run}/path:{topology.paths[0]} --to DIR"
    if ref.module is not None and len(topology.experts) > 1:
        raise UsageError(
            f"module {ref.module} is one of the {len(topology.experts)} levels of run {run}",
            hint=f"pull a path, which has one expert a level: {first}",
        )
    if ref.module is None and ref.path is None and topology.num_paths > 1:
        raise UsageError(
            f"run {run} has {topology.num_paths} paths, each a model of its own",
            hint=f"{first}, or all of them with weft pull {run} --all --to DIR",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_file(path: Path, sha256: str, manifest: VersionManifest) -> None:
    with TensorFile(path) as tensors:
        schema = Schema(tuple(sorted(tensors.header.specs)))
    if sha256 != manifest.content_sha256 or schema_digest(schema) != manifest.schema_digest:
        raise CorruptState(
            f"the tensors of {manifest.run}/{manifest.module}@{manifest.version} are not those of its manifest"
        )


def _read(path: Path) -> Mapping[str, Float32Array]:
    with TensorFile(path) as tensors:
        return {spec.name: to_float32(tensors.array(spec.name), spec.dtype) for spec in tensors.header.specs}
