"""docs/results/merging.md, from the results of the arms."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

from benchmarks.lib.machine import processor
from benchmarks.quality import page as tables
from benchmarks.quality.checks import interval
from benchmarks.quality.page import paragraph
from benchmarks.quality_merge import encoder
from benchmarks.quality_merge.arms import PAIRS, Arm, arms
from benchmarks.quality_merge.campaign import EXPERT, FLOOR, MULTITASK, SCALES, Accuracies, Result
from benchmarks.quality_merge.tasks import TASKS, Sizes

_TITLES: Final = {"full": "All weights", "lora": "LoRA"}

BySeed = Mapping[int, Result]
"""An arm's results."""
Results = Mapping[tuple[str, str], BySeed]
"""(kind, arm) → its results."""


def by_arm(results: Sequence[Result]) -> Results:
    """Results in order of their arms."""
    found: dict[tuple[str, str], dict[int, Result]] = {}
    for result in results:
        found.setdefault((result.kind, result.arm), {})[result.seed] = result
    return found


def normalised(reached: Accuracies, experts: Accuracies) -> float:
    """Average over tasks of accuracy / the expert's accuracy, in percent."""
    return 100 * sum(reached[name] / experts[name] for name in reached) / len(reached)


def gain(reached: Accuracies, experts: Accuracies, floor: Accuracies) -> float:
    """Share of what the experts gained over the untouched encoder, in percent; all tasks together."""
    gained = sum(reached[name] - floor[name] for name in reached)
    return 100 * gained / sum(experts[name] - floor[name] for name in reached)


