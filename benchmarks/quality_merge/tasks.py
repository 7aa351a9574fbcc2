"""Four classification tasks on text that Debian's packages carry, and nothing between them in common but the encoder.

Each is a function from packages to examples; an example knows its *group* (a page, a file, a source package), and
no group is in two splits. Texts are snippets of some twenty words, so that a class has to be told from little.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

WORDS_MIN, WORDS_MAX = 7, 18
"""Words of a snippet of prose."""
GROUP_MAX: Final = 6
"""Examples of one page or file, at most."""
CLASSES_MAX, CLASS_MIN = 10, 150
"""Classes of a task, and examples of a class."""

LANGUAGES: Final = (
    *("cs", "da", "de", "es", "fi", "fr", "hu", "id", "it", "nb", "nl", "pl", "pt-br", "ro", "sv"),
)
PAGES: Final = (
    *(
        "manpages",
        "manpages-dev",
        "coreutils",
        "util-linux",
        "iproute2",
        "e2fsprogs",
        "procps",
        "mount",
        "passwd",
    ),
    *("login", "bsdutils", "btrfs-progs", "xfsprogs", "nfs-common", "git-man", "samba-common-bin"),
)
SOURCES: Final[Mapping[str, tuple[str, Sequence[str]]]] = {
    "c": (".h", ["libc6-dev"]),
    "python": (".py", ["python3-docutils", "python3-twisted"]),
    "perl": (".pm", ["perl-modules-5.36", "lintian", "debhelper"]),
    "ruby": (".rb", ["libruby3.1"]),
    "javascript": (".js", ["npm"]),
    "go": (".go", ["golang-golang-x-tools-dev"]),
    "rust": (".rs", ["librust-syn-dev", "librust-regex-dev", "librust-clap-dev", "librust-tokio-dev"]),
    "php": (".php", ["php-symfony-http-kernel", "php-symfony-console", "php-twig"]),
    "lua": (".lua", ["prosody"]),
    "tcl": (".tcl", ["tcllib"]),
}
"""Programming language → ending of its files, packages."""
SECTIONS: Final = frozenset(
    {"admin", "doc", "games", "graphics", "mail", "math", "net", "science", "sound", "web"}
)
"""Of packages, as Debian's archive has them."""


@dataclass(frozen=True, slots=True)
class Example:
    """A text, its class, and what must not be in two splits with it."""

    text: str
    label: str
    group: str


Files = Iterator[tuple[str, str]]
"""Name and text of each file of a package."""


def fetch(names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Download what is not there yet with ``apt-get download``; packages by name."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not list(folder.glob(f"{name}_*.deb"))]
    if missing:
        print(f"downloading {len(missing)} Debian packages: {' '.join(missing)}", flush=True)
        subprocess.run(["apt-get", "download", *missing], cwd=folder, check=True, capture_output=True)
    return {name: next(iter(folder.glob(f"{name}_*.deb"))) for name in names}


def package_names() -> list[str]:
    """All that the tasks read."""
    sources = [name for _, names in SOURCES.values() for name in names]
    pages = [f"manpages-{language}" for language in LANGUAGES]
    return sorted({*pages, *PAGES, *sources})


def files_of(package: Path, wanted: str) -> Files:
    """Regular files of a package whose names match a pattern somewhere, gunzipped, as text."""
    unpacked = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE)
    assert unpacked.stdout is not None
    with unpacked.stdout, tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive:
        for member in archive:
            content = (
                archive.extractfile(member) if member.isreg() and re.search(wanted, member.name) else None
            )
            if content is not None:
                raw = content.read()
                data = gzip.decompress(raw) if member.name.endswith(".gz") else raw
                yield member.name, data.decode("utf-8", errors="replace")
    if unpacked.wait():
        raise RuntimeError(f"dpkg-deb cannot read {package}")


_REQUEST: Final = re.compile(r"^[.'].*$", re.MULTILINE)
_ESCAPE: Final = re.compile(r"\\f(?:\(..|\[[^\]]*\]|.)|\\[&/,|^:%]|\\s[-+]?\d")
_CHARACTERS: Final = {
    r"\-": "-",
    r"\(aq": "'",
    r"\(dq": '"',
    r"\(co": "©",
    r"\e": "\\",
    r"\ ": " ",
    r"\~": " ",
}
_ROFF_LEFT: Final = re.compile(r"\\(?:\(..|\[[^\]]*\]|\*?\(..|.)")


def paragraphs(roff: str) -> Iterator[str]:
    """Prose of a manual page: what stands between requests, without escapes."""
    text = _ESCAPE.sub("", roff)
    for escape, character in _CHARACTERS.items():
        text = text.replace(escape, character)
    text = _ROFF_LEFT.sub("", text)
    for block in _REQUEST.sub("\n\n", text).split("\n\n"):
        yield " ".join(block.split())


def snippets(texts: Iterator[str]) -> Iterator[str]:
    """The beginnings of texts that are long enough and mostly letters."""
    for text in texts:
        words = text.split()[:WORDS_MAX]
        found = " ".join(words)
        letters = sum(character.isalpha() or character == " " for character in found)
        if len(words) >= WORDS_MIN and letters >= 0.85 * len(found):
            yield found


