"""A worker's own data: tokenised once, kept in memory, visited in an order that a restart does not change.

The order is a function of (seed, worker, step): epoch e visits the sequences in a permutation drawn from a
counter-based generator keyed by all three, so that step s always sees the same batch and a resumed task
continues where it stopped without anything being stored.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    Row,
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


def rows_of(batch: Batch, start: int, stop: int) -> Batch:
    """Sequences ``start`` to ``stop`` of a batch, cut to the longest of them; at least one."""
    lengths = batch.lengths[start:stop]
    longest = int(lengths.max())
    labels = batch.labels[start:stop]
    return Batch(
        tokens=batch.tokens[start:stop, :longest],
        labels=labels[:, :longest] if labels.ndim == 2 else labels,
        lengths=lengths,
    )


def load_dataset(
    path: Path, tokenizer: Tokenizer, recipe: Recipe, *, worker: str, on_tokenised: OnTokenised = nothing
) -> TokenDataset:
    """Read and tokenise the data at ``path`` for a run: ``sequences_of`` and ``dataset_of`` at once."""
    sequences = sequences_of(read_rows(path), tokenizer, recipe, on_tokenised=on_tokenised)
    return dataset_of(sequences, recipe, worker=worker, where=str(path))


def sequences_of(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    recipe: Recipe,
    *,
    heldout: bool = False,
    on_tokenised: OnTokenised = nothing,
) -> Sequences:
    """Tokenise documents as a run's task wants them, to learn from or, with ``heldout``, to evaluate on.

    Raises:
        DataError: Missing, unreadable or of unknown columns.
        BaseModelError: The base's tokenizer cannot be used for this.
    """
    length = recipe.inner.sequence_length
    if recipe.task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
        num_labels = recipe.task.num_labels
        return classification_sequences(
            rows, tokenizer, sequence_length=length, num_labels=num_labels, on_tokenised=on_tokenised
        )
    return causal_sequences(
        rows,
        tokenizer,
        sequence_length=length,
        prefix_tokens=recipe.task.prefix_tokens,
        heldout=heldout,
        on_tokenised=on_tokenised,
    )


def dataset_of(sequences: Sequences, recipe: Recipe, *, worker: str, where: str) -> TokenDataset:
    """Sequences in the order of ``worker``; raises DataError, naming ``where``, when they fill no batch."""
    if sequences.num_tokens == 0:
        raise DataError(f"{where} holds no text", hint="give data with text in it")
    if len(sequences) < recipe.inner.batch_size:
        raise _too_short(where, sequences, recipe)
    return TokenDataset(sequences, seed=recipe.inner.seed, worker=worker, batch_size=recipe.inner.batch_size)


def _too_short(where: str, sequences: Sequences, recipe: Recipe) -> DataError:
    size, length = recipe.inner.batch_size, recipe.inner.sequence_length
    if recipe.task.kind is TaskKind.CAUSAL_LM:
        found = f"{sequences.num_tokens} tokens ({len(sequences)} sequences to learn from)"
        needed = f"{size * length + 1} tokens: {size} sequences of {length}"
    else:
        found, needed = f"{len(sequences)} documents", f"{size} documents"
    return DataError(f"{where} has {found}; one batch needs {needed}", hint="give more data to --data")


def _permutation(key: str, length: int) -> IndexArray:
    philox = np.random.Philox(key=int.from_bytes(blake3(key.encode()).digest()[:16], "little"))
    # Sorting raw output, unlike Generator.permutation, gives the same order in every version of numpy.
    return np.argsort(philox.random_raw(length), kind="stable").astype(np.intp)
