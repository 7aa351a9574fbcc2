"""Run the paths of a pulled grid: a text goes to one path, and may go on along another every W tokens.

    with Inference.open(Path("grid")) as model:            # one resident base, all paths switched on it
        print(model.route("fn main() {").path)
        for piece in model.generate("fn main() {", max_new_tokens=64):
            print(piece.text, end="")

A document's first 32 tokens choose its path and are not counted for anything (DiPaCo, arXiv 2403.10616, section 2.4).
When it is routed anew every W tokens (section 2.4.3), these are chunks after the prefix: the first goes along the
prefix's path, and every other along the one that the router names for the chunk before it, by the last (at most 32)
tokens of that, seen through the bare base. Whatever path computes a chunk reads all of the text before it.

Shapes: N windows, T tokens, P paths, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path as FilePath
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from weft.client.device import Device, find_device
from weft.client.grid import Grid
from weft.client.perplexity import PathScore, Perplexity, Tally, too_short
from weft.common.base import check_base, resolve_source
from weft.common.composition import Composed, ResidentBase, memory_errors
from weft.common.errors import InputError, UsageError
from weft.common.ids import Path
from weft.common.recipe import TaskKind
from weft.common.routing import Router
from weft.common.routing.router import best_paths
from weft.common.sequences import (
    IGNORED,
    Document,
    Row,
    Sequences,
    concatenate,
    read_documents,
    text_tokens,
)

__all__ = ["Inference", "PathScore", "Perplexity", "Piece", "Routed"]

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]

PATHS_RESIDENT_MAX: Final = 64
"""Paths kept beside the base; the one used longest ago makes room."""
_BATCH_WINDOWS: Final = 8
_BATCH_PREFIXES: Final = 128
_BLOCK_DOCUMENTS: Final = 256
"""Documents judged together: switching paths is paid once a block."""
_CONTEXT_TOKENS: Final = 8
"""Decoded with each new token, since a token's text may depend on what is before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Where a text belongs."""

    path: Path
    """The best path."""
    scores: tuple[tuple[Path, float], ...]
    """Score of every path, best first; only their order and differences mean something."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Generated text, as far as it is whole characters."""

    text: str
    path: Path
    """That wrote it."""


def _no_progress(num_done: int, num_total: int) -> None:
    """A ``Progress`` that looks away."""


