"""Averaging in bfloat16 or float16: codes that may be summed on the way need nothing but an all-reduce.

    result  = sum_i C(g_i / p)        C: the cast; summed in its own precision by the all-reduce

What the cast and the sums lose is not known to anybody, so it is not fed back.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.distributed as dist

from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Share
from thinwire.compress.base import Codec, finite
from thinwire.compress.precision import widened
from thinwire.compress.stateless import Stateless
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


class Cast(Stateless):
    """See the top of the file, and `thinwire.compress.averager.Averager`. No state."""

    settled_after = 0

    def __init__(self, codec: Codec, ledger: Ledger) -> None:
        self._codec, self._ledger = codec, ledger
        self._group: dist.ProcessGroup | None = None

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """A ring's 2 (p-1)/p of the cast parameter."""
        return 2 * (world_size - 1) / world_size * self._codec.wire_dtype.itemsize * prod(shape)

    def carries(self, numel: int, world_size: int) -> bool:
        """Nothing: its message has another type."""
        return False

    def transfers(
        self, label: str, parameters: Sequence[Parameter], exact: Sequence[Parameter], axis: str, world_size: int
    ) -> list[Transfer]:
        """One all-reduce."""
        assert not exact, "a cast carries nothing else"
        values, item = sum(parameter.numel for parameter in parameters), self._codec.wire_dtype.itemsize
        return [Transfer(label=label, axis=axis, op="all_reduce", message_bytes=values * item, item_bytes=item)]

    def attach(self, first: dist.ProcessGroup, second: dist.ProcessGroup) -> None:
        """There is one stage."""
        self._group = first

    def average(self, share: Share) -> Iterator[None]:
        """One all-reduce; what is not finite arrives as it is, as without compression."""
        assert self._group is not None and not share.exact, "attach() comes first, and a cast carries nothing else"
        parts = [piece.of(share.buffer) for piece in share.pieces]
        p = self._group.size()
        cast = torch.cat([widened(part).div(p).to(self._codec.wire_dtype) for part in parts])
        with self._ledger.label(share.label):
            sent = dist.all_reduce(cast, group=self._group, async_op=True)
        yield

        sent.wait()
        if not finite(cast):
            share.spoil()
        for part, mean in zip(parts, cast.split([len(part) for part in parts]), strict=True):
            part.copy_(mean)
