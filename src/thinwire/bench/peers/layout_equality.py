"""Losses of every layout beside those of one rank on the same tokens, in float64: for `thinwire bench equality`."""

from contextlib import nullcontext
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from thinwire.config.run import RunConfig
from thinwire.layout import AXES, Layout
from thinwire.sync.make import make_synchroniser
from thinwire.sync.single_rank import SingleRank
from thinwire.train.optimizers import make_optimizer
from thinwire.train.part import Place, take_part
from thinwire.train.step import Stepper
from thinwire.train.task import LanguageModel


def measure(rank):
    """The largest relative difference of the loss of a step, by case. A case: the sections of run.toml in which it differs."""
    found, cases, total = {}, rank.settings["cases"], rank.settings["micro_batches"]

    @cache
    def alone(optimizer, of_experts):
        run = merged(
            with_micro(rank.settings["run"], total, optimizer), {"model": rank.settings["experts"]} if of_experts else {}
        )
        return one_rank(RunConfig.model_validate(run), rank.environment.cache_folder)

    for number, case in enumerate(cases):
        config = RunConfig.model_validate(merged(with_micro(rank.settings["run"], total, case["optimizer"]), case["sections"]))
        layout = Layout(**case["layout"])
        sync = config.sync.model_copy(update={"accumulate": total // layout.replicas})
        losses = learn(config.model_copy(update={"sync": sync}), layout, rank)
        if rank.place.rank == 0:
            expected = alone(case["optimizer"], "model" in case["sections"])
            errors = [abs(loss - wanted) / wanted for loss, wanted in zip(losses, expected, strict=True)]
            found[case["name"]] = max(errors)
            rank.report(number + 1, len(cases), f"{case['name']}: {max(errors):.1e}")
    return found


def with_micro(run, total, optimizer):
    """Of so many micro-batches on one rank. Clipping is not linear, so replicas that differ go without."""
    plain = {"clip": 0, "optimizer": {"kind": "sgd", "momentum": 0.0}}
    return {**run, "sync": {"accumulate": total}, "train": {**run["train"], **(plain if optimizer == "sgd" else {})}}


def merged(run, sections):
    """`run`, with these keys of sections changed."""
    return {**run, **{name: {**run.get(name, {}), **section} for name, section in sections.items()}}


def one_rank(config, cache_folder):
    """Losses by step."""
    task = LanguageModel(config, Layout(), cache_folder)
    model = task.build_model()
    stepper = Stepper(
        model=model,
        optimizer=make_optimizer(model, config.train),
        sync=SingleRank(config.sync.accumulate),
        loss=task.loss,
        precision=nullcontext,
        train=config.train,
    )
    return [
        float(stepper.run(step, batches(task, step, 0, config), config.sync.accumulate).loss)
        for step in range(config.train.steps)
    ]


def learn(config, layout, rank):
    """Losses by step, the mean over the replicas. Collective."""
    mesh = init_device_mesh("cpu", layout.of_gradients.degrees, mesh_dim_names=AXES)
    task, replica = LanguageModel(config, layout, rank.environment.cache_folder), layout.replica(dist.get_rank())
    groups = {axis: mesh.get_group(axis) for axis in AXES}
    if layout.seq > 1:
        groups["seq"], _ = dist.new_subgroups_by_enumeration(layout.groups("seq"))
    part = take_part(task, config, Place(layout=layout, groups=groups, ledger=rank.ledger, device=torch.device("cpu")))
    sync = make_synchroniser(config.sync, config.compress, layout.of_gradients, rank.ledger)
    optimizer, losses = make_optimizer(part.module, config.train), []
    with sync.attached(part.module, optimizer, mesh) as attached:
        stepper = part.stepper(attached, optimizer, sync, task, config.train)
        stepper.rehearse(task.batch(0, replica))
        for step in range(config.train.steps):
            loss = stepper.run(step, batches(task, step, replica, config), config.sync.accumulate).loss.double().reshape(1)
            dist.all_reduce(loss)
            losses.append(float(loss) / (layout.replicas * layout.seq * layout.tensor))  # of a pipeline one rank has it
    part.close()
    return losses


def batches(task, step, replica, config):
    """Micro-batches of a replica."""
    count = config.sync.accumulate
    return [task.batch(step, replica * count + index) for index in range(count)]
