"""Which client of a simulation has which data: a file or folder each, or documents dealt out.

Dealt ``iid``, every client has as many documents as the others, chosen at random. Dealt ``dirichlet:A``, the documents
of each label are shared in proportions drawn from a symmetric Dirichlet distribution (Hsu, Qi & Brown 2019, section 3):
A of 100 is nearly even, A of 0.1 leaves most of a label with a few clients. Documents without labels have one in
common, so that it is the clients' sizes that differ.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from weft.common.documents import READERS, read_rows
from weft.common.errors import DataError, UsageError
from weft.common.identity.files import private_directory
from weft.common.sequences import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """How documents are dealt out."""

    alpha: float | None = None
    """Of the Dirichlet distribution; None deals evenly."""

    @classmethod
    def parse(cls, text: str) -> Split:
        """``iid`` or ``dirichlet:0.5``; raises UsageError."""
        name, _, number = text.partition(":")
        if text == "iid":
            return cls()
        try:
            alpha = float(number)
        except ValueError:
            alpha = 0.0
        if name != "dirichlet" or not 0 < alpha <= 1e6:
            raise UsageError(f"--split {text!r} is unknown", hint="--split iid, or --split dirichlet:0.5")
        return cls(alpha=alpha)


def client_data(data: Path, to: Path, *, num_clients: int, split: Split | None, seed: int) -> list[Path]:
    """Where each client's data lies.

    Args:
        data: A directory with a file or folder a client, in turn where there are fewer; or what is to be dealt out.
        to: Made and filled where documents are dealt out.
        num_clients: How many there are.
        split: How to deal; None takes a directory's entries as they are and deals a file evenly.
        seed: Of the choice.

    Raises:
        DataError: It cannot be read, or is too little.
    """
    if split is None and data.is_dir():
        entries = sorted(path for path in data.iterdir() if path.is_dir() or path.suffix in READERS)
        if not entries:
            raise DataError(f"{data} is empty", hint="put a file or folder for each client into it")
        return [entries[client % len(entries)].absolute() for client in range(num_clients)]
    rows = _documents(data)
    parts = deal([row.columns.get("label") for row in rows], num_clients, split or Split(), seed=seed)
    private_directory(to)
    return [_write(to / f"{client:05}.jsonl", [rows[i] for i in part]) for client, part in enumerate(parts)]


def deal(labels: Sequence[object], num_clients: int, split: Split, *, seed: int) -> list[list[int]]:
    """Indexes of the documents of each client, ascending; every client has at least one.

    Raises:
        DataError: There are fewer documents than clients.
    """
    if len(labels) < num_clients:
        raise DataError(f"{len(labels)} documents are too few for {num_clients} clients")
    rng = np.random.default_rng(seed)
    by_label: dict[str, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        by_label["" if split.alpha is None else json.dumps(label, default=str)].append(index)
    parts: list[list[int]] = [[] for _ in range(num_clients)]
    for _, indexes in sorted(by_label.items()):
        shuffled = rng.permutation(np.asarray(indexes))
        if split.alpha is None:
            pieces = np.array_split(shuffled, num_clients)
        else:
            shares = rng.dirichlet(np.full(num_clients, split.alpha))
            pieces = np.split(shuffled, np.round(np.cumsum(shares)[:-1] * len(shuffled)).astype(int))
        for part, piece in zip(parts, pieces, strict=True):
            part.extend(piece.tolist())
    for part in parts:
        if not part:
            part.append(max(parts, key=len).pop())
    return [sorted(part) for part in parts]


def _documents(data: Path) -> list[Row]:
    """All documents; of a single text, each line that says something."""
    rows = list(read_rows(data))
    if data.suffix == ".txt":
        lines = str(rows[0].columns["text"]).splitlines(keepends=True)
        return [Row({"text": line}, where=rows[0].where) for line in lines if line.strip()]
    return rows


def _write(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(dict(row.columns), default=str) + "\n")
    return path.absolute()
