from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import TEMPLATE, TEXT, tiny_tokenizer

from weft.client.data import TokenDataset, load_dataset
from weft.common.documents import read_rows
from weft.common.errors import DataError
from weft.common.ids import Digest, run_id
from weft.common.recipe import BasePin, InnerSettings, Recipe, TaskKind, TaskSettings
from weft.common.sequences import IGNORED, Row, Sequences, causal_sequences, classification_sequences

LABELLED = TaskSettings(kind=TaskKind.SEQUENCE_CLASSIFICATION, num_labels=3)
RECIPE = Recipe(
    run=run_id("tiny"),
    base=BasePin(digest=Digest("0" * 64)),
    inner=InnerSettings(batch_size=4, sequence_length=16),
)
MESSAGES = [
    {"role": "user", "content": "over?"},
    {"role": "assistant", "content": "under"},
    {"role": "user", "content": "again?"},
    {"role": "assistant", "content": "over"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def rows(*columns: dict[str, Any]) -> list[Row]:
    return [Row(row, f"row {number}") for number, row in enumerate(columns, start=1)]


def write_jsonl(path: Path, *columns: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in columns))
    return path


def learnt_text(sequences: Sequences, tokenizer: Any) -> str:
    return str(tokenizer.decode(sequences.labels[sequences.labels != IGNORED]))


# -- reading ---------------------------------------------------------------------------------------------------


def test_a_directory_of_texts_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, text in (
        ("b.txt", "second"),
        ("a.txt", "first"),
        ("deep/c.txt", "third"),
        ("d.md", "not this"),
    ):
        (tmp_path / name).write_text(text)
    assert [row.columns["text"] for row in read_rows(tmp_path)] == ["first", "second", "third"]


def test_a_mounted_volume_gives_each_file_once(tmp_path: Path) -> None:
    """As Kubernetes mounts them: links to files in a hidden directory."""
    (tmp_path / "..2026_11_21").mkdir()
    (tmp_path / "..2026_11_21" / "a.txt").write_text("first")
    (tmp_path / "a.txt").symlink_to(tmp_path / "..2026_11_21" / "a.txt")
    assert [row.columns["text"] for row in read_rows(tmp_path)] == ["first"]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    import datasets
    import pyarrow
    import pyarrow.parquet

    columns = [{"text": "one"}, {"text": "two"}]
    write_jsonl(tmp_path / "rows.jsonl", *columns)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns), tmp_path / "rows.parquet")
    saved = datasets.Dataset.from_list(columns)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "split"))
    for name in ("rows.jsonl", "rows.parquet", "one", "split"):
        assert [row.columns for row in read_rows(tmp_path / name)] == columns


def test_nested_messages_survive_parquet(tmp_path: Path, tokenizer: Any) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"messages": MESSAGES}])
    pyarrow.parquet.write_table(table, tmp_path / "chat.parquet")
    sequences = causal_sequences(read_rows(tmp_path / "chat.parquet"), tokenizer, sequence_length=8)
    assert "under" in learnt_text(sequences, tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "cause"),
    [
        ("bad.txt", b"caf\xe9", "bad.txt is not UTF-8 text"),
        ("bad.jsonl", b'{"text": "fine"}\n{"text": \n', "bad.jsonl line 2 is not JSON"),
        ("bad.jsonl", b"[1]\n", "bad.jsonl line 1 is not a JSON object"),
        ("bad.parquet", b"PAR1 not", "cannot read .*bad.parquet"),
        ("bad.csv", b"a,b", "bad.csv is of no known kind"),
    ],
    ids=["latin-1", "cut-line", "not-an-object", "not-parquet", "another-kind"],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: bytes, cause: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=cause):
        list(read_rows(tmp_path / name))


