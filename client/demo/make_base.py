"""Make the demo's base: a byte-level BPE tokenizer and a small Llama, trained on the corpus' base part.

    python -m weft.client.demo.make_base --to client/demo/base --seed 0

The result is an ordinary Hugging Face model directory in bf16 with the log of its training beside it.
On two CPU cores this takes about twenty minutes, hence the base is shipped and not made by the demo. The
matrix products run in bf16 under autocast, the weights and the optimiser in fp32; other processors round
otherwise, so another machine makes an equally good base and not the same bytes.

Shapes: N tokens of the corpus, B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from weft.client.demo import corpus

logger = logging.getLogger(__name__)

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides the base, beside the corpus."""

    seed: int = 0
    """Of the start weights and of the order of the text."""
    vocabulary: int = 2048
    """Tokens, ``<|endoftext|>`` among them."""
    hidden: int = 192
    """Width of the residual stream."""
    layers: int = 4
    """Transformer blocks."""
    intermediate: int = 512
    """Width of the gated MLP."""
    heads: int = 6
    """Query heads."""
    key_value_heads: int = 2
    """Heads of keys and values."""
    batch: int = 32
    """Sequences in a step."""
    sequence_tokens: int = 256
    """Tokens in a sequence."""
    steps: int = 2000
    """Optimiser steps."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from zero."""
    learning_rate: float = 3e-3
    """At its highest; a cosine takes it to a tenth."""
    weight_decay: float = 0.1
    """Of matrices only."""


def make_base(to: Path, recipe: Recipe, *, stdlib: Path | None = None) -> None:
    """Train tokenizer and model, write them to ``to`` and log what they cost on held-out text.

    Args:
        to: Directory, made if missing.
        recipe: Sizes, seed and schedule.
        stdlib: Where the standard library's sources lie; this Python's own by default.

    Raises:
        DataError: The standard library's sources cannot be read.
    """
    texts = corpus.base_documents(stdlib=stdlib)
    tokenizer = train_tokenizer(texts, recipe.vocabulary)
    tokens = encode(tokenizer, texts)
    logger.info("python %s, torch %s, %s", platform.python_version(), torch.__version__, platform.machine())
    logger.info("recipe %s", " ".join(f"{name}={value}" for name, value in asdict(recipe).items()))
    logger.info("corpus %d documents, %d bytes, %d tokens", len(texts), num_bytes(texts), len(tokens))
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(model_config(tokenizer, recipe))
    logger.info("model %d parameters", model.num_parameters())
    train(model, tokens, recipe)
    model.to(torch.bfloat16).save_pretrained(to)
    save_tokenizer(tokenizer, to)
    heldout = {"the base part": corpus.base_documents("heldout", stdlib=stdlib)}
    heldout |= {
        f"{topic}, never seen": corpus.documents(topic, "heldout", stdlib=stdlib) for topic in corpus.TOPICS
    }
    for part, texts in heldout.items():
        logger.info("held out of %s: %.4f bits per byte", part, bits_per_byte(model, tokenizer, texts))


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of ``vocabulary`` tokens; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, to: Path) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` so that every supported release loads them."""
    tokenizer.save_pretrained(to)
    path = to / "tokenizer_config.json"
    # Release 5 of transformers writes a class name of its own that release 4 does not know; both know this one.
    settings = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaConfig:
    """Return the architecture: a Llama with grouped keys and values and tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        intermediate_size=recipe.intermediate,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=2 * recipe.sequence_tokens,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> torch.Tensor:
    """Return all texts as int64 tokens ``[N]``, each ended by ``<|endoftext|>``."""
    encoded: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([token for tokens in encoded for token in (*tokens, tokenizer.eos_token_id)])


def train(model: LlamaForCausalLM, tokens: torch.Tensor, recipe: Recipe) -> None:
    """Train all weights in place on random windows of ``tokens``, int64 ``[N]``."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": gains, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    started_s, since_log = time.monotonic(), []
    model.train()
    for step, window in enumerate(windows(tokens, recipe), start=1):
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_nats(model, window).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        since_log.append(loss.item())
        if step % 50 == 0 or step == recipe.steps:
            seen, took_s = step * recipe.batch * recipe.sequence_tokens, time.monotonic() - started_s
            mean = sum(since_log) / len(since_log)
            logger.info("step %d, %d tokens, %.0f s, mean loss %.4f nats per token", step, seen, took_s, mean)
            since_log.clear()


def rate(step: int, recipe: Recipe) -> float:
    """Return the share of the highest learning rate at ``step``: linear warm-up, then a cosine to 0.1."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))


def windows(tokens: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Yield ``recipe.steps`` batches of random windows, int64 ``[B, T + 1]``."""
    generator = torch.Generator().manual_seed(recipe.seed)
    offsets = torch.arange(recipe.sequence_tokens + 1)
    for _ in range(recipe.steps):
        start = torch.randint(len(tokens) - recipe.sequence_tokens, (recipe.batch,), generator=generator)
        yield tokens[start[:, None] + offsets]


def next_token_nats(model: LlamaForCausalLM, window: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy of every token but the first.

    Args:
        model: Any float dtype.
        window: int64 ``[B, T + 1]``.

    Returns:
        fp32 ``[B * T]``, in nats.
    """
    logits = model(input_ids=window[:, :-1], use_cache=False).logits.float()
    return functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none")


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> float:
    """Return what a UTF-8 byte of ``texts`` costs, in windows of 256 tokens that do not overlap."""
    model.eval()
    tokens = torch.cat([torch.tensor([tokenizer.bos_token_id]), encode(tokenizer, texts)])
    starts = range(0, len(tokens) - 1, 256)
    nats = sum(next_token_nats(model, tokens[start : start + 257][None]).sum().item() for start in starts)
    return nats / math.log(2) / num_bytes(texts)


def num_bytes(texts: Sequence[str]) -> int:
    """Return the size of ``texts`` as UTF-8."""
    return sum(len(text.encode()) for text in texts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the base as the command line says."""
    parser = argparse.ArgumentParser(description="Train the demo's base.")
    parser.add_argument("--to", type=Path, required=True, help="directory to write, made if missing")
    parser.add_argument("--seed", type=int, default=0, help="of start weights and data order")
    parser.add_argument("--steps", type=int, default=2000, help="optimiser steps")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args(arguments)
    options.to.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    log = logging.FileHandler(options.to / "training.log", mode="w", encoding="utf-8")
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[log, logging.StreamHandler(sys.stderr)]
    )
    make_base(options.to, Recipe(seed=options.seed, steps=options.steps))


if __name__ == "__main__":
    main()
