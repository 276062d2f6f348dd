"""What one rank has of a model and sends in a step, from shapes alone: the one answer, for ranks that take their part (`part`),
and for a planner before there are any, whose groups only need to be counted.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import nn

from thinwire.cluster import Cluster
from thinwire.cluster.graph import Routes
from thinwire.cluster.order import along_links, in_order
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.price import Carrier
from thinwire.collectives.synthesis.bounds import OPS
from thinwire.collectives.tuned.tuner import Chosen, Tuner, make_tuner, size_class
from thinwire.compress.base import make_codec
from thinwire.config.compress import NoCompression, read_coding
from thinwire.config.model import ModelConfig
from thinwire.config.optimizer import state_of
from thinwire.config.run import RunConfig
from thinwire.config.sharded import ShardedSection
from thinwire.config.sync import EveryStep, Retrace, Sync
from thinwire.layout import Layout
from thinwire.parallel import sharded, stage_shards, tensor
from thinwire.parallel.apply import Applied
from thinwire.parallel.balance import shares_tied
from thinwire.parallel.chain import transformer_chain
from thinwire.parallel.cut import Cut, cut_chain
from thinwire.parallel.recompute import units_of
from thinwire.parallel.tensor_boundary import boundary_traffic
from thinwire.parallel.tensor_parts import local_workload, parts_of
from thinwire.parallel.waits import Waits
from thinwire.plan.cost import NATIVE, Setting
from thinwire.plan.memory import recomputed_blocks
from thinwire.plan.pipeline import Pass, Stages
from thinwire.plan.sharded import ShardedPasses
from thinwire.sync.base import Synchroniser
from thinwire.sync.make import make_synchroniser
from thinwire.traffic import Transfer, merged
from thinwire.train.pipelined import norm_transfers
from thinwire.train.shared_part import SharedPart, axis_of
from thinwire.train.trainer import report_traffic
from thinwire.workload import Workload

CPU = torch.device("cpu")
OUTER_READS, MOMENTUM_READS = 3, 2
"""As which an outer step counts, and its momentum: as long as so many reads of the parameters at the rate of an update, measured
on one core: 3.8 ms for 0.8M parameters, 13.9 ms for 2.7M. It goes through memory 19 times, but in a straight line."""
SUM_READS, PERIOD_READS, ADAMW_READS = 3, 22, 7
"""Of retrace: adding up gradients; where a period began, kept and gone back to, and moments widened; a step again."""
Alike = TypeVar("Alike")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """Of one rank, whether it is there or not. casts: whether forward passes are in autocast to bfloat16. rates: flops_per_s by
    global rank where they are declared, so that slower ranks get fewer layers."""

    layout: Layout
    rank: int = 0
    device: torch.device = CPU
    casts: bool = False
    rates: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Outline:
    """workload: of a rank's parameters and their passes; sent: in a step, within one replica, or between ranks that share states.
    recomputed: blocks that are computed again, as `recomputed_blocks`. shared: where ranks share matrices, sequences or experts;
    cut: into stages. stages, passes, tensor_flops: as `Setting`, there `sharded`."""

    workload: Workload
    sent: tuple[Transfer, ...] = ()
    recomputed: Mapping[str, str] = field(default_factory=dict)
    shared: SharedPart | None = None
    cut: Cut | None = None
    stages: Stages | None = None
    passes: ShardedPasses | None = None
    tensor_flops: tuple[float, ...] = ()

    def setting(self, config: RunConfig, layout: Layout, cluster: Cluster, rates: tuple[float, ...]) -> Setting:
        """rates: flops_per_s by rank."""
        return Setting(
            cluster=cluster,
            layout=layout,
            workload=self.workload,
            micro_batches=config.sync.accumulate,
            flops_per_s=rates,
            optimizer=state_of(config.train.optimizer),
            stages=self.stages,
            sharded=self.passes,
            tensor_flops=self.tensor_flops,
            outer_bytes=outer_reads(config.sync) * self.workload.stored_bytes,
        )

    def transfers(self, config: RunConfig, layout: Layout, sync: Synchroniser, num_sums: int = 2) -> list[Transfer]:
        """All that the rank sends, but for evaluations' passes. num_sums: of the task."""
        gradients = layout.of_gradients
        return [
            *self.sent,
            *sync.traffic(self.workload, gradients),
            *report_traffic(config.train, gradients.report_axis, layout.world_size, num_sums),
        ]


