"""The demo's text: the standard library's own sources, split by topic.

Every machine with Python has this text, so the demo downloads nothing. The base was trained on one part,
and each worker holds another: English reference text, codec tables, and code for internet protocols.
None of the topics shares a file with the base's part or with another topic.

A document is held out by the hash of its name, so that the split is the same under every Python version
although the versions' texts differ. The reference topics quote each other at length; a paragraph that
occurs in a held-out document is therefore cut out of the training documents too.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import tokenize
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from weft.common.errors import DataError

Split = Literal["train", "heldout"]

# fmt: off
_INTERNET: Final = frozenset((
    "email", "html", "http", "urllib", "wsgiref", "xmlrpc", "asynchat.py", "asyncore.py", "base64.py",
    "cgi.py", "cgitb.py", "ftplib.py", "imaplib.py", "ipaddress.py", "mailbox.py", "mailcap.py",
    "mimetypes.py", "netrc.py", "nntplib.py", "poplib.py", "quopri.py", "smtpd.py", "smtplib.py", "socket.py",
    "socketserver.py", "ssl.py", "telnetlib.py", "uu.py", "webbrowser.py",
))
# fmt: on
"""Packages and modules of one topic; some versions of Python have fewer."""

_LEFT_OUT: Final = frozenset(
    ("__phello__", "distutils", "encodings", "idlelib", "lib2to3", "msilib", "pydoc_data")
)
"""Top-level names that the base never saw: topics, other projects' code, and what only some machines have."""

_NOT_ENTERED: Final = frozenset({"test", "tests", "site-packages", "dist-packages", "__pycache__"})
_HELDOUT_OF_256: Final = 32
"""A document is held out if the first byte of its name's hash is below this: one in eight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicFiles:
    """What ``write_topics`` wrote for one topic."""

    topic: str
    """One of ``TOPICS``."""
    train: Path
    """Directory of ``.txt`` files, one a document: a worker's private data."""
    heldout: Path
    """One ``.txt`` file of excerpts from the documents that are never trained on."""
    num_documents: int
    """Files under ``train``."""
    train_bytes: int
    """Their size together."""
    heldout_bytes: int
    """Size of ``heldout``."""


def documents(topic: str, split: Split, *, stdlib: Path | None = None) -> list[str]:
    """Return the texts of one topic's part, in the order of their names.

    Args:
        topic: One of ``TOPICS``.
        split: ``train``, or ``heldout`` for what is never trained on.
        stdlib: Where the standard library's sources lie; this Python's own by default.

    Raises:
        DataError: The sources are not there or cannot be read.
        ValueError: There is no such topic.
    """
    return list(_topic_split(topic, split, stdlib or _stdlib()).values())


def base_documents(split: Split = "train", *, stdlib: Path | None = None) -> list[str]:
    """Return the texts that the base was trained on, or those of the same kind held out from it.

    Raises:
        DataError: The sources are not there or cannot be read.
    """
    root = stdlib or _stdlib()
    return list(_part(_required(_base(root), "base", root), "base", split).values())


def write_topics(
    to: Path, heldout_bytes_max: int = 24_000, *, stdlib: Path | None = None
) -> dict[str, TopicFiles]:
    """Write ``<to>/<topic>/train/*.txt`` and ``<to>/<topic>/heldout.txt`` for every topic.

    The held-out file has an excerpt from the middle of every held-out document, of equal size where the
    document is long enough: a topic's files begin alike, and a few whole ones would stand for it badly.

    Args:
        to: Directory, made if missing; files of the same names are replaced.
        heldout_bytes_max: Most bytes in each held-out file, encoded as UTF-8.
        stdlib: Where the standard library's sources lie; this Python's own by default.

    Raises:
        DataError: The sources cannot be read, or a file cannot be written.
    """
    root = stdlib or _stdlib()
    try:
        return {topic: _write_topic(to / topic, topic, heldout_bytes_max, root) for topic in TOPICS}
    except OSError as error:
        raise DataError(f"cannot write the demo's data to {to}: {error.strerror}") from error


def _write_topic(folder: Path, topic: str, heldout_bytes_max: int, root: Path) -> TopicFiles:
    train, heldout = _topic_split(topic, "train", root), _topic_split(topic, "heldout", root)
    files = {f"{name.replace('/', '.')}.txt": text.encode() for name, text in train.items()}
    excerpts = "\n".join(_excerpts(heldout.values(), heldout_bytes_max)).encode()
    (folder / "train").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / "train" / name).write_bytes(data)
    (folder / "heldout.txt").write_bytes(excerpts)
    return TopicFiles(
        topic=topic,
        train=folder / "train",
        heldout=folder / "heldout.txt",
        num_documents=len(files),
        train_bytes=sum(map(len, files.values())),
        heldout_bytes=len(excerpts),
    )


