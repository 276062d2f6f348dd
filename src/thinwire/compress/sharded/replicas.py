"""Hybrid sharding: the mean of a unit's gradients over the replicas, each sharded over ranks of its own.

On a mesh of R replicas, each of S shards, rank (r, s) holds after the reduce-scatter inside its replica the chunk s of the mean
over the ranks of replica r. What is left is the mean over r, of each chunk by itself:

    result[s] = 1/R sum_r chunk_(r, s)

through any exchange of `compress.exchange`, in codes with error feedback, so that over the links between replicas nothing else
travels. Residuals are of this rank's chunk. A chunk holds of each parameter ceil(d / S) rows, zeros behind the last one.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.compress.averager import Piece
from thinwire.compress.coded import CodedExchange
from thinwire.compress.exchange import Exchange
from thinwire.compress.sharded.layout import UnitShape, label_of, shard_length
from thinwire.compress.sharded.residual import by_rank
from thinwire.compress.sharded.units import Unit
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


class Replicas:
    """Those that hold the shard which this rank holds. number: R."""

    def __init__(self, units: Sequence[Unit], shards: int, exchange: Exchange, group: dist.ProcessGroup, axis: str) -> None:
        """exchange: not attached yet. axis: of `group`. Collective over all ranks."""
        self._shards, self._group, self._axis, self.exchange = shards, group, axis, exchange
        self.number = group.size()
        self._pieces = {unit.name: pieces(unit.shape, shards) for unit in units}
        self._started, self._device = False, units[0].device
        known = {piece.name: piece.shape for unit in self._pieces.values() for piece in unit}
        exchange.attach(group, axis, known, self._device)

    def transfers(self, unit: UnitShape) -> list[Transfer]:
        """What the chunk of a unit sends."""
        chunk = chunk_of(unit, self._shards)
        return self.exchange.transfers(label_of(unit.name, "replicas"), chunk, self._axis, self.number) if chunk else []

    def average(self, unit: str, chunk: Tensor) -> "torch.futures.Future[Tensor]":
        """Begin to average the flat float32 or float64 `chunk` of a unit in place. On the thread of gradients."""
        self._started = True
        return self.exchange.start(chunk, self._pieces[unit], label_of(unit, "replicas"), last=False)

    def memory_bytes(self, units: Sequence[UnitShape]) -> int:
        """Of residuals on this rank."""
        if not isinstance(self.exchange, CodedExchange):
            return 0
        return self.exchange.memory_bytes([one for unit in units for one in chunk_of(unit, self._shards)], self.number)

    def residuals(self) -> dict[str, Tensor]:
        """By parameter name, of this rank's chunk, flat."""
        return self.exchange.residuals() if isinstance(self.exchange, CodedExchange) else {}

    def state_dict(self) -> dict[str, Any]:
        """What the exchange carries, and which replica this rank belongs to."""
        return {"rank": self._group.rank(), "number": self.number, "exchange": self.exchange.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of the same rank of as many. UserError for another."""
        if (state["rank"], state["number"]) != (self._group.rank(), self.number):
            raise UserError(
                f"the checkpoint is of replica {state['rank']} of {state['number']}, this is replica {self._group.rank()} of "
                f"{self.number}; hand the states of all ranks to adopt()"
            )
        self.exchange.load_state_dict(state["exchange"])

    def adopt(self, states: Sequence[Mapping[str, Any]], shard: int, shards: int) -> list[Mapping[str, Any]]:
        """Takes the states of all ranks that held this shard. Returns those states of units whose mean is that over all replicas.

        UserError if the number of shards was another.
        """
        if any("replicas" not in state or state["world_size"] != shards for state in states):
            raise UserError(
                f"the checkpoint is of replicas of {states[0]['world_size']} ranks, and here they have {shards}; resume with "
                "as many"
            )
        self.exchange.adopt([state["replicas"]["exchange"] for state in states if state["rank"] == shard])
        return by_rank(states)

    def settle(self) -> None:
        """At the end of the backward pass: the step ends with what was started. UserError if that went wrong."""
        if self._started and self.exchange.settles:
            self.exchange.start(torch.empty(0, device=self._device), [], "end", last=True)
            self.exchange.settle()
        self._started = False


def chunk_of(unit: UnitShape, shards: int) -> list[Parameter]:
    """What a rank averages over the replicas of a unit."""
    dtype = "float64" if unit.item_bytes(unit.gradients_dtype) == 8 else "float32"
    return [Parameter(piece.name, piece.shape, dtype=dtype) for piece in pieces(unit, shards)]


def pieces(unit: UnitShape, shards: int) -> list[Piece]:
    """Where the trained parameters of a unit lie in its chunk; vectors are vectors there too."""
    trained = [parameter for parameter in unit.parameters if parameter.name not in unit.frozen]
    lengths = [shard_length(parameter.shape, shards) for parameter in trained]
    shapes = [
        (length,) if unit.is_vector(parameter) else (-(-parameter.shape[0] // shards), *parameter.shape[1:])
        for parameter, length in zip(trained, lengths, strict=True)
    ]
    starts = accumulate((math.prod(shape) for shape in shapes), initial=0)
    return [Piece(parameter.name, first, shape) for parameter, first, shape in zip(trained, starts, shapes, strict=False)]
