"""What each merge rule does when a fifth of the workers attack.

    python benchmarks/robustness.py [--write] [--seeds 3] [--rounds 10] [--processes 2]

Twenty workers train a softmax regression, a convex problem whose optimum is known; four of them attack, knowing
what all others send. Every update goes the way of production: written as an update file, screened by the ingest
gate, merged by the engine with the settings of a run file. A number is how much of the possible loss reduction
the last version has made: 100 is the optimum of the honest workers' data, 0 the start, below it is worse than no
training. Medians over seeds.

Legend: H = honest updates, M = attackers, P = parameters.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Final

import numpy as np
import numpy.typing as npt
from lib.machine import setting
from scipy.optimize import minimize

from weft.common.codec import CodecKind, CodecSettings, UpdateFile, encode_update, screen_update
from weft.common.errors import UpdateRejected
from weft.common.modules import Schema, TensorSpec
from weft.server.merge.engine import merge_module
from weft.server.merge.settings import Clip, MergeRuleName, MergeSettings
from weft.server.merge.tiles import Arrays, ArrayUpdate
from weft.server.outer import OuterSettings

Floats = npt.NDArray[np.float64]
Attack = Callable[[Floats, Floats, np.random.Generator], Floats]
"""(what honest workers send [H, P], what attackers would send if they were honest [M, P], randomness) → [M, P]."""

NUM_WORKERS: Final = 20
NUM_ATTACKERS: Final = 4
NUM_HONEST: Final = NUM_WORKERS - NUM_ATTACKERS
FEATURES, CLASSES = 30, 6
LOST: Final = 1e6
"""A weight that nothing comes back from."""
SAMPLES: Final = 200
"""Of each worker."""
RIDGE: Final = 1e-3
LOCAL_STEPS, BATCH, LEARNING_RATE = 10, 20, 0.3
SCHEMA: Final = Schema((TensorSpec("w", "F32", (FEATURES + 1, CLASSES)),))
CODEC: Final = CodecSettings(kind=CodecKind.FP32)


# -- attacks -------------------------------------------------------------------------------------------------


def sign_flip(_honest: Floats, own: Floats, _rng: np.random.Generator) -> Floats:
    """The opposite of what an honest worker would send."""
    return -own


def flip_tenfold(_honest: Floats, own: Floats, _rng: np.random.Generator) -> Floats:
    """Ten times the opposite."""
    return -10 * own


def gaussian(honest: Floats, own: Floats, rng: np.random.Generator) -> Floats:
    """Noise, ten times as long as honest updates are on average."""
    noise = rng.standard_normal(own.shape)
    length = 10 * np.linalg.norm(honest, axis=1).mean()
    return noise * (length / np.linalg.norm(noise, axis=1, keepdims=True))


def alie(honest: Floats, own: Floats, _rng: np.random.Generator) -> Floats:
    """A little is enough (arXiv 1902.06156): μ − z σ, as far out as enough honest workers are by chance."""
    z = alie_z(len(honest), len(own))
    return _alike(honest.mean(0) - z * honest.std(0), len(own))


def _alike(movement: Floats, count: int) -> Floats:
    """The same for all, but for a hair: the coordinator refuses the bytes of another worker."""
    return np.outer(1 + 1e-5 * np.arange(count), movement)


def alie_z(num_honest: int, num_attackers: int) -> float:
    """Z with Φ(z) = (n − m − s) / (n − m), where s = ⌊n/2 + 1⌋ − m are needed for a majority (algorithm 3)."""
    needed = (num_honest + num_attackers) // 2 + 1 - num_attackers
    return NormalDist().inv_cdf((num_honest - needed) / num_honest)


def inner_product(honest: Floats, own: Floats, _rng: np.random.Generator) -> Floats:
    """Inner product manipulation (arXiv 1903.03936): −ε μ, with ε = 0.5."""
    return _alike(-0.5 * honest.mean(0), len(own))


def min_max(honest: Floats, own: Floats, _rng: np.random.Generator) -> Floats:
    """Min-max (Shejwalkar and Houmansadr, NDSS 2021): μ − γ σ, γ the largest that hides.

    It hides while no honest update is further from it than the two honest ones furthest apart.
    """
    mean, spread = honest.mean(0), honest.std(0)
    differences = honest[:, np.newaxis] - honest
    allowed = np.linalg.norm(differences, axis=2).max()

    def hides(gamma: float) -> bool:
        return bool(np.linalg.norm(mean - gamma * spread - honest, axis=1).max() <= allowed)

    low, high = 0.0, 1.0
    while hides(high):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if hides(middle) else (low, middle)
    return _alike(mean - low * spread, len(own))


def one_huge(_honest: Floats, own: Floats, _rng: np.random.Generator) -> Floats:
    """One worker sends 10⁴ times its update; the others are honest."""
    return np.concatenate([1e4 * own[:1], own[1:]])


def not_a_number(_honest: Floats, own: Floats, _rng: np.random.Generator) -> Floats:
    """NaN everywhere."""
    return np.full_like(own, math.nan)


def nothing(_honest: Floats, own: Floats, _rng: np.random.Generator) -> Floats:
    """Everyone is honest."""
    return own


@dataclass(frozen=True, slots=True)
class Case:
    """A column of the table."""

    title: str
    attack: Attack
    stated_weight: float = 1.0
    """What attackers say that they were trained on, in what the others were."""


CASES: Final = (
    Case("no attack", nothing),
    Case("sign flip", sign_flip),
    Case("flip, says 10× tokens", sign_flip, 10.0),
    Case("−10×", flip_tenfold),
    Case("Gaussian", gaussian),
    Case("ALIE", alie),
    Case("IPM", inner_product),
    Case("min-max", min_max),
    Case("one 10⁴×", one_huge),
    Case("NaN", not_a_number),
)

RULES: Final = tuple(
    MergeRuleName(name)
    for name in (
        "mean",
        "magnitude",
        "ties",
        "sign_majority",
        "dare",
        "dare_ties",
        "della",
        "pcb",
        "median",
        "trimmed_mean",
        "krum",
        "multi_krum",
        "bulyan",
        "geometric_median",
        "centred_clipping",
        "model_stock",
    )
    if name in set(MergeRuleName)
)
"""Those for replicas, which movements alone suffice for; sums, negation and spectral rules are for other uses."""


# -- the problem ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Problem:
    """Data of every worker; the last of them attack. Features end in a 1."""

    inputs: Floats
    """[W, N, F]."""
    labels: npt.NDArray[np.int64]
    """[W, N]."""

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Problem:
        """Labels from a random teacher; each worker's inputs lie around a place of its own."""
        shape = (NUM_WORKERS, SAMPLES, FEATURES)
        places = rng.standard_normal((NUM_WORKERS, 1, FEATURES))
        inputs = np.concatenate([rng.standard_normal(shape) + places, np.ones((*shape[:2], 1))], axis=2)
        teacher = rng.standard_normal((FEATURES + 1, CLASSES)) * 2 / math.sqrt(FEATURES)
        noise = rng.gumbel(size=(*shape[:2], CLASSES))
        return cls(inputs, np.argmax(inputs @ teacher + noise, axis=2))

    def train(self, worker: int, start: Floats, rng: np.random.Generator) -> Floats:
        """Movement [F, C] of some steps of SGD."""
        weights = start.copy()
        for _ in range(LOCAL_STEPS):
            batch = rng.integers(SAMPLES, size=BATCH)
            weights -= LEARNING_RATE * gradient(
                weights, self.inputs[worker, batch], self.labels[worker, batch]
            )
        return weights - start

    def honest(self) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Inputs and labels of those who do not attack, in one."""
        return self.inputs[:NUM_HONEST].reshape(-1, FEATURES + 1), self.labels[:NUM_HONEST].reshape(-1)

    def honest_loss(self, weights: npt.NDArray[np.float32]) -> float:
        """Mean nats on the data of those who do not attack, with the ridge."""
        return loss(weights.astype(np.float64), *self.honest())

    def optimum(self) -> float:
        """The least ``honest_loss``."""
        inputs, labels = self.honest()
        found = minimize(
            lambda flat: loss(flat.reshape(-1, CLASSES), inputs, labels),
            np.zeros((FEATURES + 1) * CLASSES),
            jac=lambda flat: gradient(flat.reshape(-1, CLASSES), inputs, labels).reshape(-1),
            method="L-BFGS-B",
        )
        return float(found.fun)


def _log_probs(weights: Floats, inputs: Floats) -> Floats:
    logits = inputs @ weights
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))


def loss(weights: Floats, inputs: Floats, labels: npt.NDArray[np.int64]) -> float:
    """Mean cross-entropy in nats + ridge/2 · ‖w‖²."""
    log_probs = _log_probs(weights, inputs)
    return float(-log_probs[np.arange(len(labels)), labels].mean() + RIDGE / 2 * (weights**2).sum())


def gradient(weights: Floats, inputs: Floats, labels: npt.NDArray[np.int64]) -> Floats:
    """Of ``loss``, [F, C]."""
    errors = np.exp(_log_probs(weights, inputs))
    errors[np.arange(len(labels)), labels] -= 1
    return np.asarray(inputs.T @ errors / len(labels) + RIDGE * weights)


# -- rounds --------------------------------------------------------------------------------------------------


def gate(directory: Path, worker: int, movement: Floats, weight: float) -> ArrayUpdate | None:
    """Send a movement through its file and the ingest gate; None if that refuses it."""
    path = directory / f"{worker:02d}"
    values = movement.astype(np.float32)
    encode_update(path, SCHEMA, {"w": np.nan_to_num(values)}, CODEC)
    if not np.isfinite(values).all():  # a worker of Weft's would not write it: an attacker does
        data = path.read_bytes()
        path.write_bytes(data[: -values.nbytes] + values.tobytes())
    try:
        screen_update(path, SCHEMA, [CODEC], wants_fisher=False, size_bytes_max=1 << 20)
    except UpdateRejected:
        return None
    with UpdateFile(path, SCHEMA) as file:
        read = np.array(file.tile("w", 0, values.size)).reshape(values.shape)
    return ArrayUpdate(worker_id=f"{worker:02d}", deltas=Arrays({"w": read}), weight=weight)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training under attack ended."""

    progress: float
    """Percent of the possible loss reduction."""
    refused: int
    """Updates that the gate refused."""


