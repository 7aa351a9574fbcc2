"""How fast the line is, and what is sent over it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from weft.client.uplink import MEASURED_BYTES_MIN, MEASUREMENTS_KEPT, Uplink, choose_codec
from weft.common.codec import CodecKind, CodecSettings
from weft.common.ids import Digest, run_id
from weft.common.recipe import BasePin, Recipe, SlowUplink

SLOW = CodecSettings(kind=CodecKind.TERNARY)
PLAIN = Recipe(run=run_id("tiny"), base=BasePin(digest=Digest("0" * 64)))
RECIPE = dataclasses.replace(PLAIN, slow_uplink=SlowUplink(below_mbit_s=20, codec=SLOW))


@pytest.mark.parametrize(
    ("recipe", "bytes_per_s", "codec"),
    [
        (PLAIN, 1.0, PLAIN.codec),
        (RECIPE, None, RECIPE.codec),
        (RECIPE, 2.4e6, SLOW),
        (RECIPE, 2.5e6, RECIPE.codec),
        (RECIPE, 9e9, RECIPE.codec),
    ],
    ids=["no-such-setting", "not-measured", "below", "at-the-limit", "fast"],
)
def test_the_codec_follows_the_line(recipe: Recipe, bytes_per_s: float | None, codec: CodecSettings) -> None:
    assert choose_codec(recipe, bytes_per_s) == codec


def test_the_median_of_the_last_uploads_counts_and_survives_a_restart(tmp_path: Path) -> None:
    uplink = Uplink(tmp_path / "uplink.json")
    assert uplink.bytes_per_s is None
    for seconds in (1000.0, 1.0, 1.0, 2.0, 4.0, 4.0):
        uplink.took(MEASURED_BYTES_MIN, seconds)
    assert uplink.bytes_per_s == MEASURED_BYTES_MIN / 2
    assert Uplink(tmp_path / "uplink.json").bytes_per_s == uplink.bytes_per_s
    assert MEASUREMENTS_KEPT == 5


def test_small_uploads_say_nothing_of_the_line(tmp_path: Path) -> None:
    uplink = Uplink(tmp_path / "uplink.json")
    uplink.took(MEASURED_BYTES_MIN - 1, 1.0)
    uplink.took(MEASURED_BYTES_MIN, 0.0)
    assert uplink.bytes_per_s is None


@pytest.mark.parametrize("text", ["", "[", "7", '["x"]', "[null]"])
def test_a_damaged_file_is_measured_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "uplink.json").write_text(text)
    assert Uplink(tmp_path / "uplink.json").bytes_per_s is None