def outer_reads(sync: Sync) -> float:
    """How often a step reads or writes the parameters, or as many values, for the exchange between replicas that go alone."""
    if isinstance(sync, Retrace):
        return SUM_READS + (PERIOD_READS + (sync.every - 1) * ADAMW_READS) / sync.every
    outer = OUTER_READS + (MOMENTUM_READS if getattr(sync, "outer_momentum", 0) else 0)
    return outer / getattr(sync, "every", 1) if sync.rare else 0.0


def outline_of(config: RunConfig, shape: ModelConfig, seat: Seat, shared: SharedPart | None = None) -> Outline:
    """shape: with the vocabulary that the model gets. shared: of this rank, where there are such axes. UserError for a model that
    cannot be cut."""
    layout, train, micro = seat.layout, config.train, config.sync.accumulate
    at = layout.coordinates(seat.rank)
    whole = Workload.of_transformer(shape, train.micro_batch, train.sequence)
    kinds = recomputed_blocks(config, shape, layout, casts=seat.casts, on_device=seat.device.type != "cpu")
    rows = [local_workload(whole, shape, layout.tensor, one, layout.seq).recomputing(kinds) for one in range(layout.tensor)]
    own, cut, stages, passes, sent = rows[at["tensor"]], None, None, None, list[Transfer]()
    counted = [one.name for one in own.parameters]
    if shared is not None:
        shared = replace(shared, recomputed=units_of(kinds))
    if layout.pipe > 1:
        cut, rank = _cut(shape, config, seat, whole), at["pipe"]
        if shared is not None:
            shared = shared.in_stages(cut, rank) if shared.cut is None else shared
            cut = shared.cut or cut
        local = own
        own = part_workload(local, cut, _names(local, cut.modules_of(rank)), rank).recomputing(kinds)
        tied = {name: cut.holders(name) for name in cut.tied() if rank in cut.holders(name)}
        last = _names(local, (name for name, ranks in tied.items() if rank == ranks[-1]))  # the first holder counts them, and
        added = [one for one in local.parameters if one.name in _names(local, tied)]  # hands on their average
        if shape.tied:
            shares_tied(config.compress, layout)  # refuses replicas that would average them in two ways
        counted = [one.name for one in own.parameters if one.name not in last]
        sent += merged(cut.traffic(rank, micro, [cut.tied_bytes(one.shape, one.stored_bytes) for one in added]))
        stages = all_stages(rows, at["tensor"], cut, micro, shared)
    if shared is not None:
        sent += shared.traffic(micro, counted)
    if layout.expert > 1:
        own = own.of_expert_rank(shape.experts, layout.expert, at["expert"])
    if layout.shard > 1:
        if layout.pipe > 1:
            sent += stage_shards.traffic(own, layout.shard, clips=train.clip > 0)
        else:
            passes = _sharded_passes(own, layout.shard, config.sharded)
            sent += sharded.traffic(own, layout.shard, config.sharded, micro, clips=train.clip > 0)
        own = sharded.shared_out(own, layout.shard, at["shard"])
    if layout.pipe > 1:
        sent += norm_transfers(train)
    return Outline(
        workload=own,
        sent=tuple(sent),
        recomputed=kinds,
        shared=shared,
        cut=cut,
        stages=stages,
        passes=passes,
        tensor_flops=() if layout.pipe > 1 else unless_alike(one.flops_per_microbatch for one in rows),
    )


def outline_of_shards(config: RunConfig, whole: Workload, seat: Seat) -> Outline:
    """Of any model that ranks share by rows alone. whole: its blocks are the units that are gathered at once."""
    layout, options = seat.layout, config.sharded
    return Outline(
        workload=sharded.shared_out(whole, layout.shard, layout.coordinates(seat.rank)["shard"]),
        sent=tuple(sharded.traffic(whole, layout.shard, options, config.sync.accumulate, clips=config.train.clip > 0)),
        passes=_sharded_passes(whole, layout.shard, options),
    )


def outline_of_applied(config: RunConfig, applied: Applied, layout: Layout, kinds: Mapping[str, str]) -> Outline:
    """Of a model of which only the modules are known, when it is shared out. kinds: of what is computed again."""
    micro, clips, pipeline, sent = config.sync.accumulate, config.train.clip > 0, applied.pipeline, list[Transfer]()
    if layout.tensor > 1:
        units = list(range(len(applied.by_unit)))
        if pipeline is not None:
            units = [unit for stage in pipeline.cut.stages_of(pipeline.rank) for unit in pipeline.cut.stages[stage]]
            sent += boundary_traffic(pipeline.cut, pipeline.rank, layout.tensor, micro)
        within = (one for unit in units for one in applied.by_unit[unit])
        sent += merged(replace(one, calls=one.calls * micro) for one in within)
        sent += tensor.norm_transfers("tensor", next(applied.module.parameters()).dtype) if clips else []
    if applied.shards is not None:
        sent += applied.shards.compression.transfers(micro if applied.shards.reshards else 1)
        sent += tensor.norm_transfers("shard", applied.shards.locals[0].dtype) if clips else []
    if pipeline is not None:
        sent += pipeline.traffic(micro) + norm_transfers(config.train)
        sent += stage_shards.traffic(workload_of(pipeline.owner), layout.shard, clips=clips) if layout.shard > 1 else []
    return Outline(workload=workload_of(applied.module), sent=tuple(sent), recomputed=kinds)


