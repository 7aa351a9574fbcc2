"""The run file: one TOML that describes a run, checked as a whole before anything starts.

Keys that workers follow become the recipe; the rest stays with the coordinator. Combinations that cannot work are
refused here, by name, so that no run fails an hour later.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from weft.common.codec import CodecKind, CodecSettings
from weft.common.errors import RunFileError, UsageError
from weft.common.ids import RunId, run_id
from weft.common.modules import Kind, Topology
from weft.common.recipe import (
    BasePin,
    FisherSettings,
    InnerSettings,
    Recipe,
    RoutingMode,
    RoutingSettings,
    SlowUplink,
    StreamingSettings,
    TaskKind,
    TaskSettings,
)
from weft.common.settings import field_docs, from_table, to_table
from weft.server.flower.limits import FlowerSettings, read_rule, write_rule
from weft.server.gate import GateSettings
from weft.server.merge.settings import (
    FisherParameters,
    LoraSpace,
    MergeRuleName,
    MergeSettings,
    Rescale,
    TiesParameters,
)
from weft.server.merge.spaces import NEEDING_GRAMS, OF_MATRICES, lora_space
from weft.server.outer import OuterName, OuterSettings
from weft.server.paths import PathPolicy
from weft.server.rounds import RoundPolicy

RUN_FILE_BYTES_MAX = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSection:
    """The run itself."""

    name: str
    """What people type: lower-case letters, digits and hyphens."""
    idle_s: float = 120.0
    """The one time setting: without any progress for this long, a transfer or a task has failed."""

    def __post_init__(self) -> None:
        run_id(self.name)
        if not 5 <= self.idle_s <= 86_400:
            raise UsageError(f"run.idle_s is {self.idle_s}", hint="use 5 to 86400, for example 120")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseSection:
    """The frozen base."""

    source: str
    """A directory in Hugging Face layout (relative to this file), or a Hub id such as meta-llama/Llama-3.2-1B."""
    revision: str = ""
    """The Hub's revision; empty takes the newest."""
    digest: str = ""
    """When given, the base's files must have this digest (`weft init --base DIR` prints it)."""

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise UsageError("base.source is empty", hint="name a model directory or a Hub id")


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsSection:
    """What workers send beside an update."""

    fisher_examples: int = 64
    """Sequences that the diagonal Fisher is taken over; used when merge.rule is fisher."""

    def __post_init__(self) -> None:
        if not 1 <= self.fisher_examples <= 1_000_000:
            raise UsageError(
                f"statistics.fisher_examples is {self.fisher_examples}", hint="use at least 1, for example 64"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSection:
    """How documents come to paths; needed as soon as there are several."""

    mode: RoutingMode = RoutingMode.NONE
    """none; given: the documents are the operator's, a path's shard goes out with its tasks; local: they are the
    workers', who route them with this router and tell only how many each path gets."""
    router: str = ""
    """File that `weft route fit` wrote (relative to this file)."""
    shards: str = ""
    """Mode given: directory that `weft route shard` wrote (relative to this file)."""
    overlap: int = 1
    """Mode local: how many paths a training document belongs to, its best n."""
    validation_share: float = 0.05
    """Share of a path's documents that is held out where they lie, for evaluation and early stopping."""
    reroute_tokens: int = 0
    """At inference, choose the path anew every so many tokens; 0 keeps the prompt's."""

    def __post_init__(self) -> None:
        _ = self.settings
        if (self.mode is RoutingMode.NONE) == bool(self.router):
            raise UsageError(
                f"routing.mode is {self.mode.value!r} and routing.router is {self.router!r}",
                hint="weft route fit DATA --base DIR --experts 4x4 --to FILE writes a router"
                if not self.router
                else 'set routing.mode = "given" or "local", or remove routing.router',
            )
        if (self.mode is RoutingMode.GIVEN) != bool(self.shards):
            raise UsageError(
                f"routing.mode is {self.mode.value!r} and routing.shards is {self.shards!r}",
                hint="weft route shard DATA --router FILE --to DIR writes the shards of mode given",
            )

    @property
    def settings(self) -> RoutingSettings:
        """What workers follow of it."""
        return RoutingSettings(
            mode=self.mode,
            overlap=self.overlap,
            validation_share=self.validation_share,
            reroute_tokens=self.reroute_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A run, as the operator describes it."""

    run: RunSection
    """The run itself."""
    base: BaseSection
    """The frozen base."""
    task: TaskSettings = TaskSettings()
    """What the model learns."""
    topology: Topology = Topology()
    """Modules and paths: levels × experts."""
    inner: InnerSettings = InnerSettings()
    """What a worker does between two merges."""
    rounds: RoundPolicy = RoundPolicy()
    """When a round closes."""
    merge: MergeSettings = MergeSettings()
    """How updates become one movement."""
    flower: FlowerSettings | None = None
    """The strategy that takes the rule's place where merge.rule begins with "flower:"."""
    outer: OuterSettings = OuterSettings()
    """How the movement becomes the next version."""
    codec: CodecSettings = field(default_factory=CodecSettings)
    """How updates are encoded."""
    slow_uplink: SlowUplink | None = None
    """What workers behind a slow line send instead."""
    statistics: StatisticsSection | None = None
    """What workers send beside an update."""
    routing: RoutingSection = RoutingSection()
    """How documents come to paths; needed as soon as there are several."""
    paths: PathPolicy = field(default_factory=PathPolicy)
    """Evaluation of each path on held-out data where that lies, and early stopping."""
    streaming: StreamingSettings | None = None
    """Streaming fragments: all of a path's modules train, topology.levels_per_task of them are sent at a time."""
    gate: GateSettings = GateSettings()
    """Held-out evaluation before a version is published."""

    def __post_init__(self) -> None:
        self._check_paths()
        self._check_rounds()
        if self.statistics is not None and self.merge.rule is not MergeRuleName.FISHER:
            raise RunFileError(
                f"statistics.fisher_examples is set and merge.rule is {self.merge.rule.value!r}",
                hint='set merge.rule = "fisher", or remove [statistics]',
            )
        space = lora_space(self.merge, self.outer) if self.topology.kind is Kind.LORA else None
        self._check_rule()
        if self.flower is not None:
            self._check_flower(self.flower)
        if self.topology.kind is Kind.FULL and self.merge.lora is not None:
            raise RunFileError(
                f'merge.lora is {self.merge.lora.value!r} and topology.kind is "full"',
                hint="remove merge.lora",
            )
        if self.merge.lora is not None and space is LoraSpace.EXACT and self.rounds.asynchronous:
            raise RunFileError(
                'merge.lora is "exact" and rounds are asynchronous: updates of other starts have other factors',
                hint='set merge.lora = "factors", or rounds.buffer = 0',
            )

    def _check_rule(self) -> None:
        """Refuse merge rules that cannot run in rounds."""
        rule = self.merge.rule
        if rule in NEEDING_GRAMS:
            raise RunFileError(
                f'merge.rule is "{rule}", which needs Grams of the inputs of each layer: workers send none',
                hint="use it with weft merge, or set another merge.rule",
            )
        if self.topology.kind is Kind.LORA and rule in OF_MATRICES and self.rounds.asynchronous:
            raise RunFileError(
                f'merge.rule is "{rule}", for ΔW, and rounds are asynchronous: updates of other starts have other'
                " factors",
                hint='set rounds.buffer = 0, or a rule that merges factors, such as merge.rule = "ties"',
            )

    def _check_paths(self) -> None:
        """Refuse what several paths cannot work with."""
        topology, num_paths = self.topology, self.topology.num_paths
        if num_paths > 1 and self.routing.mode is RoutingMode.NONE:
            raise RunFileError(
                f"topology.experts is {list(topology.experts)}, which makes {num_paths} paths, and nothing says which"
                " document belongs to which",
                hint='fit a router with weft route fit, then set routing.router and routing.mode = "given" or "local"',
            )
        if self.paths.evaluate_every and self.routing.mode is RoutingMode.NONE:
            raise RunFileError(
                "paths.evaluate_every is set, and documents that are not routed are not held out either",
                hint="use gate.heldout, or set routing.mode",
            )
        prefix, length = self.task.prefix_tokens, self.inner.sequence_length
        if prefix >= length:
            raise RunFileError(
                f"task.prefix_tokens is {prefix} and inner.sequence_length is {length}: nothing would be learnt",
                hint=f"set inner.sequence_length above {prefix}",
            )
        if prefix and self.task.kind is not TaskKind.CAUSAL_LM:
            raise RunFileError(
                f"task.prefix_tokens is set for {self.task.kind.value}", hint="remove task.prefix_tokens"
            )

    def _check_rounds(self) -> None:
        """Refuse ways to run rounds that exclude each other."""
        rounds, topology = self.rounds, self.topology
        if rounds.asynchronous and (rounds.backups or self.streaming):
            other = "rounds.backups" if rounds.backups else "[streaming]"
            raise RunFileError(
                f"rounds.buffer is {rounds.buffer} and {other} is set, which is for synchronous rounds",
                hint=f"remove {other}, or set rounds.buffer = 0",
            )
        if self.streaming and not 0 < topology.levels_per_task < len(topology.experts):
            raise RunFileError(
                f"[streaming] is set and topology.levels_per_task is {topology.levels_per_task} of"
                f" {len(topology.experts)} level(s)",
                hint="set topology.levels_per_task = 1 and split the layers into two levels or more",
            )

    def _check_flower(self, flower: FlowerSettings) -> None:
        """Refuse what one of Flower's strategies cannot be combined with."""
        if self.merge.lora is LoraSpace.EXACT:
            raise RunFileError(
                f'merge.lora is "exact" and merge.rule is "{flower.name}", which sees factors as they are',
                hint='set merge.lora = "factors", or merge.rule = "mean"',
            )
        if self.merge.rescale is not Rescale.NONE:
            raise RunFileError(
                f'merge.rescale is "{self.merge.rescale}" and merge.rule is "{flower.name}"',
                hint='set merge.rule = "mean", or remove merge.rescale',
            )
        if flower.row.slots and not (self.outer.name is OuterName.SGD and self.outer.rate == 1):
            raise RunFileError(
                f'merge.rule is "{flower.name}", an outer optimiser of its own, and outer.name is'
                f' "{self.outer.name}" with learning rate {self.outer.rate:g}',
                hint='remove [outer], or set merge.rule = "flower:FedAvg"',
            )
        topology, rounds = self.topology, self.rounds
        paths = min(len(topology.paths_through(module)) for module in topology.modules)
        fewest = rounds.buffer or rounds.quorum * (paths if rounds.paths_quorum == 1 else 1)
        if fewest < flower.num_updates_min:
            raise RunFileError(
                f"{flower.name} needs {flower.num_updates_min} updates for its num_malicious_nodes, and a round may"
                f" close with {fewest}",
                hint=f"set {'rounds.buffer' if rounds.buffer else 'rounds.quorum'} higher, or expect fewer liars",
            )

    @property
    def rule_name(self) -> str:
        """What ``merge.rule`` says."""
        return self.flower.name if self.flower else self.merge.rule.value

    @property
    def merging(self) -> MergeSettings:
        """The ``[merge]`` table in force: updates of several starts have no ΔW in common, so factors are merged."""
        if self.topology.kind is Kind.LORA and self.rounds.asynchronous and self.merge.lora is None:
            return dataclasses.replace(self.merge, lora=LoraSpace.FACTORS)
        return self.merge

    @property
    def name(self) -> RunId:
        """The run's name."""
        return run_id(self.run.name)

    @property
    def fisher_examples(self) -> int:
        """Sequences for the Fisher; 0 when the rule does not need it."""
        if self.merge.rule is not MergeRuleName.FISHER:
            return 0
        return (self.statistics or StatisticsSection()).fisher_examples

    def recipe(self, base: BasePin) -> Recipe:
        """The part that workers follow, over a pinned base."""
        return Recipe(
            run=self.name,
            base=base,
            task=self.task,
            topology=self.topology,
            inner=self.inner,
            codec=self.codec,
            slow_uplink=self.slow_uplink,
            fisher=FisherSettings(num_examples=self.fisher_examples),
            routing=self.routing.settings,
            streaming=self.streaming,
            num_rounds=self.rounds.count,
            idle_s=self.run.idle_s,
        )


def load_run_file(path: Path) -> RunFile:
    """Read and check a run file; relative paths in it become relative to its directory.

    Raises:
        RunFileError: Not readable, not TOML, an unknown key, a wrong type or value, or a combination that cannot work.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunFileError(f"{path}: {error.strerror}", hint="weft init writes a run file") from error
    if len(data) > RUN_FILE_BYTES_MAX:
        raise RunFileError(f"{path} is larger than a run file can be")
    try:
        return _resolved(parse_run_file(data.decode()), path.parent)
    except UnicodeDecodeError as error:
        raise RunFileError(f"{path} is not UTF-8: {error}") from error
    except (OSError, ValueError) as error:
        # Too long, or with a character that no path has.
        raise RunFileError(f"{path}: one of the paths in it cannot be a path: {error}") from error
    except UsageError as error:
        hint = error.hint or "weft init writes a run file with every key and its meaning"
        raise RunFileError(f"{path}: {error.message}", hint=hint) from error


def parse_run_file(text: str) -> RunFile:
    """Read a run file's text; raises RunFileError."""
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Beside TOMLDecodeError: a number of thousands of digits, brackets thousands deep.
        raise RunFileError(f"not TOML: {error}") from error
    return from_table(RunFile, read_rule(table))


def _resolved(run_file: RunFile, directory: Path) -> RunFile:
    """A copy in which a local base, the held-out data, the router and the shards are absolute."""
    source = run_file.base.source
    if (directory / source).exists() or source.startswith((".", "/")):
        source = str((directory / source).resolve())
    hints = {
        "gate.heldout": "name a file of the training formats, or remove the key",
        "routing.router": "weft route fit DATA --base DIR --experts 4x4 --to FILE writes one",
        "routing.shards": "weft route shard DATA --router FILE --to DIR writes them",
    }
    found = {}
    for key, hint in hints.items():
        section, _, name = key.partition(".")
        given = getattr(getattr(run_file, section), name)
        found[name] = str((directory / given).resolve()) if given else ""
        if given and not Path(found[name]).exists():
            raise RunFileError(f"{key}: there is no {found[name]}", hint=hint)
    return dataclasses.replace(
        run_file,
        base=dataclasses.replace(run_file.base, source=source),
        gate=dataclasses.replace(run_file.gate, heldout=found["heldout"]),
        routing=dataclasses.replace(run_file.routing, router=found["router"], shards=found["shards"]),
    )


def dump_run_file(run_file: RunFile) -> str:
    """The run file as TOML without comments, every value written out."""
    return _toml(write_rule(to_table(run_file)))


def template(*, name: str, source: str, digest: str = "") -> str:
    """A commented run file that runs as it is; every key, with its meaning and its default."""
    lines = ["# A Weft run. Every key is here with its default; remove what you do not change.", ""]
    values = RunFile(
        run=RunSection(name=name), base=BaseSection(source=source, digest=digest), gate=GateSettings()
    )
    docs = field_docs(RunFile)
    for section in dataclasses.fields(RunFile):
        if section.name == "flower":  # a rule's name
            continue
        optional = _OPTIONAL.get(section.name)
        value = optional or getattr(values, section.name)
        lines += [
            f"# {docs[section.name]}",
            *_section(section.name, value, commented=optional is not None),
            "",
        ]
    lines += [*_section("merge.ties", TiesParameters(), commented=True), ""]
    lines += _section("merge.fisher", FisherParameters(), commented=True)
    return "\n".join(lines).rstrip() + "\n"


_OPTIONAL: Final[Mapping[str, Any]] = {
    "slow_uplink": SlowUplink(below_mbit_s=20.0, codec=CodecSettings(kind=CodecKind.TERNARY)),
    "statistics": StatisticsSection(),
    "streaming": StreamingSettings(),
}
"""What the template shows, commented out, of sections that a run does without."""


def _section(name: str, value: Any, *, commented: bool = False) -> list[str]:
    docs = field_docs(type(value))
    mark = "# " if commented else ""
    lines = [f"{mark}[{name}]"]
    later: list[str] = []
    for item in dataclasses.fields(value):
        current = getattr(value, item.name)
        if dataclasses.is_dataclass(current):
            later += ["", *_section(f"{name}.{item.name}", current, commented=commented)]
        elif current is not None:
            lines += _comment(docs.get(item.name, ""))
            lines.append(f"{mark}{item.name} = {_toml_value(to_table(current))}")
        elif item.name not in ("ties", "fisher"):
            lines += _comment(docs.get(item.name, ""))
    return lines + later


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text.replace("``", ""), 100, break_on_hyphens=False)]


def _toml(table: dict[str, Any], prefix: str = "") -> str:
    scalars = [f"{key} = {_toml_value(value)}" for key, value in table.items() if not isinstance(value, dict)]
    tables = [
        f"[{prefix}{_toml_key(key)}]\n{_toml(value, f'{prefix}{_toml_key(key)}.')}"
        for key, value in table.items()
        if isinstance(value, dict)
    ]
    return "\n".join([*scalars, *tables]) + "\n"


def _toml_key(key: str) -> str:
    return f'"{key}"' if ":" in key else key


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's; TOML wants one more character escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