def normalised_seeds(
    results: Results, kind: str, arm: str, pick: Callable[[Result], Accuracies]
) -> dict[int, float]:
    """Normalised accuracy by seed."""
    experts = results[kind, EXPERT]
    return {
        seed: normalised(pick(result), experts[seed].default)
        for seed, result in results.get((kind, arm), {}).items()
    }


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, figures to the right."""
    return tables.table(heads, ["---", *["---:"] * (len(heads) - 1)], rows)


def _default(result: Result) -> Accuracies:
    return result.default


def _tuned(result: Result) -> Accuracies:
    return result.tuned


def _text(values: Sequence[float], *, sign: str = "") -> str:
    if not values:
        return "–"
    mean, half_width = interval(values)
    return f"{mean:{sign}.1f} ± {half_width:.1f}" if len(values) > 1 else f"{mean:{sign}.1f}"


def _row(results: Results, arm: Arm) -> list[str]:
    default, tuned, mean = (
        normalised_seeds(results, arm.kind, name, pick)
        for name, pick in ((arm.name, _default), (arm.name, _tuned), ("mean", _tuned))
    )
    found = results[arm.kind, arm.name]
    experts, floor = results[arm.kind, EXPERT], results[arm.kind, FLOOR]
    gains = [gain(found[seed].tuned, experts[seed].default, floor[seed].default) for seed in sorted(found)]
    above = [tuned[seed] - mean[seed] for seed in sorted(tuned) if seed in mean]
    return [
        f"`{arm.options.removeprefix('--rule ')}`",
        _text(list(default.values())),
        _text(list(tuned.values())),
        " ".join(f"{found[seed].scale:g}" for seed in sorted(found)),
        f"{sum(gains) / len(gains):.0f} %",
        "" if arm.name == "mean" else _text(above, sign="+"),
    ]


def _rules(results: Results, kind: str) -> str:
    wanted = [arm for arm in arms() if arm.kind == kind and not arm.tasks and (kind, arm.name) in results]

    def tuned(arm: Arm) -> float:
        values = normalised_seeds(results, kind, arm.name, _tuned).values()
        return sum(values) / len(values)

    wanted.sort(key=tuned, reverse=True)
    head = ["`--rule` …", "as it comes", "scale tuned", "scales", "of the gain", "above `mean`, both tuned"]
    return table(head, [_row(results, arm) for arm in wanted])


def _references(results: Results, kind: str) -> str:
    rows = []
    for arm, name in ((EXPERT, "experts"), (MULTITASK, "one model, all tasks"), (FLOOR, "untouched")):
        found = results.get((kind, arm))
        if found:
            each = [100 * sum(r.default[task] for r in found.values()) / len(found) for task in TASKS]
            seeds = list(normalised_seeds(results, kind, arm, _default).values())
            rows.append([name, *[f"{value:.1f}" for value in each], _text(seeds)])
    return table([kind, *TASKS, "normalised"], rows)


def _pairs(results: Results) -> str:
    rows = []
    for kind in encoder.KINDS:
        for pair in PAIRS:
            for rule in ("mean", "slerp"):
                name = f"{rule} {'+'.join(pair)}"
                if (kind, name) in results:
                    default, tuned = (
                        list(normalised_seeds(results, kind, name, pick).values())
                        for pick in (_default, _tuned)
                    )
                    scales = " ".join(f"{each.scale:g}" for each in results[kind, name].values())
                    rows.append([kind, " + ".join(pair), f"`{rule}`", _text(default), _text(tuned), scales])
    return table(["kind", "experts", "rule", "as it comes", "scale tuned", "scales"], rows)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _guide(results: Results, kind: str) -> list[str]:
    """What to do with experts of a kind, in four lines."""
    names = [arm.name for arm in arms() if arm.kind == kind and not arm.tasks and (kind, arm.name) in results]
    default, tuned = (
        {name: _mean(normalised_seeds(results, kind, name, pick).values()) for name in names}
        for pick in (_default, _tuned)
    )
    worth = {name: tuned[name] - default[name] for name in names}
    most = max(names, key=lambda name: worth[name])
    above, below = _told_apart(results, kind, names)
    floor = _mean(normalised_seeds(results, kind, FLOOR, _default).values())
    lines = (
        (
            f"nothing to validate on: {_best(default)}; last is {_best(default, last=True)}. The untouched encoder has "
            f"{floor:.1f}."
        ),
        f"with a validation split for the scale: {_best(tuned)}; `mean` has {tuned['mean']:.1f}.",
        (
            f"tuning the scale is worth {_mean(worth.values()):.1f} on average, and most to `{most}`, "
            f"{worth[most]:.1f}."
        ),
        (
            f"told apart from the tuned `mean` (the interval excludes 0): above, {_listed(above)}; below, "
            f"{_listed(below)}. Of the others these seeds cannot say."
        ),
    )
    return [f"* **{_TITLES[kind]}**, {line}" for line in lines]


def _best(values: Mapping[str, float], *, last: bool = False) -> str:
    """The first three, or the last one, with their figures."""
    order = sorted(values, key=lambda name: -values[name])
    return ", ".join(f"`{name}` ({values[name]:.1f})" for name in (order[-1:] if last else order[:3]))


def _told_apart(results: Results, kind: str, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Rules that are above and below the mean of their seeds, both tuned, by more than the interval."""
    above: list[str] = []
    below: list[str] = []
    mean = normalised_seeds(results, kind, "mean", _tuned)
    for name in names:
        tuned = normalised_seeds(results, kind, name, _tuned)
        centre, half_width = interval([tuned[seed] - mean[seed] for seed in tuned if seed in mean])
        if abs(centre) > half_width:
            (above if centre > 0 else below).append(name)
    return above, below


