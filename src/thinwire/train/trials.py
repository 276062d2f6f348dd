"""Short trials of plans that the planner cannot tell apart, and of knobs that its model does not know: the winner is kept.

Successive halving (Jamieson and Talwalkar 2016): all arms run for a few steps, the better half for twice as many, until one is
left. An arm's score is the seconds to the tokens that it needs, at the step that was measured. Plans are those whose intervals
overlap with the best one's, one of each family; then the knob of the winner, where it has one: in how many buckets gradients are
handed over, or how many steps fragments may be under way. What trials tell of the machine is for `plan.learn`.

In the lab where a cluster has several hosts, else on ranks of this machine.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thinwire.config.run import RunConfig, dump_run
from thinwire.errors import UserError
from thinwire.plan.candidates import Problem
from thinwire.plan.explain import family
from thinwire.plan.price import Priced, price
from thinwire.plan.problem import planned_run
from thinwire.plan.search import Found
from thinwire.record import RunFolder

STEPS = 12
"""Of the first trial; of three intervals, as the first one is cold."""
BUCKETS = (1, 2, 4, 8, 16)
OVERLAPS = (1, 2, 5, 10)
GRADIENT_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What is tried. knob: its name and value, ("", 0) without."""

    plan: Priced
    config: RunConfig
    knob: tuple[str, int] = ("", 0)

    def __str__(self) -> str:
        return f"{self.plan.candidate}, {self.knob[1]} {self.knob[0]}" if self.knob[0] else str(self.plan.candidate)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """An arm that ran for so many steps. time_s: to the tokens that it needs, at that rate; infinite where it failed."""

    arm: Arm
    steps: int
    step_s: float

    @property
    def time_s(self) -> float:
        return self.arm.plan.time_s * self.step_s / self.arm.plan.step_s


def halving(arms: Sequence[Arm], measure: Callable[[Arm, int], float], steps: int = STEPS) -> list[Trial]:
    """All trials in their order; the last one is the winner's. measure: seconds of a step, of so many."""
    trials: list[Trial] = []
    left = list(arms)
    while True:
        now = sorted((Trial(arm=arm, steps=steps, step_s=measure(arm, steps)) for arm in left), key=lambda one: -one.time_s)
        trials += now
        if len(left) <= 2:
            return trials
        left, steps = [one.arm for one in now[len(now) // 2 :]], 2 * steps


def contenders(problem: Problem, found: Found, most: int, cluster: str) -> list[Arm]:
    """Of each family the fastest whose interval overlaps with the best one's; no more than `most`."""
    best, shown = found.best, {family(found.best): found.best}
    for one in found.ranking:
        if one.time_s * math.exp(-one.spread) <= best.time_s * math.exp(best.spread) and one.hosts == best.hosts:
            shown.setdefault(family(one), one)
    return [Arm(plan=one, config=planned_run(one, problem, cluster)) for one in list(shown.values())[:most]]


def with_knobs(problem: Problem, arm: Arm, known: Mapping[str, int]) -> list[Arm]:
    """The arm with each value of its knob, that of `known` and its neighbours where there is one; alone where it has none."""
    plan, sync = arm.plan.candidate, arm.config.sync
    if (
        plan.sync == "every_step"
        and plan.layout.replicas > 1
        and plan.layout.pipe == 1
        and "sync.bucket_bytes" not in problem.kept
    ):
        whole = GRADIENT_BYTES * problem.parameters // plan.layout.tensor

        def bucketed(count: int) -> Arm:
            each = sync.model_copy(update={"bucket_bytes": math.ceil(whole / count)})
            return replace(arm, config=arm.config.model_copy(update={"sync": each}), knob=("buckets", count))

        return [bucketed(count) for count in _near(BUCKETS, known.get("buckets"))]
    if plan.sync == "streaming" and "sync.overlap" not in problem.kept:

        def overlapped(steps: int) -> Arm:
            priced = price(replace(plan, overlap=steps), problem)
            config = planned_run(priced, problem, arm.config.cluster.file)
            return Arm(plan=priced, config=config, knob=("steps of overlap", steps))

        return [overlapped(steps) for steps in _near(OVERLAPS, known.get("steps of overlap")) if steps < plan.every]
    return [arm]


def _near(values: Sequence[int], known: int | None) -> Sequence[int]:
    if known not in values:
        return values
    place = values.index(known)
    return values[max(0, place - 1) : place + 2]


@dataclass(frozen=True)
class Runs:
    """Runs arms as `thinwire train` does, one after the other, and keeps their folders. cluster: as the user has named it."""

    cluster: str
    hosts: int
    folder: Path
    tell: Callable[[str], None]

    def measure(self, arm: Arm, steps: int) -> float:
        """Seconds of a step; infinite, and a line, where a trial fails."""
        every = max(steps // 3, arm.plan.candidate.every)
        number = len(list(self.folder.glob("run*.toml")))
        path, out = self.folder / f"run{number}.toml", self.folder / f"run{number}"
        changes = {"steps": 3 * every, "log_every": every, "eval_every": 0, "warmup_steps": 0, "run": str(out)}
        dump_run(arm.config.model_copy(update={"train": arm.config.train.model_copy(update=changes)}), path)
        train = ["train", str(path)]
        if self.hosts > 1:
            train = ["lab", "run", "--cluster", self.cluster, "--", "thinwire", *train]
        done = subprocess.run([sys.executable, "-m", "thinwire", *train], capture_output=True, text=True, check=False)
        measured = RunFolder.open(out).measured() if done.returncode == 0 else None
        if measured is None:
            said = next((line for line in done.stderr.splitlines() if "error" in line), f"exit code {done.returncode}")
            self.tell(f"trial: {arm} failed: {said}")
            return math.inf
        predicted = arm.plan.step_s
        self.tell(
            f"trial: {arm}, {3 * every} steps: {measured.step_s:.4g} s a step, "
            + ("" if arm.knob[0] == "buckets" else f"predicted {predicted:.4g} s, ")
            + f"{Trial(arm=arm, steps=steps, step_s=measured.step_s).time_s:.4g} s in all"
        )
        return measured.step_s

    @property
    def folders(self) -> list[Path]:
        """Of those that have ended."""
        return [path.parent for path in sorted(self.folder.glob("run*/measured.json"))]


def tried(problem: Problem, found: Found, most: int, runs: Runs, known: Mapping[str, int]) -> Trial:
    """The winner's last trial. UserError where all fail."""
    arms = contenders(problem, found, most, runs.cluster)
    winner = halving(arms, runs.measure)[-1]
    knobs = with_knobs(problem, winner.arm, known)
    if len(knobs) > 1 and winner.step_s < math.inf:
        winner = min(halving(knobs, runs.measure)[-1], winner, key=lambda one: one.time_s)
    if winner.step_s == math.inf:
        raise UserError(f"none of {len(arms)} trials ran; thinwire lab check says what a lab needs")
    return winner
