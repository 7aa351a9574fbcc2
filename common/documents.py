"""Documents on disk: what a worker's ``--data`` and an operator's held-out path may be.

A file, or a directory searched to any depth: ``.txt`` (UTF-8, one document a file), ``.jsonl`` (one JSON
object a line), ``.parquet``, or a directory that ``datasets`` saved with ``save_to_disk`` (its ``train``
split). The columns are described in ``weft.common.sequences``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from blake3 import blake3

from weft.common.errors import DataError
from weft.common.sequences import Row

_HELDOUT: Final = b"weft held-out documents 1\n"
_SAVED_DATASET: Final = frozenset({"dataset_info.json", "dataset_dict.json"})


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the documents at ``path``, files in the order of their names.

    Raises:
        DataError: Nothing there, nothing of a known kind, or a file (which it names) that cannot be read.
    """
    if not path.exists():
        raise DataError(f"there is no {path}", hint="give a file or a directory of .txt, .jsonl or .parquet")
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(
                f"{path} is of no known kind", hint=f"give {', '.join(READERS)} or a directory of these"
            )
        yield from READERS[path.suffix](path)
    elif any((path / name).is_file() for name in _SAVED_DATASET):
        yield from _read_saved_dataset(path)
    else:
        yield from _read_directory(path)


def is_heldout(row: Row, share: float, *, purpose: str = "validation") -> bool:
    """Whether a document belongs to the ``share`` that is held out: the same wherever and whenever it is read.

    It follows from the digest of its columns, so that a document that lies in several shards is learnt in none or
    all of them, and whoever holds a copy holds out the same ones. Purposes choose independently of each other.
    """
    columns = json.dumps(dict(row.columns), sort_keys=True, default=str).encode("utf-8", "surrogatepass")
    digest = blake3(_HELDOUT + purpose.encode() + b"\n" + columns).digest(8)
    return int.from_bytes(digest, "little") < share * 2**64


def files_below(directory: Path) -> list[Path]:
    """Files of a directory in the order of their names, without hidden ones.

    A mounted volume may hold each file twice, as itself and in a hidden directory that it is linked to.
    """
    found = (path for path in directory.rglob("*") if path.is_file())
    return sorted(
        path for path in found if not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )


def _read_directory(directory: Path) -> Iterator[Row]:
    files = [path for path in files_below(directory) if path.suffix in READERS]
    if not files:
        raise DataError(
            f"{directory} holds none of {', '.join(READERS)}", hint="give a directory with data in it"
        )
    for file in files:
        yield from READERS[file.suffix](file)


def _read_text(path: Path) -> Iterator[Row]:
    text = _decode(path, _read_bytes(path))
    if text.strip():
        yield Row({"text": text}, str(path))


def _read_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            columns = json.loads(_decode(path, line))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {error}", hint="write one JSON object a line") from error
        if not isinstance(columns, dict):
            raise DataError(f"{where} is not a JSON object", hint='write {"text": "…"}')
        yield Row(columns, where)


def _read_lines(path: Path) -> Iterator[bytes]:
    """Lines as they are read, since a corpus need not fit into memory."""
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for columns in batch.to_pylist():
                    number += 1
                    yield Row(_present(columns), f"{path} row {number}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="write it again as parquet") from error


def _read_saved_dataset(directory: Path) -> Iterator[Row]:
    import datasets

    try:
        saved = datasets.load_from_disk(str(directory))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read the data set {directory}: {error}", hint="save it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            splits = ", ".join(sorted(saved))
            raise DataError(f"{directory} has no split train", hint=f"give one of its directories: {splits}")
        saved = saved["train"]
    for number, columns in enumerate(saved, start=1):
        yield Row(_present(columns), f"{directory} row {number}")


def _present(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Columns that the row has: tables fill up with null."""
    return {name: value for name, value in columns.items() if value is not None}


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {error.strerror}", hint="check its permissions")


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start})",
            hint="convert it, for example with iconv -t UTF-8",
        ) from error


READERS: Final[Mapping[str, Callable[[Path], Iterator[Row]]]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
"""How each kind of file is read."""
