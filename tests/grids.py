"""A microscopic grid on disk: random modules, a router fitted to words, and the base they belong to."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from tests.tiny import tiny_recipe

from weft.client.device import Device
from weft.client.grid import BestVersions, GridIndex, GridModule, write_grid
from weft.common.composition import ResidentBase, describe
from weft.common.ids import Digest
from weft.common.modules import Kind, Topology
from weft.common.recipe import Recipe, TaskSettings
from weft.common.routing import Router, fit_kmeans, prefix_features, write_router
from weft.common.sequences import Row
from weft.common.tensors import write_module

CPU = Device(torch_device=torch.device("cpu"), dtype=torch.float32, name="test")
WORDS = ("warp and weft ", "under over ", "row by row ", "0123456789 ")
PREFIX = 8


def documents(num: int = 24, *, repeat: int = 12) -> list[Row]:
    """Documents of four kinds, each its own word over and over."""
    return [
        Row({"text": WORDS[number % 4] * repeat + f"{number}. "}, f"row {number}") for number in range(num)
    ]


def grid_recipe(base: FilePath, *, experts: tuple[int, ...] = (2, 2), kind: Kind = Kind.LORA) -> Recipe:
    import dataclasses

    recipe = tiny_recipe(base, task=TaskSettings(prefix_tokens=PREFIX))
    lora = recipe.topology.lora
    return dataclasses.replace(recipe, topology=Topology(experts=experts, kind=kind, lora=lora))


def random_module(schema: Any, seed: int) -> dict[str, Any]:
    """Tensors far enough from zero that every path computes something else."""
    rng = np.random.default_rng(seed)
    return {spec.name: rng.normal(0, 0.2, spec.shape).astype(np.float32) for spec in schema.tensors}


def fitted_router(base: FilePath, recipe: Recipe) -> Router:
    """k-means over the documents' first tokens."""
    resident = ResidentBase.load(base, TaskSettings(), device=CPU.torch_device, dtype=torch.float32)
    features = np.concatenate([found for _, found in prefix_features(documents(), resident, PREFIX)])
    return fit_kmeans(
        features,
        paths=recipe.topology.paths,
        base_digest=recipe.base.digest,
        seed=0,
        num_prefix_tokens=PREFIX,
    )


def make_grid(
    to: FilePath, base: FilePath, recipe: Recipe, *, with_router: bool = True, with_best: bool = False
) -> GridIndex:
    """Write a grid of random modules at version 3, and with ``with_best`` version 1 of all and path 0.1's best."""
    sources = {}
    to.parent.mkdir(parents=True, exist_ok=True)
    for number, (key, schema) in enumerate(describe(base, recipe).items()):
        for version in (3, 1) if with_best else (3,):
            path = to.parent / f"{key}@{version}.source"
            write_module(path, random_module(schema, 10 * number + version), schema)
            digest = Digest(blake3(path.read_bytes()).hexdigest())
            sources[GridModule(module=str(key), version=version, blake3=digest)] = path
    router = to.parent / "source.router"
    if with_router:
        write_router(router, fitted_router(base, recipe))
    index = GridIndex(
        recipe=recipe,
        base=str(base),
        modules=tuple(sources),
        router=Digest(blake3(router.read_bytes()).hexdigest()) if with_router else None,
        best=(BestVersions(path="0.1", versions=(3, 1), validation_loss=1.5),) if with_best else (),
    )
    write_grid(
        to,
        index,
        modules=sources,
        router=router if with_router else None,
        documents={"weft-recipe.json": b"{}"},
    )
    return index
