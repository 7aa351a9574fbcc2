"""A base divided between two processes on a CPU through gloo: rank 0 is the test, the follower a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from tests.sharing import (
    CPU,
    LOWER,
    UPPER,
    assert_same,
    load_whole,
    make_trainer,
    recipes,
    start_of,
    train,
    write_chat,
    write_labelled,
)
from tests.stage import Coordinator, Part, Site
from tests.tiny import TEXT, tiny_recipe, write_tiny_base
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.models.llama.modeling_llama import LlamaAttention

import weft.client.demo
from weft.client.join import with_group
from weft.client.trainer import group as groups
from weft.client.trainer.gradients import ALONE, Gradients
from weft.client.trainer.group import Group, launch
from weft.client.trainer.sharding import InStep, ShardedBase, open_sharded
from weft.client.trainer.training import StepReport, Trainer
from weft.common.codec import CodecKind, CodecSettings
from weft.common.errors import ComputeError, UsageError
from weft.common.evaluation import evaluate, load_heldout
from weft.common.ids import ModuleKey
from weft.common.modules import Kind, Topology
from weft.common.protocol import Purpose
from weft.common.recipe import FisherSettings, Recipe, RoutingMode, RoutingSettings
from weft.common.routing import random_router, write_router

SILENCE_MAX = timedelta(seconds=30)
DEMO_BASE = Path(weft.client.demo.__file__).parent / "base"
DEMO_WIDTH = 192


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat(tmp_path_factory.mktemp("data") / "a.jsonl")


@pytest.fixture(scope="module")
def fault(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where followers look whether their memory is to be short: forward, backward, or not at all."""
    path = tmp_path_factory.mktemp("fault") / "where"
    path.write_text("")
    return path


FOLLOWER = """
from pathlib import Path
from tests.integration.test_trainer_sharded import LlamaAttention, short_of_memory
from weft.client.trainer.follower import main
LlamaAttention.forward = short_of_memory(Path({fault!r}).read_text)
main()
"""


@pytest.fixture(scope="module")
def group(fault: Path) -> Iterator[Group]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "PROGRAM", ("-c", FOLLOWER.format(fault=str(fault))))
        with launch(2, CPU, silence_max=SILENCE_MAX) as group:
            yield group


@pytest.fixture(scope="module")
def resident(base: Path, group: Group) -> ShardedBase:
    return share(group, base, recipes(base)["path"])


def share(group: Group, base: Path, recipe: Recipe) -> ShardedBase:
    return open_sharded(
        group, base, recipe.task, device=CPU, dtype=torch.float32, kind=Kind.LORA, quantise="none"
    )


# ---- what it comes to --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["path", "fewer sequences than processes", "classification"])
@pytest.mark.parametrize("keys", [(LOWER, UPPER), (UPPER,)], ids=["both", "upper"])
def test_a_divided_base_trains_as_a_whole_one(
    base: Path, chat: Path, tmp_path: Path, group: Group, name: str, keys: tuple[ModuleKey, ...]
) -> None:
    recipe = recipes(base)[name]
    data = write_labelled(tmp_path / "labelled.jsonl") if recipe.task.num_labels else chat
    alone = train(make_trainer(load_whole(base, recipe), data, recipe), base, keys)
    together = make_trainer(share(group, base, recipe), data, recipe, InStep(group))
    assert_same(train(together, base, keys), alone)
    assert group.number == 1


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_shares_in_different_numbers_of_pieces_stay_in_step(
    base: Path, chat: Path, group: Group, resident: ShardedBase, micro_batch_size: int
) -> None:
    """Of five sequences one process has two and the other three."""
    recipe, found = recipes(base)["path"], []
    arms: list[tuple[Trainer, Gradients]] = [
        (make_trainer(load_whole(base, recipe), chat, recipe), ALONE),
        (make_trainer(resident, chat, recipe), InStep(group)),
    ]
    for trainer, gradients in arms:
        composed = trainer.resident.compose(recipe, start_of(base, recipe))
        modules = composed.trainable([LOWER, UPPER])
        parameters = [parameter for module in modules.values() for parameter in module.values()]
        gradients.begin(composed, recipe, modules, rank=0)
        batch = trainer.data.batch(0)
        loss = gradients.compute(composed, parameters, batch, micro_batch_size=micro_batch_size)
        found.append([loss, *(parameter.grad for parameter in parameters)])
    for whole, divided in zip(*found, strict=True):
        torch.testing.assert_close(divided, whole)


