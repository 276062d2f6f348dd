"""What one rank has of the model, and who runs its steps: the whole model, its part of each matrix, or stages of a pipeline.

module      all that this rank trains, under the names of the whole model: for the optimizer, the synchroniser and checkpoints
workload    of these parameters and their passes
stages      what a prediction needs to know of all ranks' stages

PyTorch's pipelining loads its compiler, so it is imported only where there are stages.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from thinwire.collectives.ledger import Ledger
from thinwire.config.run import RunConfig, TrainSection
from thinwire.layout import Layout
from thinwire.parallel import recompute
from thinwire.parallel.balance import shares_tied
from thinwire.parallel.cut import Cut, cut_model
from thinwire.parallel.tensor_parts import Parts, local_workload
from thinwire.parallel.waits import Waits
from thinwire.plan.memory import recomputed_blocks
from thinwire.plan.pipeline import Stages
from thinwire.sync.base import Synchroniser
from thinwire.traffic import Transfer
from thinwire.train.expert_part import ExpertPart
from thinwire.train.pace import Pacer
from thinwire.train.pipelined import Pace, PipelinedStepper
from thinwire.train.sharded_part import ShardedPart, ShardedStepper
from thinwire.train.shared_part import SharedPart
from thinwire.train.step import Norm, Stepper, gradient_norm
from thinwire.train.task import LanguageModel
from thinwire.workload import Workload

if TYPE_CHECKING:
    from thinwire.parallel.pipeline import Pipeline
    from thinwire.parallel.stage_shards import StageShards

Alike = TypeVar("Alike")
Precision = Callable[[], AbstractContextManager]
"""Entered around each forward pass, such as torch.autocast."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """See the top of the file. number: of the part, of `count` into which the model is cut. shared: where ranks share matrices or
    sequences; experts: where they share those. tensor_flops: as in `Setting`."""

    module: nn.Module
    workload: Workload
    precision: Precision
    norm: Norm = gradient_norm
    number: int = 0
    count: int = 1
    shared: SharedPart | None = None
    experts: ExpertPart | None = None
    sharded: ShardedPart | None = None
    stage_shards: StageShards | None = None
    pipeline: Pipeline | None = None
    stages: Stages | None = None
    tensor_flops: tuple[float, ...] = ()

    @property
    def waits(self) -> Waits:
        """Of its passes, for ranks that compute with this one, or share its states."""
        if self.experts is not None:
            return self.experts.waits
        split = self.shared or self.sharded
        return Waits() if split is None else split.waits

    @property
    def shards(self) -> Parts:
        """Of parameters that are split themselves."""
        if self.shared is not None:
            return self.shared.parts
        rows = self.sharded.shards if self.sharded else self.stage_shards
        return {} if rows is None else rows.parts

    def stepper(
        self, attached: nn.Module, optimizer: torch.optim.Optimizer, sync: Synchroniser, task: LanguageModel, train: TrainSection
    ) -> Stepper:
        """attached: `module`, as the synchroniser has it."""
        usual = Stepper(
            model=attached,
            optimizer=optimizer,
            sync=sync,
            loss=task.loss,
            precision=self.precision,
            train=train,
            norm=self.norm,
            waits=self.waits,
        )
        usual_fields = {one.name: getattr(usual, one.name) for one in fields(usual)}
        if self.sharded is not None:
            return ShardedStepper(**usual_fields, part=self.sharded)
        if self.pipeline is None:
            return usual
        return PipelinedStepper(**usual_fields, pipeline=self.pipeline, shards=self.stage_shards)

    def pacer(self, flops_per_s: float) -> Pacer | Pace:
        """Of a device that achieves `flops_per_s` in training; see `paced`."""
        if self.shared is not None:
            self.shared.pace(flops_per_s)
        if self.stages is None:
            return Pacer.of(self.workload, flops_per_s, self.waits)
        forward_s = {stage: flops / flops_per_s for stage, flops in enumerate(self.stages.forward_flops)}
        return Pace(
            forward_s, {stage: forward_s[stage] * again for stage, again in enumerate(self.stages.recomputed)}, self.waits
        )

    def paced(self, pacer: Pacer | Pace) -> AbstractContextManager[None]:
        """Inside, this rank computes at that rate."""
        if isinstance(pacer, Pacer) and self.sharded is not None:
            return pacer.attached(self.sharded.shards.model, self.sharded.whole)
        if isinstance(pacer, Pacer):
            return pacer.attached(self.module, self.workload)
        assert self.pipeline is not None, "only stages have such a pace"
        return pacer.attached(self.pipeline)

    def traffic(self, num_micro: int, train: TrainSection) -> list[Transfer]:
        """What is sent within one replica in a step, or between those that share states."""
        found = [] if self.pipeline is None else self.pipeline.traffic(num_micro)
        if self.shared is not None:
            counted = self.module.named_parameters() if self.pipeline is None else self.pipeline.counted()
            found += self.shared.traffic(num_micro, counted)
        if self.experts is not None:
            found += self.experts.traffic(num_micro)
        if self.sharded is not None:
            found += self.sharded.traffic(num_micro)
        if self.stage_shards is not None:
            found += self.stage_shards.traffic(clips=train.clip > 0)
        return found

    def close(self) -> None:
        """Ends the groups and threads that it has of its own. Collective over all ranks."""
        if self.sharded is not None:
            self.sharded.shards.compression.detach()

    def evaluation_traffic(self, task: LanguageModel, replica: int, train: TrainSection) -> list[Transfer]:
        """What an evaluation sends between ranks that compute together, or share states."""
        if self.experts is not None:
            return self.experts.evaluation_traffic(sum(1 for _ in task.held_out(replica)))
        if self.stage_shards is not None:
            return self.stage_shards.evaluation_traffic(train.eval_every)
        split = self.shared or self.sharded
        return [] if split is None else split.evaluation_traffic(task, replica)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Of one rank: its groups by axis, its device, and what is entered around forward passes; casts: whether that is autocast to
    bfloat16. rates: flops_per_s by global rank where they are declared, so that slower ranks get fewer layers."""

    layout: Layout
    groups: Mapping[str, dist.ProcessGroup]
    ledger: Ledger
    device: torch.device
    precision: Precision = nullcontext
    casts: bool = False
    rates: Sequence[float] | None = None


