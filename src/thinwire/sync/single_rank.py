"""A replica of one rank: nothing to exchange inside."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh

from thinwire.compress.memory import Stateless
from thinwire.layout import Layout
from thinwire.sync.base import Synchroniser
from thinwire.traffic import Transfer
from thinwire.workload import Workload


class SingleRank(Stateless, Synchroniser):
    """The synchroniser that does nothing."""

    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        return []

    @contextmanager
    def attached(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh) -> Iterator[torch.nn.Module]:
        yield model

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Gradients are ready when the backward pass is over."""
        yield
        self._ready_at = time.perf_counter()
