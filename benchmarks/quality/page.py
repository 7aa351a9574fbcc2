"""docs/results/dipaco.md, from the results of the arms."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.lib.machine import memory_gb, processor
from benchmarks.quality import arms, campaign
from benchmarks.quality.arms import ABLATION, CORPUS, FULL, LORA_ARMS, SMALL_DOCUMENTS
from benchmarks.quality.checks import (
    ABLATION_CHECKS,
    FULL_CHECKS,
    LORA_CHECKS,
    Check,
    Measured,
    Results,
    gap_closed,
    interval,
    measure,
    seeds_of,
)
from benchmarks.quality.codecs import CODECS, INNER_STEPS, codec_name

from weft.common.modules import Kind

REMARKS = Path(__file__).with_name("remarks.json")
"""What a person has to say about a check's outcome, by its number and claim."""
TEXT_RESULT = "real_text.md"
"""Name of the last run on real text, in the cache and, once written, beside the page."""

DESCRIPTIONS = {
    "dense": "one model, all documents",
    "diloco": "16 replicas of it, shuffled shards, Nesterov",
    "given": "4×4, shards are the true domains",
    "kmeans": "4×4, k-means",
    "product": "4×4, product k-means",
    "discriminative": "4×4, k-means for a quarter of the rounds, then discriminative",
    "random": "4×4, random routing",
    "flat": "16 separate paths, true domains",
    "small-grid": f"4×4, {SMALL_DOCUMENTS} documents a domain",
    "small-flat": f"16 separate paths, {SMALL_DOCUMENTS} documents a domain",
    "averaging": "4×4, plain averages (outer SGD of rate 1)",
    "adam": "4×4, outer FedAdam as it comes, no rescaling",
    "factors": "4×4, plain averages of the factors A and B",
    "averaging-dropped": "4×4, plain averages, half of the updates lost",
    "averaging-diloco": "16 replicas, shuffled shards, plain averages",
    "every-step": "4×4, averaged after every step",
    "dropped": "4×4, half of the updates lost",
    "one-domain-dense": "one domain: one model",
    "one-domain-diloco": "one domain: 16 replicas",
    "one-domain-grid": "one domain: 4×4, random routing",
}
"""What the arms are, without ``lora-`` before their names."""


def write_page(results: Results, cache: Path, *, load_before: float) -> str:
    """The whole page."""
    return (
        "\n\n".join(
            part
            for part in (
                "# DiPaCo's findings, tried again",
                _setting(load_before),
                _introduction(results),
                "## The checks, kind `full`",
                *_checks(FULL_CHECKS, results),
                "## √paths, weights, RDA",
                _ABLATION_WORDS,
                *_checks(ABLATION_CHECKS, results),
                _arms({"given": FULL["given"], **ABLATION}, results),
                "## LoRA modules over a frozen base",
                _LORA_WORDS,
                *_checks(LORA_CHECKS, results),
                _arms(LORA_ARMS, results),
                "## All arms, kind `full`",
                _arms(FULL, results),
                _rerouting(results),
                "## Loss against bytes sent",
                _CODEC_WORDS,
                _codecs(results),
                paragraph(_remarks().get("codecs", "")),
                _FACTS,
                "## Real text",
                _real_text(cache),
            )
            if part
        )
        + "\n"
    )


def _setting(load_before: float) -> str:
    packages = ("weft", "torch", "transformers", "peft", "scikit-learn")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    command = " ".join(["python -m benchmarks.quality", *sys.argv[1:]])
    return (
        f"{datetime.now(UTC):%Y-%m-%d} · {os.cpu_count()} cores, {processor()}, {memory_gb():.0f} GB memory · "
        f"load average {load_before:.1f} before and {os.getloadavg()[0]:.1f} after, other work included · "
        f"Python {platform.python_version()}, {versions} · `{command}` (`make quality-dipaco`)"
    )


def paragraph(*sentences: str) -> str:
    """Sentences as one paragraph, wrapped."""
    return textwrap.fill(" ".join(sentences), 119, break_on_hyphens=False, break_long_words=False)


