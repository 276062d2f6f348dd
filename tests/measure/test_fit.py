"""Fits recover what they were given, under noise and outliers."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.measure.fit import card_rates, estimate, mean_bps, split_latencies, steady_bps

seeds = st.integers(0, 10_000)


@given(rate_bps=st.floats(1e6, 1e11), burst=st.integers(0, 64 * 1024), stall_s=st.floats(0, 0.02), seed=seeds)
def test_a_stream_behind_a_token_bucket_shows_its_rate(rate_bps: float, burst: int, stall_s: float, seed: int) -> None:
    """The burst rides free; a receiver that was kept from its core for a while sees all bytes late, at once."""
    draw = random.Random(seed)
    seconds, moments = 0.5, sorted(draw.uniform(0, 0.5) for _ in range(200))
    stalled = draw.uniform(0.2, 0.4)
    arrivals = []
    for moment in moments:
        if stalled < moment < stalled + stall_s:
            continue
        arrivals.append((moment, burst + int(rate_bps / 8 * moment)))
    for measured in (steady_bps(arrivals, 0.35 * seconds, seconds), mean_bps(arrivals, 0.35 * seconds, seconds)):
        assert measured is not None
        assert measured == pytest.approx(rate_bps, rel=0.1)


def test_hardly_any_arrivals_give_no_slope() -> None:
    assert steady_bps([(0.1, 10), (0.2, 20)], 0.0, 1.0) is None
    assert mean_bps([], 0.0, 1.0) == 0.0


@given(st.lists(st.floats(1.0, 1e6), min_size=1, max_size=40))
def test_an_interval_holds_its_median_and_lies_in_the_samples(samples: list[float]) -> None:
    found = estimate(samples)
    assert min(samples) <= found.low <= found.value <= found.high <= max(samples)


def test_the_interval_holds_the_truth_nine_times_in_ten() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(500):
        found = estimate([draw.gauss(100, 5) for _ in range(15)])
        held += found.low <= 100 <= found.high
    assert held >= 0.87 * 500


def test_more_samples_narrow_the_interval() -> None:
    draw = random.Random(2)
    few, many = ([draw.gauss(100, 5) for _ in range(count)] for count in (5, 200))
    narrow, wide = estimate(many), estimate(few)
    assert narrow.high - narrow.low < 0.5 * (wide.high - wide.low)


@given(rate=st.floats(1e6, 1e10), hindered=st.integers(0, 2), seed=seeds)
def test_a_card_shows_in_the_flows_that_only_it_limits(rate: float, hindered: int, seed: int) -> None:
    draw = random.Random(seed)
    good = [rate * draw.uniform(0.97, 1.0) for _ in range(3)]
    for index in range(hindered):
        good[index] = rate * draw.uniform(0.1, 0.8)
    found = card_rates({0: good}, {0: [rate * draw.uniform(0.1, 0.5) for _ in range(6)]})[0]
    assert found.value == pytest.approx(rate, rel=0.04)


def test_a_card_that_was_only_paired_with_slow_ones_is_known_from_the_other_rounds() -> None:
    found = card_rates({0: [25.0, 25.0, 25.0]}, {0: [100.0, 98.0, 99.0, 25.0]})[0]
    assert found.value == pytest.approx(99, abs=1)


@given(
    cables=st.lists(st.floats(1e-6, 1e-2), min_size=4, max_size=9),
    uplinks=st.tuples(st.floats(0, 1e-2), st.floats(0, 1e-2)),
)
def test_latencies_add_up_to_those_of_the_pairs(cables: list[float], uplinks: tuple[float, float]) -> None:
    rack_of = {host: host % 2 for host in range(len(cables))}
    between = {
        (a, b): cables[a] + cables[b] + (sum(uplinks) if rack_of[a] != rack_of[b] else 0.0)
        for a in range(len(cables))
        for b in range(a)
    }
    found, up = split_latencies(between, len(cables), rack_of)
    scale = max(between.values())
    for (a, b), latency in between.items():
        sum_found = found[a] + found[b] + (sum(up.values()) if rack_of[a] != rack_of[b] else 0.0)
        assert sum_found == pytest.approx(latency, abs=0.01 * scale)
    assert min(*found, *up.values()) >= 0


def test_two_hosts_split_their_latency_evenly() -> None:
    assert split_latencies({(0, 1): 0.2}, 2, {})[0] == pytest.approx([0.1, 0.1], rel=1e-4)
    assert split_latencies({}, 2, {0: 0}) == ([0.0, 0.0], {0: 0.0})
