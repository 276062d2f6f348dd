"""A task of the catalogue, for `auto`: which way of the measured front its data ranks exchange by, on these links.

Its passes are counted (`tasks.costs`), and priced as those of any run; how many steps a way costs the front has measured on a
language model. Layout, micro-batches and steps stay as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from thinwire.cluster import load_cluster
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.candidates import Problem
from thinwire.tasks.catalogue import make_task
from thinwire.train.outline import outline_of_task
from thinwire.workload import Workload

CHOSEN = ("sync.", "compress.")


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskProblem(Problem):
    """A `Problem` whose model is a task's. passes: of one of its micro-batches; `shape` says nothing of it."""

    passes: Workload

    @cached_property
    def workload(self) -> Workload:
        """Of one micro-batch."""
        return self.passes


def task_problem(who: str, config: RunConfig, changes: Sequence[str], cluster: str, cache_folder: Path) -> TaskProblem:
    """cluster: "" for that of the run. UserError for data that are not there, and for what is not chosen here."""
    given = [change.partition("=")[0].strip() for change in changes]
    fixed = [key for key in given if key.startswith(CHOSEN) and key not in ("sync.accumulate", "sync.kind")]
    fixed += ["sync.kind"] * ("sync.kind" in given and config.sync.kind != "auto")
    if fixed:
        raise UserError(f"{who} chooses how ranks of a task exchange, and so {fixed[0]}; leave one of the two out")
    if config.layout.shard > 1:
        raise UserError(f"{who} wants a task's whole model on each rank; leave layout.shard = {config.layout.shard} out")
    task, found = make_task(config, Layout(), cache_folder), load_cluster(cluster or config.cluster.file)
    batch = config.train.micro_batch * config.sync.accumulate * found.world_size
    return TaskProblem(
        cluster=found,
        config=config,
        shape=config.model.shape(),
        batch=batch,
        tokens=float(config.train.steps * batch * task.items_each),
        outline=partial(outline_of_task, task.workload, task.num_sums),
        passes=task.workload,
    )
