"""The contract of an averager: one way in which parameters of a bucket become their average over a group.

A CodedExchange holds several and gives each parameter to the one that sends the fewest bytes for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist

from thinwire.compress.base import finite
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


@dataclass(frozen=True, slots=True)
class Piece:
    """One parameter of a bucket, and where it begins in the bucket's flat buffer."""

    name: str
    first: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """This parameter's part of the flat buffer, a view."""
        return buffer[self.first : self.first + self.numel]


class Averager(Protocol):
    """One per rank. Every rank of the group calls `average` with the same pieces in the same order."""

    @property
    def settled_after(self) -> int:
        """Steps of its own after which it sends what `transfers` says."""
        ...

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float | None:
        """What a rank sends for one parameter of this shape, about; None if this averager does not take it."""
        ...

    def transfers(self, label: str, parameters: Sequence[Parameter], axis: str, world_size: int) -> list[Transfer]:
        """Exactly what `average` will send for `parameters` of one bucket; no communication."""
        ...

    def attach(self, group: dist.ProcessGroup) -> None:
        """Before the first `average`. group: used by one thread on each rank."""
        ...

    def average(self, buffer: torch.Tensor, pieces: Sequence[Piece], label: str) -> None:
        """Replace the pieces of the flat float32 `buffer` by their average, bit-equal on all ranks. Waits for the wire.

        UserError names a parameter that is not finite.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it carries from step to step besides what is owed (`memory`)."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first `average`."""
        ...

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Instead of load_state_dict, the states of all ranks of a run with another number of ranks."""
        ...


def check_finite(values: torch.Tensor, name: str) -> None:
    """UserError if a gradient holds nan or inf, which coding would spread or hide."""
    if not finite(values):
        raise UserError(f"the gradient of {name} is not finite; lower the learning rate, or look at the data of this step")


def refuse_nccl(group: dist.ProcessGroup, kind: str) -> None:
    """UserError for a group of NCCL's, on which no codec has been run yet."""
    if "nccl" in dist.get_backend(group):
        raise UserError(f"compress.kind = {kind!r}: only on CPUs yet, and this group is NCCL's; set it to none")
