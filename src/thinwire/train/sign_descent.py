"""Descent by signs: x <- x - lr (sign(g) + d x), with d the weight decay (Bernstein et al. 2018, signSGD).

The gradient's size does not matter. Over the momentum that DeMo exchanges (Peng et al. 2024) this is its Signum form.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class SignDescent(torch.optim.Optimizer):
    """No state of its own. Groups: params, weight_decay (0 unless given)."""

    def __init__(self, groups: Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(parameter.grad.sign(), alpha=-group["lr"])