def take_part(task: LanguageModel, config: RunConfig, place: Place) -> Part:
    """Build the model on its device and keep what is this rank's. Collective over all ranks. UserError for a model that cannot be
    cut."""
    layout, ledger, model = place.layout, place.ledger, task.build_model().to(place.device)
    split, row = None, 0
    if layout.tensor * layout.seq > 1:
        split = SharedPart.split(model, config, layout, place.groups, ledger, casts=place.casts)
        row = split.group.rank()
    kinds = recomputed_blocks(config, task.shape, layout, casts=place.casts, on_device=place.device.type != "cpu")
    recompute.apply(model, kinds)
    if split is not None:
        split = replace(split, recomputed=[int(name.split(".")[1]) + 1 for name, kind in kinds.items() if kind == "full"])
    workloads = [
        local_workload(task.workload, task.shape, layout.tensor, one, layout.seq).recomputing(kinds)
        for one in range(layout.tensor)
    ]
    workload = workloads[row]
    norm = gradient_norm if split is None else split.norm
    if layout.expert > 1:
        experts = ExpertPart.split(model, config, place.groups["expert"], ledger, casts=place.casts)
        row = experts.group.rank()
        return Part(
            module=model,
            workload=workload.of_expert_rank(task.shape.experts, layout.expert, row),
            precision=place.precision,
            norm=experts.norm,
            number=row,
            count=layout.expert,
            experts=experts,
        )
    if layout.shard > 1 and layout.pipe == 1:
        shared = ShardedPart.split(model, config, place.groups["shard"], ledger, workload)
        return Part(
            module=shared.shards,
            workload=shared.shards.workload(workload),
            precision=place.precision,
            norm=shared.norm,
            number=shared.group.rank(),
            count=layout.shard,
            sharded=shared,
        )
    if layout.pipe == 1:
        return Part(
            module=model,
            workload=workload,
            precision=place.precision,
            norm=norm,
            number=row,
            count=layout.tensor,
            shared=split,
            tensor_flops=unless_alike(one.flops_per_microbatch for one in workloads),
        )
    from thinwire.parallel.pipeline import Pipeline

    example, _ = task.batch(0, 0)
    slowest = slowest_rates(layout, place.rates)
    cut = cut_model(model, example.to(place.device), config.pipeline, layout.pipe, task.workload.chain_flops_per_token, slowest)
    if split is not None:
        split = split.in_stages(cut, place.groups["pipe"].rank())
        cut = split.cut or cut
    pipeline = Pipeline(model, cut, place.groups["pipe"], ledger, model.loss, place.precision)
    if task.shape.tied:
        pipeline.shares_tied = shares_tied(config.compress, layout)
    own = stage_workload(workload, cut, pipeline).recomputing(kinds)
    stage_shards, of_stage = None, 0
    if layout.shard > 1:
        from thinwire.parallel.stage_shards import StageShards

        stage_shards = StageShards(pipeline.owner, place.groups["shard"], ledger)
        norm, of_stage, own = stage_shards.norm_of, stage_shards.group.rank(), stage_shards.workload(own)
    return Part(
        module=stage_shards or pipeline.owner,
        workload=own,
        precision=place.precision,
        norm=norm,
        number=(pipeline.rank * layout.tensor + row) * layout.shard + of_stage,
        count=layout.pipe * layout.tensor * layout.shard,
        shared=split,
        stage_shards=stage_shards,
        pipeline=pipeline,
        stages=all_stages(workloads, row, cut, config.sync.accumulate, split),
    )


