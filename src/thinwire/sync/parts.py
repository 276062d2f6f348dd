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
from itertools import chain, pairwise
from math import prod
from types import EllipsisType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from thinwire.compress.averager import Piece
from thinwire.config.compress import ROWS
from thinwire.sync.buckets import assign_buckets, real_shape
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


def filled(buckets: Sequence[Sequence[Part]], model: nn.Module) -> list[tuple[Tensor, list[Piece]]]:
    """A buffer for each bucket, and which part's gradient lies where in it. Those of a dtype lie one behind the other in memory;
    from now on the parameters' gradients are views of it."""
    trained = dict(model.named_parameters())
    places, sizes = dict[str, int](), Counter[str]()
    for one in chain.from_iterable(buckets):
        places[one.name] = sizes[one.dtype]
        sizes[one.dtype] += one.numel
    device = next(iter(trained.values())).device
    memory = {dtype: torch.zeros(size, dtype=getattr(torch, dtype), device=device) for dtype, size in sizes.items()}
    for one in chain.from_iterable(buckets):
        if one.rows is None or one.rows[0] == 0:
            parameter, first = trained[one.whole], places[one.name]
            shape = real_shape(parameter)
            part = memory[one.dtype][first : first + prod(shape)]
            part = torch.view_as_complex(part.view(*parameter.shape, 2)) if parameter.is_complex() else part.view(shape)
            parameter.grad = part
    found = []
    for bucket in buckets:
        first = places[bucket[0].name]
        buffer = memory[bucket[0].dtype][first : first + sum(one.numel for one in bucket)]
        found.append((buffer, [Piece(one.name, places[one.name] - first, one.shape) for one in bucket]))
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
