"""Fitting routers: clusters of documents, then the paths that predict them best.

k-means on the features and product k-means are DiPaCo's first routers (arXiv 2403.10616, section 2.4.1 and 7.3); the
discriminative router follows once there are paths to ask (section 2.4.2). Everything is on the host, in numpy and
scikit-learn, which is imported only here and only when it is used.

Shapes: N documents, P paths, d features, K experts of a level, m kept components.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from weft.common.errors import DataError
from weft.common.ids import Digest, Path
from weft.common.modules import Topology
from weft.common.routing.router import (
    NUM_PREFIX_TOKENS,
    Float32Array,
    Float64Array,
    Int64Array,
    Router,
    RouterKind,
    empty_paths,
    traffic,
)

_NUM_STARTS: Final = 5
"""k-means is run from so many starts, and the best kept."""
_COMPONENTS_PER_EXPERT: Final = 2
"""K centres span K − 1 dimensions; twice as many leave room for the rotation not being the true one."""
_PENALTY: Final = 1.0
"""scikit-learn's C: 1 / (variance of the weights' prior)."""
_STEPS: Final = 500
_CALIBRATION_STEPS: Final = 60
"""At each temperature; more move no more than one document in a thousand."""
_TEMPERATURES: Final = (0.1, 0.01, 0.001)
"""Of the calibration, as a share of the scores' spread."""
_NUM_HALVINGS: Final = 40


# -- clusters ------------------------------------------------------------------------------------------------


def fit_kmeans(
    features: Float32Array,
    *,
    paths: Sequence[Path],
    base_digest: Digest,
    seed: int,
    num_prefix_tokens: int = NUM_PREFIX_TOKENS,
) -> Router:
    """One centre for each path: documents go to the nearest, by Euclidean distance of the features as they are.

    Args:
        features: [N, d].
        paths: Of the topology, in its order; which cluster becomes which path means nothing.
        base_digest: Of the base that made the features.
        seed: Of the starts.
        num_prefix_tokens: That the features were taken over.

    Raises:
        DataError: Fewer documents than paths, or features that are not finite.
    """
    _check_enough(features, len(paths))
    centre = features.mean(0)
    centres = _kmeans(features - centre, len(paths), seed)
    return Router(
        kind=RouterKind.KMEANS,
        paths=tuple(paths),
        base_digest=base_digest,
        num_prefix_tokens=num_prefix_tokens,
        centre=centre,
        weights=2 * centres,
        bias=-(centres**2).sum(1),
    )


def fit_product(
    features: Float32Array,
    *,
    topology: Topology,
    base_digest: Digest,
    seed: int,
    num_prefix_tokens: int = NUM_PREFIX_TOKENS,
) -> Router:
    """k-means in each shared level by itself, on a part of the features of its own: a path is one centre a level.

    The paper cuts the feature vector into pieces. Here the principal components are scaled to variance 1 and dealt
    out to the levels in turn, Σ 2(K − 1) of them, since halves of the raw vector see the same thing twice: on
    sixteen domains made of 4 × 4 factors the cells agreed with the domains in 64 % of documents, and those of
    halves in 27 %. Path-specific levels have no part in it: their expert follows from the others.

    Args and errors are those of :func:`fit_kmeans`.
    """
    counts = [count for count in topology.experts if count]
    _check_enough(features, len(topology.paths))
    centre = features.mean(0)
    whitening = _whitening(features - centre, sum(_COMPONENTS_PER_EXPERT * (count - 1) for count in counts))
    weights = np.zeros((len(topology.paths), features.shape[1]))
    bias = np.zeros(len(topology.paths))
    shared = [level for level, count in enumerate(topology.experts) if count]
    for turn, (level, count) in enumerate(zip(shared, counts, strict=True)):
        part = whitening[:, turn :: len(counts)]
        if count == 1 or not part.shape[1]:
            continue
        centres = _kmeans((features - centre) @ part.astype(np.float32), count, seed + turn)
        chosen = np.array([path.experts[level] for path in topology.paths])
        weights += (2 * centres @ part.T)[chosen]
        bias -= (centres**2).sum(1)[chosen]
    return Router(
        kind=RouterKind.PRODUCT,
        paths=topology.paths,
        base_digest=base_digest,
        num_prefix_tokens=num_prefix_tokens,
        centre=centre,
        weights=weights,
        bias=bias,
    )