def _excerpts(texts: Collection[str], bytes_max: int) -> list[str]:
    """Return an excerpt of each text, shortest text first, ``bytes_max`` in all with a newline after each."""
    excerpts: list[str] = []
    left = bytes_max
    for num_waiting, text in zip(range(len(texts), 0, -1), sorted(texts, key=len), strict=True):
        excerpts.append(_middle(text, left // num_waiting - 1))
        left -= len(excerpts[-1].encode()) + 1
    return excerpts


def _middle(text: str, bytes_max: int) -> str:
    """Return whole lines from the middle of ``text``, at most ``bytes_max`` bytes."""
    data = text.encode()
    if len(data) <= bytes_max:
        return text
    start = data.find(b"\n", (len(data) - bytes_max) // 2) + 1
    return data[start : data.rfind(b"\n", start, start + bytes_max) + 1].decode()


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _topic_split(topic: str, split: Split, root: Path) -> dict[str, str]:
    if topic not in _READERS:
        raise ValueError(f"no topic {topic!r}: there are {', '.join(TOPICS)}")
    found = _required(_READERS[topic](root), topic, root)
    part = _part(found, topic, split)
    if topic == "reference" and split == "train":
        return _without_quotations(part, _part(found, topic, "heldout"))
    return part


def _part(found: Mapping[str, str], topic: str, split: Split) -> dict[str, str]:
    wanted = split == "heldout"
    part = {name: text for name, text in found.items() if _is_heldout(topic, name) is wanted}
    return _required(part, f"{topic} {split}", None)


def _is_heldout(topic: str, name: str) -> bool:
    return hashlib.sha256(f"{topic}/{name}".encode()).digest()[0] < _HELDOUT_OF_256


def _required(found: dict[str, str], what: str, root: Path | None) -> dict[str, str]:
    if not found:
        where = f" in {root}" if root else ""
        raise DataError(
            f"no sources of the standard library for the {what} text{where}",
            hint="run the demo with a Python that has its .py files, such as the one from python.org",
        )
    return found


def _without_quotations(part: Mapping[str, str], heldout: Mapping[str, str]) -> dict[str, str]:
    """Cut every paragraph that a held-out document has out of the training documents."""
    kept_back = {_words(paragraph) for text in heldout.values() for paragraph in text.split("\n\n")}
    cut = {
        name: "\n\n".join(paragraph for paragraph in text.split("\n\n") if _words(paragraph) not in kept_back)
        for name, text in part.items()
    }
    return {name: text for name, text in cut.items() if text.strip()}


def _words(paragraph: str) -> str:
    # Quoted paragraphs are indented differently.
    return " ".join(paragraph.split())


def _reference(root: Path) -> dict[str, str]:
    """Return the language reference's topics, which pydoc keeps as one dictionary literal."""
    path = root / "pydoc_data" / "topics.py"
    if not path.is_file():
        return {}
    try:
        assigned = [node.value for node in ast.parse(_read(path)).body if isinstance(node, ast.Assign)]
        values = [ast.literal_eval(value) for value in assigned]
    except (SyntaxError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    topics = {name: text for value in values if isinstance(value, dict) for name, text in value.items()}
    return dict(sorted(topics.items()))


def _encodings(root: Path) -> dict[str, str]:
    return {name: _read(root / name) for name in _source_names(root) if name.startswith("encodings/")}


def _internet(root: Path) -> dict[str, str]:
    return {name: _read(root / name) for name in _source_names(root) if name.partition("/")[0] in _INTERNET}


def _base(root: Path) -> dict[str, str]:
    return {name: _read(root / name) for name in _source_names(root) if _is_base(name.partition("/")[0])}


def _is_base(top: str) -> bool:
    # _sysconfigdata holds the paths of the machine that built this Python.
    return top not in _LEFT_OUT | _INTERNET and not top.startswith("_sysconfigdata")


def _source_names(root: Path) -> list[str]:
    """Return the sources' paths below ``root``, sorted, without tests and installed packages."""
    names: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_ENTERED]
        names += [Path(folder, file).relative_to(root).as_posix() for file in files if file.endswith(".py")]
    return sorted(names)


def _read(path: Path) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


_READERS: Final[Mapping[str, Callable[[Path], dict[str, str]]]] = {
    "reference": _reference,
    "encodings": _encodings,
    "internet": _internet,
}
TOPICS: Final[tuple[str, ...]] = tuple(_READERS)
"""The workers' topics."""
