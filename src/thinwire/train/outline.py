"""What rank 0 of a run would have and send, from its run.toml alone: before there are ranks, for a planner.

The same functions answer as in a run (`part`, `worker._predict`), on shapes without values; that both say the same is a test.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from thinwire.cluster import Cluster
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.price import Carrier
from thinwire.collectives.synthesis.bounds import OPS
from thinwire.collectives.tuned.tuner import Chosen, Tuner, make_tuner, size_class
from thinwire.compress.base import make_codec
from thinwire.config.compress import read_coding
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.parallel.balance import shares_tied
from thinwire.parallel.chain import transformer_chain
from thinwire.parallel.cut import Cut, cut_chain
from thinwire.parallel.tensor_parts import local_workload, parts_of
from thinwire.parallel.waits import Waits
from thinwire.plan.cost import Setting
from thinwire.plan.memory import recomputed_blocks
from thinwire.sync.make import make_synchroniser
from thinwire.traffic import Transfer, merged
from thinwire.train.expert_part import ExpertPart
from thinwire.train.part import all_stages, part_workload, slowest_rates, unless_alike
from thinwire.train.pipelined import norm_transfers
from thinwire.train.shared_part import SharedPart
from thinwire.train.trainer import report_traffic
from thinwire.workload import Workload

CPU = torch.device("cpu")


def outline(
    config: RunConfig, shape: ModelConfig, layout: Layout, cluster: Cluster, rates: tuple[float, ...]
) -> tuple[Setting, list[Transfer], Carrier]:
    """For `plan.cost.predict`, without what evaluations send. shape: with the vocabulary that the model gets; rates: flops_per_s
    by rank. UserError for what `thinwire train` refuses."""
    if layout.shard > 1:
        raise UserError(f"layout.shard = {layout.shard} can be trained, not planned: what it gathers is known with ranks only")
    train, micro, ledger, casts = config.train, config.sync.accumulate, Ledger(), config.train.dtype == "bfloat16"
    whole = Workload.of_transformer(shape, train.micro_batch, train.sequence)
    kinds = recomputed_blocks(config, shape, layout, casts=casts)
    locals_ = [local_workload(whole, shape, layout.tensor, one, layout.seq).recomputing(kinds) for one in range(layout.tensor)]
    mine, split, stages = locals_[0], None, None
    if layout.tensor * layout.seq > 1:
        full = [int(name.split(".")[1]) + 1 for name, kind in kinds.items() if kind == "full"]
        split = replace(_split(config, shape, layout, ledger), recomputed=full)
    found: list[Transfer] = []
    if layout.pipe > 1:
        shared = shape.tied and shares_tied(config.compress, layout)
        cut = _cut(shape, config, layout, whole, slowest_rates(layout, cluster.declared_rates))
        if split is not None:
            split = split.in_stages(cut, 0)
            cut = split.cut or cut
        local = mine
        names = {one.name for one in local.parameters if one.name.startswith(tuple(f"{name}." for name in cut.modules_of(0)))}
        mine = part_workload(local, cut, names, 0).recomputing(kinds)
        tied = [
            one.stored_bytes
            for name in cut.tied()
            if 0 in cut.holders(name)
            for one in local.parameters
            if one.name.startswith(f"{name}.")
        ]
        found += merged(cut.traffic(0, micro, tied * (2 if shared else 1)))
        stages = all_stages(locals_, 0, cut, micro, split)
    if layout.expert > 1:
        mine = mine.of_expert_rank(shape.experts, layout.expert, 0)
        found += _experts(config, shape, layout, ledger).traffic(micro)
    if split is not None:
        counted: Any = [(one.name, None) for one in mine.parameters]
        found += split.traffic(micro, counted)
    gradients = layout.of_gradients
    found += make_synchroniser(config.sync, config.compress, gradients, ledger).traffic(mine, gradients)
    found += norm_transfers(train) if layout.pipe > 1 else []
    found += report_traffic(train, gradients.report_axis, layout.world_size)
    setting = Setting(
        cluster=cluster,
        layout=layout,
        workload=mine,
        micro_batches=micro,
        flops_per_s=rates,
        optimizer=train.optimizer.kind,
        stages=stages,
        tensor_flops=() if layout.pipe > 1 else unless_alike(one.flops_per_microbatch for one in locals_),
    )
    return setting, found, _carrier(config, layout, cluster, found)


def _carrier(config: RunConfig, layout: Layout, cluster: Cluster, transfers: Sequence[Transfer]) -> Carrier:
    """As the groups of a run would decide by price. What would be measured first is not known before."""
    if config.collectives.kind == "native":
        return Carrier()
    tuner = _tuner(cluster)
    for transfer in transfers:
        for group in layout.senders(transfer.axis) if transfer.op in OPS else ():
            key = group, transfer.op, size_class(transfer.message_bytes), 0
            if key not in tuner.chosen and len(group) > 1:
                tuner.chosen[key] = tuner.advisor.implementations(transfer.op, transfer.message_bytes, group, 0)[0]
    return Chosen(tuner, cluster)


@lru_cache(maxsize=4)
def _tuner(cluster: Cluster) -> Tuner:
    return make_tuner(cluster, "", measures=False)


def _group(size: int) -> Any:
    """Of the first rank, which only needs to be counted."""
    return SimpleNamespace(size=lambda: size, rank=lambda: 0)


def _experts(config: RunConfig, shape: ModelConfig, layout: Layout, ledger: Ledger) -> ExpertPart:
    return ExpertPart(
        shape=shape,
        train=config.train,
        group=_group(layout.expert),
        ledger=ledger,
        codec=make_codec(read_coding(config.experts.slots, "experts.slots")),
        waits=Waits(),
        device=CPU,
        casts=config.train.dtype == "bfloat16",
    )


def _split(config: RunConfig, shape: ModelConfig, layout: Layout, ledger: Ledger) -> SharedPart:
    ring: Any = None
    return SharedPart(
        shape=shape,
        train=config.train,
        layout=layout,
        group=_group(layout.tensor),
        ledger=ledger,
        codec=make_codec(read_coding(config.tensor.sums, "tensor.sums")),
        casts=config.train.dtype == "bfloat16",
        parts=parts_of(shape, layout.tensor, 0) if layout.tensor > 1 else {},
        ring=ring,
        waits=Waits(),
        device=CPU,
    )


def _cut(shape: ModelConfig, config: RunConfig, layout: Layout, whole: Workload, rates: list[float] | None) -> Cut:
    train = config.train
    entering = torch.empty(train.micro_batch, train.sequence // layout.seq, dtype=torch.int64, device="meta")
    stream = torch.empty(*entering.shape, shape.width, dtype=getattr(torch, shape.dtype), device="meta")
    costs = whole.chain_flops_per_token
    shapes = entering, [stream] * len(costs)
    return cut_chain(transformer_chain(shape), shapes, config.pipeline, layout.pipe, costs, rates)