def slowest_rates(layout: Layout, rates: Sequence[float] | None) -> list[float] | None:
    """Of the ranks at each position of a pipeline; rates: by global rank."""
    if rates is None:
        return None
    return [min(rates[group[position]] for group in layout.groups("pipe")) for position in range(layout.pipe)]


def unless_alike(of_ranks: Iterable[Alike]) -> tuple[Alike, ...]:
    """Nothing where all are."""
    found = tuple(of_ranks)
    return found if len(set(found)) > 1 else ()


def all_stages(workloads: Sequence[Workload], row: int, cut: Cut, num_micro: int, split: SharedPart | None = None) -> Stages:
    """For predictions. workloads: of each tensor rank's part of all matrices, of which this rank is number `row`."""
    return replace(
        stages_of(workloads[row], cut, num_micro, split), tensor_flops=unless_alike(stage_flops(one, cut) for one in workloads)
    )


def stages_of(workload: Workload, cut: Cut, num_micro: int, split: SharedPart | None = None) -> Stages:
    """For predictions. workload: of the whole model, or of this rank's part of all its matrices, as `split` says."""
    from thinwire.parallel.schedules import orders

    options, costs, again = cut.options, workload.chain_flops_per_token, workload.chain_recomputed_per_token
    boundaries = range(len(cut.stages) - 1)
    return Stages(
        orders=orders(options.schedule, cut.ranks, options.per_rank, num_micro),
        forward_flops=stage_flops(workload, cut),
        recomputed=[sum(again[unit] for unit in units) / (sum(costs[unit] for unit in units) or 1.0) for units in cut.stages],
        activation_bytes=[cut.message_bytes("activations", boundary) for boundary in boundaries],
        gradient_bytes=[cut.message_bytes("gradients", boundary) for boundary in boundaries],
        in_passes={} if split is None else split.pass_traffic(),
    )


def stage_flops(workload: Workload, cut: Cut) -> tuple[float, ...]:
    """Forward, of one micro-batch, of each stage of `workload`."""
    costs = workload.chain_flops_per_token
    return tuple(workload.tokens_per_microbatch * sum(costs[unit] for unit in units) for units in cut.stages)


def stage_workload(workload: Workload, cut: Cut, pipeline: Pipeline) -> Workload:
    """Of this rank's stages. workload: of the whole model, or of this rank's part of all its matrices."""
    return part_workload(workload, cut, {name for name, _ in pipeline.owner.named_parameters()}, pipeline.rank)


def part_workload(workload: Workload, cut: Cut, names: Collection[str], rank: int) -> Workload:
    """The same of rank `rank` of a pipeline, which has the parameters of these names."""
    costs = workload.chain_flops_per_token
    return workload.part(names, sum(costs[unit] for stage in cut.stages_of(rank) for unit in cut.stages[stage]))
