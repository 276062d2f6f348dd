"""Buckets of gradients averaged as they are: divided by the number of ranks and all-reduced in float32."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.seam import all_reduce
from thinwire.traffic import Transfer
from thinwire.workload import Parameter

GRADIENT_BYTES = 4
"""Gradients are float32."""


class PlainExchange:
    """The exchange without compression; see `thinwire.compress.exchange.Exchange`."""

    def __init__(self, ledger: Ledger) -> None:
        self.failure: Exception | None = None
        self._ledger = ledger
        self._group: dist.ProcessGroup | None = None

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        """One all-reduce."""
        message_bytes = sum(parameter.numel for parameter in parameters) * GRADIENT_BYTES
        return [Transfer(label=label, axis=axis, op="all_reduce", message_bytes=message_bytes)]

    def attach(self, group: dist.ProcessGroup, axis: str, names: Mapping[int, str]) -> None:
        """No state of its own."""
        self._group = group

    def detach(self) -> None:
        """Nothing to undo."""

    def start(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Asynchronous; the wire works while the backward pass goes on."""
        assert self._group is not None
        buffer = bucket.buffer().div_(self._group.size())
        work = all_reduce(buffer, self._group, self._ledger, f"bucket {bucket.index()}")
        return work.get_future().then(_first_tensor)

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Nothing to deal out."""


def _first_tensor(future: torch.futures.Future[Any]) -> torch.Tensor:
    return future.value()[0]
