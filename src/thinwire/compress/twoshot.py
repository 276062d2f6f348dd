"""Averaging through a codec in two shots, with error feedback at both.

Two shots (as in 1-bit Adam, Tang et al. 2021, and ZeRO++, Wang et al. 2023). p ranks, w_i = g_i + e_i on rank i, C a codec, D its
decoder; the vector is cut into p shards, and rank r averages shard r:

    all-to-all    rank i sends C(w_i[s]) to rank s, for each shard s but its own
    average       a[r] = 1/p ( w_r[r] + sum over i != r, in the order of ranks, of D C(w_i[r]) )
    all-gather    each rank gets D C(a[s]) for every s, so all results are bit-equal

Error feedback with one memory per rank for both stages (the owner of a shard keeps what its second stage has lost, p-fold because
it enters the next average with weight 1/p):

    l_i[s] = w_i[s] - D C(w_i[s])  for s != i         l_r[r] = p ( a[r] - D C(a[r]) )

so that with e <- l what is owed to the average is conserved:  1/p sum_i e_i = 1/p sum_i w_i - result.

Each parameter is padded to a multiple of p blocks and cut by itself, so results do not depend on which bucket it travels in. What
is averaged exactly goes along in the same two messages, as float32.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist

from thinwire.collectives.backend import ALL_GATHER
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece, check_finite, joined, put_back
from thinwire.compress.base import Codec, encode_with_error, finite
from thinwire.compress.memory import Memory
from thinwire.compress.plain import GRADIENT_BYTES
from thinwire.compress.speed import seconds_per_value
from thinwire.compress.stateless import Stateless
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


def shard_length(shape: Sequence[int], world_size: int, block: int) -> int:
    """Values of one shard of a parameter: a multiple of the codec's block."""
    return -(-prod(shape) // (world_size * block)) * block


class TwoShot(Stateless):
    """See the top of the file, and `thinwire.compress.averager.Averager`. Nothing but the memory goes on from step to step."""

    settled_after = 0

    def __init__(self, codec: Codec, memory: Memory, ledger: Ledger) -> None:
        self._codec, self._memory, self._ledger = codec, memory, ledger
        self._first: dist.ProcessGroup | None = None
        self._second: dist.ProcessGroup | None = None

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """p - 1 codes of a shard, twice."""
        return 2 * (world_size - 1) * self._codec.payload_bytes(shard_length(shape, world_size, self._codec.block))

    def carries(self, numel: int, world_size: int) -> bool:
        """Two shots of float32 send as much as an all-reduce."""
        return True

    def transfers(
        self, label: str, parameters: Sequence[Parameter], exact: Sequence[Parameter], axis: str, world_size: int
    ) -> list[Transfer]:
        """An all-to-all of codes and an all-gather of the averages' codes. Times the codec."""
        length = sum(shard_length(parameter.shape, world_size, self._codec.block) for parameter in parameters)
        size = self._codec.payload_bytes(length) + GRADIENT_BYTES * -(-sum(one.numel for one in exact) // world_size)
        encode_s, decode_s = seconds_per_value(self._codec)
        others = (world_size - 1) * length
        if self._memory.keeps:
            encode_s += decode_s  # at most: what is lost is known after decoding
        first = others * encode_s
        second = length * encode_s + (others + world_size * length) * decode_s
        return [
            Transfer(label=f"{label} codes", axis=axis, op="all_to_all", message_bytes=world_size * size, work_s=first),
            Transfer(label=f"{label} averages", axis=axis, op="all_gather", message_bytes=size, work_s=second),
        ]

    def attach(self, first: dist.ProcessGroup, second: dist.ProcessGroup) -> None:
        """One group for each shot."""
        self._first, self._second = first, second

    def average(self, buffer: torch.Tensor, pieces: Sequence[Piece], exact: Sequence[Piece], label: str) -> Iterator[None]:
        """Two collectives, see the top of the file. A row is the codes of a shard, and behind them its part of what is exact."""
        assert self._first is not None and self._second is not None, "attach() comes first"
        p, rank = self._first.size(), self._first.rank()
        work = self._gather(buffer, pieces, p)
        length = work.shape[1]
        size = self._codec.payload_bytes(length)
        riding = joined(buffer, exact)
        riding = torch.nn.functional.pad(riding, (0, -riding.numel() % p)).view(p, -1)
        codes = torch.zeros(p, size + GRADIENT_BYTES * riding.shape[1], dtype=torch.uint8)
        codes[:, size:] = riding.view(torch.uint8)
        lost = [work[rank]] * p
        for shard in range(p):
            if shard != rank:
                codes[shard, :size], lost[shard] = self._encode(work[shard])
        received = torch.empty_like(codes)
        with self._ledger.label(f"{label} codes"):
            dist.all_to_all_single(received, codes, group=self._first)
        yield

        mean, exact_mean = torch.zeros(length), torch.zeros(riding.shape[1])
        for source in range(p):
            mean += work[rank] if source == rank else self._codec.decode(received[source, :size], length)
            exact_mean += received[source, size:].clone().view(torch.float32)
        self._check(mean, pieces, p)
        mean /= p
        exact_mean /= p
        code, lost[rank] = self._encode(mean)
        code = torch.cat([code, exact_mean.view(torch.uint8)])
        averages = torch.empty(p, code.numel(), dtype=torch.uint8)
        with self._ledger.label(f"{label} averages"):
            ALL_GATHER(averages.view(-1), code, group=self._second)

        results = [self._codec.decode(averages[shard, :size], length) for shard in range(p)]
        if self._memory.keeps:
            lost[rank].mul_(p)
        self._hand_out(results, lost, buffer, pieces)
        if exact:
            flat = averages[:, size:].reshape(-1).view(torch.float32)
            put_back(flat[: sum(piece.numel for piece in exact)], buffer, exact)

    def _encode(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The code of `values`, and what it loses if anybody keeps that."""
        return encode_with_error(self._codec, values) if self._memory.keeps else (self._codec.encode(values), values)

    def _gather(self, buffer: torch.Tensor, pieces: Sequence[Piece], p: int) -> torch.Tensor:
        """[p, sum of shards]: row s holds shard s of every piece, with what is owed added and zeros behind the end."""
        shards = [shard_length(piece.shape, p, self._codec.block) for piece in pieces]
        work = torch.empty(p, sum(shards))
        start = 0
        for piece, shard in zip(pieces, shards, strict=True):
            values = self._memory.corrected(piece.name, piece.of(buffer))
            if values.numel() < p * shard:
                values = torch.nn.functional.pad(values, (0, p * shard - values.numel()))
            work[:, start : start + shard] = values.view(p, shard)
            start += shard
        return work

    def _check(self, mean: torch.Tensor, pieces: Sequence[Piece], p: int) -> None:
        """What is not finite on any rank is not finite in the owner's mean, which is a p-th of what there would be to look at."""
        if not finite(mean):
            shards = [shard_length(piece.shape, p, self._codec.block) for piece in pieces]
            for piece, part in zip(pieces, mean.split(shards), strict=True):
                check_finite(part, piece.name)

    def _hand_out(
        self, results: list[torch.Tensor], lost: list[torch.Tensor], buffer: torch.Tensor, pieces: Sequence[Piece]
    ) -> None:
        """Results back into the buffer, and what was lost into the memory, shard behind shard for each piece."""
        start, p = 0, len(results)
        for piece in pieces:
            shard = shard_length(piece.shape, p, self._codec.block)
            part = slice(start, start + shard)
            if self._memory.keeps:
                self._memory.keep(piece.name, torch.cat([row[part] for row in lost])[: piece.numel])
            rows = [row[part] for row in results]
            if piece.numel == p * shard:
                torch.cat(rows, out=piece.of(buffer))
            else:
                piece.of(buffer).copy_(torch.cat(rows)[: piece.numel])
            start += shard
