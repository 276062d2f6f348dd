"""`thinwire bench uneven`: case after case on the trainer itself, compute paced as the case asks.

A case: `slow` is how many times as long as the others' the last rank's passes take, from step `slow_from` on;
`assignment` are the
micro-batches of each rank at first (empty: equal), `by_speed` whether they are shared out anew.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.bench.peers.rank import agree, make_stepper
from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.sync.every_step import EveryStepSync
from thinwire.train.checkpoint.disks import find_disks
from thinwire.train.checkpoint.saver import Saver
from thinwire.train.checkpoint.state import Parts
from thinwire.train.pace import Pacer
from thinwire.train.runtime import StopRequest
from thinwire.train.setup import make_task
from thinwire.train.trainer import Trainer

AXIS = "data"


class Slowing:
    """A task; with the first batch of `step` the pacer of this rank becomes slower by `factor`."""

    def __init__(self, task, pacer, factor, step):
        self.task, self.pacer, self.factor, self.step = task, pacer, factor, step

    def __getattr__(self, name):
        return getattr(self.task, name)

    def batch(self, step, index):
        if step == self.step:
            self.pacer.forward_s *= self.factor
            self.pacer.backward_s *= self.factor
            self.step = None
        return self.task.batch(step, index)


class Reports:
    """In place of a reporter: keeps the seconds of a step; of all else nothing is of interest."""

    def __init__(self, report):
        self.step_s, self.report = [], report

    def step(self, event):
        self.step_s.append(event.step_s)
        self.report(event)

    def __getattr__(self, name):
        return lambda *_: None


def train(case, config, task, checkpoints, rank, report):
    """One case on this rank. Collective. step_s: of each report; assignment: the last; late: by how much passes were missed."""
    folder = Path(checkpoints) / case["name"].replace(" ", "-")
    number, ranks, pass_s = rank.place.rank, rank.place.world_size, rank.settings["pass_s"]
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(AXIS,))
    pacer = Pacer(forward_s=pass_s / 3, backward_s=pass_s * 2 / 3)
    factor = case["slow"] if number == ranks - 1 else 1.0
    model = task.build_model()
    sync = EveryStepSync(config.sync, AXIS, rank.ledger)
    reports = Reports(report)
    with ExitStack() as stack:
        stepper = make_stepper(stack, model, sync, mesh, config.train, task.loss)
        stepper.rehearse(task.batch(0, number))
        stack.enter_context(pacer.attached(model, task.workload))
        trainer = Trainer(
            task=Slowing(task, pacer, factor, case["slow_from"]),
            stepper=stepper,
            train=config.train,
            parts=Parts(model=model, optimizer=stepper.optimizer, sync=sync, ledger=rank.ledger, rank=number),
            group=mesh.get_group(AXIS),
            replica=number,
            device=torch.device("cpu"),
            stop=StopRequest(),
            saver=Saver(folder, find_disks(folder), config.train.checkpoints_kept),
            reporter=reports if number == 0 else None,
            assignment=tuple(case["assignment"]) or (config.sync.accumulate,) * ranks,
            by_speed=case["by_speed"],
        )
        trainer.run(0)
    return {"step_s": reports.step_s, "assignment": trainer.assignment, "late": pacer.missed_fraction}


def measure(rank):
    """{case: what `train` found}."""
    config, cases = RunConfig.model_validate(rank.settings["run"]), rank.settings["cases"]
    steps, found = config.train.steps, {}
    with tempfile.TemporaryDirectory(prefix="thinwire-") as own:
        folder = agree(own)
        task = make_task(config, Layout(data=rank.place.world_size), rank.environment)
        for number, case in enumerate(cases):

            def report(event, number=number, name=case["name"]):
                rank.report(number * steps + event.step, len(cases) * steps, f"{name}: {event.step_s:.3f} s a step")

            found[case["name"]] = train(case, config, task, folder, rank, report)
        dist.barrier()
    return found
