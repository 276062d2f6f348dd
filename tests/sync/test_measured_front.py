"""The measured front, carried to other runs than those that made it."""

import csv
from dataclasses import replace
from importlib import resources
from statistics import mean

import pytest

from thinwire.sync.front import lasting, of_rare, ways


def test_a_row_is_as_measured_where_it_was_measured_and_less_in_longer_runs_and_larger_models() -> None:
    for way in ways():
        measured = max(1.0, way.steps_over_ddp)
        assert way.times(way.parameters, way.replicas, way.steps) == pytest.approx(measured)
        longer, larger = way.times(way.parameters, way.replicas, 1e9), way.times(1e9, way.replicas, way.steps)
        assert 1 <= longer <= measured and 1 <= larger <= measured
        assert way.every or longer == larger == measured
        assert way.times(way.parameters, way.replicas, way.steps / 10) >= measured
        assert way.times(way.parameters, 2 * way.replicas, 1e9) >= longer
        assert replace(way, steps_over_ddp=0.9).times(1e6, 4, 300) == 1


def test_a_method_of_several_rows_is_one_way_which_needs_their_mean() -> None:
    with (resources.files("thinwire.sync") / "front.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "retrace4-ternary-all-nofeedback"]
    assert len({(row["parameters"], row["data"]) for row in rows}) > 2
    (way,) = (one for one in ways() if one.method == rows[0]["method"])
    assert way.steps_over_ddp == pytest.approx(mean(float(row["steps_over_ddp"]) for row in rows))
    assert len({one.method for one in ways()}) == len(ways())


@pytest.mark.parametrize("kind", ["diloco", "streaming", "sparseloco"])
def test_ways_that_the_planner_tries_are_of_the_nearest_row(kind: str) -> None:
    """At its model and its H what was measured; more for a longer period, for more overlap, in a shorter run."""
    usual = [way for way in ways() if way.run["sync"]["kind"] == kind and way.usual]
    for way in usual:
        least = min(one.steps_over_ddp for one in usual if one.every == way.every)
        assert of_rare(kind, way.parameters, way.replicas, way.every, 0, way.steps) == pytest.approx(max(1.0, least))
    costs = [of_rare(kind, 335e6, 4, every, 0, 20_000) for every in (30, 100, 300)]
    assert 1 <= costs[0] <= costs[1] <= costs[2] < 2 and costs[0] < costs[2]
    assert of_rare(kind, 335e6, 4, 30, 5, 20_000) > costs[0] and of_rare(kind, 335e6, 4, 30, 0, 300) > costs[0]


def test_a_long_run_costs_what_was_published() -> None:
    """A loss of 0.9 % more costs 13.5 % more tokens."""
    assert of_rare("diloco", 335e6, 4, 30, 0, 1e9) == pytest.approx(1.135) == 1 + lasting(335e6, 4, 30)
    assert lasting(1e12, 2, 30) == lasting(10e9, 2, 30) == 0 and lasting(1e6, 4, 30) == lasting(35e6, 4, 30)
    assert lasting(335e6, 16, 30) > lasting(335e6, 8, 30) and lasting(335e6, 4, 60) == pytest.approx(15 * (0.009 + 0.0046))
    assert lasting(335e6, 4, 2) == lasting(335e6, 4, 30)


def test_large_batches_need_feedback() -> None:
    """With few tokens of a replica the noise of gradients stands in for it, and hides that steps are taken from old places."""
    for way in ways():
        few, many = (way.times(1e6, 4, 1000, tokens=tokens) for tokens in (256, 2048))
        retraces = way.run["sync"]["kind"] == "retrace"
        assert many == pytest.approx(few + (0.28 if retraces else 0.0 if way.every or way.feeds_back else 0.14))
    assert any(not way.feeds_back for way in ways())
