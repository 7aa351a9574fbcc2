"""``weft eval``: how well an adapter, or a bare base, predicts text, in bits per byte."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weft.client.device import Device
from weft.client.pull import RECIPE_FILE
from weft.common.base import resolve_source
from weft.common.composition import Composed, ResidentBase, describe
from weft.common.errors import InputError, UsageError
from weft.common.evaluation import evaluate, load_heldout
from weft.common.ids import Digest, RunId
from weft.common.initial import initial_tensors
from weft.common.manifest import Signed, parse_json
from weft.common.modules import LoraSettings, Topology
from weft.common.recipe import BasePin, InnerSettings, Recipe, TaskSettings
from weft.common.sequences import Sequences
from weft.common.settings import from_table
from weft.common.tensors import FOREIGN, Float32Array, TensorFile, to_float32

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_LINEAR: Final = frozenset({"Linear", "Conv1D"})
_PREFIX: Final = "base_model.model."
_CONFIG_BYTES_MAX: Final = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a model came to on one file, or on all of them together."""

    data: str
    """Path, or ``all``."""
    bits_per_byte: float | None
    """None for classification."""
    loss: float
    """Mean nats per label."""
    num_bytes: int
    num_labels: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScores:
    """What a model came to."""

    model: str
    """Its directory."""
    results: tuple[Score, ...]
    """One for each of the data, in the order given."""
    together: Score
    """All of the data as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Model:
    """What a directory holds."""

    recipe: Recipe
    tensors: dict[str, Float32Array] | None
    """None: a bare base."""
    base_dir: Path


class Scorer:
    """Evaluates models on data; bases are loaded and data are tokenised once.

    Args:
        data: Files or directories of text.
        base: The adapters' base: directory or Hub id; what an adapter names when None.
        sequence_length: Tokens per window; None takes the recipe's, or 128.
        device: Where to.
    """

    def __init__(
        self, data: Sequence[Path], *, base: str | None, sequence_length: int | None, device: Device
    ) -> None:
        self._data = data
        self._base = base
        self._sequence_length = sequence_length
        self._device = device
        self._residents: dict[tuple[Path, TaskSettings], ResidentBase] = {}
        self._sequences: dict[tuple[Path, Path, TaskSettings, int], Sequences] = {}

    def score(self, directory: Path, progress: Callable[[int, int], None]) -> ModelScores:
        """Evaluate a PEFT adapter directory or a base directory; ``progress`` hears of sequences done and in all.

        Raises:
            InputError: The directory, its base or the data cannot be used.
        """
        model = _open(directory, self._base, self._sequence_length)
        resident = self._resident(model)
        recipe, tensors = model.recipe, model.tensors
        if tensors is None:
            recipe = _recipe(_inert(resident), recipe.inner)
            schemas = describe(model.base_dir, recipe).values()
            tensors = {
                name: array for schema in schemas for name, array in initial_tensors(schema, seed=0).items()
            }
        composed = resident.compose(recipe, tensors)
        results = tuple(self._score(composed, path, model, progress) for path in self._data)
        return ModelScores(model=str(directory), results=results, together=_together(results))

    def _resident(self, model: _Model) -> ResidentBase:
        key = (model.base_dir, model.recipe.task)
        if key not in self._residents:
            self._residents[key] = ResidentBase.load(
                model.base_dir, model.recipe.task, device=self._device.torch_device, dtype=self._device.dtype
            )
        return self._residents[key]

    def _score(
        self, composed: Composed, path: Path, model: _Model, progress: Callable[[int, int], None]
    ) -> Score:
        key = (path, model.base_dir, model.recipe.task, model.recipe.inner.sequence_length)
        if key not in self._sequences:
            self._sequences[key] = load_heldout(path, self._resident(model).tokenizer, model.recipe)
        evaluation = evaluate(composed, self._sequences[key], on_progress=progress)
        return Score(
            data=str(path),
            bits_per_byte=evaluation.bits_per_byte,
            loss=evaluation.loss,
            num_bytes=evaluation.num_bytes,
            num_labels=int(evaluation.num_labels.sum()),
        )


def _together(scores: Sequence[Score]) -> Score:
    num_labels = sum(item.num_labels for item in scores)
    num_bytes = sum(item.num_bytes for item in scores)
    bits = sum(item.bits_per_byte * item.num_bytes for item in scores if item.bits_per_byte is not None)
    return Score(
        data="all",
        bits_per_byte=bits / num_bytes if num_bytes else None,
        loss=sum(item.loss * item.num_labels for item in scores) / num_labels,
        num_bytes=num_bytes,
        num_labels=num_labels,
    )


def _open(directory: Path, base: str | None, sequence_length: int | None) -> _Model:
    if not (directory / ADAPTER_CONFIG).is_file():
        recipe = _recipe(LoraSettings(), _inner(sequence_length))
        return _Model(recipe=recipe, tensors=None, base_dir=resolve_source(str(directory)))
    recipe = _recipe_of(directory, sequence_length)
    named = base or _config(directory).get("base_model_name_or_path") or ""
    if not base and not Path(named).is_dir() and "/" not in named:
        raise UsageError(f"{directory} does not say where its base is", hint="give --base DIR")
    with TensorFile(directory / ADAPTER_WEIGHTS, FOREIGN) as file:
        tensors = {
            spec.name.removeprefix(_PREFIX): to_float32(file.array(spec.name), spec.dtype)
            for spec in file.header.specs
        }
    return _Model(recipe=recipe, tensors=tensors, base_dir=resolve_source(str(named)))


def _recipe_of(directory: Path, sequence_length: int | None) -> Recipe:
    """What the adapter was trained by: the recipe that `weft pull` put beside it, else what PEFT's file says."""
    path = directory / RECIPE_FILE
    if path.is_file():
        # Settings only: whoever wants to trust an adapter verifies it when it is pulled.
        payload = Signed.from_envelope(path.read_bytes()).payload
        recipe = from_table(Recipe, parse_json(payload, _CONFIG_BYTES_MAX))
        return recipe if sequence_length is None else _with_length(recipe, sequence_length)
    config = _config(directory)
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(
            f"{directory} is an adapter for {config['task_type']}", hint="use one that weft pull wrote"
        )
    try:
        lora = LoraSettings(
            rank=int(config["r"]),
            alpha=float(config["lora_alpha"]),
            rslora=bool(config.get("use_rslora", False)),
            target_modules=tuple(config["target_modules"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{directory / ADAPTER_CONFIG} describes no LoRA adapter") from error
    return _recipe(lora, _inner(sequence_length))


def _with_length(recipe: Recipe, sequence_length: int) -> Recipe:
    inner = dataclasses.replace(recipe.inner, sequence_length=sequence_length)
    return dataclasses.replace(recipe, inner=inner)


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{directory / ADAPTER_CONFIG} is not a JSON object")
    return config


def _inner(sequence_length: int | None) -> InnerSettings:
    return InnerSettings() if sequence_length is None else InnerSettings(sequence_length=sequence_length)


def _recipe(lora: LoraSettings, inner: InnerSettings) -> Recipe:
    pin = BasePin(digest=Digest("0" * 64))
    return Recipe(run=RunId("eval"), base=pin, topology=Topology(lora=lora), inner=inner)


def _inert(resident: ResidentBase) -> LoraSettings:
    """An adapter that changes nothing (B is zero): a bare base is evaluated by the same path as all others."""
    names = [
        name.rpartition(".")[2]
        for name, layer in resident.model.named_modules()
        if type(layer).__name__ in _LINEAR
    ]
    return LoraSettings(rank=1, alpha=1.0, target_modules=(names[0],)) if names else LoraSettings(rank=1)
