"""What of Flower a run can use as its merge rule, and what it cannot, with the reason.

``merge.rule = "flower:FedYogi"`` names a class of ``flwr.serverapp.strategy``. This table is all that reads a run
file: it needs no flwr, which only the merge process imports (``weft.server.flower.rules``).
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from weft.common.errors import RunFileError, UsageError

PREFIX: Final = "flower:"
"""What a merge rule of Flower's begins with."""
UPDATES_MAX: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A keyword argument of a strategy's class that has to do with merging."""

    default: float
    """Flower's own; an int where the argument is one."""
    low: float
    """Smallest value."""
    high: float
    """Largest value."""

    def checked(self, key: str, value: float) -> float:
        """``value`` as the type that the class takes; raises UsageError."""
        whole = isinstance(self.default, int)
        if not self.low <= value <= self.high or (whole and value != int(value)):
            kind = "a whole number" if whole else "a number"
            raise UsageError(
                f"{key} is {value:g}",
                hint=f"use {kind} from {self.low:g} to {self.high:g}, for example {self.default:g}",
            )
        return int(value) if whole else value


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowerRow:
    """One row of ``STRATEGIES``."""

    title: str
    """One line for people."""
    paper: str
    """Where it is defined."""
    memory: str = "W + 3"
    """Sizes of the module in float32 that are held at once for W updates, measured."""
    parameters: Mapping[str, Parameter] = dataclasses.field(default_factory=dict)
    """Its arguments; Flower's arguments about sampling and record keys have no meaning in a run."""
    slots: tuple[str, ...] = ()
    """Attributes that it keeps between rounds, each of the module's size."""
    updates_per_bad: int = 0
    """k: it needs k · num_malicious_nodes + 3 updates; 0: any number does."""
    robust: bool = False
    """Bounded under a minority of arbitrary updates even without clipping."""


_BAD: Final = Parameter(default=0, low=0, high=UPDATES_MAX)
_ETA: Final = Parameter(default=0.1, low=1e-9, high=100.0)
_BETA: Final = Parameter(default=0.9, low=0.0, high=0.999999)
_TAU: Final = Parameter(default=1e-3, low=1e-12, high=1.0)
_FEDOPT: Final = "https://arxiv.org/abs/2003.00295"

STRATEGIES: Final[Mapping[str, FlowerRow]] = {
    "FedAvg": FlowerRow(title="Weighted mean", paper="https://arxiv.org/abs/1602.05629"),
    "FedAvgM": FlowerRow(
        title="Weighted mean with heavy-ball momentum over rounds",
        paper="https://arxiv.org/abs/1909.06335",
        memory="W + 4",
        parameters={
            "server_learning_rate": dataclasses.replace(_ETA, default=1.0),
            "server_momentum": dataclasses.replace(_BETA, default=0.0),
        },
        slots=("momentum_vector",),
    ),
    "FedAdagrad": FlowerRow(
        title="Adagrad over rounds",
        paper=_FEDOPT,
        memory="W + 10",
        parameters={"eta": _ETA, "tau": _TAU},
        slots=("v_t",),
    ),
    "FedAdam": FlowerRow(
        title="Adam over rounds",
        paper=_FEDOPT,
        memory="W + 10",
        parameters={
            "eta": _ETA,
            "beta_1": _BETA,
            "beta_2": dataclasses.replace(_BETA, default=0.99),
            "tau": _TAU,
        },
        slots=("m_t", "v_t"),
    ),
    "FedYogi": FlowerRow(
        title="Yogi over rounds: Adam whose second moment moves by a bounded amount",
        paper=_FEDOPT,
        memory="W + 10",
        parameters={
            "eta": dataclasses.replace(_ETA, default=0.01),
            "beta_1": _BETA,
            "beta_2": dataclasses.replace(_BETA, default=0.99),
            "tau": _TAU,
        },
        slots=("m_t", "v_t"),
    ),
    "FedMedian": FlowerRow(
        title="Coordinate-wise median", paper="https://arxiv.org/abs/1803.01498", robust=True
    ),
    "FedTrimmedAvg": FlowerRow(
        title="Mean without the largest and smallest values of each coordinate",
        paper="https://arxiv.org/abs/1803.01498",
        parameters={"beta": Parameter(default=0.2, low=0.0, high=0.49)},
        robust=True,
    ),
    "Krum": FlowerRow(
        title="The one update that is nearest to its neighbours",
        paper="https://arxiv.org/abs/1703.02757",
        memory="3 W",
        parameters={"num_malicious_nodes": _BAD},
        updates_per_bad=2,
        robust=True,
    ),
    "MultiKrum": FlowerRow(
        title="Weighted mean of the updates with the best Krum scores",
        paper="https://arxiv.org/abs/1703.02757",
        memory="3 W",
        parameters={
            "num_malicious_nodes": _BAD,
            "num_nodes_to_select": Parameter(default=1, low=1, high=UPDATES_MAX),
        },
        updates_per_bad=2,
        robust=True,
    ),
    "Bulyan": FlowerRow(
        title="Mean of what is nearest to the median among the updates that Krum ranks best",
        paper="https://arxiv.org/abs/1802.07927",
        memory="3 W",
        parameters={"num_malicious_nodes": _BAD},
        updates_per_bad=4,
        robust=True,
    ),
}
"""Strategies that aggregate arrays, by the name of their class."""

