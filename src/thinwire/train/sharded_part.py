"""What a rank shares with the others of the shard axis: the passes, the norm of the gradient, and what is sent for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.ledger import Ledger
from thinwire.config.run import RunConfig, TrainSection
from thinwire.config.sharded import ShardedSection
from thinwire.parallel import sharded
from thinwire.parallel.apply import Applied, Asked
from thinwire.parallel.sharded import LocalShards
from thinwire.parallel.tensor import gradient_norm
from thinwire.parallel.waits import Waits
from thinwire.sync.as_reduced import AsReducedSync
from thinwire.traffic import EVALUATION, Transfer
from thinwire.train.step import Named, Stepper, without_trace
from thinwire.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ShardedPart:
    """Of one rank. whole: the workload of all that it computes."""

    shards: LocalShards
    whole: Workload
    group: dist.ProcessGroup
    ledger: Ledger
    train: TrainSection
    options: ShardedSection
    waits: Waits
    gathers: bool = False
    """Whether evaluations gather the whole model at once: of a task whose passes may be as many as its texts want."""

    @classmethod
    def of(cls, applied: Applied, whole: Workload, config: RunConfig, asked: Asked, *, gathers: bool = False) -> "ShardedPart":
        """Of what `parallel.apply` has left of a model whose states are shared out."""
        assert applied.shards is not None, "layout.shard is used"
        return cls(
            shards=applied.shards,
            whole=whole,
            group=asked.groups["shard"],
            ledger=asked.ledger,
            train=config.train,
            options=config.sharded,
            waits=applied.waits,
            gathers=gathers,
        )

    def norm(self, named: Named) -> Tensor:
        """Of the gradient of the whole parameters. Collective."""
        return gradient_norm(_plain(named), (), self.group, self.ledger, self.group)

    def evaluation_traffic(self, task: Any, replica: int) -> list[Transfer]:
        """What one evaluation sends."""
        batches = 1 if self.gathers else self.evaluation_passes(task, replica)
        if not self.train.eval_every or not batches:
            return []
        sent = sharded.evaluation_traffic(self.whole, self.group.size(), self.options, batches)
        return [replace(one, every=self.train.eval_every) for one in sent]

    def evaluation_passes(self, task: Any, replica: int) -> int:
        """Of each rank of the group: as many as the one with most of the held-out part has."""
        degree = self.group.size()
        first = replica - replica % degree
        return max(sum(1 for _ in task.held_out(other)) for other in range(first, first + degree))


@dataclass(frozen=True, kw_only=True)
class ShardedStepper(Stepper):
    """`model` is the shards."""

    part: ShardedPart

    def rehearse(self, batch: object) -> None:
        """A pass in which FSDP2 is set up; gradients are reduced in none. From now on replicas average what is reduced."""
        averages = getattr(self.sync, "inner", self.sync)
        if isinstance(averages, AsReducedSync):
            self.part.shards.listener = averages.give
        with self.sync.rehearsal(), without_trace(self.model), self.waits.set_up():
            self.timed_pass(batch)
        self.optimizer.zero_grad(set_to_none=False)

    def timed_pass(self, batch: object) -> None:
        """As of any Stepper, of which nothing is left."""
        super().timed_pass(batch)
        self.part.shards.rest()

    @contextmanager
    def evaluated(self, model: nn.Module) -> Iterator[nn.Module]:
        """As of any Stepper. Collective over the shard axis."""
        if not self.part.gathers:
            yield model
            return
        with self.waits.labelled(EVALUATION), self.part.shards.gathered() as whole:
            yield whole

    def score(self, task: Any, model: nn.Module, replica: int) -> tuple[float, ...]:
        """Ranks that have a batch less than others make a pass more, which does not count. Collective over the shard axis."""
        if self.part.gathers:
            return super().score(task, model, replica)
        with self.waits.labelled(EVALUATION):
            found = super().score(task, model, replica)
            for _ in range(self.part.evaluation_passes(task, replica) - sum(1 for _ in task.held_out(replica))):
                with torch.no_grad():
                    task.loss(model, task.batch(0, replica))
        self.part.shards.rest()
        return found

    @contextmanager
    def _micro_batch(self, last: bool) -> Iterator[None]:
        with super()._micro_batch(last), self.part.shards.passes(last=last):
            yield


def _plain(named: Named) -> Iterator[tuple[str, nn.Parameter]]:
    """Without what DistributedDataParallel adds to names."""
    return ((name.removeprefix("module."), one) for name, one in named)
