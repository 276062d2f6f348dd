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

Each parameter is padded to a multiple of p blocks and cut by itself, so results do not depend on which bucket it travels in.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.backend import ALL_GATHER
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece, check_finite
from thinwire.compress.base import Codec
from thinwire.compress.memory import Memory
from thinwire.compress.speed import seconds_per_value
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


def shard_length(shape: Sequence[int], world_size: int, block: int) -> int:
    """Values of one shard of a parameter: a multiple of the codec's block."""
    return -(-prod(shape) // (world_size * block)) * block


class TwoShot:
    """See the top of the file, and `thinwire.compress.averager.Averager`. Nothing but the memory goes on from step to step."""

    settled_after = 0

    def __init__(self, codec: Codec, memory: Memory, ledger: Ledger) -> None:
        self._codec, self._memory, self._ledger = codec, memory, ledger
        self._group: dist.ProcessGroup | None = None

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """p - 1 codes of a shard, twice."""
        return 2 * (world_size - 1) * self._codec.payload_bytes(shard_length(shape, world_size, self._codec.block))

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        """An all-to-all of codes and an all-gather of the averages' codes. Times the codec."""
        length = sum(shard_length(parameter.shape, world_size, self._codec.block) for parameter in parameters)
        size = self._codec.payload_bytes(length)
        encode_s, decode_s = seconds_per_value(self._codec)
        others = (world_size - 1) * length
        first = others * encode_s
        second = length * encode_s + (others * (2 if self._memory.keeps else 1) + world_size * length) * decode_s
        return [
            Transfer(label=f"{label} codes", axis=axis, op="all_to_all", message_bytes=world_size * size, work_s=first),
            Transfer(label=f"{label} averages", axis=axis, op="all_gather", message_bytes=size, work_s=second),
        ]

    def attach(self, group: dist.ProcessGroup) -> None:
        """The group over which it averages."""
        self._group = group

    def average(self, buffer: torch.Tensor, pieces: Sequence[Piece], label: str) -> None:
        """Two collectives, see the top of the file."""
        assert self._group is not None, "attach() comes first"
        p, rank = self._group.size(), self._group.rank()
        work = self._gather(buffer, pieces, p)
        length = work.shape[1]
        size = self._codec.payload_bytes(length)
        codes = torch.zeros(p, size, dtype=torch.uint8)
        for shard in range(p):
            if shard != rank:
                codes[shard] = self._codec.encode(work[shard])
        received = torch.empty_like(codes)
        with self._ledger.label(f"{label} codes"):
            dist.all_to_all_single(received, codes, group=self._group)

        mean = torch.zeros(length)
        for source in range(p):
            mean += work[rank] if source == rank else self._codec.decode(received[source], length)
        mean /= p
        code = self._codec.encode(mean)
        averages = torch.empty(p, size, dtype=torch.uint8)
        with self._ledger.label(f"{label} averages"):
            ALL_GATHER(averages.view(-1), code, group=self._group)

        results = torch.stack([self._codec.decode(averages[shard], length) for shard in range(p)])
        if self._memory.keeps:
            for shard in range(p):
                if shard == rank:
                    work[shard] = p * (mean - results[shard])
                else:
                    work[shard] -= self._codec.decode(codes[shard], length)
            self._keep(work, pieces)
        self._scatter(results, buffer, pieces)

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Nothing to deal out."""

    def _gather(self, buffer: torch.Tensor, pieces: Sequence[Piece], p: int) -> torch.Tensor:
        """[p, sum of shards]: row s holds shard s of every piece, with what is owed added and zeros behind the end."""
        shards = [shard_length(piece.shape, p, self._codec.block) for piece in pieces]
        work = torch.empty(p, sum(shards))
        start = 0
        for piece, shard in zip(pieces, shards, strict=True):
            values = self._memory.corrected(piece.name, piece.of(buffer))
            check_finite(values, piece.name)
            padded = torch.nn.functional.pad(values, (0, p * shard - piece.numel))
            work[:, start : start + shard] = padded.view(p, shard)
            start += shard
        return work

    def _scatter(self, results: torch.Tensor, buffer: torch.Tensor, pieces: Sequence[Piece]) -> None:
        start = 0
        for piece in pieces:
            shard = shard_length(piece.shape, results.shape[0], self._codec.block)
            piece.of(buffer).copy_(results[:, start : start + shard].reshape(-1)[: piece.numel])
            start += shard

    def _keep(self, lost: torch.Tensor, pieces: Sequence[Piece]) -> None:
        start = 0
        for piece in pieces:
            shard = shard_length(piece.shape, lost.shape[0], self._codec.block)
            self._memory.keep(piece.name, lost[:, start : start + shard].reshape(-1)[: piece.numel])
            start += shard
