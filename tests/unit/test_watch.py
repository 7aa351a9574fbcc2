"""What people and scripts see, from fixed statuses."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator

import pytest
from rich.console import Console

from weft.client.lineage import draw
from weft.client.live import Curtain, JsonLines, Lines, follow
from weft.client.watch import (
    count,
    curve,
    duration,
    fields_table,
    plain,
    render,
    rounds_table,
    size,
    steps,
    tokens_table,
)
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
from weft.common.modules import Kind
from weft.common.protocol import (
    LossPoint,
    ModuleStatus,
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
