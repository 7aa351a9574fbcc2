"""The model that all arms of the campaign begin with: a small Llama, pre-trained on all domains together.

DiPaCo starts its paths from a dense model that was trained for about a quarter of all steps (arXiv 2403.10616,
section 4): here the same trainer does it, as a topology of one path that also trains what lies outside the blocks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarks.quality.corpus import Corpus

from weft.client.data import TokenDataset
from weft.client.trainer.training import Trainer
from weft.common.base import pin_base
from weft.common.composition import ResidentBase, describe
from weft.common.ids import ModuleKey, run_id
from weft.common.initial import initial_module
from weft.common.modules import Kind, Outside, Topology
from weft.common.recipe import InnerSettings, Recipe, Schedule, TaskSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A Llama's size; every width is small, so that a campaign of thousands of tasks runs on two cores."""

    hidden_size: int = 48
    """Width of the residual stream."""
    intermediate_size: int = 96
    """Width of the gated layer."""
    num_blocks: int = 2
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads."""
    initial_std: float = 0.1
    """Of random weights: about 1/√hidden_size, without which so small a model learns little in so few steps."""


def write_random_base(to: Path, tokenizer: object, shape: Shape, *, positions: int, seed: int) -> Path:
    """Write a Llama with random weights and its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_blocks,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=positions,
        initializer_range=shape.initial_std,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def token_names(num_tokens: int) -> object:
    """A tokenizer whose tokens are words ``t0 t1 …``: the corpus is made of token ids."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{index}": index for index in range(num_tokens)}, unk_token="t0"))  # noqa: S106
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="t0")  # noqa: S106


def pretrain(
    random_base: Path, to: Path, data: TokenDataset, inner: InnerSettings, task: TaskSettings
) -> None:
    """Train all weights of the base for ``inner.steps`` and save it at ``to``."""
    topology = Topology(experts=(1,), kind=Kind.FULL, outside=Outside.TRAINED)
    recipe = Recipe(
        run=run_id("pretrain"),
        base=pin_base(random_base),
        task=task,
        topology=topology,
        inner=inner,
        num_rounds=1,
    )
    key = ModuleKey(0, 0)
    schemas = describe(random_base, recipe)
    resident = load(random_base, task, Kind.FULL)
    start = initial_module(random_base, recipe, schemas, key)
    result = Trainer(resident, recipe, data, clock=time.monotonic).train(
        start,
        {key: 0},
        num_steps=inner.steps,
        first_batch=0,
        optimiser_states={},
        on_step=lambda report: False,
    )
    trained = {name: start[name] + delta for name, delta in result.deltas[key].items()}
    resident.model.load_state_dict({name: torch.from_numpy(array) for name, array in trained.items()})
    resident.model.save_pretrained(to)
    resident.tokenizer.save_pretrained(to)


def pretrained_base(folder: Path, corpus: Corpus, inner: InnerSettings, shape: Shape) -> Path:
    """The base of a corpus, written once."""
    done = folder / "pretrained"
    if not done.exists():
        settings = corpus.settings
        tokenizer = token_names(settings.num_tokens)
        write_random_base(
            folder / "random", tokenizer, shape, positions=2 * settings.length, seed=settings.seed
        )
        sequences = corpus.train.sequences(settings.prefix)
        data = TokenDataset(sequences, seed=settings.seed, worker="pretrain", batch_size=inner.batch_size)
        pretrain(folder / "random", folder / "partial", data, inner, TaskSettings())
        (folder / "partial").rename(done)
    return done


def load(base: Path, task: TaskSettings, kind: Kind) -> ResidentBase:
    """The base on the CPU, in float32."""
    return ResidentBase.load(base, task, kind=kind, device=torch.device("cpu"), dtype=torch.float32)


def pretraining(batch_size: int, steps: int, *, learning_rate: float, seed: int) -> InnerSettings:
    """How a base is pre-trained; the rate stays high, since training goes on from there."""
    return InnerSettings(
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        schedule=Schedule.CONSTANT,
        warmup_steps=10,
        seed=seed,
    )
