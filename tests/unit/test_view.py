"""The lines that a worker prints, and what `weft doctor` finds."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from weft.client.doctor import Outcome, examine
from weft.client.heartbeat import TaskProgress
from weft.client.home import Home, Membership, WorkerSettings, save_member, save_settings
from weft.client.loop import Action, Phase
from weft.client.view import PlainView, TerminalView, action_line, progress_line
from weft.common.ids import Digest, RunId, TaskId, WorkerId
from weft.common.protocol import ModuleStart, Purpose, Stage, Task

START = ModuleStart(
    module="0.0", version=3, blake3=Digest("0" * 64), size_bytes=1, train=True, round_number=4, steps_before=0
)
TASK = Task(
    task_id=TaskId("t-7"),
    run_id=RunId("alpha"),
    lease_token="secret",
    lease_epoch=1,
    lease_s=15.0,
    path="0",
    modules=(START,),
    recipe_blake3=Digest("0" * 64),
    num_steps=50,
    update_bytes_max=1,
)
OTHER = dataclasses.replace(START, module="1.2", version=4, train=False, round_number=0)
PATH = dataclasses.replace(TASK, path="0.2", modules=(START, OTHER), rank=4)
EVALUATION = dataclasses.replace(
    PATH,
    purpose=Purpose.EVALUATE,
    modules=(dataclasses.replace(START, train=False, round_number=0), OTHER),
)
ROUTE = dataclasses.replace(TASK, purpose=Purpose.ROUTE, path="", modules=())


@pytest.mark.parametrize(
    ("action", "line"),
    [
        (Action(phase=Phase.CONNECTING, reason="start"), "connecting"),
        (Action(phase=Phase.POLLING, reason="no answer", wait_s=1.0), "no answer; trying again"),
        (Action(phase=Phase.POLLING, reason="round 2 is merging"), "waiting for work: round 2 is merging"),
        (Action(phase=Phase.FETCHING, reason="", task=TASK), "fetching alpha 0.0@3 (task t-7)"),
        (Action(phase=Phase.TRAINING, reason="", task=TASK), "training alpha 0.0@3: 50 steps"),
        (
            Action(phase=Phase.TRAINING, reason="", task=PATH),
            "training alpha path 0.2: 0.0@3: 50 steps at rank 4",
        ),
        (
            Action(phase=Phase.TRAINING, reason="", task=EVALUATION),
            "evaluating alpha path 0.2: 0.0@3, 1.2@4",
        ),
        (
            Action(phase=Phase.TRAINING, reason="", task=ROUTE),
            "routing this worker's documents for alpha",
        ),
        (Action(phase=Phase.FETCHING, reason="", task=ROUTE), "fetching alpha (task t-7)"),
        (Action(phase=Phase.RELEASING, reason="stopping", task=TASK), "giving the task back: stopping"),
    ],
    ids=lambda value: value.phase.value if isinstance(value, Action) else None,
)
def test_action_line(action: Action, line: str) -> None:
    assert action_line(action) == line


def test_progress_line() -> None:
    training = TaskProgress(stage=Stage.TRAINING, num_done=3, num_total=50, loss=2.25, tokens_per_s=1234.0)
    assert progress_line(training) == "training · 3/50 · loss 2.250 · 1,234 tokens/s"
    assert (
        progress_line(TaskProgress(stage=Stage.SENDING, num_done=0, num_total=2000)) == "sending · 0 B/2.0 kB"
    )
    assert progress_line(TaskProgress(stage=Stage.LOADING)) == "loading"


def test_plain_lines_say_a_thing_once() -> None:
    said: list[str] = []
    with PlainView(said.append) as view:
        for wait_s in (0.5, 1.0, 2.0):
            view.turn(Action(phase=Phase.POLLING, reason="no answer", wait_s=wait_s))
        view.turn(Action(phase=Phase.SENDING, reason="", task=TASK))
        view.progress(TaskProgress(stage=Stage.SENDING))
    assert said == ["no answer; trying again"]


def test_a_terminal_line_is_not_read_as_markup() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with TerminalView(console) as view:
        view.turn(Action(phase=Phase.POLLING, reason="[bold]merging[/bold]"))
        view.progress(TaskProgress(stage=Stage.TRAINING))
        view.said("[red]accepted[/red]")
    assert isinstance(console.file, io.StringIO)
    assert "[red]accepted[/red]" in console.file.getvalue()


# ---- doctor ------------------------------------------------------------------------------------------------------


def found(home: Home) -> dict[str, tuple[Outcome, str]]:
    return {check.name: (check.outcome, check.found) for check in examine(home)}


def test_a_fresh_machine_is_fine_and_is_told_how_to_begin(tmp_path: Path) -> None:
    checks = found(Home(tmp_path / "home"))
    assert {name: outcome for name, (outcome, _) in checks.items()} | {"disk": Outcome.OK} == {
        "python": Outcome.OK,
        "home": Outcome.OK,
        "disk": Outcome.OK,
        "device": Outcome.OK,
        "coordinators": Outcome.WARNING,
    }


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    directory = home.worker_directory(bytes(32))
    member = Membership(
        address="127.0.0.1:1", pin="00" * 32, ca_pem="CA", tls_name="x", worker_id=WorkerId("w-1")
    )
    save_member(directory, member)
    checks = found(home)
    assert checks["worker 00000000"][0] is Outcome.FAILED
    assert "cannot be reached" in checks["worker 00000000"][1]


def test_data_that_has_gone_is_found(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    directory = home.worker_directory(bytes(32))
    member = Membership(
        address="127.0.0.1:1",
        pin="00" * 32,
        ca_pem="",
        tls_name="x",
        worker_id=WorkerId("w-1"),
        insecure=True,
    )
    save_member(directory, member)
    save_settings(directory, WorkerSettings(data=str(tmp_path / "gone"), name="ada"))
    assert found(home)["worker 00000000"] == (Outcome.FAILED, f"its data is gone: {tmp_path / 'gone'}")


def test_a_home_that_others_can_enter_is_found(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir(mode=0o755)
    assert found(Home(tmp_path / "home"))["home"][0] is Outcome.FAILED
