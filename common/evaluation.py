"""How good a composed model is on held-out text, and whether a change made a difference.

Loss is the mean negative log-likelihood of the labels in nats. Two evaluations of the same sequences are compared
sequence by sequence: what makes a text hard is the same on both sides and cancels, so that small differences
show. Shapes: N sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path as FilePath
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from weft.common.composition import Composed, ResidentBase, memory_errors
from weft.common.documents import read_rows
from weft.common.errors import DataError
from weft.common.ids import Path
from weft.common.recipe import Recipe, TaskKind
from weft.common.routing import Router, route_documents
from weft.common.sequences import (
    IGNORED,
    Row,
    Sequences,
    Tokenizer,
    causal_sequences,
    classification_sequences,
)

Float64Array = npt.NDArray[np.float64]
_BATCH_SIZE: Final = 8
_Z_95: Final = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Losses of one model on held-out sequences."""

    losses: Float64Array
    """[N] nats, summed over the labels of each sequence."""
    num_labels: npt.NDArray[np.int64]
    """[N] labels of each sequence."""
    num_bytes: int
    """UTF-8 bytes of the text that the labels cover; 0 for classification."""

    @property
    def loss(self) -> float:
        """Mean nats per label."""
        return float(self.losses.sum() / self.num_labels.sum())

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs per byte of text, comparable between tokenizers; None for classification."""
        return float(self.losses.sum() / math.log(2) / self.num_bytes) if self.num_bytes else None


def load_heldout(path: FilePath, tokenizer: Tokenizer, recipe: Recipe) -> Sequences:
    """Read and tokenise held-out data: windows of the recipe's sequence length that do not overlap.

    What ``task.prefix_tokens`` leaves out of training is left out here too.

    Raises:
        DataError: Missing, unreadable, or fewer than two sequences, from which no interval follows.
    """
    length = recipe.inner.sequence_length
    sequences = heldout_sequences(read_rows(path), tokenizer, recipe)
    if len(sequences) < 2:
        raise DataError(
            f"{path} gives {len(sequences)} held-out sequences and at least 2 are needed",
            hint=f"give more text: {sequences.num_tokens} tokens are there, a sequence has {length}",
        )
    return sequences


def heldout_sequences(rows: Iterable[Row], tokenizer: Tokenizer, recipe: Recipe) -> Sequences:
    """Tokenise held-out documents, however few."""
    length = recipe.inner.sequence_length
    if recipe.task.kind is TaskKind.SEQUENCE_CLASSIFICATION:
        num_labels = recipe.task.num_labels
        return classification_sequences(rows, tokenizer, sequence_length=length, num_labels=num_labels)
    prefix_tokens = recipe.task.prefix_tokens
    return causal_sequences(
        rows, tokenizer, sequence_length=length, prefix_tokens=prefix_tokens, heldout=True
    )


def route_heldout(
    path: FilePath, base: ResidentBase, router: Router, recipe: Recipe
) -> dict[Path, Sequences]:
    """Held-out data by the path that each document belongs to; paths with fewer than two sequences are left out.

    Raises:
        DataError: Missing or unreadable.
    """
    rows: dict[Path, list[Row]] = {}
    for document in route_documents(read_rows(path), base, router):
        rows.setdefault(router.paths[document.routes[0]], []).append(document.row)
    found = {key: heldout_sequences(of_path, base.tokenizer, recipe) for key, of_path in rows.items()}
    return {key: sequences for key, sequences in found.items() if len(sequences) >= 2}


def evaluate(
    composed: Composed,
    sequences: Sequences,
    *,
    batch_size: int = _BATCH_SIZE,
    on_progress: Callable[[int, int], None] = lambda num_done, num_total: None,
) -> Evaluation:
    """Compute the loss of every sequence.

    Raises:
        OutOfMemory: Use a smaller ``batch_size``.
    """
    losses = []
    with torch.inference_mode(), memory_errors("evaluating"):
        for start in range(0, len(sequences), batch_size):
            stop = min(start + batch_size, len(sequences))
            losses.append(composed.losses(sequences.select(np.arange(start, stop))).double().cpu().numpy())
            on_progress(stop, len(sequences))
    labels = sequences.labels.reshape(len(sequences), -1)
    return Evaluation(
        losses=np.concatenate(losses),
        num_labels=(labels != IGNORED).sum(1),
        num_bytes=int(sequences.num_bytes.sum()),
    )


def together(evaluations: Iterable[Evaluation]) -> Evaluation:
    """Evaluations of different sequences as one."""
    parts = tuple(evaluations)
    return Evaluation(
        losses=np.concatenate([part.losses for part in parts]),
        num_labels=np.concatenate([part.num_labels for part in parts]),
        num_bytes=sum(part.num_bytes for part in parts),
    )


def paired_difference(before: Evaluation, after: Evaluation) -> tuple[float, float]:
    """Difference of the mean losses, after − before, and the half-width of its 95 % confidence interval.

    The mean is over labels and the sampling unit is the sequence, so the difference is a ratio estimator
    d = Σδ / Σm over sequences with loss differences δ and m labels. Its variance, linearised (Cochran, Sampling
    Techniques, section 6.4), is n/(n−1) · Σ(δ − d·m)² / (Σm)²; the interval is the normal one.

    Raises:
        ValueError: Not the same sequences, or fewer than two.
    """
    if not np.array_equal(before.num_labels, after.num_labels):
        raise ValueError("the two evaluations are not of the same sequences")
    num_sequences = len(before.losses)
    if num_sequences < 2:
        raise ValueError("one sequence gives no interval")
    differences = after.losses - before.losses
    num_labels = before.num_labels.sum()
    mean = differences.sum() / num_labels
    residuals = differences - mean * before.num_labels
    variance = num_sequences / (num_sequences - 1) * (residuals**2).sum() / num_labels**2
    return float(mean), float(_Z_95 * math.sqrt(variance))
