"""Batches of next-token prediction, with nothing to save: each is a function of the step and the seed.

The training tokens are cut into windows of `sequence` tokens (from an offset drawn anew each epoch), the windows are
permuted, and each step takes the next `global_batch` of them; the epoch ends when no full global batch is left. A global batch
is cut into micro-batches of b sequences each:

    row i of micro-batch j = sequence j * b + i of the global batch

so a step trains on the same windows whoever takes which micro-batch, and a run resumes at a step by asking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinwire.data.permutation import key_of, permute
from thinwire.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class TrainBatches:
    """`global_batch` counts the sequences of one step over all ranks and micro-batches."""

    tokens: NDArray[Any]
    sequence: int
    global_batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.global_batch > self.num_windows:
            raise UserError(
                f"a batch of {self.global_batch} sequences of {self.sequence} tokens wants more text than there is: "
                f"{len(self.tokens)} training tokens give {self.num_windows}; take more text or a smaller batch"
            )

    @property
    def num_windows(self) -> int:
        """Windows of an epoch, one sequence short of all so that every offset fits."""
        return max(0, len(self.tokens) - self.sequence) // self.sequence

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
        first = index * size
        starts = self.window_starts(step)[first : first + size]
        return _cut(self.tokens, starts, self.sequence)

    def window_starts(self, step: int) -> NDArray[np.int64]:
        """Where in `tokens` each sequence of the step's global batch begins."""
        epoch, place = divmod(step, self.steps_per_epoch)
        key = key_of(self.seed, epoch)
        index = np.arange(place * self.global_batch, (place + 1) * self.global_batch, dtype=np.int64)
        return permute(index, self.num_windows, key) * self.sequence + key_of(key, 1) % self.sequence


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


def _cut(tokens: NDArray[Any], starts: NDArray[np.int64], sequence: int) -> tuple[Tensor, Tensor]:
    windows = torch.from_numpy(tokens[starts[:, None] + np.arange(sequence + 1)].astype(np.int64))
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
