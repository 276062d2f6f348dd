"""Averaging by gathering everybody's codes: for codes that cannot be cut into shards, and for two ranks.

    all-gather    each rank gets C(w_i) of every rank i, w_i = g_i + e_i
    average       1/p sum over i, in the order of ranks, of D C(w_i): bit-equal on all ranks
    lost          l_i = w_i - D C(w_i)

One collective and one loss instead of two. A rank sends (p-1) codes of the whole parameter, where two shots send 2 (p-1)/p: equal
for two ranks, more for any other number, unless the parameter is so small that padding its shards costs more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist

from thinwire.collectives.backend import ALL_GATHER
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import RIDE_BYTES, Share, exact_bytes, flags_of
from thinwire.compress.base import Codec, TensorCodec
from thinwire.compress.memory import Memory
from thinwire.compress.speed import seconds_of_tensor
from thinwire.compress.stateless import Stateless
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


@dataclass(frozen=True)
class Flat:
    """A Codec of flat vectors as a TensorCodec: zeros behind the end up to a whole block."""

    codec: Codec

    @property
    def name(self) -> str:
        """The codec's."""
        return self.codec.name

    def payload_bytes(self, shape: Sequence[int]) -> int:
        """Of whole blocks."""
        return self.codec.payload_bytes(self._padded(shape))

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Any shape -> [payload_bytes] uint8."""
        flat = values.reshape(-1)
        return self.codec.encode(torch.nn.functional.pad(flat, (0, self._padded(values.shape) - flat.numel())))

    def decode(self, payload: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """[payload_bytes] uint8 -> float32 of `shape`."""
        return self.codec.decode(payload, self._padded(shape))[: prod(shape)].view(tuple(shape))

    def _padded(self, shape: Sequence[int]) -> int:
        return -(-prod(shape) // self.codec.block) * self.codec.block


class Gather(Stateless):
    """See the top of the file, and `thinwire.compress.averager.Averager`. Nothing but the memory goes on from step to step."""

    settled_after = 0

    def __init__(self, codec: TensorCodec, memory: Memory, ledger: Ledger) -> None:
        self._codec, self._memory, self._ledger = codec, memory, ledger
        self._group: dist.ProcessGroup | None = None

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """A code to each other rank."""
        return (world_size - 1) * self._codec.payload_bytes(shape)

    def carries(self, numel: int, world_size: int) -> bool:
        """For two ranks gathering is as cheap as an all-reduce; for more, what is so little that a collective would cost more."""
        return world_size == 2 or 4 * numel * (world_size - 1) <= RIDE_BYTES

    def transfers(
        self, label: str, parameters: Sequence[Parameter], exact: Sequence[Parameter], axis: str, world_size: int
    ) -> list[Transfer]:
        """One all-gather. Times the codec."""
        size = sum(self._codec.payload_bytes(parameter.shape) for parameter in parameters)
        size += exact_bytes([*exact, flags_of([*parameters, *exact], 1)])
        seconds = [seconds_of_tensor(self._codec, parameter.shape) for parameter in parameters]
        work = sum(encode_s + world_size * decode_s for encode_s, decode_s in seconds)
        return [Transfer(label=f"{label} gathered", axis=axis, op="all_gather", message_bytes=size, item_bytes=1, work_s=work)]

    def attach(self, first: dist.ProcessGroup, second: dist.ProcessGroup) -> None:
        """The second stage only decodes."""
        self._group = first

    def average(self, share: Share) -> Iterator[None]:
        """One collective, see the top of the file."""
        assert self._group is not None, "attach() comes first"
        p, rank, pieces = self._group.size(), self._group.rank(), share.pieces
        wanted = []
        for piece in pieces:
            values = self._memory.corrected(piece.name, piece.of(share.buffer))
            wanted.append(values if share.found_finite(values) else torch.zeros_like(values))
        codes = [self._codec.encode(values.view(piece.shape)) for values, piece in zip(wanted, pieces, strict=True)]
        code = torch.cat([*codes, share.riding(flagged=True).view(torch.uint8)])
        received = torch.empty(p, code.numel(), dtype=torch.uint8)
        with self._ledger.label(f"{share.label} gathered"):
            sent = ALL_GATHER(received.view(-1), code, group=self._group, async_op=True)
        yield

        sent.wait()
        start = sum(self._codec.payload_bytes(piece.shape) for piece in pieces)
        share.arrived(_mean([received[source, start:].clone().view(share.dtype) for source in range(p)]), flagged=True)
        start = 0
        for values, piece in zip(wanted, pieces, strict=True):
            end = start + self._codec.payload_bytes(piece.shape)
            if share.counts(piece):
                decoded = [self._codec.decode(received[source, start:end], piece.shape).view(-1) for source in range(p)]
                if self._memory.keeps:
                    self._memory.keep(piece.name, values - decoded[rank])
                piece.of(share.buffer).copy_(_mean(decoded))
            start = end


def _mean(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """In the order of ranks."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total / len(parts)
