"""Text into sequences: the same tokens for a worker's data and for the operator's held-out data.

Causal language modelling: documents are tokenised, joined by the end-of-text token into one stream and cut
into windows of T tokens that do not overlap. The label of a token is the next one, so window i is
``stream[iT : iT+T]`` with labels ``stream[iT+1 : iT+T+1]``, and each token but the first is a label once.
Prompts and what others said in a chat are labelled ``IGNORED``. A tokenizer that begins texts with a token of
its own begins documents with it here. Classification: one sequence a document, cut at T tokens.

Where documents are routed by their first tokens (DiPaCo, arXiv 2403.10616, section 2.4), these are read and
neither learnt nor counted, in training and on held-out data alike: a path must not be judged on what chose it.
A document's **prefix** is its first tokens as they stand in the stream, the token that begins it included.

Shapes: N sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from weft.common.errors import BaseModelError, DataError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Tokenizer = Any
"""A tokenizer of ``transformers`` (which carries no types)."""

IGNORED: Final = -100
"""Label of a token that is not learnt from."""
UNDERSTOOD: Final = (
    "text · prompt and completion · messages (role, content) · text and label (classification)"
)
"""The columns that rows may have, for messages."""
_BATCH_ROWS: Final = 256
_PREFIX_CHARACTERS: Final = 64
"""A prefix of n tokens is looked for in this many times n characters: tokens are shorter, texts may be very long."""


@dataclass(frozen=True, slots=True)
class Row:
    """One document as it was read."""

    columns: Mapping[str, Any]
    """By name."""
    where: str
    """File and line, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """Tokenised data in memory."""

    tokens: Int32Array
    """[N, T] token ids; right of a sequence's length they mean nothing."""
    labels: Int32Array
    """Causal: [N, T], the next token or ``IGNORED``. Classification: [N], the class."""
    lengths: Int32Array
    """[N] tokens of each sequence."""
    num_bytes: Int64Array
    """[N] UTF-8 bytes of the text that the labels cover; zeros when not counted."""
    num_tokens: int
    """Tokens of all documents, also those that fill no window."""

    def __len__(self) -> int:
        return len(self.tokens)

    def spread(self, num_max: int) -> Sequences:
        """At most ``num_max`` of them, evenly spaced over the whole."""
        if len(self) <= num_max:
            return self
        indices = np.linspace(0, len(self) - 1, num_max).round().astype(np.intp)
        return Sequences(
            tokens=self.tokens[indices],
            labels=self.labels[indices],
            lengths=self.lengths[indices],
            num_bytes=self.num_bytes[indices],
            num_tokens=self.num_tokens,
        )

    def select(self, indices: npt.NDArray[np.intp]) -> Batch:
        """Gather sequences, cut to the longest of them."""
        lengths = self.lengths[indices]
        longest = int(lengths.max())
        labels = self.labels[indices]
        return Batch(
            tokens=self.tokens[indices, :longest].astype(np.int64),
            labels=(labels[:, :longest] if labels.ndim == 2 else labels).astype(np.int64),
            lengths=lengths.astype(np.int64),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B sequences on their way to the model."""

    tokens: Int64Array
    """[B, T] token ids."""
    labels: Int64Array
    """[B, T] next tokens or [B] classes."""
    lengths: Int64Array
    """[B] tokens of each sequence."""

    @property
    def num_labels(self) -> int:
        """Labels that count."""
        return int((self.labels != IGNORED).sum())


OnTokenised = Callable[[int, int], None]
"""Called with the number of documents and of tokens so far."""


def nothing(num_documents: int, num_tokens: int) -> None:
    """An ``OnTokenised`` that looks away."""


# -- causal language modelling -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Span:
    """A stretch of a document that is either learnt or only read."""

    text: str
    learnt: bool


def causal_sequences(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    prefix_tokens: int = 0,
    heldout: bool = False,
    on_tokenised: OnTokenised = nothing,
) -> Sequences:
    """Tokenise documents and cut them into windows.

    Args:
        rows: With the columns ``text``, or ``prompt`` and ``completion``, or ``messages``.
        tokenizer: The base's.
        sequence_length: T.
        prefix_tokens: First tokens of each document that are labelled ``IGNORED``.
        heldout: Count the bytes that labels cover, predict the very first token too and keep a last window
            that is shorter than T. Training leaves that window out.
        on_tokenised: Progress.

    Raises:
        DataError: A row without the columns, or chat messages where the tokenizer has no template.
        BaseModelError: The tokenizer lacks what is needed.
    """
    marks = _marks(tokenizer)
    stream = _Stream(prefix_tokens)
    if heldout and not marks.begin:
        stream.append([marks.end], learnt=False)
    num_documents = 0
    for batch in _batches(rows):
        _encode_batch(stream, batch, tokenizer, marks, count_bytes=heldout)
        num_documents += len(batch)
        on_tokenised(num_documents, stream.num_tokens)
    return _windows(stream, sequence_length=sequence_length, keep_last=heldout)


@dataclass(frozen=True, slots=True)
class _Marks:
    """Tokens that stand around a document."""

    begin: list[int]
    end: int


def _marks(tokenizer: Tokenizer) -> _Marks:
    if not tokenizer.is_fast:
        raise BaseModelError("the base has no tokenizer.json", hint="save the tokenizer in its fast form")
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            "the base's tokenizer has no end-of-text token", hint="set eos_token in its files"
        )
    begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    return _Marks([int(tokenizer.bos_token_id)] if begins else [], int(tokenizer.eos_token_id))


class _Stream:
    """All documents in a row: tokens, labels not yet shifted, and the bytes of each token."""

    def __init__(self, prefix_tokens: int) -> None:
        self.tokens: list[Int32Array] = [np.zeros(0, np.int32)]
        self.labels: list[Int32Array] = [np.zeros(0, np.int32)]
        self.num_bytes: list[Int64Array] = [np.zeros(0, np.int64)]
        self.num_tokens = 0
        self.starts: list[int] = []
        self._prefix_tokens = prefix_tokens
        self._prefix_left = 0

    def begin_document(self) -> None:
        """What is appended from here on is of another document."""
        self.starts.append(self.num_tokens)
        self._prefix_left = self._prefix_tokens

    def append(self, tokens: Sequence[int], *, learnt: bool, num_bytes: Int64Array | None = None) -> None:
        ids = np.array(tokens, np.int32)
        labels = ids.copy() if learnt else np.full(len(ids), IGNORED, np.int32)
        counted = np.zeros(len(ids), np.int64) if num_bytes is None else num_bytes
        in_prefix = min(self._prefix_left, len(ids))
        labels[:in_prefix] = IGNORED
        counted[:in_prefix] = 0
        self._prefix_left -= in_prefix
        self.tokens.append(ids)
        self.labels.append(labels)
        self.num_bytes.append(counted)
        self.num_tokens += len(ids)

    def whole(self) -> tuple[Int32Array, Int32Array, Int64Array]:
        """Tokens, labels and bytes as one array each."""
        return np.concatenate(self.tokens), np.concatenate(self.labels), np.concatenate(self.num_bytes)


def _windows(stream: _Stream, *, sequence_length: int, keep_last: bool) -> Sequences:
    tokens, labels, num_bytes = stream.whole()
    cut = _cut(tokens, labels, num_bytes, sequence_length=sequence_length, keep_last=keep_last)
    return _without_unlabelled(cut)


def _cut(
    tokens: Int32Array, labels: Int32Array, num_bytes: Int64Array, *, sequence_length: int, keep_last: bool
) -> Sequences:
    num_tokens = len(tokens)
    num_labels = max(0, num_tokens - 1)
    lengths = np.full(num_labels // sequence_length, sequence_length, np.int32)
    if keep_last and (rest := num_labels % sequence_length):
        lengths = np.append(lengths, np.int32(rest))
        padding = sequence_length - rest
        tokens = np.concatenate([tokens, np.zeros(padding, np.int32)])
        labels = np.concatenate([labels, np.full(padding, IGNORED, np.int32)])
        num_bytes = np.concatenate([num_bytes, np.zeros(padding, np.int64)])
    shape = (len(lengths), sequence_length)
    stop = len(lengths) * sequence_length
    return Sequences(
        tokens=tokens[:stop].reshape(shape),
        labels=labels[1 : stop + 1].reshape(shape),
        lengths=lengths,
        num_bytes=num_bytes[1 : stop + 1].reshape(shape).sum(1),
        num_tokens=num_tokens,
    )


def _without_unlabelled(sequences: Sequences) -> Sequences:
    """Leave out windows in which nothing is learnt: a mean over no labels has no value."""
    kept = (sequences.labels != IGNORED).any(1)
    if kept.all():
        return sequences
    return Sequences(
        tokens=sequences.tokens[kept],
        labels=sequences.labels[kept],
        lengths=sequences.lengths[kept],
        num_bytes=sequences.num_bytes[kept],
        num_tokens=sequences.num_tokens,
    )


def _encode_batch(
    stream: _Stream, rows: Sequence[Row], tokenizer: Tokenizer, marks: _Marks, *, count_bytes: bool
) -> None:
    documents = [_spans(row, tokenizer) for row in rows]
    encoded = tokenizer(
        [span.text for spans in documents for span in spans],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=count_bytes,
        verbose=False,
    )
    position = 0
    for row, spans in zip(rows, documents, strict=True):
        stream.begin_document()
        stream.append(_beginning(row, marks), learnt=False)
        for span in spans:
            tokens = encoded["input_ids"][position]
            counted = count_bytes and span.learnt and bool(tokens)
            num_bytes = _token_bytes(span.text, encoded["offset_mapping"][position]) if counted else None
            stream.append(tokens, learnt=span.learnt, num_bytes=num_bytes)
            position += 1
        stream.append([marks.end], learnt=True)


def _beginning(row: Row, marks: _Marks) -> list[int]:
    return [] if "messages" in row.columns else marks.begin  # a chat template writes its own


def _token_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> Int64Array:
    """UTF-8 bytes from each token's first character to the next one's; their sum is the text's size."""
    widths = np.array([len(character.encode("utf-8", "surrogatepass")) for character in text], np.int64)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    starts = np.array([start for start, _ in offsets], np.int64)
    starts[0] = 0
    num_bytes: Int64Array = np.diff(bytes_before[np.append(starts, len(text))])
    return num_bytes


def _spans(row: Row, tokenizer: Tokenizer) -> list[_Span]:
    columns = row.columns
    if "messages" in columns:
        return _chat_spans(row, tokenizer)
    if "prompt" in columns and "completion" in columns:
        return [_Span(_text(row, "prompt"), learnt=False), _Span(_text(row, "completion"), learnt=True)]
    if "text" in columns:
        return [_Span(_text(row, "text"), learnt=True)]
    raise DataError(
        f"{row.where} has the columns {', '.join(sorted(columns)) or 'none'}",
        hint=f"write {UNDERSTOOD}",
    )


def _chat_spans(row: Row, tokenizer: Tokenizer) -> list[_Span]:
    """Render a chat with the tokenizer's template; what the assistant says is learnt."""
    if not tokenizer.chat_template:
        raise DataError(
            f"{row.where} holds chat messages and the base's tokenizer has no chat template",
            hint="use prompt and completion, or a base made for chat",
        )
    messages = [_message(row, message) for message in _list(row, "messages")]
    spans: list[_Span] = []
    rendered = ""
    for number, message in enumerate(messages, start=1):
        if message["role"] == "assistant":
            asked = _render(tokenizer, messages[: number - 1], row, ask=True)
            spans.append(_Span(_after(rendered, asked, row), learnt=False))
            rendered = _render(tokenizer, messages[:number], row, ask=False)
            spans.append(_Span(_after(asked, rendered, row), learnt=True))
    if not spans:
        raise DataError(f"{row.where} has no message of the assistant", hint='one needs "role": "assistant"')
    return spans


def _render(tokenizer: Tokenizer, messages: list[dict[str, str]], row: Row, *, ask: bool) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except TemplateError as error:
        raise DataError(f"{row.where}: the base's chat template refuses it: {error}") from error


def _after(before: str, whole: str, row: Row) -> str:
    if not whole.startswith(before):
        raise DataError(
            f"{row.where}: the base's chat template rewrites earlier messages when later ones follow",
            hint="give each answer as prompt and completion",
        )
    return whole[len(before) :]


def _message(row: Row, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping) or not all(
        isinstance(message.get(key), str) for key in ("role", "content")
    ):
        raise DataError(f"{row.where}: a message needs the texts role and content")
    return {"role": message["role"], "content": message["content"]}


# -- documents one by one ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One document's own windows: no other document is in their context."""

    row: Row
    """Where it comes from."""
    tokens: Int32Array
    """[n] the token that begins it (where the tokenizer has one), the text, and the end-of-text token."""
    sequences: Sequences
    """Windows over it, the last one shorter than T, held-out style; those without labels are left out."""
    positions: Int32Array
    """[N, T] position in ``tokens`` of what each label is; it means nothing where the label is ``IGNORED``."""


def read_documents(
    rows: Iterable[Row], tokenizer: Tokenizer, *, sequence_length: int, prefix_tokens: int = 0
) -> Iterator[Document]:
    """Tokenise documents one by one, for judging each by itself; arguments and errors of ``causal_sequences``.

    A document whose tokenizer begins texts with no token stands behind an end-of-text token, as in training.
    """
    marks = _marks(tokenizer)
    for batch in _batches(rows):
        stream = _Stream(prefix_tokens)
        stream.append([marks.end], learnt=False)
        _encode_batch(stream, batch, tokenizer, marks, count_bytes=True)
        whole = stream.whole()
        for row, start, stop in zip(
            batch, stream.starts, [*stream.starts[1:], stream.num_tokens], strict=True
        ):
            yield _document(row, whole, start, stop, lead=not _beginning(row, marks), length=sequence_length)


def _document(
    row: Row,
    stream: tuple[Int32Array, Int32Array, Int64Array],
    start: int,
    stop: int,
    *,
    lead: bool,
    length: int,
) -> Document:
    first = start - int(lead)
    tokens, labels, num_bytes = stream
    # The first token, which may be another document's end, is context alone: labels are those after it.
    cut = _cut(
        tokens[first:stop], labels[first:stop], num_bytes[first:stop], sequence_length=length, keep_last=True
    )
    positions = np.arange(cut.tokens.size, dtype=np.int32).reshape(cut.tokens.shape) + 1 - int(lead)
    kept = (cut.labels != IGNORED).any(1)
    return Document(
        row=row,
        tokens=stream[0][start:stop],
        sequences=_without_unlabelled(cut),
        positions=positions[kept],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefixes:
    """The beginnings of B documents."""

    rows: tuple[Row, ...]
    """The documents."""
    tokens: Int64Array
    """[B, n] token ids; right of a document's length they mean nothing."""
    lengths: Int64Array
    """[B] tokens of each, at least 1."""


def read_prefixes(
    rows: Iterable[Row], tokenizer: Tokenizer, num_tokens: int, *, batch_rows: int = _BATCH_ROWS
) -> Iterator[Prefixes]:
    """The first ``num_tokens`` tokens of each document, what ``prefix_tokens`` leaves out of the labels.

    A document without text is its end-of-text token.

    Raises:
        DataError, BaseModelError: As :func:`causal_sequences`.
    """
    marks = _marks(tokenizer)
    iterator = iter(rows)
    while batch := tuple(islice(iterator, batch_rows)):
        yield _prefixes(batch, tokenizer, marks, num_tokens)


def _prefixes(rows: tuple[Row, ...], tokenizer: Tokenizer, marks: _Marks, num_tokens: int) -> Prefixes:
    documents = [_spans(row, tokenizer) for row in rows]
    texts = [span.text[: num_tokens * _PREFIX_CHARACTERS] for spans in documents for span in spans]
    encoded = iter(_encode(tokenizer, texts))
    tokens = np.zeros((len(rows), num_tokens), np.int64)
    lengths = np.zeros(len(rows), np.int64)
    for index, (row, spans) in enumerate(zip(rows, documents, strict=True)):
        ids = list(_beginning(row, marks))
        for _ in spans:
            ids += next(encoded)
        ids = ids[:num_tokens] or [marks.end]
        tokens[index, : len(ids)] = ids
        lengths[index] = len(ids)
    return Prefixes(rows=rows, tokens=tokens, lengths=lengths)


def text_tokens(text: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a text that begins a document, without an end: a prompt. Raises BaseModelError."""
    marks = _marks(tokenizer)
    return [*marks.begin, *_encode(tokenizer, [text])[0]] or [marks.end]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def concatenate(parts: Sequence[Sequences]) -> Sequences:
    """Sequences of one T behind each other; raises ValueError for none."""
    return Sequences(
        tokens=np.concatenate([part.tokens for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        num_bytes=np.concatenate([part.num_bytes for part in parts]),
        num_tokens=sum(part.num_tokens for part in parts),
    )


# -- classification ------------------------------------------------------------------------------------------


def classification_sequences(
    rows: Iterable[Row],
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    num_labels: int,
    on_tokenised: OnTokenised = nothing,
) -> Sequences:
    """Tokenise ``text`` with the tokenizer's special tokens, cut at T; ``label`` is 0 to num_labels − 1.

    Raises:
        DataError: A row without the columns, or a label outside the range.
    """
    tokens: list[Int32Array] = []
    labels: list[int] = []
    num_tokens = 0
    padding = _padding_token(tokenizer)
    for batch in _batches(rows):
        labels += [_label(row, num_labels) for row in batch]
        texts = [_text(row, "text") for row in batch]
        encoded = tokenizer(texts, truncation=True, max_length=sequence_length, return_attention_mask=False)
        # A model that reads off the last token needs one.
        tokens += [np.array(ids or [padding], np.int32) for ids in encoded["input_ids"]]
        num_tokens += sum(map(len, tokens[-len(batch) :]))
        on_tokenised(len(labels), num_tokens)
    padded = np.full((len(tokens), sequence_length), padding, np.int32)
    for index, ids in enumerate(tokens):
        padded[index, : len(ids)] = ids
    return Sequences(
        tokens=padded,
        labels=np.array(labels, np.int32),
        lengths=np.array([len(ids) for ids in tokens], np.int32),
        num_bytes=np.zeros(len(tokens), np.int64),
        num_tokens=num_tokens,
    )


def _label(row: Row, num_labels: int) -> int:
    if "label" not in row.columns:
        raise DataError(
            f"{row.where} has the columns {', '.join(sorted(row.columns)) or 'none'}",
            hint="classification needs text and label",
        )
    label = row.columns["label"]
    if not isinstance(label, int | np.integer) or isinstance(label, bool) or not 0 <= label < num_labels:
        raise DataError(f"{row.where}: the label is {label!r}", hint=f"labels are 0 to {num_labels - 1}")
    return int(label)


# -- shared -----------------------------------------------------------------------------------------------


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _BATCH_ROWS)):
        yield batch


def _text(row: Row, column: str) -> str:
    value = row.columns.get(column)
    if not isinstance(value, str):
        raise DataError(
            f"{row.where}: {column} is {value!r:.60}, not a text", hint=f"understood are: {UNDERSTOOD}"
        )
    return value


def _list(row: Row, column: str) -> list[Any]:
    value = row.columns[column]
    if not isinstance(value, list | tuple | np.ndarray):
        raise DataError(f"{row.where}: {column} is not a list")
    return list(value)


def _padding_token(tokenizer: Tokenizer) -> int:
    token = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise BaseModelError("the base's tokenizer has neither a padding nor an end-of-text token")
    return int(token)
