"""The contract of a synchroniser: how the replicas along one mesh axis are kept together.

A synchroniser owns both ends of its bargain: what it will send (`traffic`, before training) and the hooks that send it.
The training loop is the same for all:

    with sync.attached(model, optimizer, mesh):
        for step in range(first, last):
            for index, batch in enumerate(batches):
                with sync.microbatch(last=index == num_micro - 1):
                    forward_backward(batch)
            clip(); optimizer.step(); sync.after_step(step)
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from thinwire.collectives.clock import HostClock
from thinwire.collectives.ledger import Clock
from thinwire.compress.exchange import Exchange
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.traffic import Transfer
from thinwire.workload import Workload


class Synchroniser(ABC):
    """Every rank of the axis makes one and calls it at the same places. What is not abstract suits replicas that never differ."""

    replicas_differ = False
    """Between exchanges: each replica's own parameters and optimizer state then belong into the checkpoint."""

    def __init__(self, num_micro: int = 1) -> None:
        self.num_micro = num_micro
        """Micro-batches of a step: the mean over the ranks, by which gradients are divided."""
        self._clock: Clock = HostClock()
        """Of the device of the parameters, from `attached` on."""
        self._ready_at: Any = None

    @property
    def ready_at(self) -> Any:
        """The moment of that clock when the last gradient of this rank was ready; what follows it in backward is waiting. None
        before the first."""
        return self._ready_at

    @property
    def settled_after(self) -> int:
        """Steps after which it sends what `traffic` says."""
        return 0

    @abstractmethod
    def traffic(self, workload: Workload, layout: Layout) -> list[Transfer]:
        """What will be sent, in the order in which it becomes ready. No communication."""

    @abstractmethod
    def attached(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mesh: DeviceMesh
    ) -> AbstractContextManager[torch.nn.Module]:
        """Hooks on, at the end hooks off. Gives the module to run forward with. Collective."""

    def rehearsal(self) -> AbstractContextManager[None]:
        """Around one forward and backward pass before training, whose gradients are thrown away: nothing is exchanged."""
        return nullcontext()

    @abstractmethod
    def microbatch(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one micro-batch; `last`: gradients are complete after this one."""

    def after_step(self, step: int) -> None:  # noqa: B027 (nothing is what most do)
        """After the optimizer step. Collective."""

    def switch(self, exchange: Exchange | None, every: int) -> None:
        """From the next step on through another exchange (None: the same one), every so many steps if rarely; what the old one
        owes goes along with what is sent next. While attached, between steps. Collective. UserError where that cannot be."""
        raise UserError(f"{type(self).__name__} cannot change while it trains; leave train.replan out")

    def finish(self) -> None:  # noqa: B027
        """After the last step of training: nothing stays unsent. Collective."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model holds the parameters that count, which are the same on all replicas. Local."""
        return nullcontext()

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs of this rank's synchroniser."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """This rank's own state. Before `attached`."""

    @abstractmethod
    def adopt(self, states: Sequence[dict[str, Any]]) -> None:
        """Instead of load_state_dict: the states of all replicas of a run with another number of ranks, or with other parts of
        the model on them (`joined`). Before `attached`."""
