"""The paths of a run, as people see them: a grid where there are two shared levels, otherwise a list.

What a path's state says comes from the coordinator. One that nobody is at work on waits, has had its rounds or was
stopped early, and begins so; anything else is why nobody can train the path, and needs somebody. However many paths
there are, those that need attention are named, and the others are counted.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from weft.client.cells import add_row, loss, make_table, size
from weft.common.ids import ModuleKey, Path
from weft.common.protocol import PathStatus, RunStatus, Stage, WorkerStatus

COLUMNS_MAX: Final = 8
"""Experts of the second shared level up to which the grid fits a terminal."""
PATHS_DRAWN_MAX: Final = 64
"""Paths up to which each is drawn in the live picture."""
ATTENTION_MAX: Final = 16
"""Paths needing attention that the live picture names."""
_NAME_WIDTH: Final = 10
_BYTE_STAGES: Final = frozenset({Stage.FETCHING, Stage.SENDING})


class Kind(enum.Enum):
    """How a path is doing, what needs somebody first."""

    UNSERVED = "not served"
    STOPPED = "stopped early"
    WAITING = "waiting"
    AT_WORK = "at work"
    FINISHED = "finished"


_STYLES: Final[Mapping[Kind, str]] = {
    Kind.UNSERVED: "red",
    Kind.STOPPED: "yellow",
    Kind.WAITING: "",
    Kind.AT_WORK: "green",
    Kind.FINISHED: "dim",
}
_BEGINNINGS: Final[Mapping[str, Kind]] = {
    "stopped early": Kind.STOPPED,
    "waits": Kind.WAITING,
    "has had its rounds": Kind.FINISHED,
}
_ORDER: Final = tuple(Kind)


def kind_of(path: PathStatus) -> Kind:
    """How a path is doing, from its workers and the beginning of its state."""
    if path.workers:
        return Kind.AT_WORK
    begun = (kind for beginning, kind in _BEGINNINGS.items() if path.state.startswith(beginning))
    return next(begun, Kind.UNSERVED)


def by_attention(paths: Sequence[PathStatus]) -> list[PathStatus]:
    """What needs somebody first; among equals in the order of the paths."""
    return sorted(paths, key=lambda path: (_ORDER.index(kind_of(path)), Path.parse(path.path).experts))


def num_paths_through(run: RunStatus) -> Mapping[str, int]:
    """How many paths share each module, by level.expert; 1 where the run has one path."""
    through = Counter(str(module) for path in run.paths for module in Path.parse(path.path).modules)
    return through or {module.module: 1 for module in run.modules}


def render_paths(run: RunStatus, workers: Sequence[WorkerStatus]) -> RenderableType:
    """A run's paths in the live picture: counts, the grid or list, and what needs attention."""
    levels = _grid_levels(run)
    if levels is not None:
        return Group(_counts(run), _grid(run, levels, workers), *_attention(run))
    if len(run.paths) <= PATHS_DRAWN_MAX:
        return Group(_counts(run), paths_table([run], workers))
    return Group(_counts(run), *_attention(run))


def paths_table(runs: Sequence[RunStatus], workers: Sequence[WorkerStatus]) -> Table:
    """One line a path, what needs attention first."""
    table = make_table(
        "path", "kind", "who", "updates in", "sequences", "held-out loss", "best", "at versions", "state"
    )
    names = _names(workers)
    for run in runs:
        for path in by_attention(run.paths):
            kind = kind_of(path)
            add_row(
                table,
                f"{run.run_id}/path:{path.path}",
                Text(kind.value, style=_STYLES[kind]),
                _who(path, names),
                str(path.num_in),
                f"{path.num_sequences:,}" if path.num_sequences else "–",
                loss(path.validation_loss),
                loss(path.best_loss),
                _versions(path),
                path.state,
            )
    return table


def path_steps(before: RunStatus | None, after: RunStatus) -> list[str]:
    """What happened to paths between two pictures: a held-out loss, a stop, nobody to serve one, somebody again."""
    old = {path.path: path for path in (before.paths if before else ())}
    return [
        f"{after.run_id} path {path.path}: {said}"
        for path in after.paths
        for said in _changes(old.get(path.path), path)
    ]


def _changes(before: PathStatus | None, after: PathStatus) -> Iterator[str]:
    kind, was = kind_of(after), kind_of(before) if before else Kind.WAITING
    if kind is not was and kind in (Kind.UNSERVED, Kind.STOPPED):
        yield after.state
    elif was is Kind.UNSERVED and kind is not was:
        yield "somebody serves it now"
    if after.validation_loss is not None and after.validation_loss != (before and before.validation_loss):
        yield f"held-out loss {loss(after.validation_loss)}, best {loss(after.best_loss)}"


# ---- the grid ----------------------------------------------------------------------------------------------------


