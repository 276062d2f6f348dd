"""One backward pass of a model under `compress_sharded`: what is under way, and what in it was not finite.

A step with a gradient that is not finite will be left out, by a GradScaler on all ranks, so no rank may count as sent what it has
coded in that backward pass. Each row of gradients carries two flags of the rank that sends it (`wire`): this row is not finite,
and some gradient in this backward pass was not. The second one only grows, and every rank hears that of every other with the last
unit; so at the end of the pass all know, without a collective of their own, whether residuals are those of before. Over replicas
what is not finite arrives so at all, value by value; ranks that know of another chunk put a nan into theirs for that. A pass that
only adds up leaves what it has found to the next one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.compress.base import finite
from thinwire.compress.census import not_finite
from thinwire.compress.exchange import at_end_of_backward
from thinwire.compress.sharded.replicas import Replicas
from thinwire.compress.sharded.residual import Residual
from thinwire.config.compress import NonFinite
from thinwire.errors import UserError

Future = torch.futures.Future[Tensor]


class BackwardPass:
    """The one that is under way, or the next one. `add` is called by the thread that runs it, the others by that of gradients."""

    def __init__(self, residuals: Mapping[str, Residual], replicas: Replicas | None, nonfinite: NonFinite) -> None:
        self._residuals, self._replicas, self._nonfinite = residuals, replicas, nonfinite
        self._step = 0
        self._reductions: list[Future] = []
        self._means: list[tuple[Future, Tensor]] = []
        self._forgotten: list[Any] = []
        self._started = self._averaged = False
        self.own: list[str] = []
        """Names of parameters whose gradients on this rank are not finite."""
        self.spoiled = False
        """Whether this rank knows of any."""

    def add(self, reduction: Future, *, later: bool) -> None:
        """What was begun: it is waited for at the end of the backward pass, or, if somebody reads it sooner, now."""
        self._reductions.append(reduction)
        self._started = True
        if not at_end_of_backward(self._settle):  # each time: a pass that failed has settled nothing
            self._settle()
        elif not later:
            self._wait()

    def then(self, mean: Future, output: Tensor) -> None:
        """`mean` over the replicas goes into `output` when it is there."""
        self._means.append((mean, output))
        self._averaged = True

    def found(self, names: Sequence[str]) -> None:
        """Gradients of this rank that are not finite."""
        self.own += names
        self.spoiled = True

    def forget(self, parameters: Sequence[Any]) -> None:
        """At the end of the backward pass these have no gradient, as before it: what FSDP2 gives them is nothing yet."""
        self._forgotten += parameters

    def _wait(self) -> None:
        for reduction in self._reductions:
            reduction.wait()
        self._reductions = []
        for future, output in self._means:
            mean = self._mean(future)
            self.spoiled |= not finite(mean)
            if mean.data_ptr() != output.data_ptr():
                output.copy_(mean)
        self._means = []

    def _mean(self, future: Future) -> Tensor:
        assert self._replicas is not None
        try:
            return future.wait()
        except Exception:
            self._replicas.exchange.settle()
            raise

    def _settle(self) -> None:
        """At the end of the pass, on all ranks."""
        if not self._started:
            return
        self._wait()
        if self._replicas is not None:
            self._replicas.settle()
        for parameter in self._forgotten:
            parameter.grad = None
        for residual in self._residuals.values():
            settle: Callable[[], None] = residual.rollback if self.spoiled else residual.commit
            settle()
        self._started, self._forgotten = False, []
        if self._replicas is not None and not self._averaged:
            return
        self._step += 1
        own, spoiled = self.own, self.spoiled
        self._averaged, self.own, self.spoiled = False, [], False
        if spoiled and self._nonfinite == "raise":
            raise UserError(not_finite(_of_all_ranks(own), self._step))


def _of_all_ranks(own: Sequence[str]) -> dict[str, list[int]]:
    """By name the ranks that have found it. Collective over all ranks."""
    found: list[Sequence[str]] = [()] * dist.get_world_size()
    dist.all_gather_object(found, own)
    names = dict.fromkeys(name for its in found for name in its) or {"the model": None}
    return {name: [rank for rank, its in enumerate(found) if name in its] for name in names}
