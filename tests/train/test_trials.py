"""Trials: successive halving finds the best of what it tries, with fewer steps than all in full; and real trials in the lab."""

import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command import TINY_RUN, thinwire
from thinwire.config.run import load_run
from thinwire.plan.calibration import read
from thinwire.plan.problem import problem_of
from thinwire.plan.search import search
from thinwire.train.outline import outline
from thinwire.train.trials import BUCKETS, contenders, halving, with_knobs


def arm(number: int, time_s: float = 1.0, step_s: float = 1.0) -> Any:
    return SimpleNamespace(number=number, plan=SimpleNamespace(time_s=time_s, step_s=step_s))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13])
def test_the_fastest_is_kept_and_most_steps_are_saved(count: int) -> None:
    """Noise is less the more steps a trial has; an arm that fails is never the winner."""
    spent = Counter[int]()

    def measure(one: Any, steps: int) -> float:
        spent[one.number] += steps
        return math.inf if one.number == 1 else 1.0 + 0.2 * one.number + (-1) ** one.number * 0.3 / steps

    trials = halving([arm(number) for number in reversed(range(count))], measure)
    assert trials[-1].arm.number == 0
    in_full = count * max(spent.values())
    assert sum(spent.values()) <= in_full and (count < 5 or sum(spent.values()) < 0.7 * in_full)


def test_a_slower_step_wins_where_it_needs_fewer_of_them() -> None:
    trials = halving([arm(0, time_s=100.0), arm(1, time_s=50.0)], lambda one, steps: 1.0 + 0.5 * one.number)
    assert trials[-1].arm.number == 1 and trials[-1].time_s == 75.0


@pytest.mark.long
def test_contenders_overlap_with_the_best_and_knobs_start_from_what_is_known() -> None:
    line = "2x1xcpu:10Gflop/s@20Mbit/s"
    problem = problem_of(None, ["train.sequence=64", "layout.data=2", "sync.kind=every_step"], line, "", outline)
    found = search(problem, refined=0)
    arms = contenders(problem, found, 5, line)
    assert arms[0].plan is found.best and all(one.plan.interval_s[0] > 0 for one in arms)
    reach = found.best.time_s * math.exp(2 * found.best.spread)
    assert all(one.plan.time_s <= reach for one in arms)
    tried = with_knobs(problem, arms[0], {})
    assert [one.knob[1] for one in tried] == list(BUCKETS)
    assert tried[0].config.sync.bucket_bytes >= 4 * problem.parameters > tried[1].config.sync.bucket_bytes
    assert [one.knob[1] for one in with_knobs(problem, arms[0], {"buckets": 4})] == [2, 4, 8]


@pytest.mark.lab
@pytest.mark.long
@pytest.mark.timeout(300)
def test_trials_keep_the_winner_and_teach(tmp_path: Path) -> None:
    """`thinwire plan --trials 2` on two hosts in a box, twice: the second begins with what the first has learnt."""
    (tmp_path / "text.txt").write_text("a thin wire " * 2000, encoding="utf-8")
    (tmp_path / "tiny.toml").write_text(TINY_RUN, encoding="utf-8")
    keeps = ("--set", "layout.data=2", "--set", "sync.kind=every_step", "--set", "sync.bucket_bytes=0", "--set", "train.steps=20")
    arguments = (
        "plan",
        "--run",
        "tiny.toml",
        "--cluster",
        "2x1xcpu:1Gflop/s@5Mbit/s",
        *keeps,
        "--trials",
        "2",
        "--write",
        "best.toml",
    )
    cache = str(tmp_path / "home")
    first = thinwire(*arguments, cwd=tmp_path, timeout_s=280, XDG_CACHE_HOME=cache)
    assert first.returncode == 0, first.stderr
    assert "winner: data 2" in first.stdout and "learnt" in first.stdout and "calibrated by" not in first.stdout
    assert load_run(tmp_path / "best.toml").layout.data == 2
    machine = read(tmp_path / "home" / "thinwire" / "calibration.toml").machines[0]
    assert len(machine.runs) == first.stdout.count("trial: ") and machine.name.startswith("2x1xcpu")
    planned = thinwire("plan", "--run", "tiny.toml", "--cluster", "2x1xcpu:1Gflop/s@5Mbit/s", cwd=tmp_path, XDG_CACHE_HOME=cache)
    assert "calibrated by" in planned.stdout, planned.stderr
