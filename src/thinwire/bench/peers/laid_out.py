"""A model in any layout on the ranks of a benchmark: its part, synchroniser and stepper, put together as in `train.worker`.

Ranks may stand on the axes in any order, and the groups be gloo's own, for what stock PyTorch does with them.
"""

from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import Schedule1F1B

from thinwire.layout import AXES
from thinwire.sync.make import make_synchroniser
from thinwire.train.optimizers import make_optimizer
from thinwire.train.part import Place, take_part


class LaidOut:
    """Of one rank, until `close`. order: the ranks, in that of the layout; stock: gloo's own groups, and PyTorch's own 1F1B."""

    def __init__(self, config, layout, ledger, task, order=None, stock=False):
        """Collective."""
        self.config, self.layout, self.task = config, layout, task
        self.order = list(order or range(layout.world_size))
        self.number = self.order.index(dist.get_rank())
        self.replica = layout.replica(self.number)
        degrees, backends = layout.of_gradients.degrees, (("gloo" if stock else None, None),) * len(AXES)
        mesh = DeviceMesh("cpu", torch.tensor(self.order).view(degrees), mesh_dim_names=AXES, backend_override=backends)
        groups = {axis: mesh.get_group(axis) for axis in AXES}
        if layout.seq > 1:
            rings = [[self.order[one] for one in group] for group in layout.groups("seq")]
            groups["seq"], _ = dist.new_subgroups_by_enumeration(rings)
        self.part = take_part(task, config, Place(layout=layout, rank=dist.get_rank(), groups=groups, ledger=ledger))
        if stock:
            pipeline, count = self.part.pipeline, config.sync.accumulate
            pipeline.use(Schedule1F1B(pipeline.stages[0], count, loss_fn=pipeline.scaled_loss, scale_grads=False), count)
        self.sync = make_synchroniser(config.sync, config.compress, layout.of_gradients, ledger)
        optimizer = make_optimizer(self.part.module, config.train)
        self._stack = ExitStack()
        self._stack.callback(self.part.close)
        attached = self._stack.enter_context(self.sync.attached(self.part.module, optimizer, mesh))
        self.stepper = self.part.stepper(attached, optimizer, self.sync, task, config.train)
        self.stepper.rehearse(task.batch(0, self.replica))

    def step(self, number):
        """This rank's part of the loss. Collective."""
        count = self.config.sync.accumulate
        batches = [self.task.batch(number, self.replica * count + index) for index in range(count)]
        return self.stepper.run(number, batches, count).loss

    def traffic(self):
        """What a step sends."""
        return [*self.part.outline.sent, *self.sync.traffic(self.part.workload, self.layout.of_gradients)]

    def close(self):
        """Collective."""
        self._stack.close()
