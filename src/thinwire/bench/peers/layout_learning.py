"""The held-out loss of layouts that differ in what they send: for `thinwire bench layouts`."""

import torch
import torch.distributed as dist

from thinwire.bench.peers.laid_out import LaidOut
from thinwire.config.run import RunConfig
from thinwire.layout import Layout
from thinwire.train.task import LanguageModel


def measure(rank):
    """The losses by case, one for each seed: the same batches and first weights for all. A case: what run.toml says otherwise."""
    losses, cases, seeds = {}, rank.settings["cases"], rank.settings["seeds"]
    for number, case in enumerate(cases):
        for seed in seeds:
            run = {**rank.settings["run"], **case["run"]}
            config = RunConfig.model_validate({**run, "train": {**run["train"], "seed": seed}})
            losses.setdefault(case["name"], []).append(learn(config, Layout(**case["layout"]), rank))
            done, total = number * len(seeds) + seed + 1, len(cases) * len(seeds)
            rank.report(done, total, f"{case['name']}: {losses[case['name']][-1]:.4f}")
    return losses


def learn(config, layout, rank):
    """One case, one seed."""
    task = LanguageModel(config, layout, rank.environment.cache_folder)
    trained = LaidOut(config, layout, rank.ledger, task)
    for step in range(config.train.steps):
        trained.step(step)
    score = torch.tensor(trained.stepper.score(task, trained.part.module, trained.replica), dtype=torch.float64)
    dist.all_reduce(score)
    trained.close()
    return float(score[0] / score[1])
