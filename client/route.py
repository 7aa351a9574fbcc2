"""The work behind ``weft route``: fit a router, cut a corpus into shards, re-seed paths that get nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt

from weft.client.device import Device
from weft.client.inference import Inference
from weft.common.base import pin_base, resolve_source
from weft.common.blobs import storage_errors
from weft.common.composition import ResidentBase
from weft.common.documents import is_heldout, read_rows
from weft.common.errors import DataError, RouterMismatch, UsageError
from weft.common.ids import Digest, Path
from weft.common.modules import Topology
from weft.common.recipe import TaskSettings
from weft.common.routing import (
    FeatureBase,
    Router,
    RouterKind,
    ShardIndex,
    check_router,
    fit_discriminative,
    fit_kmeans,
    fit_product,
    prefix_features,
    random_router,
    reseed,
    route_documents,
    traffic,
    write_router,
    write_shards,
)
from weft.common.routing.shards import ROUTER_PURPOSE
from weft.common.sequences import Row

Float32Array = npt.NDArray[np.float32]
_Item = TypeVar("_Item")
OnDocument = Callable[[int], None]
"""Told how many documents are done."""

SAMPLE_MAX: Final = 20_000
"""Documents that a router is fitted to, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Which of the documents are looked at."""

    share: float = 1.0
    """Those reserved for the router: the same ones that ``weft route shard --router-share`` leaves out."""
    num_max: int = SAMPLE_MAX
    """At most so many of them, drawn at random."""
    seed: int = 0
    """Of the draw."""

    def take(self, rows: Iterable[Row]) -> list[Row]:
        """The documents, in an order that means nothing; raises DataError when there are none."""
        generator = np.random.default_rng(self.seed)
        kept: list[Row] = []
        reserved = (row for row in rows if is_heldout(row, self.share, purpose=ROUTER_PURPOSE))
        for number, row in enumerate(reserved):
            if len(kept) < self.num_max:
                kept.append(row)
            elif (place := int(generator.integers(number + 1))) < self.num_max:
                kept[place] = row
        if not kept:
            raise DataError(
                f"none of the documents is among the {self.share:g} reserved for the router",
                hint="give more documents, or a larger --share",
            )
        return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A router and how it treats the documents that it was fitted to."""

    router: Router
    num_documents: int
    counts: dict[Path, int]
    """Documents of each path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterBase:
    """A base for routing alone."""

    resident: ResidentBase
    digest: Digest
    """As runs pin it."""

    @classmethod
    def load(cls, source: str, device: Device) -> RouterBase:
        """Load a base and compute its digest.

        Raises:
            BaseModelError: There is none, or it cannot be used.
            OutOfMemory: The device is too small.
        """
        directory = resolve_source(source)
        pin = pin_base(directory)
        resident = ResidentBase.load(
            directory, TaskSettings(), device=device.torch_device, dtype=device.dtype
        )
        return cls(resident=resident, digest=pin.digest)


def fit_clusters(
    data: FilePath,
    base: RouterBase,
    topology: Topology,
    *,
    method: RouterKind,
    sample: Sample,
    num_prefix_tokens: int,
    on_document: OnDocument,
) -> Fitted:
    """Fit a router to documents alone: kmeans, product, or random.

    Raises:
        DataError: No data, or fewer documents than paths.
        OutOfMemory: The device is too small.
    """
    features = read_features(sample.take(read_rows(data)), base.resident, num_prefix_tokens, on_document)
    paths, seed = topology.paths, sample.seed
    match method:
        case RouterKind.KMEANS:
            router = fit_kmeans(
                features,
                paths=paths,
                base_digest=base.digest,
                seed=seed,
                num_prefix_tokens=num_prefix_tokens,
            )
        case RouterKind.PRODUCT:
            router = fit_product(
                features,
                topology=topology,
                base_digest=base.digest,
                seed=seed,
                num_prefix_tokens=num_prefix_tokens,
            )
        case _:
            router = random_router(
                paths=paths,
                base_digest=base.digest,
                width=features.shape[1],
                seed=seed,
                num_prefix_tokens=num_prefix_tokens,
            )
    return _fitted(router, features)


def fit_by_paths(
    data: FilePath,
    model: Inference,
    *,
    like: Router,
    sample: Sample,
    progress: Callable[[int, int], None],
) -> Fitted:
    """Fit a discriminative router: documents go where they are likeliest, as far as their beginning tells.

    Args:
        data: Documents; those that ``sample`` reserves should not have been trained on.
        model: The grid, which is asked with each of its paths.
        like: The router that the paths were trained with.
        sample: Which documents.
        progress: Told paths done and paths in all.

    Raises:
        DataError: No documents longer than the prefix.
        RouterMismatch: ``like`` is of another base or other paths.
    """
    check_router(like, model.recipe)
    rows = sample.take(read_rows(data))
    features, losses = model.path_losses(rows, like=like, progress=progress)
    return _fitted(fit_discriminative(features, losses, like=like), features)


def reseed_router(
    data: FilePath, base: RouterBase, router: Router, *, sample: Sample, on_document: OnDocument
) -> Fitted:
    """Give each path without traffic half of the busiest one's documents.

    Raises:
        DataError: The documents are too alike.
        RouterMismatch: The router is of another base.
        UsageError: It is a random one.
    """
    check_base_of(router, base)
    if router.kind is RouterKind.RANDOM:
        raise UsageError("a random router has no paths to re-seed", hint="give it more documents")
    rows = sample.take(read_rows(data))
    features = read_features(rows, base.resident, router.num_prefix_tokens, on_document)
    return _fitted(reseed(router, features, seed=sample.seed), features)


def make_shards(
    data: FilePath,
    to: FilePath,
    base: RouterBase,
    router: Router,
    *,
    overlap: int,
    validation_share: float,
    router_share: float,
    on_document: OnDocument,
) -> ShardIndex:
    """Cut a corpus into one file for each path; documents are read, routed and written one batch at a time.

    Raises:
        DataError: There is nothing to read.
        RouterMismatch: The router is of another base.
        UsageError: ``to`` is not empty, or more paths are asked for than there are.
        DiskFull: No space left.
    """
    check_base_of(router, base)
    if not 1 <= overlap <= len(router.paths):
        raise UsageError(f"--overlap is {overlap}", hint=f"use 1 to {len(router.paths)}")
    routed = route_documents(read_rows(data), base.resident, router, top_n=overlap)
    return write_shards(
        to,
        _counted(routed, on_document),
        router,
        overlap=overlap,
        validation_share=validation_share,
        router_share=router_share,
    )


def check_base_of(router: Router, base: RouterBase) -> None:
    """Raise RouterMismatch unless a router was fitted to a base."""
    if router.base_digest != base.digest:
        raise RouterMismatch(
            f"the router was fitted to base {router.base_digest[:12]} and this one is {base.digest[:12]}",
            hint="give the base that it was fitted to, or fit it again: weft route fit DATA --base DIR",
        )


def read_features(
    rows: Iterable[Row], base: FeatureBase, num_prefix_tokens: int, on_document: OnDocument
) -> Float32Array:
    """Features of documents, [N, d]; raises DataError or OutOfMemory."""
    parts = []
    num_documents = 0
    for prefixes, features in prefix_features(rows, base, num_prefix_tokens):
        parts.append(features)
        num_documents += len(prefixes.rows)
        on_document(num_documents)
    return np.concatenate(parts)


def save_router(to: FilePath, router: Router) -> None:
    """Write a router's file in one step; raises DiskFull or StorageError."""
    partial = to.with_name(f".{to.name}.partial")
    with storage_errors(to):
        write_router(partial, router)
        partial.replace(to)


def check_new(to: FilePath) -> None:
    """Raise UsageError when a file is there already: routers are kept, since shards and runs name them."""
    if to.exists():
        raise UsageError(f"{to} exists already", hint="give --to another name")


def _fitted(router: Router, features: Float32Array) -> Fitted:
    counts = traffic(router.route(features), router.paths)
    return Fitted(router=router, num_documents=len(features), counts=counts)


def _counted(items: Iterable[_Item], on_item: Callable[[int], None]) -> Iterator[_Item]:
    for number, item in enumerate(items, start=1):
        yield item
        on_item(number)
