"""What `thinwire plan` learns from runs, the trials that it makes itself, and what it says of long runs."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import typer

from thinwire.errors import UserError
from thinwire.units import parse, show

if TYPE_CHECKING:
    from thinwire.config.run import RunConfig
    from thinwire.plan.candidates import Problem
    from thinwire.plan.explain import Explained
    from thinwire.plan.price import Priced


def learn_from(runs: list[Path], path: Path) -> None:
    """Into the file, whatever can be learnt from; a line for each run that teaches nothing, and for each machine."""
    from thinwire.plan import calibration
    from thinwire.train.learn import learn, read_run

    before, ran = calibration.read(path), []
    for run in runs:
        try:
            ran.append(read_run(run))
        except UserError as error:
            typer.echo(f"not learnt from: {error}")
    after = learn(before, ran)
    for machine in after.machines:
        if machine not in before.machines:
            typer.echo(f"learnt {machine.about()}")
    if after == before:
        raise UserError(f"nothing new in {len(runs)} run{'s' if len(runs) > 1 else ''}; {path} is as it was")
    calibration.write(after, path)
    typer.echo(f"wrote {path}, which thinwire plan and train --plan auto take from now on; remove it to plan without")


def try_plans(explained: "Explained", cluster: str, most: int, path: Path) -> "tuple[Priced, RunConfig]":
    """The winner of trials, and its run; what they taught goes into the file. UserError where nothing can be tried."""
    from dataclasses import replace

    from thinwire.plan import calibration
    from thinwire.plan.problem import planned_run
    from thinwire.train.trials import Runs, tried

    problem = explained.problem
    if problem.rates is None or not cluster:
        raise UserError(f"--trials run on this machine, at declared compute rates; {problem.cluster.name} has none")
    if explained.best is not explained.found.best:
        raise UserError("--trials: one host is enough, so there are no plans of all hosts to try; leave it out")
    known = calibration.read(path).of(problem.cluster, calibration.software())
    with TemporaryDirectory(prefix="thinwire-") as folder:
        runs = Runs(cluster, len(problem.cluster.hosts), Path(folder), typer.echo)
        winner = tried(problem, explained.found, most, runs, known.knobs if known else {})
        learn_from(runs.folders, path)
    after = calibration.read(path)
    machine = after.of(problem.cluster, calibration.software())
    if winner.arm.knob[0] and machine is not None:
        name, value = winner.arm.knob
        calibration.write(after.with_machine(replace(machine, knobs={**machine.knobs, name: value})), path)
    typer.echo(f"winner: {winner.arm}: {winner.step_s:.4g} s a step, measured")
    config = winner.arm.config
    steps = planned_run(winner.arm.plan, problem, cluster).train.steps
    return winner.arm.plan, config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def rewire(problem: "Problem", ports: int) -> "Problem":
    """The same on hosts joined by cables that are chosen with the plan; says which."""
    from collections import Counter

    from thinwire.plan.optical import rewired

    found = rewired(problem, ports)
    names = [host.name for host in problem.cluster.hosts]
    shown = [f"{names[a]}-{names[b]}" + f" x {times}" * (times > 1) for (a, b), times in Counter(found.cables).items()]
    typer.echo(f"cables after {found.turns} turns: {', '.join(shown)}")
    return found.problem


def simulate_plan(explained: "Explained", days: float, churn: str) -> None:
    """Print what becomes of the plan in so many days. churn: how long replicas stay and are away, "2h/1h". UserError for replicas
    that cannot leave."""
    from thinwire.plan.simulation import best_quorum, run

    plan, churn_s = explained.best, _churn(churn)
    found, rare = run(plan, explained.problem.parameters, days), plan.candidate
    if churn_s and rare.layout.outer < 2:
        raise UserError(f"--churn: {rare} averages in each step, so nobody can leave; keep --set sync.kind=diloco or sparseloco")
    said = [
        f"simulated {days:g} days: a step of {show(found.step_s, 's')} on the mean, one of 100 above {show(found.latest_s, 's')}",
        f"  {found.failures} failures, one in {found.mtbf_s / 3600:.3g} h; a checkpoint each {found.interval_s / 60:.3g} minutes "
        f"stops it for {show(found.checkpoint_s, 's')}; goodput {found.goodput:.1%}, by Daly's law {found.expected:.1%}",
    ]
    if churn_s:
        tried = best_quorum(rare.layout.outer, rare.every * plan.step_s, *churn_s)
        (best, (part, round_s)), (all_part, all_s) = next(iter(tried.items())), tried[1.0]
        stay, away = (f"{one / 3600:.3g} h" for one in churn_s)
        said.append(
            f"  replicas stay for {stay} and are away for {away}: with a quorum of {best:.0%} a round takes "
            f"{round_s / 60:.3g} minutes and {part:.0%} of all work counts; if all are waited for, "
            f"{all_s / 60:.3g} minutes and {all_part:.0%}"
        )
    typer.echo("\n".join(said))


def _churn(text: str) -> tuple[float, float] | None:
    if not text:
        return None
    stay, slash, away = text.partition("/")
    seconds = [parse(part, "s") for part in (stay, away) if part]
    if not slash or len(seconds) < 2 or min(seconds) <= 0:
        raise UserError(f"--churn {text}: write how long replicas stay, and how long they are away: 2h/1h")
    return seconds[0], seconds[1]
