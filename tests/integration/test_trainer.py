from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.tiny import TEXT, tiny_recipe, write_tiny_base
from transformers import AutoModelForCausalLM

from weft.client.data import TokenDataset, load_dataset
from weft.client.device import measure_speed
from weft.client.trainer.checkpoint import InnerCheckpoint
from weft.client.trainer.schedule import learning_rate
from weft.client.trainer.training import READ_STEPS, StepReport, Trainer, TrainResult, _Progress
from weft.common.composition import Composed, ResidentBase, describe
from weft.common.errors import NonFiniteLoss, OutOfMemory
from weft.common.ids import Digest, ModuleKey
from weft.common.initial import initial_tensors
from weft.common.modules import Kind
from weft.common.recipe import InnerSettings, Recipe, Schedule, TaskKind, TaskSettings
from weft.common.sequences import Batch

CPU = torch.device("cpu")
KEY = ModuleKey(0, 0)
LABELLED = TaskSettings(kind=TaskKind.SEQUENCE_CLASSIFICATION, num_labels=2)
INNER = InnerSettings(
    steps=6,
    batch_size=4,
    sequence_length=16,
    learning_rate=1e-2,
    schedule=Schedule.COSINE,
    warmup_steps=2,
    weight_decay=0.1,
    grad_norm_max=0.5,
)
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "a.txt"
    path.write_text(TEXT)
    return path


def carry_on(report: StepReport) -> bool:
    return False


def clock() -> Callable[[], float]:
    """A clock that moves by a second each time it is read."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


def make_trainer(base: Path, text: Path, recipe: Recipe) -> Trainer:
    kind = recipe.topology.kind
    resident = ResidentBase.load(base, recipe.task, device=CPU, dtype=torch.float32, kind=kind)
    data = load_dataset(text, resident.tokenizer, recipe, worker="w1")
    return Trainer(resident, recipe, data, clock=clock())


def start_of(base: Path, recipe: Recipe) -> Tensors:
    schemas = describe(base, recipe)
    levels = range(len(recipe.topology.experts))
    parts = (initial_tensors(schemas[ModuleKey(level, 0)], seed=recipe.inner.seed) for level in levels)
    return {name: array for part in parts for name, array in part.items()}


def train(
    trainer: Trainer, start: Tensors, steps: int, before: int = 0, previous: TrainResult | None = None
) -> TrainResult:
    return trainer.train(
        start,
        {KEY: before},
        num_steps=steps,
        first_batch=before,
        optimiser_states=previous.optimiser_states if previous else {},
        on_step=carry_on,
    )


def plain_loop(base: Path, start: Tensors, recipe: Recipe, data: TokenDataset, num_steps: int) -> Tensors:
    """The same training with peft and torch alone, as in their own examples."""
    lora = recipe.topology.lora
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.target_modules))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    named = {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(start[name]))
    trained = plain_steps(model, named, recipe, data, num_steps)
    return {name: parameter - start[name] for name, parameter in trained.items()}


def plain_steps(
    model: torch.nn.Module,
    named: dict[str, torch.nn.Parameter],
    recipe: Recipe,
    data: TokenDataset,
    num_steps: int,
) -> Tensors:
    """A training loop as in everybody's examples; the parameters after it."""
    inner = recipe.inner
    optimiser = torch.optim.AdamW(named.values(), lr=1.0, weight_decay=inner.weight_decay)
    for step in range(num_steps):
        batch = data.batch(step)
        optimiser.param_groups[0]["lr"] = learning_rate(inner, num_rounds=recipe.num_rounds, step=step)
        labels = torch.from_numpy(batch.labels)
        logits = model(input_ids=torch.from_numpy(batch.tokens)).logits
        torch.autograd.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
        torch.nn.utils.clip_grad_norm_(named.values(), inner.grad_norm_max)
        optimiser.step()
        optimiser.zero_grad()
    return {name: parameter.detach().numpy() for name, parameter in named.items()}


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_training_is_that_of_peft_and_torch_alone(base: Path, text: Path) -> None:
    recipe = tiny_recipe(base, inner=INNER)
    trainer = make_trainer(base, text, recipe)
    start = start_of(base, recipe)
    found = train(trainer, start, steps=8)
    expected = plain_loop(base, start, recipe, trainer.data, num_steps=8)
    assert found.deltas[KEY].keys() == expected.keys()
    for name, delta in expected.items():
        np.testing.assert_allclose(found.deltas[KEY][name], delta, atol=2e-5)