def test_each_process_holds_its_share_also_after_training(
    base: Path, chat: Path, group: Group, resident: ShardedBase
) -> None:
    recipe = recipes(base)["path"]
    num_parameters = sum(parameter.numel() for parameter in load_whole(base, recipe).model.parameters())
    assert resident.num_held == (num_parameters / 2, num_parameters / 2)
    train(make_trainer(resident, chat, recipe, InStep(group)), base, (LOWER,))
    shares = [parameter for parameter in resident.model.parameters() if isinstance(parameter, DTensor)]
    assert sum(parameter.to_local().numel() for parameter in shares) == num_parameters / 2
    assert not any(
        "lora" in name for name, found in resident.model.named_parameters() if found in set(shares)
    )


def test_evaluation_features_and_fisher_are_those_of_a_whole_base(
    base: Path, chat: Path, group: Group, resident: ShardedBase
) -> None:
    recipe = recipes(base)["path"]
    start, tokens, lengths = start_of(base, recipe), np.arange(24).reshape(2, 12), np.array([5, 12])
    found = []
    for trainer in (
        make_trainer(load_whole(base, recipe), chat, recipe),
        make_trainer(resident, chat, recipe, InStep(group)),
    ):
        composed = trainer.resident.compose(recipe, start)
        heldout = load_heldout(chat, trainer.resident.tokenizer, recipe)
        fisher = trainer.fisher_diagonal(start, frozenset({UPPER}), num_examples=3)
        features = trainer.resident.features(tokens, lengths)
        # Once more, in other modes of autograd than the one before.
        evaluated = evaluate(trainer.resident.compose(recipe, start), heldout).losses
        found.append([features, evaluated, *fisher[UPPER].values()])
        with pytest.raises(ValueError, match="another path"):
            evaluate(composed, heldout)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-7)
    assert group.number == 1
    with pytest.raises(ValueError, match="InStep"):
        resident.compose(recipe, start).losses(heldout.select(np.arange(2)))


def worker_site(
    tmp_path: Path, base: Path, recipe: Recipe, data: Path, plan: Sequence[Part], *, group: Group | None
) -> Site:
    """A worker's machine, its base divided among a group or whole."""
    directory = tmp_path / ("divided" if group else "whole")
    directory.mkdir()
    site = Site(directory, Coordinator(directory, base, recipe), data, base, clock=lambda: 0.0)
    site.coordinator.plan = [*plan]
    if group is not None:
        site.prepare = lambda setup: with_group(setup, group, divided=True)
    return site


def test_a_worker_does_every_kind_of_task(tmp_path: Path, group: Group) -> None:
    recipe = replace(
        tiny_recipe(DEMO_BASE, experts=(1, 2)),
        routing=RoutingSettings(mode=RoutingMode.LOCAL, validation_share=0.3),
        fisher=FisherSettings(num_examples=2),
        codec=CodecSettings(kind=CodecKind.FP32),
    )
    data, file = tmp_path / "data.jsonl", tmp_path / "router"
    data.write_text("".join(f'{{"text": "{f"over and under the warp {i} " * 6}"}}\n' for i in range(60)))
    paths, digest = recipe.topology.paths, recipe.base.digest
    write_router(file, random_router(paths=paths, base_digest=digest, width=DEMO_WIDTH, seed=1))
    plan = [
        Part(purpose=purpose, path="0.1", router=file)
        for purpose in (Purpose.TRAIN, Purpose.EVALUATE, Purpose.ROUTE)
    ]
    sites = [worker_site(tmp_path, DEMO_BASE, recipe, data, plan, group=among) for among in (None, group)]
    assert [site.live().num_accepted for site in sites] == [len(plan)] * 2
    whole, divided = ({said.task: said for said in site.coordinator.accepted} for site in sites)
    for task, expected in whole.items():
        assert divided[task].holdings == expected.holdings
        for loss in ("loss_last", "validation_loss"):
            assert (getattr(divided[task], loss) or 0) == pytest.approx(
                getattr(expected, loss) or 0, rel=1e-5
            )
    deltas = [site.coordinator.delta(0, tmp_path) for site in sites]
    for name, delta in deltas[0].items():
        np.testing.assert_allclose(deltas[1][name], delta, atol=1e-6)


def test_a_worker_gives_back_what_cannot_be_divided(tmp_path: Path, base: Path, group: Group) -> None:
    recipe = replace(tiny_recipe(base), topology=Topology(kind=Kind.FULL))
    data = tmp_path / "data.txt"
    data.write_text(TEXT)
    site = worker_site(tmp_path, base, recipe, data, [Part()], group=group)
    assert site.live().num_accepted == 0
    assert "trains the base's own blocks" in site.coordinator.released[0]


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def short_of_memory(where: Callable[[], str]) -> Callable[..., Any]:
    """A block's attention that fails in the middle of a pass of several sequences, on the way there or back."""
    whole = LlamaAttention.forward

    def fail(_: Tensor | None = None) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def forward(block: Any, hidden_states: Tensor, **options: Any) -> Any:
        found = whole(block, hidden_states, **options)
        if block.layer_idx == 2 and len(hidden_states) > 1:
            if where() == "forward":
                fail()
            elif where() == "backward":
                found[0].register_hook(fail)
        return found

    return forward


