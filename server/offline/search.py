"""Weights that are looked for: merges are made, scored and thrown away, and the best one is made again.

* ``greedy`` (model soups, arXiv 2203.05482, recipe 1): inputs are scored alone and sorted; each in turn joins the
  merge if the merge with it is better than without. Better means strictly, as in the authors' program; their
  text also takes what is as good. 2n − 1 trials.
* ``lorahub`` (arXiv 2307.13269): weights of any sign within ±1.5 that minimise loss + 0.05 · mean |weight|,
  without gradients. The merge is Σ weight · movement: of adapters ΔW, where the authors sum A's and B's apart and
  so get products of one adapter's B with another's A. Nelder and Mead's simplex starts at no movement and at each
  input alone, n + 1 trials that mean something by themselves; it draws no random numbers.

Every trial is a line of ``OUT.search.jsonl`` before the next begins. Both ways are functions of the scores alone: a
search that was broken off runs again over what the file says, and goes on where it ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from blake3 import blake3

from weft.common.errors import ComputeError, StateLocked, StorageError, UsageError
from weft.server.merge.settings import MergeRuleName
from weft.server.merge.tiles import Float64
from weft.server.offline import merging
from weft.server.offline.output import check_free
from weft.server.offline.recipe import Choice, LoraMode, Recipe, sum_choice
from weft.server.offline.scoring import Scorer

BOUND: Final = 1.5
"""Of weights in LoraHub."""
_PENALTY: Final = 0.05
"""Of the mean size of weights in LoraHub."""
_LORAHUB_TRIALS: Final = 40
_INPUTS_MAX: Final = 64
_WORST: Final = 1e30
"""What a trial without a score counts as; differences of infinities would be none."""
_WEIGHT_DIGITS: Final = 6
"""Weights are rounded to these decimals before they are tried, so that the record says what was."""


class Method(enum.StrEnum):
    """How weights are looked for."""

    GREEDY = "greedy"
    LORAHUB = "lorahub"


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A merge that was scored."""

    weights: tuple[float, ...]
    """Of each input."""
    score: float | None
    """What it got; None if that was no finite number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How a search ended."""

    recipe: Recipe
    """With the best weights, and the search in its table."""
    best: Trial
    """The best one."""
    trials: tuple[Trial, ...]
    """All, in order."""
    num_resumed: int
    """Trials that an earlier, broken off run had made."""


class _Spent(Exception):
    """The budget is."""


Choose = Callable[[Sequence[float]], Choice]
Evaluate = Callable[[Sequence[float]], float]
"""Weights → what is minimised; raises _Spent."""


def search(
    recipe: Recipe,
    to: Path,
    scorer: Scorer,
    options: merging.Options,
    *,
    method: Method,
    num_trials_max: int = 0,
    on_trial: Callable[[int, int, Trial], None] = lambda number, total, trial: None,
) -> Found:
    """Look for the best weights.

    Args:
        recipe: What to merge, by one rule; the weights that it gives are greedy's.
        to: Where the result will be; trials are made and recorded beside it.
        scorer: How good a trial is.
        options: For its merges.
        method: How.
        num_trials_max: Stop there; 0: 2n − 1 with greedy, 40 with lorahub.
        on_trial: Told (number from 1, at most so many, the trial) after each new one.

    Raises:
        UsageError: The recipe leaves nothing to look for, the record is of another search, or ``to`` exists.
        ComputeError: A trial cannot be scored, or none has a finite score.
    """
    check_free(to)
    choose = _choices(recipe, method)
    count = len(recipe.inputs)
    total = num_trials_max or (2 * count - 1 if method is Method.GREEDY else _LORAHUB_TRIALS)
    relative = recipe.relative or method is Method.LORAHUB
    path = to.with_name(f"{to.name}.search.jsonl")
    with Record(path, _identity(recipe, scorer, method)) as record, contextlib.suppress(_Spent):
        trials = list(record.trials)

        def evaluate(weights: Sequence[float]) -> float:
            rounded = tuple(round(float(each), _WEIGHT_DIGITS) for each in weights)
            known = next((trial for trial in trials if trial.weights == rounded), None)
            if known is None:
                if len(trials) >= total:
                    raise _Spent
                candidate = _with(recipe, choose(rounded), relative=relative)
                known = Trial(weights=rounded, score=_score(candidate, to, scorer, options))
                record.add(known)
                trials.append(known)
                on_trial(len(trials), total, known)
            return _loss(known, scorer)

        _METHODS[method](evaluate, count)
    best = min(trials, key=lambda trial: _objective(trial, scorer, method))
    if best.score is None:
        raise ComputeError(
            "no trial has a finite score", hint="run the evaluation by hand on one of the inputs"
        )
    done = _with(recipe, choose(best.weights), relative=relative)
    said = _said(recipe, scorer, method, best, trials)
    return Found(
        recipe=dataclasses.replace(done, table={**recipe.table, "search": said}),
        best=best,
        trials=tuple(trials),
        num_resumed=len(record.trials),
    )