def test_full_modules_train_as_in_torch_alone(
    base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(base, experts=(1, 1), inner=replace(INNER, learning_rate=1e-3))
    recipe = replace(recipe, topology=replace(recipe.topology, kind=Kind.FULL))
    trainer, key = make_trainer(base, text, recipe), ModuleKey(1, 0)
    model = AutoModelForCausalLM.from_pretrained(base)
    start = {
        spec.name: model.get_parameter(spec.name).detach().numpy().copy()
        for schema in describe(base, recipe).values()
        for spec in schema.tensors
    }
    SmallDevice(monkeypatch, 3)
    options = {"num_steps": 4, "first_batch": 0, "optimiser_states": {}, "on_step": carry_on}
    found = trainer.train(start, {key: 0}, **options)  # type: ignore[arg-type]
    named = {spec.name: model.get_parameter(spec.name) for spec in describe(base, recipe)[key].tensors}
    expected = plain_steps(model, named, recipe, trainer.data, num_steps=4)
    assert found.deltas.keys() == {key}
    assert any(name.endswith("input_layernorm.weight") for name in expected)
    for name, parameter in expected.items():
        np.testing.assert_allclose(found.deltas[key][name], parameter - start[name], atol=1e-6)


def test_a_nested_rank_trains_its_slice(base: Path, text: Path) -> None:
    recipe = tiny_recipe(base, inner=INNER)
    trainer, start = make_trainer(base, text, recipe), start_of(base, recipe)
    schema = describe(base, recipe)[KEY].at_rank(2)
    sliced = {spec.name: start[spec.name][tuple(map(slice, spec.shape))] for spec in schema.tensors}
    result = trainer.train(
        sliced, {KEY: 0}, num_steps=2, first_batch=0, optimiser_states={}, on_step=carry_on, rank=2
    )
    assert {name: delta.shape for name, delta in result.deltas[KEY].items()} == {
        spec.name: spec.shape for spec in schema.tensors
    }
    assert result.losses[0] == train(trainer, start, steps=1).losses[0]  # B is zero: the base itself
    fisher = trainer.fisher_diagonal(sliced, frozenset({KEY}), num_examples=1, rank=2)
    assert fisher[KEY].keys() == sliced.keys()


def test_training_learns_and_counts(base: Path, text: Path) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=replace(INNER, schedule=Schedule.CONSTANT)))
    start = start_of(base, trainer.recipe)
    result = train(trainer, start, steps=30)
    assert result.losses[-1] < 0.95 * result.losses[0]
    assert (result.num_steps, result.num_examples, result.num_tokens) == (30, 120, 30 * 64)
    assert all(delta.dtype == np.float32 for delta in result.deltas[KEY].values())


def test_repeating_a_task_gives_the_same_bytes(base: Path, text: Path) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=INNER))
    start = start_of(base, trainer.recipe)
    first, again = train(trainer, start, steps=4), train(trainer, start, steps=4)
    assert first.losses == again.losses
    for name, delta in first.deltas[KEY].items():
        np.testing.assert_array_equal(delta, again.deltas[KEY][name])


def test_two_tasks_in_a_row_are_one_long_task(base: Path, text: Path) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=INNER))
    start = start_of(base, trainer.recipe)
    whole = train(trainer, start, steps=8)
    first = train(trainer, start, steps=5)
    middle = {name: start[name] + delta for name, delta in first.deltas[KEY].items()}
    second = train(trainer, middle, steps=3, before=5, previous=first)
    assert first.losses + second.losses == pytest.approx(whole.losses, rel=1e-4)
    for name, delta in whole.deltas[KEY].items():
        both = first.deltas[KEY][name] + second.deltas[KEY][name]
        np.testing.assert_allclose(both, delta, atol=1e-5)
    assert float(second.optimiser_states[KEY][f"step/{next(iter(start))}"][0]) == 8


