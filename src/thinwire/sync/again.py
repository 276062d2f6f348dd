"""Steps of AdamW that are taken again, of some rows of parameters, from where these and their state once were (`retrace`).

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
from thinwire.sync.parts import Rows

State = dict[str, Any]
Taken = list[tuple[Tensor, State]]
"""Of some parts: their values, and what the optimizer knows of each. Copies, which nobody changes."""


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
        self._group_of = {id(one): index for index, group in enumerate(optimizer.param_groups) for one in group["params"]}
        self.rates: deque[list[Any]] = deque(maxlen=most)
        """Learning rates of the latest steps, by group."""

    def note(self) -> None:
        """In each step, before it: its learning rates."""
        self.rates.append([_kept(group["lr"]) for group in self._optimizer.param_groups])

    def taken(self, parts: Sequence[Rows]) -> Taken:
        """As they are now."""
        states = [self._optimizer.state.get(part.parameter, {}) for part in parts]
        return [
            (part.of(part.parameter.detach()).clone(), {key: _kept(_of(part, key, value)) for key, value in state.items()})
            for part, state in zip(parts, states, strict=True)
        ]

    def steps(self, parts: Sequence[Rows], taken: Taken, gradients: Sequence[Tensor], first: int, last: int) -> None:
        """Go back to how these parts were then, and take their steps again, with a gradient for each; first, last: as places in
        `rates`, without last. Nobody's hooks on steps see them, and the counters of other steps stay."""
        state, step = self._optimizer.state, type(self._optimizer).step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
        groups = [{**group, "params": []} for group in self._optimizer.param_groups]
        alone = []
        for part, (values, before), gradient in zip(parts, taken, gradients, strict=True):
            one = nn.Parameter(part.of(part.parameter.detach()))
            one.copy_(values)
            one.grad = gradient
            for key, value in before.items():
                state[one][key] = _of(part, key, state[part.parameter][key]) if _is_moment(key, value) else _kept(value)
                if _is_moment(key, value):
                    state[one][key].copy_(value)
            groups[self._group_of[id(part.parameter)]]["params"].append(one)
            alone.append(one)
        with having(self._optimizer, groups):
            for by_group in list(self.rates)[first:last]:
                for group, rate in zip(groups, by_group, strict=True):
                    group["lr"] = rate
                step(self._optimizer)
        for part, one, (_, before) in zip(parts, alone, taken, strict=True):
            for key, value in state.pop(one, {}).items():
                if not before and _is_moment(key, value):  # had none before its first step
                    _of(part, key, state[part.parameter][key]).copy_(value)

    def widen(self, parts: Sequence[Rows], taken: Taken, steps: int) -> None:
        """The second moments after `steps` steps with one gradient, from `taken` on."""
        for part, (_, before) in zip(parts, taken, strict=True):
            moments = self._optimizer.state.get(part.parameter, {}).get("exp_avg_sq")
            if moments is not None and steps > 1:
                beta_2 = self._optimizer.param_groups[self._group_of[id(part.parameter)]]["betas"][1]
                left, moments = before["exp_avg_sq"] * beta_2**steps if before else 0.0, part.of(moments)
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


def _is_moment(key: str, value: Any) -> bool:
    """Whether it has the parameter's shape."""
    return isinstance(value, Tensor) and key != "step"


def _of(part: Rows, key: str, value: Any) -> Any:
    return part.of(value) if _is_moment(key, value) else value
