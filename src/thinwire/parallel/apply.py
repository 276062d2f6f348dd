"""All axes of a layout applied to a model, from outside, in the one order in which they go together:

    tensor      this rank's part of every matrix                 whoever comes later sees parameters of that size
    sequence    this rank's tokens of every sequence             the loss behind it may be the tensor ranks'
    recompute   what a block's backward pass computes again      with the sums and messages inside
    experts     this rank's experts of every block
    shard       this rank's rows of what is left                 or, of a pipeline's stages, of the optimizer's state alone
    pipeline    this rank's stages of what is left

What is averaged over replicas comes behind it (`sync`), on the module that a rank trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.clock import clock_of
from thinwire.collectives.ledger import Ledger
from thinwire.compress.base import Codec, make_codec
from thinwire.config.compress import read_coding
from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.models.transformer import Transformer
from thinwire.parallel import experts, plans, recompute, sequence, sharded, tensor
from thinwire.parallel.cut import cut_model
from thinwire.parallel.sequence_attention import Ring
from thinwire.parallel.sharded import LocalShards
from thinwire.parallel.tensor_boundary import split_boundaries
from thinwire.parallel.tensor_parts import Parts
from thinwire.parallel.waits import Waits
from thinwire.traffic import Transfer

if TYPE_CHECKING:
    from thinwire.parallel.pipeline import Pipeline
    from thinwire.parallel.stage_shards import StageShards


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How a model is to be shared out. groups: of this rank, by axis; config: its [tensor], [experts], [sharded] and [pipeline]
    count; recompute: kinds by the name of a module, as for `recompute.apply`; units: names of the modules that shards gather at
    once, as for `sharded.apply`; keeps: as for `sequence.apply`.

    For pipelines: example, the input of one micro-batch; loss(output, target), None: the model's own; costs of each unit and
    rates of each rank of a pipeline, as for `cut_model`; precision: entered around forward passes.
    """

    layout: Layout
    groups: Mapping[str, dist.ProcessGroup]
    ledger: Ledger
    config: RunConfig
    recompute: Mapping[str, str] = field(default_factory=dict)
    units: Sequence[str] | None = None
    keeps: bool = True
    example: Tensor | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    costs: Sequence[float] | None = None
    rates: Sequence[float] | None = None
    precision: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What a rank has. module: all that it trains, under the names of the whole model; parts: of matrices that tensor ranks
    share; waits: when passes stood still for other ranks; by_unit: of a model of transformers, what a micro-batch sends over the
    tensor axis for each unit of its chain."""

    module: nn.Module
    parts: Parts
    waits: Waits
    ring: Ring | None = None
    by_unit: Sequence[Sequence[Transfer]] = ()
    shards: LocalShards | None = None
    pipeline: Pipeline | None = None
    stage_shards: StageShards | None = None


def apply(model: nn.Module, asked: Asked) -> Applied:
    """Leave in `model`, which is whole, the same on all ranks and on its device, what is this rank's. Collective over all ranks.

    Replicas are not brought together here. UserError for a model that an axis of the layout cannot take.
    """
    layout, groups, ledger, config = asked.layout, asked.groups, asked.ledger, asked.config
    waits = Waits(clock_of(next(model.parameters()).device))
    parts: Parts = {}
    ring = None
    by_unit: list[list[Transfer]] = []
    sums: plans.Planned | None = None
    if layout.tensor > 1:
        call = groups["tensor"], ledger, codec_of(config.tensor.sums), waits
        if isinstance(model, Transformer):
            parts = tensor.apply(model, *call)
        else:
            parts, sums = plans.apply(model, *call, own_loss=asked.loss is not None)
    if layout.seq > 1:
        ring = sequence.apply(model, groups["seq"], ledger, keeps=asked.keeps, waits=waits)
    recompute.apply(model, asked.recompute)
    if sums is not None:
        assert asked.example is not None, "sizes of what is sent follow from it"
        by_unit = plans.traffic_by_unit(model, plans.planned_chain(model), sums, asked.example, asked.recompute)
    if layout.expert > 1:
        experts.apply(model, groups["expert"], ledger, codec_of(config.experts.slots), waits)
    if layout.pipe > 1:
        pipeline, shards = _pipeline(model, asked, waits), None
        if layout.shard > 1:
            from thinwire.parallel.stage_shards import StageShards

            shards = StageShards(pipeline.owner, groups["shard"], ledger, parts)
        module = shards or pipeline.owner
        return Applied(
            module=module, parts=parts, waits=waits, ring=ring, by_unit=by_unit, pipeline=pipeline, stage_shards=shards
        )
    if layout.shard > 1:
        local = sharded.apply(model, groups["shard"], ledger, config.sharded, asked.units, parts)
        local.compression.observe(waits)
        return Applied(module=local, parts=parts, waits=waits, ring=ring, shards=local)
    return Applied(module=model, parts=parts, waits=waits, ring=ring, by_unit=by_unit)


def codec_of(kind: str) -> Codec | None:
    """Of what travels within passes, by its name."""
    return make_codec(read_coding(kind, "a code of passes"))


def _pipeline(model: nn.Module, asked: Asked, waits: Waits) -> Pipeline:
    from thinwire.parallel.pipeline import Pipeline  # it loads torch's compiler

    assert asked.example is not None, "a pipeline is cut by the shapes of what crosses"
    cut = cut_model(model, asked.example, asked.config.pipeline, asked.layout.pipe, asked.costs, asked.rates)
    if asked.layout.tensor > 1:
        cut = split_boundaries(cut, asked.groups["tensor"], asked.ledger, waits)
    loss = asked.loss or model.loss
    return Pipeline(model, cut, asked.groups["pipe"], asked.ledger, loss, asked.precision)  # type: ignore[arg-type]
