"""Gradients averaged over an axis in each step, when a rank's backward passes are over: for models whose passes a pipeline runs.

DistributedDataParallel counts on one backward pass a step, through one module. A rank of a pipeline makes several of several
stages, and a schedule may compute weights apart from inputs; so here gradients lie in buckets from the beginning, each a view of
its part, and when the schedule is through the buckets go out, all at once, to the exchange. Stages that end early, the last ones,
send while the others still compute.
"""

from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.distributed.device_mesh import DeviceMesh

from thinwire.collectives.clock import clock_of
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece
from thinwire.compress.exchange import Exchange
from thinwire.compress.precondition import moments_of
from thinwire.config.sync import EveryStep
from thinwire.layout import Layout
from thinwire.sync.buckets import Names, assign_buckets, described, filled
from thinwire.sync.every_step import EveryStepSync
from thinwire.sync.initial_values import make_same
from thinwire.traffic import Transfer
from thinwire.workload import Parameter, Workload


class Everything:
    """All names."""

    def __contains__(self, name: object) -> bool:
        return True


class AfterBackwardSync(EveryStepSync):
    """See the top of the file. One per rank; `axis` is the mesh axis along which the replicas lie, names: of the parameters that
    are averaged over it."""

    _buckets: Sequence[tuple[torch.Tensor, list[Piece]]] = ()
    _started: dict[int, "torch.futures.Future[torch.Tensor]"]
    """Exchanges of buckets that went out before the passes were over."""

    def __init__(
        self,
        config: EveryStep,
        axis: str,
        ledger: Ledger,
        exchange: Exchange | None = None,
        names: Container[str] = Everything(),
    ) -> None:
        super().__init__(config, axis, ledger, exchange)
        self.axis, self.names, self._started = axis, names, {}

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """What each bucket sends; nothing of it hides."""
        kept = tuple(one for one in workload.parameters if one.name in self.names)
        workload = replace(workload, parameters=kept)
        return [replace(transfer, window_flops=0.0) for transfer in super().traffic(workload, layout)]

    @contextmanager
    def attached(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[torch.nn.Module]:
        """Puts the gradients of `model` into buckets; the first replica's values go to the others if any differ. Collective."""
        group = mesh.get_group(self._axis)
        names = Names(model)
        with self._ledger.label("replica set-up"):
            held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            make_same({name: one for name, one in held.items() if name in self.names}, group)
            self._clock = clock_of(names.device)
            shapes = {name: shape for name, shape in names.shapes.items() if name in self.names}
            moments = moments_of(optimizer, names.trained)
            self._exchange.attach(group, self._axis, shapes, names.device, moments=moments)
        self._buckets = [filled(bucket, model) for bucket in self._assigned(model)]
        try:
            yield model
        finally:
            self._exchange.detach()
            self._buckets = ()

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Around forward and backward passes; at the end of the last the gradients are exchanged. Collective then."""
        yield
        self._ready_at = self._clock.now()
        if not last or self._rehearsing:
            return
        ends = len(self._buckets) - 1
        futures = [
            self._started[index]
            if index in self._started
            else self._exchange.start(buffer, pieces, self._label(index), last=index == ends)
            for index, (buffer, pieces) in enumerate(self._buckets)
        ]
        self._started.clear()
        self._exchange.settle()  # raises what has gone wrong
        for (buffer, _), future in zip(self._buckets, futures, strict=True):
            averaged = future.wait()
            if averaged.data_ptr() != buffer.data_ptr():
                buffer.copy_(averaged)

    def _label(self, index: int) -> str:
        return f"bucket {index}"

    def _assigned(self, model: torch.nn.Module) -> list[list[Parameter]]:
        listed = [one for one in described(model) if one.name in self.names]
        return assign_buckets(listed, self._config.bucket_bytes)
