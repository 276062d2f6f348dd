"""Averaging by gathering everybody's codes: for codes that cannot be cut into shards, and for two ranks.

    all-gather    each rank gets C(w_i) of every rank i, w_i = g_i + e_i
    average       1/p sum over i, in the order of ranks, of D C(w_i): bit-equal on all ranks
    error         l_i = w_i - D C(w_i)

One collective and one error instead of two. A rank sends (p-1) codes of the whole parameter, where two shots send 2 (p-1)/p:
equal for two ranks, more for any other number, unless the parameter is so small that padding its shards costs more.
"""

from collections.abc import Iterator, Sequence

import torch

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather
from thinwire.compress.averager import RIDE_BYTES, Averager, Parameters, Share, exact_bytes, flags_of
from thinwire.compress.base import TensorCodec, sum_in_order
from thinwire.compress.memory import Memory
from thinwire.compress.speed import seconds_of_tensor
from thinwire.traffic import Transfer


class Gather(Averager):
    """See the top of the file. Nothing but the memory goes on from step to step."""

    def __init__(self, codec: TensorCodec, memory: Memory, ledger: Ledger) -> None:
        self._codec, self._memory, self._ledger = codec, memory, ledger

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """A code to each other rank."""
        return (world_size - 1) * self._codec.payload_bytes(shape)

    def carries(self, numel: int, world_size: int) -> bool:
        """For two ranks gathering is as cheap as an all-reduce; for more, what is so little that a collective would cost more."""
        return world_size == 2 or 4 * numel * (world_size - 1) <= RIDE_BYTES

    def transfers(self, label: str, parameters: Parameters, exact: Parameters, axis: str, world_size: int) -> list[Transfer]:
        """One all-gather. Times the codec."""
        size = sum(self._codec.payload_bytes(parameter.shape) for parameter in parameters)
        size += exact_bytes([*exact, flags_of([*parameters, *exact], 1)])
        seconds = [seconds_of_tensor(self._codec, parameter.shape, self.device) for parameter in parameters]
        work = sum(encode_s + world_size * decode_s for encode_s, decode_s in seconds)
        return [Transfer(label=f"{label} gathered", axis=axis, op="all_gather", message_bytes=size, item_bytes=1, work_s=work)]

    def codec_for(self, name: str) -> TensorCodec:
        """For this average of a parameter; asked once each time."""
        return self._codec

    def average(self, share: Share) -> Iterator[None]:
        """One collective, see the top of the file; the second stage only decodes."""
        p, rank, pieces = self._first.size(), self._first.rank(), share.pieces
        codecs = [self.codec_for(piece.name) for piece in pieces]
        wanted = [share.finite_or_zeros(self._memory.corrected(piece.name, piece.of(share.buffer))) for piece in pieces]
        codes = [codec.encode(values.view(piece.shape)) for codec, values, piece in zip(codecs, wanted, pieces, strict=True)]
        code = torch.cat([*codes, share.riding(flagged=True).view(torch.uint8)])
        received = code.new_empty(p, code.numel())
        sent = all_gather(received.view(-1), code, self._first, self._ledger, f"{share.label} gathered")
        yield

        sent.wait()
        *parts, riding = received.split([*map(len, codes), received.shape[1] - sum(map(len, codes))], dim=1)
        share.arrived(sum_in_order([one.clone().view(share.dtype) for one in riding]) / p, flagged=True)
        for codec, values, piece, part in zip(codecs, wanted, pieces, parts, strict=True):
            if share.counts(piece):
                decoded = [codec.decode(one, piece.shape).view(-1) for one in part]
                if self._memory.keeps:
                    self._memory.keep(piece.name, values - decoded[rank])
                share.deliver(sum_in_order(decoded) / p, piece.of(share.buffer))
