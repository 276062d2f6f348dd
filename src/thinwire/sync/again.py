"""Steps of AdamW that are taken again, of some parameters, from where these and their state once were (`retrace`).

Where H steps have got the same gradient u, the mean of as many, v is widened to what H steps of single gradients would have left:

    v <- v + (H - 1) (v - beta_2^H v_before)                u has the noise of H steps' mean: 1/H of the variance
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.errors import UserError

State = dict[str, Any]
Taken = list[tuple[Tensor, State]]
"""Of some parameters: their values, and what the optimizer knows of each. Copies, which nobody changes."""


class Again:
    """One optimizer. most: steps that can be taken again."""

    def __init__(self, optimizer: torch.optim.Optimizer, most: int) -> None:
        """UserError if it is not AdamW."""
        if not isinstance(optimizer, torch.optim.AdamW):
            raise UserError(
                f"sync.kind = 'retrace' takes the steps of AdamW again, not those of {type(optimizer).__name__}; train with "
                "AdamW, or take another kind"
            )
        self._optimizer = optimizer
        self._group_of = {id(one): group for group in optimizer.param_groups for one in group["params"]}
        self.rates: deque[list[Any]] = deque(maxlen=most)
        """Learning rates of the latest steps, by group."""

    def note(self) -> None:
        """In each step, before it: its learning rates."""
        self.rates.append([_kept(group["lr"]) for group in self._optimizer.param_groups])

    def taken(self, parameters: Sequence[nn.Parameter]) -> Taken:
        """As they are now."""
        states = [self._optimizer.state.get(one, {}) for one in parameters]
        return [
            (one.detach().clone(), {key: _kept(value) for key, value in state.items()})
            for one, state in zip(parameters, states, strict=True)
        ]

    def back(self, parameters: Sequence[nn.Parameter], taken: Taken) -> None:
        """As they were then; before their first step they had no state."""
        for parameter, (values, state) in zip(parameters, taken, strict=True):
            parameter.copy_(values)
            if not state:
                self._optimizer.state.pop(parameter, None)
            for key, value in state.items():
                held = self._optimizer.state[parameter]
                if isinstance(value, Tensor):
                    held[key].copy_(value)
                else:
                    held[key] = value

    def steps(self, parameters: Sequence[nn.Parameter], first: int, last: int) -> None:
        """Those of these parameters alone, with the gradients that they have; first, last: as places in `rates`, without last.

        Nobody's hooks on steps see them."""
        rates, step = list(self.rates)[first:last], type(self._optimizer).step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
        wanted = {id(one) for one in parameters}
        groups = [
            {**group, "params": [one for one in group["params"] if id(one) in wanted]} for group in self._optimizer.param_groups
        ]
        with having(self._optimizer, groups):
            for by_group in rates:
                for group, rate in zip(groups, by_group, strict=True):
                    group["lr"] = rate
                step(self._optimizer)

    def widen(self, parameters: Sequence[nn.Parameter], taken: Taken, steps: int) -> None:
        """The second moments after `steps` steps with one gradient, from `taken` on."""
        for parameter, (_, before) in zip(parameters, taken, strict=True):
            moments = self._optimizer.state.get(parameter, {}).get("exp_avg_sq")
            if moments is not None and steps > 1:
                beta_2 = self._group_of[id(parameter)]["betas"][1]
                left = before["exp_avg_sq"] * beta_2**steps if before else 0.0
                moments.add_((moments - left).mul_(steps - 1))


@contextmanager
def having(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> Iterator[None]:
    """Inside, the optimizer has these groups."""
    every, optimizer.param_groups = optimizer.param_groups, groups
    try:
        yield
    finally:
        optimizer.param_groups = every


def placed(taken: Taken, device: torch.device) -> Taken:
    """On a device, but for counters of steps, which optimizers have on hosts too."""

    def at(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) and value.dim() else value

    return [(values.to(device), {key: at(value) for key, value in state.items()}) for values, state in taken]


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
