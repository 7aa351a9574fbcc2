"""Models and adapters written by hand, a few numbers each, and merges of them without the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from weft.server.offline import merging
from weft.server.offline.recipe import InputSpec, Recipe, RecipeFile, merge_settings, understand

Tensors = Mapping[str, npt.NDArray[Any]]
LAYER = "model.layers.{}.mlp.weight"


def block_tensors(rng: np.random.Generator, *, num_blocks: int = 3, rows: int = 4, cols: int = 3) -> Tensors:
    """Embeddings [5, cols], a matrix [rows, cols] a block, and a head [5, cols], standard normal."""
    shapes = {"model.embed_tokens.weight": (5, cols)}
    shapes |= {LAYER.format(block): (rows, cols) for block in range(num_blocks)}
    shapes |= {"lm_head.weight": (5, cols)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_model(to: Path, tensors: Tensors, **config: Any) -> Path:
    """A Hugging Face directory; ``num_hidden_layers`` is that of the tensors unless it is given."""
    to.mkdir(parents=True)
    num_blocks = sum(name.startswith("model.layers.") for name in tensors)
    said = {"model_type": "llama", "num_hidden_layers": num_blocks, "tie_word_embeddings": False} | config
    (to / "config.json").write_text(json.dumps(said))
    save_file(dict(tensors), to / "model.safetensors")
    return to


def write_adapter(
    to: Path, factors: Mapping[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]], **config: Any
) -> Path:
    """A PEFT directory of (A [r, i], B [o, r]) by layer; alpha is r, so that ΔW = B A, unless it is given."""
    to.mkdir(parents=True)
    rank = len(next(iter(factors.values()))[0])
    said = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(factors),
        "base_model_name_or_path": "base",
    }
    (to / "adapter_config.json").write_text(json.dumps(said | config))
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    save_file(tensors, to / "adapter_model.safetensors")
    return to


def merge_recipe(recipe: Recipe, to: Path) -> dict[str, npt.NDArray[Any]]:
    """Merge; the tensors of the result by name."""
    plan = merging.make_plan(recipe, device="cpu")
    merging.merge(recipe, plan, to, merging.Options(threads=1, digests=False), advance=lambda count: None)
    return dict(load_file(to / f"{plan.stem}.safetensors"))


def merge_inputs(to: Path, *inputs: Path, **options: Any) -> dict[str, npt.NDArray[Any]]:
    """Merge directories by keys of a recipe; paths in them are text."""
    specs = tuple(InputSpec(path=str(path)) for path in inputs)
    file = RecipeFile(inputs=specs, **{"merge": merge_settings("mean", {})} | options)
    return merge_recipe(understand(file, resolve=Path), to)


def adapter_product(tensors: Tensors, layer: str) -> npt.NDArray[np.float64]:
    """B A of a layer of a merged adapter, whose scaling is 1."""
    prefix = f"base_model.model.{layer}"
    factors = (tensors[f"{prefix}.{side}.weight"].astype(np.float64) for side in ("lora_B", "lora_A"))
    return np.asarray(next(factors) @ next(factors))