class Inference:
    """A grid on one resident base. One thread at a time; generators may take turns.

    Args:
        grid: The modules and the router.
        resident: Its base, loaded for its task and kind, for this object alone.
        best: Take the versions that a path was best with, where it was evaluated, not the newest.
    """

    def __init__(self, grid: Grid, resident: ResidentBase, *, best: bool = False) -> None:
        self.grid = grid
        self.recipe = grid.recipe
        self._resident = resident
        self._best = best
        self._slots: list[Path] = []
        self._composed: Composed | None = None

    @classmethod
    def open(
        cls,
        grid_dir: FilePath,
        *,
        device: Device | None = None,
        base: str | None = None,
        best: bool = False,
    ) -> Inference:
        """Open a grid directory and load its base.

        Args:
            grid_dir: What ``weft pull RUN --all --to DIR`` wrote.
            device: Where to; the best there is when None.
            base: Directory or Hub id of the base; what the grid names when None.
            best: See the class.

        Raises:
            InputError: The grid or its base cannot be used.
            UsageError: Nobody says where the base is, or the run is no language model.
        """
        grid = Grid.open(grid_dir)
        recipe = grid.recipe
        if recipe.task.kind is not TaskKind.CAUSAL_LM:
            raise UsageError(
                f"{grid_dir} is a grid for {recipe.task.kind.value}",
                hint="pull one of its paths and load it with transformers",
            )
        source = base or grid.index.base or recipe.base.hub_id
        if not source:
            raise UsageError(f"{grid_dir} does not say where its base is", hint="give --base DIR")
        base_dir = resolve_source(source, revision="" if base else recipe.base.revision)
        check_base(base_dir, recipe.base)
        found = device or find_device()
        resident = ResidentBase.load(
            base_dir,
            recipe.task,
            device=found.torch_device,
            dtype=found.dtype,
            kind=recipe.topology.kind,
        )
        return cls(grid, resident, best=best)

    def __enter__(self) -> Inference:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Free what the paths keep on the device; the base goes with the last reference to it."""
        while self._slots:
            self._resident.drop(str(self._slots.pop()))
        self._composed = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All paths of the grid."""
        return self.grid.paths

    @property
    def prefix_tokens(self) -> int:
        """First tokens of a document that are counted for nothing: the router's and the run's."""
        routed = self.grid.router.num_prefix_tokens if self.grid.router else 0
        return max(routed, self.recipe.task.prefix_tokens)

    # -- paths -----------------------------------------------------------------------------------------------

    def use(self, path: Path) -> Composed:
        """Switch to a path; what was returned for another path before is no longer valid.

        Raises:
            InputError: The grid's tensors do not fit the base.
            OutOfMemory: The device is too small.
        """
        if self._composed is not None and self._slots[-1] == path:
            return self._composed
        if path in self._slots:
            self._slots.remove(path)
            self._composed = self._resident.activate(self.recipe, str(path))
        else:
            if len(self._slots) >= PATHS_RESIDENT_MAX:
                self._resident.drop(str(self._slots.pop(0)))
            self._composed = self._compose(path)
        self._slots.append(path)
        return self._composed

    def _compose(self, path: Path) -> Composed:
        tensors = self.grid.tensors(path, best=self._best)
        try:
            with memory_errors("composing a path"):
                return self._resident.compose(self.recipe, tensors, slot=str(path))
        except ValueError as error:
            raise InputError(f"the modules of path {path} do not fit the base: {error}") from error

    # -- routing ---------------------------------------------------------------------------------------------

    def route(self, text: str) -> Routed:
        """Where a text belongs, by its first tokens.

        Raises:
            UsageError: The grid has several paths and no router.
        """
        router = self.router
        tokens = text_tokens(text, self._resident.tokenizer)[: router.num_prefix_tokens]
        scores = self._scores([tokens])[0]
        order = np.argsort(-scores, kind="stable")
        return Routed(
            path=router.paths[int(order[0])],
            scores=tuple((router.paths[index], float(scores[index])) for index in order.tolist()),
        )

    def route_along(self, text: str, *, every: int) -> tuple[tuple[str, Path], ...]:
        """The path of each chunk of a text, with the chunk: the prefix, then ``every`` tokens at a time."""
        tokens = text_tokens(text, self._resident.tokenizer)
        prefix = self.router.num_prefix_tokens
        starts = [0, *range(prefix, len(tokens), _checked(every))]
        stops = [*starts[1:], len(tokens)]
        paths = self.choose([_source(tokens, start, prefix, every) for start in starts])
        return tuple(
            (str(self._resident.tokenizer.decode(tokens[start:stop])), path)
            for start, stop, path in zip(starts, stops, paths, strict=True)
        )

    @property
    def router(self) -> Router:
        """The grid's router; raises UsageError when it has none."""
        if self.grid.router is None:
            raise UsageError(
                f"{self.grid.directory} has {len(self.paths)} paths and no router",
                hint="name one: --path 0.0",
            )
        return self.grid.router

    def _scores(self, texts: Sequence[Sequence[int]]) -> Float64Array:
        """[N, P] scores of token sequences, each at least one token and at most the router's number."""
        return self.router.scores(self._features(texts))

    def _features(self, texts: Sequence[Sequence[int]]) -> Float32Array:
        parts = []
        for start in range(0, len(texts), _BATCH_PREFIXES):
            batch = texts[start : start + _BATCH_PREFIXES]
            lengths = np.array([len(tokens) for tokens in batch], np.int64)
            padded = np.zeros((len(batch), int(lengths.max())), np.int64)
            for row, tokens in zip(padded, batch, strict=True):
                row[: len(tokens)] = tokens
            parts.append(self._resident.features(padded, lengths))
        return np.concatenate(parts)

    def choose(self, texts: Sequence[Sequence[int]]) -> list[Path]:
        """The best path for each of several token sequences, of 1 to the router's number of tokens."""
        return [self.paths[index] for index in self._routes(texts)]

    def _routes(self, texts: Sequence[Sequence[int]]) -> list[int]:
        return [int(index) for index in best_paths(self._scores(texts), 1)[:, 0]]

    # -- judging ---------------------------------------------------------------------------------------------

    def perplexity(
        self,
        rows: Iterable[Row],
        *,
        every: int | None = None,
        path: Path | None = None,
        progress: Progress = _no_progress,
    ) -> Perplexity:
        """Judge the grid on documents, each by itself, without its first ``prefix_tokens`` tokens.

        Windows have the run's sequence length and do not overlap; a token sees its own window only.

        Args:
            rows: The documents; a block of them is in memory.
            every: Choose the path anew every so many tokens; None keeps the prefix's.
            path: Send all documents there instead.
            progress: Told the documents judged, and as many as are known of.

        Raises:
            DataError: No document is longer than the prefix, or rows are not understood.
            UsageError: No router and no path.
        """
        tally = Tally(len(self.paths))
        length = self.recipe.inner.sequence_length
        documents = read_documents(
            rows, self._resident.tokenizer, sequence_length=length, prefix_tokens=self.prefix_tokens
        )
        while block := list(islice(documents, _BLOCK_DOCUMENTS)):
            kept = [document for document in block if len(document.sequences)]
            if kept:
                self._judge(kept, self._assign(kept, every, path), tally)
            progress(tally.num_documents, tally.num_documents)
        return tally.result(self.paths, every, self.prefix_tokens)

    def _assign(
        self, documents: Sequence[Document], every: int | None, path: Path | None
    ) -> list[Int64Array]:
        """For each document, the path's index for each of its labels: [N, T]."""
        if path is not None or (self.grid.router is None and len(self.paths) == 1):
            index = self.paths.index(path) if path is not None else 0
            return [np.full(document.positions.shape, index) for document in documents]
        router = self.router
        chunks = [_chunks(document, router.num_prefix_tokens, every) for document in documents]
        sources = [
            _source(
                document.tokens[:-1].tolist(),
                router.num_prefix_tokens + chunk * (every or 0),
                router.num_prefix_tokens,
                every,
            )
            for document, numbers in zip(documents, chunks, strict=True)
            for chunk in range(int(numbers.max()) + 1)
        ]
        routes = iter(self._routes(sources))
        return [
            np.array([next(routes) for _ in range(int(numbers.max()) + 1)], np.int64)[numbers]
            for numbers in chunks
        ]

    def _judge(self, documents: Sequence[Document], assigned: Sequence[Int64Array], tally: Tally) -> None:
        """Compute each label's loss along its own path, path by path."""
        sequences = concatenate([document.sequences for document in documents])
        routes = np.concatenate(assigned)
        owner = np.repeat(np.arange(len(documents)), [len(document.sequences) for document in documents])
        counted = sequences.labels != IGNORED
        for index in np.unique(routes[counted]).tolist():
            mine = counted & (routes == index)
            windows = np.flatnonzero(mine.any(1))
            losses = self._losses(self.paths[index], _masked(sequences, mine), windows)
            tally.add(index, losses.sum(), int(mine.sum()), len(np.unique(owner[windows])))
        tally.num_documents += len(documents)
        tally.num_bytes += int(sequences.num_bytes.sum())

    def _losses(
        self,
        path: Path,
        sequences: Sequences,
        windows: npt.NDArray[np.intp],
        batch_size: int = _BATCH_WINDOWS,
    ) -> Float64Array:
        """Nats of each of the windows under a path, summed over its labels."""
        composed = self.use(path)
        parts = [np.zeros(0)]
        with torch.inference_mode(), memory_errors("evaluating"):
            for start in range(0, len(windows), batch_size):
                batch = sequences.select(windows[start : start + batch_size])
                parts.append(composed.losses(batch).double().cpu().numpy())
        return np.concatenate(parts)

    def path_losses(
        self, rows: Iterable[Row], *, like: Router, progress: Progress = _no_progress
    ) -> tuple[Float32Array, Float64Array]:
        """What a discriminative router is fitted to: features [N, d], and nats of each document under each path [N, P].

        Documents that are no longer than the prefix are left out. All that are given are in memory.

        Args:
            rows: The documents.
            like: A router that says how long prefixes are.
            progress: Told paths done and paths in all.

        Raises:
            DataError: None is left.
        """
        tokenizer, length = self._resident.tokenizer, self.recipe.inner.sequence_length
        prefix_tokens = max(like.num_prefix_tokens, self.recipe.task.prefix_tokens)
        read = read_documents(rows, tokenizer, sequence_length=length, prefix_tokens=prefix_tokens)
        documents = [document for document in read if len(document.sequences)]
        if not documents:
            raise too_short(prefix_tokens)
        prefixes = [document.tokens[:-1][: like.num_prefix_tokens].tolist() for document in documents]
        features = self._features(prefixes)
        sequences = concatenate([document.sequences for document in documents])
        owner = np.repeat(np.arange(len(documents)), [len(document.sequences) for document in documents])
        losses = np.zeros((len(documents), len(self.paths)))
        for index, path in enumerate(self.paths):
            found = self._losses(path, sequences, np.arange(len(sequences)))
            losses[:, index] = np.bincount(owner, weights=found, minlength=len(documents))
            progress(index + 1, len(self.paths))
        return features, losses

    # -- writing ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        every: int | None = None,
        path: Path | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[Piece]:
        """Continue a text, piece by piece as it is written.

        Args:
            prompt: Its beginning, at least one character.
            max_new_tokens: Stop after so many, if the model does not end the text before.
            every: Choose the path anew every so many tokens of the text; None keeps the prompt's.
            path: Take this one, whatever the router says.
            temperature: 0 takes the likeliest token; else tokens are drawn at this temperature.
            seed: Of the draws.

        Raises:
            UsageError: The prompt leaves no room, or there is neither router nor path.
        """
        tokens = text_tokens(prompt, self._resident.tokenizer)
        limit = int(getattr(self._resident.model.config, "max_position_embeddings", None) or 2**31)
        if len(tokens) >= limit:
            raise UsageError(
                f"the prompt has {len(tokens)} tokens and the base reads {limit}", hint="shorten it"
            )
        chooser = torch.Generator().manual_seed(seed)
        speech = _Speech(self._resident.tokenizer, tokens)
        guide = _Guide(self, path, every)
        current, cache = guide.at(tokens), None
        for _ in range(min(max_new_tokens, limit - len(tokens))):
            before, current = current, guide.at(tokens)
            if current != before:
                cache = None  # another path's keys and values
            logits, cache = self._step(current, tokens if cache is None else tokens[-1:], cache)
            token = _choose(logits, temperature, chooser)
            if token == self._resident.tokenizer.eos_token_id:
                break
            tokens.append(token)
            if text := speech.say(token):
                yield Piece(text, current)
        if text := speech.rest():
            yield Piece(text, current)

    def _step(self, path: Path, tokens: Sequence[int], cache: Any) -> tuple[torch.Tensor, Any]:
        """Logits [V] of the next token, float32 on the host, and the cache of keys and values with it."""
        composed = self.use(path)
        resident = composed.resident
        inputs = torch.tensor([list(tokens)], dtype=torch.int64, device=resident.device)
        with torch.inference_mode(), memory_errors("generating"), resident.arithmetic():
            output = resident.model(input_ids=inputs, past_key_values=cache, use_cache=True)
        return output.logits[0, -1].float().cpu(), output.past_key_values


