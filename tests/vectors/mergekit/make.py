"""Make ``vectors.safetensors``: what mergekit makes of ``cases.yml``, for tests that do not have it.

Run it with an interpreter that has mergekit 0.1.5:

    python tests/vectors/mergekit/make.py tests/vectors/mergekit/vectors.safetensors

Every model, and every result, is one float32 vector: the tensors of ``SHAPES`` in that order.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import yaml  # type: ignore[import-untyped,unused-ignore]
from safetensors.numpy import load_file, save_file

CASES: Final = Path(__file__).with_name("cases.yml")
MODELS: Final = ("base", "m0", "m1", "m2")
CONFIG: Final[Mapping[str, Any]] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 4,
    "hidden_size": 8,
    "intermediate_size": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
_BLOCK: Final = {
    "input_layernorm": (8,),
    "mlp.down_proj": (8, 2),
    "mlp.gate_proj": (2, 8),
    "mlp.up_proj": (2, 8),
    "post_attention_layernorm": (8,),
    "self_attn.k_proj": (4, 8),
    "self_attn.o_proj": (8, 8),
    "self_attn.q_proj": (8, 8),
    "self_attn.v_proj": (4, 8),
}
SHAPES: Final[Mapping[str, tuple[int, ...]]] = {
    "lm_head.weight": (4, 8),
    "model.embed_tokens.weight": (4, 8),
    **{f"model.layers.{block}.{name}.weight": shape for block in range(3) for name, shape in _BLOCK.items()},
    "model.norm.weight": (8,),
}

Vector = npt.NDArray[np.float32]


def split(vector: Vector) -> dict[str, Vector]:
    """Tensors by name."""
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])
    parts = np.split(vector, ends[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(SHAPES.items(), parts, strict=True)}


def join(tensors: Mapping[str, npt.NDArray[Any]]) -> Vector:
    """The vector of tensors by name."""
    return np.concatenate([tensors[name].reshape(-1).astype(np.float32) for name in SHAPES])


def write_models(directory: Path, vectors: Mapping[str, Vector]) -> None:
    """A Hugging Face directory for each of ``MODELS``."""
    for name in MODELS:
        (directory / name).mkdir()
        (directory / name / "config.json").write_text(json.dumps(CONFIG))
        tensors = {key: np.ascontiguousarray(value) for key, value in split(vectors[name]).items()}
        save_file(tensors, directory / name / "model.safetensors", {"format": "pt"})


def new_models() -> dict[str, Vector]:
    """A base, and three that moved from it by a hundredth."""
    rng = np.random.default_rng(7)
    size = sum(int(np.prod(shape)) for shape in SHAPES.values())
    base = rng.standard_normal(size)
    moved = {name: base + 0.01 * rng.standard_normal(size) for name in MODELS[1:]}
    return {name: vector.astype(np.float32) for name, vector in {"base": base, **moved}.items()}


def main(to: Path) -> None:
    """Run all cases; needs mergekit."""
    import torch
    from mergekit.config import MergeConfiguration  # type: ignore[import-not-found]
    from mergekit.merge import run_merge  # type: ignore[import-not-found]
    from mergekit.options import MergeOptions  # type: ignore[import-not-found]
    from safetensors.torch import load_file as load_torch

    vectors = new_models()
    options = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, random_seed=1)
    with tempfile.TemporaryDirectory() as scratch:
        write_models(Path(scratch), vectors)
        os.chdir(scratch)
        for name, case in yaml.safe_load(CASES.read_text()).items():
            torch.manual_seed(1)
            run_merge(MergeConfiguration.model_validate(case), f"out-{name}", options)
            tensors = load_torch(f"out-{name}/model.safetensors")
            vectors[f"merged.{name}"] = join({key: each.float().numpy() for key, each in tensors.items()})
        save_file(vectors, "vectors.safetensors")
        content = Path("vectors.safetensors").read_bytes()
    to.write_bytes(content)


def load(path: Path) -> dict[str, Vector]:
    """Models by name, results as ``merged.`` and the case."""
    return dict(load_file(path))


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
