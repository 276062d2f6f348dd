"""Steps of stock PyTorch on stock gloo and of ours, in turns in one process: for `thinwire bench collective_steps` and `fsdp`.

Both contenders are the same lines, `DistributedDataParallel` or `fully_shard`, with a group of the one backend or the other; with
`codecs` among the settings ours also calls `compress_sharded`. Compute is paced. Pacer keeps a schedule for the whole pass, under
which waiting for the wire would hide for free; FSDP2's collectives on CPUs are over when they return. So the pacer's clock
stands still while FSDP2 asks for weights, waits for them or reduces gradients: only what the wire does during declared compute is
hidden.
"""

import functools
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.parallel import DistributedDataParallel

from thinwire import compress_sharded
from thinwire.bench.peers.rank import card_bytes
from thinwire.cluster import load_cluster
from thinwire.collectives import backend
from thinwire.collectives.scheduled import register_scheduled
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.tuner import Tuner
from thinwire.config.model import ModelConfig
from thinwire.models.transformer import Transformer
from thinwire.train.pace import Pacer
from thinwire.workload import Workload

WARM_TURNS = 2
"""In the first DDP learns its buckets, in the second it uses them: collectives are chosen in both."""


class Contender:
    """A model on its group, and what was measured of it."""

    def __init__(self, settings, group, ledger, codecs):
        config, rank = ModelConfig(**settings["model"]), dist.get_rank()
        torch.manual_seed(0)
        self.model = self.trained = Transformer(config)
        self.workload = Workload.of_transformer(config, settings["micro_batch"], config.context)
        self.pacer = Pacer.of(self.workload, settings["flops_per_s"])
        self.compression = None
        if settings["framework"] == "ddp":
            self.trained = DistributedDataParallel(self.model, process_group=group, gradient_as_bucket_view=True)
        else:
            self.compression = shard(self.model, mesh_of(group, settings["shards"]), ledger, codecs)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        shape = (settings["micro_batch"], config.context)
        self.tokens = torch.randint(config.vocabulary, shape, generator=torch.Generator().manual_seed(rank))
        self.seconds, self.card_bytes = [], []

    def take_turn(self, steps, native):
        """Some steps, timed between barriers."""
        with self.pacer.attached(self.model, self.workload):
            dist.barrier(group=native)
            started, sent = time.perf_counter(), card_bytes()
            for _ in range(steps):
                take_step(self.trained, self.optimizer, self.tokens, self.tokens)
            dist.barrier(group=native)
            self.seconds.append((time.perf_counter() - started) / steps)
            self.card_bytes.append((card_bytes() - sent) / steps)

    def forget(self):
        """What was measured so far, which warmed up."""
        self.seconds, self.card_bytes = [], []
        self.pacer.declared_s = self.pacer.late_s = 0.0


def mesh_of(group, shards):
    """All ranks, or with `shards` replicas of so many: in groups of their own on the backend of `group`."""
    if not shards:
        return dist.DeviceMesh.from_group(group, "cpu")
    names, backend_name = ("replicate", "shard"), dist.get_backend(group)
    override = dict.fromkeys(names, backend_name)
    return init_device_mesh("cpu", (group.size() // shards, shards), mesh_dim_names=names, backend_override=override)


def shard(model, mesh, ledger, codecs):
    """FSDP2, a unit a block; with codecs the compression of its units. Replicas keep their weights between the passes."""
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=mesh.ndim == 1)
    fully_shard(model, mesh=mesh)
    return compress_sharded(model, **codecs, ledger=ledger) if codecs else None


def take_step(model, optimizer, tokens, targets):
    """One batch, clipped."""
    model(tokens, targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def clock_stands_still(method, pacers):
    """`method` as it is, its time left out of the pass that the pacers pace."""

    @functools.wraps(method)
    def timed(*args, **kwargs):
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            for pacer in pacers:
                pacer._pass_started += time.perf_counter() - started

    return timed


def register(rank):
    """Without codecs the backend that chooses."""
    if rank.settings["codecs"]:
        backend.register(rank.ledger)
    else:
        register_scheduled(rank.ledger, Tuner(Advisor(load_cluster(str(rank.environment.lab.cluster)))))


def measure(rank):
    """Seconds and card bytes of a step in each turn, by contender."""
    settings, native, world = rank.settings, dist.new_group(backend="gloo"), dist.group.WORLD
    contenders = {
        "native": Contender(settings, native, rank.ledger, None),
        "ours": Contender(settings, world, rank.ledger, settings["codecs"]),
    }
    if settings["framework"] == "fsdp":
        pacers = [one.pacer for one in contenders.values()]
        for name in ("unshard", "wait_for_unshard", "post_backward"):
            setattr(FSDPParamGroup, name, clock_stands_still(getattr(FSDPParamGroup, name), pacers))
    for turn in range(settings["turns"] + WARM_TURNS):
        for one in contenders.values():
            one.take_turn(settings["steps"], native)
            if turn < WARM_TURNS:
                one.forget()
    apart = max(
        float((a.detach() - b.detach()).abs().max())
        for a, b in zip(*(map(local, one.model.parameters()) for one in contenders.values()), strict=True)
    )
    late = torch.tensor([one.pacer.missed_fraction for one in contenders.values()])
    dist.all_reduce(late, dist.ReduceOp.MAX, group=native)
    compression = contenders["ours"].compression
    return {
        "seconds": {name: one.seconds for name, one in contenders.items()},
        "card_bytes": {name: one.card_bytes for name, one in contenders.items()},
        "late": dict(zip(contenders, late.tolist(), strict=True)),
        "apart": apart,
        "chosen": {f"{op} 2^{size} B": one.name for (op, size, _), one in getattr(world, "_decided", {}).items()},
        "memory_bytes": compression.memory_bytes if compression else 0,
    }


def local(parameter):
    """What lies on this rank."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
