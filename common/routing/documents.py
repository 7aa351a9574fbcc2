"""Documents to their paths, batch by batch: the same on the coordinator's side, on a worker and at inference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from weft.common.routing.router import Float32Array, Float64Array, Int64Array, Router, best_paths
from weft.common.sequences import Prefixes, Row, Tokenizer, read_prefixes

_BATCH_ROWS: Final = 128


class FeatureBase(Protocol):
    """What is asked of a resident base."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's tokenizer."""

    def features(self, tokens: Int64Array, lengths: Int64Array) -> Float32Array:
        """Mean last hidden state of the bare base over each row's tokens: [B, n], [B] → [B, d]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedDocument:
    """A document and where it belongs."""

    row: Row
    """The document."""
    routes: tuple[int, ...]
    """Indices of its paths in ``Router.paths``, best first."""
    scores: Float64Array
    """[P] score of every path."""


def prefix_features(
    rows: Iterable[Row], base: FeatureBase, num_tokens: int
) -> Iterator[tuple[Prefixes, Float32Array]]:
    """Features of documents, a batch at a time: the rows with their first tokens, and [B, d].

    Raises:
        DataError, BaseModelError: As ``weft.common.sequences.read_prefixes``.
        OutOfMemory: The base's device is too small.
    """
    for prefixes in read_prefixes(rows, base.tokenizer, num_tokens, batch_rows=_BATCH_ROWS):
        yield prefixes, base.features(prefixes.tokens, prefixes.lengths)


def route_documents(
    rows: Iterable[Row], base: FeatureBase, router: Router, *, top_n: int = 1
) -> Iterator[RoutedDocument]:
    """Send each document to its ``top_n`` best paths, holding one batch in memory; errors of prefix_features."""
    for prefixes, features in prefix_features(rows, base, router.num_prefix_tokens):
        scores = router.scores(features)
        routes = best_paths(scores, top_n)
        for index, row in enumerate(prefixes.rows):
            yield RoutedDocument(row=row, routes=tuple(routes[index].tolist()), scores=scores[index])
