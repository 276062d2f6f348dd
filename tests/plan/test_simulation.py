"""Simulated runs keep the laws that are known of failures, checkpoints, stragglers and quorums."""

import time
from dataclasses import replace
from math import sqrt

import numpy as np
import pytest
from test_search import by_name

from thinwire.layout import Layout
from thinwire.plan.explain import plain
from thinwire.plan.simulation import daly, expected, rounds, run, simulated


@pytest.mark.parametrize(("checkpoint_s", "mtbf_s"), [(10.0, 3600.0), (60.0, 7200.0), (5.0, 86400.0)])
def test_the_best_interval_is_that_of_young_and_daly(checkpoint_s: float, mtbf_s: float) -> None:
    """Simulated goodput is the closed form's, and no other interval is better."""
    lives = np.random.default_rng(0).exponential(mtbf_s, 200_000)
    best = daly(checkpoint_s, mtbf_s)
    assert best == pytest.approx(sqrt(2 * checkpoint_s * mtbf_s), rel=0.1)
    for times in (0.5, 1.0, 2.0):
        assert simulated(times * best, checkpoint_s, 0.0, lives) == pytest.approx(
            expected(times * best, checkpoint_s, 0.0, mtbf_s), rel=0.005
        )
    assert simulated(best, checkpoint_s, 60.0, lives) > max(simulated(x * best, checkpoint_s, 60.0, lives) for x in (0.5, 2.0))
    assert expected(best, checkpoint_s, 60.0, 1e12) == pytest.approx(best / (best + checkpoint_s))


def test_more_devices_fail_more_often_and_wait_longer() -> None:
    problem = by_name("4x8xa100-80gb@100Gbit/s")
    one = plain(problem)
    assert one is not None
    began = time.perf_counter()
    wide = replace(one, candidate=replace(one.candidate, layout=Layout(data=16384)))
    small, large = run(one, problem.parameters, 30), run(wide, problem.parameters, 30)
    assert time.perf_counter() - began < 20
    assert large.failures == pytest.approx(30 * 24 * 16384 / 50676, rel=0.25) and small.failures < large.failures
    assert large.goodput < small.goodput and large.goodput == pytest.approx(large.expected, abs=0.02)
    assert small.step_s == pytest.approx(one.step_s, rel=0.02)  # whose price has the mean straggler in it
    assert large.interval_s < small.interval_s


def test_a_quorum_pays_where_peers_come_and_go() -> None:
    """Whoever never leaves loses nothing by waiting for all but slowness; who leaves often holds up all that wait."""
    steady, round_s = rounds(500, 600.0, 1e12, 1.0, 1.0)
    assert round_s > 600 and 0.3 < steady < 0.6
    churn = {quorum: rounds(500, 600.0, 2 * 3600, 3600, quorum) for quorum in (1.0, 0.8, 0.02)}
    assert churn[0.8][0] > churn[1.0][0] > churn[0.02][0]
    assert churn[0.8][1] < churn[1.0][1]
    there = 2 / 3 * np.exp(-600 / 7200)
    assert rounds(2000, 600.0, 2 * 3600, 3600, 1.0)[0] < there