def train(rule: MergeRuleName, clip: Clip, case: Case, *, seed: int, rounds: int) -> Outcome:
    """Rounds of everyone's training, attack, gate and merge."""
    problem = Problem.draw(np.random.default_rng(seed))
    settings, refused = MergeSettings(rule=rule, clip=clip), 0
    version = Arrays.zeros(SCHEMA)
    rng = np.random.default_rng([seed, 1])
    first, best = problem.honest_loss(version.arrays["w"]), problem.optimum()
    with tempfile.TemporaryDirectory() as directory:
        for _ in range(rounds):
            updates = one_round(problem, case, version.arrays["w"], Path(directory), rng)
            refused += NUM_WORKERS - len(updates)
            after = Arrays.zeros(SCHEMA)
            merge_module(
                updates, version, SCHEMA, after, settings=settings, outer=OuterSettings(), norms=False
            )
            version = after
            if not np.abs(after.arrays["w"]).max() < LOST:
                break
    last = problem.honest_loss(version.arrays["w"])
    return Outcome(100 * (first - last) / (first - best), refused)


def one_round(
    problem: Problem, case: Case, start: npt.NDArray[np.float32], directory: Path, rng: np.random.Generator
) -> list[ArrayUpdate]:
    """What of all that is sent passes the gate."""
    weights = start.astype(np.float64)
    moved = np.stack([problem.train(worker, weights, rng) for worker in range(NUM_WORKERS)])
    honest, own = np.split(moved.reshape(NUM_WORKERS, -1), [NUM_HONEST])
    sent = [*honest, *case.attack(honest, own, rng)]
    updates = (
        gate(
            directory,
            worker,
            movement.reshape(start.shape),
            1.0 if worker < NUM_HONEST else case.stated_weight,
        )
        for worker, movement in enumerate(sent)
    )
    return [update for update in updates if update is not None]


