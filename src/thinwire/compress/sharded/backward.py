"""One backward pass of a model under `compress_sharded`: what is under way, and what in it was not finite.

A step with a gradient that is not finite will be left out, by a GradScaler on all ranks, so no rank may count as sent what it has
coded in that backward pass. Each row of gradients carries two flags of the rank that sends it (`wire`): this row is not finite,
and some gradient in this backward pass was not. The second one only grows, and every rank hears that of every other with the last
unit; so at the end of the pass all know, without a collective of their own, whether residuals are those of before. Over replicas
what is not finite arrives so at all, value by value; ranks that know of another chunk put a nan into theirs for that. A pass that
only adds up leaves what it has found to the next one.

On the CPU reductions run on a thread, and are waited for here; no more than `UNDER_WAY` units wait, whose whole gradients
are in memory. On a device they are launched on the stream that FSDP2 has chosen for them, which all its own work waits for; what
they have found are flags there, which choose what counts, and the host reads them one pass later, if an error was asked for
(`passes`).
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.executor import Executor
from thinwire.compress.base import spoiled
from thinwire.compress.census import not_finite
from thinwire.compress.exchange import at_end_of_backward
from thinwire.compress.passes import Findings
from thinwire.compress.sharded.layout import UnitShape
from thinwire.compress.sharded.replicas import Replicas
from thinwire.compress.sharded.residual import Residual
from thinwire.compress.stages import current_stream, launched
from thinwire.config.compress import NonFinite
from thinwire.errors import UserError

Future = torch.futures.Future[Tensor]
UNDER_WAY = 2
"""Units whose gradients may wait to be reduced behind the one that is."""


class BackwardPass:
    """The one that is under way, or the next one. `run` is called by the thread that runs it, the others by that of gradients."""

    def __init__(
        self, residuals: Mapping[str, Residual], replicas: Replicas | None, nonfinite: NonFinite, device: torch.device
    ) -> None:
        """device: of the gradients."""
        self._residuals, self._replicas, self._nonfinite = residuals, replicas, nonfinite
        self._device, self.on_device = device, launched(device)
        self._stream: torch.Stream | None = None
        """The one on which reductions are launched."""
        self._step = 0
        self._reductions: list[Future] = []
        self._means: list[tuple[Future, Tensor | None]] = []
        self._forgotten: list[Any] = []
        self._started = self._averaged = False
        self._findings = Findings()
        self.reduced: Callable[[UnitShape, Tensor], None] = lambda unit, chunk: None
        """Told of a unit's gradients, its chunk of this rank, when they are reduced; on the thread of gradients, or launched."""
        self.waiting: Callable[[], AbstractContextManager[None]] = nullcontext
        """Entered while the pass waits for reductions."""
        self._clear()

    def _clear(self) -> None:
        self.own = self.spoiled = torch.zeros((), dtype=torch.bool, device=self._device)
        """Flags: some gradient of this rank is not finite; this rank knows of any."""
        self._looked: list[tuple[Sequence[str], Tensor]] = []

    def run(self, reduction: Callable[[], Tensor], executor: Executor | None, *, later: bool) -> None:
        """Begin it: it is waited for at the end of the backward pass, or, if somebody reads it sooner, now.

        executor: on the CPU."""
        self._started = True
        if executor is not None:
            self._reductions.append(executor.submit(reduction))
            if len(self._reductions) > UNDER_WAY:
                with self.waiting():
                    self._reductions.pop(0).wait()
        else:
            self._stream = current_stream(self._device)
            reduction()
        if not at_end_of_backward(self._settle):  # each time: a pass that failed has settled nothing
            self._settle()
        elif not later:
            self._wait()

    def then(self, mean: Future, output: Tensor | None) -> None:
        """`mean` over the replicas goes into `output` when it is there; None: it is there then."""
        self._means.append((mean, output))
        self._averaged = True

    def found(self, bad: Tensor, names: Callable[[], tuple[Sequence[str], Tensor]]) -> None:
        """What of a unit's gradients of this rank is not finite. bad: flags of its chunks; names: of parameters, with flags."""
        if self._nonfinite == "raise" and (self.on_device or bool(bad.any())):
            self._looked.append(names())
        self.own = self.own | bad.any()
        self.spoiled = self.spoiled | self.own

    def forget(self, parameters: Sequence[Any]) -> None:
        """At the end of the backward pass these have no gradient, as before it: what FSDP2 gives them is nothing yet."""
        self._forgotten += parameters

    def check(self, *, all_of_them: bool = True) -> None:
        """UserError, on all ranks, if a pass was spoiled and an error was asked for; else of all but the latest."""
        if found := self._findings.next(all_of_them=all_of_them):
            raise UserError(not_finite(_of_all_ranks(found.own), found.step))

    @torch.no_grad()
    def _wait(self) -> None:
        with self.waiting() if self._reductions else nullcontext():
            for reduction in self._reductions:
                reduction.wait()
        self._reductions = []
        if self._replicas is not None:
            self._replicas.exchange.flush()
        for future, output in self._means:
            mean = self._mean(future)
            self.spoiled = self.spoiled | spoiled(mean)
            if output is not None:
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
        with self._stream or nullcontext():
            self._end()
        if self._stream is not None:  # means were waited for there
            torch.accelerator.current_stream(self._device).wait_stream(self._stream)
        self.check(all_of_them=not self.on_device)

    @torch.no_grad()
    def _end(self) -> None:
        self._wait()
        if self._replicas is not None:
            self._replicas.settle()
        for parameter in self._forgotten:
            parameter.grad = None
        for residual in self._residuals.values():
            if self.on_device:
                residual.commit(unless=self.spoiled)
            elif self.spoiled:
                residual.rollback()
            else:
                residual.commit()
        self._started, self._forgotten = False, []
        if self._replicas is not None and not self._averaged:
            return
        self._step += 1
        self._averaged = False
        if self._nonfinite == "raise":
            self._findings.add(self._step, self._step, self._looked, self.spoiled)
        self._clear()


def _of_all_ranks(own: Sequence[str]) -> dict[str, list[int]]:
    """By name the ranks that have found it. Collective over all ranks."""
    found: list[Sequence[str]] = [()] * dist.get_world_size()
    dist.all_gather_object(found, own)
    names = dict.fromkeys(name for its in found for name in its) or {"the model": None}
    return {name: [rank for rank, its in enumerate(found) if name in its] for name in names}
