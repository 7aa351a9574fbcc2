"""What people and scripts see, from fixed statuses."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from weft.client.cells import count, curve, duration, plain, size
from weft.client.lineage import draw
from weft.client.live import Curtain, JsonLines, Lines, follow
from weft.client.pathgrid import num_paths_through, path_steps, paths_table
from weft.client.watch import fields_table, render, rounds_table, steps, tokens_table
from weft.common.errors import Unreachable
from weft.common.ids import Digest, ModuleKey, RunId, TaskId, WorkerId
from weft.common.manifest import (
    Contributor,
    Gate,
    GateOutcome,
    Instant,
    MergeStep,
    OuterStep,
    Parent,
    Sha256,
    VersionManifest,
)
from weft.common.modules import Kind, Topology
from weft.common.protocol import (
    LossPoint,
    ModuleStatus,
    PathStatus,
    Role,
    RoundState,
    RoundStatus,
    RunStatus,
    Stage,
    Status,
    TokenStatus,
    WorkerState,
    WorkerStatus,
)

ROUND = RoundStatus(
    run_id="alpha",
    module="0.0",
    round_number=3,
    base_version=2,
    state=RoundState.COLLECTING,
    reason="1 of 2 updates for a quorum; 1 worker(s) at work",
    num_updates=1,
    target=2,
    quorum=2,
    num_in_flight=1,
    opened_at=1000.0,
)
MODULE = ModuleStatus(
    run_id="alpha",
    module="0.0",
    version=2,
    num_parameters=1_500_000,
    digest="ab" * 32,
    round=ROUND,
    losses=tuple(LossPoint(step=n, loss=3.0 - n / 2) for n in range(3)),
)
RUN = RunStatus(
    run_id="alpha",
    num_rounds=10,
    finished=False,
    reason="waits for updates",
    base_digest="cd" * 32,
    rule="ties",
    codec="ternary",
    modules=(MODULE,),
    bytes_up=250_000,
    bytes_down=4_000_000,
    bytes_up_bf16=1_000_000,
    eta_s=95.0,
)
WORKER = WorkerStatus(
    worker_id="w-1",
    display_name="[red]ada[/red]",
    state=WorkerState.WORKING,
    role=Role.WORKER,
    device="cpu: 2 threads, fp32",
    tokens_per_s=1234.0,
    run_id="alpha",
    stage=Stage.TRAINING,
    num_done=3,
    num_total=8,
    since=1050.0,
    loss=2.5,
    bytes_up=250_000,
)
OPERATOR = WorkerStatus(
    worker_id="operator", display_name="operator", state=WorkerState.LOST, role=Role.ADMIN, device=""
)
STATUS = Status(
    coordinator="loom", started_at=900.0, taken_at=1060.0, runs=(RUN,), workers=(OPERATOR, WORKER)
)


def drawn(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=240, highlight=False)
    console.print(renderable)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def finished(status: Status) -> Status:
    ended = dataclasses.replace(
        ROUND, state=RoundState.PUBLISHED, reason="no gate", ended_at=1060.0, round_number=10
    )
    module = dataclasses.replace(MODULE, version=10, round=ended)
    run = dataclasses.replace(RUN, finished=True, reason="finished", modules=(module,))
    return dataclasses.replace(status, runs=(run,))


def test_the_picture_says_what_each_does_and_why() -> None:
    text = drawn(render(STATUS))
    for said in (
        "loom",
        "up 2 min 40 s",
        "2/10",
        "25 %",
        "1 min 35 s",
        "waits for updates",
        "alpha/0.0",
        "@2",
        "1.5M",
        "collecting",
        "1 of 2 updates for a quorum",
        "█▅▁ 2.000",
        "1,234",
        "training alpha 3/8",
        "10 s",
        "2.500",
    ):
        assert said in text, said


def test_words_of_others_are_shown_as_they_are() -> None:
    assert "[red]ada[/red]" in drawn(render(STATUS))


def test_who_only_looks_is_not_called_lost() -> None:
    lines = [line for line in drawn(render(STATUS)).splitlines() if line.startswith("operator")]
    assert "admin" in lines[0]
    assert "lost" not in lines[0]


def test_a_status_of_nothing_can_be_drawn() -> None:
    empty = Status(coordinator="loom", started_at=0.0, taken_at=0.0, runs=(), workers=())
    assert "loom" in drawn(render(empty))


def test_json_has_every_field_and_names_for_enums() -> None:
    value = json.loads(json.dumps(plain(STATUS)))
    assert value["runs"][0]["modules"][0]["round"]["state"] == "collecting"
    assert value["workers"][1]["stage"] == "training"
    assert value["workers"][0]["role"] == "admin"
    assert value["workers"][1].keys() == {field.name for field in dataclasses.fields(WorkerStatus)}


def test_rounds_show_what_the_gate_measured() -> None:
    gated = dataclasses.replace(
        ROUND,
        state=RoundState.ROLLED_BACK,
        loss_before=2.0,
        loss_after=2.5,
        loss_interval=0.01,
        ended_at=1004.0,
    )
    text = drawn(rounds_table([gated]))
    assert "2.0000 → 2.5000 ± 0.0100" in text
    assert "rolled back" in text
    assert "4 s" in text


def test_one_round_shows_times_for_people() -> None:
    text = drawn(fields_table(dataclasses.replace(ROUND, contributors=("w-1", "w-2"))))
    assert "1970-01-01 00:16:40 UTC" in text
    assert "w-1, w-2" in text


def test_tokens_show_no_secret_and_say_when_they_are_over() -> None:
    token = TokenStatus(
        token_id="ABCDEF",
        role=Role.WORKER,
        expires_at=100.0,
        num_uses_left=3,
        needs_approval=True,
        runs=(),
        label="lab",
        revoked=False,
    )
    over = [
        dataclasses.replace(token, expires_at=10.0, token_id="OLDOLD"),
        dataclasses.replace(token, revoked=True, token_id="GONEGO"),
    ]
    lines = drawn(tokens_table([token, *over], now=40.0)).splitlines()
    assert ("1 min 00 s" in lines[1], "expired" in lines[2], "revoked" in lines[3]) == (True, True, True)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "–"),
        ([float("nan")], "–"),
        ([2.0], "▁ 2.000"),
        ([1.0, 1.0], "▁▁ 1.000"),
        ([0.0, float("inf"), 7.0], "▁ █ 7.000"),
        ([float(n) for n in range(30)], "▁▁▂▂▃▃▄▄▅▅▆▆▇▇██ 29.000"),
    ],
    ids=["none", "nan", "one", "flat", "gap", "newest"],
)
def test_curve(values: list[float], expected: str) -> None:
    assert curve([LossPoint(step=n, loss=value) for n, value in enumerate(values)]) == expected


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_400, "99.4 kB"),
        (999_600, "1.0 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_size(num_bytes: int, expected: str) -> None:
    assert size(num_bytes) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(-1, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3661, "1 h 01 min"), (10**6, "11 days")],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_count() -> None:
    assert [count(n) for n in (12, 1500, 2_500_000, 7 * 10**9)] == ["12", "1.5k", "2.5M", "7.0B"]


# ---- paths -------------------------------------------------------------------------------------------------------

UNSERVED = "no worker that is here has documents for it: let one with such data join"


def path_status(
    path: str, state: str = "waits for module 0.0, which is merging", **fields: Any
) -> PathStatus:
    return PathStatus(path=path, state=state, workers=fields.pop("workers", ()), num_in=0, **fields)


def run_of(experts: tuple[int, ...], **states: PathStatus) -> RunStatus:
    """A run whose paths are as given by the names p0_1 for path 0.1, and wait otherwise."""
    topology = Topology(experts=experts)
    modules = tuple(
        dataclasses.replace(MODULE, module=str(key), version=3 + key.level) for key in topology.modules
    )
    paths = tuple(
        states.get("p" + str(path).replace(".", "_")) or path_status(str(path)) for path in topology.paths
    )
    return dataclasses.replace(RUN, modules=modules, paths=paths)


def picture(run: RunStatus) -> str:
    return drawn(render(dataclasses.replace(STATUS, runs=(run,))))


def test_two_levels_are_a_grid_with_versions_and_paths_on_the_margins() -> None:
    ada = path_status("0.1", "train", workers=("w-1", "w-9"))
    measured = path_status("1.2", validation_loss=3.25, best_loss=3.0)
    lines = picture(run_of((2, 3), p0_1=ada, p1_2=measured)).splitlines()
    top = next(index for index, line in enumerate(lines) if line.split()[:2] == ["1.0", "@4"])
    assert lines[top].split() == ["1.0", "@4", "1.1", "@4", "1.2", "@4"]
    assert lines[top + 1].split() == ["2", "paths"] * 3
    assert lines[top + 3].split() == ["0.0", "@3", "waiting", "[red]ada[/", "3/8", "+1", "waiting"]
    assert lines[top + 4].split()[:2] == ["3", "paths"]
    assert "3.250 · 0 in" in lines[top + 7]
    assert "6 paths · 5 waiting · 1 at work" in "\n".join(lines)


def test_what_is_a_paths_own_stands_in_its_cell() -> None:
    text = picture(run_of((2, 2, 0)))
    assert all(f"2.{expert}@5" in text for expert in range(4))
    assert "1.0 @4" in text


def test_a_path_that_nobody_serves_is_named_with_what_to_do() -> None:
    text = picture(run_of((2, 2), p1_0=path_status("1.0", UNSERVED)))
    assert f"! alpha/path:1.0 {UNSERVED}" in text
    assert "1 not served · 3 waiting" in text


def test_other_grids_are_a_list_with_what_needs_attention_first() -> None:
    stopped = path_status(
        "1.1.1", "stopped early: 3 evaluations without a loss below 3.1", best_versions=(2, 2, 1)
    )
    text = picture(run_of((2, 2, 2), p1_0_0=path_status("1.0.0", UNSERVED), p1_1_1=stopped))
    listed = [line.split()[0] for line in text.splitlines() if line.startswith("alpha/path:")]
    assert listed[:3] == ["alpha/path:1.0.0", "alpha/path:1.1.1", "alpha/path:0.0.0"]
    assert "@2, @2, @1" in text


def test_many_paths_are_counted_and_the_unserved_named() -> None:
    lost = {
        f"p{row}_{column}": path_status(f"{row}.{column}", UNSERVED)
        for row in range(16)
        for column in range(2)
    }
    lines = picture(run_of((16, 16), **lost)).splitlines()
    assert len(lines) < 60
    assert "alpha: 256 paths · 32 not served · 224 waiting" in lines
    assert sum(line.startswith("! alpha/path:") for line in lines) == 16
    assert "  … and 16 more: weft paths list --run alpha" in lines
    assert "… and 8 modules that are further: weft modules list" in lines


def test_a_list_of_paths_has_all_that_is_known() -> None:
    path = path_status(
        "0.1",
        "train",
        workers=("w-1",),
        validation_loss=3.25,
        best_loss=3.125,
        best_versions=(4, 5),
        num_sequences=12_345,
    )
    run = run_of((1, 2), p0_1=path)
    row = next(line for line in drawn(paths_table([run], STATUS.workers)).splitlines() if "path:0.1" in line)
    for said in ("at work", "3/8", "12,345", "3.250", "3.125", "@4, @5"):
        assert said in row
    assert num_paths_through(run) == {"0.0": 2, "1.0": 1, "1.1": 1}


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (path_status("0.1"), path_status("0.1", "train", workers=("w-1",)), []),
        (path_status("0.1"), path_status("0.1", "has had its rounds"), []),
        (path_status("0.1"), path_status("0.1", UNSERVED), [UNSERVED]),
        (path_status("0.1", UNSERVED), path_status("0.1", "waits for a worker"), ["somebody serves it now"]),
        (
            path_status("0.1"),
            path_status("0.1", validation_loss=3.0, best_loss=2.5),
            ["held-out loss 3.000, best 2.500"],
        ),
    ],
    ids=["ordinary", "finished", "lost", "found", "measured"],
)
def test_lines_say_what_happened_to_a_path(before: PathStatus, after: PathStatus, lines: list[str]) -> None:
    old, new = run_of((2, 2), p0_1=before), run_of((2, 2), p0_1=after)
    assert path_steps(old, new) == [f"alpha path 0.1: {line}" for line in lines]


# ---- following ---------------------------------------------------------------------------------------------------


def test_steps_are_said_once() -> None:
    assert steps(None, STATUS) == [f"alpha 0.0 round 3 of 10: collecting: {ROUND.reason}"]
    assert steps(STATUS, STATUS) == []
    assert steps(STATUS, finished(STATUS)) == ["alpha 0.0 round 10 of 10: published: no gate"]


def test_following_goes_on_through_a_restart_until_all_is_finished() -> None:
    said: list[str] = []
    streams: Iterator[object] = iter(
        [STATUS, Unreachable("no answer"), Unreachable("no answer"), finished(STATUS)]
    )

    def watch() -> Iterator[Status]:
        item = next(streams)
        if isinstance(item, Unreachable):
            raise item
        assert isinstance(item, Status)
        yield item

    pauses: list[float] = []
    follow(watch, Lines(said.append), until_finished=True, pause=pauses.append)
    assert said == [*steps(None, STATUS), "no answer; trying again", *steps(STATUS, finished(STATUS))]
    assert len(pauses) == 3


def test_json_lines_are_one_document_a_line() -> None:
    said: list[str] = []
    with JsonLines(said.append) as screen:
        screen.show(STATUS)
        screen.trouble("not for scripts")
    assert [json.loads(line)["coordinator"] for line in said] == ["loom"]


def test_a_terminal_shows_the_last_picture() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with Curtain(console) as screen:
        screen.trouble("no answer")
        screen.show(STATUS)
    assert isinstance(console.file, io.StringIO)
    assert "collecting" in console.file.getvalue()


# ---- lineage -----------------------------------------------------------------------------------------------------


def manifest(version: int) -> VersionManifest:
    start = version == 0
    contributor = Contributor(
        worker_id=WorkerId("w-1"),
        task_id=TaskId("t-1"),
        update_digest=Digest("e" * 64),
        weight=8.0,
        steps=4,
        tokens=512,
        norm=1.25,
    )
    return VersionManifest(
        run=RunId("alpha"),
        module=ModuleKey(0, 0),
        version=version,
        parents=() if start else (Parent(version=version - 1, manifest_digest=Digest("f" * 64)),),
        base_digest=Digest("a" * 64),
        schema_digest=Digest("b" * 64),
        content_digest=Digest("c" * 64),
        content_bytes=10,
        content_sha256=Sha256("d" * 64),
        kind=Kind.LORA,
        settings={},
        contributors=() if start else (contributor,),
        merge=None if start else MergeStep(rule="ties", parameters={"density": 0.2}),
        outer=None if start else OuterStep(name="nesterov", parameters={}),
        gate=Gate(outcome=GateOutcome.SKIPPED, reason="no held-out data"),
        code_version="0.1.0",
        round_number=version,
        created=Instant("2031-05-06T07:08:09Z"),
    )


def test_lineage_is_drawn_newest_first_with_contributors_rule_and_gate() -> None:
    text = drawn(draw([manifest(0), manifest(1)]))
    assert text.index("@1  cccc") < text.index("@0  cccc")
    for said in (
        "from @0",
        "round 1: ties(density=0.2), then nesterov",
        "w-1: 4 steps, 512 tokens",
        "gate skipped",
    ):
        assert said in text
