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

On a device the host does not look at values, for it would wait for them: what is learned of them stays a flag there, [] bool
(`Share.on_device`). All that a share of a bucket delivers is multiplied by 1, or by nan where something in it was not finite, and
whether a residual counts is chosen by flags at the end of the pass (`Memory.commit`).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import nan, prod
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.clock import has_streams
from thinwire.compress.base import finite, spoiled
from thinwire.compress.memory import Memory, Stateless
from thinwire.config.compress import matches
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
    on_device: bool = False
    """Whether the host must not look at values."""
    spoiled: torch.Tensor | None = None
    """On a device, after `arrived`: whether something is not finite, the same on all ranks, [] bool."""
    nonfinite: dict[str, list[int]] = field(default_factory=dict)
    """What is not, by name, and the ranks that it came from; the same on all ranks, after `arrived`. Empty on a device."""
    _bad: list[torch.Tensor] = field(default_factory=list)
    """Flags of what this rank has found not to be finite of its `pieces`; said to the others by `riding`."""
    _nowhere: set[str] = field(default_factory=set)
    _unused: dict[str, torch.Tensor] = field(default_factory=dict)
    """On a device, where use is tracked: flags, whether no rank has used it."""

    @property
    def dtype(self) -> torch.dtype:
        """Of what travels as it is."""
        return torch.float64 if self.buffer.dtype == torch.float64 else torch.float32

    @property
    def parts(self) -> list[Piece]:
        """All of it, in the order of the flags."""
        return [*self.pieces, *self.exact]

    def finite_or_zeros(self, values: torch.Tensor) -> torch.Tensor:
        """`values`, or zeros if not all of them are finite, and then `riding` will say so."""
        bad = spoiled(values)
        self._bad.append(bad)
        if self.on_device:
            return values.masked_fill(bad, 0.0)
        return torch.zeros_like(values) if bad else values

    def zero_if_spoiled(self, values: torch.Tensor) -> torch.Tensor:
        """Zeros in place of values that are not all finite; the flag, [] bool."""
        bad = spoiled(values)
        if self.on_device:
            values.masked_fill_(bad, 0.0)
        elif bad:
            values.zero_()
        return bad

    def riding(self, *, flagged: bool = False) -> torch.Tensor:
        """What every rank adds to the average as it is, a new flat vector: exact values with their residuals, then the flags.

        flagged: the last one says whether this rank has found its pieces to be finite.
        """
        values = [self.memory.exact(piece.name, piece.of(self.buffer)) for piece in self.exact]
        if self.used is not None:
            values.append(sent_over([float(self.used[part.name]) for part in self.parts], self.dtype, self.buffer.device))
        if flagged:
            flag = torch.stack(self._bad).any() if self._bad else self.buffer.new_zeros((), dtype=torch.bool)
            values.append(flag.to(self.dtype).view(1))
        return torch.cat(values) if values else self.buffer[:0].to(self.dtype)

    def arrived(self, mean: torch.Tensor, *, flagged: bool = False, known: torch.Tensor | None = None) -> None:
        """mean: of what `riding` gave, over all ranks, and perhaps more behind it. Exact values go to their places.

        known: a flag by which all ranks know that some piece is not finite, [] bool.
        """
        exact = sum(piece.numel for piece in self.exact)
        values, flags = mean[:exact], mean[exact:]
        number = len(self.parts) if self.used is not None else 0
        if self.used is not None:
            self._learn_use(flags[:number])
        found = [spoiled(values), *([flags[number] != 0] if flagged else []), *([] if known is None else [known])]
        self._conclude(torch.stack(found).any() if len(found) > 1 else found[0])
        for piece, value in zip(self.exact, values.split([piece.numel for piece in self.exact]), strict=True):
            if self.counts(piece):
                self.deliver(value, piece.of(self.buffer))
                self.memory.clear(piece.name)

    def summed(self, values: torch.Tensor) -> None:
        """Sums of all ranks, which hand on what is not finite value by value, have arrived."""
        self._conclude(spoiled(values))

    def _conclude(self, bad: torch.Tensor) -> None:
        if self.on_device:
            self.spoiled = bad
        elif bad:
            self.spoil()

    def _learn_use(self, flags: torch.Tensor) -> None:
        """The mean of every rank's."""
        if self.on_device:
            self._unused = dict(zip((part.name for part in self.parts), (flags == 0).unbind(), strict=True))
            for name, nowhere in self._unused.items():
                self.memory.forget(name, nowhere)
        else:
            self._nowhere = {part.name for part, flag in zip(self.parts, flags.tolist(), strict=True) if not flag}

    def deliver(self, result: torch.Tensor, place: torch.Tensor) -> None:
        """Into its place in the buffer; nan on a device, where something in the share is not finite. After `arrived`."""
        if self.on_device:
            torch.mul(result, self.factor, out=place)
        else:
            place.copy_(result)

    def counted(self, piece: Piece, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """On a device, after `arrived`: `new`, or `old` if the share is spoiled or no rank has used the piece."""
        assert self.spoiled is not None, "arrived() comes first"
        unused = self._unused.get(piece.name)
        return torch.where(self.spoiled if unused is None else self.spoiled | unused, old, new)

    @cached_property
    def factor(self) -> torch.Tensor:
        """On a device, after `arrived`: what results are multiplied by, 1 or nan, [] of `dtype`."""
        assert self.spoiled is not None, "arrived() comes first"
        return torch.ones((), dtype=self.dtype, device=self.buffer.device).masked_fill_(self.spoiled, nan)

    def spoil(self) -> None:
        """Something is not finite: find out what. Called by all ranks, before any result is in the buffer."""
        own = [part.name for part in self.parts if not finite(part.of(self.buffer))]
        # Where nobody has found a gradient, a sum or a residual has grown too large: then all may be spoiled.
        self.nonfinite = self.census(own) or {part.name: [] for part in self.parts}

    def mark(self, *, coded: bool) -> None:
        """Not finite is not finite, on all ranks alike to the bit. After all results are in the buffer; on a device `deliver` has
        done it, and there is one nan.

        coded: what codes have made of a piece that is not finite says nothing; else sums have handed it on, value by value.
        """
        for part in self.parts if self.nonfinite else ():
            values = part.of(self.buffer)
            if coded and part in self.pieces and part.name in self.nonfinite:
                values.fill_(nan)
            else:
                values.masked_fill_(values.isnan(), nan)  # there are many nans

    def restore(self) -> None:
        """From the units in which pieces were coded to those of the gradient. After all results are in the buffer."""
        for piece in self.pieces:
            self.memory.restore(piece.name, piece.of(self.buffer) if self.counts(piece) else None)

    def counts(self, piece: Piece) -> bool:
        """Whether any rank has used it, and so whether its result is delivered. After `arrived`. On a device always: there
        DistributedDataParallel throws away what nobody has used, and the memory forgets it by a flag."""
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
    device = torch.device("cpu")
    """Of what it averages, where it times its codes."""
    only: Sequence[str] = ("*",)
    """Patterns of names that may be its pieces."""
    leaves: Sequence[str] = ()
    """Of these, patterns of names that are not."""
    _first: dist.ProcessGroup
    _second: dist.ProcessGroup

    def takes(self, name: str) -> bool:
        """Whether a parameter of this name may be its piece."""
        return matches(name, self.only) and not matches(name, self.leaves)

    @abstractmethod
    def sent_bytes(self, shape: Sequence[int], world_size: int) -> float | None:
        """What a rank sends for one parameter of this shape, about; None if this averager does not take it."""

    def carries(self, numel: int, world_size: int) -> bool:
        """Whether `numel` values that are averaged exactly may ride along, and so save a collective of their own."""
        return True

    @abstractmethod
    def transfers(self, label: str, parameters: Parameters, exact: Parameters, axis: str, world_size: int) -> list[Transfer]:
        """What `average` will send for `parameters` of one bucket and what rides along, to the byte; no communication."""

    def attach(self, first: dist.ProcessGroup, second: dist.ProcessGroup, device: torch.device | None = None) -> None:
        """Before the first `average`: the groups of the first two stages; the third sends nothing. device: of the buffers."""
        self._first, self._second, self.device = first, second, device or self.device

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


def sent_over(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[len(values)] on `device`, for which the host does not wait."""
    return torch.tensor(values, dtype=dtype, pin_memory=has_streams(device)).to(device, non_blocking=True)


def ring_bytes(numel: int, world_size: int, item_bytes: int = 4) -> float:
    """What a rank sends when `numel` values are all-reduced in a ring: 2 (p-1)/p of them."""
    return 2 * (world_size - 1) / world_size * item_bytes * numel


def flags_of(parameters: Parameters, number: int) -> Parameter:
    """`number` flags as they ride along with `parameters`."""
    return Parameter("flags", (number,), dtype=parameters[0].dtype)


def exact_bytes(parameters: Parameters) -> int:
    """Of what travels as it is: float32, or float64 of gradients in float64."""
    return sum((8 if parameter.dtype == "float64" else 4) * parameter.numel for parameter in parameters)
