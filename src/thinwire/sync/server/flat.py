"""A model's parameters as one flat float32 vector, in the order in which the model names them, and its ranges on servers.

    range i of k = [ floor(i n / k), floor((i+1) n / k) )        n: number of values

Contiguous, each value in exactly one, sizes differing by one value at most; a parameter may be cut (Li et al., Scaling
distributed machine learning with the parameter server, OSDI 2014, section 4.2). Every value has the same number of bytes, so the
ranges are balanced by bytes; a server's optimizer works value by value, so where the cuts lie changes nothing. Buffers are not
part of it.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from thinwire.errors import UserError


class Span(NamedTuple):
    """Values [first, end) that belong to one parameter, or to several alike; decays: weight decay acts on them."""

    first: int
    end: int
    decays: bool


def cut(numel: int, num_servers: int) -> list[range]:
    """The ranges in the order of servers. UserError if there are more servers than values."""
    if num_servers > numel:
        raise UserError(f"{num_servers} servers for {numel} parameters leave servers without any; start fewer servers")
    edges = [index * numel // num_servers for index in range(num_servers + 1)]
    return [range(first, end) for first, end in pairwise(edges)]


def within(spans: Sequence[Span], part: range) -> list[Span]:
    """The pieces of `spans` that lie in `part`, counted from its beginning."""
    found = []
    for span in spans:
        first, end = max(span.first, part.start), min(span.end, part.stop)
        if first < end:
            found.append(Span(first - part.start, end - part.start, span.decays))
    return found


class FlatParameters:
    """The parameters of `model` that are trained."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        for name, parameter in named:
            if parameter.dtype != torch.float32:
                raise UserError(f"parameter {name} is {parameter.dtype}; servers hold float32, so keep the weights in it")
        self._named = named

    def spans(self) -> list[Span]:
        """One per parameter; weight decay acts on matrices only."""
        found, first = [], 0
        for _, parameter in self._named:
            found.append(Span(first, first + parameter.numel(), parameter.dim() >= 2))
            first += parameter.numel()
        return found

    def values(self) -> Tensor:
        """A copy of the weights, on the CPU."""
        return torch.cat([parameter.detach().reshape(-1).cpu() for _, parameter in self._named])

    def gradients(self) -> Tensor:
        """A copy of the gradients, zero where there is none. UserError names one that is not finite."""
        found = []
        for name, parameter in self._named:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if not bool(torch.isfinite(gradient).all()):
                raise UserError(f"the gradient of {name} is not finite; lower the learning rate, or look at this step's data")
            found.append(gradient.reshape(-1).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def put(self, values: Tensor) -> None:
        """Replace the weights."""
        for span, (_, parameter) in zip(self.spans(), self._named, strict=True):
            parameter.copy_(values[span.first : span.end].view_as(parameter))
