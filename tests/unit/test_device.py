from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.tiny import tiny_recipe, write_tiny_base

from weft.client.device import Device, available_bytes, check_memory, find_device, needed_bytes
from weft.common.base import num_base_parameters
from weft.common.errors import OutOfMemory

GIB = 2**30


def test_describe_is_one_line() -> None:
    device = Device(torch_device=torch.device("cpu"), dtype=torch.float32, name="2 threads")
    assert device.describe() == "cpu: 2 threads, fp32"
    assert replace(device, dtype=torch.bfloat16).describe() == "cpu: 2 threads, bf16"


def test_a_device_is_found_and_says_what_is_free() -> None:
    device = find_device()
    assert device.describe().startswith(device.torch_device.type)
    free = available_bytes(torch.device("cpu"))
    assert free is None or free > 0


def test_what_fits_or_cannot_be_known_passes() -> None:
    check_memory(GIB, 2 * GIB, quantise="none")
    check_memory(GIB, None, quantise="none")


@pytest.mark.parametrize(("quantise", "offered"), [("none", True), ("4bit", False)])
def test_a_worker_without_the_memory_hears_it_before_loading(quantise: str, offered: bool) -> None:
    with pytest.raises(OutOfMemory, match=r"needs about 16\.0 GiB and 8\.0 GiB are free") as caught:
        check_memory(16 * GIB, 8 * GIB, quantise="4bit" if quantise == "4bit" else "none")
    assert ("--quantise 4bit" in caught.value.hint) is offered


def test_need_grows_with_dtype_and_sequences_but_not_with_the_batch(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    recipe = tiny_recipe(base)
    longer = replace(recipe, inner=replace(recipe.inner, sequence_length=64))
    larger = replace(recipe, inner=replace(recipe.inner, batch_size=64))
    fp32 = needed_bytes(base, recipe, dtype=torch.float32, quantise="none")
    assert needed_bytes(base, recipe, dtype=torch.bfloat16, quantise="none") < fp32
    assert needed_bytes(base, recipe, dtype=torch.float32, quantise="4bit") < fp32
    assert needed_bytes(base, longer, dtype=torch.float32, quantise="none") > fp32
    assert needed_bytes(base, larger, dtype=torch.float32, quantise="none") == fp32


def test_a_divided_base_needs_its_share_and_what_is_gathered(tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base", num_layers=12)
    recipe = tiny_recipe(base)
    needs = [
        needed_bytes(base, recipe, dtype=torch.float32, quantise="none", num_shares=shares)
        for shares in (1, 2, 4)
    ]
    num_parameters = num_base_parameters(base)
    outside = 300 * 32
    gathered = outside + 2 * (num_parameters - outside) // 12
    assert needs[0] - needs[1] == pytest.approx(1.1 * 4 * (num_parameters / 2 - gathered), abs=8)
    assert needs[1] - needs[2] == pytest.approx(1.1 * 4 * num_parameters / 4, abs=8)
