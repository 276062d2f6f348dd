"""Gradients averaged as they are: divided by the number of ranks and all-reduced.

As a whole exchange without compression, or as the averager of what a compressed exchange leaves alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_reduce
from thinwire.compress.averager import Piece, Share, exact_bytes
from thinwire.compress.sparse import average_sparse
from thinwire.compress.stateless import Stateless
from thinwire.traffic import Transfer
from thinwire.workload import ITEM_BYTES, Parameter


class PlainExchange(Stateless):
    """The exchange without compression; see `thinwire.compress.exchange.Exchange`."""

    settled_after = 0

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._group: dist.ProcessGroup | None = None

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        """One all-reduce."""
        message_bytes = sum(parameter.stored_bytes for parameter in parameters)
        item_bytes = ITEM_BYTES[parameters[0].dtype]
        return [Transfer(label=label, axis=axis, op="all_reduce", message_bytes=message_bytes, item_bytes=item_bytes)]

    def attach(
        self, group: dist.ProcessGroup, axis: str, known: Mapping[str, Sequence[int]], *, tracks_use: bool = False
    ) -> None:
        """No state of its own. An axis as large as the world uses the default group, which does not know its axis."""
        self._group = group
        self._ledger.axes[group.group_name] = axis

    def detach(self) -> None:
        """Nothing to undo."""

    def _of_no_use(self, state: dict[str, Any]) -> str:
        """What an exchange with codes wrote: what it owed would be lost."""
        kind = state.get("kind")
        return f"the checkpoint was made with compress.kind = {kind!r}, not 'none'; resume with the kind it was made with"

    def start(
        self, buffer: torch.Tensor, pieces: Sequence[Piece], label: str, *, last: bool, used: Mapping[str, bool] | None = None
    ) -> torch.futures.Future[torch.Tensor]:
        """Asynchronous; the wire works while the backward pass goes on."""
        assert self._group is not None
        work = all_reduce(buffer.div_(self._group.size()), self._group, self._ledger, label)
        return work.get_future().then(_first_tensor)

    def start_sparse(self, gradient: torch.Tensor, name: str, label: str, *, last: bool) -> torch.futures.Future[torch.Tensor]:
        """Waits for it."""
        assert self._group is not None
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(average_sparse(gradient, self._group, self._ledger, label))
        return done

    def settle(self) -> None:
        """DistributedDataParallel itself waits, and raises what has gone wrong."""


def _first_tensor(future: torch.futures.Future[Any]) -> torch.Tensor:
    return future.value()[0]


class Plain(Stateless):
    """See `thinwire.compress.averager.Averager`. No state."""

    settled_after = 0

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._group: dist.ProcessGroup | None = None

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        """A ring's 2 (p-1)/p of the parameter."""
        return 2 * (world_size - 1) / world_size * 4 * prod(shape)

    def carries(self, numel: int, world_size: int) -> bool:
        """It carries nothing else."""
        return True

    def transfers(
        self, label: str, parameters: Sequence[Parameter], exact: Sequence[Parameter], axis: str, world_size: int
    ) -> list[Transfer]:
        """One all-reduce."""
        together = [*parameters, *exact]
        item_bytes = exact_bytes(together) // sum(parameter.numel for parameter in together)
        size = exact_bytes(together)
        return [Transfer(label=f"{label} plain", axis=axis, op="all_reduce", message_bytes=size, item_bytes=item_bytes)]

    def attach(self, first: dist.ProcessGroup, second: dist.ProcessGroup) -> None:
        """There is one stage."""
        self._group = first

    def average(self, share: Share) -> Iterator[None]:
        """One all-reduce of what is exact, which is all; what is not finite arrives as it is, as without compression."""
        assert self._group is not None and not share.pieces, "attach() comes first, and nothing is coded here"
        together = share.riding().div_(self._group.size())
        with self._ledger.label(f"{share.label} plain"):
            sent = dist.all_reduce(together, group=self._group, async_op=True)
        yield

        sent.wait()
        share.arrived(together)
