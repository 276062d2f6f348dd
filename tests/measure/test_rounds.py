"""Who talks to whom: every pair, never two flows at one end."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.measure.rounds import across, everybody, inside, one_by_one, tournament

sizes = st.integers(2, 17)


@given(sizes)
def test_everyone_meets_everyone_once(num_hosts: int) -> None:
    rounds = tournament(num_hosts)
    met = Counter(frozenset(pair) for pairs in rounds for pair in pairs)
    assert set(met.values()) == {1}
    assert len(met) == num_hosts * (num_hosts - 1) // 2
    assert all(len({host for pair in pairs for host in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) <= num_hosts


@given(sizes, st.integers(0, 99))
def test_all_send_and_all_receive_and_each_ordered_pair_comes_once(num_hosts: int, seed: int) -> None:
    rounds = everybody(num_hosts, seed)
    for flows in rounds:
        assert sorted(a for a, _ in flows) == sorted(b for _, b in flows) == list(range(num_hosts))
    assert set(Counter(flow for flows in rounds for flow in flows).values()) == {1}


@given(sizes)
def test_alone_means_alone(num_hosts: int) -> None:
    rounds = one_by_one(num_hosts)
    assert all(len(flows) == 1 for flows in rounds)
    assert {flows[0][0] for flows in rounds} == {flows[0][1] for flows in rounds} == set(range(num_hosts))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.integers(1, 4))
def test_inside_a_group_everyone_sends_and_receives_often_enough(group_sizes: list[int], repetitions: int) -> None:
    hosts = iter(range(100))
    groups = [[next(hosts) for _ in range(size)] for size in group_sizes]
    group_of = {host: index for index, group in enumerate(groups) for host in group}
    rounds = inside(groups, repetitions)
    sent, received = Counter(a for flows in rounds for a, _ in flows), Counter(b for flows in rounds for _, b in flows)
    for flows in rounds:
        ends = [host for flow in flows for host in flow]
        assert len(ends) == len(set(ends)), "one way at a time"
        assert all(group_of[a] == group_of[b] for a, b in flows)
    for group in groups:
        for host in group:
            assert len(group) < 2 or min(sent[host], received[host]) >= repetitions


@given(st.lists(st.integers(1, 6), min_size=2, max_size=4))
def test_flows_across_leave_their_group_and_share_no_end(group_sizes: list[int]) -> None:
    hosts = iter(range(100))
    groups = [[next(hosts) for _ in range(size)] for size in group_sizes]
    for own, group in enumerate(groups):
        out, back = across(groups, own, {})
        assert back == [(b, a) for a, b in out]
        assert len(out) == min(len(group), sum(group_sizes) - len(group))
        assert all(a in group and b not in group for a, b in out)
        assert len({b for _, b in out}) == len(out)


def test_fast_hosts_load_an_uplink_first() -> None:
    out, _ = across([[0, 1], [2, 3, 4]], 0, {0: 1.0, 1: 9.0, 2: 1.0, 3: 5.0, 4: 9.0})
    assert out == [(1, 4), (0, 3)]


def test_rounds_do_not_grow_with_the_square() -> None:
    assert len(tournament(32)) == 31
    assert len(everybody(32)) == 31
    assert len(inside([list(range(32))], 3)) == pytest.approx(6, abs=2)
