"""Paced compute: a rank computes at the rate that its device declares, however busy the machine really is.

In a lab many ranks share few cores, and an idle rank lends its core to the others; stragglers and waiting would then vanish.
So each forward and each backward pass follows a clock: the pass starts at t, and block k is over no sooner than

    t + (share of the pass's flops up to and including block k) / flops_per_s

The exchange goes on while a rank sleeps. Going backward it sleeps before a block as long as the block has time to spare, so that
gradients become ready when they would on the declared device, at the end of their block's share. A block that takes longer than
its share is made up for by the next ones of the same pass; a pass that ends late is counted as missed. Flops outside the blocks
(embedding, head) are spread evenly over the blocks. Evaluation is not paced.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from thinwire.errors import UserError
from thinwire.workload import Workload

TOLERANCE = 0.02
"""A pass that ends later than this fraction is missed."""
SMOOTHING = 0.2
"""Weight of the newest block in the running mean of what a block takes."""


@dataclass
class Pacer:
    """Hooks on the repeated blocks of a model. forward_s and backward_s: declared seconds of one micro-batch."""

    forward_s: float
    backward_s: float
    passes: int = 0
    missed: int = 0
    _pass_started: float = 0.0
    _block_started: float = 0.0
    _block_takes_s: float = 0.0
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
        count = len(blocks)
        for index, block in enumerate(blocks):
            if index == 0:
                self._keep(block.register_forward_pre_hook, self._begin_pass)
            self._keep(block.register_forward_hook, partial(self._end_forward, (index + 1) / count))
            if index == count - 1:
                self._keep(block.register_full_backward_pre_hook, self._begin_pass)
            share = (count - index) / count
            self._keep(block.register_full_backward_pre_hook, partial(self._begin_backward, share))
            self._keep(block.register_full_backward_hook, partial(self._end_backward, share))
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    @property
    def missed_fraction(self) -> float:
        """Passes that ended later than declared."""
        return self.missed / max(1, self.passes)

    def _keep(self, register: Callable[..., torch.utils.hooks.RemovableHandle], hook: Callable[..., None]) -> None:
        self._handles.append(register(hook))

    def _begin_pass(self, *_: object) -> None:
        self._pass_started = time.perf_counter()

    def _end_forward(self, share: float, *_: object) -> None:
        if torch.is_grad_enabled():
            self._hold(share, self.forward_s)

    def _begin_backward(self, share: float, *_: object) -> None:
        end = self._pass_started + share * self.backward_s
        _sleep_until(end - self._block_takes_s)
        self._block_started = time.perf_counter()

    def _end_backward(self, share: float, *_: object) -> None:
        took = time.perf_counter() - self._block_started
        self._block_takes_s += (took - self._block_takes_s) * (SMOOTHING if self._block_takes_s else 1.0)
        self._hold(share, self.backward_s)

    def _hold(self, share: float, pass_s: float) -> None:
        """Sleep until `share` of the pass should be over; at its end see whether that was kept."""
        late = -_sleep_until(self._pass_started + share * pass_s)
        if share == 1.0:
            self.passes += 1
            self.missed += late > TOLERANCE * pass_s


def _sleep_until(moment: float) -> float:
    """Returns by how much the moment was still ahead; negative if it had passed."""
    ahead = moment - time.perf_counter()
    if ahead > 0:
        time.sleep(ahead)
    return ahead
