"""The demo's corpus on a made-up standard library and on this Python's own, and the shipped base's files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.client.demo import corpus
from weft.common.errors import DataError

BASE = Path(corpus.__file__).parent / "base"


@pytest.fixture
def stdlib(tmp_path: Path) -> Path:
    """Forty documents a topic, enough that both splits of each have some."""
    root = tmp_path / "stdlib"
    topics = {f"topic{i}": f"Words about {i}.\n\nQuoted by all.\n\n  Ends {i}.\n" for i in range(40)}
    sources = {
        "pydoc_data/topics.py": f"# written by a tool\ntopics = {topics!r}\n",
        **{f"encodings/cp{i}.py": f"# table {i}\n" * 50 for i in range(40)},
        **{f"email/part{i}.py": f"# mail {i}\n" for i in range(40)},
        **{f"general{i}.py": f"# general {i}\n" for i in range(40)},
    }
    for name, text in sources.items():
        _write(root / name, text)
    return root


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("topic", corpus.TOPICS)
def test_every_document_is_in_one_split(topic: str, stdlib: Path) -> None:
    train = corpus.documents(topic, "train", stdlib=stdlib)
    heldout = corpus.documents(topic, "heldout", stdlib=stdlib)
    assert len(train) + len(heldout) == 40
    assert not set(train) & set(heldout)
    assert len(heldout) >= 2


def test_a_document_keeps_its_split_when_others_come_and_go(stdlib: Path) -> None:
    before = set(corpus.documents("internet", "heldout", stdlib=stdlib))
    for path in (stdlib / "email").glob("part1*.py"):
        path.unlink()
    _write(stdlib / "ftplib.py", "# files\n")
    kept = {text for text in before if not text.startswith("# mail 1")}
    assert set(corpus.documents("internet", "heldout", stdlib=stdlib)) - {"# files\n"} == kept


def test_base_shares_no_document_with_a_topic(stdlib: Path) -> None:
    base = {text for split in ("train", "heldout") for text in corpus.base_documents(split, stdlib=stdlib)}
    topics = {
        text
        for topic in corpus.TOPICS
        for split in ("train", "heldout")
        for text in corpus.documents(topic, split, stdlib=stdlib)
    }
    assert len(base) == 40
    assert not base & topics


@pytest.mark.parametrize(
    "name",
    [
        "test/test_mail.py",
        "unittest/test/test_case.py",
        "site-packages/other/main.py",
        "idlelib/editor.py",
        "distutils/core.py",
        "_sysconfigdata__linux.py",
        "notes.txt",
    ],
)
def test_tests_and_other_projects_code_are_left_out(name: str, stdlib: Path) -> None:
    before = corpus.base_documents(stdlib=stdlib) + corpus.base_documents("heldout", stdlib=stdlib)
    _write(stdlib / name, "# not to be seen\n")
    assert corpus.base_documents(stdlib=stdlib) + corpus.base_documents("heldout", stdlib=stdlib) == before


def test_what_a_heldout_topic_says_is_cut_out_of_the_others(stdlib: Path) -> None:
    train = corpus.documents("reference", "train", stdlib=stdlib)
    heldout = corpus.documents("reference", "heldout", stdlib=stdlib)
    assert all("Quoted by all." in text for text in heldout)
    assert all("Words about" in text and "Quoted by all." not in text for text in train)


def test_a_quotation_is_found_under_another_indentation(stdlib: Path) -> None:
    topics = {f"topic{i}": f"{' ' * i}Same words\n{' ' * i}everywhere.\n\nOwn {i}." for i in range(40)}
    _write(stdlib / "pydoc_data/topics.py", f"topics = {topics!r}\n")
    assert not any("Same" in text for text in corpus.documents("reference", "train", stdlib=stdlib))


def test_topics_are_written_as_a_worker_reads_them(stdlib: Path, tmp_path: Path) -> None:
    files = corpus.write_topics(tmp_path / "data", heldout_bytes_max=1000, stdlib=stdlib)
    assert list(files) == list(corpus.TOPICS)
    for topic, written in files.items():
        texts = [path.read_bytes().decode() for path in sorted(written.train.glob("*.txt"))]
        assert written.train == tmp_path / "data" / topic / "train"
        assert sorted(texts) == sorted(corpus.documents(topic, "train", stdlib=stdlib))
        assert (written.num_documents, written.train_bytes) == (len(texts), sum(map(len, texts)))
        assert 0 < written.heldout_bytes == written.heldout.stat().st_size <= 1000


def test_writing_twice_gives_the_same_bytes(stdlib: Path, tmp_path: Path) -> None:
    def written(to: str) -> dict[str, bytes]:
        corpus.write_topics(tmp_path / to, stdlib=stdlib)
        paths = (tmp_path / to).rglob("*.txt")
        return {path.relative_to(tmp_path / to).as_posix(): path.read_bytes() for path in paths}

    assert written("once") == written("again")


def test_heldout_excerpts_are_whole_lines_of_every_document(stdlib: Path, tmp_path: Path) -> None:
    files = corpus.write_topics(tmp_path / "data", heldout_bytes_max=600, stdlib=stdlib)
    heldout = corpus.documents("encodings", "heldout", stdlib=stdlib)
    lines = files["encodings"].heldout.read_text().splitlines()
    assert set(filter(None, lines)) == {text.splitlines()[0] for text in heldout}


@pytest.mark.parametrize(
    ("name", "data"),
    [("email/part0.py", b"\xff\xfe bytes"), ("email/part0.py", b"# coding: no-such\n")],
    ids=["not-utf-8", "unknown-coding"],
)
def test_an_unreadable_source_is_named(name: str, data: bytes, stdlib: Path) -> None:
    (stdlib / name).write_bytes(data)
    with pytest.raises(DataError, match=r"cannot read .*part0\.py"):
        corpus.documents("internet", "train", stdlib=stdlib)


def test_topics_that_are_no_literal_are_refused(stdlib: Path) -> None:
    _write(stdlib / "pydoc_data/topics.py", "topics = dict(a=1)\n")
    with pytest.raises(DataError, match=r"cannot read .*topics\.py"):
        corpus.documents("reference", "train", stdlib=stdlib)


@pytest.mark.parametrize("topic", corpus.TOPICS)
def test_a_python_without_sources_is_a_data_error_with_a_way_out(topic: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=topic) as caught:
        corpus.documents(topic, "train", stdlib=tmp_path)
    assert "Python" in caught.value.hint
    with pytest.raises(DataError, match="base"):
        corpus.base_documents(stdlib=tmp_path)


def test_an_unknown_topic_is_the_callers_mistake(stdlib: Path) -> None:
    with pytest.raises(ValueError, match="no topic 'sports'"):
        corpus.documents("sports", "train", stdlib=stdlib)


def test_a_folder_that_cannot_be_written_is_a_data_error(stdlib: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot write"):
        corpus.write_topics(tmp_path / "file", stdlib=stdlib)


def test_this_pythons_own_library_has_enough_of_every_topic(tmp_path: Path) -> None:
    for written in corpus.write_topics(tmp_path).values():
        assert written.train_bytes > 300_000
        assert 20_000 < written.heldout_bytes <= 24_000


def test_shipped_base_is_small_complete_and_in_bf16() -> None:
    files = {path.name: path.stat().st_size for path in BASE.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} < set(files)
    assert sum(files.values()) <= 8_000_000
    with (BASE / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
