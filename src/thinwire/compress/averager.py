"""The contract of an averager: one way in which parameters of a bucket become their average over a group.

A CodedExchange holds several and gives each parameter to the one that sends the fewest bytes for it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.distributed as dist

from thinwire.compress.base import finite
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter

RIDE_BYTES = 2**14
"""Less than the wire carries while a collective of its own would begin."""


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
    """One per rank. Every rank of the group calls `average` with the same pieces in the same order.

    An average has up to three stages. A stage waits for what the one before it has sent, computes, and sends without waiting, so
    that the wire always has something to carry. First, second and third stages run on a thread each, in the order of the buckets;
    each thread sends on a process group of its own.
    """

    @property
    def settled_after(self) -> int:
        """Steps of its own after which it sends what `transfers` says."""
        ...

    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float | None:
        """What a rank sends for one parameter of this shape, about; None if this averager does not take it."""
        ...

    def carries(self, numel: int, world_size: int) -> bool:
        """Whether `numel` values that are averaged exactly may ride along, and so save a collective of their own."""
        ...

    def transfers(
        self, label: str, parameters: Sequence[Parameter], exact: Sequence[Parameter], axis: str, world_size: int
    ) -> list[Transfer]:
        """What `average` will send for `parameters` of one bucket and what rides along, to the byte; no communication."""
        ...

    def attach(self, first: dist.ProcessGroup, second: dist.ProcessGroup) -> None:
        """Before the first `average`: the groups of the first two stages; the third sends nothing."""
        ...

    def average(self, buffer: torch.Tensor, pieces: Sequence[Piece], exact: Sequence[Piece], label: str) -> Iterator[None]:
        """Replace the pieces of the flat float32 `buffer` by their average, bit-equal on all ranks; `exact` ones in float32.

        Yields between its stages. UserError names a parameter that is not finite.
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


def joined(buffer: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
    """The pieces of the flat buffer one behind the other, a copy."""
    return torch.cat([piece.of(buffer) for piece in pieces]) if pieces else buffer[:0]


def put_back(values: torch.Tensor, buffer: torch.Tensor, pieces: Sequence[Piece]) -> None:
    """What `joined` took apart from the buffer, back to its places."""
    for piece, part in zip(pieces, values.split([piece.numel for piece in pieces]), strict=True):
        piece.of(buffer).copy_(part)


def check_finite(values: torch.Tensor, name: str) -> None:
    """UserError if a gradient holds nan or inf, which coding would spread or hide."""
    if not finite(values):
        raise UserError(f"the gradient of {name} is not finite; lower the learning rate, or look at the data of this step")


def refuse_nccl(group: dist.ProcessGroup, kind: str) -> None:
    """UserError for a group of NCCL's, on which no codec has been run yet."""
    if "nccl" in dist.get_backend(group):
        raise UserError(f"compress.kind = {kind!r}: only on CPUs yet, and this group is NCCL's; set it to none")
