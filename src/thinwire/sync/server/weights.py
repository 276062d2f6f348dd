"""A server's range of the weights, float32 or float64 (`extent`), and the optimizer that moves it.

    gradient       torch.optim.SGD or AdamW
    merged push    Nesterov: u <- m u + D;  w <- w - r (D + m u)        D: how far the replicas went, m momentum, r rate

The last is torch.optim.SGD(nesterov=True) with D for a gradient (Douillard et al. 2023, DiLoCo).
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.config.replicas import DiLoCo, Gradients, ServerAdamW
from thinwire.sync.server.flat import Span, extent_of


class Weights:
    """Used under the lock of whoever holds it."""

    def __init__(self, config: Gradients | DiLoCo, values: Tensor, spans: Sequence[Span]) -> None:
        self.values = values.clone()
        self.spans, self.extent = list(spans), extent_of(spans)
        # views of one vector: the optimizer moves the vector, all workers are sent the vector
        self._parameters = [torch.nn.Parameter(self.values[span.first : span.end].detach()) for span in self.spans]
        self._optimizer = _optimizer(config, [(one, span.decays) for one, span in zip(self._parameters, self.spans, strict=True)])

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """One step of the optimizer. gradient: [numel] of the range."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        for span, parameter in zip(self.spans, self._parameters, strict=True):
            parameter.grad = gradient[span.first : span.end]
        self._optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """A copy of weights, spans, and the optimizer's moments, which later steps do not reach."""
        spans = [tuple(span) for span in self.spans]
        moments = copy.deepcopy(self._optimizer.state_dict())
        return {"values": self.values.clone(), "spans": spans, "optimizer": moments}

    @classmethod
    def of(cls, config: Gradients | DiLoCo, state: dict[str, Any]) -> "Weights":
        """From a state_dict."""
        found = cls(config, state["values"], [Span(*span) for span in state["spans"]])
        found._optimizer.load_state_dict(state["optimizer"])
        return found


def load_optimizers() -> None:
    """The first optimizer of a process makes torch load for seconds; better before the first worker waits for an answer."""
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)


def _optimizer(config: Gradients | DiLoCo, parameters: list[tuple[torch.nn.Parameter, bool]]) -> torch.optim.Optimizer:
    if isinstance(config, DiLoCo):
        together = [parameter for parameter, _ in parameters]
        return torch.optim.SGD(together, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0)
    chosen = config.optimizer
    groups = [
        {"params": [parameter for parameter, decays in parameters if decays == wanted], "weight_decay": weight_decay}
        for wanted, weight_decay in ((True, chosen.weight_decay), (False, 0.0))
    ]
    groups = [group for group in groups if group["params"]]
    if isinstance(chosen, ServerAdamW):
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(chosen.beta1, chosen.beta2), eps=chosen.epsilon)
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=chosen.momentum)
