"""What an input directory holds: a whole model (Hugging Face layout) or a LoRA adapter (PEFT layout).

Legend: o = out_features, i = in_features, r = rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weft.common.base import CONFIG, TOKENIZER_FILES, base_file_names
from weft.common.errors import BaseModelError, InputError, UsageError
from weft.common.modules import LORA_A, LORA_B, TensorSpec
from weft.server.offline.sources import FLOAT8, FLOATS, Weights

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
BASE_FOLDER: Final = "base"
OWN_BASE: Final = f"./{BASE_FOLDER}"
"""What an adapter names as its base that brings it along, in a folder of its own."""
HEADS: Final = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
"""Names of output layers, which models may share with their input embeddings."""
_BUFFERS: Final = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|masked_bias)$")
"""Tensors that older files carry and models make themselves."""
_SCALES: Final = re.compile(r"(^|[._])scales?(_inv)?$")
"""Names of what multiplies quantised weights."""
_REFUSED: Final = {
    "use_dora": "DoRA adds a magnitude to each row, so that ΔW is no product of two factors",
    "lora_bias": "its factors have a bias of their own",
    "layer_replication": "it adapts copies of layers, which the base does not have",
    "use_qalora": "its factors are for grouped, quantised inputs",
    "alora_invocation_tokens": "it is active for a part of each text only",
    "target_parameters": "it adapts parameters that are no linear layers",
    "trainable_token_indices": "it replaces rows of the embeddings",
    "kasa_config": "it changes the base's own singular values",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
}
"""What makes an adapter something other than ΔW = scaling · B A, by the key of adapter_config.json."""
_MOVED_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights, or their beginnings, that subtract B A of the start from the base."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole model."""

    directory: Path
    """Where it lies."""
    label: str
    """What it is called in messages and the manifest."""
    weights: Weights
    """Its tensors."""
    config: Mapping[str, Any]
    """config.json."""

    @property
    def tied(self) -> bool:
        """Whether its output layer is its input embedding."""
        return bool(self.config.get("tie_word_embeddings", False))

    def merged_names(self) -> set[str]:
        """Names of the tensors that a merge is about: no output layer that is tied, no buffer that is made anew."""
        names = {name for name in self.weights.specs if not _BUFFERS.search(name)}
        return names.difference(HEADS) if self.tied else names


@dataclass(frozen=True, slots=True)
class Layer:
    """One adapted layer of an adapter: ΔW = scaling · B A."""

    a: TensorSpec
    """A [r, i]."""
    b: TensorSpec
    """B [o, r]."""
    scaling: float
    """alpha / r, or alpha / √r with rsLoRA; of its own where patterns say so."""

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of ΔW, (o, i)."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A LoRA adapter."""

    directory: Path
    """Where it lies."""
    label: str
    """What it is called in messages and the manifest."""
    weights: Weights
    """Its tensors."""
    config: Mapping[str, Any]
    """adapter_config.json."""
    layers: Mapping[str, Layer]
    """Adapted layers by the name that they have in the base."""
    others: Mapping[str, TensorSpec]
    """Tensors that it replaces in the base (modules_to_save), by the name that they have in the adapter."""

    @property
    def base_name(self) -> str:
        """The base that it says it belongs to."""
        name = str(self.config.get("base_model_name_or_path") or "")
        own = self.directory / BASE_FOLDER
        return str(own.resolve()) if name == OWN_BASE and own.is_dir() else name


Input = Checkpoint | Adapter


def open_input(directory: Path, label: str) -> Input:
    """Open an adapter or a model; raises InputError with what is wrong with it."""
    if (directory / ADAPTER_CONFIG).is_file():
        return open_adapter(directory, label)
    return open_checkpoint(directory, label)


def open_checkpoint(directory: Path, label: str) -> Checkpoint:
    """Open a model directory; raises InputError."""
    names = [name for name in base_file_names(directory) if name.endswith(".safetensors")]
    config = _read_json(directory / CONFIG)
    if config.get("quantization_config"):
        raise BaseModelError(
            f"{label} is quantised, and its tensors mean nothing without their scales",
            hint="dequantise it and save it in bfloat16 first",
        )
    weights = Weights(directory / name for name in names)
    _refuse_scales(weights, label)
    return Checkpoint(directory=directory, label=label, weights=weights, config=config)


