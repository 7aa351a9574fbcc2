"""Modules onto the base: which tensors a run trains, and a model that is a base with one path's modules.

The only place that knows ``peft``. Tensor names are described in
``weft.common.modules``; here they are translated from and to PEFT's.

A module's tensors are found by building the model on the meta device, so that describing a run of any size
takes no memory and reads no weights; ``weft.common.anatomy`` says which level each belongs to.

A resident base is of one kind. With LoRA modules (``_Adapters``) each slot is an adapter, and with full modules
(``weft.common.blocks``) the weights themselves are exchanged; ``ResidentBase`` and ``Composed`` hide which.
"""

from __future__ import annotations

import contextlib
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

from weft.common.anatomy import Anatomy
from weft.common.blocks import Blocks, check_fit, copy_into
from weft.common.errors import BaseModelError, OutOfMemory, UsageError
from weft.common.ids import ModuleKey
from weft.common.modules import Kind, Schema, TensorSpec
from weft.common.recipe import Recipe, TaskKind, TaskSettings
from weft.common.sequences import IGNORED, Batch

Float32Array = npt.NDArray[np.float32]
Int64Array = npt.NDArray[np.int64]
Quantisation = Literal["none", "4bit"]


# -- what a run trains ---------------------------------------------------------------------------------------


def describe(base_dir: Path, recipe: Recipe) -> dict[ModuleKey, Schema]:
    """The tensors of each of the run's modules, all float32.

    Raises:
        BaseModelError: The model class is not supported, target modules match nothing, or the grid does not
            divide the layers.
    """
    with torch.device("meta"):
        model = _auto_class(recipe.task).from_config(read_config(base_dir, recipe.task))
        anatomy = Anatomy.of(model)
        recipe.topology.level_of_blocks(anatomy.num_blocks)
        if recipe.topology.kind is Kind.LORA:
            adapters, name = _Adapters(model, anatomy), _adapter_name(recipe)
            adapters.attach(recipe, name)
            parameters = adapters.parameters_of(name)
        else:
            parameters = dict(model.named_parameters())
    levels = _levels(anatomy, parameters, recipe)
    specs: list[list[TensorSpec]] = [[] for _ in recipe.topology.experts]
    for name, level in sorted(levels.items()):
        specs[level].append(TensorSpec(name, "F32", tuple(parameters[name].shape)))
    return {key: Schema(tuple(specs[key.level])) for key in recipe.topology.modules}


def _levels(anatomy: Anatomy, names: Collection[str], recipe: Recipe) -> dict[str, int]:
    if recipe.topology.kind is Kind.LORA:
        return anatomy.lora_levels(names, recipe.topology)
    return anatomy.full_levels(recipe.topology, num_labels=recipe.task.num_labels)


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


# -- adapters ------------------------------------------------------------------------------------------------


