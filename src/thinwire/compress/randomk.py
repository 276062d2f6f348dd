"""Averaging of places drawn at random, the same on all ranks: nothing but values travels, summed by the all-reduce.

Of a parameter of n values k = ceil(fraction n) are sent, one of each of k strata of equal length (but for one value):

    stratum j   [floor(j n / k), floor((j + 1) n / k))
    place       drawn evenly in it: a hash of j, of the parameter's name and of how often it was sent, modulo the length

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
from math import ceil, prod

import torch
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_reduce
from thinwire.compress.averager import Counting, Parameters, Share, exact_bytes, flags_of, ring_bytes
from thinwire.compress.base import finite
from thinwire.compress.memory import Memory
from thinwire.compress.speed import seconds_of_stages
from thinwire.traffic import Transfer

TRIED_VALUES = 2**18
WORD = (1 << 32) - 1
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B
"""Of the hash of 32 bits (Wellons 2018, lowbias32); in int64 products wrap, and their low 32 bits are right everywhere."""


def places(name: str, count: int, numel: int, k: int, device: torch.device | None = None) -> Tensor:
    """[k] int64 on `device`, going up: those of the `count`-th time that this parameter is sent. The same on every device."""
    number = torch.arange(k, device=device)
    starts, ends = number * numel // k, (number + 1) * numel // k
    return starts + hashed(hashed(number) ^ zlib.crc32(f"{name} {count}".encode())) % (ends - starts)


def hashed(words: Tensor) -> Tensor:
    """int64 in 0 .. 2^32 - 1, one to one; any bit that changes turns about half of the others."""
    words = (words ^ (words >> 16)) * _FIRST & WORD
    words = (words ^ (words >> 15)) * _SECOND & WORD
    return words ^ (words >> 16)


class RandomK(Counting):
    """See the top of the file. What rides along is behind the chosen values."""

    def __init__(self, memory: Memory, ledger: Ledger, *, fraction: float = 0.01) -> None:
        self._memory, self._ledger = memory, ledger
        self._fraction = Fraction(str(fraction))  # as it was written: 0.07 of 100 are 7, not 8
        self._counts: dict[str, int] = {}
        self._seconds: dict[torch.device, float] = {}
        """Of a value, by where that was measured."""

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """Of the chosen values."""
        return ring_bytes(self._chosen(prod(shape)), world_size)

    def transfers(self, label: str, parameters: Parameters, exact: Parameters, axis: str, world_size: int) -> list[Transfer]:
        """One all-reduce. Times the choice."""
        chosen = sum(self._chosen(parameter.numel) for parameter in parameters)
        size = exact_bytes([*exact, flags_of([*parameters, *exact], chosen + 1)])
        if self.device not in self._seconds:
            self._seconds[self.device] = self._seconds_per_value()
        work = self._seconds[self.device] * sum(parameter.numel for parameter in parameters)
        return [Transfer(label=f"{label} chosen", axis=axis, op="all_reduce", message_bytes=size, work_s=work)]

    def average(self, share: Share) -> Iterator[None]:
        """One collective, see the top of the file."""
        wanted: list[Tensor] = []
        chosen: list[Tensor] = []
        for piece in share.pieces:
            wanted.append(share.finite_or_zeros(self._memory.exact(piece.name, piece.of(share.buffer))))
            kept = self._chosen(piece.numel)
            chosen.append(places(piece.name, self.count(piece.name), piece.numel, kept, share.buffer.device))
        values = [all_of[where] for all_of, where in zip(wanted, chosen, strict=True)]
        mean = torch.cat([*values, share.riding(flagged=True)]).div_(self._first.size())
        sent = all_reduce(mean, self._first, self._ledger, f"{share.label} chosen")
        yield

        sent.wait()
        lengths = [len(where) for where in chosen]
        share.arrived(mean[sum(lengths) :], flagged=True)
        arrived = mean[: sum(lengths)].split(lengths)
        for piece, all_of, where, part in zip(share.pieces, wanted, chosen, arrived, strict=True):
            if share.counts(piece):
                if self._memory.keeps:
                    self._memory.keep(piece.name, all_of.index_fill(0, where, 0.0))
                result = torch.zeros_like(all_of).index_copy_(0, where, part)
                share.deliver(result, piece.of(share.buffer))

    def _chosen(self, numel: int) -> int:
        return ceil(self._fraction * numel)

    def _seconds_per_value(self) -> float:
        """Of a parameter, measured here on a bucket's size."""
        values = torch.ones(TRIED_VALUES, device=self.device)

        def run() -> Iterator[None]:
            wanted = values + values if self._memory.keeps else values
            finite(wanted)
            where = places("", 0, TRIED_VALUES, self._chosen(TRIED_VALUES), self.device)
            sent = wanted[where]
            if self._memory.keeps:
                wanted.index_fill(0, where, 0.0).clone()
            values.zero_()[where] = sent
            yield

        return seconds_of_stages(run, self.device)[0] / TRIED_VALUES
