"""A `Problem` from what a person gives: a run.toml, what --set keeps, a cluster, a model by name, tokens."""

from dataclasses import replace
from math import ceil, log2, prod
from pathlib import Path

from thinwire.cluster import load_cluster
from thinwire.config.run import RunConfig, load_run
from thinwire.errors import UserError
from thinwire.plan.candidates import MOST_RANKS, Outline, Problem
from thinwire.plan.price import Priced

VARIED = ("layout", "sync", "compress", "pipeline", "tensor", "sharded", "train.micro_batch", "train.recompute")
"""Sections and keys that are planned, unless --set keeps them."""
LONGEST = 2048
"""Tokens of a sequence, where nothing is said."""
BATCHES = ((1e9, 0.5e6), (5e9, 1e6), (100e9, 2e6), (float("inf"), 3.2e6))
"""Tokens of a step for models up to so many parameters, where nothing is said: Brown et al. 2020, table 2.1."""
SMALL = 100e6
"""Parameters below which train.micro_batch on each rank is the batch that is meant."""


def problem_of(
    run: Path | None, changes: list[str], cluster: str, model: str, outline: Outline | None, batch_tokens: float = 0.0
) -> Problem:
    """cluster: as `load_cluster`, "" for the run's own. model: a preset, in capitals or not; "": the run's own. batch_tokens: of
    a step, 0: the run's own, or usual ones. Tokens are those of train.steps. UserError in one line."""
    given = [change.partition("=")[0].strip() for change in changes]
    if model:
        changes = [*changes, f'model.preset="{model.lower()}"']
    config = load_run(run, changes)
    config.task.only_language_model("thinwire plan")
    if model and run is None and "train.sequence" not in given:
        config = load_run(run, [*changes, f"train.sequence={min(config.model.context, LONGEST)}"])
    where = cluster or config.cluster.file
    if not where:
        raise UserError("nothing to plan for: give --cluster, a file, a shipped name, or a line such as 4x8xa100-80gb@1Gbit/s")
    found = Problem(
        cluster=load_cluster(where),
        config=config,
        shape=config.model.shape(),
        batch=1,
        tokens=1.0,
        kept=frozenset(
            key
            for key in given
            if key.startswith(VARIED) and "." in key and not (key == "sync.kind" and config.sync.kind == "auto")
        ),
        outline=outline,
    )
    train, usual = config.train, run is None and not {"train.micro_batch", "sync.accumulate"} & set(given)
    if batch_tokens or (usual and found.parameters > SMALL):
        tokens = batch_tokens or next(size for most, size in BATCHES if found.parameters <= most)
        batch = 2 ** max(0, round(log2(tokens / train.sequence)))
    else:
        batch = train.micro_batch * config.sync.accumulate * found.cluster.world_size
    return with_batch(found, batch)


def with_batch(problem: Problem, batch: int) -> Problem:
    """Of so many sequences, and as many tokens as train.steps makes of them."""
    train = problem.config.train
    return replace(problem, batch=batch, tokens=float(train.steps * batch * train.sequence))


def steps_of(one: Priced, problem: Problem) -> int:
    """Of the run: its tokens, and those that the plan needs more."""
    return max(1, ceil(problem.tokens * prod(one.penalties.values()) / one.tokens_per_step - 1e-9))


def planned_run(one: Priced, problem: Problem, cluster: str) -> RunConfig:
    """The run.toml of a plan, for `thinwire train`. UserError for one that it cannot launch."""
    if not one.candidate.launched:
        raise UserError(f"{one.candidate}: thinwire train cannot launch this; leave --beyond out for a plan that it can")
    config = one.candidate.config(problem)
    train = config.train.model_copy(update={"steps": steps_of(one, problem)})
    if one.hosts == len(problem.cluster.hosts):
        return config.model_copy(update={"train": train, "cluster": config.cluster.model_copy(update={"file": cluster})})
    ranks = one.candidate.layout.world_size
    alone = config.cluster.model_copy(update={"file": ""})
    return config.model_copy(update={"train": train.model_copy(update={"ranks": ranks}), "cluster": alone})


def about(problem: Problem, considered: int) -> str:
    """What was planned, in a line or two."""
    train, cluster = problem.config.train, problem.cluster
    kinds = " and ".join(sorted({device.kind for device in cluster.devices}))
    how = "compute rates of the cluster file" if problem.rates is not None else "data sheets: predicted, not run"
    if problem.rates is None and cluster.declared_rates is not None:
        how += f" (more than {MOST_RANKS} ranks are not priced one by one, so flops_per_s is not used)"
    return (
        f"{cluster.name}: {len(cluster.hosts)} hosts, {cluster.world_size} x {kinds}; {counted(problem.parameters)} parameters, "
        f"{counted(problem.tokens)} tokens, "
        f"{problem.batch} x {train.sequence} a step; {considered:,} plans considered, by {how}"
    )


def counted(number: float) -> str:
    """967M, 20B."""
    name, size = next(
        ((name, size) for name, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)) if number >= 0.9995 * size), ("", 1.0)
    )
    return f"{number / size:.3g}{name}"
