"""The prediction that is printed before training: on which cluster, at which compute rates."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from thinwire.cluster import Cluster, Device, Host, load_cluster
from thinwire.collectives.ledger import Ledger
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.train.step import Stepper, without_trace
from thinwire.train.task import Task

TIMED_PASSES = 3


def find_cluster(named: str, lab_cluster: Path | None, world_size: int) -> Cluster:
    """The lab's cluster, else the named one, else `world_size` ranks with no wire between them. UserError if the size differs."""
    if lab_cluster is None and not named:
        devices = tuple(Device(name=f"here/cpu{index}") for index in range(world_size))
        return Cluster(name="here", hosts=(Host(name="here", devices=devices),))
    cluster = load_cluster(lab_cluster or named)
    if cluster.world_size != world_size:
        raise UserError(
            f"cluster {cluster.name} has {cluster.world_size} ranks, but {world_size} were started; "
            f"set cluster.file to the cluster you run on, or start {cluster.world_size} ranks"
        )
    return cluster


def timed_rates(task: Task, stepper: Stepper, layout: Layout, ledger: Ledger) -> tuple[float, ...]:
    """What each rank achieves on one micro-batch, all computing at once, nothing exchanged. Collective."""
    batch = task.batch(0, layout.replica(dist.get_rank()))
    seconds = []
    with ledger.label("calibration"), without_trace(stepper.model):
        dist.barrier()
        for _ in range(TIMED_PASSES):
            started = time.perf_counter()
            with stepper.sync.microbatch(last=False):
                with stepper.precision():
                    loss = stepper.loss(stepper.model, batch)
                loss.backward()
            if loss.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        stepper.optimizer.zero_grad(set_to_none=False)
        gathered: list[float] = [0.0] * layout.world_size
        dist.all_gather_object(gathered, task.workload.flops_per_microbatch / min(seconds[1:]))
    return tuple(gathered)