def workload_of(module: nn.Module) -> Workload:
    """Of the parameters that are trained; of operations nothing is known."""
    trained = [(name, one) for name, one in module.named_parameters() if one.requires_grad]
    workload = Workload.of_parameters([(name, tuple(one.shape)) for name, one in trained], 1)
    dtypes = zip(workload.parameters, (str(one.dtype)[6:] for _, one in trained), strict=True)
    return replace(workload, parameters=tuple(replace(one, dtype=dtype) for one, dtype in dtypes))


def outline(
    config: RunConfig, shape: ModelConfig, layout: Layout, cluster: Cluster, rates: tuple[float, ...]
) -> tuple[Setting, list[Transfer], Carrier]:
    """Of rank 0 of a run that there is not, for `plan.cost.predict`. rates: flops_per_s by rank. UserError for what
    `thinwire train` refuses."""
    cluster, rates = _numbered(config, cluster, rates)
    seat = Seat(layout=layout, casts=config.train.dtype == "bfloat16", rates=cluster.declared_rates)
    alike = {"sync": EveryStep(accumulate=config.sync.accumulate)} | (
        {"compress": NoCompression()} if layout.pipe == 1 or not shape.tied else {}
    )
    of_rank = config.model_copy(update=alike) if isinstance(config.train.recompute, str) else config
    return _to_predict(_outlined(of_rank, shape, seat), config, layout, cluster, rates)


def outline_of_task(
    workload: Workload,
    num_sums: int,
    config: RunConfig,
    _: ModelConfig,
    layout: Layout,
    cluster: Cluster,
    rates: tuple[float, ...],
) -> tuple[Setting, list[Transfer], Carrier]:
    """The same of a task whose model each rank has whole. workload: of a micro-batch; num_sums: of the task."""
    return _to_predict(Outline(workload=workload), config, layout, *_numbered(config, cluster, rates), num_sums)


def _numbered(config: RunConfig, cluster: Cluster, rates: tuple[float, ...]) -> tuple[Cluster, tuple[float, ...]]:
    """As ranks are numbered in a run."""
    if config.layout.map != "links":
        return cluster, rates
    order = along_links(cluster)
    return in_order(cluster, order), tuple(rates[rank] for rank in order)


def _to_predict(
    found: Outline, config: RunConfig, layout: Layout, cluster: Cluster, rates: tuple[float, ...], num_sums: int = 2
) -> tuple[Setting, list[Transfer], Carrier]:
    sync = make_synchroniser(config.sync, config.compress, layout.of_gradients, Ledger())
    transfers = found.transfers(config, layout, sync, num_sums)
    return found.setting(config, layout, cluster, rates), transfers, _carrier(config, layout, cluster, transfers)


@lru_cache(maxsize=64)
def _outlined(config: RunConfig, shape: ModelConfig, seat: Seat) -> Outline:
    """The same for all ways in which replicas exchange."""
    layout = seat.layout
    shared = _shared(config, shape, seat) if layout.tensor * layout.seq * layout.expert > 1 else None
    return outline_of(config, shape, seat, shared)


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
    options, costs, again = cut.options, workload.chain_flops_per_token, workload.chain_recomputed_per_token
    boundaries = range(len(cut.stages) - 1)
    return Stages(
        orders=_orders(options.schedule, cut.ranks, options.per_rank, num_micro),
        forward_flops=stage_flops(workload, cut),
        recomputed=[sum(again[unit] for unit in units) / (sum(costs[unit] for unit in units) or 1.0) for units in cut.stages],
        activation_bytes=[cut.message_bytes("activations", boundary) for boundary in boundaries],
        gradient_bytes=[cut.message_bytes("gradients", boundary) for boundary in boundaries],
        in_passes={} if split is None else split.pass_traffic(),
    )


