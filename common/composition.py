"""Modules onto the base: which tensors a run trains, and a model that is a base with one path's modules.

The only place that knows ``peft``. The base is loaded once and never changes; runs put adapters of their own
beside its layers, and switching between runs switches adapters. Tensor names are described in
``weft.common.modules``; here they are translated from and to PEFT's.

A module's tensors are found by building the model on the meta device, so that describing a run of any size
takes no memory and reads no weights. Tensors within transformer block i belong to the level that
``level_of_layer`` gives i; those outside every block, and a classifier's head, to the last level.
"""

from __future__ import annotations

import contextlib
import difflib
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch
from blake3 import blake3
from torch import Tensor, nn

from weft.common.errors import BaseModelError, OutOfMemory, UsageError
from weft.common.ids import ModuleKey
from weft.common.modules import LORA_A, LORA_B, Kind, Schema, TensorSpec, Topology, level_of_layer
from weft.common.recipe import Recipe, TaskKind, TaskSettings
from weft.common.sequences import IGNORED, Batch

Float32Array = npt.NDArray[np.float32]
Quantisation = Literal["none", "4bit"]
_BLOCK: Final = re.compile(r"\.(\d+)\.")


# -- what a run trains ---------------------------------------------------------------------------------------


def describe(base_dir: Path, recipe: Recipe) -> dict[ModuleKey, Schema]:
    """The tensors of each of the run's modules, all float32.

    Raises:
        BaseModelError: The model class is not supported, target modules match nothing, or there are fewer
            layers than levels.
        UsageError: The topology is of a kind that this version does not train.
    """
    with torch.device("meta"):
        model = _auto_class(recipe.task).from_config(read_config(base_dir, recipe.task))
        num_layers = _num_layers(model, recipe.topology)
        adapters, adapter = _attach(None, model, _anatomy(model), recipe)
    parameters = adapters.parameters_of(adapter)
    num_levels = len(recipe.topology.experts)
    levels: list[list[TensorSpec]] = [[] for _ in range(num_levels)]
    for name, parameter in sorted(parameters.items()):
        level = _level(name, num_layers=num_layers, num_levels=num_levels)
        levels[level].append(TensorSpec(name, "F32", tuple(parameter.shape)))
    return {key: Schema(tuple(levels[key.level])) for key in recipe.topology.modules}


@dataclass(frozen=True, slots=True)
class _Anatomy:
    """Parts of a model before anything is attached to it."""

    linear: Mapping[str, Any]
    """Layers that can carry an adapter, by name: nn.Linear, and GPT-2's Conv1D, which stores W transposed."""
    tied: Tensor | None
    """The embedding's weight where the output layer shares it."""
    heads: tuple[str, ...]
    """Parts of a classification model outside its base model: trained whole, beside the adapters."""

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


def _anatomy(model: Any) -> _Anatomy:
    from transformers.pytorch_utils import Conv1D

    children = model.named_children()
    tied = bool(model.config.get_text_config().tie_word_embeddings)
    return _Anatomy(
        linear={
            name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)
        },
        tied=model.get_input_embeddings().weight if tied else None,
        heads=tuple(
            name for name, child in children if name != model.base_model_prefix and [*child.parameters()]
        ),
    )


def _no_such_layer(target: str, known: list[str]) -> BaseModelError:
    near = difflib.get_close_matches(target, known, n=3, cutoff=0.5)
    question = f"did you mean {' or '.join(near)}? " if near else ""
    return BaseModelError(
        f"topology.lora.target_modules: no linear layer of the base is called {target}",
        hint=f"{question}the base has {', '.join(known[:20])}",
    )


