"""Training steps of stock PyTorch on stock gloo and on the backend that chooses schedules, in turns in one process, one rank.

    python -m thinwire.bench.peers.step_turns RESULTS '{"framework": "ddp", ...}'

Both contenders are the same lines: `DistributedDataParallel` or `fully_shard`, with a group of the one backend or of the other.
Compute is paced. Under FSDP2 the pacer's clock stands still while weights are gathered or gradients reduced, since on CPUs these
calls are over when they return (see `fsdp_contenders`).
"""

import json
import sys
import time
from contextlib import ExitStack

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from thinwire.bench.peers.fsdp_contenders import clock_stands_still, take_step
from thinwire.bench.turns import write_result
from thinwire.cluster import load_cluster
from thinwire.collectives.backend import NAME
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.scheduled import register_scheduled
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.tuner import Tuner
from thinwire.config.model import ModelConfig
from thinwire.models.transformer import Transformer
from thinwire.train.pace import Pacer
from thinwire.train.runtime import process_group, read_environment
from thinwire.workload import Workload

TIMEOUT_S = 600.0
WARM_TURNS = 2
"""In the first DDP learns its buckets, in the second it uses them: collectives are chosen in both."""


class Contender:
    """A model on its group. step: forward, backward, clip, optimizer."""

    def __init__(self, told, group, rank):
        config = ModelConfig(**told["model"])
        torch.manual_seed(0)
        self.model = self.trained = Transformer(config)
        self.workload = Workload.of_transformer(config, told["micro_batch"], config.context)
        self.pacer = Pacer.of(self.workload, told["flops_per_s"])
        if told["framework"] == "ddp":
            self.trained = DistributedDataParallel(self.model, process_group=group, gradient_as_bucket_view=True)
        else:
            mesh = dist.DeviceMesh.from_group(group, "cpu")
            for block in self.model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, fused=True)
        shape = (told["micro_batch"], config.context)
        self.tokens = torch.randint(config.vocabulary, shape, generator=torch.Generator().manual_seed(rank))

    def step_s(self, steps, barrier):
        """Seconds of a step."""
        with ExitStack() as stack:
            stack.enter_context(self.pacer.attached(self.model, self.workload))
            barrier()
            started = time.perf_counter()
            for _ in range(steps):
                take_step(self.trained, self.optimizer, self.tokens, self.tokens)
            barrier()
            return (time.perf_counter() - started) / steps


def main(results, settings):
    """One rank."""
    told = json.loads(settings)
    environment = read_environment()
    place, cluster = environment.place, load_cluster(str(environment.lab.cluster))
    torch.set_num_threads(1)
    register_scheduled(Ledger(), Tuner(Advisor(cluster)))
    with process_group(place, NAME, TIMEOUT_S):
        native = dist.new_group(backend="gloo")
        contenders = {
            name: Contender(told, group, place.rank) for name, group in (("native", native), ("ours", dist.group.WORLD))
        }
        if told["framework"] == "fsdp":
            from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

            for name in ("unshard", "wait_for_unshard", "post_backward"):
                method = getattr(FSDPParamGroup, name)
                for one in contenders.values():
                    method = clock_stands_still(method, one.pacer)
                setattr(FSDPParamGroup, name, method)
        seconds = {name: [] for name in contenders}
        for turn in range(told["turns"] + WARM_TURNS):
            for name, one in contenders.items():
                took = one.step_s(told["steps"], lambda: dist.barrier(group=native))
                if turn >= WARM_TURNS:
                    seconds[name].append(took)
                else:
                    one.pacer.declared_s = one.pacer.late_s = 0.0
        apart = max(
            float((a.detach() - b.detach()).abs().max())
            for a, b in zip(*(map(local, one.model.parameters()) for one in contenders.values()), strict=True)
        )
        late = {name: one.pacer.missed_fraction for name, one in contenders.items()}
        chosen = {f"{op} 2^{size} B": way.name for (op, size, _), way in dist.group.WORLD._ways.items()}
        if place.rank == 0:
            write_result(results, "steps", {"seconds": seconds, "late": late, "apart": apart, "chosen": chosen})
        dist.barrier(group=native)


def local(parameter):
    """What lies on this rank."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


if __name__ == "__main__":
    main(*sys.argv[1:])
