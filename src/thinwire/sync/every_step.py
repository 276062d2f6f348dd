"""Gradients averaged in each optimizer step (data parallelism), once for several micro-batches if wished.

    g = 1/p sum over ranks of ( 1/k sum over k micro-batches of grad loss )

The gradients go out in buckets while the backward pass goes on (Li et al. 2020, PyTorch Distributed, VLDB, section 4.2):
parameters are taken in reverse order of registration, and a bucket is closed when it holds `bucket_bytes` or more. Each bucket
is divided by p and all-reduced. Underneath is DistributedDataParallel; the exchange is our communication hook on it. It forms its
buckets after the first backward pass, which would go out in one piece, and add up in another order; so that a resumed run adds
up as the uninterrupted one did, that pass is a rehearsal: it teaches the order and exchanges nothing.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.seam import all_reduce
from thinwire.config.run import EveryStep
from thinwire.layout import Layout
from thinwire.traffic import Transfer
from thinwire.workload import Parameter, Workload

GRADIENT_BYTES = 4
"""Weights, gradients and their exchange are float32."""


PYTORCH_BUCKETS = (2**20, 25 * 2**20)
"""Sizes of the first and of the other buckets where none is asked for."""


def assign_buckets(parameters: Sequence[Parameter], bucket_bytes: int) -> list[list[Parameter]]:
    """The buckets in the order in which they are sent, as DistributedDataParallel forms them. 0: its own sizes."""
    first, others = (bucket_bytes, bucket_bytes) if bucket_bytes else PYTORCH_BUCKETS
    buckets: list[list[Parameter]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        buckets[-1].append(parameter)
        size += parameter.numel * GRADIENT_BYTES
        if size >= (first if len(buckets) == 1 else others):
            buckets.append([])
            size = 0
    return [bucket for bucket in buckets if bucket]


class EveryStepSync:
    """See the top of the file. One per rank; `axis` is the mesh axis along which the replicas lie."""

    def __init__(self, config: EveryStep, axis: str, ledger: Ledger) -> None:
        self.ready_at = 0.0
        self._config, self._axis, self._ledger = config, axis, ledger
        self._replica: DistributedDataParallel | None = None
        self._group: dist.ProcessGroup | None = None
        self._rehearsing = False

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """One all-reduce a bucket; it may hide under the part of the backward pass that still runs."""
        tokens = workload.tokens_per_microbatch
        return [
            Transfer(
                label=f"bucket {index}",
                axis=self._axis,
                op="all_reduce",
                message_bytes=sum(parameter.numel for parameter in bucket) * GRADIENT_BYTES,
                window_flops=tokens * workload.backward_flops_remaining(bucket[-1].name),
            )
            for index, bucket in enumerate(assign_buckets(workload.parameters, self._config.bucket_bytes))
        ]

    @contextmanager
    def attached(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[torch.nn.Module]:
        """Wraps `model`. Collective: every rank of the axis."""
        self._group = mesh.get_group(self._axis)
        with self._ledger.label("replica set-up"):
            self._replica = DistributedDataParallel(
                model,
                process_group=self._group,
                bucket_cap_mb=self._config.bucket_bytes / 2**20 or None,
                gradient_as_bucket_view=True,
            )
        self._replica.register_comm_hook(self, _average)
        try:
            yield self._replica
        finally:
            self._replica = None

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Around one forward and backward pass, and the forward pass after it, in which the buckets are formed. Collective."""
        self._rehearsing = True
        try:
            yield
        finally:
            self._rehearsing = False

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Only the last micro-batch of a step exchanges; the others add to the gradients."""
        assert self._replica is not None, "attached() comes first"
        if last:
            yield
        else:
            with self._replica.no_sync():
                yield

    def after_step(self, step: int) -> None:
        """Nothing: replicas are equal after each step."""

    def state_dict(self) -> dict[str, Any]:
        """Empty: nothing is carried from step to step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


def _average(sync: EveryStepSync, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The communication hook: called on each rank, in the same order, as soon as a bucket is full."""
    sync.ready_at = time.perf_counter()
    group = sync._group
    assert group is not None
    if sync._rehearsing:
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done
    buffer = bucket.buffer().div_(group.size())
    work = all_reduce(buffer, group, sync._ledger, f"bucket {bucket.index()}")
    return work.get_future().then(_first_tensor)


def _first_tensor(future: torch.futures.Future[Any]) -> torch.Tensor:
    return future.value()[0]