def _refuse_scales(weights: Weights, label: str) -> None:
    """Eight-bit floats are weights, unless other tensors of the file say what they are to be multiplied by."""
    if any(spec.dtype in FLOAT8 for spec in weights.specs.values()):
        for name in weights.specs:
            if _SCALES.search(name):
                raise InputError(
                    f"{label} holds eight-bit floats and {name}, which scales them",
                    hint="dequantise it and save it in bfloat16 first",
                )


def open_adapter(directory: Path, label: str) -> Adapter:
    """Open an adapter directory; raises InputError."""
    config = _read_json(directory / ADAPTER_CONFIG)
    _check_adapter(config, label)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise InputError(
            f"{label} has no {ADAPTER_WEIGHTS}", hint="save the adapter again with save_pretrained"
        )
    weights = Weights([directory / ADAPTER_WEIGHTS])
    layers = _layers(weights, config, label)
    factors = {spec.name for layer in layers.values() for spec in (layer.a, layer.b)}
    others = {name: spec for name, spec in weights.specs.items() if name not in factors}
    for name in others:
        if "lora_" in name:
            raise InputError(
                f"{label} adapts more than linear layers: {name}",
                hint="leave embeddings and convolutions out of target_modules",
            )
    return Adapter(
        directory=directory, label=label, weights=weights, config=config, layers=layers, others=others
    )


def _check_adapter(config: Mapping[str, Any], label: str) -> None:
    if config.get("peft_type") != "LORA":
        raise InputError(
            f"{label} is {config.get('peft_type')}, not LoRA", hint="merge LoRA adapters or whole models"
        )
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise InputError(
                f"{label} has {key}: {reason}",
                hint="merge each into its base with peft's merge_and_unload, then merge the models",
            )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_MOVED_BASE):
        raise InputError(
            f"{label} began as {start}, which moves the base too: BA is not all that it changes",
            hint="save it with path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )
    if config.get("bias", "none") != "none":
        raise InputError(
            f'{label} has bias = "{config["bias"]}": biases of the base are no part of ΔW',
            hint="merge each into its base with peft's merge_and_unload, then merge the models",
        )


def _layers(weights: Weights, config: Mapping[str, Any], label: str) -> dict[str, Layer]:
    layers = {}
    for name, a in weights.specs.items():
        if not name.endswith(LORA_A):
            continue
        target = name.removesuffix(LORA_A)
        b = weights.specs.get(target + LORA_B)
        if b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise InputError(
                f"{label} has no B that fits {name} {list(a.shape)}",
                hint="only adapters of linear layers can be merged; save it again with save_pretrained",
            )
        for spec in (a, b):
            if spec.dtype not in FLOATS:
                raise InputError(f"{label} holds {spec.name} as {spec.dtype}", hint="save it in bfloat16")
        layer = target.removeprefix(PREFIX)
        layers[layer] = Layer(a, b, _scaling(config, layer, a.shape[0], label))
    if not layers:
        raise InputError(f"{label} adapts no layer", hint="check that it is a LoRA adapter")
    return layers


def _scaling(config: Mapping[str, Any], layer: str, rank: int, label: str) -> float:
    said = _pattern(config.get("rank_pattern"), layer, config.get("r"))
    if said != rank:
        raise InputError(
            f"{label} holds {layer} at rank {rank} and {ADAPTER_CONFIG} says {said}",
            hint="its files do not belong together: save it again with save_pretrained",
        )
    alpha = float(_pattern(config.get("alpha_pattern"), layer, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    """What a pattern says for a layer: keys are expressions for the end of its name, the first one counts."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", layer):
            return value
    return default


def tokenizer_files(directory: Path) -> dict[str, Path]:
    """The tokenizer's files, and how the model generates, by name."""
    names = sorted(TOKENIZER_FILES | {"generation_config.json"})
    return {name: directory / name for name in names if (directory / name).is_file()}


def block_of(name: str) -> int | None:
    """Index of the transformer block that a tensor belongs to: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(found[1]) if found else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}", hint="download or save it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", hint="download or save it again")
    return value


def split_label(text: str) -> tuple[str, str, float | None]:
    """Read ``[NAME=]DIR[:WEIGHT]`` into the name, unset: the directory's, the rest as it stands; raises UsageError."""
    place, weight = text, None
    head, colon, tail = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            place, weight = head, float(tail)
        except ValueError:
            raise UsageError(f"{tail!r} after {head} is not a weight", hint=f"write {head}:0.5") from None
        if not math.isfinite(weight):
            raise UsageError(f"the weight of {head} is {tail}", hint=f"write {head}:0.5")
    name, equals, path = place.partition("=")
    if not equals or Path(place).exists():
        name, path = Path(place).resolve().name, place
    return name, path, weight