def test_a_shard_trains_its_module_alone_and_each_on_its_own_schedule(base: Path, text: Path) -> None:
    recipe = tiny_recipe(base, experts=(1, 1), inner=INNER)
    trainer = make_trainer(base, text, recipe)
    start = start_of(base, recipe)
    upper = ModuleKey(1, 0)
    options = {"num_steps": 2, "first_batch": 0, "optimiser_states": {}, "on_step": carry_on}
    result = trainer.train(start, {upper: 0}, **options)  # type: ignore[arg-type]
    assert result.deltas.keys() == result.optimiser_states.keys() == {upper}
    assert result.deltas[upper].keys() == {spec.name for spec in describe(base, recipe)[upper].tensors}
    finished = INNER.steps * recipe.num_rounds
    both = trainer.train(start, {KEY: finished, upper: 0}, **options)  # type: ignore[arg-type]
    assert not any(delta.any() for delta in both.deltas[KEY].values())
    assert any(delta.any() for delta in both.deltas[upper].values())


def test_stopping_ends_after_the_step_and_keeps_what_was_done(base: Path, text: Path) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=INNER))
    result = trainer.train(
        start_of(base, trainer.recipe),
        {KEY: 0},
        num_steps=10,
        first_batch=0,
        optimiser_states={},
        on_step=lambda report: report.step == 3,
    )
    assert (result.num_steps, len(result.losses)) == (3, 3)


@pytest.mark.parametrize("poison", [np.nan, 3e38])
def test_divergence_ends_the_task_and_returns_nothing(base: Path, text: Path, poison: float) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=INNER))
    start = start_of(base, trainer.recipe)
    start = {name: np.full_like(array, poison) for name, array in start.items()}
    with pytest.raises(NonFiniteLoss, match="at step 1") as caught:
        train(trainer, start, steps=2)
    assert "learning_rate" in caught.value.hint


def test_classification_trains_the_head_too(base: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(base, task=LABELLED, inner=replace(INNER, schedule=Schedule.CONSTANT))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "over over", "label": 0}\n{"text": "under row", "label": 1}\n' * 8)
    result = train(make_trainer(base, path, recipe), start_of(base, recipe), steps=40)
    assert result.deltas[KEY]["score.weight"].any()
    assert result.losses[-1] < 0.3 * result.losses[0]


def test_losses_wait_on_a_gpu_until_enough_or_long_enough() -> None:
    seen: list[int] = []
    now = [0.0]

    def see(report: StepReport) -> bool:
        seen.append(report.step)
        return report.step == 2

    progress = _Progress(see, lambda: now[0], reads_at_once=True)
    one = torch.tensor(1.0)
    for _ in range(READ_STEPS - 1):
        assert not progress.record(one, 4)
    assert seen == []
    assert progress.record(one, 4)
    assert seen == list(range(1, READ_STEPS + 1))
    now[0] = 2.0
    progress.record(one, 4)
    assert len(seen) == READ_STEPS + 1
    assert progress.num_tokens == 4 * (READ_STEPS + 1)


# -- memory ----------------------------------------------------------------------------------------------------


