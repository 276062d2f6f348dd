"""The contract of an exchange: how the gradients of one bucket become their average over the replicas."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from thinwire.collectives.ledger import Ledger
from thinwire.compress.base import make_codec
from thinwire.compress.coded import CodedExchange
from thinwire.compress.fused import fused_or_reason
from thinwire.compress.plain import PlainExchange
from thinwire.config.run import Coded, NoCompression
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


class Exchange(Protocol):
    """One per rank. Calls come in the same order on every rank."""

    failure: Exception | None
    """What went wrong on this rank; the backward pass that waited for it only says that there was something."""

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        """What one bucket of `parameters` will send; no communication."""
        ...

    def attach(self, group: dist.ProcessGroup, axis: str, names: Mapping[int, str]) -> None:
        """Before the first step. names: of the parameters, by id(). Collective over all ranks."""
        ...

    def detach(self) -> None:
        """After the last step; waits for what is under way."""
        ...

    def start(self, bucket: dist.GradBucket) -> "torch.futures.Future[torch.Tensor]":
        """Called in the backward pass when the bucket is full; the future holds its averaged buffer."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this rank carries from step to step."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first step."""
        ...

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Instead of load_state_dict, the states of all ranks of a run with another number of ranks."""
        ...


def make_exchange(config: NoCompression | Coded, ledger: Ledger) -> Exchange:
    """The exchange that [compress] asks for."""
    if isinstance(config, NoCompression):
        return PlainExchange(ledger)
    if config.fused and (reason := fused_or_reason()):
        raise UserError(f"compress.fused = true: {reason}; leave it out, the bits are the same")
    codec = make_codec(config)
    assert codec is not None, "only NoCompression has none"
    return CodedExchange(codec, config, ledger)
