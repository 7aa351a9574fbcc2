"""The parts of the merging benchmark that need no download: examples from text, splits, arms, the page's figures."""

from __future__ import annotations

from collections import Counter

import pytest
from benchmarks.quality_merge import page
from benchmarks.quality_merge.arms import Arm, arms
from benchmarks.quality_merge.campaign import EXPERT, FLOOR, Result
from benchmarks.quality_merge.tasks import (
    TASKS,
    WORDS_MAX,
    Example,
    Sizes,
    code_snippets,
    largest_classes,
    make_task,
    paragraphs,
    snippets,
)

from weft.server.offline.recipe import merge_settings

SIZES = Sizes(train=40, validation=12, test=20)


def _examples(num_groups: int = 60, labels: str = "ab") -> list[Example]:
    return [
        Example(f"{label} {group} {number}", label, f"page {group}")
        for group in range(num_groups)
        for label in labels
        for number in range(3)
    ]


def test_roff_becomes_prose() -> None:
    roff = (
        '.TH LS 1\nls \\- list\n\\fBdirectory\\fR \\(aqcontents\\(aq\n.\\" nobody reads this\nIt\\&s end.\n'
    )
    assert [text for text in paragraphs(roff) if text] == ["ls - list directory 'contents'", "Its end."]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("one two three", []),
        ("0x0001 0x0002 0x0003 0x0004 0x0005 0x0006 0x0007 0x0008", []),
        ("all of these are words and there are enough", ["all of these are words and there are enough"]),
        ("word " * 40, [" ".join(["word"] * WORDS_MAX)]),
    ],
    ids=["short", "numbers", "prose", "cut"],
)
def test_snippets_are_prose_of_some_length(text: str, found: list[str]) -> None:
    assert list(snippets(iter([text]))) == found


def test_code_snippets_leave_comments_out() -> None:
    source = "\n".join(f"# remark {i}\nvalue_{i} = compute({i})\n\n" for i in range(60))
    found = list(code_snippets(source))
    assert found[0] == "value_8 = compute(8) value_9 = compute(9) value_10 = compute(10)"
    assert not any("remark" in text for text in found)


def test_splits_share_no_group_and_no_text() -> None:
    task = make_task("any", _examples(), SIZES, seed=0)
    groups = {split: {text.split()[1] for text, _ in examples} for split, examples in task.splits.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["train"] & groups["validation"]
    assert not groups["validation"] & groups["test"]
    texts = [text for examples in task.splits.values() for text, _ in examples]
    assert len(texts) == len(set(texts)) == 40 + 12 + 20


def test_classes_are_balanced_and_named_by_the_head() -> None:
    task = make_task("any", _examples(200) + _examples(300, labels="c"), SIZES, seed=0)
    assert task.labels == ("a", "b", "c")
    assert set(Counter(label for _, label in task.splits["train"]).values()) == {14}
    assert all(task.labels[label] == text[0] for text, label in task.splits["test"])


def test_seeds_draw_different_splits_and_the_same_seed_the_same() -> None:
    drawn = [make_task("any", _examples(), SIZES, seed=seed).splits for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_too_few_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="only"):
        make_task("any", _examples(), Sizes(train=600, validation=12, test=20), seed=0)


def test_small_classes_are_left_out() -> None:
    examples = _examples(60) + _examples(10, labels="z")
    assert largest_classes(examples) == ("a", "b")


def test_every_arm_is_a_merge_that_can_be_asked_for() -> None:
    found = list(arms())
    assert len({(arm.kind, arm.name) for arm in found}) == len(found)
    for arm in found:
        assert merge_settings(arm.rule, arm.parameters).rule == arm.rule
        assert set(arm.tasks) <= set(TASKS)


def test_options_are_what_a_person_types() -> None:
    arm = Arm(name="x", kind="lora", rule="ties", parameters={"density": 0.5}, lora="dense", rank=16)
    assert arm.options == "--rule ties --param density=0.5 --lora dense --rank 16"


def test_figures_by_hand() -> None:
    experts, floor, reached = {"a": 0.8, "b": 0.5}, {"a": 0.6, "b": 0.4}, {"a": 0.7, "b": 0.5}
    assert page.normalised(reached, experts) == pytest.approx(100 * (0.7 / 0.8 + 1) / 2)
    assert page.gain(reached, experts, floor) == pytest.approx(100 * 0.2 / 0.3)


def _result(kind: str, arm: str, seed: int, value: float) -> Result:
    reached = dict.fromkeys(TASKS, value + 0.01 * seed)
    return Result(arm=arm, kind=kind, seed=seed, default=reached, tuned=reached, scale=2.0)


def test_page_ranks_rules_and_compares_them_with_the_mean_of_their_seed() -> None:
    values = {EXPERT: 0.9, FLOOR: 0.5, "mean": 0.6, "ties": 0.7}
    results = [
        _result(kind, arm, seed, value)
        for kind in ("full", "lora")
        for arm, value in values.items()
        for seed in range(3)
    ]
    text = page.write_page(results)
    rows = [line for line in text.splitlines() if line.startswith(("| `ties`", "| `mean`"))]
    assert [row.split("`")[1] for row in rows] == ["ties", "mean"] * 2
    assert "| 2 2 2 | 50 % | +11.0 ± 0.3 |" in rows[0]


def test_guide_follows_from_the_figures() -> None:
    values = {EXPERT: 0.9, FLOOR: 0.5, "mean": 0.6, "ties": 0.7, "dare": 0.6, "slerp code+archive": 0.4}
    values["mean code+archive"] = 0.5
    results = [
        _result("full", arm, seed, value + (0.001 * seed if arm == "dare" else 0))
        for arm, value in values.items()
        for seed in range(3)
    ] + [_result("lora", arm, 0, value) for arm, value in values.items()]
    guide = page.write_page(results).split("no more:")[1].split("##")[0]
    lines = [" ".join(line.split()) for line in guide.strip().split("\n* ")]
    assert "`ties` (78.0)" in lines[0]
    assert "above, `ties`; below, none" in lines[3]
    assert "above, none; below, none" in lines[7], "one seed tells nothing apart"
    assert "`slerp` is -11.0" in lines[8]
