"""What rank 0 makes of followers that ended, or never came."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from weft.client.trainer import group as groups
from weft.client.trainer.group import BROKEN_CODE, MEMORY_CODE, Group, launch
from weft.common.errors import ComputeError

CPU = torch.device("cpu")


class Ended:
    """A follower that ended."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code


def make_group(*codes: int | None) -> Group:
    group = Group(rank=0, size=len(codes) + 1, device=CPU)
    group.followers = cast("Any", [Ended(code) for code in codes])
    return group


@pytest.mark.parametrize(
    ("codes", "told"),
    [
        ((1, BROKEN_CODE, -9), [-9, 1, BROKEN_CODE]),
        ((BROKEN_CODE, MEMORY_CODE), [MEMORY_CODE, BROKEN_CODE]),
        ((None, MEMORY_CODE), [MEMORY_CODE]),
    ],
    ids=["killed before failed before left alone", "memory first", "memory at once"],
)
def test_the_cause_comes_before_what_followed(codes: tuple[int | None, ...], told: list[int]) -> None:
    assert make_group(*codes).exit_codes() == told


@pytest.mark.parametrize(("codes", "is_whole"), [((None, None), True), ((None, 1), False)])
def test_a_group_is_whole_while_all_live(codes: tuple[int | None, ...], *, is_whole: bool) -> None:
    group = make_group(*codes)
    assert group.is_whole is is_whole
    group.broken = True
    assert not group.is_whole


def test_a_follower_that_does_not_come_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "PROGRAM", ("-c", "pass"))
    with pytest.raises(ComputeError, match="did not start"), launch(2, CPU):
        raise AssertionError
    assert not torch.distributed.is_initialized()
