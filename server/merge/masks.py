"""Which elements a rule drops by chance: the same on every machine, in every tile, at every number of threads.

The chance of element e of a tensor of an update is the e-th 16-bit word of the Philox stream (Salmon et al.
2011) whose key is the BLAKE2b hash of (seed, worker, task, tensor): a counter-based generator can begin
anywhere, and depends on nothing but its key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

import numpy as np

from weft.common.modules import TensorSpec
from weft.server.merge import loops
from weft.server.merge.tiles import Float32, Scratch, Update, Words

NUM_WORDS: Final = 1 << 16
"""Chances are multiples of 1 / this."""
_WORDS_PER_COUNT: Final = 16
"""Words of one step of the counter: 4 × 64 bits."""


def chances(update: Update, name: str, seed: int, start: int, stop: int) -> Words:
    """One uniform uint16 for each of elements ``start:stop`` of a tensor of an update."""
    text = "\0".join((str(seed), update.worker_id, update.task_id, name))
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    first, last = start // _WORDS_PER_COUNT, -(-stop // _WORDS_PER_COUNT)
    stream = np.random.Philox(key=key, counter=first)
    raw = stream.random_raw((last - first) * _WORDS_PER_COUNT // 4)
    words: Words = raw.astype("<u8", copy=False).view("<u2")
    return words[start - first * _WORDS_PER_COUNT : stop - first * _WORDS_PER_COUNT]


def words_of(share: float) -> int:
    """How many of the words are below a chance of ``share``; at least one."""
    return max(1, round(share * NUM_WORDS))


def dropped(
    update: Update,
    spec: TensorSpec,
    start: int,
    values_T: Float32,
    scratch: Scratch,
    *,
    density: float,
    seed: int,
) -> Float32:
    """DARE (arXiv 2311.03099): each element of a tile stays with one chance, and is divided by it.

    Args:
        update: Whose worker and task decide, with the tensor's name and the seed.
        spec: The tensor.
        start: First element of the tile.
        values_T: Its elements.
        scratch: Holds what is returned, as "thinned".
        density: The chance, rounded to a multiple of 1 / ``NUM_WORDS``.
        seed: Another one leaves others.
    """
    num_words = words_of(density)
    words_T = chances(update, spec.name, seed, start, start + len(values_T))
    left_T = scratch.take("thinned", len(values_T), np.float32)
    loops.drop(values_T, words_T, num_words, np.float32(NUM_WORDS / num_words), left_T)
    return left_T


def dropped_by_rank(
    update: Update,
    spec: TensorSpec,
    start: int,
    values_T: Float32,
    read: Callable[[int, int], Float32],
    *,
    density: float,
    spread: float,
    seed: int,
) -> Float32:
    """DELLA (arXiv 2406.11617): the chance to stay rises with the rank of a magnitude in its row.

    It runs linearly from ``density − spread`` for a row's smallest magnitude to ``density + spread`` for its
    largest, the earlier of equal ones smaller. A tensor without rows is one row.

    Args:
        update: As of ``dropped``.
        spec: The tensor.
        start: First element of the tile.
        values_T: Its elements.
        read: Elements of the same update and tensor, for what the tile lacks of its rows.
        density: Mean chance.
        spread: Half of what chances differ by at most.
        seed: Another one leaves others.
    """
    width, stop = spec.shape[-1] if spec.shape else 1, start + len(values_T)
    first, last = start // width * width, -(-stop // width) * width
    whole = values_T
    if last - first > len(values_T):
        whole = read(first, last)
        # The tile may lie where this has been read to.
        values_T = whole[start - first : stop - first]
    order = np.argsort(np.abs(whole).reshape(-1, width), axis=1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(width)[np.newaxis], axis=1)
    share = (
        density - spread + 2 * spread * ranks.reshape(-1)[start - first : stop - first] / max(1, width - 1)
    )
    num_words_T = np.maximum(1, np.rint(share * NUM_WORDS)).astype(np.float32)
    words_T = chances(update, spec.name, seed, start, stop)
    return values_T * (words_T < num_words_T) * (np.float32(NUM_WORDS) / num_words_T)
