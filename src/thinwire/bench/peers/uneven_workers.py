"""One rank of `thinwire bench uneven`: case after case, the trainer itself, compute paced as the case says.

    python -m thinwire.bench.peers.uneven_workers RESULTS '{"run": {...}, "cases": [{"name": "half", "slow": 2.0, ...}], ...}'

A case: `slow` is how many times as long as the others' the last rank's passes take, from step `slow_from` on; `assignment`
is what it begins with (empty: equal), `by_speed` whether that follows the speed.
"""

import json
import sys
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.bench.progress import tell
from thinwire.collectives import backend
from thinwire.collectives.ledger import Ledger
from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.sync.every_step import EveryStepSync
from thinwire.train import checkpoint
from thinwire.train.optimizers import make_optimizer
from thinwire.train.pace import Pacer
from thinwire.train.runtime import StopRequest, process_group, read_environment
from thinwire.train.setup import make_task
from thinwire.train.step import Stepper
from thinwire.train.trainer import Trainer

AXIS = "data"


class Slowing:
    """A task; with the first batch of `step` the pacer of this rank becomes slower by `factor`."""

    def __init__(self, task, pacer, factor, step):
        self.task, self.pacer, self.factor, self.step = task, pacer, factor, step

    def __getattr__(self, name):
        return getattr(self.task, name)

    def batch(self, step, index):
        """As the task's."""
        if step == self.step:
            self.pacer.forward_s *= self.factor
            self.pacer.backward_s *= self.factor
            self.step = None
        return self.task.batch(step, index)


class Notes:
    """In place of a reporter."""

    def __init__(self, tell_step):
        self.step_s, self.tell_step = [], tell_step

    def step(self, event):
        """Of every report."""
        self.step_s.append(event.step_s)
        self.tell_step(event)

    def assigned(self, step, counts):
        """Read from the trainer at the end."""

    def evaluation(self, step, tokens, score):
        """Not of interest."""

    def checkpoint(self, step, path, save_s):
        """Not of interest."""

    def end(self, step, reason):
        """Nothing to close."""


def train(case, config, told, task, ledger, say):
    """One case on this rank. Collective. step_s: by report; assignment: the last one; late: Pacer.missed_fraction."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=(AXIS,))
    pacer = Pacer(forward_s=told["pass_s"] / 3, backward_s=told["pass_s"] * 2 / 3)
    factor = case["slow"] if rank == ranks - 1 else 1.0
    model = task.build_model()
    optimizer, sync = make_optimizer(model, config.train), EveryStepSync(config.sync, AXIS, ledger)
    notes = Notes(say)
    with ExitStack() as stack:
        stepper = Stepper(
            model=stack.enter_context(sync.attached(model, optimizer, mesh)),
            optimizer=optimizer,
            sync=sync,
            loss=task.loss,
            precision=nullcontext,
            train=config.train,
        )
        stepper.rehearse(task.batch(0, rank))
        stack.enter_context(pacer.attached(model, task.workload))
        trainer = Trainer(
            task=Slowing(task, pacer, factor, case["slow_from"]),
            stepper=stepper,
            train=config.train,
            parts=checkpoint.Parts(model=model, optimizer=optimizer, sync=sync, ledger=ledger, rank=rank),
            group=mesh.get_group(AXIS),
            device=torch.device("cpu"),
            stop=StopRequest(),
            checkpoints=Path(told["checkpoints"]) / case["name"].replace(" ", "-"),
            reporter=notes if rank == 0 else None,
            assignment=tuple(case["assignment"]) or (config.sync.accumulate,) * ranks,
            by_speed=case["by_speed"],
        )
        trainer.run(0)
    return {"step_s": notes.step_s, "assignment": trainer.assignment, "late": pacer.missed_fraction}


def main(results, settings):
    """One rank."""
    told, environment = json.loads(settings), read_environment()
    config = RunConfig.model_validate(told["run"])
    place, ledger = environment.place, Ledger()
    torch.set_num_threads(1)
    backend.register(ledger)
    with process_group(place, backend.NAME, told["timeout_s"]), tempfile.TemporaryDirectory(prefix="thinwire-") as own:
        folder = [own]
        dist.broadcast_object_list(folder, 0)
        told["checkpoints"] = folder[0]
        task = make_task(config, Layout(data=place.world_size), environment)
        measured, steps = {}, config.train.steps
        for number, case in enumerate(told["cases"]):

            def say(event, number=number, name=case["name"]):
                done = number * steps + event.step
                tell(Path(told["progress"]), done, len(told["cases"]) * steps, f"{name}: {event.step_s:.3f} s a step")

            measured[case["name"]] = train(case, config, told, task, ledger, say)
        dist.barrier()
    if place.rank == 0:
        (Path(results) / "uneven.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
