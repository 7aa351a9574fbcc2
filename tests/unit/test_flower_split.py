"""Which client of a simulation has which data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.common.errors import DataError, UsageError
from weft.server.flower.split import Split, client_data, deal


@given(
    num_clients=st.integers(1, 12),
    extra=st.integers(0, 60),
    alpha=st.one_of(st.none(), st.floats(0.05, 100)),
    seed=st.integers(0, 99),
)
def test_every_document_goes_to_one_client_and_none_stays_empty(
    num_clients: int, extra: int, alpha: float | None, seed: int
) -> None:
    labels = [i % 3 for i in range(num_clients + extra)]
    parts = deal(labels, num_clients, Split(alpha=alpha), seed=seed)
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    assert all(parts)
    assert parts == deal(labels, num_clients, Split(alpha=alpha), seed=seed)


def test_even_means_even_and_a_small_alpha_does_not() -> None:
    labels = [0] * 1000
    even = [len(part) for part in deal(labels, 10, Split(), seed=1)]
    uneven = [len(part) for part in deal(labels, 10, Split(alpha=0.1), seed=1)]
    assert set(even) == {100}
    assert max(uneven) > 300


def test_a_label_stays_with_few_clients() -> None:
    labels = [i % 4 for i in range(400)]
    parts = deal(labels, 8, Split(alpha=0.05), seed=3)
    shares = [max(sum(labels[i] == label for i in part) for label in range(4)) / len(part) for part in parts]
    assert sum(shares) / len(shares) > 0.7


def test_fewer_documents_than_clients_are_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        deal([0, 0], 3, Split(), seed=0)


@pytest.mark.parametrize(
    "text", ["", "dirichlet", "dirichlet:0", "dirichlet:-1", "dirichlet:x", "iid:2", "even"]
)
def test_unknown_splits_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--split"):
        Split.parse(text)


def test_splits_are_read() -> None:
    assert Split.parse("iid") == Split()
    assert Split.parse("dirichlet:0.5") == Split(alpha=0.5)


def test_a_directory_has_an_entry_a_client(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "notes.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "folder").mkdir()
    found = client_data(tmp_path, tmp_path / "to", num_clients=4, split=None, seed=0)
    assert [path.name for path in found] == ["a.jsonl", "b.txt", "folder", "a.jsonl"]
    assert not (tmp_path / "to").exists()


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="empty"):
        client_data(tmp_path, tmp_path / "to", num_clients=1, split=None, seed=0)


def test_a_text_is_dealt_line_by_line(tmp_path: Path) -> None:
    source = tmp_path / "all.txt"
    source.write_text("one\n\ntwo\nthree\n")
    found = client_data(source, tmp_path / "to", num_clients=3, split=None, seed=0)
    texts = [json.loads(line)["text"] for path in found for line in path.read_text().splitlines()]
    assert sorted(texts) == ["one\n", "three\n", "two\n"]
