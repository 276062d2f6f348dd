"""The held-out loss of methods to exchange, trained on each rank's device on the same batches: for `thinwire bench gpu`."""

import torch
import torch.distributed as dist

from thinwire.bench.peers.device_steps import register, wrapped
from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.measure.compute import find_device
from thinwire.train.optimizers import make_optimizer
from thinwire.train.step import learning_rate
from thinwire.train.task import LanguageModel

__all__ = ["measure", "register"]


def measure(rank):
    """The losses of all seeds, by method."""
    methods, seeds = rank.settings["methods"], rank.settings["seeds"]
    losses = {name: [] for name in methods}
    for seed in range(seeds):
        run = rank.settings["run"]
        config = RunConfig.model_validate({**run, "train": {**run["train"], "seed": seed}})
        task = LanguageModel(config, Layout(data=rank.place.world_size), rank.environment.cache_folder)
        for number, name in enumerate(methods):
            rank.report(seed * len(methods) + number, seeds * len(methods), f"{name} learns, seed {seed}")
            losses[name].append(learn(task, config.train, rank, name))
    return losses


def learn(task, train, rank, name):
    """One method, one seed."""
    device = find_device(rank.environment.here[0])
    model, whole = (task.build_model().to(device) for _ in range(2))
    trained, hold = wrapped(model, name, device)
    optimizer = make_optimizer(model, train)
    for step in range(train.steps):
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(train, step)
        task.loss(trained, task.batch(step, rank.place.rank)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        optimizer.zero_grad()
    if hold is not None:
        hold.detach()
    with torch.no_grad():
        for mine, its in zip(whole.parameters(), model.parameters(), strict=True):
            mine.copy_(its.full_tensor() if hasattr(its, "full_tensor") else its)
    score = torch.tensor(task.score(whole, rank.place.rank), dtype=torch.float64, device=device)
    dist.all_reduce(score)
    return float(score[0] / score[1])