class _Adapters:
    """LoRA modules on a resident base: PEFT adapters by name, of which one is active; slots switch, none copies."""

    def __init__(self, model: Any, anatomy: Anatomy) -> None:
        self._model = model
        self._anatomy = anatomy
        self._wrapper: Any = None
        self._names: set[str] = set()
        self._slots: dict[str, tuple[Recipe, str]] = {}
        """The run and the adapter of each named slot."""

    def compose(
        self, recipe: Recipe, tensors: Mapping[str, Float32Array], slot: str, rank: int
    ) -> dict[str, nn.Parameter]:
        """Put a path's factors into the slot's adapter; return its parameters."""
        adapter = _adapter_name(recipe, slot, rank)
        if adapter not in self._names:
            self._drop_other(slot, adapter)
            self.attach(recipe, adapter, rank)
        self._wrapper.set_adapter(adapter)
        parameters = self.parameters_of(adapter)
        check_fit(tensors, parameters)
        copy_into(tensors, parameters)
        if slot:
            self._slots[slot] = recipe, adapter
        return parameters

    def adopt(self, recipe: Recipe, parameters: Mapping[str, nn.Parameter], rank: int) -> None:
        """Make these the parameters of the unnamed slot: themselves, so that whoever trains them goes on."""
        adapter = _adapter_name(recipe, "", rank)
        self.attach(recipe, adapter, rank)
        self._wrapper.set_adapter(adapter)
        for place, name in self._places(adapter).items():
            module, _, own = place.rpartition(".")
            setattr(self._wrapper.get_submodule(module), own, parameters[name])

    def activate(self, recipe: Recipe, slot: str) -> dict[str, nn.Parameter]:
        """Switch to a named slot; raises ValueError when it was not composed for this run."""
        held, adapter = self._slots.get(slot, (None, ""))
        if held != recipe:
            raise ValueError(f"nothing of {recipe.run} was composed as {slot!r}")
        self._wrapper.set_adapter(adapter)
        return self.parameters_of(adapter)

    def drop(self, slot: str) -> None:
        """Remove a named slot's adapter."""
        _, adapter = self._slots.pop(slot, (None, ""))
        if adapter:
            self._remove(adapter)

    def trains(self, names: Collection[str]) -> None:
        """Nothing to note: an adapter keeps what is trained in it."""

    def bare_hidden(self, **inputs: Any) -> Tensor:
        """The base model's last hidden state [B, T, d] with all adapters off."""
        with self._disabled():
            hidden: Tensor = self._model.base_model(**inputs).last_hidden_state
        return hidden

    def folded(self) -> Any:
        """The model with the active adapter in its weights; nothing here works afterwards."""
        return self._wrapper.merge_and_unload()

    def attach(self, recipe: Recipe, adapter: str, rank: int = 0) -> None:
        """Add an adapter for a run; raises BaseModelError where its targets are not found."""
        from peft import get_peft_model

        config = _lora_config(recipe, self._anatomy, rank)
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 by the attribute's old name.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            if self._wrapper is None:
                self._wrapper = get_peft_model(self._model, config, adapter_name=adapter)
            else:
                self._wrapper.add_adapter(adapter, config)
        self._names.add(adapter)

    def parameters_of(self, adapter: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters under Weft's names."""
        return {name: self._wrapper.get_parameter(place) for place, name in self._places(adapter).items()}

    def _places(self, adapter: str) -> dict[str, str]:
        """PEFT's names of an adapter's parameters, and Weft's."""
        prefix = "base_model.model."
        return {
            place: place.removeprefix(prefix).replace(".modules_to_save", "").replace(f".{adapter}.", ".")
            for place, _ in self._wrapper.named_parameters()
            if f".{adapter}." in place
        }

    def _drop_other(self, slot: str, adapter: str) -> None:
        if self._slots.get(slot, (None, adapter))[1] != adapter:
            self.drop(slot)

    def _remove(self, adapter: str) -> None:
        with warnings.catch_warnings():
            # It says which other adapter it makes the active one; the next use names its own.
            warnings.filterwarnings("ignore", message="Adapter .* was active", category=UserWarning)
            self._wrapper.delete_adapter(adapter)
        self._names.discard(adapter)

    @contextlib.contextmanager
    def _disabled(self) -> Iterator[None]:
        if not self._names:
            yield
            return
        # Switching adapters on again gives gradients to all of the active one, whatever it had before.
        before = [(parameter, parameter.requires_grad) for parameter in self._wrapper.parameters()]
        try:
            with self._wrapper.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in before:
                parameter.requires_grad_(requires_grad)


def _lora_config(recipe: Recipe, anatomy: Anatomy, rank: int) -> Any:
    from peft import LoraConfig

    lora = recipe.topology.lora
    layers = anatomy.targets(lora.target_modules)
    narrow = 0 < rank < lora.rank
    return LoraConfig(
        r=rank if narrow else lora.rank,
        # A narrow slice of the factors is scaled as the whole is: it is a part of the same B A.
        lora_alpha=lora.scaling * rank if narrow else lora.alpha,
        use_rslora=lora.rslora and not narrow,
        target_modules=list(lora.target_modules),
        modules_to_save=list(anatomy.heads) if recipe.task.num_labels else None,
        fan_in_fan_out=not any(isinstance(layer, nn.Linear) for layer in layers),
    )


def _adapter_name(recipe: Recipe, slot: str = "", rank: int = 0) -> str:
    rank = min(rank or recipe.topology.lora.rank, recipe.topology.lora.rank)
    # The unnamed slot is for whoever composes next: runs of equal shape take turns on one adapter.
    owner = f"{recipe.run}\n{slot}" if slot else ""
    text = f"{recipe.topology.lora}\n{recipe.task}\n{rank}\n{owner}"
    return "weft" + blake3(text.encode()).hexdigest()[:12]


# -- the resident base ---------------------------------------------------------------------------------------


def load_model(
    base_dir: Path,
    task: TaskSettings,
    *,
    device: torch.device,
    dtype: torch.dtype,
    kind: Kind = Kind.LORA,
    quantise: Quantisation = "none",
) -> tuple[Any, Any]:
    """Load the base and its tokenizer from local files, frozen.

    Args:
        base_dir: A directory that ``check_base`` has passed; full modules read it again later.
        task: Which head the model has.
        device: Where to.
        dtype: Of the arithmetic on a GPU, and of frozen weights under LoRA; what is trained is float32.
        kind: Of the modules that will be composed: full ones need the weights in float32.
        quantise: ``4bit`` stores linear layers as NF4 through bitsandbytes, on CUDA, under LoRA.

    Raises:
        BaseModelError: Unsupported class or damaged files.
        UsageError: 4-bit without CUDA, without bitsandbytes, or with full modules.
        OutOfMemory: The device is too small.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    config = read_config(base_dir, task)
    options: dict[str, Any] = {"device_map": {"": device}} if device.type == "cuda" else {}
    if quantise == "4bit":
        options["quantization_config"] = _quantisation(device, dtype, kind)
    try:
        with _quiet_transformers(), memory_errors("loading the base"):
            tokenizer = AutoTokenizer.from_pretrained(base_dir, local_files_only=True)
            model, loading = _auto_class(task).from_pretrained(
                base_dir,
                config=config,
                dtype=torch.float32 if kind is Kind.FULL else dtype,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        cause = str(error).strip().splitlines()[0][:200]
        raise BaseModelError(f"transformers cannot load {base_dir}: {cause}", hint=_RELOAD) from error
    _check_complete(loading["missing_keys"], Anatomy.of(model).heads if task.num_labels else ())
    if device.type not in {"cuda", "cpu"}:
        model.to(device)
    if task.num_labels and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id
    # Dropout stays off: a task's result must be a function of its inputs, so that it can be checked.
    model.eval().requires_grad_(requires_grad=False)
    return model, tokenizer


class ResidentBase:
    """A base in the device's memory, loaded once; ``compose`` puts a path's modules onto it.

    For LoRA modules the weights stay frozen and each named slot is an adapter of its own that stays beside them.
    For full modules the weights of the blocks are exchanged, so that a resident is of one kind. Slot names are
    the caller's choice, unique on this base, for example ``RUN/path:2.3``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        base_dir: Path,
        task: TaskSettings,
        kind: Kind,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.tokenizer = tokenizer
        self.base_dir = base_dir
        self.task = task
        self.kind = kind
        self.device = device
        self.dtype = dtype
        self.turn = 0
        """Counts what was put in; a ``Composed`` is valid in its own turn."""
        self._active = ""
        self._take(model)

    @classmethod
    def load(
        cls,
        base_dir: Path,
        task: TaskSettings,
        *,
        device: torch.device,
        dtype: torch.dtype,
        kind: Kind = Kind.LORA,
        quantise: Quantisation = "none",
    ) -> ResidentBase:
        """Load the base from local files; arguments and errors of ``load_model``."""
        model, tokenizer = load_model(
            base_dir, task, device=device, dtype=dtype, kind=kind, quantise=quantise
        )
        return cls(model, tokenizer, base_dir=base_dir, task=task, kind=kind, device=device, dtype=dtype)

    def compose(
        self, recipe: Recipe, tensors: Mapping[str, Float32Array], *, slot: str = "", rank: int = 0
    ) -> Composed:
        """Put the modules of one path onto the base; a ``Composed`` made before is no longer valid.

        Args:
            recipe: Of the run; its task and kind must be those that the base was loaded for.
            tensors: All tensors of the path's modules, by Weft's names. A named slot of full modules keeps these
                arrays: they must not change, and paths that share a module should be given the same arrays.
            slot: Keeps the path for ``activate``; the unnamed slot lasts until something else is composed.
            rank: Of the factors in ``tensors``, which then are those of ``Schema.at_rank``; 0 is the run's own.

        Raises:
            BaseModelError: The base lacks target modules or the grid does not divide its blocks.
            ValueError: Tensors missing, unknown or of the wrong shape.
        """
        if (recipe.task, recipe.topology.kind) != (self.task, self.kind):
            raise ValueError(
                f"the base was loaded for {self.task}, {self.kind.value}, "
                f"not for {recipe.task}, {recipe.topology.kind.value}"
            )
        self.turn += 1
        parameters = self._modules.compose(recipe, tensors, slot, rank)
        return self._composed(recipe, slot, parameters)

    def activate(self, recipe: Recipe, slot: str) -> Composed:
        """Go back to the path of a named slot, as it was left; a ``Composed`` made before is no longer valid.

        LoRA modules are switched in place; of full ones, those are copied in that the path active now does not
        share. Raises ValueError when nothing of the run was composed as ``slot``.
        """
        parameters = self._modules.activate(recipe, slot)
        self.turn += 1
        return self._composed(recipe, slot, parameters)

    def drop(self, slot: str) -> None:
        """Free what a named slot keeps; one that is not there is left at that."""
        if slot and slot == self._active:
            self.turn += 1
            self._active = ""
        self._modules.drop(slot)

    def features(self, tokens: Int64Array, lengths: Int64Array) -> Float32Array:
        """What routers see of documents: the mean of the base's last hidden state over their tokens.

        It is the hidden state after the last block and the final norm (``last_hidden_state``), of the bare base:
        whatever is composed is put aside and stays as it is. In float32 a row does not depend on its neighbours
        or on padding, to 1e-5; under LoRA on a GPU it has the precision of the base's dtype there. After full
        modules were composed, the first call reads the base's own blocks from its files and keeps them on the
        device (DiPaCo, arXiv 2403.10616, section 7.2).

        Args:
            tokens: [B, T], padded at the end.
            lengths: [B], tokens of each row, at least 1.

        Returns:
            float32 [B, d].

        Raises:
            ValueError: A row without tokens.
            OutOfMemory: The device is too small.
        """
        if lengths.min(initial=1) < 1 or lengths.max(initial=0) > tokens.shape[1]:
            raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}, not 1 to {tokens.shape[1]}")
        mask = torch.from_numpy(np.arange(tokens.shape[1]) < lengths[:, None]).to(self.device)
        inputs = torch.from_numpy(tokens).to(self.device)
        with torch.no_grad(), memory_errors("computing features"), self.arithmetic(bare=True):
            hidden = self._modules.bare_hidden(input_ids=inputs, attention_mask=mask.long(), use_cache=False)
        valid = hidden.float().masked_fill(~mask[..., None], 0)
        return to_numpy(valid.sum(1) / mask.sum(1, keepdim=True))

    def arithmetic(self, *, bare: bool = False) -> torch.autocast:
        """The context in which the model computes: on a GPU in ``dtype``, also where weights are float32.

        The bare base under full modules computes in float32, as its weights are.
        """
        below = self.dtype != torch.float32 and not (bare and self.kind is Kind.FULL)
        return torch.autocast(self.device.type, self.dtype, enabled=below)

    def forward(self, **inputs: Any) -> Any:
        """What the model makes of its inputs, with the active path."""
        with self.arithmetic():
            return self.model(**inputs)

    def trains(self, names: Collection[str]) -> None:
        """Hear which parameters of the active path are about to be trained."""
        self._modules.trains(names)

    def folded(self) -> Any:
        """The model with the active path in its weights; the resident is used up."""
        return self._modules.folded()

    def _take(self, model: Any) -> None:
        """Let this be the model, with nothing composed."""
        self.model = model
        self.anatomy = Anatomy.of(model)
        self._modules: _Adapters | Blocks = (
            _Adapters(model, self.anatomy)
            if self.kind is Kind.LORA
            else Blocks(model, self.anatomy, self.base_dir)
        )

    def _adopt(self, recipe: Recipe, parameters: Mapping[str, nn.Parameter], rank: int) -> None:
        """Compose a path under LoRA from parameters that were on another model."""
        assert isinstance(self._modules, _Adapters)  # noqa: S101 - full modules are weights of the model itself
        self._modules.adopt(recipe, parameters, rank)

    def _composed(self, recipe: Recipe, slot: str, parameters: Mapping[str, nn.Parameter]) -> Composed:
        self._active = slot
        levels = _levels(self.anatomy, parameters, recipe)
        return Composed(resident=self, turn=self.turn, parameters=parameters, levels=levels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A base with one path's modules, ready to train or to evaluate."""

    resident: ResidentBase
    """Where the model lives."""
    turn: int
    """The resident's when this was made; in a later turn another path is in its place."""
    parameters: Mapping[str, nn.Parameter]
    """The modules' parameters by Weft's names; float32, on the device."""
    levels: Mapping[str, int]
    """The level of each."""

    def trainable(self, keys: Collection[ModuleKey]) -> dict[ModuleKey, dict[str, nn.Parameter]]:
        """Parameters of the modules ``keys``, which get gradients; all others get none."""
        self._check_turn()
        level_keys = {key.level: key for key in keys}
        chosen: dict[ModuleKey, dict[str, nn.Parameter]] = {key: {} for key in keys}
        for name, parameter in self.parameters.items():
            key = level_keys.get(self.levels[name])
            parameter.requires_grad_(key is not None)
            parameter.grad = None
            if key is not None:
                chosen[key][name] = parameter
        self.resident.trains([name for module in chosen.values() for name in module])
        return chosen

    def tensors(self) -> dict[str, Float32Array]:
        """Copies of all parameters."""
        self._check_turn()
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
        """[B, T, V] for causal language modelling, [B, labels] for classification.

        Raises ValueError when another path was composed or activated since.
        """
        self._check_turn()
        device = self.resident.device
        tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
        options: dict[str, Any] = {"use_cache": False}
        if self.resident.task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
            positions = np.arange(batch.tokens.shape[1])
            mask = (positions < batch.lengths[:, None]).astype(np.int64)
            options = {"attention_mask": torch.from_numpy(mask).to(device)}
        logits: Tensor = self.resident.forward(input_ids=tokens, **options).logits
        return logits

    def _check_turn(self) -> None:
        if self.turn != self.resident.turn:
            raise ValueError("another path was put onto the base since; activate this one again")


def save_merged(to: Path, base_dir: Path, recipe: Recipe, tensors: Mapping[str, Float32Array]) -> None:
    """Save config.json and weights of the base with a path in them, made in float32, stored as the base is.

    LoRA factors are folded into the weights that they adapt; full modules take the place of the base's own.

    Raises:
        BaseModelError: The base cannot be loaded.
        OutOfMemory: The base in float32 does not fit into the host's memory.
    """
    stored = read_config(base_dir, recipe.task).dtype or torch.float32
    resident = ResidentBase.load(
        base_dir, recipe.task, device=torch.device("cpu"), dtype=torch.float32, kind=recipe.topology.kind
    )
    resident.compose(recipe, tensors)
    with memory_errors("merging"), _quiet_transformers():
        resident.folded().to(stored).save_pretrained(to)


def untrained_parameters(directory: Path) -> dict[str, Float32Array]:
    """Parameters of a causal language model as transformers starts them, by name.

    Needs config.json alone. Matrices are drawn from torch's generator, which is left as it was.

    Raises:
        BaseModelError: transformers has no class for the configuration.
        OutOfMemory: The model in float32 does not fit into the host's memory.
    """
    config = read_config(directory, TaskSettings())
    with torch.random.fork_rng(devices=[]), memory_errors("making a base"):
        model = _auto_class(TaskSettings()).from_config(config, dtype=torch.float32)
        return {name: to_numpy(parameter) for name, parameter in model.named_parameters()}


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


def _check_complete(missing: Collection[str], heads: tuple[str, ...]) -> None:
    """Refuse files without some of the weights: transformers would draw these at random on each machine."""
    new = tuple(f"{name}." for name in heads)
    if absent := sorted(name for name in missing if not name.startswith(new)):
        raise BaseModelError(f"the base's files lack {absent[0]}", hint=_RELOAD)


def _quantisation(device: torch.device, dtype: torch.dtype, kind: Kind) -> Any:
    from importlib.util import find_spec

    if kind is Kind.FULL:
        raise UsageError(
            "--quantise 4bit stores weights that cannot be trained, and this run trains full modules",
            hint='leave --quantise out, or use a run with topology.kind = "lora"',
        )
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
