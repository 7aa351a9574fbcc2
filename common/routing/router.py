"""A router: from the features of a document's first tokens to a score for every path.

All routers that are fitted are linear. The nearest of the centres c_p (k-means) has the least |z − c_p|², which is
|z|² − 2 c_p·z + |c_p|², and |z|² is common to all paths; product k-means adds such terms over the parts of z; logistic
regression is linear by itself. So one form serves all: score_p(x) = w_p·(x − centre) + b_p, and the best score wins.

Shapes: N documents, P paths, d features.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from weft.common.ids import Digest, Path

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

NUM_PREFIX_TOKENS: Final = 32
"""DiPaCo's (arXiv 2403.10616, section 2.4)."""
FEATURE: Final = "mean-last-hidden"
"""Mean over the first tokens of the last hidden state of the bare base: the only feature there is."""
_SCORED_ROWS: Final = 4096
_NOISE: Final = b"weft random router 1\n"


class RouterKind(enum.StrEnum):
    """How a router came to be."""

    KMEANS = "kmeans"
    PRODUCT = "product"
    LINEAR = "linear"
    RANDOM = "random"


@dataclass(frozen=True, kw_only=True, eq=False)
class Router:
    """Weights that send documents to paths; documents are seen through the base that they were fitted with."""

    kind: RouterKind
    """kmeans, product, linear (discriminative), or random: the control that no structure survives."""
    paths: tuple[Path, ...]
    """The paths of the topology, in its order; P."""
    base_digest: Digest
    """Of the base whose hidden states are the features."""
    centre: Float32Array
    """[d] mean of the features."""
    weights: Float64Array
    """[P, d]; in float64, since a path that was split differs little from its other half."""
    bias: Float64Array
    """[P]."""
    num_prefix_tokens: int = NUM_PREFIX_TOKENS
    """How many of a document's first tokens are looked at."""
    seed: int = 0
    """Of the random kind."""

    def scores(self, features: Float32Array) -> Float64Array:
        """Score of every path for every document: [N, d] → [N, P]; the best path has the highest.

        Computed in float64. Raises ValueError for features of another width.
        """
        if features.ndim != 2 or features.shape[1] != len(self.centre):
            raise ValueError(f"features have shape {features.shape}, not [N, {len(self.centre)}]")
        if self.kind is RouterKind.RANDOM:
            return _noise(features, num_paths=len(self.paths), seed=self.seed)
        scores = np.empty((len(features), len(self.paths)))
        for start in range(0, len(features), _SCORED_ROWS):
            rows = slice(start, start + _SCORED_ROWS)
            scores[rows] = (features[rows].astype(np.float64) - self.centre) @ self.weights.T + self.bias
        return scores

    def route(self, features: Float32Array, top_n: int = 1) -> Int64Array:
        """Indices in ``paths`` of each document's ``top_n`` best paths, best first: [N, top_n].

        Raises:
            ValueError: More paths are asked for than there are.
        """
        return best_paths(self.scores(features), top_n)

    @cached_property
    def digest(self) -> Digest:
        """BLAKE3 of its file."""
        from weft.common.routing.file import router_bytes

        return Digest(blake3(router_bytes(self)).hexdigest())


def best_paths(scores: Float64Array, top_n: int) -> Int64Array:
    """Indices of the ``top_n`` highest scores of each row, highest first; of equals the first path: [N, top_n]."""
    if not 1 <= top_n <= scores.shape[1]:
        raise ValueError(f"the best {top_n} of {scores.shape[1]} paths are asked for")
    return np.argsort(-scores, axis=1, kind="stable")[:, :top_n].astype(np.int64)


def traffic(routes: Int64Array, paths: Sequence[Path]) -> dict[Path, int]:
    """How many documents each path gets; a document with several paths counts for each."""
    counts = np.bincount(routes.reshape(-1), minlength=len(paths))
    return {path: int(count) for path, count in zip(paths, counts, strict=True)}


def empty_paths(counts: dict[Path, int]) -> tuple[Path, ...]:
    """Paths that get nothing: their experts would never learn."""
    return tuple(path for path, count in counts.items() if count == 0)


def _noise(features: Float32Array, *, num_paths: int, seed: int) -> Float64Array:
    """Uniform numbers that follow from the features, rounded so that the last bits of arithmetic do not matter."""
    rounded = np.round(features.astype(np.float64), 2) + 0.0  # without minus zero
    key = _NOISE + seed.to_bytes(8, "little")
    rows = [_uniform(key + row.tobytes(), num_paths) for row in rounded]
    return np.array(rows).reshape(len(features), num_paths)


def _uniform(data: bytes, size: int) -> Float64Array:
    words = np.frombuffer(blake3(data).digest(length=8 * size), "<u8")
    uniform: Float64Array = (words >> np.uint64(11)).astype(np.float64) / 2**53
    return uniform