def _introduction(results: Results) -> str:
    dense = [result for (name, _), result in results.items() if name == "dense"]
    floor, inferred = (
        statistics.mean(result[key] for result in dense) for key in ("floor", "floor_inferred")
    )
    cpu_s = sum(result["cpu_s"] for result in results.values())
    inner, grid = arms.Arm().inner, f"{CORPUS.num_vocabularies} vocabularies × {CORPUS.num_grammars} grammars"
    return "\n\n".join(
        (
            paragraph(
                f"The corpus has {CORPUS.num_domains} domains, {grid}: hidden Markov sources of {CORPUS.num_states}",
                f"states over the same {CORPUS.num_tokens} tokens. Documents have {CORPUS.length} tokens, of which",
                f"the first {CORPUS.prefix} are read and neither learnt nor counted, in all arms. The entropy floor",
                "is known exactly (forward algorithm, on the very documents that are evaluated):",
                f"{floor:.3f} nats a token knowing the domain, {inferred:.3f} inferring it from the prefix, which",
                f"therefore tells it. Loss is nats a token on {campaign.HELDOUT_DOCUMENTS} unseen documents of each",
                "domain; the gap is what lies between the pre-trained base's loss and the floor.",
            ),
            paragraph(
                "Learning, merging, routing and encoding are Weft's own: the worker's trainer, the merge engine, the",
                "outer optimisers, `weft.common.routing`, the update files. Only the loop over paths is the",
                "benchmark's. The model is a Llama of two blocks, width 48, of which the blocks (46,272 weights) are",
                f"trained and sent, pre-trained for {arms.PRETRAINING_STEPS} steps on all domains. Every path then",
                f"makes {arms.STEPS} steps of {arms.BATCH_SIZE} documents (AdamW, rate {inner.learning_rate:g},",
                f"cosine), merged every {inner.steps} steps with Nesterov 0.7/0.9, √paths and weights by shard,",
                "unless the arm says otherwise. The largest domain has three times the documents of the smallest,",
                f"{CORPUS.documents} on average. Rates, width and the corpus were chosen on seed 0, before the",
                "campaign.",
            ),
            paragraph(
                "Differences are paired by seed: mean and 95 % t interval over seeds. *Confirmed*: the interval lies",
                "on the expected side, or within ±0.05 nats (5 % of perplexity) where no difference is expected;",
                "*not shown*: it allows both; *opposite*: it lies on the other side.",
                f"{len(results)} arms, {cpu_s / 60:.0f} minutes of one (shared) core.",
            ),
        )
    )


def _checks(checks: Sequence[Check], results: Results) -> Iterator[str]:
    remarks = _remarks()
    rows: list[Sequence[str]] = []
    notes: list[str] = []
    for check in checks:
        measured = measure(check, results)
        if measured is None:
            continue
        note = remarks.get(f"{check.number}: {check.claim}")
        if note and measured.verdict != "confirmed":
            notes.append(f"- **{check.number}** {note}")
        rows.append(_row(measured))
    yield table(
        ("#", "check", "found by", "expected", "difference, nats a token", "seeds", "verdict"),
        ("--:", "---", "---", "---", "--:", "--:", "---"),
        rows,
    )
    if notes:
        yield "\n".join(notes)


def _remarks() -> Mapping[str, str]:
    found: dict[str, str] = json.loads(REMARKS.read_text())
    return found


def _row(measured: Measured) -> Sequence[str]:
    check = measured.check
    return (
        check.number,
        check.claim,
        check.source,
        check.expected.value,
        f"{measured.mean:+.4f} ± {measured.half_width:.4f}",
        str(measured.num_seeds),
        f"**{measured.verdict}**",
    )


