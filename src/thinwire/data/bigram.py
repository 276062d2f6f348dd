"""The loss of a table of pairs: what any model of the text has to beat.

    p(b | a) = (count(a, b) + 1) / (count(a) + V),        loss = - mean of ln p over the held-out pairs

Counts come from the training tokens alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.errors import UserError

LARGEST_VOCABULARY = 4096
_CHUNK = 1 << 22


def bigram_loss(train: NDArray[Any], held_out: NDArray[Any], vocabulary: int) -> float:
    """Nats per token. UserError above 4,096 tokens of vocabulary, where the table of pairs is larger than it is worth."""
    if vocabulary > LARGEST_VOCABULARY:
        raise UserError(f"a table of pairs is kept up to {LARGEST_VOCABULARY} tokens of vocabulary, not {vocabulary}")
    if len(held_out) < 2:
        raise UserError(f"the held-out part has {len(held_out)} tokens; take more text")
    counts = _pairs(train, vocabulary) + 1.0
    loss = np.log(counts.sum(axis=1, keepdims=True)) - np.log(counts)
    return float((_pairs(held_out, vocabulary) * loss).sum() / (len(held_out) - 1))


def _pairs(tokens: NDArray[Any], vocabulary: int) -> NDArray[np.int64]:
    """How often each token follows each other, [V, V]; in chunks, so that a large memory map stays on disk."""
    counts = np.zeros(vocabulary * vocabulary, dtype=np.int64)
    for first in range(0, len(tokens) - 1, _CHUNK):
        chunk = tokens[first : first + _CHUNK + 1].astype(np.int64)
        counts += np.bincount(chunk[:-1] * vocabulary + chunk[1:], minlength=vocabulary * vocabulary)
    return counts.reshape(vocabulary, vocabulary)