def random_router(
    *,
    paths: Sequence[Path],
    base_digest: Digest,
    width: int,
    seed: int,
    num_prefix_tokens: int = NUM_PREFIX_TOKENS,
) -> Router:
    """The control: every document has a path, the same each time, and nothing decides which. ``width`` is d."""
    return Router(
        kind=RouterKind.RANDOM,
        paths=tuple(paths),
        base_digest=base_digest,
        num_prefix_tokens=num_prefix_tokens,
        seed=seed,
        centre=np.zeros(width, np.float32),
        weights=np.zeros((len(paths), width)),
        bias=np.zeros(len(paths)),
    )


def _check_enough(features: Float32Array, num_paths: int) -> None:
    if len(features) < num_paths:
        raise DataError(
            f"a router for {num_paths} paths was to be fitted to {len(features)} documents",
            hint="give more documents, or fewer experts",
        )
    if not np.isfinite(features).all():
        raise DataError("the base's hidden states are not finite", hint="load the base in another dtype")


def _kmeans(points: Float32Array, num_clusters: int, seed: int) -> Float64Array:
    """Centres [K, d], in lexical order of their coordinates, so that numbering does not depend on the starts."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Fewer distinct documents than clusters: the paths left over show up as empty.
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = KMeans(num_clusters, n_init=_NUM_STARTS, random_state=seed % 2**32).fit(points)
    centres: Float64Array = found.cluster_centers_.astype(np.float64)
    ordered: Float64Array = centres[np.lexsort(centres.T[::-1])]
    return ordered


def _whitening(centred: Float32Array, num_components: int) -> Float64Array:
    """[d, m] projection onto the first principal components, each scaled to variance 1."""
    covariance = centred.T.astype(np.float64) @ centred / len(centred)
    values, vectors = np.linalg.eigh(covariance)
    largest = np.argsort(values)[::-1][:num_components]
    largest = largest[values[largest] > values.max() * 1e-9]
    projection: Float64Array = vectors[:, largest] / np.sqrt(values[largest])
    # An eigenvector's sign is arbitrary; fixed, so that every machine numbers the centres in the same way.
    signs = np.sign(projection[np.abs(projection).argmax(0), np.arange(projection.shape[1])])
    signed: Float64Array = projection * signs
    return signed


# -- by the paths themselves ---------------------------------------------------------------------------------


def fit_discriminative(features: Float32Array, path_losses: Float64Array, *, like: Router) -> Router:
    """Learn to name the path that predicts a document best, from its first tokens alone.

    Each document's label is the path under which it is likeliest (lowest summed loss; of equals the first). A
    multinomial logistic regression predicts it, and then a bias makes the predicted paths as frequent as the labels:
    without it, paths that are rarely best are predicted still more rarely and starve.

    Args:
        features: [N, d] of documents that no path was trained on.
        path_losses: [N, P] nats of each document under each path.
        like: The router that the paths were trained with: base, paths and prefix are its.

    Raises:
        DataError: No documents, or losses that are not finite.
        ValueError: Shapes that do not fit.
    """
    num_paths = len(like.paths)
    if path_losses.shape != (len(features), num_paths):
        raise ValueError(f"losses have shape {path_losses.shape}, not {(len(features), num_paths)}")
    if not len(features):
        raise DataError("there are no documents to fit the router to", hint="reserve more: --share")
    if not (np.isfinite(features).all() and np.isfinite(path_losses).all()):
        raise DataError("features or losses are not finite", hint="leave out paths that diverged")
    labels = path_losses.argmin(1)
    centre = features.mean(0)
    weights, bias = _logistic(features - centre, labels, num_paths)
    scores = (features - centre).astype(np.float64) @ weights.T + bias
    histogram = np.bincount(labels, minlength=num_paths) / len(labels)
    return Router(
        kind=RouterKind.LINEAR,
        paths=like.paths,
        base_digest=like.base_digest,
        num_prefix_tokens=like.num_prefix_tokens,
        centre=centre,
        weights=weights,
        bias=bias + calibrate(scores, histogram),
    )


def calibrate(scores: Float64Array, histogram: Float64Array) -> Float64Array:
    """The bias [P] under which the best path of each document is distributed as ``histogram``.

    It is the price of each path in the cheapest assignment of documents to paths of these sizes: the minimum of
    mean_n max_p (score_np + b_p) − Σ_p h_p b_p, which is convex and whose gradient is the predicted histogram
    less the wanted one. The maximum is softened by a temperature that falls (entropic transport, Sinkhorn's).
    A path that is to get nothing is put below all others on every document.

    Args:
        scores: [N, P].
        histogram: [P] shares that sum to 1.
    """
    from scipy.optimize import minimize

    wanted = histogram > 0
    present, shares = scores[:, wanted], histogram[wanted]
    spread = float((present.max(1) - present.mean(1)).mean()) or 1.0
    prices = np.zeros(present.shape[1])
    for temperature in _TEMPERATURES:
        prices = minimize(
            _softened,
            prices,
            args=(present, shares, temperature * spread),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": _CALIBRATION_STEPS},
        ).x
    bias = np.zeros(len(histogram))
    bias[wanted] = prices - prices.mean()
    best = (present + bias[wanted]).max(1)
    bias[~wanted] = (best[:, None] - scores[:, ~wanted]).min(0) - spread
    return bias


def _softened(
    prices: Float64Array, scores: Float64Array, shares: Float64Array, temperature: float
) -> tuple[float, Float64Array]:
    scaled = (scores + prices) / temperature
    top = scaled.max(1, keepdims=True)
    exponentials = np.exp(scaled - top)
    sums = exponentials.sum(1, keepdims=True)
    value = temperature * float((top + np.log(sums)).mean()) - float(shares @ prices)
    return value, (exponentials / sums).mean(0) - shares


def _logistic(centred: Float32Array, labels: Int64Array, num_paths: int) -> tuple[Float64Array, Float64Array]:
    """Weights [P, d] and bias [P] of a logistic regression on features of variance 1; zero for absent labels."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    weights, bias = np.zeros((num_paths, centred.shape[1])), np.zeros(num_paths)
    classes = np.unique(labels)
    if len(classes) == 1:
        return weights, bias
    deviations = centred.std(0).astype(np.float64)
    scale = np.where(deviations > 0, deviations, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found: Any = LogisticRegression(C=_PENALTY, max_iter=_STEPS).fit(centred / scale, labels)
    coefficients, intercepts = found.coef_, found.intercept_
    if len(classes) == 2:  # one row for both: the second class against the first
        coefficients, intercepts = (
            np.vstack([-coefficients, coefficients]) / 2,
            np.array([-1, 1]) * intercepts / 2,
        )
    weights[classes] = coefficients / scale
    bias[classes] = intercepts
    return weights, bias


# -- paths that get nothing ----------------------------------------------------------------------------------


def reseed(router: Router, features: Float32Array, *, seed: int) -> Router:
    """Give each path without traffic half of the busiest path's documents; all others keep theirs.

    The busiest path's documents are cut in two (k-means), and both paths get its score, told apart by a
    difference that is made smaller until none of the documents moves to or from a third path.

    Args:
        router: Of any kind but random.
        features: [N, d] of the documents that the traffic is measured on.
        seed: Of the cuts.

    Raises:
        DataError: There are too few distinct documents to cut.
        ValueError: A random router, which has nothing to cut.
    """
    if router.kind is RouterKind.RANDOM:
        raise ValueError("a random router is not re-seeded")
    while empty := empty_paths(traffic(router.route(features), router.paths)):
        router = _split(router, features, router.paths.index(empty[0]), seed)
    return router


def _split(router: Router, features: Float32Array, empty: int, seed: int) -> Router:
    routes = router.route(features)[:, 0]
    busiest = int(np.bincount(routes).argmax())
    mine = features[routes == busiest] - router.centre
    if len(np.unique(mine, axis=0)) >= 2:
        first, second = _kmeans(mine, 2, seed)
        wanted = routes.copy()
        wanted[routes == busiest] = np.where(
            (mine - (first + second) / 2) @ (first - second) > 0, busiest, empty
        )
        step = 1.0
        for _ in range(_NUM_HALVINGS):
            divided = _divided(router, busiest, empty, first, second, step)
            if np.array_equal(divided.route(features)[:, 0], wanted):
                return divided
            step /= 2
    raise DataError(
        f"the documents of path {router.paths[busiest]} are too alike to share with path {router.paths[empty]}",
        hint="give more documents, or fewer experts",
    )


def _divided(
    router: Router, busiest: int, empty: int, first: Float64Array, second: Float64Array, step: float
) -> Router:
    direction = step * (first - second)
    offset = float(direction @ (first + second)) / 2
    weights, bias = router.weights.copy(), router.bias.copy()
    weights[empty], bias[empty] = weights[busiest] - direction, bias[busiest] + offset
    weights[busiest] += direction
    bias[busiest] -= offset
    return dataclasses.replace(router, weights=weights, bias=bias)
