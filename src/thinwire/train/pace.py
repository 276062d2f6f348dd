"""Paced compute: a rank computes at the rate that its device declares, however busy the machine really is.

In a lab many ranks share few cores, and an idle rank lends its core to the others; stragglers and waiting would then vanish.
So each forward and each backward pass follows a clock: the pass starts, and after block k it sleeps until

    start + (share of the pass's flops up to and including block k) / flops_per_s

The exchange goes on while it sleeps. A block that takes longer than its share is made up for by the next ones of the same pass;
a pass that ends late is counted as missed. Flops outside the blocks (embedding, head) are spread evenly over the blocks.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from thinwire.errors import UserError
from thinwire.workload import Workload

TOLERANCE = 0.02
"""A pass that ends later than this fraction is missed."""


@dataclass
class Pacer:
    """Hooks on the repeated blocks of a model. forward_s and backward_s: declared seconds of one micro-batch."""

    forward_s: float
    backward_s: float
    passes: int = 0
    missed: int = 0
    late_s: float = 0.0
    _start: float = 0.0
    _handles: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    @classmethod
    def of(cls, workload: Workload, flops_per_s: float) -> "Pacer":
        """The pace of a device that achieves `flops_per_s` in training."""
        forward = workload.forward_flops_per_token * workload.tokens_per_microbatch / flops_per_s
        backward = workload.backward_flops_per_token * workload.tokens_per_microbatch / flops_per_s
        return cls(forward_s=forward, backward_s=backward)

    @contextmanager
    def attached(self, blocks: list[torch.nn.Module]) -> Iterator[None]:
        """Hooks on, at the end hooks off. `blocks` in the order of the forward pass."""
        if not blocks:
            raise UserError("paced compute wants a model with repeated blocks, and this one names none; use --unpaced")
        for index, block in enumerate(blocks):
            done = (index + 1) / len(blocks)
            if index == 0:
                self._handles.append(block.register_forward_pre_hook(self._begin))
            self._handles.append(block.register_forward_hook(_after_forward(self, done)))
            if index == len(blocks) - 1:
                self._handles.append(block.register_full_backward_pre_hook(self._begin))
            left = (len(blocks) - index) / len(blocks)
            self._handles.append(block.register_full_backward_hook(_after(self, left, self.backward_s)))
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    @property
    def missed_fraction(self) -> float:
        return self.missed / max(1, self.passes)

    def _begin(self, *_: object) -> None:
        self._start = time.perf_counter()

    def hold(self, share: float, pass_s: float) -> None:
        """Sleep until `share` of the pass should be over."""
        ahead = self._start + share * pass_s - time.perf_counter()
        if ahead > 0:
            time.sleep(ahead)
        if share == 1.0:
            self.passes += 1
            self.late_s += max(0.0, -ahead)
            self.missed += -ahead > TOLERANCE * pass_s


def _after(pacer: Pacer, share: float, pass_s: float) -> Callable[..., None]:
    def hook(*_: object) -> None:
        pacer.hold(share, pass_s)

    return hook


def _after_forward(pacer: Pacer, share: float) -> Callable[..., None]:
    def hook(*_: object) -> None:
        if torch.is_grad_enabled():  # an evaluation is not paced: it is not what is measured
            pacer.hold(share, pacer.forward_s)

    return hook
