"""The prefix protocol: a document's first tokens are read and neither learnt nor counted; held-out documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tiny import TEXT, tiny_tokenizer

from weft.common.documents import is_heldout, read_rows
from weft.common.sequences import (
    IGNORED,
    Row,
    Sequences,
    causal_sequences,
    concatenate,
    read_documents,
    read_prefixes,
    text_tokens,
)

TOKENIZER: Any = tiny_tokenizer()
texts = st.lists(st.text("the warp weft é🧵\n", max_size=60), min_size=1, max_size=5)


def rows(*columns: dict[str, Any]) -> list[Row]:
    return [Row(item, f"row {number}") for number, item in enumerate(columns, start=1)]


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text)["input_ids"]
    return found


def learnt(sequences: Sequences) -> list[int]:
    return [int(label) for label in sequences.labels[sequences.labels != IGNORED]]


@settings(max_examples=30)
@given(texts, st.integers(0, 12), st.booleans())
def test_the_labels_left_are_those_behind_each_prefix(
    found: list[str], prefix_tokens: int, heldout: bool
) -> None:
    documents = rows(*({"text": text} for text in found))
    sequences = causal_sequences(
        documents, TOKENIZER, sequence_length=1, prefix_tokens=prefix_tokens, heldout=heldout
    )
    expected = [[*ids(text), TOKENIZER.eos_token_id] for text in found]
    behind = [token for tokens in expected for token in tokens[prefix_tokens:]]
    first = 0 if heldout or prefix_tokens else 1  # training predicts no first token of the stream
    assert learnt(sequences) == behind[first:]


def test_bytes_of_the_prefix_are_not_counted() -> None:
    text = "the warp — fäden 織物 🧵 and the weft"
    sequences = causal_sequences(
        rows({"text": text}), TOKENIZER, sequence_length=8, prefix_tokens=3, heldout=True
    )
    prefix = TOKENIZER.decode(ids(text)[:3])
    assert sequences.num_bytes.sum() == len(text.encode()) - len(prefix.encode())


def test_the_prefix_covers_prompt_and_completion_alike() -> None:
    pair = {"prompt": "over ", "completion": "and under the weft"}
    whole = causal_sequences(rows(pair), TOKENIZER, sequence_length=1, heldout=True)
    num_prompt = len(ids("over "))
    cut = causal_sequences(
        rows(pair), TOKENIZER, sequence_length=1, prefix_tokens=num_prompt + 2, heldout=True
    )
    assert learnt(cut) == learnt(whole)[2:]


@settings(max_examples=30)
@given(texts, st.integers(0, 12), st.integers(1, 9))
def test_documents_one_by_one_have_the_labels_of_the_stream(
    found: list[str], prefix_tokens: int, length: int
) -> None:
    documents = rows(*({"text": text} for text in found))
    stream = causal_sequences(
        documents, TOKENIZER, sequence_length=length, prefix_tokens=prefix_tokens, heldout=True
    )
    apart = list(read_documents(documents, TOKENIZER, sequence_length=length, prefix_tokens=prefix_tokens))
    assert [item.row for item in apart] == documents
    together = concatenate([item.sequences for item in apart])
    assert learnt(together) == learnt(stream)
    assert together.num_bytes.sum() == stream.num_bytes.sum()
    for item in apart:
        counted = item.sequences.labels != IGNORED
        assert item.tokens[item.positions[counted]].tolist() == item.sequences.labels[counted].tolist()
        assert (item.positions[counted] >= prefix_tokens).all()


def test_a_document_sees_no_other_one() -> None:
    first, second = read_documents(rows({"text": TEXT[:40]}, {"text": "over"}), TOKENIZER, sequence_length=64)
    assert second.sequences.tokens[0, 0] == TOKENIZER.eos_token_id
    assert second.sequences.lengths.tolist() == [len(ids("over")) + 1]
    assert first.tokens[-1] == TOKENIZER.eos_token_id


def test_a_tokenizer_that_begins_texts_counts_that_in_the_prefix() -> None:
    from tokenizers.processors import TemplateProcessing

    beginning = tiny_tokenizer()
    beginning.add_special_tokens({"bos_token": "<s>"})
    begin = beginning.bos_token_id
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    text = "over and under the weft"
    (document,) = read_documents(rows({"text": text}), beginning, sequence_length=64, prefix_tokens=3)
    (prefix,) = read_prefixes(rows({"text": text}), beginning, 3)
    assert document.tokens[:3].tolist() == prefix.tokens[0].tolist() == [begin, *ids(text)[:2]]
    assert learnt(document.sequences) == [*ids(text)[2:], beginning.eos_token_id]
    assert text_tokens(text, beginning) == [begin, *ids(text)]


def test_prefixes_are_the_first_tokens_in_batches() -> None:
    documents = rows({"text": TEXT}, {"text": "over"}, {"text": ""}, {"prompt": "the ", "completion": "weft"})
    first, second = read_prefixes(documents, TOKENIZER, 6, batch_rows=2)
    assert first.tokens[0].tolist() == ids(TEXT)[:6]
    assert first.lengths.tolist() == [6, min(6, len(ids("over")))]
    assert second.tokens[0, 0] == TOKENIZER.eos_token_id
    assert second.lengths[0] == 1
    pair = [*ids("the "), *ids("weft")][:6]
    assert second.tokens[1, : len(pair)].tolist() == pair
    assert [*first.rows, *second.rows] == documents


def test_concatenated_sequences_lie_behind_each_other() -> None:
    parts = [
        causal_sequences(rows({"text": text}), TOKENIZER, sequence_length=8, heldout=True)
        for text in (TEXT[:90], TEXT[90:200])
    ]
    whole = concatenate(parts)
    assert len(whole) == sum(map(len, parts))
    assert np.array_equal(whole.tokens[len(parts[0]) :], parts[1].tokens)
    assert whole.num_tokens == sum(part.num_tokens for part in parts)


# -- held-out documents ----------------------------------------------------------------------------------------


def test_the_same_documents_are_held_out_wherever_they_lie() -> None:
    documents = rows(*({"text": f"document {number}"} for number in range(2000)))
    chosen = [row for row in documents if is_heldout(row, 0.05)]
    assert 70 <= len(chosen) <= 130
    elsewhere = [Row(dict(reversed(list(row.columns.items()))), "elsewhere") for row in documents]
    assert [is_heldout(row, 0.05) for row in elsewhere] == [is_heldout(row, 0.05) for row in documents]
    assert all(is_heldout(row, 0.2) for row in chosen)
    assert not any(is_heldout(row, 0.0) for row in documents)


def test_purposes_choose_independently() -> None:
    documents = rows(*({"text": f"document {number}"} for number in range(4000)))
    both = sum(is_heldout(row, 0.1) and is_heldout(row, 0.1, purpose="router") for row in documents)
    assert 15 <= both <= 75


def test_long_files_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n\n{"text": "second"}\nnot json\n')
    reading = read_rows(path)
    assert next(reading).where == f"{path} line 1"
    assert next(reading).columns == {"text": "second"}
    with pytest.raises(Exception, match="line 4 is not JSON"):
        next(reading)
