"""Parameters cut along their first dim, so that buckets which take turns are alike in size; and the turns.

A parameter of several times a bucket's size is as many parts, each named as it is with its rows behind: "head.weight rows 0:64".
Patterns of names are of whole parameters (`config.compress.matches`). What has one dim stays whole.

Buckets of one size take turns in the order in which their gradients become ready, so each turn has some of the whole depth of the
model: the first of them are under way during most of the backward pass, and only the last, of the first layers, is waited for.
More and smaller ones leave less of it to wait for, and cost more headers: by gloo each costs a rank some 900 bytes for each other
one. At R = 40 (docs/rarely.md) two to six for each turn take equally long, at R = 400 one to three.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from types import EllipsisType
from typing import NamedTuple

from torch import Tensor, nn

from thinwire.compress.averager import Piece
from thinwire.config.compress import ROWS
from thinwire.sync.buckets import assign_buckets, filled, real_shape
from thinwire.workload import Parameter

PER_TURN = 3
"""Buckets that a turn has, where no size is asked for."""
SIZES = 2**16, 25 * 2**20
"""Bytes of such buckets, least and most."""


@dataclass(frozen=True)
class Part(Parameter):
    """whole: the parameter's name; rows: which, None for all."""

    whole: str = ""
    rows: tuple[int, int] | None = None

    @property
    def is_first(self) -> bool:
        """Whether it has the parameter's first row."""
        return self.rows is None or self.rows[0] == 0

    def of(self, parameter: nn.Parameter) -> "Rows":
        """This part of the parameter that it is of."""
        return Rows(parameter, slice(*self.rows) if self.rows else ...)


class Rows(NamedTuple):
    """Of a parameter and of all that has its shape; ...: all of them."""

    parameter: nn.Parameter
    rows: slice | EllipsisType

    def of(self, value: Tensor) -> Tensor:
        """A view of a tensor of the parameter's shape."""
        return value[self.rows]


def cut(parameters: Iterable[Parameter], bucket_bytes: int) -> list[Part]:
    """Into parts of a bucket's size up to twice it; the last rows first, since `assign_buckets` goes backward."""
    found = []
    for one in parameters:
        whole = Part(one.name, one.shape, one.forward_flops_before, one.dtype, one.recomputed_flops_before, whole=one.name)
        rows = one.shape[0] if len(one.shape) > 1 else 0
        many = rows // -(-bucket_bytes * rows // one.stored_bytes) if rows and one.numel else 0
        if many < 2:
            found.append(whole)
            continue
        ends = [one.shape[0] * index // many for index in range(many + 1)]
        for first, last in reversed(list(pairwise(ends))):
            name, shape = f"{one.name}{ROWS}{first}:{last}", (last - first, *one.shape[1:])
            found.append(replace(whole, name=name, shape=shape, rows=(first, last)))
    return found


def taking_turns(parameters: Sequence[Parameter], bucket_bytes: int, every: int) -> list[list[Part]]:
    """Buckets, in the order in which their gradients become ready. bucket_bytes: 0 for as many as turns want."""
    least, most = SIZES
    usual = sum(one.stored_bytes for one in parameters) // (PER_TURN * every)
    size = bucket_bytes or min(max(usual, least), most)
    return assign_buckets(cut(parameters, size), size)


def buffers(buckets: Sequence[Sequence[Part]], model: nn.Module) -> list[tuple[Tensor, list[Piece]]]:
    """A buffer for each bucket, and which part's gradient lies where in it. Those of a dtype lie one behind the other in memory;
    from now on the parameters' gradients are views of it."""
    trained, memory, begun, found = dict(model.named_parameters()), dict[str, Tensor](), Counter[str](), []
    for dtype in dict.fromkeys(bucket[0].dtype for bucket in buckets):
        firsts = [one.whole for bucket in buckets for one in bucket if one.dtype == dtype and one.is_first]
        wholes = [Parameter(name, real_shape(trained[name]), dtype=dtype) for name in firsts]
        memory[dtype], _ = filled(wholes, model)
    for bucket in buckets:
        ends, dtype = list(accumulate((one.numel for one in bucket), initial=0)), bucket[0].dtype
        first = begun[dtype]
        begun[dtype] += ends[-1]
        pieces = [Piece(one.name, at, one.shape) for one, at in zip(bucket, ends[:-1], strict=True)]
        found.append((memory[dtype][first : begun[dtype]], pieces))
    return found


def turns(buckets: Sequence[Sequence[Parameter]], every: int) -> list[int]:
    """Of each bucket, in which step of a period it is exchanged: as many bytes in each as can be; of few, at even distances."""
    if len(buckets) <= every:
        return [index * every // len(buckets) for index in range(len(buckets))]
    loads, found = [0] * every, []
    for bucket in buckets:
        found.append(loads.index(min(loads)))
        loads[found[-1]] += sum(one.stored_bytes for one in bucket)
    return found
