"""LoRA training as people write it without Weft: transformers, peft and torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.client.data import TokenDataset
from weft.common.composition import Quantisation
from weft.common.recipe import Recipe
from weft.common.tensors import Float32Array


class Plain:
    """A base with adapters, its optimiser and its batches."""

    def __init__(
        self, base: Path, recipe: Recipe, *, device: torch.device, dtype: torch.dtype, quantise: Quantisation
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        lora, inner = recipe.topology.lora, recipe.inner
        options: dict[str, Any] = {"device_map": {"": device}} if device.type == "cuda" else {}
        if quantise == "4bit":
            options["quantization_config"] = four_bit(dtype)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **options)
        config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
        self.model = get_peft_model(model, config)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=inner.learning_rate, weight_decay=inner.weight_decay, fused=True
        )
        self.recipe, self.device, self.dtype = recipe, device, dtype
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.num_batches = 0

    def begin_at(self, start: Mapping[str, Float32Array]) -> None:
        """Take the same start as Weft, so that losses can be compared."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    plain = name.removeprefix("base_model.model.").replace(".default.", ".")
                    parameter.copy_(torch.from_numpy(start[plain]))

    def use(self, data: TokenDataset, num_batches: int) -> None:
        """Make the batches that ``run`` will take, in Weft's order."""
        batches = [data.batch(step) for step in range(num_batches)]
        self.batches = [(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)) for batch in batches]

    def run(self, num_steps: int) -> tuple[float, ...]:
        """Train; the loss of each step."""
        losses = []
        for tokens, labels in self.batches[self.num_batches : self.num_batches + num_steps]:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                logits = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.to(self.device).flatten())
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(self.parameters, self.recipe.inner.grad_norm_max)
            self.optimiser.step()
            self.optimiser.zero_grad()
            losses.append(loss.item())
        self.num_batches += num_steps
        return tuple(losses)


def four_bit(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
