"""Learning from runs: planted factors are found, what was not seen is predicted better, and what is stored says what it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from thinwire.cluster import load_cluster
from thinwire.config.run import load_run
from thinwire.errors import UserError
from thinwire.plan.calibration import NOTHING, PSEUDO, SPREAD, Calibration, Factors, Machine, half_width, read, write
from thinwire.plan.price import price
from thinwire.plan.problem import problem_of
from thinwire.plan.search import search
from thinwire.record import Record, StepCost
from thinwire.train.learn import Ran, learn, update
from thinwire.train.outline import outline

CLUSTER = "4x1xcpu:10Gflop/s@100Mbit/s"
TRUE = Factors(computing=1.25, links=1.1, calls=6.0, coding=1.0, optimizer=3.0)
PLANS = (
    ["train.micro_batch=2"],
    ["train.micro_batch=8", "sync.bucket_bytes=65536"],
    ["train.micro_batch=4", "sync.bucket_bytes=262144"],
    ["train.micro_batch=2", "sync.accumulate=3"],
    ["train.micro_batch=16", "sync.bucket_bytes=1048576"],
    ["train.micro_batch=2", "sync.kind=diloco", "sync.every=2"],
    ["train.micro_batch=1", "sync.bucket_bytes=32768"],
    ["train.micro_batch=6"],
)


def ran(changes: list[str], number: int, slower: float = 1.0, true: Factors = TRUE, cluster: str = CLUSTER) -> Ran:
    """A run that took what a machine with those factors takes, and so many times as long."""
    config = load_run(None, ["model.layers=2", "train.sequence=64", *changes])
    record = Record(thinwire="1", torch="2+cpu", started=f"day {number}", world_size=4, hosts=("a",) * 4)
    layout = config.layout.resolve(4, rare=config.sync.rare)
    blank = StepCost(step_s=1.0)
    one = Ran(config=config, layout=layout, cluster=load_cluster(cluster), record=record, measured=blank)
    computing, wires, optimizer = slower * one.terms(np.log(true))
    seen = StepCost(
        step_s=computing + wires + optimizer, compute_s=computing, exposed_s=wires, waiting_s=0.0, optimizer_s=optimizer
    )
    return replace(one, measured=seen)


def missed(machine: Machine, runs: list[Ran]) -> float:
    """Median error of a step, as the machine is known."""
    return float(np.median([abs(run.terms(np.array(machine.mean)).sum() / run.measured.step_s - 1) for run in runs]))


@pytest.fixture(scope="module")
def runs() -> list[Ran]:
    draw = np.random.default_rng(1)
    return [ran(plan, number, slower=float(np.exp(0.02 * draw.standard_normal()))) for number, plan in enumerate(PLANS)]


def test_what_is_planted_is_found_and_runs_that_were_not_seen_are_predicted(runs: list[Ran]) -> None:
    before = Machine(name="x")
    after = update(before, runs[:5])
    assert missed(after, runs[5:]) < 0.03 < 0.12 < missed(before, runs[5:])
    assert after.factors.computing == pytest.approx(TRUE.computing, rel=0.05)
    assert after.factors.links == pytest.approx(TRUE.links, rel=0.1)
    assert after.deviation.computing < 0.3 * SPREAD.computing
    assert after.deviation.coding > 0.9 * SPREAD.coding  # of which no run tells anything
    without_itself = [abs(run.error) for run in after.runs]
    assert np.median(without_itself) < 0.05 and all(run.uncalibrated_s < run.measured_s for run in after.runs)


@pytest.mark.long
def test_an_outlier_spoils_nothing(runs: list[Ran]) -> None:
    broken = ran(PLANS[2], 99, slower=4.0)
    assert missed(update(Machine(name="x"), [broken, *runs[:4]]), runs[5:]) < 0.05
    few = update(Machine(name="x"), [broken])
    assert few.factors.computing < 1.6  # and alone it is not believed


def test_without_runs_nothing_changes(tmp_path: Path) -> None:
    problem = problem_of(None, ["train.sequence=64"], CLUSTER, "", outline)
    assert read(tmp_path / "none").applied(problem) == (problem, "")
    assert half_width([]) == pytest.approx(0.10) and len(PSEUDO) == 5
    same = Factors().cluster(problem.cluster)
    assert same.declared_rates == problem.cluster.declared_rates and same.links == problem.cluster.links
    assert learn(Calibration(), []) == Calibration()


@pytest.mark.long
def test_a_run_is_learnt_once_and_starts_what_comes_next(runs: list[Ran], tmp_path: Path) -> None:
    """By machine and software; another machine begins with what is known of this one."""
    first = learn(Calibration(), runs[:3])
    write(first, tmp_path / "folder" / "c.toml")
    stored = read(tmp_path / "folder" / "c.toml")
    assert stored.machines[0].runs == first.machines[0].runs
    assert learn(stored, runs[:3]) is stored
    second = learn(stored, runs[3:5])
    assert len(second.machines) == 1 and len(second.machines[0].runs) == 5
    assert second.machines[0].software == "thinwire 1, torch 2"
    other = second.of(load_cluster("2x1xcpu:10Gflop/s@100Mbit/s"), "new")
    assert other is not None and not other.runs and 1.1 < other.factors.computing < TRUE.computing
    newer = [replace(run, record=run.record.model_copy(update={"thinwire": "2"})) for run in runs[5:]]
    both = learn(second, newer)
    assert [one.software for one in both.machines] == ["thinwire 1, torch 2", "thinwire 2, torch 2"]
    (tmp_path / "bad.toml").write_text("[[machine]]\nname = 1\n")
    with pytest.raises(UserError, match="remove it to begin anew"):
        read(tmp_path / "bad.toml")


@pytest.mark.long
def test_a_plan_is_priced_as_the_run_was_learnt(runs: list[Ran]) -> None:
    """The planner's step is that of the machine, its interval that of the runs."""
    problem = problem_of(
        None, ["model.layers=2", "train.sequence=64", "layout.data=4", "sync.kind=every_step"], CLUSTER, "", outline
    )
    known = learn(Calibration(), runs)
    applied, line = known.applied(problem)
    best = search(applied).best
    assert best.spread == known.machines[0].half_width != price(best.candidate, problem).spread
    assert best.step_s > price(best.candidate, problem).step_s and "held" in line
    config = best.candidate.config(problem)
    again = replace(runs[0], config=config, layout=best.candidate.layout).terms(np.array(known.machines[0].mean))
    assert again.sum() == pytest.approx(best.step_s, rel=1e-6)


def test_intervals_hold_what_they_say() -> None:
    """Of runs that were not learnt from, whatever their spread."""
    draw = np.random.default_rng(2)
    held = []
    for _ in range(400):
        errors = draw.normal(0, 0.3, 31)
        held.append(abs(errors[-1]) <= half_width(errors[:-1].tolist()))
    assert 0.72 < np.mean(held) < 0.88
    assert half_width([5.0]) < 0.15 and tuple(np.log(Factors())) == NOTHING
