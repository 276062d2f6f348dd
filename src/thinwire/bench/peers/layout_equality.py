"""Losses of every layout beside those of one rank on the same tokens, in float64: for `thinwire bench equality`."""

import json
from contextlib import nullcontext
from functools import cache

import torch.distributed as dist

from thinwire.bench.peers.laid_out import LaidOut
from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.sync.single_rank import SingleRank
from thinwire.train.optimizers import make_optimizer
from thinwire.train.step import Stepper
from thinwire.train.task import new_task


def measure(rank):
    """The largest relative difference of the loss of a step, by case. A case: run.toml of the layout, and of one rank."""
    found, cases = {}, rank.settings["cases"]

    @cache
    def alone(run):
        return one_rank(RunConfig.model_validate(json.loads(run)), rank.environment.cache_folder)

    for number, case in enumerate(cases):
        losses = learn(RunConfig.model_validate(case["run"]), Layout(**case["layout"]), rank)
        if rank.place.rank == 0:
            expected = alone(json.dumps(case["alone"], sort_keys=True))
            errors = [abs(loss - wanted) / wanted for loss, wanted in zip(losses, expected, strict=True)]
            found[case["name"]] = max(errors)
            rank.report(number + 1, len(cases), f"{case['name']}: {max(errors):.1e}")
    return found


def one_rank(config, cache_folder):
    """Losses by step."""
    task, count = new_task(config, Layout(), cache_folder), config.sync.accumulate
    model = task.build_model()
    stepper = Stepper(
        model=model,
        optimizer=make_optimizer(model, config.train),
        sync=SingleRank(count),
        loss=task.loss,
        precision=nullcontext,
        train=config.train,
    )
    batches = ([task.batch(step, index) for index in range(count)] for step in range(config.train.steps))
    return [float(stepper.run(step, its, count).loss) for step, its in enumerate(batches)]


def learn(config, layout, rank):
    """Losses by step, the mean over the replicas. Collective."""
    trained = LaidOut(config, layout, rank.ledger, new_task(config, layout, rank.environment.cache_folder))
    losses = []
    for step in range(config.train.steps):
        loss = trained.step(step).double().reshape(1)
        dist.all_reduce(loss)
        losses.append(float(loss) / (layout.replicas * layout.seq * layout.tensor))  # of a pipeline one rank has it
    trained.close()
    return losses
