"""A model's parameters as one flat float32 vector, in the order in which the model names them. Buffers are not part of it."""

import torch
from torch import Tensor, nn

from thinwire.errors import UserError
from thinwire.sync.server.ranges import Span


class FlatParameters:
    """The parameters of `model` that are trained."""

    def __init__(self, model: nn.Module) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        for name, parameter in named:
            if parameter.dtype != torch.float32:
                raise UserError(f"parameter {name} is {parameter.dtype}; servers hold float32, so keep the weights in it")
        self._named = named
        self.numel = sum(parameter.numel() for _, parameter in named)

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
        first = 0
        for _, parameter in self._named:
            parameter.copy_(values[first : first + parameter.numel()].view_as(parameter))
            first += parameter.numel()
