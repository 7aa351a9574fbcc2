"""``weft eval``: how well an adapter, a bare base or a grid of paths predicts text, in bits per byte."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from weft.client.device import Device
from weft.client.grid import is_grid
from weft.client.inference import Inference, Perplexity
from weft.client.pull import RECIPE_FILE
from weft.common.base import resolve_source
from weft.common.composition import Composed, ResidentBase, describe
from weft.common.documents import read_rows
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
class PathShare:
    """What came to one path of a grid, and how well it did."""

    path: str
    num_documents: int
    """Of which it predicted something."""
    num_labels: int
    loss: float
    """Mean nats per label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a model came to on one file, or on all of them together."""

    data: str
    """Path, or ``all``."""
    bits_per_byte: float | None
    """None for classification."""
    loss: float
    """Mean nats per label."""
    perplexity: float
    """exp of the loss."""
    num_bytes: int
    num_labels: int
    paths: tuple[PathShare, ...] = ()
    """Of a grid: the paths that were used."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSettings:
    """How models are judged."""

    base: str | None = None
    """The adapters' or grid's base: directory or Hub id; what these name themselves when None."""
    sequence_length: int | None = None
    """Tokens per window; None takes the recipe's, or 128."""
    prefix_tokens: int | None = None
    """First tokens of each document that are read and not counted; None takes the recipe's, or 0."""
    every: int | None = None
    """Of a grid: choose the path anew every so many tokens, 0 never; None takes the recipe's."""
    best: bool = False
    """Of a grid: take each path's best versions, where it was evaluated, not the newest."""


class Scorer:
    """Evaluates models on data; bases are loaded and data are tokenised once.

    Args:
        data: Files or directories of text.
        settings: How.
        device: Where to.
    """

    def __init__(self, data: Sequence[Path], settings: ScoreSettings, *, device: Device) -> None:
        self._data = data
        self._settings = settings
        self._device = device
        self._residents: dict[tuple[Path, TaskSettings], ResidentBase] = {}
        self._sequences: dict[tuple[Path, Path, TaskSettings, int], Sequences] = {}

    def score(self, directory: Path, progress: Callable[[int, int], None]) -> ModelScores:
        """Evaluate a PEFT adapter, a base or a grid; ``progress`` hears of sequences or documents done and in all.

        Raises:
            InputError: The directory, its base or the data cannot be used.
        """
        if is_grid(directory):
            return self._score_grid(directory, progress)
        model = _open(directory, self._settings)
        resident = self._resident(model)
        recipe, tensors = model.recipe, model.tensors
        if tensors is None:
            recipe = dataclasses.replace(recipe, topology=Topology(lora=_inert(resident)))
            schemas = describe(model.base_dir, recipe).values()
            tensors = {
                name: array for schema in schemas for name, array in initial_tensors(schema, seed=0).items()
            }
        composed = resident.compose(recipe, tensors)
        results = tuple(self._score(composed, path, model, progress) for path in self._data)
        return ModelScores(model=str(directory), results=results, together=_together(results))

    def _score_grid(self, directory: Path, progress: Callable[[int, int], None]) -> ModelScores:
        """Each document along its own path, without the tokens that chose it."""
        settings = self._settings
        with Inference.open(
            directory, device=self._device, base=settings.base, best=settings.best
        ) as inference:
            _check_lengths(directory, inference, settings)
            every = inference.recipe.routing.reroute_tokens if settings.every is None else settings.every
            results = tuple(
                _grid_score(
                    path, inference.perplexity(read_rows(path), every=every or None, progress=progress)
                )
                for path in self._data
            )
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
            perplexity=math.exp(evaluation.loss),
            num_bytes=evaluation.num_bytes,
            num_labels=int(evaluation.num_labels.sum()),
        )


