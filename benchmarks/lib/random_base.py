"""Bases of Llama's shape with random weights, and text to train them on."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

DEMO_BASE = Path(__file__).parents[2] / "client" / "demo" / "base"
"""The trained one that Weft ships."""
SHAPES = {
    "30M": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 9, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 2048,
    },
    "1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "vocab_size": 32000,
    },
}  # fmt: skip


def write_base(to: Path, shape: str) -> Path:
    """A random Llama with the demo's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, bos_token_id=0, eos_token_id=0)
    model = LlamaForCausalLM(config)
    (model.bfloat16() if shape == "1.1B" else model).save_pretrained(to)
    for path in DEMO_BASE.glob("tokenizer*"):
        shutil.copy(path, to)
    return to


def write_text(to: Path) -> Path:
    """Sources of the standard library."""
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:100]
    to.write_text("\n\n".join(path.read_text(errors="replace") for path in sources))
    return to
