"""A microscopic base with random weights: a Llama of four layers with its own byte-level tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weft.common.base import pin_base
from weft.common.ids import run_id
from weft.common.modules import LoraSettings, Topology
from weft.common.recipe import InnerSettings, Recipe, TaskSettings

TEXT = "the warp is held fixed and the weft is woven through it, over and under, row by row. " * 40
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(*, template: str = TEMPLATE) -> Any:
    """A byte-level BPE tokenizer of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.chat_template = template
    return fast


def write_tiny_base(to: Path, *, num_layers: int = 4, tied: bool = True) -> Path:
    """Write a Hugging Face model directory of about 50,000 random parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        LlamaForCausalLM(config).save_pretrained(to)
    tiny_tokenizer().save_pretrained(to)
    return to


def tiny_recipe(
    base: Path,
    *,
    task: TaskSettings | None = None,
    experts: tuple[int, ...] = (1,),
    lora: LoraSettings | None = None,
    inner: InnerSettings | None = None,
    num_rounds: int = 2,
) -> Recipe:
    """A recipe for a microscopic run."""
    small = InnerSettings(steps=5, batch_size=4, sequence_length=16, learning_rate=1e-2)
    return Recipe(
        run=run_id("tiny"),
        base=pin_base(base),
        task=task or TaskSettings(),
        topology=Topology(experts=experts, lora=lora or LoraSettings(rank=4, alpha=8.0)),
        inner=inner or small,
        num_rounds=num_rounds,
    )