class SmallDevice:
    """Stands before a composed model and holds so many sequences at once, and no more; counts the failures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, num_rows_max: int) -> None:
        self.num_failures = 0
        whole = Composed.losses

        def losses(composed: Composed, batch: Batch) -> torch.Tensor:
            if len(batch.lengths) > num_rows_max:
                self.num_failures += 1
                raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return whole(composed, batch)

        monkeypatch.setattr(Composed, "losses", losses)


def assert_same(found: TrainResult, expected: TrainResult, atol: float) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    for key, deltas in expected.deltas.items():
        for name, delta in deltas.items():
            np.testing.assert_allclose(found.deltas[key][name], delta, atol=atol)


@pytest.mark.parametrize(("num_rows_max", "found_size", "num_failures"), [(1, 1, 2), (2, 2, 1), (3, 2, 1)])
def test_a_batch_that_does_not_fit_is_halved_and_trains_the_same(
    base: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_rows_max: int,
    found_size: int,
    num_failures: int,
) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=INNER))
    start = start_of(base, trainer.recipe)
    whole = train(trainer, start, steps=3)
    assert trainer.micro_batch_size == INNER.batch_size
    device = SmallDevice(monkeypatch, num_rows_max)
    in_pieces = train(trainer, start, steps=3)
    assert_same(in_pieces, whole, atol=1e-6)
    assert (trainer.micro_batch_size, device.num_failures) == (found_size, num_failures)
    # What was found is remembered: no step of the next task fails first.
    train(trainer, start, steps=1)
    assert device.num_failures == num_failures


def test_pieces_count_labels_and_not_sequences(
    base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text.with_name("chat.jsonl")
    rows = [
        f'{{"prompt": "{"over " * index}", "completion": "under, row by row. "}}' for index in range(1, 30)
    ]
    path.write_text("\n".join(rows))
    trainer = make_trainer(base, path, tiny_recipe(base, inner=INNER))
    counts = {trainer.data.example(position).num_labels for position in range(4)}
    assert len(counts) > 1
    start = start_of(base, trainer.recipe)
    whole = train(trainer, start, steps=3)
    SmallDevice(monkeypatch, 1)
    assert_same(train(trainer, start, steps=3), whole, atol=1e-6)


def test_classification_is_cut_to_the_longest_of_a_piece(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(base, task=LABELLED, inner=INNER)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "over", "label": 0}\n{"text": "under row by row", "label": 1}\n' * 8)
    trainer, start = make_trainer(base, path, recipe), start_of(base, recipe)
    whole = train(trainer, start, steps=3)
    SmallDevice(monkeypatch, 1)
    assert_same(train(trainer, start, steps=3), whole, atol=1e-6)


def test_a_single_sequence_that_does_not_fit_is_said(
    base: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=INNER))
    SmallDevice(monkeypatch, 0)
    with pytest.raises(OutOfMemory, match="while training"):
        train(trainer, start_of(base, trainer.recipe), steps=1)


def test_a_batch_without_labels_teaches_nothing(base: Path, text: Path) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=replace(INNER, weight_decay=0.0)))
    trainer.data.sequences.labels[:] = -100
    result = train(trainer, start_of(base, trainer.recipe), steps=1)
    assert result.losses == (0.0,)
    assert not any(delta.any() for delta in result.deltas[KEY].values())


# -- checkpoints and streaming fragments -----------------------------------------------------------------------


class Preempted(Exception):
    """The machine is taken away."""


def checkpoint_at(path: Path, every_s: float = 0.0, binding: str = "a" * 64) -> InnerCheckpoint:
    return InnerCheckpoint(path, binding=Digest(binding), every_s=every_s, clock=lambda: 0.0)


def test_a_preempted_task_goes_on_within_its_inner_loop_to_the_same_bits(
    base: Path, text: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(base, experts=(1, 1), inner=INNER)
    start = start_of(base, recipe)
    seen: list[int] = []

    def preempt(report: StepReport) -> bool:
        if report.step == 5:
            raise Preempted
        return False

    def see(report: StepReport) -> bool:
        seen.append(report.step)
        return False

    def attempt(on_step: Callable[[StepReport], bool], checkpoint: InnerCheckpoint | None) -> TrainResult:
        return make_trainer(base, text, recipe).train(
            start,
            {KEY: 3, ModuleKey(1, 0): 0},
            num_steps=8,
            first_batch=2,
            optimiser_states={},
            on_step=on_step,
            checkpoint=checkpoint,
        )

    whole = attempt(carry_on, None)
    with pytest.raises(Preempted):
        attempt(preempt, checkpoint_at(tmp_path / "inner"))
    resumed = attempt(see, checkpoint_at(tmp_path / "inner"))
    assert seen == [5, 6, 7, 8]
    assert (resumed.losses, resumed.num_tokens, resumed.num_examples) == (
        whole.losses,
        whole.num_tokens,
        whole.num_examples,
    )
    for key in whole.deltas:
        for name, delta in whole.deltas[key].items():
            np.testing.assert_array_equal(resumed.deltas[key][name], delta)
        for name, state in whole.optimiser_states[key].items():
            np.testing.assert_array_equal(resumed.optimiser_states[key][name], state)


def test_a_stopped_task_is_saved_and_a_shorter_one_does_not_take_it_up(
    base: Path, text: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=INNER))
    start = start_of(base, trainer.recipe)

    def attempt(num_steps: int, last: int) -> TrainResult:
        return trainer.train(
            start,
            {KEY: 0},
            num_steps=num_steps,
            first_batch=0,
            optimiser_states={},
            on_step=lambda report: report.step == last,
            checkpoint=checkpoint_at(tmp_path / "inner", every_s=1e9),
        )

    stopped = attempt(6, last=3)
    assert (tmp_path / "inner").exists()
    assert attempt(2, last=0).losses == stopped.losses[:2]
    assert attempt(6, last=0).losses == train(trainer, start, steps=6).losses


def test_what_is_carried_is_where_training_begins_and_not_what_deltas_are_taken_from(
    base: Path, text: Path
) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, experts=(1, 1), inner=INNER))
    start = start_of(base, trainer.recipe)
    upper = {spec.name for spec in describe(base, trainer.recipe)[ModuleKey(1, 0)].tensors}
    carried = {name: start[name] + np.float32(0.01) for name in upper}
    options = {"num_steps": 2, "first_batch": 0, "optimiser_states": {}, "on_step": carry_on}
    keys = {KEY: 0, ModuleKey(1, 0): 0}
    found = trainer.train(start, keys, carried=carried, **options)  # type: ignore[arg-type]
    expected = trainer.train({**start, **carried}, keys, **options)  # type: ignore[arg-type]
    assert found.losses == expected.losses
    for key, deltas in expected.deltas.items():
        for name, delta in deltas.items():
            moved = 0.01 if name in upper else 0.0
            np.testing.assert_allclose(found.deltas[key][name], delta + moved, atol=1e-7)


# -- Fisher ----------------------------------------------------------------------------------------------------


def test_fisher_is_the_mean_of_squared_gradients_of_single_sequences(base: Path, text: Path) -> None:
    recipe = tiny_recipe(base, experts=(1, 1), inner=INNER)
    trainer = make_trainer(base, text, recipe)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(0, 0.1, array.shape).astype(np.float32)
        for name, array in start_of(base, recipe).items()
    }
    keys = frozenset({ModuleKey(1, 0)})
    found = trainer.fisher_diagonal(tensors, keys, num_examples=3)
    composed = trainer.resident.compose(recipe, tensors)
    parameters = composed.trainable(keys)[ModuleKey(1, 0)]
    expected = {name: np.zeros(p.shape) for name, p in parameters.items()}
    for position in range(3):
        loss = composed.losses(trainer.data.example(position)).sum()
        for name, gradient in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            expected[name] += gradient.double().numpy() ** 2 / 3
    assert found.keys() == keys
    for name, values in expected.items():
        np.testing.assert_allclose(found[ModuleKey(1, 0)][name], values, rtol=1e-4, atol=1e-12)
        assert (found[ModuleKey(1, 0)][name] >= 0).all()


def test_fisher_takes_no_more_examples_than_there_are(base: Path, text: Path) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=INNER))
    start = start_of(base, trainer.recipe)
    everything = trainer.fisher_diagonal(start, frozenset({KEY}), num_examples=10**6)
    exactly = trainer.fisher_diagonal(start, frozenset({KEY}), num_examples=len(trainer.data))
    name = next(name for name in start if name.endswith("lora_B.weight"))
    np.testing.assert_array_equal(everything[KEY][name], exactly[KEY][name])


def test_speed_is_tokens_over_time_and_leaves_no_trace(base: Path, text: Path) -> None:
    trainer = make_trainer(base, text, tiny_recipe(base, inner=INNER))
    start = start_of(base, trainer.recipe)
    before = train(trainer, start, steps=2)
    assert measure_speed(trainer, start, frozenset({KEY}), num_steps=2) > 0
    after = train(trainer, start, steps=2)
    assert before.losses == after.losses
