"""Compiled loops where there is nowhere to keep them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from numba import njit

from weft.common.compiled import compiled


def total(count: int) -> int:
    added = 0
    for number in range(count):
        added += number
    return added


def test_a_loop_that_cannot_be_kept_is_compiled_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    def nowhere(*, cache: bool = False, **options: bool) -> Callable[..., object]:
        made.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'total': no locator available")
        done: Callable[..., object] = njit(**options)
        return done

    monkeypatch.setattr("weft.common.compiled.njit", nowhere)
    assert compiled(total)(5) == 10
    assert made == [True, False]