def read_config(base_dir: Path, task: TaskSettings) -> Any:
    """The base's configuration; raises BaseModelError when transformers has no class for it and the task."""
    from transformers import AutoConfig

    labels = {"num_labels": task.num_labels} if task.num_labels else {}
    try:
        config = AutoConfig.from_pretrained(base_dir, local_files_only=True, **labels)
    except (ValueError, OSError, KeyError) as error:
        cause = str(error).strip().splitlines()[0][:200]
        raise BaseModelError(
            f"transformers cannot read {base_dir / 'config.json'}: {cause}", hint=_CLASSES
        ) from error
    auto_class = _auto_class(task)
    if type(config) not in auto_class._model_mapping:
        raise BaseModelError(
            f"{type(config).model_type} models have no class for {task.kind.value} in transformers",
            hint=_CLASSES,
        )
    return config


_RELOAD: Final = "download the model again, and use the class that it was saved from"
_CLASSES: Final = (
    "use a model that transformers opens with AutoModelForCausalLM or AutoModelForSequenceClassification"
)


def _auto_class(task: TaskSettings) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    classes = {
        TaskKind.CAUSAL_LM: AutoModelForCausalLM,
        TaskKind.SEQUENCE_CLASSIFICATION: AutoModelForSequenceClassification,
    }
    return classes[task.kind]


def _num_layers(model: Any, topology: Topology) -> int:
    if topology.kind is not Kind.LORA:
        raise UsageError(
            f"topology.kind {topology.kind.value} is not trained by this version", hint='use "lora"'
        )
    num_layers = int(model.config.get_text_config().num_hidden_layers)
    if len(topology.experts) > num_layers:
        raise BaseModelError(
            f"topology.experts has {len(topology.experts)} levels and the base has {num_layers} layers",
            hint=f"use at most {num_layers} levels",
        )
    return num_layers


def _level(name: str, *, num_layers: int, num_levels: int) -> int:
    block = _BLOCK.search(name)
    if block is None or not name.endswith((LORA_A, LORA_B)):
        return num_levels - 1
    return level_of_layer(int(block[1]), num_layers=num_layers, num_levels=num_levels)


# -- adapters ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Adapters:
    """The PEFT wrapper around a base, which holds adapters by name."""

    wrapper: Any

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters under Weft's names."""
        prefix = "base_model.model."
        found = {}
        for name, parameter in self.wrapper.named_parameters():
            if f".{adapter}." in name:
                plain = name.removeprefix(prefix).replace(".modules_to_save", "").replace(f".{adapter}.", ".")
                found[plain] = parameter
        return found


def _attach(
    adapters: _Adapters | None, model: Any, anatomy: _Anatomy, recipe: Recipe
) -> tuple[_Adapters, str]:
    """Add the run's adapter beside those there are; return them and its name."""
    from peft import LoraConfig, get_peft_model

    lora = recipe.topology.lora
    layers = anatomy.targets(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.rslora,
        target_modules=list(lora.target_modules),
        modules_to_save=list(anatomy.heads) if recipe.task.num_labels else None,
        fan_in_fan_out=not any(isinstance(layer, nn.Linear) for layer in layers),
    )
    adapter = _adapter_name(recipe)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 by the attribute's old name.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        if adapters is None:
            return _Adapters(get_peft_model(model, config, adapter_name=adapter)), adapter
        adapters.wrapper.add_adapter(adapter, config)
        return adapters, adapter


def _adapter_name(recipe: Recipe) -> str:
    return "weft" + blake3(f"{recipe.topology.lora}\n{recipe.task}".encode()).hexdigest()[:12]


# -- the resident base ---------------------------------------------------------------------------------------