def forget(to: Path) -> None:
    """Remove the record of a search whose result is in place: its manifest has it."""
    to.with_name(f"{to.name}.search.jsonl").unlink(missing_ok=True)


def greedy(evaluate: Evaluate, count: int) -> None:
    """Greedy soup over ``count`` inputs."""
    alone = [evaluate(_members([index], count)) for index in range(count)]
    first, *others = sorted(range(count), key=lambda index: alone[index])
    soup, best = [first], alone[first]
    for index in others:
        loss = evaluate(_members([*soup, index], count))
        if loss < best:
            soup, best = [*soup, index], loss


def _members(chosen: Sequence[int], count: int) -> list[float]:
    return [float(index in chosen) for index in range(count)]


def lorahub(evaluate: Evaluate, count: int) -> None:
    """Weights in ±1.5 by Nelder and Mead's simplex, until it has closed or the budget is spent."""
    from scipy.optimize import minimize

    def objective(weights: Float64) -> float:
        return evaluate(weights.tolist()) + _penalty(weights.tolist())

    corners = np.vstack([np.zeros(count), np.eye(count)])
    minimize(
        objective,
        corners[0],
        method="Nelder-Mead",
        bounds=[(-BOUND, BOUND)] * count,
        options={"initial_simplex": corners, "maxfev": 10**6, "maxiter": 10**6, "xatol": 1e-3, "fatol": 1e-6},
    )


_METHODS: Final[Mapping[Method, Callable[[Evaluate, int], None]]] = {
    Method.GREEDY: greedy,
    Method.LORAHUB: lorahub,
}


def _penalty(weights: Sequence[float]) -> float:
    return _PENALTY * float(np.mean(np.abs(weights)))


def _loss(trial: Trial, scorer: Scorer) -> float:
    if trial.score is None:
        return _WORST
    return -trial.score if scorer.higher_is_better else trial.score


def _objective(trial: Trial, scorer: Scorer, method: Method) -> float:
    """What the best trial has least of."""
    return _loss(trial, scorer) + (_penalty(trial.weights) if method is Method.LORAHUB else 0.0)


def _choices(recipe: Recipe, method: Method) -> Choose:
    """Weights → how to merge; raises UsageError where there is nothing to look for."""
    uniform = recipe.uniform
    if uniform is None or "expression" in _written(recipe) or "layers" in _written(recipe):
        raise UsageError(
            "a search looks for the weights, which this recipe gives by tensor or expression",
            hint="give inputs and a rule only",
        )
    if recipe.lora is LoraMode.RESIDUAL:
        raise UsageError(
            "a search makes many merges, and each with lora residual would write the whole base",
            hint="search with --lora exact, then merge with the weights that it finds",
        )
    if not 2 <= len(recipe.inputs) <= _INPUTS_MAX:
        raise UsageError(
            f"a search is among 2 to {_INPUTS_MAX} inputs, and there are {len(recipe.inputs)}",
            hint="name more directories" if len(recipe.inputs) < 2 else "leave some out",
        )
    if not all(uniform.weights):
        raise UsageError("an input has the weight 0", hint="leave it out")
    if method is Method.GREEDY:
        return lambda weights: dataclasses.replace(
            uniform, weights=tuple(own * each for own, each in zip(uniform.weights, weights, strict=True))
        )
    if uniform.settings.rule is not MergeRuleName.MEAN or len(set(uniform.weights)) > 1:
        raise UsageError(
            "lorahub finds the weights of a sum itself", hint="leave --rule and weights out, or use greedy"
        )
    return sum_choice


