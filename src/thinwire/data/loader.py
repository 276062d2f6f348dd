"""Batches of next-token prediction, with nothing to save: each is a function of the step and the seed.

The training tokens are cut into windows of `sequence` tokens (from an offset drawn anew each epoch), the windows are
permuted, and each step takes the next `global_batch` of them; the epoch ends when no full global batch is left. A global batch
is cut into micro-batches of b sequences each:

    row i of micro-batch j = sequence j * b + i of the global batch

so a step trains on the same windows however its micro-batches are assigned, and a run resumes at any step.

Of several sources each is cut alone. An epoch draws m = weight * n windows, rounded, from a source that has n; draws are numbered
through all epochs, and draw d is window d mod n of turn d // n, permuted anew in each turn unless n divides m. So the windows of
a source are drawn equally often, give or take one, whatever its weight.

With `windows` = N there are N sequences, spread evenly over the text, and each epoch shows each of them once: samples return, so
N is a multiple of the global batch G. Place k of the global batch has N / G of them for itself, of which each epoch shows

    number (p(e, i) + h(e, k)) mod N / G at its step i        p a permutation, h a hash: who comes together changes by epoch

so that whoever trains on a place of the batch sees the same samples again, in any layout.

The permutation needs no table: a Feistel network of four rounds permutes the next power of four; results outside the range are
sent through again until they fall inside (cycle walking: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"), fewer
than four turns on average. It is our own arithmetic, so that a resumed run sees the same order under every version of numpy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.data.corpus import Part
from thinwire.errors import UserError

IGNORED = -100
_ROUNDS = 4
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


@dataclass(frozen=True)
class TrainBatches:
    """`global_batch` counts the sequences of one step over all ranks and micro-batches. `parts` make up `tokens`; none: one.
    windows: 0, or so many that return, of one part."""

    tokens: NDArray[Any]
    sequence: int
    global_batch: int
    seed: int = 0
    parts: tuple[Part, ...] = ()
    windows: int = 0

    def __post_init__(self) -> None:
        if self.windows:
            self._check_windows()
            return
        for part, draws in zip(self.parts, self._draws.tolist(), strict=False):
            if draws < 1:
                raise UserError(
                    f"data source {part.source!r} has {part.tokens} training tokens, of which an epoch shows no sequence of "
                    f"{self.sequence} with weight {part.weight:g}; give it more text or weight"
                )
        if self.global_batch > self.num_windows:
            raise UserError(
                f"a batch of {self.global_batch} sequences of {self.sequence} tokens needs more text than there is: "
                f"{len(self.tokens)} training tokens give {self.num_windows}; take more text or a smaller batch"
            )

    @cached_property
    def _windows(self) -> NDArray[np.int64]:
        """Of each part, one sequence short of all so that every offset fits."""
        lengths = np.array([part.tokens for part in self.parts] or [len(self.tokens)], dtype=np.int64)
        return np.maximum(0, lengths - self.sequence) // self.sequence

    @cached_property
    def _draws(self) -> NDArray[np.int64]:
        """Of each part, in an epoch."""
        weights = np.array([part.weight for part in self.parts]) if len(self.parts) > 1 else np.ones(1)
        return np.rint(weights * self._windows).astype(np.int64)

    @property
    def num_windows(self) -> int:
        """Windows of an epoch."""
        return self.windows or int(self._draws.sum())

    @property
    def steps_per_epoch(self) -> int:
        return self.num_windows // self.global_batch

    def micro_batch(self, step: int, index: int, num_micro: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [b, sequence] each, of micro-batch `index` of the step's `num_micro` over all ranks. Local.

        UserError if the global batch does not divide evenly.
        """
        if self.global_batch % num_micro:
            raise UserError(
                f"a batch of {self.global_batch} sequences does not divide over {num_micro} micro-batches; "
                f"make it a multiple of {num_micro}"
            )
        size = self.global_batch // num_micro
        starts = self.window_starts(step)[index * size : (index + 1) * size]
        windows = torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.sequence + 1)].astype(np.int64))
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def window_starts(self, step: int) -> NDArray[np.int64]:
        """Where in `tokens` each sequence of the step's global batch begins."""
        if self.windows:
            return self.samples(step) * self._cuts // self.windows * self.sequence
        epoch, place = divmod(step, self.steps_per_epoch)
        index = np.arange(place * self.global_batch, (place + 1) * self.global_batch, dtype=np.int64)
        drawn = permute(index, self.num_windows, key_of(self.seed, epoch))
        firsts, begin, starts = np.cumsum(self._draws) - self._draws, 0, np.empty_like(drawn)
        of_part = np.searchsorted(firsts, drawn, side="right") - 1
        for part, (windows, draws) in enumerate(zip(self._windows.tolist(), self._draws.tolist(), strict=True)):
            mine = np.flatnonzero(of_part == part)
            turns, window = np.divmod(epoch * draws + drawn[mine] - firsts[part], windows)
            for turn in np.unique(turns).tolist():
                key, now = key_of(self.seed, turn), turns == turn
                order = permute(window[now], windows, key_of(key, 2, part)) if draws % windows else window[now]
                starts[mine[now]] = begin + order * self.sequence + key_of(key, 1) % self.sequence
            begin += self.parts[part].tokens if self.parts else 0
        return starts

    def samples(self, step: int) -> NDArray[np.int64]:
        """Of `windows` which ones the step's global batch has, by number."""
        epoch, place = divmod(step, self.steps_per_epoch)
        rows = np.arange(self.global_batch, dtype=np.int64)
        turned = mix(rows.astype(np.uint64) + np.uint64(key_of(self.seed, epoch, 1))) % np.uint64(self.steps_per_epoch)
        now = permute(np.array([place], dtype=np.int64), self.steps_per_epoch, key_of(self.seed, epoch))
        turn = (now + turned.astype(np.int64)) % self.steps_per_epoch
        return permute(rows + self.global_batch * turn, self.windows, key_of(self.seed, 2))

    @property
    def _cuts(self) -> int:
        """Sequences of the text, cut one after the other from its first token."""
        return (len(self.tokens) - 1) // self.sequence

    def _check_windows(self) -> None:
        if self.windows > self._cuts:
            raise UserError(
                f"data.windows = {self.windows} sequences of {self.sequence} tokens, and {len(self.tokens)} training tokens have "
                f"{self._cuts}; take fewer or more text"
            )
        if self.windows % self.global_batch:
            raise UserError(
                f"data.windows = {self.windows} is no multiple of the {self.global_batch} sequences of a step, so some would not "
                f"return; take {self.windows // self.global_batch * self.global_batch or self.global_batch}"
            )


def held_out_batches(
    tokens: NDArray[Any], sequence: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets of the held-out part, window after window from the first token, each on exactly one rank.

    Every token but the first is a target exactly once. Every rank gets the same number of batches of the same shape;
    where the text runs out, targets are -100, at the end of a row or in whole batches. So sum the losses
    (reduction="sum") and divide by the number of other targets, over all ranks. UserError below two tokens.
    """
    if len(tokens) < 2:
        raise UserError(f"the held-out part has {len(tokens)} tokens; take more text")
    num_windows = -(-(len(tokens) - 1) // sequence)
    per_round = micro_batch * world_size
    for first in range(rank * micro_batch, -(-num_windows // per_round) * per_round, per_round):
        inputs = torch.zeros(micro_batch, sequence, dtype=torch.int64)
        targets = torch.full((micro_batch, sequence), IGNORED, dtype=torch.int64)
        for row, window in enumerate(range(first, min(first + micro_batch, num_windows))):
            text = torch.from_numpy(tokens[window * sequence : (window + 1) * sequence + 1].astype(np.int64))
            inputs[row, : len(text) - 1], targets[row, : len(text) - 1] = text[:-1], text[1:]
        yield inputs, targets


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
