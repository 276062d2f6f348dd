"""How the average of a bucket of gradients comes about: plainly, or through a codec in two shots with error feedback.

Two shots (as in 1-bit Adam, Tang et al. 2021, and ZeRO++, Wang et al. 2023). p ranks, w_i = g_i + e_i on rank i, C a codec, D its
decoder; the vector is cut into p shards, and rank r averages shard r:

    all-to-all    rank i sends C(w_i[s]) to rank s, for each shard s but its own
    average       a[r] = 1/p ( w_r[r] + sum over i != r, in the order of ranks, of D C(w_i[r]) )
    all-gather    each rank gets D C(a[s]) for every s, so all results are bit-equal

Error feedback with one memory per rank for both stages (the owner of a shard keeps what its second stage has lost, p-fold because
it enters the next average with weight 1/p):

    e_i[s] <- w_i[s] - D C(w_i[s])  for s != i         e_r[r] <- p ( a[r] - D C(a[r]) )

so that what is owed to the average is conserved:  1/p sum_i e_i = 1/p sum_i w_i - result.

Each parameter is padded to a multiple of p blocks and cut by itself, so results do not depend on which bucket it travels in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from thinwire.collectives.backend import ALL_GATHER
from thinwire.collectives.ledger import Ledger
from thinwire.compress.base import Codec, finite
from thinwire.errors import UserError


@dataclass(frozen=True, slots=True)
class Piece:
    """One parameter of a bucket: where it lies in the bucket, and the length of each of its p shards."""

    name: str
    first: int
    numel: int
    shard: int


def shard_length(shape: Sequence[int], world_size: int, block: int) -> int:
    """Values of one shard of a parameter: a multiple of the codec's block."""
    return -(-prod(shape) // (world_size * block)) * block


class TwoShot:
    """Averages the coded parameters of a bucket over `group`, which nobody else uses. Collective, in one order on all ranks."""

    def __init__(self, codec: Codec, group: dist.ProcessGroup, ledger: Ledger, *, feedback: bool) -> None:
        self.owed: dict[str, torch.Tensor] = {}
        """By parameter name: what this rank still owes to the average, flat float32. Empty without feedback."""
        self._codec, self._group, self._ledger, self._feedback = codec, group, ledger, feedback

    def average(self, buffer: torch.Tensor, pieces: Sequence[Piece], label: str) -> None:
        """Replace the pieces of the flat float32 `buffer` by their average. UserError names a parameter that is not finite."""
        p, rank = self._group.size(), self._group.rank()
        work = self._gather(buffer, pieces)
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
        if self._feedback:
            for shard in range(p):
                if shard == rank:
                    work[shard] = p * (mean - results[shard])
                else:
                    work[shard] -= self._codec.decode(codes[shard], length)
            self._keep(work, pieces)
        self._scatter(results, buffer, pieces)

    def _gather(self, buffer: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
        """[p, sum of shards]: row s holds shard s of every piece, with what is owed added and zeros behind the end."""
        p = self._group.size()
        work = torch.zeros(p, sum(piece.shard for piece in pieces))
        start = 0
        for piece in pieces:
            values = buffer[piece.first : piece.first + piece.numel]
            if self._feedback and piece.name in self.owed:
                values = values + self.owed[piece.name]
            if not finite(values):
                raise UserError(
                    f"the gradient of {piece.name} is not finite; lower the learning rate, or look at the data of this step"
                )
            padded = torch.nn.functional.pad(values, (0, p * piece.shard - piece.numel))
            work[:, start : start + piece.shard] = padded.view(p, piece.shard)
            start += piece.shard
        return work

    def _scatter(self, results: torch.Tensor, buffer: torch.Tensor, pieces: Sequence[Piece]) -> None:
        start = 0
        for piece in pieces:
            flat = results[:, start : start + piece.shard].reshape(-1)
            buffer[piece.first : piece.first + piece.numel] = flat[: piece.numel]
            start += piece.shard

    def _keep(self, lost: torch.Tensor, pieces: Sequence[Piece]) -> None:
        start = 0
        for piece in pieces:
            flat = lost[:, start : start + piece.shard].reshape(-1)
            self.owed[piece.name] = flat[: piece.numel].clone()
            start += piece.shard
