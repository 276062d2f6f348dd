"""The held-out loss of stock FSDP2 on stock gloo and of `compress_sharded` on the metered backend: for `thinwire bench fsdp`."""

import torch
import torch.distributed as dist

from thinwire.bench.peers.step_turns import mesh_of, shard, take_step
from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.train.optimizers import make_optimizer
from thinwire.train.step import learning_rate
from thinwire.train.task import LanguageModel


def measure(rank):
    """The loss of the float32 weights for each seed, by contender: the same batches and first weights for both."""
    native = dist.new_group(backend="gloo")
    losses = {"native": [], "ours": []}
    for seed in rank.settings["seeds"]:
        run = rank.settings["run"]
        config = RunConfig.model_validate({**run, "train": {**run["train"], "seed": seed}})
        task = LanguageModel(config, Layout(data=rank.place.world_size), rank.environment.cache_folder)
        losses["native"].append(learn(task, config.train, rank, native, None))
        losses["ours"].append(learn(task, config.train, rank, dist.group.WORLD, rank.settings["codecs"]))
    return losses


def learn(task, train, rank, group, codecs):
    """One contender, one seed."""
    model, whole = task.build_model(), task.build_model()
    compression = shard(model, mesh_of(group, rank.settings["shards"]), rank.ledger, codecs)
    optimizer = make_optimizer(model, train)
    for step in range(train.steps):
        for parameters in optimizer.param_groups:
            parameters["lr"] = learning_rate(train, step)
        take_step(model, optimizer, *task.batch(step, rank.place.rank))
    if compression:
        compression.detach()
    with torch.no_grad():
        for mine, trained in zip(whole.parameters(), model.parameters(), strict=True):
            mine.copy_(trained.full_tensor())
    score = torch.tensor(task.score(whole, rank.place.rank), dtype=torch.float64)
    dist.all_reduce(score)
    return float(score[0] / score[1])