@lru_cache(maxsize=256)
def _orders(schedule: str, ranks: int, per_rank: int, num_micro: int) -> Sequence[Sequence[Pass]]:
    """Once for all plans."""
    from thinwire.parallel.schedules import orders  # which loads torch's compiler

    return orders(schedule, ranks, per_rank, num_micro)


def stage_flops(workload: Workload, cut: Cut) -> tuple[float, ...]:
    """Forward, of one micro-batch, of each stage of `workload`."""
    costs = workload.chain_flops_per_token
    return tuple(workload.tokens_per_microbatch * sum(costs[unit] for unit in units) for units in cut.stages)


def part_workload(workload: Workload, cut: Cut, names: Collection[str], rank: int) -> Workload:
    """Of rank `rank` of a pipeline, which has the parameters of these names. workload: of the whole model, or of this rank's part
    of all its matrices."""
    costs = workload.chain_flops_per_token
    return workload.part(names, sum(costs[unit] for stage in cut.stages_of(rank) for unit in cut.stages[stage]))


def _sharded_passes(whole: Workload, degree: int, options: ShardedSection) -> ShardedPasses:
    """whole: what each rank computes. What is in no block computes when the last one is through."""
    blocks = [whole.tokens_per_microbatch * flops for flops in whole.block_flops_per_token]
    head = whole.tokens_per_microbatch * whole.forward_flops_per_token - sum(blocks)
    again = whole.chain_recomputed_per_token[1:-1] if whole.recomputed_flops_per_token else (0.0,) * len(blocks)
    sent = sharded.traffic(whole, degree, options, 1, clips=False)
    return ShardedPasses(
        weights=[one for one in sent if one.op == "all_gather"],
        gradients=[one for one in sent if one.op == "all_to_all"],
        head_flops=head,
        block_flops=blocks,
        block_again=[whole.tokens_per_microbatch * flops for flops in again],
        reshards=options.reshard == "always",
    )


def _names(workload: Workload, modules: Iterable[str]) -> set[str]:
    """Of the parameters of these modules."""
    prefixes = tuple(f"{name}." for name in modules)
    return {one.name for one in workload.parameters if one.name.startswith(prefixes)}


def _cut(shape: ModelConfig, config: RunConfig, seat: Seat, whole: Workload) -> Cut:
    layout, train = seat.layout, config.train
    entering = torch.empty(train.micro_batch, train.sequence // layout.seq, dtype=torch.int64, device="meta")
    stream = torch.empty(*entering.shape, shape.width, dtype=getattr(torch, shape.dtype), device="meta")
    costs, rates = whole.chain_flops_per_token, slowest_rates(layout, seat.rates)
    shapes = entering, [stream] * len(costs)
    return cut_chain(transformer_chain(shape), shapes, config.pipeline, layout.pipe, costs, rates)


def _carrier(config: RunConfig, layout: Layout, cluster: Cluster, transfers: Sequence[Transfer]) -> Carrier:
    """As the groups of a run would decide by price. What would be measured first is not known before."""
    if config.collectives.kind == "native":
        return NATIVE
    tuner, routes = _tuner(cluster)
    for transfer in transfers:
        for group in layout.senders(transfer.axis) if transfer.op in OPS else ():
            key = group, transfer.op, size_class(transfer.message_bytes), 0
            if key not in tuner.chosen and len(group) > 1:
                alike = *key[1:3], routes.pattern(group)
                if alike not in routes.known:
                    routes.known[alike] = tuner.advisor.implementations(transfer.op, transfer.message_bytes, group, 0)[0]
                tuner.chosen[key] = routes.known[alike]
    return Chosen(tuner, cluster)


@lru_cache(maxsize=4)
def _tuner(cluster: Cluster) -> tuple[Tuner, Routes]:
    return make_tuner(cluster, "", measures=False), Routes(cluster)


def _group(size: int) -> Any:
    """Of the first rank, which only needs to be counted."""
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)


def _shared(config: RunConfig, shape: ModelConfig, seat: Seat) -> SharedPart:
    ring: Any = None
    degree = seat.layout.tensor
    return SharedPart(
        shape=shape,
        train=config.train,
        layout=seat.layout,
        group=_group(getattr(seat.layout, axis_of(seat.layout))),
        shards=None,
        ledger=Ledger(),
        codec=make_codec(read_coding(config.tensor.sums, "tensor.sums")),
        slots=make_codec(read_coding(config.experts.slots, "experts.slots")),
        casts=seat.casts,
        parts=parts_of(shape, degree, 0) if degree > 1 else {},
        ring=ring,
        waits=Waits(),
        device=seat.device,
    )