class _Guide:
    """Which path writes the next token."""

    def __init__(self, model: Inference, path: Path | None, every: int | None) -> None:
        self._model = model
        self._every = every if every is None else _checked(every)
        self._path = path or (model.paths[0] if len(model.paths) == 1 else None)
        self._is_fixed = self._path is not None
        self._source: list[int] = []

    def at(self, tokens: Sequence[int]) -> Path:
        if self._path is not None and (self._is_fixed or self._every is None):
            return self._path
        source = _source(tokens, len(tokens), self._model.router.num_prefix_tokens, self._every)
        if self._path is None or source != self._source:
            self._source = source
            self._path = self._model.choose([source])[0]
        return self._path


class _Speech:
    """Tokens to text: what is not yet a whole character waits."""

    def __init__(self, tokenizer: Any, tokens: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(tokens[-_CONTEXT_TOKENS:])
        self._said = self._decode()

    def say(self, token: int) -> str:
        self._tokens.append(token)
        return "" if self._decode().endswith("\ufffd") else self.rest()

    def rest(self) -> str:
        text = self._decode()
        new = text[len(self._said) :]
        self._tokens = self._tokens[-_CONTEXT_TOKENS:]
        self._said = self._decode()
        return new

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))


def _chunks(document: Document, num_prefix: int, every: int | None) -> Int64Array:
    """The number of the chunk of each label, [N, T]; all 0 without re-routing."""
    if every is None:
        return np.zeros(document.positions.shape, np.int64)
    chunks = (document.positions.astype(np.int64) - num_prefix) // _checked(every)
    # What is no label lies anywhere and is looked at by nobody.
    return np.where(document.sequences.labels == IGNORED, 0, np.maximum(chunks, 0))


def _source(tokens: Sequence[int], position: int, num_prefix: int, every: int | None) -> list[int]:
    """The tokens that choose the path of the token at ``position``: the prefix, or the end of the chunk before."""
    chunk = 0 if every is None else (position - num_prefix) // every
    if chunk <= 0 or every is None:
        return list(tokens[:num_prefix])
    stop = num_prefix + chunk * every
    return list(tokens[max(stop - every, stop - num_prefix) : stop])


def _masked(sequences: Sequences, kept: npt.NDArray[np.bool_]) -> Sequences:
    return Sequences(
        tokens=sequences.tokens,
        labels=np.where(kept, sequences.labels, np.int32(IGNORED)),
        lengths=sequences.lengths,
        num_bytes=sequences.num_bytes,
        num_tokens=sequences.num_tokens,
    )


def _choose(logits: torch.Tensor, temperature: float, chooser: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=chooser))


def _checked(every: int) -> int:
    if every < 1:
        raise UsageError(
            f"the path is to be chosen every {every} tokens", hint="use 1 or more, for example 64"
        )
    return every
