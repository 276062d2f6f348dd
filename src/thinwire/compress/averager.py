"""The contract of an averager: one method by which parameters of a bucket become their average over a group.

A CodedExchange holds several and gives each parameter to the one that sends the fewest bytes for it.

Nothing is lost, whatever is used when. With g_i the gradient of a parameter on rank i in a step, e_i the residual of rank i, and
r the result, over all steps so far:

    sum of r  +  1/p sum_i e_i  =  sum of 1/p sum_i g_i

Three kinds of a parameter could break it, and each has its rule:

    exact         what is averaged exactly takes the residual along: 1/p sum_i (g_i + e_i), e_i <- 0
    used nowhere  in a step in which no rank's backward pass has reached the parameter, DistributedDataParallel throws the result
                  away: then nothing of it counts as sent, e_i and the buffer stay as they are. Each rank's flag, 1 or 0, travels
                  behind the exact values; their mean is 0 where nobody has used it. Flags are sent only where use is tracked
    one rank      everything is exact, and nothing is sent

What is not finite on any rank arrives as not finite on all, bit-equal. That there is something must be known to all ranks: sums
carry it, and where codes would hide it a flag travels along. Which parameter it is, and on which ranks, they then tell each other
through the store of the group (`Share.census`), which happens in so few steps that it may take its time.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan, prod
from typing import Any

import torch
import torch.distributed as dist

from thinwire.compress.base import finite
from thinwire.compress.memory import Memory, Stateless
from thinwire.traffic import Transfer
from thinwire.workload import Parameter

Parameters = Sequence[Parameter]
Shapes = Mapping[str, Sequence[int]]
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


@dataclass(kw_only=True)
class Share:
    """What one averager does of one bucket: `pieces` through its codes, `exact` as they are, all in the flat `buffer`.

    The buffer holds real numbers of any dtype; averages are float32, or float64 if it is, and become its dtype when they arrive.

    used: by name, whether this rank's backward pass has reached the parameter; None where use is not tracked, and all are.
    census: of what this rank has found not to be finite, by name: by name the ranks that have. Collective, in any order of shares
        of different buckets.
    """

    buffer: torch.Tensor
    pieces: Sequence[Piece]
    exact: Sequence[Piece]
    label: str
    memory: Memory
    used: Mapping[str, bool] | None = None
    census: Callable[[Sequence[str]], dict[str, list[int]]] = lambda found: {name: [] for name in found}
    finite: bool = True
    """Whether this rank has found all of its `pieces` to be; said to the others by `riding`."""
    nonfinite: dict[str, list[int]] = field(default_factory=dict)
    """What is not, by name, and the ranks that it came from; the same on all ranks, after `arrived`."""
    _nowhere: set[str] = field(default_factory=set)

    @property
    def dtype(self) -> torch.dtype:
        """Of what travels as it is."""
        return torch.float64 if self.buffer.dtype == torch.float64 else torch.float32

    @property
    def parts(self) -> list[Piece]:
        """All of it, in the order of the flags."""
        return [*self.pieces, *self.exact]

    def found_finite(self, values: torch.Tensor) -> bool:
        """Whether they are; if not, `riding` will say so."""
        found = finite(values)
        self.finite &= found
        return found

    def riding(self, *, flagged: bool = False) -> torch.Tensor:
        """What every rank adds to the average as it is, a new flat vector: exact values with their residuals, then the flags.

        flagged: the last one says whether this rank has found its pieces to be finite.
        """
        values = [self.memory.exact(piece.name, piece.of(self.buffer)) for piece in self.exact]
        flags = [] if self.used is None else [float(self.used[part.name]) for part in self.parts]
        if flagged:
            flags.append(float(not self.finite))
        if flags:
            values.append(torch.tensor(flags, dtype=self.dtype, device=self.buffer.device))
        return torch.cat(values) if values else self.buffer[:0].to(self.dtype)

    def arrived(self, mean: torch.Tensor, *, flagged: bool = False, spoiled: bool = False) -> None:
        """mean: of what `riding` gave, over all ranks, and perhaps more behind it. Exact values go to their places.

        spoiled: all ranks know by other means that some piece is not finite.
        """
        sizes = [piece.numel for piece in self.exact]
        *values, flags = mean.split([*sizes, mean.numel() - sum(sizes)])
        number = len(self.parts) if self.used is not None else 0
        if self.used is not None:
            arrived = zip(self.parts, flags[:number].tolist(), strict=True)
            self._nowhere = {part.name for part, flag in arrived if not flag}
        if spoiled or (flagged and float(flags[number]) != 0.0) or not all(map(finite, values)):
            self.spoil()
        for piece, value in zip(self.exact, values, strict=True):
            if self.counts(piece):
                piece.of(self.buffer).copy_(value)
                self.memory.clear(piece.name)

    def spoil(self) -> None:
        """Something is not finite: find out what. Called by all ranks, before any result is in the buffer."""
        own = [part.name for part in self.parts if not finite(part.of(self.buffer))]
        # Where nobody has found a gradient, a sum or a residual has grown too large: then all may be spoiled.
        self.nonfinite = self.census(own) or {part.name: [] for part in self.parts}

    def mark(self, *, coded: bool) -> None:
        """Not finite is not finite, on all ranks alike to the bit. After all results are in the buffer.

        coded: what codes have made of a piece that is not finite says nothing; else sums have handed it on, value by value.
        """
        for part in self.parts if self.nonfinite else ():
            values = part.of(self.buffer)
            if coded and part in self.pieces and part.name in self.nonfinite:
                values.fill_(nan)
            else:
                values.masked_fill_(values.isnan(), nan)  # there are many nans

    def counts(self, piece: Piece) -> bool:
        """Whether any rank has used it, and so whether its result is delivered. After `arrived`."""
        return piece.name not in self._nowhere


class Averager(Stateless, ABC):
    """One per rank. Every rank of the group calls `average` with the same pieces in the same order.

    An average has up to three stages. A stage waits for what the one before it has sent, computes, and sends without waiting, so
    that the wire always has something to carry. First, second and third stages run on a thread each, in the order of the buckets;
    each thread sends on a process group of its own. State is what it carries from step to step besides residuals (`memory`).
    """

    settled_after: int = 0
    """Steps of its own after which it sends what `transfers` says."""
    flags_use = True
    """Whether flags of use travel with it."""
    codes = True
    """Whether it sends codes, which say nothing of what is not finite; else sums."""
    _first: dist.ProcessGroup
    _second: dist.ProcessGroup

    @abstractmethod
    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float | None:
        """What a rank sends for one parameter of this shape, about; None if this averager does not take it."""

    def carries(self, numel: int, world_size: int) -> bool:
        """Whether `numel` values that are averaged exactly may ride along, and so save a collective of their own."""
        return True

    @abstractmethod
    def transfers(self, label: str, parameters: Parameters, exact: Parameters, axis: str, world_size: int) -> list[Transfer]:
        """What `average` will send for `parameters` of one bucket and what rides along, to the byte; no communication."""

    def attach(self, first: dist.ProcessGroup, second: dist.ProcessGroup) -> None:
        """Before the first `average`: the groups of the first two stages; the third sends nothing."""
        self._first, self._second = first, second

    @abstractmethod
    def average(self, share: Share) -> Iterator[None]:
        """Replace the pieces of the share by their average, bit-equal on all ranks.

        Yields between its stages. Calls `share.arrived`, or `share.spoil` where something is not finite.
        """


class Counting(Averager):
    """An averager that knows how often each parameter was sent, equal on all ranks."""

    _counts: dict[str, int]

    def count(self, name: str) -> int:
        """How often before; once more from now on."""
        self._counts[name] = self._counts.get(name, 0) + 1
        return self._counts[name] - 1

    def state_dict(self) -> dict[str, Any]:
        return {"counts": dict(self._counts)}

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        self._counts = dict(states[0]["counts"])


def ring_bytes(numel: int, world_size: int, item_bytes: int = 4) -> float:
    """What a rank sends when `numel` values are all-reduced in a ring: 2 (p-1)/p of them."""
    return 2 * (world_size - 1) / world_size * item_bytes * numel


def flags_of(parameters: Parameters, number: int) -> Parameter:
    """`number` flags as they ride along with `parameters`."""
    return Parameter("flags", (number,), dtype=parameters[0].dtype)


def exact_bytes(parameters: Parameters) -> int:
    """Of what travels as it is: float32, or float64 of gradients in float64."""
    return sum((8 if parameter.dtype == "float64" else 4) * parameter.numel for parameter in parameters)
