"""Each refusal of a submission is its own error."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from weft.common.errors import ConflictingUpdate, ForgedUpdate, LeaseLost, PermissionRefused, RoundClosed
from weft.common.ids import Digest, ModuleKey, Path, RunId, TaskId, WorkerId
from weft.common.protocol import RoundState
from weft.common.statements import UpdateOfModule, UpdateStatement
from weft.server.admission import (
    AcceptedStatement,
    check_lease,
    check_rounds,
    check_statement,
    repeat_of,
    tokens_of,
)
from weft.server.assignment import Lease
from weft.server.rounds import Round, RoundPolicy

A, B = WorkerId("a"), WorkerId("b")
M0, M1 = ModuleKey(0, 0), ModuleKey(1, 0)
RECIPE = "c" * 64
LEASE = Lease(
    task_id=TaskId("t-7"),
    run=RunId("r"),
    worker_id=A,
    token="token",
    epoch=7,
    path=Path((0, 0)),
    rounds=((M0, 3), (M1, 5)),
    starts=((M0, 2), (M1, 4)),
    num_steps=4,
    granted_s=100.0,
    expires_s=115.0,
    progress_s=100.0,
)
SAID = UpdateStatement(
    run=RunId("r"),
    task=TaskId("t-7"),
    worker=A,
    epoch=7,
    recipe=RECIPE,
    updates=(
        UpdateOfModule(module="0.0", start_version=2, digest="d" * 64, size_bytes=9),
        UpdateOfModule(module="1.0", start_version=4, digest="e" * 64, size_bytes=9),
    ),
    num_steps=4,
    num_tokens=32,
    loss_first=2.0,
    loss_last=1.0,
)
FIRST = AcceptedStatement(
    task_id=TaskId("t-7"), epoch=7, worker_id=A, statement_digest=Digest("f" * 64), accepted_at=1.0
)
KNOWN = {(TaskId("t-7"), 7): FIRST}


def test_a_repeat_gets_the_first_answer() -> None:
    assert repeat_of(Digest("f" * 64), FIRST.task_id, 7, A, KNOWN) is FIRST


@pytest.mark.parametrize(("task", "epoch"), [("t-8", 7), ("t-7", 8)])
def test_what_was_never_accepted_has_no_answer(task: str, epoch: int) -> None:
    assert repeat_of(Digest("f" * 64), TaskId(task), epoch, A, KNOWN) is None


def test_another_payload_conflicts() -> None:
    with pytest.raises(ConflictingUpdate):
        repeat_of(Digest("0" * 64), FIRST.task_id, 7, A, KNOWN)


def test_another_workers_answer_is_not_told() -> None:
    for digest in ("0" * 64, "f" * 64):
        with pytest.raises(PermissionRefused):
            repeat_of(Digest(digest), FIRST.task_id, 7, B, KNOWN)


def test_a_lease_lives_until_its_instant() -> None:
    assert check_lease(LEASE, A, now_s=114.999) is LEASE
    with pytest.raises(LeaseLost, match="expired"):
        check_lease(LEASE, A, now_s=115.0)
    with pytest.raises(LeaseLost, match="over"):
        check_lease(None, A, now_s=0.0)


def test_somebody_elses_lease_is_refused_before_its_age_shows() -> None:
    with pytest.raises(PermissionRefused):
        check_lease(LEASE, B, now_s=1e9)


def test_the_statement_that_was_leased_passes() -> None:
    check_statement(SAID, LEASE, recipe_digest=RECIPE)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"run": "s"}, "run"),
        ({"task": "t-8"}, "task"),
        ({"worker": "b"}, "worker"),
        ({"epoch": 6}, "epoch"),
        ({"recipe": "0" * 64}, "recipe"),
        ({"updates": SAID.updates[:1]}, "modules"),
        ({"updates": SAID.updates[::-1]}, "modules"),
        ({"updates": (*SAID.updates, SAID.updates[1])}, "modules"),
        ({"updates": (dataclasses.replace(SAID.updates[0], module="00.0"), SAID.updates[1])}, "modules"),
        (
            {"updates": (dataclasses.replace(SAID.updates[0], start_version=1), SAID.updates[1])},
            "start versions",
        ),
    ],
)
def test_a_field_that_was_not_leased_is_forged(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ForgedUpdate, match=f"statement's {field}"):
        check_statement(dataclasses.replace(SAID, **changes), LEASE, recipe_digest=RECIPE)


def rounds(number: int = 3, state: RoundState = RoundState.COLLECTING) -> dict[ModuleKey, Round]:
    def one(module: ModuleKey, count: int, at: RoundState) -> Round:
        return Round(
            run=RunId("r"), module=module, number=count, base_version=count - 1, opened_at=0.0, state=at
        )

    return {M0: one(M0, number, state), M1: one(M1, 5, RoundState.COLLECTING)}


def test_rounds_that_collect_take_updates() -> None:
    check_rounds(LEASE, rounds(), RoundPolicy())


@pytest.mark.parametrize("state", [state for state in RoundState if state is not RoundState.COLLECTING])
def test_a_round_that_no_longer_collects_is_closed(state: RoundState) -> None:
    with pytest.raises(RoundClosed, match=r"round 3 of module 0\.0 is closed; it is at round 3"):
        check_rounds(LEASE, rounds(state=state), RoundPolicy())


def test_a_later_round_is_another_round() -> None:
    with pytest.raises(RoundClosed, match="it is at round 4"):
        check_rounds(LEASE, rounds(number=4), RoundPolicy())


@pytest.mark.parametrize(("said", "weight"), [(0, 1.0), (1, 1.0), (50, 50.0), (100, 100.0), (10**18, 100.0)])
def test_a_claim_buys_no_weight_beyond_the_task(said: int, weight: float) -> None:
    assert tokens_of(said, tokens_asked=100) == weight
