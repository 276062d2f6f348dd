"""All-reduces through codes: gradients averaged by the exchange of [compress], whose residuals go by the tensors' names."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from thinwire.adapters.horovod.controller import Part
from thinwire.adapters.horovod.request import Request
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece
from thinwire.compress.exchange import Exchange, make_exchange
from thinwire.config.compress import read_coding

Tensors = list[torch.Tensor]


class Answered(Protocol):
    """What waits for results (`engine.Handle`)."""

    given: Tensors

    def set(self, results: Tensors) -> None: ...

    def fail(self, error: str) -> None: ...


class Codes:
    """The exchanges of one rank, all on one group: one for each owner and coding. Used by one thread."""

    def __init__(self, group: dist.ProcessGroup, ledger: Ledger) -> None:
        self._group, self._ledger = group, ledger
        self._exchanges: dict[tuple[str, str], Exchange] = {}

    def exchange(self, owner: str, coding: str) -> Exchange:
        """Made when it is first asked for: collective over all ranks then."""
        if (owner, coding) not in self._exchanges:
            made = make_exchange(read_coding(json.loads(coding), "Compression"), self._ledger, "average")
            made.attach(self._group, "data", {}, torch.device("cpu"))
            self._exchanges[owner, coding] = made
        return self._exchanges[owner, coding]

    def run(self, parts: Sequence[Part], handles: Sequence[Answered]) -> None:
        """Average; handles get their results when they are there, on another thread. Collective, in the same order on all ranks.

        Tensors are of floating dtypes. A request of kind end_step only ends its owner's step, and waits for what is under way.
        """
        request = parts[0].request
        exchange = self.exchange(request.owner, request.coding)
        if request.kind == "end_step":
            exchange.start(torch.empty(0), (), "end of step", last=True)
            exchange.settle()
            handles[0].set([])
            return
        named = [
            (name, tensor)
            for part, handle in zip(parts, handles, strict=True)
            for name, tensor in zip(_names(part.request), handle.given, strict=True)
        ]
        buffers, dtypes = [], list(dict.fromkeys(tensor.dtype for _, tensor in named))
        found: dict[str, torch.Tensor] = {}
        for dtype in dtypes:
            alike = [(name, tensor) for name, tensor in named if tensor.dtype == dtype]
            buffer = torch.cat([tensor.reshape(-1) for _, tensor in alike])
            pieces, first = [], 0
            for name, tensor in alike:
                pieces.append(Piece(name, first, tuple(tensor.shape)))
                found[name] = pieces[-1].of(buffer).view(tensor.shape)
                first += tensor.numel()
            last = request.last and dtype == dtypes[-1]
            buffers.append(exchange.start(buffer, pieces, "allreduce", last=last))
        factor = request.prescale * request.postscale * (self._group.size() if request.op == "sum" else 1)
        done = partial(_deliver, parts, handles, found, factor)
        torch.futures.collect_all(buffers).add_done_callback(done)

    def close(self) -> None:
        """Ends threads and groups. Collective."""
        for exchange in self._exchanges.values():
            exchange.detach()


def _names(request: Request) -> list[str]:
    if request.names:
        return list(request.names)
    if len(request.tensors) == 1:
        return [request.name]
    return [f"{request.name}.{number}" for number in range(len(request.tensors))]


def _deliver(
    parts: Sequence[Part], handles: Sequence[Answered], found: dict[str, torch.Tensor], factor: float, futures: Any
) -> None:
    try:
        for future in futures.value():
            future.value()
    except Exception as error:
        for handle in handles:
            handle.fail(str(error))
        return
    for part, handle in zip(parts, handles, strict=True):
        results = [found[name] for name in _names(part.request)]
        handle.set(results if factor == 1.0 else [result * factor for result in results])