class ResidentBase:
    """A frozen base in the device's memory, loaded once; ``compose`` puts a path's modules onto it."""

    def __init__(self, model: Any, tokenizer: Any, *, task: TaskSettings, device: torch.device) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.task = task
        self.device = device
        self._anatomy = _anatomy(model)
        self._adapters: _Adapters | None = None
        self._names: set[str] = set()

    @classmethod
    def load(
        cls,
        base_dir: Path,
        task: TaskSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        quantise: Quantisation = "none",
    ) -> ResidentBase:
        """Load the base from local files.

        Args:
            base_dir: A directory that ``check_base`` has passed.
            task: Which head the model has.
            device: Where to.
            dtype: Of the frozen weights, and of the arithmetic on a GPU; adapters stay float32.
            quantise: ``4bit`` stores linear layers as NF4 through bitsandbytes, on CUDA.

        Raises:
            BaseModelError: Unsupported class or damaged files.
            UsageError: 4-bit without CUDA or without bitsandbytes.
            OutOfMemory: The device is too small.
        """
        from safetensors import SafetensorError
        from transformers import AutoTokenizer

        config = read_config(base_dir, task)
        options: dict[str, Any] = {"device_map": {"": device}} if device.type == "cuda" else {}
        if quantise == "4bit":
            options["quantization_config"] = _quantisation(device, dtype)
        try:
            with _quiet_transformers(), memory_errors("loading the base"):
                tokenizer = AutoTokenizer.from_pretrained(base_dir, local_files_only=True)
                model, loading = _auto_class(task).from_pretrained(
                    base_dir,
                    config=config,
                    dtype=dtype,
                    local_files_only=True,
                    output_loading_info=True,
                    **options,
                )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            cause = str(error).strip().splitlines()[0][:200]
            raise BaseModelError(f"transformers cannot load {base_dir}: {cause}", hint=_RELOAD) from error
        _check_complete(loading["missing_keys"], _anatomy(model).heads if task.num_labels else ())
        if device.type not in {"cuda", "cpu"}:
            model.to(device)
        if task.num_labels and model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
        # Dropout stays off: a task's result must be a function of its inputs, so that it can be checked.
        model.eval().requires_grad_(requires_grad=False)
        return cls(model, tokenizer, task=task, device=device)

    def compose(self, recipe: Recipe, tensors: Mapping[str, Float32Array]) -> Composed:
        """Put the modules of one path onto the base; a ``Composed`` made before is no longer valid.

        Args:
            recipe: Of the run; its task must be the one that the base was loaded for.
            tensors: All tensors of the path's modules, by Weft's names.

        Raises:
            BaseModelError: The base lacks target modules.
            ValueError: Tensors missing, unknown or of the wrong shape.
        """
        if recipe.task != self.task:
            raise ValueError(f"the base was loaded for {self.task}, not for {recipe.task}")
        num_layers = _num_layers(self.model, recipe.topology)
        adapters, adapter = self._adapters, _adapter_name(recipe)
        if adapters is None or adapter not in self._names:
            adapters, adapter = _attach(adapters, self.model, self._anatomy, recipe)
            self._adapters = adapters
            self._names.add(adapter)
        adapters.wrapper.set_adapter(adapter)
        parameters = adapters.parameters_of(adapter)
        _copy(tensors, parameters)
        num_levels = len(recipe.topology.experts)
        levels = {name: _level(name, num_layers=num_layers, num_levels=num_levels) for name in parameters}
        return Composed(resident=self, wrapper=adapters.wrapper, parameters=parameters, levels=levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A base with one path's modules, ready to train or to evaluate."""

    resident: ResidentBase
    """Where the model lives."""
    wrapper: Any
    """PEFT's model."""
    parameters: Mapping[str, nn.Parameter]
    """The modules' parameters by Weft's names; float32, on the device."""
    levels: Mapping[str, int]
    """The level of each."""

    def trainable(self, keys: Collection[ModuleKey]) -> dict[ModuleKey, dict[str, nn.Parameter]]:
        """Parameters of the modules ``keys``, which get gradients; all others get none."""
        level_keys = {key.level: key for key in keys}
        chosen: dict[ModuleKey, dict[str, nn.Parameter]] = {key: {} for key in keys}
        for name, parameter in self.parameters.items():
            key = level_keys.get(self.levels[name])
            parameter.requires_grad_(key is not None)
            parameter.grad = None
            if key is not None:
                chosen[key][name] = parameter
        return chosen

    def tensors(self) -> dict[str, Float32Array]:
        """Copies of all parameters."""
        return {name: to_numpy(parameter) for name, parameter in self.parameters.items()}

    def losses(self, batch: Batch) -> Tensor:
        """Negative log-likelihood of each sequence in nats, summed over its labels: [B] float32."""
        logits = self.logits(batch)
        labels = torch.from_numpy(batch.labels).to(self.resident.device, non_blocking=True)
        losses = nn.functional.cross_entropy(
            logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none"
        )
        return losses.view(len(batch.labels), -1).sum(1)

    def logits(self, batch: Batch) -> Tensor:
        """[B, T, V] for causal language modelling, [B, labels] for classification."""
        device = self.resident.device
        tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
        options: dict[str, Any] = {"use_cache": False}
        if self.resident.task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
            positions = np.arange(batch.tokens.shape[1])
            mask = (positions < batch.lengths[:, None]).astype(np.int64)
            options = {"attention_mask": torch.from_numpy(mask).to(device)}
        # Only a GPU base is stored below float32, and there its arithmetic is wanted for the adapters too.
        dtype = self.resident.model.dtype
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits: Tensor = self.resident.model(input_ids=tokens, **options).logits
        return logits


def save_merged(to: Path, base_dir: Path, recipe: Recipe, tensors: Mapping[str, Float32Array]) -> None:
    """Save config.json and weights of the base with a path folded in; merged in float32, stored as the base is.

    Raises:
        BaseModelError: The base cannot be loaded.
        OutOfMemory: The base in float32 does not fit into the host's memory.
    """
    stored = read_config(base_dir, recipe.task).dtype or torch.float32
    resident = ResidentBase.load(base_dir, recipe.task, device=torch.device("cpu"), dtype=torch.float32)
    with memory_errors("merging"), _quiet_transformers():
        merged = resident.compose(recipe, tensors).wrapper.merge_and_unload()
        merged.to(stored).save_pretrained(to)


def to_numpy(tensor: Tensor) -> Float32Array:
    """A float32 copy in the host's memory."""
    array: Float32Array = tensor.detach().to("cpu", torch.float32, copy=True).numpy()
    return array


@contextlib.contextmanager
def memory_errors(doing: str) -> Iterator[None]:
    """Turn a device's way of saying that memory is short into OutOfMemory."""
    try:
        yield
    except RuntimeError as error:
        text = str(error).lower()
        if "out of memory" in text or "can't allocate memory" in text:
            hint = "use a smaller inner.batch_size or inner.sequence_length, or --quantise 4bit on CUDA"
            raise OutOfMemory(f"the device ran out of memory while {doing}", hint=hint) from error
        raise


def _copy(tensors: Mapping[str, Float32Array], parameters: Mapping[str, nn.Parameter]) -> None:
    if tensors.keys() != parameters.keys():
        odd = sorted(tensors.keys() ^ parameters.keys())
        raise ValueError(f"{len(odd)} tensors are missing or unknown, for example {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(f"{name} has shape {tensors[name].shape}, not {tuple(parameter.shape)}")
            # A copy first: arrays that are views of a mapped file are read-only, which torch warns of.
            parameter.copy_(torch.from_numpy(np.array(tensors[name], np.float32)))


def _check_complete(missing: Collection[str], heads: tuple[str, ...]) -> None:
    """Refuse files without some of the weights: transformers would draw these at random on each machine."""
    new = tuple(f"{name}." for name in heads)
    if absent := sorted(name for name in missing if not name.startswith(new)):
        raise BaseModelError(f"the base's files lack {absent[0]}", hint=_RELOAD)


def _quantisation(device: torch.device, dtype: torch.dtype) -> Any:
    from importlib.util import find_spec

    if device.type != "cuda":
        raise UsageError(
            f"--quantise 4bit needs CUDA and the device is {device.type}", hint="leave --quantise out"
        )
    if find_spec("bitsandbytes") is None:
        raise UsageError("--quantise 4bit needs bitsandbytes", hint="pip install 'weft[cuda]'")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' progress bars and its table of head weights that a base does not have."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
