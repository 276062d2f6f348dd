"""A replica of one rank: nothing to exchange inside."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import DeviceMesh

from thinwire.collectives.clock import clock_of
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
        self._clock = clock_of(next(model.parameters()).device)
        yield model

    @contextmanager
    def microbatch(self, last: bool) -> Iterator[None]:
        """Gradients are ready when the backward pass is over."""
        yield
        self._ready_at = self._clock.now()