def _together(scores: Sequence[Score]) -> Score:
    num_labels = sum(item.num_labels for item in scores)
    num_bytes = sum(item.num_bytes for item in scores)
    bits = sum(item.bits_per_byte * item.num_bytes for item in scores if item.bits_per_byte is not None)
    loss = sum(item.loss * item.num_labels for item in scores) / num_labels
    return Score(
        data="all",
        bits_per_byte=bits / num_bytes if num_bytes else None,
        loss=loss,
        perplexity=math.exp(loss),
        num_bytes=num_bytes,
        num_labels=num_labels,
    )


def _check_lengths(directory: Path, inference: Inference, settings: ScoreSettings) -> None:
    """Raise UsageError when other lengths were asked for than those that a grid is judged by."""
    fixed = {
        "--sequence-length": (settings.sequence_length, inference.recipe.inner.sequence_length),
        "--prefix-tokens": (settings.prefix_tokens, inference.prefix_tokens),
    }
    for option, (wanted, own) in fixed.items():
        if wanted not in (None, own):
            raise UsageError(
                f"{directory} is a grid, which is judged at {option} {own}", hint=f"use {option} {own}"
            )


def _grid_score(data: Path, found: Perplexity) -> Score:
    return Score(
        data=str(data),
        bits_per_byte=found.bits_per_byte,
        loss=found.loss,
        perplexity=found.perplexity,
        num_bytes=found.num_bytes,
        num_labels=found.num_labels,
        paths=tuple(
            PathShare(
                path=str(item.path),
                num_documents=item.num_documents,
                num_labels=item.num_labels,
                loss=item.loss,
            )
            for item in found.paths
        ),
    )


def _open(directory: Path, settings: ScoreSettings) -> _Model:
    if not (directory / ADAPTER_CONFIG).is_file():
        recipe = _judged(_model_recipe(directory), settings)
        return _Model(recipe=recipe, tensors=None, base_dir=resolve_source(str(directory)))
    recipe, base = _judged(_recipe_of(directory), settings), settings.base
    named = base or _config(directory).get("base_model_name_or_path") or ""
    if not base and not Path(named).is_dir() and "/" not in named:
        raise UsageError(f"{directory} does not say where its base is", hint="give --base DIR")
    with TensorFile(directory / ADAPTER_WEIGHTS, FOREIGN) as file:
        tensors = {
            spec.name.removeprefix(_PREFIX): to_float32(file.array(spec.name), spec.dtype)
            for spec in file.header.specs
        }
    return _Model(recipe=recipe, tensors=tensors, base_dir=resolve_source(str(named)))


def _judged(recipe: Recipe, settings: ScoreSettings) -> Recipe:
    """The recipe, with the lengths that were asked for."""
    inner, task = recipe.inner, recipe.task
    if settings.sequence_length is not None:
        inner = dataclasses.replace(inner, sequence_length=settings.sequence_length)
    if settings.prefix_tokens is not None:
        task = dataclasses.replace(task, prefix_tokens=settings.prefix_tokens)
    return dataclasses.replace(recipe, inner=inner, task=task)


def _model_recipe(directory: Path) -> Recipe:
    """What a whole model is judged by: the lengths of the recipe that `weft pull` put beside it, if it did."""
    if not (directory / RECIPE_FILE).is_file():
        return _recipe(LoraSettings(), InnerSettings())
    trained = _recipe_of(directory)
    task = TaskSettings(prefix_tokens=trained.task.prefix_tokens)
    return dataclasses.replace(_recipe(LoraSettings(), trained.inner), task=task)


def _recipe_of(directory: Path) -> Recipe:
    """What a model was trained by: the recipe that `weft pull` put beside it, else what PEFT's file says."""
    path = directory / RECIPE_FILE
    if path.is_file():
        # Settings only: whoever wants to trust an adapter verifies it when it is pulled.
        payload = Signed.from_envelope(path.read_bytes()).payload
        return from_table(Recipe, parse_json(payload, _CONFIG_BYTES_MAX))
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
    return _recipe(lora, InnerSettings())


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / ADAPTER_CONFIG).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{directory / ADAPTER_CONFIG} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{directory / ADAPTER_CONFIG} is not a JSON object")
    return config


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
