"""RandomK on real ranks: the drawn places of the mean, nothing else on the wire, nothing lost."""

from math import ceil

import pytest
import torch
from averager_runs import (
    ONE_BUCKET,
    SHAPES,
    THREE_BUCKETS,
    averaged,
    check_conserved,
    check_equal_on_all_ranks,
    check_resumed,
    check_trained,
    mean_gradient,
    train,
)
from hypothesis import given
from hypothesis import strategies as st

from pool import Pool
from thinwire.compress.randomk import places

LONGER = [pytest.param(pool, marks=pytest.mark.long) for pool in ("ranks2", "ranks4")]
OPTIONS = {"kind": "randomk", "fraction": 0.05, "exclude": ()}


@given(st.integers(1, 5000), st.floats(0.001, 1), st.integers(0, 9))
def test_one_place_is_drawn_in_each_stratum(numel: int, fraction: float, count: int) -> None:
    k = ceil(fraction * numel)
    drawn = places("weight", count, numel, k).tolist()
    assert len(drawn) == k
    assert all(j * numel // k <= place < (j + 1) * numel // k for j, place in enumerate(drawn))
    assert drawn == places("weight", count, numel, k).tolist()


def test_every_place_comes_equally_often_and_names_and_steps_differ() -> None:
    hits = torch.zeros(1000)
    for count in range(1000):
        hits[places("weight", count, 1000, 10)] += 1
    assert hits.sum() == 10000 and hits.min() >= 1 and hits.max() <= 29  # 10 +- 3.1 each
    assert hits.view(10, 100).sum(1).tolist() == [1000] * 10
    assert places("a", 0, 1000, 10).tolist() != places("b", 0, 1000, 10).tolist() != places("b", 1, 1000, 10).tolist()


@pytest.mark.parametrize("pool", ["ranks3", *LONGER])
def test_the_drawn_places_of_the_mean_arrive_and_the_rest_is_kept(request: pytest.FixtureRequest, pool: str) -> None:
    """A reference of one process: where something was sent, all that has gathered there since the last time."""
    ranks: Pool = request.getfixturevalue(pool)
    reports = ranks.run(averaged, OPTIONS, 4, ONE_BUCKET, -1, True)
    check_equal_on_all_ranks(reports)
    check_conserved(reports)
    for name in SHAPES:
        waiting = torch.zeros(SHAPES[name], dtype=torch.float64)
        for step, results in enumerate(reports[0]["results"]):
            waiting += mean_gradient(name, step, len(reports))
            sent = results[name] != 0
            assert int(sent.sum()) == ceil(waiting.numel() / 20)
            torch.testing.assert_close(results[name].double(), waiting * sent, rtol=0, atol=1e-5)
            waiting *= ~sent
    assert reports[0]["sent"] == reports[0]["predicted"]
    assert len(reports[0]["sent"]) == 1 and min(reports[0]["work_s"]) > 0


def test_two_ranks_get_the_same_bits_in_any_buckets(ranks2: Pool) -> None:
    """More ranks within rounding only: which rank begins a sum depends on where in the message the value stands."""
    check_resumed(ranks2.run(averaged, OPTIONS, 3, ONE_BUCKET), ranks2.run(averaged, OPTIONS, 3, THREE_BUCKETS))


def test_four_ranks_get_the_same_within_rounding_in_any_buckets(ranks4: Pool) -> None:
    one = ranks4.run(averaged, OPTIONS, 3, ONE_BUCKET)[0]["results"]
    three = ranks4.run(averaged, OPTIONS, 3, THREE_BUCKETS)[0]["results"]
    for ours, theirs in zip(one, three, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_a_run_that_is_resumed_goes_on_bit_for_bit(ranks4: Pool) -> None:
    check_resumed(ranks4.run(averaged, OPTIONS, 6, THREE_BUCKETS), ranks4.run(averaged, OPTIONS, 6, THREE_BUCKETS, 3))


@pytest.mark.parametrize("pool", ["ranks3", *LONGER])
def test_training_sends_what_was_predicted(request: pytest.FixtureRequest, pool: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    check_trained(ranks.run(train, OPTIONS, 25))
