"""Averaging of places drawn at random, the same on all ranks: nothing but values travels, summed by the all-reduce.

Of a parameter of n values k = ceil(fraction n) are sent, one of each of k strata of equal length (but for one value):

    stratum j   [floor(j n / k), floor((j + 1) n / k))
    place       drawn evenly in it, from a generator seeded with the parameter's name and how often it was sent

    w_i = g_i + e_i          what rank i should send
    result  1/p sum_i w_i    at the k places, one all-reduce for all parameters of a bucket; 0 elsewhere
    error   l_i = w_i        elsewhere; 0 at the k places

so 1/p sum_i l_i = 1/p sum_i w_i - result. Each value is sent with probability k/n, as without strata, but no place can wait for
ever by the neighbours' luck, and drawing costs k steps and no permutation of n. Values are sent as they are, not n/k times as
large: what is not sent stays as residual, and without error feedback the average is short of (1 - k/n) of the gradient.

Wangni et al. 2018; Stich et al. 2018 (sparsified SGD with memory: random k).
"""

import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from math import ceil, prod

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Counting, Parameters, Share, exact_bytes, flags_of, ring_bytes
from thinwire.compress.base import finite
from thinwire.compress.memory import Memory
from thinwire.compress.speed import seconds_of_stages
from thinwire.traffic import Transfer

TRIED_VALUES = 2**18
DRAWN = 2**62
"""Integers below it are drawn and taken modulo a stratum's length; no length is so long that this would favour a place."""


def places(name: str, count: int, numel: int, k: int) -> Tensor:
    """[k] int64, going up: those of the `count`-th time that this parameter is sent."""
    ends = torch.arange(1, k + 1) * numel // k
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {count}".encode()))
    return starts + torch.randint(DRAWN, (k,), generator=generator) % (ends - starts)


class RandomK(Counting):
    """See the top of the file. What rides along is behind the chosen values."""

    def __init__(self, memory: Memory, ledger: Ledger, *, fraction: float = 0.01) -> None:
        self._memory, self._ledger = memory, ledger
        self._fraction = Fraction(str(fraction))  # as it was written: 0.07 of 100 are 7, not 8
        self._counts: dict[str, int] = {}

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """Of the chosen values."""
        return ring_bytes(self._chosen(prod(shape)), world_size)

    def transfers(self, label: str, parameters: Parameters, exact: Parameters, axis: str, world_size: int) -> list[Transfer]:
        """One all-reduce. Times the choice."""
        chosen = sum(self._chosen(parameter.numel) for parameter in parameters)
        size = exact_bytes([*exact, flags_of([*parameters, *exact], chosen + 1)])
        work = self._seconds_per_value * sum(parameter.numel for parameter in parameters)
        return [Transfer(label=f"{label} chosen", axis=axis, op="all_reduce", message_bytes=size, work_s=work)]

    def average(self, share: Share) -> Iterator[None]:
        """One collective, see the top of the file."""
        wanted: list[Tensor] = []
        chosen: list[Tensor] = []
        for piece in share.pieces:
            all_of = self._memory.exact(piece.name, piece.of(share.buffer))
            wanted.append(all_of if share.found_finite(all_of) else torch.zeros_like(all_of))
            chosen.append(places(piece.name, self.count(piece.name), piece.numel, self._chosen(piece.numel)))
        values = [all_of[where] for all_of, where in zip(wanted, chosen, strict=True)]
        mean = torch.cat([*values, share.riding(flagged=True)]).div_(self._first.size())
        with self._ledger.label(f"{share.label} chosen"):
            dist.all_reduce(mean, group=self._first)
        lengths = [len(where) for where in chosen]
        share.arrived(mean[sum(lengths) :], flagged=True)
        arrived = mean[: sum(lengths)].split(lengths)
        for piece, all_of, where, part in zip(share.pieces, wanted, chosen, arrived, strict=True):
            if share.counts(piece):
                if self._memory.keeps:
                    self._memory.keep(piece.name, all_of.index_fill(0, where, 0.0))
                piece.of(share.buffer).zero_()[where] = part.to(share.buffer.dtype)
        yield

    def _chosen(self, numel: int) -> int:
        return ceil(self._fraction * numel)

    @cached_property
    def _seconds_per_value(self) -> float:
        """Of a parameter, measured here on a bucket's size."""
        values = torch.ones(TRIED_VALUES)

        def run() -> Iterator[None]:
            wanted = values + values if self._memory.keeps else values
            finite(wanted)
            where = places("", 0, TRIED_VALUES, self._chosen(TRIED_VALUES))
            sent = wanted[where]
            if self._memory.keeps:
                wanted.index_fill(0, where, 0.0).clone()
            values.zero_()[where] = sent
            yield

        return seconds_of_stages(run)[0] / TRIED_VALUES
