"""What a grid comes to on documents, each judged along its own path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from weft.common.errors import DataError
from weft.common.ids import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PathScore:
    """What one path came to on the labels that were routed to it."""

    path: Path
    num_documents: int
    """Documents of which it predicted something."""
    num_labels: int
    loss: float
    """Mean nats per label."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """How well a grid predicts documents, each along its own path."""

    loss: float
    """Mean nats per label."""
    bits_per_byte: float
    """Of the text that the labels cover."""
    num_documents: int
    """With at least one label."""
    num_labels: int
    num_bytes: int
    every: int | None
    """Tokens between choices of a path; None: one a document."""
    paths: tuple[PathScore, ...]
    """Those that were used, in the topology's order."""

    @property
    def perplexity(self) -> float:
        """The exponential of the loss."""
        return math.exp(self.loss)


class Tally:
    """Sums over all documents; ``num_paths`` is P."""

    def __init__(self, num_paths: int) -> None:
        self._losses = np.zeros(num_paths)
        self._labels = np.zeros(num_paths, np.int64)
        self._documents = np.zeros(num_paths, np.int64)
        self.num_documents = 0
        self.num_bytes = 0

    def add(self, path: int, loss: float, num_labels: int, num_documents: int) -> None:
        """What a path came to on some documents: the sum of the losses of its labels there."""
        self._losses[path] += loss
        self._labels[path] += num_labels
        self._documents[path] += num_documents

    def result(self, paths: Sequence[Path], every: int | None, prefix_tokens: int) -> Perplexity:
        """The means; raises DataError when there was nothing to judge."""
        if not self.num_documents:
            raise too_short(prefix_tokens)
        return Perplexity(
            loss=float(self._losses.sum() / self._labels.sum()),
            bits_per_byte=float(self._losses.sum() / math.log(2) / max(1, self.num_bytes)),
            num_documents=self.num_documents,
            num_labels=int(self._labels.sum()),
            num_bytes=self.num_bytes,
            every=every,
            paths=tuple(
                PathScore(
                    path=paths[index],
                    num_documents=int(self._documents[index]),
                    num_labels=int(self._labels[index]),
                    loss=float(self._losses[index] / self._labels[index]),
                )
                for index in np.flatnonzero(self._labels).tolist()
            ),
        )


def too_short(prefix_tokens: int) -> DataError:
    """The error for documents that end within their prefix."""
    return DataError(
        f"no document is longer than the {prefix_tokens} tokens that choose its path",
        hint="give longer documents: a line of .jsonl, or a .txt file, is one",
    )
