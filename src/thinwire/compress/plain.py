"""Averages by one all-reduce: of gradients as they are, or cast to bfloat16 or float16, whose sums are codes again.

    result  = sum_i C(g_i / p)        C: the cast, or nothing; summed in its own precision by the all-reduce

What the cast and the sums lose is not known to anybody, so it is not fed back. What is not finite arrives as it is: sums hand it
on, value by value.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_reduce
from thinwire.compress.averager import Averager, Parameters, Piece, Shapes, Share, exact_bytes, ring_bytes
from thinwire.compress.base import Codec
from thinwire.compress.memory import Stateless
from thinwire.compress.precision import widened
from thinwire.compress.precondition import Moments, no_moments
from thinwire.compress.sparse import average_sparse
from thinwire.traffic import Transfer
from thinwire.workload import ITEM_BYTES, Parameter


class PlainExchange(Stateless):
    """The exchange without compression; see `CodedExchange`, which is used alike. No state of its own."""

    settled_after = 0
    settles, on_device = False, False
    _group: dist.ProcessGroup

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        size, item_bytes = sum(parameter.stored_bytes for parameter in parameters), ITEM_BYTES[parameters[0].dtype]
        return [Transfer(label=label, axis=axis, op="all_reduce", message_bytes=size, item_bytes=item_bytes)]

    def attach(
        self,
        group: dist.ProcessGroup,
        axis: str,
        known: Shapes,
        device: torch.device | None = None,
        *,
        tracks_use: bool = False,
        moments: Moments = no_moments,
    ) -> None:
        """An axis as large as the world uses the default group, which does not know its axis."""
        self._group = group
        self._ledger.axes[group.group_name] = axis

    def detach(self) -> None:
        """Nothing to undo."""

    def residuals(self) -> dict[str, torch.Tensor]:
        """Nothing is left out."""
        return {}

    def _of_no_use(self, state: dict[str, Any]) -> str:
        """What an exchange with codes wrote: its residuals would be lost."""
        kind = state.get("kind")
        return f"the checkpoint was made with compress.kind = {kind!r}, not 'none'; resume with the kind it was made with"

    def start(
        self, buffer: torch.Tensor, pieces: Sequence[Piece], label: str, *, last: bool, used: Mapping[str, bool] | None = None
    ) -> torch.futures.Future[torch.Tensor]:
        """Asynchronous; the wire works while the backward pass goes on."""
        work = all_reduce(buffer.div_(self._group.size()), self._group, self._ledger, label)
        return work.get_future().then(lambda future: (future.value(), buffer)[1])  # raises what has gone wrong

    def start_sparse(self, gradient: torch.Tensor, name: str, label: str, *, last: bool) -> torch.futures.Future[torch.Tensor]:
        """Waits for it."""
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(average_sparse(gradient, self._group, self._ledger, label))
        return done

    def flush(self) -> None:
        """Nothing waits for another buffer."""

    def settle(self, *, all_of_them: bool = False) -> None:
        """Nothing: whoever waits for a future raises what has gone wrong."""


class Plain(Averager):
    """All as it is, exactly, which is all of a share."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        return ring_bytes(prod(shape), world_size)

    def transfers(self, label: str, parameters: Parameters, exact: Parameters, axis: str, world_size: int) -> list[Transfer]:
        together = [*parameters, *exact]
        size, item_bytes = exact_bytes(together), exact_bytes(together) // sum(one.numel for one in together)
        return [Transfer(label=f"{label} plain", axis=axis, op="all_reduce", message_bytes=size, item_bytes=item_bytes)]

    def average(self, share: Share) -> Iterator[None]:
        assert not share.pieces, "nothing is coded here"
        together = share.riding().div_(self._first.size())
        sent = all_reduce(together, self._first, self._ledger, f"{share.label} plain")
        yield

        sent.wait()
        share.arrived(together)


class Cast(Averager):
    """All cast; nothing rides along, because the message has another type."""

    flags_use, codes = False, False

    def __init__(self, codec: Codec, ledger: Ledger) -> None:
        self._dtype, self._ledger = codec.wire_dtype, ledger

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float:
        return ring_bytes(prod(shape), world_size, self._dtype.itemsize)

    def carries(self, numel: int, world_size: int) -> bool:
        return False

    def transfers(self, label: str, parameters: Parameters, exact: Parameters, axis: str, world_size: int) -> list[Transfer]:
        values, item = sum(parameter.numel for parameter in parameters), self._dtype.itemsize
        return [Transfer(label=label, axis=axis, op="all_reduce", message_bytes=values * item, item_bytes=item)]

    def average(self, share: Share) -> Iterator[None]:
        assert not share.exact, "a cast carries nothing else"
        parts = [piece.of(share.buffer) for piece in share.pieces]
        cast = torch.cat([widened(part).div(self._first.size()).to(self._dtype) for part in parts])
        sent = all_reduce(cast, self._first, self._ledger, share.label)
        yield

        sent.wait()
        share.summed(cast)
        for part, mean in zip(parts, cast.split([len(part) for part in parts]), strict=True):
            part.copy_(mean)