def _grid_levels(run: RunStatus) -> tuple[int, int] | None:
    """The two shared levels that make rows and columns; None when there are not two, or too many paths to draw."""
    experts = [
        set(column) for column in zip(*(Path.parse(path.path).experts for path in run.paths), strict=True)
    ]
    shared = [level for level, found in enumerate(experts) if 1 < len(found) < len(run.paths)]
    if len(shared) != 2 or len(run.paths) > PATHS_DRAWN_MAX or len(experts[shared[1]]) > COLUMNS_MAX:
        return None
    rows, columns = shared
    return (rows, columns) if len(experts[rows]) * len(experts[columns]) == len(run.paths) else None


def _grid(run: RunStatus, levels: tuple[int, int], workers: Sequence[WorkerStatus]) -> Table:
    """Rows are experts of the first shared level, columns of the second; versions and paths on the margins."""
    cells = {tuple(Path.parse(path.path).experts[level] for level in levels): path for path in run.paths}
    versions = {ModuleKey.parse(module.module): module.version for module in run.modules}
    through, names = num_paths_through(run), _names(workers)

    def margin(level: int, expert: int) -> Text:
        key = ModuleKey(level, expert)
        return Text.assemble(
            (str(key), "bold"), (f" @{versions[key]}", "cyan"), (f"\n{through[str(key)]} paths", "dim")
        )

    own = [level for level in range(len(Path.parse(run.paths[0].path).experts)) if level not in levels]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="")
    table.add_column("")
    rows, columns = (sorted({cell[axis] for cell in cells}) for axis in (0, 1))
    for column in columns:
        table.add_column(margin(levels[1], column), no_wrap=True)
    for row in rows:
        found = (cells[row, column] for column in columns)
        add_row(table, margin(levels[0], row), *(_cell(path, names, versions, own) for path in found))
    return table


def _cell(
    path: PathStatus,
    workers: Mapping[str, WorkerStatus],
    versions: Mapping[ModuleKey, int],
    own: Sequence[int],
) -> Text:
    """Who trains it and how far, or how it is doing; below, its held-out loss and the version of what is its own."""
    kind = kind_of(path)
    first = _who(path, workers) if path.workers else kind.value
    measured = "" if path.validation_loss is None else f"{loss(path.validation_loss)} · "
    second = f"{measured}{path.num_in} in"
    modules = Path.parse(path.path).modules
    rest = "".join(
        f" {modules[level]}@{versions[modules[level]]}" for level in own if modules[level] in versions
    )
    return Text.assemble((first, _STYLES[kind]), "\n", second, (rest, "dim"))


def _counts(run: RunStatus) -> Text:
    counts = Counter(kind_of(path) for path in run.paths)
    text = Text.assemble((run.run_id, "bold"), f": {len(run.paths)} paths")
    for kind in _ORDER:
        if counts[kind]:
            text.append(" · ", "dim").append(f"{counts[kind]} {kind.value}", _STYLES[kind])
    return text


def _attention(run: RunStatus) -> list[Text]:
    """The paths that nobody serves, by name, with the coordinator's reason, which says what to do."""
    found = [path for path in by_attention(run.paths) if kind_of(path) is Kind.UNSERVED]
    lines = [
        Text.assemble(("! ", "red"), (f"{run.run_id}/path:{path.path}", "bold"), f" {path.state}")
        for path in found[:ATTENTION_MAX]
    ]
    if len(found) > ATTENTION_MAX:
        lines.append(
            Text(f"  … and {len(found) - ATTENTION_MAX} more: weft paths list --run {run.run_id}", "dim")
        )
    return lines


def _names(workers: Sequence[WorkerStatus]) -> Mapping[str, WorkerStatus]:
    return {worker.worker_id: worker for worker in workers}


def _who(path: PathStatus, workers: Mapping[str, WorkerStatus]) -> str:
    """The workers of a path: the first by its name and how far it is, and how many more."""
    if not path.workers:
        return "–"
    first = workers.get(path.workers[0])
    more = f" +{len(path.workers) - 1}" if len(path.workers) > 1 else ""
    if first is None:
        return path.workers[0] + more
    return f"{(first.display_name or first.worker_id)[:_NAME_WIDTH]} {_progress(first)}".rstrip() + more


def _progress(worker: WorkerStatus) -> str:
    if worker.stage is None:
        return ""
    if worker.stage is Stage.TRAINING and worker.num_total:
        return f"{worker.num_done}/{worker.num_total}"
    if worker.stage in _BYTE_STAGES and worker.num_total:
        return f"{worker.stage.name.lower()} {size(worker.num_done)}"
    return worker.stage.name.lower()


def _versions(path: PathStatus) -> str:
    return ", ".join(f"@{version}" for version in path.best_versions) or "–"
