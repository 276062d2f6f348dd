"""The held-out loss of pipelines that differ in what crosses between stages: for `thinwire bench layouts`."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.config.run import RunConfig
from thinwire.layout import AXES, Layout
from thinwire.sync.make import make_synchroniser
from thinwire.train.optimizers import make_optimizer
from thinwire.train.part import Place, take_part
from thinwire.train.task import LanguageModel


def measure(rank):
    """The losses by case, one for each seed: the same batches and first weights for all."""
    layout = Layout(pipe=rank.place.world_size)
    mesh = init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)
    losses, cases, seeds = {}, rank.settings["cases"], rank.settings["seeds"]
    for number, case in enumerate(cases):
        for seed in seeds:
            run = rank.settings["run"]
            content = {**run, "pipeline": case["options"], "train": {**run["train"], "seed": seed}}
            losses.setdefault(case["name"], []).append(learn(RunConfig.model_validate(content), layout, mesh, rank))
            rank.report(
                number * len(seeds) + seed + 1, len(cases) * len(seeds), f"{case['name']}: {losses[case['name']][-1]:.4f}"
            )
    return losses


def learn(config, layout, mesh, rank):
    """One case, one seed."""
    task = LanguageModel(config, layout, rank.environment.cache_folder)
    groups = {axis: mesh.get_group(axis) for axis in AXES}
    part = take_part(task, config, Place(layout=layout, groups=groups, ledger=rank.ledger, device=torch.device("cpu")))
    sync, optimizer = (
        make_synchroniser(config.sync, config.compress, layout, rank.ledger),
        make_optimizer(part.module, config.train),
    )
    with sync.attached(part.module, optimizer, mesh) as attached:
        stepper = part.stepper(attached, optimizer, sync, task, config.train)
        stepper.rehearse(task.batch(0, 0))
        for step in range(config.train.steps):
            batches = [task.batch(step, index) for index in range(config.sync.accumulate)]
            stepper.run(step, batches, len(batches))
        score = torch.tensor(stepper.score(task, part.module, 0), dtype=torch.float64)
    dist.all_reduce(score)
    return float(score[0] / score[1])
