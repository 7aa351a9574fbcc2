"""A base of toy size is made from a made-up standard library and read back."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from weft.client.demo.corpus import TOPICS
from weft.client.demo.make_base import Recipe, encode, make_base, rate, train_tokenizer, windows

TINY = Recipe(
    vocabulary=300,
    hidden=16,
    layers=1,
    intermediate=32,
    heads=2,
    key_value_heads=1,
    batch=4,
    sequence_tokens=16,
    steps=60,
    warmup_steps=5,
    learning_rate=3e-2,
)


def _stdlib(root: Path) -> Path:
    topics = {f"topic{i}": f"The statement number {i} is assigned.\n" for i in range(40)}
    for folder in ("pydoc_data", "encodings", "email"):
        (root / folder).mkdir(parents=True)
    (root / "pydoc_data" / "topics.py").write_text(f"topics = {topics!r}\n")
    for i in range(40):
        (root / f"general{i}.py").write_text(f"def number_{i}(self):\n    return self.number\n" * 3)
        (root / "encodings" / f"cp{i}.py").write_text(f"0x{i:02x}: 'é',\n")
        (root / "email" / f"part{i}.py").write_text(f"header = {i}\n")
    return root


def test_made_base_loads_as_any_model_and_has_learnt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="weft")
    make_base(tmp_path / "base", TINY, stdlib=_stdlib(tmp_path / "stdlib"))

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base", local_files_only=True)
    text = "def número(self):\n    return 'unseen Ω'\n"
    assert model.dtype == torch.bfloat16
    assert model(**tokenizer(text, return_tensors="pt")).logits.isfinite().all()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (model.config.eos_token_id, tokenizer.eos_token) == (tokenizer.eos_token_id, "<|endoftext|>")

    losses = re.findall(r"mean loss ([\d.]+)", caplog.text)
    assert float(losses[-1]) < math.log(TINY.vocabulary) / 2
    bits = dict(re.findall(r"held out of (.+): ([\d.]+) bits per byte", caplog.text))
    assert list(bits) == ["the base part", *(f"{topic}, never seen" for topic in TOPICS)]
    assert min(bits, key=lambda part: float(bits[part])) == "the base part"


def test_no_file_of_a_base_names_the_machine(tmp_path: Path) -> None:
    make_base(tmp_path / "base", TINY, stdlib=_stdlib(tmp_path / "stdlib"))
    for path in (tmp_path / "base").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [rate(step, TINY) for step in range(TINY.steps + 1)]
    assert rates[TINY.warmup_steps - 1] == rates[TINY.warmup_steps] == 1.0
    assert rates[:5] == sorted(rates[:5])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_windows_are_runs_of_the_corpus_and_repeat_with_the_seed() -> None:
    tokens = torch.arange(40)
    first, again = [torch.stack(list(windows(tokens, TINY))) for _ in range(2)]
    assert first.shape == (TINY.steps, TINY.batch, TINY.sequence_tokens + 1)
    assert torch.equal(first, again)
    assert (first.diff(dim=-1) == 1).all()
    assert {first.min().item(), first.max().item()} == {0, 39}


def test_every_text_is_ended() -> None:
    tokenizer = train_tokenizer(["some text", "more text"], 270)
    tokens = encode(tokenizer, ["some", "text"]).tolist()
    assert tokenizer.decode(tokens) == "some<|endoftext|>text<|endoftext|>"
    assert len(tokenizer) <= 270