def _written(recipe: Recipe) -> set[str]:
    return {key for key in ("expression", "layers") if recipe.table.get(key)}


def _with(recipe: Recipe, choice: Choice, *, relative: bool) -> Recipe:
    return dataclasses.replace(
        recipe, choose=lambda _name, _num_blocks: choice, uniform=choice, relative=relative
    )


def _score(recipe: Recipe, to: Path, scorer: Scorer, options: merging.Options) -> float | None:
    """Make a merge in a directory that is gone afterwards, and score it."""
    fast = dataclasses.replace(options, digests=False, durable=False)
    place = to.with_name(f".{to.name}.trial")
    try:
        _remove(place)  # of a search that was killed
        plan = merging.make_plan(recipe, device=options.device)
        merging.merge(recipe, plan, place, fast, advance=lambda count: None)
        return scorer.score(place)
    finally:
        _remove(place)


def _remove(place: Path) -> None:
    for path in (place, place.with_name(f"{place.name}.partial")):
        shutil.rmtree(path, ignore_errors=True)


def _said(
    recipe: Recipe, scorer: Scorer, method: Method, best: Trial, trials: Sequence[Trial]
) -> dict[str, Any]:
    labels = [each.label for each in recipe.inputs]
    return {
        "method": method.value,
        **scorer.description,
        "better": "higher" if scorer.higher_is_better else "lower",
        "weights": dict(zip(labels, best.weights, strict=True)),
        "score": best.score,
        "trials": [dataclasses.asdict(trial) for trial in trials],
    }


def _identity(recipe: Recipe, scorer: Scorer, method: Method) -> str:
    """Digest of all that decides the scores, as far as it is known."""
    said = [
        recipe.table,
        merging.files_of(recipe),
        scorer.description,
        scorer.higher_is_better,
        method.value,
    ]
    return blake3(json.dumps(said, sort_keys=True).encode()).hexdigest()


class Record:
    """The trials of a search, one a line; the first line says of which. Use as a context.

    Raises:
        StateLocked: Another process searches for the same result.
        StorageError: It cannot be read or written.
        UsageError: It is of another search.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        with _storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        try:
            self.trials = self._resume(identity)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *_raised: object) -> None:
        self._file.close()

    def _resume(self, identity: str) -> tuple[Trial, ...]:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StateLocked(f"another process searches with {self._path}", hint="wait for it") from error
        self._file.seek(0)
        whole, _, _torn = self._file.read().rpartition(b"\n")  # a last line without its end: by a crash
        first, *lines = [json.loads(line) for line in whole.split(b"\n")] if whole else [{}]
        if lines and first.get("search") != identity:
            raise UsageError(
                f"{self._path} is of another search, or its inputs have changed since",
                hint=f"rm {self._path}",
            )
        with _storage_errors(self._path):
            self._file.truncate(len(whole) + 1 if lines else 0)
        if not lines:
            self._write({"search": identity})
        return tuple(Trial(weights=tuple(each["weights"]), score=each["score"]) for each in lines)

    def _write(self, value: Any) -> None:
        with _storage_errors(self._path):
            self._file.write(json.dumps(value).encode() + b"\n")

    def add(self, trial: Trial) -> None:
        """Note a trial."""
        self._write(dataclasses.asdict(trial))


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot keep {path}: {error.strerror}", hint="give another --to") from error
