"""What a rank shares with the others of the shard axis: the passes, the norm of the gradient, and what is sent for them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.clock import clock_of
from thinwire.collectives.ledger import Ledger
from thinwire.config.run import RunConfig, TrainSection
from thinwire.parallel import sharded
from thinwire.parallel.sharded import LocalShards
from thinwire.parallel.tensor import gradient_norm, norm_transfers
from thinwire.parallel.waits import Waits
from thinwire.plan.sharded import ShardedPasses
from thinwire.traffic import EVALUATION, Transfer
from thinwire.train.step import Named, Stepper, without_trace
from thinwire.workload import Workload


@dataclass(frozen=True, kw_only=True)
class ShardedPart:
    """Of one rank. whole: the workload of the whole model, which it computes."""

    shards: LocalShards
    whole: Workload
    group: dist.ProcessGroup
    ledger: Ledger
    train: TrainSection
    waits: Waits

    @classmethod
    def split(
        cls, model: nn.Module, config: RunConfig, group: dist.ProcessGroup, ledger: Ledger, workload: Workload
    ) -> "ShardedPart":
        """Of `model`, which is whole and on its device; of its states this rank's part is left. Collective over all ranks."""
        waits = Waits(clock_of(next(model.parameters()).device))
        shards = sharded.apply(model, group, ledger, config.sharded)
        shards.compression.observe(waits)
        return cls(shards=shards, whole=workload, group=group, ledger=ledger, train=config.train, waits=waits)

    @property
    def passes(self) -> ShardedPasses:
        """For predictions."""
        _, *blocks, head = (self.whole.tokens_per_microbatch * flops for flops in self.whole.chain_flops_per_token)
        sent = self.shards.compression.transfers()
        return ShardedPasses(
            weights=[one for one in sent if one.op == "all_gather"],
            gradients=[one for one in sent if one.op == "all_to_all"],
            head_flops=head,
            block_flops=blocks,
            reshards=self.shards.reshards,
        )

    def norm(self, named: Named) -> Tensor:
        """Of the gradient of the whole parameters. Collective."""
        return gradient_norm(_plain(named), self.shards.parts, self.group, self.ledger)

    def traffic(self, num_micro: int) -> list[Transfer]:
        """What this rank sends in a step."""
        found = sharded.traffic(self.shards, num_micro)
        return found + (norm_transfers("shard", self.shards.locals[0].dtype) if self.train.clip else [])

    def evaluation_traffic(self, task: Any, replica: int) -> list[Transfer]:
        """What one evaluation sends."""
        batches = self.evaluation_passes(task, replica)
        if not self.train.eval_every or not batches:
            return []
        return [replace(one, every=self.train.eval_every) for one in sharded.evaluation_traffic(self.shards, batches)]

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
        """A pass in which FSDP2 is set up; gradients are reduced in none."""
        with self.sync.rehearsal(), without_trace(self.model), self.waits.set_up():
            self.timed_pass(batch)
        self.optimizer.zero_grad(set_to_none=False)

    def timed_pass(self, batch: object) -> None:
        """As of any Stepper, of which nothing is left."""
        super().timed_pass(batch)
        self.part.shards.rest()

    def score(self, task: Any, model: nn.Module, replica: int) -> tuple[float, float]:
        """Ranks that have a batch less than others make a pass more, which does not count. Collective over the shard axis."""
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
