"""Steps of pipelines in turns in one process, PyTorch's own and ours, compute paced: for `thinwire bench layouts`.

PyTorch's is `Schedule1F1B` over stages whose sends are not coded, on a plain gloo group; ours the schedule that the case names,
on the metered backend. Both have the same stages of the same model and the same micro-batches.
"""

import time

import torch
import torch.distributed as dist
from torch.distributed.pipelining import Schedule1F1B

from thinwire.bench.peers.rank import card_bytes
from thinwire.config.model import ModelConfig
from thinwire.config.pipeline import PipelineSection
from thinwire.models.transformer import Transformer, cross_entropy
from thinwire.parallel.cut import cut_model
from thinwire.parallel.pipeline import Pipeline
from thinwire.train.part import stages_of
from thinwire.train.pipelined import Pace
from thinwire.workload import Workload

WARM_TURNS = 1


class Contender:
    """One pipeline over all ranks, and what was measured of it."""

    def __init__(self, case, settings, group, ledger):
        config, num_micro = ModelConfig(**settings["model"]), settings["micro_batches"]
        torch.manual_seed(0)
        model, workload = Transformer(config), Workload.of_transformer(config, settings["micro_batch"], config.context)
        shape = settings["micro_batch"], config.context
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randint(config.vocabulary, shape, generator=generator) for _ in range(num_micro)]
        options = PipelineSection(**case["options"])
        cut = cut_model(model, self.batches[0], options, group.size(), workload.chain_flops_per_token)
        self.pipeline = Pipeline(model, cut, group, ledger, cross_entropy)
        if case["stock"]:
            loss = self.pipeline.scaled_loss
            self.pipeline.use(Schedule1F1B(self.pipeline.stages[0], num_micro, loss_fn=loss, scale_grads=False), num_micro)
        self.optimizer = torch.optim.AdamW(self.pipeline.owner.parameters(), lr=1e-3)
        forward_flops = stages_of(workload, cut, num_micro).forward_flops
        self.pace = Pace({stage: flops / settings["flops_per_s"] for stage, flops in enumerate(forward_flops)})
        self.seconds, self.card_bytes = [], []

    def take_turn(self, steps, native):
        """Some steps, timed between barriers."""
        with self.pace.attached(self.pipeline):
            dist.barrier(group=native)
            started, sent = time.perf_counter(), card_bytes()
            for _ in range(steps):
                self.pipeline.step(self.batches, self.batches, 1 / len(self.batches))
                self.pipeline.add_up_tied()
                self.optimizer.step()
                self.optimizer.zero_grad()
            dist.barrier(group=native)
            self.seconds.append((time.perf_counter() - started) / steps)
            self.card_bytes.append((card_bytes() - sent) / steps)


def measure(rank):
    """Seconds and card bytes of a step in each turn by case, and by how much passes were late."""
    settings, native, world = rank.settings, dist.new_group(backend="gloo"), dist.group.WORLD
    cases, turns = settings["cases"], settings["turns"]
    contenders = {case["name"]: Contender(case, settings, native if case["stock"] else world, rank.ledger) for case in cases}
    for turn in range(turns + WARM_TURNS):
        for number, (name, one) in enumerate(contenders.items()):
            one.take_turn(settings["steps"] if turn >= WARM_TURNS else 1, native)
            if turn < WARM_TURNS:
                one.seconds, one.card_bytes = [], []
                one.pace.declared_s = one.pace.late_s = 0.0
                continue
            done = (turn - WARM_TURNS) * len(cases) + number + 1
            rank.report(done, turns * len(cases), f"{name}: {one.seconds[-1]:.3f} s a step")
    late = torch.tensor([one.pace.missed_fraction for one in contenders.values()])
    dist.all_reduce(late, dist.ReduceOp.MAX, group=native)
    return {
        name: {"seconds": one.seconds, "card_bytes": one.card_bytes, "late": missed}
        for (name, one), missed in zip(contenders.items(), late.tolist(), strict=True)
    }
