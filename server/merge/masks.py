"""Which elements a rule drops by chance: the same on every machine, in every tile, at every number of threads.

The chance of element e of a tensor of an update is the e-th 16-bit word of the Philox stream (Salmon et al.
2011) whose key is the BLAKE2b hash of (seed, worker, task, tensor): a counter-based generator can begin
anywhere, and depends on nothing but its key.
"""

from __future__ import annotations

import hashlib
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from weft.server.merge.tiles import Update

Words: TypeAlias = npt.NDArray[np.uint16]

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
