"""Averaging of places drawn at random, the same on all ranks: nothing but values travels, summed on the way.

Of a parameter of n values k = ceil(fraction n) are sent, one of each of k strata of equal length (but for one value):

    stratum j   [floor(j n / k), floor((j + 1) n / k))
    place       drawn evenly in it, from a generator seeded with the parameter's name and how often it was sent

    w_i = g_i + e_i          what rank i should send
    result  1/p sum_i w_i    at the k places, one all-reduce for all parameters of a bucket; 0 elsewhere
    lost    l_i = w_i        elsewhere; 0 at the k places

so 1/p sum_i l_i = 1/p sum_i w_i - result. Each value is sent with probability k/n, as without strata, but no place can wait for
ever by the neighbours' luck, and drawing costs k steps and no permutation of n. Values are sent as they are, not n/k times as
large: what is not sent is owed, and without error feedback the average is short of (1 - k/n) of the gradient.

Wangni et al. 2018; Stich et al. 2018 (sparsified SGD with memory: random k).
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import ceil, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Share, exact_bytes, flags_of
from thinwire.compress.base import finite
from thinwire.compress.memory import Memory
from thinwire.traffic import Transfer
from thinwire.workload import Parameter

TRIED_VALUES, TRIES = 2**18, 3
DRAWN = 2**62
"""Integers below it are drawn and taken modulo a stratum's length; no length is so long that this would favour a place."""


def places(name: str, count: int, numel: int, k: int) -> Tensor:
    """[k] int64, going up: those of the `count`-th time that this parameter is sent."""
    ends = torch.arange(1, k + 1) * numel // k
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {count}".encode()))
    return starts + torch.randint(DRAWN, (k,), generator=generator) % (ends - starts)


class RandomK:
    """See the top of the file, and `thinwire.compress.averager.Averager`. Counts go on from step to step."""

    settled_after = 0

    def __init__(self, memory: Memory, ledger: Ledger, *, fraction: float = 0.01) -> None:
        self._memory, self._ledger = memory, ledger
        self._fraction = Fraction(str(fraction))  # as it was written: 0.07 of 100 are 7, not 8
        self._group: dist.ProcessGroup | None = None
        self._counts: dict[str, int] = {}
        self._seconds_per_value = 0.0

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """A ring's 2 (p-1)/p of the chosen values."""
        return 2 * (world_size - 1) / world_size * 4 * self._chosen(prod(shape))

    def carries(self, numel: int, world_size: int) -> bool:
        """Behind the chosen values, in the same all-reduce."""
        return True

    def transfers(
        self, label: str, parameters: Sequence[Parameter], exact: Sequence[Parameter], axis: str, world_size: int
    ) -> list[Transfer]:
        """One all-reduce. Times the choice."""
        size = exact_bytes([*exact, flags_of([*parameters, *exact], 1 + sum(self._chosen(one.numel) for one in parameters))])
        work = self._work_s() * sum(parameter.numel for parameter in parameters)
        return [Transfer(label=f"{label} chosen", axis=axis, op="all_reduce", message_bytes=size, work_s=work)]

    def attach(self, first: dist.ProcessGroup, second: dist.ProcessGroup) -> None:
        """There is one stage."""
        self._group = first

    def average(self, share: Share) -> Iterator[None]:
        """One collective, see the top of the file."""
        assert self._group is not None, "attach() comes first"
        wanted: list[Tensor] = []
        chosen: list[Tensor] = []
        for piece in share.pieces:
            all_of = self._memory.exact(piece.name, piece.of(share.buffer))
            wanted.append(all_of if share.found_finite(all_of) else torch.zeros_like(all_of))
            count = self._counts.get(piece.name, 0)
            self._counts[piece.name] = count + 1
            chosen.append(places(piece.name, count, piece.numel, self._chosen(piece.numel)))
        values = [all_of[where] for all_of, where in zip(wanted, chosen, strict=True)]
        mean = torch.cat([*values, share.riding(flagged=True)]).div_(self._group.size())
        with self._ledger.label(f"{share.label} chosen"):
            dist.all_reduce(mean, group=self._group)
        lengths = [len(where) for where in chosen]
        share.arrived(mean[sum(lengths) :], flagged=True)
        arrived = mean[: sum(lengths)].split(lengths)
        for piece, all_of, where, part in zip(share.pieces, wanted, chosen, arrived, strict=True):
            if share.counts(piece):
                if self._memory.keeps:
                    self._memory.keep(piece.name, all_of.index_fill(0, where, 0.0))
                piece.of(share.buffer).zero_()[where] = part.to(share.buffer.dtype)
        yield

    def state_dict(self) -> dict[str, Any]:
        """How often each parameter was sent."""
        return {"counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where it was."""
        self._counts = dict(state["counts"])

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Counts were equal on all ranks."""
        self.load_state_dict(states[0])

    def _chosen(self, numel: int) -> int:
        return ceil(self._fraction * numel)

    def _work_s(self) -> float:
        """Seconds per value of a parameter, measured here: the fastest of a few tries on a bucket's size."""
        if not self._seconds_per_value:
            values = torch.ones(TRIED_VALUES)
            tries = []
            for count in range(TRIES):
                started = time.perf_counter()
                wanted = values + values if self._memory.keeps else values
                finite(wanted)
                where = places("", count, wanted.numel(), self._chosen(wanted.numel()))
                sent = wanted[where]
                if self._memory.keeps:
                    wanted.index_fill(0, where, 0.0).clone()
                values.zero_()[where] = sent
                tries.append(time.perf_counter() - started)
            self._seconds_per_value = min(tries) / TRIED_VALUES
        return self._seconds_per_value
