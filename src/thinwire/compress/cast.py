"""Whole buffers cast to bfloat16 or float16 and all-reduced: codes that may be summed on the way need nothing else.

On a thread and a process group of its own, while the backward pass goes on.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from thinwire.collectives.executor import Executor
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.private import private_copy
from thinwire.compress.averager import Piece, refuse_nccl
from thinwire.compress.base import Codec
from thinwire.compress.stateless import Stateless
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


class CastExchange(Stateless):
    """See `thinwire.compress.exchange.Exchange`. No state."""

    settled_after = 0

    def __init__(self, codec: Codec, ledger: Ledger) -> None:
        self._codec, self._ledger = codec, ledger
        self.failure: Exception | None = None
        self._group: dist.ProcessGroup | None = None
        self._executor: Executor | None = None

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        """One all-reduce."""
        values = sum(parameter.numel for parameter in parameters)
        item = self._codec.wire_dtype.itemsize
        return [Transfer(label=label, axis=axis, op="all_reduce", message_bytes=values * item, item_bytes=item)]

    def attach(self, group: dist.ProcessGroup, axis: str) -> None:
        """Makes a process group and a thread. Collective over all ranks. UserError on CUDA."""
        refuse_nccl(group, self._codec.name)
        self._group = private_copy(group, f"{axis} exchange")
        self._ledger.axes[self._group.group_name] = axis
        self._executor = Executor("thinwire-exchange")

    def detach(self) -> None:
        """Waits for what is under way. Collective."""
        if self._executor is not None:
            self._executor.close()
        self._executor = None

    def start(
        self, buffer: torch.Tensor, pieces: Sequence[Piece], label: str, *, last: bool
    ) -> torch.futures.Future[torch.Tensor]:
        """Hands the buffer to the thread."""
        assert self._executor is not None, "attach() comes first"
        return self._executor.submit(lambda: self._sum(buffer, label))

    def _sum(self, buffer: torch.Tensor, label: str) -> torch.Tensor:
        assert self._group is not None
        cast = buffer.div_(self._group.size()).to(self._codec.wire_dtype)
        with self._ledger.label(label):
            dist.all_reduce(cast, group=self._group)
        return buffer.copy_(cast)