# -- the page ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the page."""

    rule: MergeRuleName
    clip: Clip
    case: Case
    seeds: int
    rounds: int

    def measure(self) -> tuple[float, int]:
        """Median progress over the seeds, and updates that the gate refused, of all seeds."""
        outcomes = [
            train(self.rule, self.clip, self.case, seed=seed, rounds=self.rounds)
            for seed in range(self.seeds)
        ]
        return float(np.median([each.progress for each in outcomes])), sum(each.refused for each in outcomes)


def table(clip: Clip, found: Mapping[Cell, tuple[float, int]]) -> list[str]:
    """Rows of a table: rules by attacks."""
    lines = [f"| rule | {' | '.join(case.title for case in CASES)} |", "|---|" + "---:|" * len(CASES)]
    for rule in RULES:
        row = [found[cell][0] for cell in found if (cell.rule, cell.clip) == (rule, clip)]
        lines.append(f"| `{rule.value}` | {' | '.join(map(shown, row))} |")
    return lines


def shown(progress: float) -> str:
    """A number, as far as it means something."""
    return f"{progress:.0f}".replace("-", "−") if progress > -100 else "lost"


def report(found: Mapping[Cell, tuple[float, int]], *, seeds: int, rounds: int, head: str) -> str:
    """The page."""
    refused = {case.title: 0 for case in CASES}
    for cell, (_, count) in found.items():
        refused[cell.case.title] += count
    sent = len(RULES) * len(Clip) * seeds * rounds * NUM_ATTACKERS
    said = ", ".join(f"{title}: {count:,} of {sent:,}" for title, count in refused.items() if count) or "none"
    return "\n".join(
        [
            "# Rules under attack",
            "",
            head,
            "",
            INTRODUCTION.format(
                workers=NUM_WORKERS, attackers=NUM_ATTACKERS, rounds=rounds, seeds=seeds, refused=said
            ),
            '## Without clipping (`clip = "none"`)',
            "",
            *table(Clip.NONE, found),
            "",
            '## With clipping (`clip = "median"`, the default)',
            "",
            *table(Clip.MEDIAN, found),
            "",
            READING,
        ]
    )


