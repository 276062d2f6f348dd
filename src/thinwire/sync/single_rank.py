"""A replica of one rank: nothing to exchange inside."""

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.distributed.device_mesh import DeviceMesh

from thinwire.compress.memory import Stateless
from thinwire.layout import Layout
from thinwire.traffic import Transfer
from thinwire.workload import Workload


class SingleRank(Stateless):
    """The synchroniser that does nothing; see `thinwire.sync.base.Synchroniser`."""

    replicas_differ = False
    settled_after = 0

    def __init__(self, num_micro: int = 1) -> None:
        self.ready_at = 0.0
        self.num_micro = num_micro

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """None."""
        return []

    @contextmanager
    def attached(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[torch.nn.Module]:
        """The model itself."""
        yield model

    def rehearsal(self) -> AbstractContextManager[None]:
        """Nothing to learn."""
        return nullcontext()

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Gradients are ready when the backward pass is over."""
        yield
        self.ready_at = time.perf_counter()

    def after_step(self, step: int) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing."""

    def averaged(self) -> AbstractContextManager[None]:
        """The model as it is."""
        return nullcontext()