def table(heads: Sequence[str], rules: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, rules, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _arms(named: Iterable[str], results: Results) -> str:
    rows = []
    for name in named:
        found = [results[name, seed] for seed in seeds_of(results, name)]
        if found:
            mean, half_width = interval([result["loss"] for result in found])
            closed = statistics.mean(map(gap_closed, found))
            routed = statistics.mean(result["agreement"] for result in found)
            words = DESCRIPTIONS.get(name.removeprefix("lora-"), "4×4, " + name.removeprefix("lora-"))
            rows.append(
                (
                    f"`{name}`",
                    words,
                    f"{mean:.4f} ± {half_width:.4f}" if math.isfinite(half_width) else f"{mean:.4f}",
                    f"{closed:.0%}",
                    f"{routed:.0%}" if words.startswith("4×4") and "one" not in name else "·",
                    str(len(found)),
                )
            )
    return table(
        ("arm", "what", "loss", "gap closed", "routed as the domains", "seeds"),
        ("---", "---", "---", "--:", "--:", "--:"),
        rows,
    )


def _rerouting(results: Results) -> str:
    rows = []
    for key, words in (("reroute", "drifting"), ("reroute_still", "of one domain")):
        found = [results["discriminative", seed][key] for seed in seeds_of(results, "discriminative")]
        if found:
            rows.append(
                (
                    words,
                    *(
                        f"{statistics.mean(each[str(every)] for each in found):.4f}"
                        for every in campaign.REROUTE_TOKENS
                    ),
                )
            )
    heads = ("documents", *(f"every {every}" if every != 64 else "once" for every in campaign.REROUTE_TOKENS))
    rendered = table(heads, ("---", *("--:" for _ in campaign.REROUTE_TOKENS)), rows)
    return (
        "Re-routing, by the 32 tokens before, every so many tokens. Drifting documents draw a new domain with "
        f"probability 1/{round(1 / campaign.CHANGE)} after each token; no arm was trained on such.\n\n{rendered}"
    )


def _codecs(results: Results) -> str:
    rows = []
    for codec in CODECS:
        for feedback in (False, True):
            cells = [
                _codec_cells(results, codec_name(codec, steps, feedback=feedback)) for steps in INNER_STEPS
            ]
            if any(cells):
                rows.append(
                    (
                        codec,
                        "yes" if feedback else "no",
                        *(cell for pair in cells for cell in pair or ("·", "·", "·")),
                    )
                )
    heads = ["codec", "feedback"]
    for steps in INNER_STEPS:
        heads += [f"H = {steps}: bytes sent", "bits a parameter", "loss − fp32"]
    return table(heads, ("---", "---", *("--:" for _ in heads[2:])), rows)


def _codec_cells(results: Results, name: str) -> tuple[str, str, str] | None:
    found = seeds_of(results, name)
    if not found:
        return None
    steps = int(name.rpartition("=")[2])
    exact = codec_name("fp32", steps, feedback=False)
    differences = [results[name, seed]["loss"] - results[exact, seed]["loss"] for seed in found]
    sent = statistics.mean(results[name, seed]["bytes_per_worker"] for seed in found)
    parameters = results[name, found[0]]["num_parameters"]
    bits = 8 * sent / (parameters * (arms.STEPS // steps))
    loss = statistics.mean(results[name, seed]["loss"] for seed in found)
    shown = f"{statistics.mean(differences):+.4f}" if name != exact else f"loss {loss:.4f}"
    return f"{sent / 1e3:,.0f} kB", f"{bits:.2f}", shown


def _real_text(cache: Path) -> str:
    for folder in (cache, Path(__file__).parent):
        if (folder / TEXT_RESULT).exists():
            found = (folder / TEXT_RESULT).read_text().strip()
            return f"{found}\n\n{paragraph(_remarks().get('real text', ''))}"
    return "`make quality-text` has not been run here."


_ABLATION_WORDS = paragraph(
    "Nobody has published these. The mean over P paths of movements that are nearly orthogonal is √P times shorter",
    "than one of them; DiPaCo multiplies it by √P, RDA makes it as long as the mean movement. Four paths go through",
    "a module here. Arm `given` is weights by shard with √paths.",
)
_LORA_WORDS = paragraph(
    f"The same with rank {arms.LORA.rank} on all linear layers (13,056 parameters a path) and rate",
    f"{arms.LEARNING_RATE[Kind.LORA]:g}; nobody has published DiPaCo with LoRA modules. Nesterov and rescaling",
    "merge the factors apart, averaging merges ΔW = BA exactly and recompresses it.",
)
_CODEC_WORDS = paragraph(
    "DiLoCo with four workers on one model, Nesterov 0.7/0.9: bytes that one worker sends in the whole run, files",
    "with their headers, after the lossless stage. The module is small (46,272 parameters), so headers weigh more",
    "than they would.",
)
_FACTS = """What the family reports, for comparison:

| fact | value | source |
|---|---|---|
| fp16 outer gradients | lossless up to 1.1B | OpenDiLoCo |
| int8 outer gradients | no effect on the loss curves | PRIME |
| fp4 (E3M0) outer gradients | no regression up to 4B | Streaming DiLoCo, table 1 |
| int4, 2 bits, 1 bit without error feedback | +0.09 %, +32 %, +83 % loss | Decoupled DiLoCo |
| 2 bits with error feedback, Muon inside | next to no degradation | MuLoCo |
| top-k 1 to 3 % with 2 bits and feedback | beats dense DiLoCo | SparseLoCo |
| top-k, random drop without feedback | significantly worse than low precision | Streaming DiLoCo, figure 11 |
| H = 1000 against 50 | +2.9 % | DiLoCo |"""
