"""DistributedDataParallel and its hooks behind the Synchroniser's contract, so that one loop trains peers and ours.

    ""          no hook: float32, averaged by all-reduce
    "fp16"      cast to float16 for the wire
    "powersgd"  low rank with error feedback and warm start (Vogels et al. 2019)
    "silent"    every pass under no_sync: what a step takes where nothing is exchanged

The ledger counts what is sent where the group is metered. PyTorch's broadcast of the first weights is left out: on a slow link it
takes as long as a step, replicas begin from the same seed, and the bench compares their digests.

The rehearsal exchanges one gradient and throws it away, where ours exchanges none: PyTorch forms its buckets anew after its first
exchange. What its PowerSGD remembers of this one is thrown away too, because it belongs to the first buckets. So all methods
begin training with their first compressed step.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from thinwire.sync.single_rank import SingleRank

ONE_BUCKET_MIB = 1000.0
"""With more than one bucket PyTorch's PowerSGD hangs on gloo: all-reduces of two buckets are issued by two threads."""
FIRST_COMPRESSED = 2
"""The earliest that torch allows with error feedback, so that the first buckets are not seen; here the rehearsal sees them."""
SILENT = "silent"


class StockSync(SingleRank):
    """One per rank; see thinwire.sync.base.Synchroniser. group: whose backend does the exchange."""

    def __init__(self, hook: str, rank: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self._hook, self._rank, self._group = hook, rank, group
        self._replica: DistributedDataParallel | None = None
        self._powersgd: powerSGD_hook.PowerSGDState | None = None

    @contextmanager
    def attached(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[torch.nn.Module]:
        """Wraps `model`. Collective."""
        self._replica = DistributedDataParallel(
            model,
            process_group=self._group,
            init_sync=False,
            bucket_cap_mb=ONE_BUCKET_MIB if self._hook == "powersgd" else None,
            gradient_as_bucket_view=True,
        )
        if self._hook == "fp16":
            self._replica.register_comm_hook(self._group, default_hooks.fp16_compress_hook)
        elif self._hook == "powersgd":
            state = powerSGD_hook.PowerSGDState(self._group, self._rank, start_powerSGD_iter=FIRST_COMPRESSED)
            state.iter, self._powersgd = FIRST_COMPRESSED, state
            self._replica.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        try:
            yield self._replica
        finally:
            self._replica = None

    @contextmanager
    def rehearsal(self) -> Iterator[None]:
        """See the top of the file. Collective unless silent."""
        assert self._replica is not None, "attached() comes first"
        passes = count()

        def exchange_first(replica: DistributedDataParallel, _: object) -> None:
            replica.require_backward_grad_sync = next(passes) == 0 and self._hook != SILENT

        handle = self._replica.register_forward_pre_hook(exchange_first)
        try:
            yield
        finally:
            handle.remove()
            self._replica.require_backward_grad_sync = True
        if self._powersgd:
            for memory in (self._powersgd.error_dict, self._powersgd.p_memory_dict, self._powersgd.q_memory_dict):
                memory.clear()

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Only the last micro-batch of a step exchanges."""
        assert self._replica is not None, "attached() comes first"
        with nullcontext() if last and self._hook != SILENT else self._replica.no_sync():
            yield
