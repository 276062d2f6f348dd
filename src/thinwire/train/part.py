"""What one rank has of the model, and who runs its steps: the whole model, its part of each matrix, or stages of a pipeline.

module      all that this rank trains, under the names of the whole model: for the optimizer, the synchroniser and checkpoints
outline     what it computes and sends, by shapes

PyTorch's pipelining loads its compiler, so it is imported only where there are stages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from thinwire.collectives.ledger import Ledger
from thinwire.config.run import RunConfig, TrainSection
from thinwire.layout import Layout
from thinwire.parallel.apply import Asked, apply
from thinwire.parallel.balance import shares_tied
from thinwire.parallel.sharded import units_with_root
from thinwire.parallel.stage_shards import StageShards, evaluation_traffic
from thinwire.parallel.tensor_parts import Parts, local_workload
from thinwire.parallel.waits import Waits
from thinwire.plan.memory import recomputed_blocks
from thinwire.plan.pipeline import Stages
from thinwire.sync.base import Synchroniser
from thinwire.traffic import Transfer
from thinwire.train.outline import Outline, Seat, outline_of, outline_of_shards, slowest_rates
from thinwire.train.pace import Pacer
from thinwire.train.pipelined import Pace, PipelinedStepper
from thinwire.train.sharded_part import ShardedPart, ShardedStepper
from thinwire.train.shared_part import SharedPart, axis_of
from thinwire.train.step import Norm, Stepper, gradient_norm
from thinwire.train.task import LanguageModel, Task
from thinwire.units import show
from thinwire.workload import Workload

if TYPE_CHECKING:
    from thinwire.parallel.pipeline import Pipeline

Samples = Callable[[int, int], Sequence[int]]
"""Numbers of the samples of a step's micro-batch, of this replica."""
Precision = Callable[[], AbstractContextManager]
"""Entered around each forward pass, such as torch.autocast."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """See the top of the file. number: of the part, of `count` into which the model is cut; waits: of its passes, for ranks that
    compute with this one, or share its states."""

    module: nn.Module
    outline: Outline
    precision: Precision
    norm: Norm = gradient_norm
    waits: Waits = field(default_factory=Waits)
    number: int = 0
    count: int = 1
    sharded: ShardedPart | None = None
    stage_shards: StageShards | None = None
    pipeline: Pipeline | None = None
    samples: Samples | None = None
    """Where stages keep copies of activations."""

    @property
    def workload(self) -> Workload:
        """Of its parameters and their passes."""
        return self.outline.workload

    @property
    def stages(self) -> Stages | None:
        return self.outline.stages

    @property
    def shared(self) -> SharedPart | None:
        """Where ranks share matrices, sequences or experts."""
        return self.outline.shared

    @property
    def shards(self) -> Parts:
        """Of parameters that are split themselves."""
        rows = self.sharded.shards if self.sharded else self.stage_shards
        return rows.parts if rows else self.shared.parts if self.shared else {}

    def stepper(
        self, attached: nn.Module, optimizer: torch.optim.Optimizer, sync: Synchroniser, task: Task, train: TrainSection
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
        return PipelinedStepper(**usual_fields, pipeline=self.pipeline, shards=self.stage_shards, samples=self.samples)

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

    def close(self) -> None:
        """Ends the groups and threads that it has of its own. Collective over all ranks."""
        if self.sharded is not None:
            self.sharded.shards.compression.detach()

    def first_visits(self, task: Task, num_micro: int) -> str:
        """What a prediction leaves out where stages keep copies of activations: steps in which samples are new."""
        if self.samples is None or self.pipeline is None:
            return ""
        assert isinstance(task, LanguageModel), "no other has stages"
        cut, rank = self.pipeline.cut, self.pipeline.rank
        both = (cut.traffic(rank, num_micro, first=first) for first in (True, False))
        first, later = (show(sum(one.message_bytes * one.calls for one in sent), "B") for sent in both)
        return f"samples have come before; in each of the first {task.first_steps} steps {first} leave this rank, not {later}"

    def evaluation_traffic(self, task: Task, replica: int, train: TrainSection) -> list[Transfer]:
        """What an evaluation sends between ranks that compute together, or share states."""
        found = evaluation_traffic(self.outline.sent, train.eval_every) if self.stage_shards else []
        return found + [one for part in (self.shared, self.sharded) if part for one in part.evaluation_traffic(task, replica)]


@dataclass(frozen=True, kw_only=True)
class Place(Seat):
    """Of one rank that there is: its groups by axis, and what is entered around forward passes."""

    rank: int
    groups: Mapping[str, dist.ProcessGroup]
    ledger: Ledger
    precision: Precision = nullcontext

    def asked(self, config: RunConfig, **more: Any) -> Asked:
        """What `parallel.apply` is told. more: of its fields."""
        return Asked(
            layout=self.layout,
            groups=self.groups,
            ledger=self.ledger,
            config=config,
            rates=slowest_rates(self.layout, self.rates),
            precision=self.precision,
            **more,
        )


def take_part(task: Task, config: RunConfig, place: Place) -> Part:
    """Build the model on its device and keep what is this rank's. Collective over all ranks. UserError for a model that cannot be
    cut."""
    layout, model = place.layout, task.build_model().to(place.device)
    if task.shape is None:
        return _part_of_any(task, model, config, place)
    kinds = recomputed_blocks(config, task.shape, layout, casts=place.casts, on_device=place.device.type != "cpu")
    example = task.batch(0, 0)[0].to(place.device) if layout.pipe > 1 else None
    asked = place.asked(config, recompute=kinds, example=example, costs=task.workload.chain_flops_per_token)
    applied = apply(model, asked)
    split = shared = None
    at, norm, pipeline, stage_shards = layout.coordinates(place.rank), gradient_norm, applied.pipeline, applied.stage_shards
    number, count = at[axis_of(layout)], layout.tensor * layout.expert
    if layout.tensor * layout.seq * layout.expert > 1:
        split = SharedPart.of(applied, task.shape, config, asked, casts=place.casts)
        norm = split.norm
    if applied.shards is not None:
        computed = local_workload(task.workload, task.shape, layout.tensor, at["tensor"], layout.seq).recomputing(kinds)
        shared = ShardedPart.of(applied, computed, config, asked)
        norm = split.norm if split else shared.norm
    if stage_shards is not None:
        norm = partial(stage_shards.norm_of, norm=split.norm if split else None)
    if pipeline is not None and task.shape.tied:
        pipeline.tied.shares = shares_tied(config.compress, layout)
    for axis in ("shard", "pipe"):
        number, count = at[axis] * count + number, getattr(layout, axis) * count
    return Part(
        module=applied.module,
        outline=outline_of(config, task.shape, place, split),
        precision=place.precision,
        norm=norm,
        waits=applied.waits,
        number=number,
        count=count,
        sharded=shared,
        stage_shards=stage_shards,
        pipeline=pipeline,
        samples=_samples(task, config, layout, place.rank) if pipeline and pipeline.copies else None,
    )


def _samples(task: Task, config: RunConfig, layout: Layout, rank: int) -> Samples:
    """Of the micro-batches of a rank's replica."""
    assert isinstance(task, LanguageModel), "no other has stages"
    first = layout.replica(rank) * config.sync.accumulate
    return lambda step, micro: task.samples(step, first + micro)


def _part_of_any(task: Task, model: nn.Module, config: RunConfig, place: Place) -> Part:
    """As `take_part`, of a model that no axis cuts but `shard`."""
    layout = place.layout
    if layout.shard == 1:
        return Part(module=model, outline=Outline(workload=task.workload), precision=place.precision)
    units = units_with_root(model)
    whole = replace(task.workload, block_names=tuple(units))
    asked = place.asked(config, units=units)
    applied = apply(model, asked)
    shared = ShardedPart.of(applied, whole, config, asked, gathers=True)
    return Part(
        module=applied.module,
        outline=outline_of_shards(config, whole, place),
        precision=place.precision,
        norm=shared.norm,
        waits=applied.waits,
        number=layout.coordinates(place.rank)["shard"],
        count=layout.shard,
        sharded=shared,
    )
