"""Tasks on a microscopic base that several processes share, and what one process makes of the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.tiny import tiny_recipe

from weft.client.data import load_dataset
from weft.client.trainer.gradients import ALONE, Gradients
from weft.client.trainer.training import OnStep, Trainer, TrainResult
from weft.common.composition import ResidentBase, describe
from weft.common.ids import ModuleKey
from weft.common.initial import initial_tensors
from weft.common.recipe import InnerSettings, Recipe, TaskKind, TaskSettings
from weft.common.tensors import Float32Array

CPU = torch.device("cpu")
INNER = InnerSettings(steps=4, batch_size=5, sequence_length=16, learning_rate=1e-3, weight_decay=0.1)
LOWER, UPPER = ModuleKey(0, 0), ModuleKey(1, 0)


def write_chat(path: Path) -> Path:
    """Documents of which different parts are learnt, so that shares of a batch differ in labels."""
    rows = [f'{{"prompt": "{"over " * (i % 9)}", "completion": "under, row by row. "}}' for i in range(60)]
    path.write_text("\n".join(rows))
    return path


def write_labelled(path: Path) -> Path:
    """Documents of two classes."""
    path.write_text('{"text": "over", "label": 0}\n{"text": "under row by row", "label": 1}\n' * 8)
    return path


def load_whole(base: Path, recipe: Recipe) -> ResidentBase:
    """The base as one process has it."""
    return ResidentBase.load(base, recipe.task, device=CPU, dtype=torch.float32)


def make_trainer(resident: ResidentBase, data: Path, recipe: Recipe, gradients: Gradients = ALONE) -> Trainer:
    """A worker's trainer."""
    dataset = load_dataset(data, resident.tokenizer, recipe, worker="w1")
    return Trainer(resident, recipe, dataset, clock=lambda: 0.0, gradients=gradients)


def start_of(base: Path, recipe: Recipe) -> dict[str, Float32Array]:
    """Version 0 of all modules."""
    return {
        name: array
        for schema in describe(base, recipe).values()
        for name, array in initial_tensors(schema, seed=recipe.inner.seed).items()
    }


def train(
    trainer: Trainer, base: Path, keys: tuple[ModuleKey, ...], on_step: OnStep = lambda report: False
) -> TrainResult:
    """Four steps from version 0."""
    start = start_of(base, trainer.recipe)
    return trainer.train(
        start, dict.fromkeys(keys, 0), num_steps=4, first_batch=1, optimiser_states={}, on_step=on_step
    )


def assert_same(found: TrainResult, expected: TrainResult) -> None:
    """Same losses, same deltas, but for the order of additions."""
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.deltas.keys() == expected.deltas.keys()
    for key, deltas in expected.deltas.items():
        for name, delta in deltas.items():
            np.testing.assert_allclose(found.deltas[key][name], delta, atol=1e-6)


def recipes(base: Path) -> dict[str, Recipe]:
    """Runs that processes may share differently."""
    path = tiny_recipe(base, experts=(1, 1), inner=INNER)
    labelled = TaskSettings(kind=TaskKind.SEQUENCE_CLASSIFICATION, num_labels=2)
    return {
        "path": path,
        "fewer sequences than processes": replace(path, inner=replace(INNER, batch_size=1)),
        "classification": replace(path, task=labelled),
    }
