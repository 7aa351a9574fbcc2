"""Real text, once: manual pages in eight languages, a 2×4 grid, against a dense model and DiLoCo of eight.

    python -m benchmarks.quality.real_text [--packages DIR]

The pages are those of Debian's packages, fetched with ``apt-get download`` unless DIR already has them. A *document*
is 128 tokens of a page; its first 32 are read and neither learnt nor counted, as on the synthetic corpus. Whole pages
are held out, and a page's translations with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from benchmarks.quality.arms import Arm, Routing
from benchmarks.quality.base import Shape, pretrain, pretraining, write_random_base
from benchmarks.quality.campaign import Material, Run
from benchmarks.quality.corpus import Documents
from benchmarks.quality.page import TEXT_RESULT, paragraph, table

from weft.client.data import TokenDataset
from weft.common.evaluation import Evaluation, paired_difference
from weft.common.recipe import InnerSettings, Schedule, TaskSettings
from weft.server.merge.settings import Rescale
from weft.server.outer import OuterName, OuterSettings

PACKAGES: Final = {
    "en": "manpages-dev",
    "de": "manpages-de",
    "fr": "manpages-fr",
    "es": "manpages-es",
    "it": "manpages-it",
    "pl": "manpages-pl",
    "ja": "manpages-ja",
    "zh_CN": "manpages-zh",
}
"""By language, as below /usr/share/man."""
LENGTH, PREFIX, VOCABULARY = 128, 32, 1024
TRAIN, HELDOUT, RESERVED = 2000, 100, 40
"""Documents of each language, at most."""
STEPS, INNER_STEPS, BATCH_SIZE, RATE = 288, 12, 4, 3e-3
PRETRAINING_STEPS: Final = 96
SHAPE: Final = Shape(hidden_size=96, intermediate_size=192, num_blocks=4, initial_std=0.08)
_HELDOUT_OF_256, _RESERVED_OF_256 = 26, 42
_NESTEROV: Final = OuterSettings(name=OuterName.NESTEROV)
_SGD: Final = OuterSettings(name=OuterName.SGD)

ARMS: Final[Mapping[str, tuple[str, Arm]]] = {
    "dense": ("one model of a path's size", Arm(experts=(1,), shards=1, outer=_SGD, rescale=Rescale.NONE)),
    "diloco": (
        "8 replicas of it, shuffled",
        Arm(experts=(1,), shards=8, outer=_NESTEROV, rescale=Rescale.NONE),
    ),
    "random": ("2×4, random routing", Arm(experts=(2, 4), routing=Routing.RANDOM)),
    "kmeans": ("2×4, k-means", Arm(experts=(2, 4), routing=Routing.KMEANS)),
    "discriminative": ("2×4, then discriminative", Arm(experts=(2, 4), routing=Routing.DISCRIMINATIVE)),
    "given": ("2×4, by language", Arm(experts=(2, 4), routing=Routing.GIVEN)),
}
"""By name, with words for the table."""


@dataclass(frozen=True, slots=True)
class Page:
    """A manual page."""

    name: str
    language: int
    text: str

    @property
    def draw(self) -> int:
        """0 to 255, the same for all translations of a page."""
        return hashlib.blake2b(self.name.encode(), digest_size=1).digest()[0]


def fetch(packages: Path) -> None:
    """Download what is not there."""
    packages.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES.values() if not [*packages.glob(f"{package}_*.deb")]]
    if missing:
        subprocess.run(["apt-get", "download", "-q", *missing], cwd=packages, check=True)


def read_pages(packages: Path) -> Iterator[Page]:
    """All pages of all languages, in the order of their names."""
    for index, (language, package) in enumerate(PACKAGES.items()):
        (deb,) = packages.glob(f"{package}_*.deb")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "--extract", deb, folder], check=True)
            root = Path(folder) / "usr" / "share" / "man"
            for file in sorted((root if language == "en" else root / language).glob("man*/*.gz")):
                if not file.is_symlink():
                    yield Page(file.stem, index, plain_text(gzip.decompress(file.read_bytes())))


def plain_text(source: bytes) -> str:
    """A page without its typesetting; empty when it only refers to another page."""
    lines = []
    for line in source.decode("utf-8", "replace").splitlines():
        if line.startswith(("'", '.\\"', ".so")):
            continue
        macro = re.match(r"\.\s*(SH|SS|B|I|BR|IR|RB|RI|BI|IB|TP|IP)?\b\s*(.*)", line)
        text = line if macro is None else macro[2] if macro[1] else ""
        text = re.sub(r"\\f(\[\w*\]|\(..|.)", "", text)
        text = re.sub(r"\\(\(..|\[[^\]]*\]|[&:%|^/,]|.)", lambda found: "-" if found[1] == "-" else "", text)
        if text.strip():
            lines.append(text.replace('"', "").strip())
    return "\n".join(lines)


def make_tokenizer(pages: Sequence[Page]) -> Any:
    """A byte-level BPE of equal parts of all languages."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        "\n".join(page.text for page in pages if page.language == index) for index in range(len(PACKAGES))
    ]
    tokenizer.train_from_iterator([text[:100_000] for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")  # noqa: S106


def cut(pages: Sequence[Page], tokenizer: Any, documents: int, seed: int) -> Documents:
    """Documents of the pages, at most so many of each language, drawn at random."""
    rng, rows, languages = np.random.default_rng(seed), [], []
    for language in range(len(PACKAGES)):
        found = []
        for page in pages:
            if page.language == language:
                ids = tokenizer(page.text)["input_ids"]
                found += [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
        chosen = rng.permutation(len(found))[:documents]
        rows += [found[index] for index in chosen]
        languages += [language] * len(chosen)
    return Documents(np.array(rows, np.int64), np.array(languages, np.int64))


def material_of(pages: Sequence[Page], tokenizer: Any) -> Material:
    """Documents of the three splits."""
    heldout = [page for page in pages if page.draw < _HELDOUT_OF_256]
    reserved = [page for page in pages if _HELDOUT_OF_256 <= page.draw < _RESERVED_OF_256]
    train = [page for page in pages if page.draw >= _RESERVED_OF_256]
    return Material(
        train=cut(train, tokenizer, TRAIN, 1),
        heldout=cut(heldout, tokenizer, HELDOUT, 2),
        reserved=cut(reserved, tokenizer, RESERVED, 3),
        prefix=PREFIX,
    )


def make_base(folder: Path, pages: Sequence[Page], seed: int) -> tuple[Path, Material]:
    """A base pre-trained on all languages, and the documents."""
    tokenizer = make_tokenizer([page for page in pages if page.draw >= _RESERVED_OF_256])
    material = material_of(pages, tokenizer)
    write_random_base(folder / "random", tokenizer, SHAPE, positions=2 * LENGTH, seed=seed)
    sequences = material.train.sequences(PREFIX)
    data = TokenDataset(sequences, seed=seed, worker="pretrain", batch_size=BATCH_SIZE)
    inner = pretraining(BATCH_SIZE, PRETRAINING_STEPS, learning_rate=RATE, seed=seed)
    pretrain(folder / "random", folder / "pretrained", data, inner, TaskSettings())
    return folder / "pretrained", material


def train(arm: Arm, base: Path, material: Material, seed: int) -> tuple[dict[str, Any], Evaluation]:
    """One arm: what it came to, and its losses document by document."""
    alone = arm.shards == 1
    inner = InnerSettings(
        steps=STEPS if alone else INNER_STEPS,
        batch_size=BATCH_SIZE,
        learning_rate=RATE,
        schedule=Schedule.COSINE,
        warmup_steps=10,
        beta2=0.99,
        seed=seed,
    )
    run = Run(arm, material, base, inner, num_rounds=1 if alone else STEPS // INNER_STEPS)
    begin_s = time.process_time()
    found = run.result()
    return found | {"cpu_s": time.process_time() - begin_s}, run.heldout()


def by_language(evaluation: Evaluation, languages: np.ndarray[Any, Any]) -> list[str]:
    """Nats a token in each language."""
    return [
        f"{evaluation.losses[languages == index].sum() / evaluation.num_labels[languages == index].sum():.3f}"
        for index in range(len(PACKAGES))
    ]


def report(found: Mapping[str, tuple[dict[str, Any], Evaluation]], material: Material) -> str:
    """The page's section."""
    rows, dense = [], found["dense"][1]
    for name, (result, evaluation) in found.items():
        difference, half_width = paired_difference(dense, evaluation)
        rows.append(
            (
                f"`{name}`",
                ARMS[name][0],
                f"{result['loss']:.4f}",
                f"{difference:+.4f} ± {half_width:.4f}" if name != "dense" else "·",
                f"{result['agreement']:.0%}" if len(result["traffic"]) > 1 else "·",
                *by_language(evaluation, material.heldout.domains_N),
            )
        )
    counts = np.bincount(material.train.domains_N, minlength=len(PACKAGES)).tolist()
    before = found["dense"][0]["loss_before"]
    against, half_width = paired_difference(found["diloco"][1], found["discriminative"][1])
    heads = ("arm", "what", "loss", "less dense's", "routed as languages", *PACKAGES)
    listed = ", ".join(f"{count:,} {name}" for name, count in zip(PACKAGES, counts, strict=True))
    return "\n\n".join(
        (
            paragraph(
                f"Manual pages of Debian's packages in eight languages: {listed} documents of {LENGTH} tokens to train",
                f"on (byte-level BPE of {VOCABULARY} tokens), {len(material.heldout)} of other pages held out. A Llama",
                f"of four blocks, width {SHAPE.hidden_size}, pre-trained for {PRETRAINING_STEPS} steps on all (loss",
                f"{before:.3f}); then {STEPS} steps of {BATCH_SIZE} documents a path, merged every {INNER_STEPS}, else",
                "as above. One seed: intervals are over held-out documents, and say nothing of how another seed would",
                "come out. `make quality-text`.",
            ),
            table(heads, ("---", "---", *("--:" for _ in heads[2:])), rows),
            paragraph(
                "2×4 with discriminative routing less DiLoCo of eight, with as many tokens:",
                f"{against:+.4f} ± {half_width:.4f} nats a token.",
            ),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--packages", type=Path, default=Path("build/quality/packages"), help="where .deb files are"
    )
    parser.add_argument("--cache", type=Path, default=Path("build/quality"), help="where the result goes")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fetch(arguments.packages)
    pages = [page for page in read_pages(arguments.packages) if page.text]
    with tempfile.TemporaryDirectory() as folder:
        base, material = make_base(Path(folder), pages, arguments.seed)
        found = {}
        for name, (_, arm) in ARMS.items():
            inner_arm = dataclasses.replace(arm, inner_steps=INNER_STEPS)
            found[name] = train(inner_arm, base, material, arguments.seed)
            result = found[name][0]
            print(
                f"{name}: {result['loss']:.4f} in {result['cpu_s']:.0f} s, traffic {result['traffic']}",
                flush=True,
            )
    arguments.cache.mkdir(parents=True, exist_ok=True)
    (arguments.cache / TEXT_RESULT).write_text(report(found, material))


if __name__ == "__main__":
    main()
