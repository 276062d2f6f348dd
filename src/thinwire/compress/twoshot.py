"""Averaging through a codec in two shots, with error feedback at both.

Two shots (as in 1-bit Adam, Tang et al. 2021, and ZeRO++, Wang et al. 2023). p ranks, w_i = g_i + e_i on rank i, C a codec, D its
decoder; the vector is cut into p shards, and rank r averages shard r:

    all-to-all    rank i sends C(w_i[s]) to rank s, for each shard s but its own
    average       a[r] = 1/p ( w_r[r] + D C(w_i[r]) for each i != r in the order of ranks )
    all-gather    each rank gets D C(a[s]) for every s, so all results are bit-equal

Error feedback with one memory per rank for both stages (the owner of a shard keeps what its second stage has lost, p-fold because
it enters the next average with weight 1/p):

    l_i[s] = w_i[s] - D C(w_i[s])  for s != i         l_r[r] = p ( a[r] - D C(a[r]) )

so that with e <- l nothing is lost to the average:  1/p sum_i e_i = 1/p sum_i w_i - result.

Each parameter is padded to a multiple of p blocks and cut by itself, so results do not depend on which bucket it travels in. What
is averaged exactly goes along in the same two messages, as it is. Codes hand on what is not finite, so the owner of a shard finds
it in the average, a p-th of what there would be to look at, and says so in a flag behind its part of the second message.
"""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod

import torch

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather, all_to_all
from thinwire.compress.averager import Averager, Parameters, Share, exact_bytes, flags_of
from thinwire.compress.base import Codec, padded, sum_in_order
from thinwire.compress.memory import Memory, beside
from thinwire.compress.speed import seconds_per_value
from thinwire.traffic import Transfer


def shard_length(shape: Sequence[int], world_size: int, block: int) -> int:
    """Values of one shard of a parameter: a multiple of the codec's block."""
    return padded(prod(shape), world_size * block) // world_size


class TwoShot(Averager):
    """See the top of the file. Nothing but the memory goes on from step to step."""

    def __init__(self, codec: Codec, memory: Memory, ledger: Ledger) -> None:
        self._codec, self._memory, self._ledger = codec, memory, ledger

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """p - 1 codes of a shard, twice. Two shots of float32, what rides along, send as much as an all-reduce."""
        return 2 * (world_size - 1) * self._codec.payload_bytes(shard_length(shape, world_size, self._codec.block))

    def transfers(self, label: str, parameters: Parameters, exact: Parameters, axis: str, world_size: int) -> list[Transfer]:
        """An all-to-all of codes and an all-gather of the averages' codes. Times the codec."""
        length = sum(shard_length(parameter.shape, world_size, self._codec.block) for parameter in parameters)
        flag_bytes = exact_bytes([flags_of([*parameters, *exact], 1)])
        size = self._codec.payload_bytes(length) + -(-exact_bytes(exact) // (flag_bytes * world_size)) * flag_bytes
        encode_s, decode_s = seconds_per_value(self._codec, self.device)
        others = (world_size - 1) * length
        if self._memory.keeps:
            encode_s += decode_s  # at most: what is lost is known after decoding
        first = others * encode_s
        second = length * encode_s + (others + world_size * length) * decode_s
        codes = Transfer(
            label=f"{label} codes", axis=axis, op="all_to_all", message_bytes=world_size * size, item_bytes=1, work_s=first
        )
        averages = Transfer(
            label=f"{label} averages",
            axis=axis,
            op="all_gather",
            message_bytes=size + flag_bytes,
            item_bytes=1,
            work_s=second,
        )
        return [codes, averages]

    def average(self, share: Share) -> Iterator[None]:
        """Two collectives, see the top of the file. A row is the codes of a shard, and behind them its part of what is exact."""
        p, rank, pieces, buffer = self._first.size(), self._first.rank(), share.pieces, share.buffer
        ends = [0, *accumulate(shard_length(piece.shape, p, self._codec.block) for piece in pieces)]
        parts = [slice(first, last) for first, last in pairwise(ends)]  # of a row, for each piece
        length = ends[-1]
        # row s: shard s of every piece; what should be sent, and then what was lost of it
        work = torch.empty(p, length, device=buffer.device)
        for piece, part in zip(pieces, parts, strict=True):
            self._memory.corrected_rows(piece.name, piece.of(buffer), work[:, part])
        size = self._codec.payload_bytes(length)
        riding = share.riding()
        riding = torch.nn.functional.pad(riding, (0, -riding.numel() % p)).view(p, -1)
        codes = riding.new_empty(p, size + riding.element_size() * riding.shape[1], dtype=torch.uint8)
        codes[:, size:] = riding.view(torch.uint8)
        others = [run for run in (slice(0, rank), slice(rank + 1, p)) if run.start < run.stop]
        for run in others:
            self._codec.encode_rows(work[run], codes[run], subtract=self._memory.keeps)
        received = torch.empty_like(codes)
        sent = all_to_all(received, codes, self._first, self._ledger, f"{share.label} codes")
        yield

        sent.wait()
        mean = work[rank]
        for run in others:
            self._codec.add_rows(received[run], mean)
        bad = share.zero_if_spoiled(mean)  # as it is where any rank's values are; a p-th of what there would be to look at
        mean /= p
        exact_mean = sum_in_order(list(received[:, size:].reshape(-1).clone().view(share.dtype).view_as(riding))) / p
        exact_mean = torch.cat([exact_mean, bad.to(exact_mean.dtype).view(1)])
        code = torch.empty(size + exact_mean.nbytes, dtype=torch.uint8, device=buffer.device)
        self._codec.encode_rows(work[rank : rank + 1], code.view(1, -1), subtract=self._memory.keeps)
        code[size:] = exact_mean.view(torch.uint8)
        averages = code.new_empty(p, code.numel())
        sent = all_gather(averages.view(-1), code, self._second, self._ledger, f"{share.label} averages")
        mean *= p
        if share.used is None:  # all count; while the averages are on the way
            self._keep(share, parts, work)
        yield

        sent.wait()
        behind = averages[:, size:].reshape(-1).clone().view(share.dtype).view(p, -1)
        share.arrived(behind[:, :-1].reshape(-1), known=behind[:, -1].any())
        results = torch.empty_like(work)
        self._codec.decode_rows(averages, results)
        for piece, part in zip(pieces, parts, strict=True):
            if share.counts(piece):
                for values, place in beside(piece.of(buffer), results[:, part]):
                    share.deliver(place, values)
        if share.used is not None:
            self._keep(share, parts, work)

    def _keep(self, share: Share, parts: Sequence[slice], lost: torch.Tensor) -> None:
        if self._memory.keeps:
            for piece, part in zip(share.pieces, parts, strict=True):
                if share.counts(piece):
                    self._memory.keep_rows(piece.name, lost[:, part], piece.numel)
