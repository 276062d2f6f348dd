"""Gradients averaged in each optimizer step (data parallelism), once for several micro-batches if wished.

    g = 1/p sum over ranks of ( 1/k sum over the rank's micro-batches of grad loss )

where ranks have k micro-batches each, or k on average: then g is the mean over all of them too, whoever computed how many.
The gradients go out in buckets while the backward pass goes on (`buckets`). Underneath is DistributedDataParallel; the exchange
is our communication hook on it. It forms its buckets after the first backward pass, which would go out in one piece, and add up
in another order; so that a resumed run adds up as the uninterrupted one did, that pass is a rehearsal: it teaches the order and
exchanges nothing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from thinwire.collectives.clock import clock_of
from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import Exchange
from thinwire.compress.plain import PlainExchange
from thinwire.compress.precondition import Moments, moments_of, no_moments
from thinwire.config.run import EveryStep
from thinwire.layout import Layout
from thinwire.sync.base import Synchroniser
from thinwire.sync.buckets import Names, assign_buckets, exchange_bucket
from thinwire.sync.initial_values import same_everywhere
from thinwire.traffic import Transfer
from thinwire.workload import Workload


class EveryStepSync(Synchroniser):
    """See the top of the file. One per rank; `axis` is the mesh axis along which the replicas lie."""

    _group: dist.ProcessGroup

    def __init__(self, config: EveryStep, axis: str, ledger: Ledger, exchange: Exchange | None = None) -> None:
        super().__init__(config.accumulate)
        self._config, self._axis, self._ledger = config, axis, ledger
        self._exchange: Exchange = exchange or PlainExchange(ledger)
        self._replica: DistributedDataParallel | None = None
        self._names = Names(torch.nn.Module())
        self._moments: Moments = no_moments
        self._owed: dict[str, torch.Tensor] = {}
        """By an exchange that was given up, by name: part of the next gradient."""
        self._rehearsing = False
        self._ready: dict[str, int] = {}
        """By name: when its gradient is ready in the backward pass, as counted in the rehearsal."""

    @property
    def settled_after(self) -> int:
        return self._exchange.settled_after

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """What each bucket sends; it may hide under the part of the backward pass that still runs. Exact after the rehearsal: in
        which order gradients are ready depends on kernels, those of LSTMs on the dtype."""
        found = []
        parameters = sorted(workload.parameters, key=lambda one: self._ready.get(one.name, -1), reverse=True)
        for index, bucket in enumerate(assign_buckets(parameters, self._config.bucket_bytes)):
            window = workload.tokens_per_microbatch * workload.backward_flops_remaining(bucket[-1].name)
            for transfer in self._exchange.transfers(f"bucket {index}", bucket, self._axis, getattr(layout, self._axis)):
                found.append(replace(transfer, window_flops=window))
        return found

    @contextmanager
    def attached(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[torch.nn.Module]:
        """Wraps `model`; rank 0's values are sent to the others if any differ. Collective: every rank of the axis."""
        self._group = group = mesh.get_group(self._axis)
        with self._ledger.label("replica set-up"):
            self._replica = DistributedDataParallel(
                model,
                process_group=group,
                init_sync=not same_everywhere([*model.parameters(), *model.buffers()], group),
                bucket_cap_mb=self._config.bucket_bytes / 2**20 or None,
                gradient_as_bucket_view=True,
            )
            self._replica.broadcast_buffers = False  # which would travel in each forward pass; tasks settle theirs alike
            self._names = Names(model)
            self._clock = clock_of(self._names.device)
            self._moments = moments_of(optimizer, self._names.trained)
            self._attach(self._exchange)
        self._replica.register_comm_hook(self, _hook)
        try:
            yield self._replica
        finally:
            self._exchange.detach()
            self._replica = None

    def _attach(self, exchange: Exchange) -> None:
        names = self._names
        exchange.attach(self._group, self._axis, names.shapes, names.device, moments=self._moments)

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Around one forward and backward pass, and the forward pass after it, in which the buckets are formed. Collective."""
        trained = [one for one in self._replica.parameters() if one.requires_grad] if self._replica else []
        handles = [one.register_post_accumulate_grad_hook(self._note) for one in trained]
        self._rehearsing = True
        try:
            yield
        finally:
            self._rehearsing = False
            for handle in handles:
                handle.remove()

    def _note(self, parameter: torch.Tensor) -> None:
        self._ready.setdefault(self._names.of(parameter), len(self._ready))

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Only the last micro-batch of a step exchanges; the others add to the gradients."""
        assert self._replica is not None, "attached() comes first"
        with nullcontext() if last else self._replica.no_sync():
            yield

    def switch(self, exchange: Exchange | None, every: int) -> None:
        """See `Synchroniser`."""
        if exchange is not None:
            self._owed = self._exchange.residuals()
            self._exchange.detach()
            self._exchange = exchange
            with self._ledger.label("replica set-up"):
                self._attach(exchange)

    def state_dict(self) -> dict[str, Any]:
        """What the exchange carries from step to step; nothing without compression."""
        return self._exchange.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._exchange.load_state_dict(state)

    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """What all ranks of a run with another number of ranks carried. Before `attached`."""
        self._exchange.adopt(states)


def _hook(sync: EveryStepSync, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: called on each rank, in the same order, as soon as a bucket is full."""
    if bucket.is_last():
        sync._ready_at = sync._clock.now()
    if sync._rehearsing:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done
    for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True) if sync._owed else ():
        if (owed := sync._owed.pop(sync._names.of(parameter), None)) is not None:
            gradient.view(-1).add_(owed)
    return exchange_bucket(sync._exchange, sync._names, bucket)
