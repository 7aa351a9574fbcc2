"""A worker's own data: tokenised once, kept in memory, visited in an order that a restart does not change.

The order is a function of (seed, worker, step): epoch e visits the sequences in a permutation drawn from a
counter-based generator keyed by all three, so that step s always sees the same batch and a resumed task
continues where it stopped without anything being stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from weft.common.documents import read_rows
from weft.common.errors import DataError
from weft.common.recipe import Recipe, TaskKind
from weft.common.sequences import (
    Batch,
    OnTokenised,
    Sequences,
    Tokenizer,
    causal_sequences,
    classification_sequences,
    nothing,
)

IndexArray = npt.NDArray[np.intp]
_ORDER: Final = "weft data order 1"


class TokenDataset:
    """Sequences with an order.

    Args:
        sequences: At least ``batch_size`` of them.
        seed: The recipe's.
        worker: Name of the worker, so that workers with equal data visit it in different orders.
        batch_size: Sequences of a step.
    """

    def __init__(self, sequences: Sequences, *, seed: int, worker: str, batch_size: int) -> None:
        if len(sequences) < batch_size:
            raise ValueError(f"{len(sequences)} sequences do not fill a batch of {batch_size}")
        self.sequences = sequences
        self.batch_size = batch_size
        self._key = f"{_ORDER}\n{seed}\n{worker}"
        self._epoch = -1
        self._order: IndexArray = np.zeros(0, np.intp)

    def __len__(self) -> int:
        return len(self.sequences)

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from the worker's first of the run."""
        first = step * self.batch_size
        return self.sequences.select(
            np.array([self._index(position) for position in range(first, first + self.batch_size)], np.intp)
        )

    def example(self, position: int) -> Batch:
        """One sequence, by its position in the order."""
        return self.sequences.select(np.array([self._index(position)], np.intp))

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.sequences))
        if epoch != self._epoch:
            self._order = _permutation(f"{self._key}\n{epoch}", len(self.sequences))
            self._epoch = epoch
        return int(self._order[offset])


def load_dataset(
    path: Path, tokenizer: Tokenizer, recipe: Recipe, *, worker: str, on_tokenised: OnTokenised = nothing
) -> TokenDataset:
    """Read and tokenise the data at ``path`` for a run.

    Raises:
        DataError: Missing, empty, unreadable, of unknown columns, or too short for one batch.
        BaseModelError: The base's tokenizer cannot be used for this.
    """
    inner = recipe.inner
    rows = read_rows(path)
    if recipe.task.kind is TaskKind.CAUSAL_LM:
        length = inner.sequence_length
        sequences = causal_sequences(rows, tokenizer, sequence_length=length, on_tokenised=on_tokenised)
    else:
        sequences = classification_sequences(
            rows,
            tokenizer,
            sequence_length=inner.sequence_length,
            num_labels=recipe.task.num_labels,
            on_tokenised=on_tokenised,
        )
    if sequences.num_tokens == 0:
        raise DataError(f"{path} holds no text", hint="give data with text in it")
    if len(sequences) < inner.batch_size:
        raise _too_short(path, sequences, recipe)
    return TokenDataset(sequences, seed=inner.seed, worker=worker, batch_size=inner.batch_size)


def _too_short(path: Path, sequences: Sequences, recipe: Recipe) -> DataError:
    size, length = recipe.inner.batch_size, recipe.inner.sequence_length
    if recipe.task.kind is TaskKind.CAUSAL_LM:
        found = f"{sequences.num_tokens} tokens ({len(sequences)} sequences to learn from)"
        needed = f"{size * length + 1} tokens: {size} sequences of {length}"
    else:
        found, needed = f"{len(sequences)} documents", f"{size} documents"
    return DataError(f"{path} has {found}; one batch needs {needed}", hint="give more data to --data")


def _permutation(key: str, length: int) -> IndexArray:
    philox = np.random.Philox(key=int.from_bytes(blake3(key.encode()).digest()[:16], "little"))
    # Sorting raw output, unlike Generator.permutation, gives the same order in every version of numpy.
    return np.argsort(philox.random_raw(length), kind="stable").astype(np.intp)
