"""How good a candidate of a search is: what a command of the user prints, or the loss on held-out text."""

from __future__ import annotations

import math
import shlex
import subprocess
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from weft.common.composition import Composed, ResidentBase
from weft.common.documents import read_rows
from weft.common.errors import BaseModelError, ComputeError, DataError, UsageError
from weft.common.evaluation import evaluate
from weft.common.recipe import TaskSettings
from weft.common.sequences import Sequences, causal_sequences
from weft.server.offline.inputs import ADAPTER_CONFIG, Adapter, open_adapter

PLACE: Final = "{model}"
_SEQUENCE_LENGTH_MAX: Final = 512
_SAID_MAX: Final = 200
"""Characters of a command's output that a message quotes."""


class Scorer(Protocol):
    """Scores a directory with a model or an adapter."""

    @property
    def description(self) -> dict[str, Any]:
        """What the record says of it: scores of another description are not comparable."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Which way is up."""
        ...

    def score(self, directory: Path) -> float | None:
        """The score; None if it is no finite number. Raises WeftError if it cannot be had."""
        ...


class CommandScorer:
    """The last line that a command prints.

    Args:
        command: Words as in a shell, without one being started; ``{model}`` stands for the directory.
        higher_is_better: Whether it prints an accuracy rather than a loss.

    Raises:
        UsageError: It has no ``{model}``.
    """

    def __init__(self, command: str, *, higher_is_better: bool) -> None:
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise UsageError(f"the command cannot be read: {error}", hint="close its quotes") from error
        if not any(PLACE in word for word in self._words):
            raise UsageError(
                f"the command has no {PLACE}", hint=f'for example --evaluate "python score.py {PLACE}"'
            )
        self.description: dict[str, Any] = {"evaluate": command}
        self.higher_is_better = higher_is_better

    def score(self, directory: Path) -> float | None:
        """Run the command; raises ComputeError if it fails or prints no number at the end."""
        words = [word.replace(PLACE, str(directory)) for word in self._words]
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise ComputeError(f"cannot run {words[0]}: {error.strerror}", hint="check --evaluate") from error
        if done.returncode:
            raise ComputeError(
                f"the evaluation ended with {done.returncode}: {_last_line(done.stderr)}",
                hint="run it by hand on one of the inputs; trials so far are kept",
            )
        try:
            number = float(_last_line(done.stdout))
        except ValueError:
            raise ComputeError(
                f"the last line that the evaluation prints is no number: {_last_line(done.stdout)!r}",
                hint="let it print the score alone at the end; trials so far are kept",
            ) from None
        return number if math.isfinite(number) else None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip()[:_SAID_MAX] if lines else ""


class HeldoutScorer:
    """Nats per token of held-out text under a causal language model; lower is better.

    Args:
        file: A file or a directory of text, jsonl or parquet.
        base: What adapters belong to, loaded once; models are loaded one after the other.
    """

    higher_is_better = False

    def __init__(self, file: Path, base: Path | None) -> None:
        self._file, self._base = file, base
        self._resident: ResidentBase | None = None
        self.description: dict[str, Any] = {"heldout": str(file)}

    def score(self, directory: Path) -> float | None:
        """The loss.

        Raises:
            BaseModelError: The model or the base cannot be loaded, or the adapter does not fit the base.
            DataError: There is no text.
            UsageError: An adapter, and no base.
        """
        if not (directory / ADAPTER_CONFIG).is_file():
            return self._loss(_load(directory))
        if self._base is None:
            raise UsageError("adapters are evaluated on their base", hint="add --base DIR")
        self._resident = self._resident or _load(self._base)
        with _Applied(self._resident.model, open_adapter(directory, directory.name)):
            return self._loss(self._resident)

    def _loss(self, resident: ResidentBase) -> float | None:
        composed = Composed(resident=resident, turn=resident.turn, parameters={}, levels={})
        loss = evaluate(composed, self._sequences(resident)).loss
        return loss if math.isfinite(loss) else None

    def _sequences(self, resident: ResidentBase) -> Sequences:
        known = getattr(resident.model.config, "max_position_embeddings", None)
        length = min(_SEQUENCE_LENGTH_MAX, known or _SEQUENCE_LENGTH_MAX)
        rows = read_rows(self._file)
        found = causal_sequences(rows, resident.tokenizer, sequence_length=length, heldout=True)
        if not len(found):
            raise DataError(f"{self._file} holds no text", hint="give more text")
        return found


def _load(directory: Path) -> ResidentBase:
    return ResidentBase.load(directory, TaskSettings(), device=torch.device("cpu"), dtype=torch.float32)


class _Applied:
    """Adds ΔW = scaling · B A to the weights of a model, and puts back what was there."""

    def __init__(self, model: Any, adapter: Adapter) -> None:
        self._model, self._adapter = model, adapter
        self._before: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> None:
        if self._adapter.others:
            raise BaseModelError(
                f"the adapters replace {min(self._adapter.others)}, which held-out text is not evaluated with",
                hint='use --evaluate "COMMAND {model}"',
            )
        with torch.no_grad():
            for name in self._adapter.layers:
                self._add(name)

    def _add(self, name: str) -> None:
        layer, weights = self._adapter.layers[name], self._adapter.weights
        a_ri, b_or = (
            torch.from_numpy(weights.tile(spec.name, 0, spec.size).copy()).reshape(spec.shape)
            for spec in (layer.a, layer.b)
        )
        delta = layer.scaling * (b_or @ a_ri)
        if self._adapter.config.get("fan_in_fan_out"):
            delta = delta.T
        try:
            weight = self._model.get_parameter(f"{name}.weight")
        except AttributeError:
            raise BaseModelError(
                f"the base has no layer {name}", hint="give the adapters' own --base"
            ) from None
        if weight.shape != delta.shape:
            raise BaseModelError(
                f"the base holds {name} as {list(weight.shape)} and the adapters as {list(delta.shape)}",
                hint="give the adapters' own --base",
            )
        self._before.append((weight, weight.detach().clone()))
        weight.add_(delta)

    def __exit__(self, *_raised: object) -> None:
        with torch.no_grad():
            for weight, kept in self._before:
                weight.copy_(kept)