INTRODUCTION: Final = """\
{workers} workers train a softmax regression on data whose inputs lie around a place of each worker's own;
{attackers} of them attack, knowing what all others send. {rounds} rounds, medians over {seeds} seeds. A number is
the part of the possible loss reduction that was reached, in percent: 100 is the optimum of the honest workers' data,
0 is the start, less is worse than no training, and *lost* is below −100. Updates are written, screened by the ingest
gate and merged by the engine, as in a run; nothing is rolled back here, where a run's evaluation gate would.

*−10×*: ten times the opposite. *Gaussian*: noise ten times as long as updates are. *ALIE*: arXiv 1902.06156, whose z is
0.16 for these numbers. *IPM*: arXiv 1903.03936, ε = 0.5. *min-max*: Shejwalkar and Houmansadr 2021, along −σ. *one
10⁴×*: one attacker, the others honest. Refused by the ingest gate, which takes nothing that is not finite or absurdly
large: {refused}; the merge goes on without them.
"""

READING: Final = """\
## Reading

* With clipping, the default, attackers can only pull as hard as others do: plain `mean` keeps more than 90 in
  every column but one. Without it a single huge update destroys every rule that is not robust, and four that
  are ten times too long nearly all of them.
* That one column is what clipping does not help against: attackers who claim to have trained on ten times the
  tokens. The bound of ten medians lets 20 % of the workers have 71 % of the weight, also in `geometric_median`
  and `centred_clipping`, which count weights. Among workers who are not trusted, set `merge.weights = "equal"`:
  it makes this column the one before. `median`, `trimmed_mean`, `krum` and `bulyan` never look at weights.
* Where nobody attacks, `krum` pays most for its robustness, since each worker's data are different and it takes
  the update of one; `multi_krum` and `trimmed_mean` pay next to nothing. `ties`, `dare_ties` and `pcb` are
  slower than the mean for replicas, attack or not, and `dare_ties` is the least robust: where it happens to
  drop honest elements, attackers are the majority.
* `IPM` is what the robust rules are weakest against, `krum` and `bulyan` above all, and `model_stock` with
  them: a small step back looks more like everyone than an honest step does. `mean` and `centred_clipping` lose
  least by it.
* `ALIE` and `min-max` do no visible harm at these numbers, since 4 of 20 leave them little room (z = 0.16), and
  `krum` even gains from choosing an attacker who sends about the mean. That is no proof of safety: more
  attackers, more parameters or more rounds give them more room. A convex problem of 186 parameters also says
  nothing about backdoors.
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/results/robustness.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    cells = [
        Cell(rule, clip, case, arguments.seeds, arguments.rounds)
        for rule in RULES
        for clip in Clip
        for case in CASES
    ]
    with ProcessPoolExecutor(arguments.processes) as pool:
        found = dict(zip(cells, pool.map(Cell.measure, cells, chunksize=4), strict=True))
    head = setting(("numpy", "scipy"), load_before=load)
    text = report(found, seeds=arguments.seeds, rounds=arguments.rounds, head=head)
    print(text)
    if arguments.write:
        target = Path(__file__).parents[1] / "docs" / "results" / "robustness.md"
        target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