def test_a_missing_path_and_an_empty_directory_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no"):
        list(read_rows(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds none of"):
        list(read_rows(tmp_path))


# -- sequences -------------------------------------------------------------------------------------------------


def test_windows_do_not_overlap_and_labels_are_the_next_tokens(tokenizer: Any) -> None:
    sequences = causal_sequences(rows({"text": TEXT}, {"text": "over"}), tokenizer, sequence_length=16)
    end = tokenizer.eos_token_id
    stream = [*tokenizer(TEXT)["input_ids"], end, *tokenizer("over")["input_ids"], end]
    for number in range(len(sequences)):
        first = number * 16
        assert sequences.tokens[number].tolist() == stream[first : first + 16]
        assert sequences.labels[number].tolist() == stream[first + 1 : first + 17]
    assert len(sequences) == (len(stream) - 1) // 16
    assert sequences.num_tokens == len(stream)


def test_only_completions_are_learnt(tokenizer: Any) -> None:
    pairs = [{"prompt": "over and over", "completion": " under"}] * 20
    sequences = causal_sequences(rows(*pairs), tokenizer, sequence_length=8)
    assert set(learnt_text(sequences, tokenizer).split()) <= {"under<|endoftext|>", "under", "<|endoftext|>"}


def test_windows_without_anything_to_learn_are_left_out(tokenizer: Any) -> None:
    pair = {"prompt": TEXT, "completion": " under"}
    sequences = causal_sequences(rows(pair, pair), tokenizer, sequence_length=8)
    assert (sequences.labels != IGNORED).any(1).all()
    assert len(sequences) <= 4


def test_only_the_assistant_is_learnt(tokenizer: Any) -> None:
    sequences = causal_sequences(rows({"messages": MESSAGES}), tokenizer, sequence_length=4, heldout=True)
    expected = "under</assistant>over</assistant><|endoftext|>"
    assert learnt_text(sequences, tokenizer) == expected


@pytest.mark.parametrize(
    ("columns", "cause"),
    [
        ({"body": "x"}, "row 1 has the columns body"),
        ({}, "row 1 has the columns none"),
        ({"text": 3}, "text is 3"),
        ({"messages": "hello"}, "messages is not a list"),
        ({"messages": [{"role": "user"}]}, "needs the texts role and content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
    ],
)
def test_columns_that_are_not_understood_are_listed(
    tokenizer: Any, columns: dict[str, Any], cause: str
) -> None:
    with pytest.raises(DataError, match=cause):
        causal_sequences(rows(columns), tokenizer, sequence_length=8)


@pytest.mark.parametrize(
    ("template", "cause"),
    [
        ("", "no chat template"),
        ("{{ messages | length }}" + TEMPLATE, "rewrites earlier messages"),
        ("{{ messages.nothing.here }}", "template refuses it"),
    ],
    ids=["none", "not-a-prefix", "broken"],
)
def test_chat_needs_a_template_that_only_appends(template: str, cause: str) -> None:
    with pytest.raises(DataError, match=cause):
        causal_sequences(rows({"messages": MESSAGES}), tiny_tokenizer(template=template), sequence_length=8)


def test_heldout_windows_cover_every_token_and_byte(tokenizer: Any) -> None:
    text = "the warp — fäden 織物 🧵 and the weft"
    sequences = causal_sequences(rows({"text": text}), tokenizer, sequence_length=8, heldout=True)
    assert sequences.num_bytes.sum() == len(text.encode())
    assert learnt_text(sequences, tokenizer) == text + tokenizer.eos_token
    assert sequences.lengths[:-1].tolist() == [8] * (len(sequences) - 1)
    last = int(sequences.lengths[-1])
    assert (sequences.labels[-1, last:] == IGNORED).all()


def test_a_tokenizer_that_begins_texts_begins_documents(tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    beginning = tiny_tokenizer()
    beginning.add_special_tokens({"bos_token": "<s>"})
    begin = beginning.bos_token_id
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    sequences = causal_sequences(rows({"text": "over"}, {"text": "over"}), beginning, sequence_length=2)
    assert sequences.tokens[0, 0] == begin
    assert begin not in sequences.labels.tolist()[0]


def test_classification_pads_and_truncates(tokenizer: Any) -> None:
    sequences = classification_sequences(
        rows({"text": TEXT, "label": 2}, {"text": "over", "label": 0}, {"text": "", "label": 1}),
        tokenizer,
        sequence_length=8,
        num_labels=3,
    )
    assert sequences.labels.tolist() == [2, 0, 1]
    assert sequences.lengths[0] == 8
    assert sequences.lengths[2] == 1
    batch = sequences.select(np.array([1, 2]))
    assert batch.tokens.shape[1] == max(sequences.lengths[1:])
    assert batch.num_labels == 2


@pytest.mark.parametrize("label", [3, -1, "a", True, None, 1.5])
def test_labels_outside_the_range_are_refused(tokenizer: Any, label: object) -> None:
    with pytest.raises(DataError, match="the label is"):
        classification_sequences(
            rows({"text": "x", "label": label}), tokenizer, sequence_length=8, num_labels=3
        )


# -- order -----------------------------------------------------------------------------------------------------


def dataset(*, num_sequences: int = 10, worker: str = "w1", seed: int = 0) -> TokenDataset:
    tokens = np.arange(num_sequences * 4, dtype=np.int32).reshape(num_sequences, 4)
    sequences = Sequences(
        tokens=tokens,
        labels=tokens,
        lengths=np.full(num_sequences, 4, np.int32),
        num_bytes=np.zeros(num_sequences, np.int64),
        num_tokens=tokens.size,
    )
    return TokenDataset(sequences, seed=seed, worker=worker, batch_size=4)


def visited(data: TokenDataset, first: int, stop: int) -> list[int]:
    return [int(row[0]) // 4 for step in range(first, stop) for row in data.batch(step).tokens]


def test_an_epoch_visits_everything_once_and_the_next_in_another_order() -> None:
    order = visited(dataset(), 0, 5)
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]


def test_a_resumed_task_sees_the_batches_it_would_have_seen() -> None:
    whole = visited(dataset(), 0, 12)
    assert visited(dataset(), 7, 12) == whole[28:]


def test_workers_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(visited(dataset(worker=worker, seed=seed), 0, 5)) for worker in "ab" for seed in (0, 1)}
    assert len(orders) == 4


def test_the_order_is_pinned() -> None:
    assert visited(dataset(), 0, 2) == [1, 6, 0, 7, 8, 9, 4, 3]


# -- a run's data ----------------------------------------------------------------------------------------------


def test_load_reports_progress_and_gives_batches(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    seen: list[tuple[int, int]] = []
    data = load_dataset(
        tmp_path, tokenizer, RECIPE, worker="w1", on_tokenised=lambda *counts: seen.append(counts)
    )
    assert data.batch(0).tokens.shape == (4, 16)
    assert seen[-1][0] == 1
    assert seen[-1][1] > 64


def test_too_little_text_says_how_much_there_is_and_how_much_is_needed(
    tmp_path: Path, tokenizer: Any
) -> None:
    (tmp_path / "a.txt").write_text("over and under")
    num_tokens = len(tokenizer("over and under")["input_ids"]) + 1
    with pytest.raises(DataError, match=rf"has {num_tokens} tokens .* needs 65 tokens"):
        load_dataset(tmp_path, tokenizer, RECIPE, worker="w1")


def test_blank_files_are_no_data(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match="holds no text"):
        load_dataset(tmp_path, tokenizer, RECIPE, worker="w1")


def test_classification_data_of_a_run(tmp_path: Path, tokenizer: Any) -> None:
    recipe = replace(RECIPE, task=LABELLED)
    path = write_jsonl(tmp_path / "a.jsonl", *({"text": "over", "label": i % 3} for i in range(5)))
    assert load_dataset(path, tokenizer, recipe, worker="w1").batch(0).labels.shape == (4,)
    short = write_jsonl(tmp_path / "b.jsonl", {"text": "over", "label": 0})
    with pytest.raises(DataError, match="has 1 documents; one batch needs 4 documents"):
        load_dataset(short, tokenizer, recipe, worker="w1")
