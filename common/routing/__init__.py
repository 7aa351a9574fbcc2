"""Routing: which path a document belongs to, decided by its first tokens; see docs/routing.md."""

from __future__ import annotations

from weft.common.routing.documents import FeatureBase, RoutedDocument, prefix_features, route_documents
from weft.common.routing.file import check_router, read_router, write_router
from weft.common.routing.fit import (
    calibrate,
    fit_discriminative,
    fit_kmeans,
    fit_product,
    random_router,
    reseed,
)
from weft.common.routing.router import Router, RouterKind, empty_paths, traffic
from weft.common.routing.shards import Shard, ShardIndex, check_shard, read_shards, write_shards

__all__ = [
    "FeatureBase",
    "RoutedDocument",
    "Router",
    "RouterKind",
    "Shard",
    "ShardIndex",
    "calibrate",
    "check_router",
    "check_shard",
    "empty_paths",
    "fit_discriminative",
    "fit_kmeans",
    "fit_product",
    "prefix_features",
    "random_router",
    "read_router",
    "read_shards",
    "reseed",
    "route_documents",
    "traffic",
    "write_router",
    "write_shards",
]
