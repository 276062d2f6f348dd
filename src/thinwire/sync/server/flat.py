"""A model's parameters as one flat vector, in the order in which the model names them, those in float64 last; and its ranges on
servers.

    range i of k = [ floor(i n / k), floor((i+1) n / k) )        n: number of values

Contiguous, each value in exactly one, sizes differing by one value at most; a parameter may be cut (Li et al., Scaling
distributed machine learning with the parameter server, OSDI 2014, section 4.2). A server's optimizer works value by value, so
where the cuts lie changes nothing. Buffers are not part of it. Parameters may lie on a device; the vector is the CPU's, and goes
there and back as one copy.

Servers keep the digits that a model in 16 bits rounds off (`extent`). With w the weights that were put and R(w) what the model
could hold of them, it has moved from there to x by R(w) - x: what was rounded off counts as no movement.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from thinwire.errors import UserError
from thinwire.sync.server.extent import Extent
from thinwire.workload import ITEM_BYTES


class Span(NamedTuple):
    """Values [first, end) that belong to one parameter, or to several alike.

    decays: weight decay acts on them. wide: they are float64.
    """

    first: int
    end: int
    decays: bool
    wide: bool = False


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
            found.append(span._replace(first=first - part.start, end=end - part.start))
    return found


def extent_of(spans: Sequence[Span]) -> Extent:
    """Of what they cover."""
    return Extent(sum(span.end - span.first for span in spans), sum(span.end - span.first for span in spans if span.wide))


class FlatParameters:
    """The parameters of `model` that are trained. UserError for a dtype that cannot be sent."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        for name, parameter in named:
            if (dtype := str(_real(parameter).dtype).removeprefix("torch.")) not in ITEM_BYTES:
                raise UserError(f"parameter {name} is {dtype}; servers take {', '.join(ITEM_BYTES)} and complex numbers of these")
        self._named = sorted(named, key=lambda pair: _real(pair[1]).dtype == torch.float64)
        self._dtype = extent_of(self.spans()).dtype

    def spans(self) -> list[Span]:
        """One per parameter; weight decay acts on matrices only."""
        found, first = [], 0
        for _, parameter in self._named:
            held = _real(parameter)
            found.append(Span(first, first + held.numel(), parameter.dim() >= 2, held.dtype == torch.float64))
            first += held.numel()
        return found

    def values(self) -> Tensor:
        """[numel] a copy of the weights, on the CPU; float32, or float64 if any are."""
        return self._flat([parameter for _, parameter in self._named])

    def moved(self, weights: Tensor) -> Tensor:
        """[numel] how far the model is from where `put(weights)` left it: R(w) - x."""
        found = weights.clone()
        for span, (_, parameter) in zip(self.spans(), self._named, strict=True):
            part = found[span.first : span.end]
            part.copy_(part.to(_real(parameter).dtype))
        return found.sub_(self.values())

    def gradients(self) -> Tensor:
        """A copy of the gradients, zero where there is none. UserError names one that is not finite."""
        found = self._flat([torch.zeros_like(one) if one.grad is None else one.grad for _, one in self._named])
        for span, (name, _) in zip(self.spans(), self._named, strict=True):
            if not bool(torch.isfinite(found[span.first : span.end]).all()):
                raise UserError(f"the gradient of {name} is not finite; lower the learning rate, or look at this step's data")
        return found

    def put(self, values: Tensor) -> None:
        """Replace the weights, rounded once."""
        values = values.to(self._named[0][1].device)
        for span, (_, parameter) in zip(self.spans(), self._named, strict=True):
            held = _real(parameter)
            held.copy_(values[span.first : span.end].view(held.shape))

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        device = self._named[0][1].device
        return torch.cat([_real(one).reshape(-1).to(device, self._dtype) for one in tensors]).cpu()


def _real(values: Tensor) -> Tensor:
    """The same memory without autograd; of complex numbers the parts."""
    return torch.view_as_real(values.detach()) if values.is_complex() else values.detach()
