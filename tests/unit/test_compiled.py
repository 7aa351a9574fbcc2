"""What becomes of compiled loops on disk: where there is no place, where files are damaged, where others write."""

from __future__ import annotations

import fcntl
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
from numba.core.caching import IndexDataCacheFile

from weft.common.compiled import compiled

SOURCE = """
def total(count):
    added = 0
    for number in range(count):
        added += number
    return added
"""
Loop = Callable[[int], int]


@pytest.fixture
def made(tmp_path: Path) -> Callable[[], Loop]:
    """A loop in a file of its own, as a process that has just started makes it."""
    (tmp_path / "loops.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("loops_of_a_test", tmp_path / "loops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda: compiled(module.total)


def kept(directory: Path, ending: str) -> list[Path]:
    return sorted((directory / "__pycache__").glob(f"*.{ending}"))


def num_compiled(loop: Any) -> int:
    return sum(loop.stats.cache_misses.values())


def test_a_loop_that_cannot_be_kept_is_compiled_each_time() -> None:
    names: dict[str, Loop] = {}
    exec(compile(SOURCE, "<nowhere>", "exec"), names)  # noqa: S102
    assert compiled(names["total"])(5) == 10


def test_a_loop_is_compiled_once(made: Callable[[], Loop], tmp_path: Path) -> None:
    first, second = made(), made()
    assert (first(5), second(5)) == (10, 10)
    assert (num_compiled(first), num_compiled(second)) == (1, 0)
    assert len(kept(tmp_path, "nbc")) == 1


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda whole: whole[: len(whole) // 2], lambda whole: bytes(len(whole))]
)
def test_what_a_power_cut_left_is_compiled_anew_and_kept(
    made: Callable[[], Loop], tmp_path: Path, ending: str, damage: Callable[[bytes], bytes]
) -> None:
    assert made()(5) == 10
    (file,) = kept(tmp_path, ending)
    file.write_bytes(damage(file.read_bytes()))
    second, third = made(), made()
    assert (second(5), third(5)) == (10, 10)
    assert (num_compiled(second), num_compiled(third)) == (1, 0)


def test_a_full_disk_keeps_nothing_and_stops_nobody(
    made: Callable[[], Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(IndexDataCacheFile, "save", full)
    assert made()(5) == 10


def test_files_are_read_and_written_by_one_process_at_a_time(
    made: Callable[[], Loop], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    held: list[IO[str]] = []

    def flock(file: IO[str], operation: int) -> None:
        assert operation == fcntl.LOCK_EX
        held.append(file)

    def noted(what: str) -> Callable[..., Any]:
        does = getattr(IndexDataCacheFile, what)

        def note(*arguments: object) -> Any:
            seen.append(what if not held[-1].closed else f"{what} without the lock")
            return does(*arguments)

        return note

    monkeypatch.setattr(fcntl, "flock", flock)
    for what in ("load", "save"):
        monkeypatch.setattr(IndexDataCacheFile, what, noted(what))
    assert made()(5) == 10
    assert seen == ["load", "save"]