def _wrapped(line: str) -> str:
    return textwrap.fill(line, 119, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "none"


def _guide_to_modes(results: Results) -> list[str]:
    """What the modes of merging LoRA come to, and slerp of two."""
    lines = []
    modes = {"mean": "exact", "mean stack": "stack", "mean factors": "factors"}
    if all(("lora", name) in results for name in modes):
        found = {
            mode: [
                _text(list(normalised_seeds(results, "lora", name, pick).values()))
                for pick in (_default, _tuned)
            ]
            for name, mode in modes.items()
        }
        words = [f"`{mode}` {default}, tuned {tuned}" for mode, (default, tuned) in found.items()]
        lines.append(f"* **LoRA**, how factors become one adapter (`mean`): {'; '.join(words)}.")
    for kind in encoder.KINDS:
        above = [difference for pair in PAIRS for difference in _slerp_above_mean(results, kind, pair)]
        if above:
            lines.append(
                f"* **{_TITLES[kind]}**, two experts: `slerp` is {_text(above, sign='+')} above `mean`."
            )
    return lines


def _slerp_above_mean(results: Results, kind: str, pair: tuple[str, str]) -> list[float]:
    mean, slerp = (
        normalised_seeds(results, kind, f"{rule} {'+'.join(pair)}", _default) for rule in ("mean", "slerp")
    )
    return [slerp[seed] - mean[seed] for seed in slerp if seed in mean]


def _setting(results: Results) -> str:
    packages = ("weft", "torch", "transformers", "peft", "scikit-learn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    seeds = max(len(found) for found in results.values())
    multitask = "--multitask " if ("full", MULTITASK) in results else ""
    return (
        f"{datetime.now(UTC):%Y-%m-%d} · {os.cpu_count()} cores, {processor()} · Python {platform.python_version()}, "
        f"{versions} · {seeds} seeds · `python -m benchmarks.quality_merge {multitask}--write` "
        "(`make quality-merge`)"
    )


def _introduction() -> str:
    sizes = Sizes()
    words = [f"*{name}*: {_uncapitalised(task.__doc__ or '')}" for name, task in TASKS.items()]
    return "\n\n".join(
        [
            paragraph(
                f"The base is all-MiniLM-L6-v2 (`{encoder.PACKAGE}` on PyPI), a sentence encoder of 22M parameters. "
                f"The {len(TASKS)} tasks are made of text that Debian packages carry, snippets of at most "
                f"{encoder.TOKENS_MAX} tokens, {sizes.train} to learn from, {sizes.validation} for validation and "
                f"{sizes.test} for the test, balanced; no page, file or source package is in two splits."
            ),
            "\n".join(f"* {each}" for each in words),
            paragraph(
                "Each task's head is logistic regression on the untouched encoder and is frozen: *untouched* below is "
                "that encoder with these heads. An expert is trained on one task,",
                f"all weights (rate {encoder.RATES['full']:g}) or a LoRA of rank {encoder.LORA_RANK} on all linear "
                f"layers (rate {encoder.RATES['lora']:g}, A drawn anew for each),",
                f"{encoder.EPOCHS} epochs of AdamW, batches of {encoder.BATCH_SIZE}. The experts are merged by the "
                "functions of `weft merge`, and the result is tested on every task.",
            ),
            paragraph(
                "Not in the tables: `fisher`, since no directory carries a Fisher (workers of a run send it); `krum`, "
                "`multi_krum`, `bulyan`, `trimmed_mean` and `centred_clipping`, which among four honest experts have "
                "nothing to guard against (see [robustness.md](robustness.md)); `negation`, which takes a skill away.",
            ),
            paragraph(
                "*Normalised* is the average over tasks of accuracy / that task's expert's accuracy, in percent. *As "
                "it comes*: the rule's defaults. *Scale tuned*: the merged movement times that of",
                f"{', '.join(f'{scale:g}' for scale in SCALES)} which is best on the validation splits; *scales*: what "
                "was chosen, seed by seed. *Of the gain*: tuned, how much of what experts gain over the untouched "
                "encoder is left. ± is half of a 95 % t interval over seeds, which draw the splits, the order of the "
                "examples and the A's anew; the last column is paired by seed. Tests multiply in bfloat16.",
            ),
        ]
    )


def _uncapitalised(text: str) -> str:
    return text[:1].lower() + text[1:]


def write_page(results: Sequence[Result]) -> str:
    """The whole page."""
    found = by_arm(results)
    parts = ["# Which merge rule, on a real encoder", _setting(found), _introduction()]
    guide = [line for kind in encoder.KINDS for line in _guide(found, kind)] + _guide_to_modes(found)
    parts += ["## Guide", "What follows from the tables below, and no more:", "\n".join(map(_wrapped, guide))]
    for kind in encoder.KINDS:
        parts += [f"## {_TITLES[kind]}", _references(found, kind), _rules(found, kind)]
    parts += ["## Two experts", _pairs(found)]
    return "\n\n".join(parts) + "\n"
