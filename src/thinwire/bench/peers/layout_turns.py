"""Steps of layouts in turns in one process, PyTorch's own and ours, compute paced: for `thinwire bench layouts`.

PyTorch's are `Schedule1F1B` over stages whose sends are not coded, and `fully_shard` on a mesh of replicas and shards, on plain
gloo groups; ours run on the metered backend. FSDP2's collectives on CPUs are over when they return, and as in `step_turns` the
clock of paced passes stands still meanwhile.
"""

import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from thinwire.bench.fsdp import units_of
from thinwire.bench.peers.laid_out import LaidOut
from thinwire.bench.peers.rank import card_bytes
from thinwire.bench.peers.step_turns import clock_stands_still, shard, take_step
from thinwire.cluster import load_cluster
from thinwire.collectives.ledger import Ledger
from thinwire.compress.plain import PlainExchange
from thinwire.compress.sharded.layout import Coding, sharded_transfers
from thinwire.compress.sharded.replicas import chunk_of
from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.models.transformer import Transformer
from thinwire.plan.cost import Setting, predict, ranks_per_core
from thinwire.train.optimizers import make_optimizer
from thinwire.train.pace import Pacer
from thinwire.workload import Workload

WARM_TURNS = 1


class Tokens:
    """A task of random tokens."""

    def __init__(self, config):
        train, self.shape = config.train, config.model.shape()
        self._size = (train.micro_batch, train.sequence)
        self.workload = Workload.of_transformer(self.shape, *self._size)

    def build_model(self):
        """The same weights on each rank."""
        torch.manual_seed(0)
        return Transformer(self.shape)

    def batch(self, step, index):
        """Inputs, which are the targets too."""
        tokens = torch.randint(self.shape.vocabulary, self._size, generator=torch.Generator().manual_seed(index))
        return tokens, tokens

    def loss(self, model, batch):
        """Mean over the micro-batch."""
        return model(*batch)


class Ours(LaidOut):
    """A layout. rate: flops_per_s of a rank."""

    def __init__(self, case, config, task, ledger, rate):
        super().__init__(config, Layout(**case["layout"]), ledger, task, case["order"], case["stock"])
        self._stock = case["stock"]
        self.pacer = self.part.pacer(rate)

    def paced(self):
        """Around steps."""
        return self.part.paced(self.pacer)

    def predicted_s(self, cluster, rate):
        """Of a step, on this rank; not of PyTorch's schedule, in which a rank waits for its sends."""
        if self._stock:
            return None
        ordered = replace(cluster, ranks=tuple(cluster.ranks[one] for one in self.order))
        setting = self.part.outline.setting(self.config, self.layout, ordered, (rate,) * len(self.order))
        shared = replace(setting, ranks_per_core=ranks_per_core(len(self.order)))
        return predict(shared, self.traffic(), self.number).step_s


class StockShards:
    """FSDP2 on replicas of shards, which keep gathered weights until the backward pass is through with them."""

    def __init__(self, case, config, task, ledger, rate):
        self.layout, self.order, self._task = Layout(**case["layout"]), case["order"], task
        mesh = torch.tensor(self.order).view(self.layout.data, self.layout.shard)
        names, gloo = ("replicate", "shard"), (("gloo", None),) * 2
        self._model = task.build_model()
        shard(self._model, DeviceMesh("cpu", mesh, mesh_dim_names=names, backend_override=gloo), ledger, None)
        self._optimizer = make_optimizer(self._model, config.train)
        self.pacer = Pacer.of(task.workload, rate)
        for name in ("unshard", "wait_for_unshard", "post_backward"):
            setattr(FSDPParamGroup, name, clock_stands_still(getattr(FSDPParamGroup, name), [self.pacer]))

    def paced(self):
        """Around steps."""
        return self.pacer.attached(self._model, self._task.workload)

    def step(self, number):
        """One batch."""
        take_step(self._model, self._optimizer, *self._task.batch(number, dist.get_rank()))

    def predicted_s(self, cluster, rate):
        """Of a step: passes stand still for each collective."""
        workload, shards = self._task.workload, self.layout.shard
        exchange, stock = PlainExchange(Ledger()), Coding(None, None, stock_gradients=True, stock_weights=True)

        def across(unit):
            return exchange.transfers("", chunk_of(unit, shards), "data", self.layout.data)

        units = [replace(unit, reshards=False) for unit in units_of(workload)]
        sent = [replace(one, in_passes=True) for one in sharded_transfers(units, shards, stock, "shard", 1, across)]
        setting = Setting(
            cluster=replace(cluster, ranks=tuple(cluster.ranks[one] for one in self.order)),
            layout=self.layout,
            workload=workload,
            micro_batches=1,
            flops_per_s=(rate,) * len(self.order),
            ranks_per_core=ranks_per_core(len(self.order)),
        )
        return predict(setting, sent, self.order.index(dist.get_rank())).step_s

    def close(self):
        """Nothing is left."""


def contender(case, settings, ledger):
    """Of a case: its name, layout, order of ranks, whether it is stock PyTorch's, and its run.toml."""
    config = RunConfig.model_validate(case["run"])
    kind = StockShards if case["stock"] and case["layout"].get("shard", 1) > 1 else Ours
    return kind(case, config, Tokens(config), ledger, settings["flops_per_s"])


def measure(rank):
    """By case: seconds and card bytes of a step in each turn, by how much passes were late, and what is predicted."""
    settings, native, ledger = rank.settings, dist.new_group(backend="gloo"), rank.ledger
    cases, turns, rate = settings["cases"], settings["turns"], settings["flops_per_s"]
    cluster = load_cluster(str(rank.environment.lab.cluster))
    contenders = {case["name"]: contender(case, settings, ledger) for case in cases}
    found = {name: {"seconds": [], "card_bytes": []} for name in contenders}
    for turn in range(turns + WARM_TURNS):
        for number, (name, one) in enumerate(contenders.items()):
            with one.paced():
                dist.barrier(group=native)
                started, sent = time.perf_counter(), card_bytes()
                one.step(turn)
                dist.barrier(group=native)
            taken_s = time.perf_counter() - started
            rank.report(turn * len(cases) + number + 1, (turns + WARM_TURNS) * len(cases), f"{name}: {taken_s:.3f} s a step")
            if turn < WARM_TURNS:
                one.pacer.declared_s = one.pacer.late_s = 0.0
            else:
                found[name]["seconds"].append(taken_s)
                found[name]["card_bytes"].append(card_bytes() - sent)
    late = torch.tensor([one.pacer.missed_fraction for one in contenders.values()])
    dist.all_reduce(late, dist.ReduceOp.MAX, group=native)
    for (name, one), missed in zip(contenders.items(), late.tolist(), strict=True):
        found[name] |= {"late": missed, "predicted_s": one.predicted_s(cluster, rate)}
        one.close()
    return found
