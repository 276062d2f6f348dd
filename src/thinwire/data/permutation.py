"""A permutation of 0 .. size - 1 without a table: any element of a shuffled epoch of any length in constant memory.

A Feistel network of four rounds permutes the next power of four; results outside the range are sent through again until they fall
inside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), fewer than four turns on average.
It is our own arithmetic, so that a resumed run sees the same order under every version of numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 4
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele et al. 2014): every bit of the input moves every bit of the output."""
    value = (value ^ (value >> np.uint64(30))) * _MIX[0]
    value = (value ^ (value >> np.uint64(27))) * _MIX[1]
    return value ^ (value >> np.uint64(31))


def key_of(*numbers: int) -> int:
    """One 64-bit key from several numbers; their order matters."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = mix(key + np.uint64(0x9E3779B97F4A7C15) + np.uint64(number % (1 << 64)))
    return int(key[0])


def permute(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Where each index, all in [0, size), goes under the permutation that `key` chooses."""
    half_bits = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    round_keys = [np.uint64(key_of(key, turn)) for turn in range(_ROUNDS)]
    value = index.astype(np.uint64)
    outside = np.ones(value.shape, dtype=bool)
    while outside.any():
        left, right = value[outside] >> half_bits, value[outside] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right + round_key) & mask)
        value[outside] = (left << half_bits) | right
        outside = value >= np.uint64(size)
    return value.astype(np.int64)
