"""`thinwire train --plan auto`: the plan of a run for the ranks that there are, of what can be launched on them; and where
`sync.kind = "auto"`, how their replicas exchange (`auto_sync`), with all else as it is. Of a task of the catalogue the plan is
that as well (`auto_task`).

Rank 0 plans and the others are told, since coding is timed where it runs. The batch stays as given; a plan whose exchanges cost
tokens trains as many more (`plan.penalties`). Plain data parallelism is kept unless a plan is predicted to be sooner by more than
predictions of a step may be off: on links that are fast beside the compute nothing gains as much as it may cost.
"""

import tomllib
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import NamedTuple

import tomli_w
from torch.distributed import TCPStore

from thinwire.config.run import RunConfig, load_run
from thinwire.environment import Environment, read_environment
from thinwire.errors import UserError
from thinwire.plan import calibration
from thinwire.plan.candidates import Problem
from thinwire.plan.cost import ranks_per_core
from thinwire.plan.explain import explain, family, limit, show_time, slower, waterfall
from thinwire.plan.problem import planned_run, problem_of
from thinwire.plan.search import search
from thinwire.record import RunFolder
from thinwire.tomlfile import validate
from thinwire.train.auto_sync import about, choices
from thinwire.train.auto_task import task_problem
from thinwire.train.outline import outline
from thinwire.train.runtime import share_text
from thinwire.units import show

REFUSED = "!"


class Planned(NamedTuple):
    """The run; three lines: what was chosen, why, what plain DDP would take, and a fourth of what runs have taught; predicted
    seconds in all of plain DDP, 0 where it does not fit or is the plan."""

    config: RunConfig
    lines: list[str]
    plain_s: float

    def saved(self, folder: Path) -> str:
        """After the run: what the choice has saved. "" where there is nothing to compare."""
        measured = RunFolder.open(folder).measured()
        if not self.plain_s or measured is None:
            return ""
        took_s = measured.step_s * self.config.train.steps
        what = f"saved {show_time(self.plain_s - took_s)}" if took_s < self.plain_s else "saved nothing"
        return (
            f"the plan took {show_time(took_s)} of steps; plain DDP to the same loss, predicted: {show_time(self.plain_s)}, "
            f"{self.plain_s / took_s:.2f} times as long: {what}"
        )


def auto(run: Path | None, changes: list[str], cluster: str, learnt: Path | None = None, *, in_lab: bool = False) -> Planned:
    """cluster: "" for that of the run. learnt: a calibration file, if there is one. in_lab: whose hosts share the cores of this
    machine."""
    problem, calibrated = _problem("--plan auto", run, changes, cluster, learnt, in_lab=in_lab)
    if not problem.config.task.is_language_model:
        return _exchange_of(problem, calibrated, cluster)
    explained = explain(problem, search(problem), asks=False)
    best, plain = explained.best, explained.plain
    enough = exp(best.spread)
    if plain is not None and plain.time_s <= best.time_s * enough:
        best = plain
    config = planned_run(best, problem, cluster or problem.config.cluster.file)
    others = [one for one in explained.found.ranking if family(one) != family(best)]
    behind = ""
    if others and best is plain and (times := best.time_s / others[0].time_s) > 1:
        behind = f"; {others[0].candidate} is {times:.2f} times as fast, predicted, and {enough:.2f} times is relied on"
    elif others:
        behind = f"; next {others[0].candidate}, {slower(others[0], best)}"
    lines = [
        f"plan: {best.candidate}, {config.train.steps} steps of {waterfall(best)}, predicted",
        f"  because: limited by {limit(best)}{behind}",
    ]
    if plain is None:
        lines.append("  plain DDP would not fit")
    elif family(plain) == family(best):
        lines.append("  that is what plain DDP does")
    else:
        lines.append(f"  plain DDP would take {show(plain.step_s, 's')} a step, {slower(plain, best)}, predicted")
    compared = plain is not None and family(plain) != family(best)
    return Planned(config, lines + [f"  {calibrated}"] * bool(calibrated), plain.time_s if plain and compared else 0.0)


def auto_sync(run: Path | None, changes: list[str], cluster: str, learnt: Path | None = None, *, in_lab: bool = False) -> Planned:
    """The same of a run whose sync.kind is "auto": one line, two with what runs have taught. UserError where links or rates are
    not known."""
    if not cluster and not load_run(run, changes).cluster.file:
        raise UserError(
            "sync.kind = 'auto' chooses for the links between the ranks, which are not known; measure them (thinwire probe -o "
            "cluster.toml, by your launcher), and name the file in cluster.file"
        )
    problem, calibrated = _problem("sync.kind = 'auto'", run, changes, cluster, learnt, in_lab=in_lab)
    return _exchange_of(problem, calibrated, "")


def _exchange_of(problem: Problem, calibrated: str, cluster: str) -> Planned:
    """As `auto_sync`. cluster: which the run is then on; "" for its own."""
    found = choices(problem)
    config, plain = found[0].config, next((one for one in found if one.way.method == "ddp"), found[0])
    if cluster:
        config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"file": cluster})})
    plain_s = plain.time_s * config.train.steps if cluster and plain is not found[0] else 0.0
    return Planned(config, [about(found, problem)] + [f"  {calibrated}"] * bool(calibrated), plain_s)


def _problem(
    who: str, run: Path | None, changes: list[str], cluster: str, learnt: Path | None, *, in_lab: bool
) -> tuple[Problem, str]:
    """With what runs have taught, and a line about it. UserError without compute rates."""
    config = load_run(run, changes)
    if config.task.is_language_model:
        problem = replace(problem_of(run, changes, cluster, "", outline), times=(1,))
    else:
        problem = task_problem(who, config, changes, cluster, read_environment().cache_folder)
    if in_lab:
        problem = replace(problem, ranks_per_core=ranks_per_core(problem.cluster.world_size))
    problem, calibrated = calibration.read(learnt).applied(problem) if learnt else (problem, "")
    if problem.rates is None:
        raise UserError(
            f"{who} prices what can be launched, by compute rates, and {problem.cluster.name} has none for its "
            f"{problem.cluster.world_size} ranks; measure it (thinwire probe), and name the file in cluster.file"
        )
    return problem, calibrated


def auto_of_ranks(run: Path | None, changes: list[str], environment: Environment, store: TCPStore, *, plans: bool) -> Planned:
    """The same, of ranks that a launcher has started: rank 0 plans for all, and the others know the run only. plans: as `auto`,
    else as `auto_sync`. Collective."""
    place, text = environment.place, ""
    planned = None
    assert place is not None, "a launcher has started this process"
    if place.rank == 0:
        try:
            lab = environment.lab
            cluster, learnt = str(lab.cluster) if lab else "", environment.cache_folder / calibration.FILE
            planned = (auto if plans else auto_sync)(run, changes, cluster, learnt, in_lab=lab is not None)
            print("\n".join(planned.lines), flush=True)
            text = tomli_w.dumps(planned.config.model_dump(mode="json", exclude_none=True))
        except UserError as error:
            text = REFUSED + str(error)
    text = share_text(place, store, "plan", text)
    if text.startswith(REFUSED):
        raise UserError(text.removeprefix(REFUSED))
    return planned or Planned(validate(RunConfig, tomllib.loads(text), "the plan"), [], 0.0)