_PRIVACY: Final = "adds noise that nobody can draw again, so that no version could be recomputed"
_MASKS: Final = "masks updates with keys of which 28 bits vary, so that they can be found by trying"
REFUSED: Final[Mapping[str, str]] = {
    "FedProx": "aggregates as FedAvg; its proximal term belongs to training on the workers",
    "QFedAvg": "weighs updates by the training loss that workers state of themselves, which nothing checks",
    "FedXgbBagging": "aggregates trees of XGBoost, not arrays",
    "FedXgbCyclic": "passes trees of XGBoost from client to client and aggregates nothing",
    "DifferentialPrivacyClientSideAdaptiveClipping": _PRIVACY,
    "DifferentialPrivacyClientSideFixedClipping": _PRIVACY,
    "DifferentialPrivacyServerSideAdaptiveClipping": _PRIVACY,
    "DifferentialPrivacyServerSideFixedClipping": _PRIVACY,
    "SecAgg": _MASKS,
    "SecAgg+": _MASKS,
    "SecAggPlus": _MASKS,
    "SecAggWorkflow": _MASKS,
    "SecAggPlusWorkflow": _MASKS,
}
"""What carries a name in Flower and cannot be a merge rule, with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowerSettings:
    """The strategy that ``merge.rule = "flower:…"`` names, and its table."""

    strategy: str
    """Name of the class."""
    parameters: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """What the file says of them."""

    def __post_init__(self) -> None:
        if self.strategy in REFUSED:
            raise UsageError(
                f"Flower's {self.strategy} cannot be a merge rule: it {REFUSED[self.strategy]}",
                hint=f"choose from {', '.join(PREFIX + name for name in STRATEGIES)}",
            )
        if self.strategy not in STRATEGIES:
            near = difflib.get_close_matches(self.strategy, STRATEGIES, n=1, cutoff=0.4)
            raise UsageError(
                f"merge.rule is {self.name!r}",
                hint=f"did you mean {PREFIX}{near[0]}?"
                if near
                else f"choose from {', '.join(PREFIX + name for name in STRATEGIES)}",
            )
        check_installed(f"merge.rule = {self.name!r}")
        known = self.row.parameters
        for key in self.parameters:
            if key not in known:
                raise UsageError(
                    f"unknown key merge.{self.name!r}.{key}",
                    hint=f"known here: {', '.join(known)}"
                    if known
                    else "it has no parameters: remove the table",
                )
        _ = self.arguments

    @property
    def name(self) -> str:
        """What ``merge.rule`` says."""
        return PREFIX + self.strategy

    @property
    def row(self) -> FlowerRow:
        """Its row of the table."""
        return STRATEGIES[self.strategy]

    @property
    def arguments(self) -> dict[str, float]:
        """Every keyword argument in force, defaults included."""
        return {
            key: parameter.checked(f"merge.{self.name!r}.{key}", self.parameters.get(key, parameter.default))
            for key, parameter in self.row.parameters.items()
        }

    @property
    def num_updates_min(self) -> int:
        """Updates without which it gives no result."""
        num_bad = int(self.arguments.get("num_malicious_nodes", 0))
        return self.row.updates_per_bad * num_bad + 3 if self.row.updates_per_bad and num_bad else 1


def check_installed(what: str) -> None:
    """Raise UsageError, saying ``what`` needs it, unless Flower is installed; imports nothing."""
    if importlib.util.find_spec("flwr") is None:
        raise UsageError(f"{what} needs Flower, which is not installed", hint="pip install 'weft[flower]'")


def read_rule(table: Mapping[str, Any]) -> dict[str, Any]:
    """A run file's table in which a Flower rule has a table of its own, ``flower``; others come back as they are.

    ``rule = "flower:FedYogi"`` and ``[merge."flower:FedYogi"]`` leave ``[merge]``: what remains there says what
    happens to the updates before the strategy sees them.

    Raises:
        RunFileError: The table of another strategy, or the internal form was written.
    """
    if "flower" in table:
        raise RunFileError("unknown key flower", hint='set merge.rule = "flower:FedAvg" and so on')
    merge = table.get("merge")
    if not isinstance(merge, Mapping):
        return dict(table)
    rule = merge.get("rule")
    chosen = rule if isinstance(rule, str) and rule.startswith(PREFIX) else None
    for key in merge:
        if key.startswith(PREFIX) and key != chosen:
            raise RunFileError(
                f'merge."{key}" is set and merge.rule is {rule or "mean"!r}',
                hint=f'set merge.rule = "{key}", or remove [merge."{key}"]',
            )
    if chosen is None:
        return dict(table)
    own = {"strategy": chosen.removeprefix(PREFIX), "parameters": merge.get(chosen, {})}
    rest = {key: value for key, value in merge.items() if key not in ("rule", chosen)}
    return {**table, "merge": rest, "flower": own}


def write_rule(table: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``read_rule``."""
    own = table.get("flower")
    if own is None:
        return dict(table)
    name = PREFIX + own["strategy"]
    merge = {**table.get("merge", {}), "rule": name}
    if own["parameters"]:
        merge[name] = own["parameters"]
    return {key: value for key, value in table.items() if key != "flower"} | {"merge": merge}
