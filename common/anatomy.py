"""Parts of a Hugging Face model that modules are made of: blocks, linear layers, embeddings, heads.

Nothing here knows adapters or runs: a model goes in, on whatever device and before anything is attached to it,
and names come out.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor, nn

from weft.common.errors import BaseModelError
from weft.common.modules import LORA_A, LORA_B, Outside, Topology

_BLOCK: Final = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Anatomy:
    """Parts of a model before anything is attached to it."""

    model_type: str
    """What transformers calls the architecture."""
    num_blocks: int
    """Transformer blocks."""
    block_lists: tuple[str, ...]
    """Names of the outermost lists of as many modules as there are blocks; a model that fits has one."""
    linear: Mapping[str, Any]
    """Layers that can carry an adapter, by name: nn.Linear, and GPT-2's Conv1D, which stores W transposed."""
    parameters: tuple[str, ...]
    """Names of all parameters in the model's order; a tied weight comes once, under its first name."""
    embeddings: frozenset[str]
    """Names of the parameters that turn tokens and positions into vectors."""
    tied: Tensor | None
    """The embedding's weight where the output layer shares it."""
    heads: tuple[str, ...]
    """Parts of a classification model outside its base model: trained whole, also beside adapters."""

    @classmethod
    def of(cls, model: Any) -> Anatomy:
        """Take a transformers model apart."""
        from transformers.pytorch_utils import Conv1D

        config = model.config.get_text_config()
        modules = dict(model.named_modules())
        names = tuple(name for name, _ in model.named_parameters())
        return cls(
            model_type=str(config.model_type),
            num_blocks=int(config.num_hidden_layers),
            block_lists=_outermost_lists(modules, int(config.num_hidden_layers)),
            linear={name: layer for name, layer in modules.items() if isinstance(layer, nn.Linear | Conv1D)},
            parameters=names,
            embeddings=frozenset(name for name in names if _is_embedding(name, modules)),
            tied=model.get_input_embeddings().weight if config.tie_word_embeddings else None,
            heads=tuple(
                name
                for name, child in model.named_children()
                if name != model.base_model_prefix and [*child.parameters()]
            ),
        )

    def targets(self, target_modules: Collection[str]) -> list[Any]:
        """The layers that ``target_modules`` name by their last parts; one without raises BaseModelError."""
        layers = []
        for target in target_modules:
            found = [layer for name, layer in self.linear.items() if f".{name}".endswith(f".{target}")]
            if not found:
                raise _no_such_layer(target, sorted({name.rpartition(".")[2] for name in self.linear}))
            if any(layer.weight is self.tied for layer in found):
                raise BaseModelError(
                    f"{target} shares its weights with the token embedding and cannot change alone",
                    hint=f"take {target} out of topology.lora.target_modules",
                )
            layers += found
        return layers

    def lora_levels(self, names: Collection[str], topology: Topology) -> dict[str, int]:
        """The level of each tensor of a path's LoRA modules; raises BaseModelError as ``level_of_blocks`` does.

        Factors within block i belong to the block's level, all others and a classifier's head to the last one.
        """
        of_block = topology.level_of_blocks(self.num_blocks)
        levels = {}
        for name in names:
            block = _BLOCK.search(name) if name.endswith((LORA_A, LORA_B)) else None
            levels[name] = of_block[int(block[1])] if block else of_block[-1]
        return levels

    def full_levels(self, topology: Topology, *, num_labels: int) -> dict[str, int]:
        """The level of each parameter of a path's full modules.

        Those of block i belong to the block's level and a classifier's head to the last. The others outside all
        blocks stay the base's, unless ``topology.outside`` says trained: then the embeddings, with an output
        layer that shares their weights, belong to level 0 and the rest to the last.

        Raises:
            BaseModelError: The model's blocks are not found, or the grid does not divide them.
        """
        of_block = topology.level_of_blocks(self.num_blocks)
        prefix = self._blocks() + "."
        levels = {}
        for name in self.parameters:
            if name.startswith(prefix):
                levels[name] = of_block[int(name.removeprefix(prefix).partition(".")[0])]
            elif num_labels and name.partition(".")[0] in self.heads:
                levels[name] = of_block[-1]
            elif topology.outside is Outside.TRAINED:
                levels[name] = 0 if name in self.embeddings else of_block[-1]
        return levels

    def _blocks(self) -> str:
        if len(self.block_lists) != 1:
            found = f": {', '.join(self.block_lists)}" if self.block_lists else ""
            raise BaseModelError(
                f"{self.model_type} models have {len(self.block_lists) or 'no'} lists of {self.num_blocks} "
                f"transformer blocks{found}; full modules need one",
                hint='set topology.kind = "lora", or use a Llama-style base',
            )
        return self.block_lists[0]


def _outermost_lists(modules: Mapping[str, nn.Module], length: int) -> tuple[str, ...]:
    """Lists of ``length`` modules that lie in no other such list (as a block's list of experts may)."""
    lists = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList) and len(module) == length
    ]
    return tuple(
        name for name in lists if not any(name.startswith(f"{other}.") for other in lists if other != name)
    )


def _is_embedding(parameter: str, modules: Mapping[str, nn.Module]) -> bool:
    # By name too, for what architectures add to the embedding of tokens, such as its own layer norm.
    return "embed" in parameter or isinstance(modules[parameter.rpartition(".")[0]], nn.Embedding)


def _no_such_layer(target: str, known: list[str]) -> BaseModelError:
    near = difflib.get_close_matches(target, known, n=3, cutoff=0.5)
    question = f"did you mean {' or '.join(near)}? " if near else ""
    return BaseModelError(
        f"topology.lora.target_modules: no linear layer of the base is called {target}",
        hint=f"{question}the base has {', '.join(known[:20])}",
    )