def page_language(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Which language a manual page is written in: ten in Latin script."""
    for language in LANGUAGES:
        for name, roff in files_of(packages[f"manpages-{language}"], "/man/"):
            page = name.rsplit("/", 1)[-1]
            for text in list(snippets(paragraphs(roff)))[:GROUP_MAX]:
                yield Example(text, language, page)


def page_section(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Which section of the manual an English page is in: commands, calls, functions, formats and so on."""
    english = r"^\./usr/share/man/man\d/[^/]+\.(\d)\w*\.gz$"
    for package in PAGES:
        for name, roff in files_of(packages[package], english):
            section = re.sub(english, r"\1", name)
            for text in list(snippets(paragraphs(roff)))[:GROUP_MAX]:
                yield Example(text, section, name.rsplit("/", 1)[-1])


def code_snippets(source: str, num_lines: int = 3) -> Iterator[str]:
    """Every so often a few lines of code in a row; comments and lines of almost nothing are left out."""
    lines = [line.strip() for line in source.splitlines()]
    code = [line for line in lines if len(line) > 8 and not re.match(r"#|//|/\*|\*|--|=|;|\"\"\"", line)]
    for start in range(8, len(code) - num_lines, 40):
        text = " ".join(code[start : start + num_lines])
        if 40 <= len(text) <= 240:
            yield text


def source_language(packages: Mapping[str, Path]) -> Iterator[Example]:
    """Which programming language three lines are written in."""
    for language, (ending, names) in SOURCES.items():
        for package in names:
            for name, source in files_of(packages[package], rf"\{ending}$"):
                for text in list(code_snippets(source))[:GROUP_MAX]:
                    yield Example(text, language, f"{package}/{name}")


def package_section(_: Mapping[str, Path]) -> Iterator[Example]:
    """Which section of the archive a package is in, by its line of description; apt's own lists have them."""
    listing = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    for stanza in listing.split("\n\n"):
        fields: dict[str, str] = dict(
            re.findall(r"^(Package|Source|Section|Description): (.*)$", stanza, re.MULTILINE)
        )
        text, section = fields.get("Description", ""), fields.get("Section", "")
        if section in SECTIONS and len(text.split()) >= 3:
            yield Example(text, section, fields.get("Source", fields["Package"]).split()[0])


TASKS: Final[Mapping[str, Callable[[Mapping[str, Path]], Iterator[Example]]]] = {
    "language": page_language,
    "manual": page_section,
    "code": source_language,
    "archive": package_section,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Examples of each split of a task; classes are balanced."""

    train: int = 800
    validation: int = 100
    test: int = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task's examples of one seed."""

    name: str
    labels: tuple[str, ...]
    """Classes, in the order of the head's rows."""
    splits: Mapping[str, tuple[tuple[str, int], ...]]
    """train, validation, test → (text, class)."""


def make_task(name: str, examples: Sequence[Example], sizes: Sizes, *, seed: int) -> Task:
    """Draw a task's splits: the largest classes, balanced, no group in two splits, no text twice.

    Raises:
        ValueError: A split would stay short by more than a quarter.
    """
    rng = np.random.default_rng([seed, *name.encode()])
    labels = largest_classes(examples)
    groups: defaultdict[str, list[tuple[str, int]]] = defaultdict(list)
    for example in {each.text: each for each in examples}.values():
        if example.label in labels:
            groups[example.group].append((example.text, labels.index(example.label)))
    counts = {"test": sizes.test, "validation": sizes.validation, "train": sizes.train}
    splits = {split: _Split(-(-count // len(labels)), len(labels)) for split, count in counts.items()}
    names = sorted(groups)
    for index in rng.permutation(len(names)):
        # The first split with room for any of a group gets of it what it has room for; nobody gets the rest.
        any(split.take(groups[names[index]]) for split in splits.values())
    for split, count in counts.items():
        if len(splits[split].taken) < 0.75 * count:
            raise ValueError(f"task {name} has only {len(splits[split].taken)} of {count} for {split}")
    drawn = {
        split: tuple(each.taken[index] for index in rng.permutation(len(each.taken)))
        for split, each in splits.items()
    }
    return Task(name=name, labels=labels, splits=drawn)


def largest_classes(examples: Sequence[Example]) -> tuple[str, ...]:
    """At most CLASSES_MAX labels, those with the most examples and CLASS_MIN at least, sorted."""
    counts = Counter(example.label for example in examples)
    return tuple(sorted(label for label, count in counts.most_common(CLASSES_MAX) if count >= CLASS_MIN))


class _Split:
    """A split being filled, as many of each class."""

    def __init__(self, each: int, num_classes: int) -> None:
        self.taken: list[tuple[str, int]] = []
        self._room = [each] * num_classes

    def take(self, group: Sequence[tuple[str, int]]) -> bool:
        """Take what there is room for; whether that is any."""
        before = len(self.taken)
        for text, label in group:
            if self._room[label]:
                self._room[label] -= 1
                self.taken.append((text, label))
        return len(self.taken) > before