@pytest.mark.parametrize(
    ("who", "where", "name"), [("rank 0", "backward", "path"), ("a follower", "forward", "classification")]
)
def test_short_memory_in_one_process_halves_the_pieces(
    base: Path,
    chat: Path,
    tmp_path: Path,
    group: Group,
    fault: Path,
    monkeypatch: pytest.MonkeyPatch,
    who: str,
    where: str,
    name: str,
) -> None:
    recipe = recipes(base)[name]
    recipe = replace(recipe, inner=replace(recipe.inner, batch_size=4))
    data = write_labelled(tmp_path / "labelled.jsonl") if recipe.task.num_labels else chat
    alone = train(make_trainer(load_whole(base, recipe), data, recipe), base, (LOWER, UPPER))
    number = group.number
    trainer = make_trainer(share(group, base, recipe), data, recipe, InStep(group))
    if who == "rank 0":
        monkeypatch.setattr(LlamaAttention, "forward", short_of_memory(lambda: where))
    else:
        fault.write_text(where)
    try:
        assert_same(train(trainer, base, (LOWER, UPPER)), alone)
    finally:
        fault.write_text("")
    assert trainer.micro_batch_size == 1
    assert group.number == number + 1


def test_a_follower_that_dies_within_a_pass_fails_the_task_and_not_the_next_one(
    base: Path, chat: Path, group: Group, resident: ShardedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes(base)["path"]
    alone = train(make_trainer(load_whole(base, recipe), chat, recipe), base, (LOWER,))
    trainer = make_trainer(resident, chat, recipe, InStep(group))
    whole = LlamaAttention.forward

    def forward(block: Any, **options: Any) -> Any:
        if block.layer_idx == 1:
            group.followers[0].kill()
        return whole(block, **options)

    with monkeypatch.context() as patch:
        patch.setattr(LlamaAttention, "forward", forward)
        with pytest.raises(ComputeError, match="ended with exit code -9, and its share of the base with it"):
            train(trainer, base, (LOWER,))
    assert not group.followers
    assert_same(train(trainer, base, (LOWER,)), alone)


def test_one_that_is_found_dead_between_passes_is_started_again(
    base: Path, chat: Path, group: Group, resident: ShardedBase
) -> None:
    recipe = recipes(base)["path"]
    alone = train(make_trainer(load_whole(base, recipe), chat, recipe), base, (LOWER,))

    def kill(report: StepReport) -> bool:
        if report.step == 2:
            group.followers[0].kill()
            group.followers[0].wait()
        return False

    number = group.number
    assert_same(train(make_trainer(resident, chat, recipe, InStep(group)), base, (LOWER,), kill), alone)
    assert group.number == number + 1


WORKER = """
import os, signal, sys
from pathlib import Path
from tests.integration import test_trainer_sharded as test
from transformers.models.llama.modeling_llama import LlamaAttention

base, chat = map(Path, sys.argv[1:])
whole = LlamaAttention.forward

def forward(block, **options):
    if block.layer_idx == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(block, **options)

with test.launch(2, test.CPU, silence_max=test.SILENCE_MAX) as group:
    recipe = test.recipes(base)["path"]
    trainer = test.make_trainer(test.share(group, base, recipe), chat, recipe, test.InStep(group))
    print(group.followers[0].pid, flush=True)
    LlamaAttention.forward = forward
    test.train(trainer, base, (test.LOWER,))
"""


def test_when_rank_0_dies_within_a_pass_its_followers_end(base: Path, chat: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WORKER, base, chat], stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        follower = psutil.Process(int(worker.stdout.readline()))
        assert worker.wait(30) == -signal.SIGKILL
        # Nobody waits for it, so that it may be gone from the table already.
        psutil.wait_procs([follower], timeout=10)
        assert not follower.is_running() or follower.status() == psutil.STATUS_ZOMBIE


# ---- what is refused ---------------------------------------------------------------------------------------------


def test_a_run_that_trains_the_blocks_themselves_is_refused(base: Path, group: Group) -> None:
    with pytest.raises(UsageError, match="trains the base's own blocks") as caught:
        open_sharded(
            group,
            base,
            recipes(base)["path"].task,
            device=CPU,
            dtype=torch.float32,
            kind=Kind.FULL,
            quantise="none",
        )
    assert "--no-shard-base" in caught.value.hint


def test_named_slots_are_refused(base: Path, resident: ShardedBase) -> None:
    recipe = recipes(base)["path"]
    with pytest.raises(ValueError, match="slots"):
        resident.compose(recipe, start_of(base, recipe), slot="0.0")
