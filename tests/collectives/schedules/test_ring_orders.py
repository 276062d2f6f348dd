"""Orders of rings: on trees every link is crossed once in each direction; elsewhere the greatest edge is the least there is."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import pytest
from all_networks import networks
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.cluster import Cluster, load_cluster, shipped_clusters
from thinwire.cluster.graph import Routes
from thinwire.collectives.schedules import orders
from thinwire.collectives.schedules.orders import min_max_order, ring_order

costs = st.integers(0, 5)


def busiest_s(cluster: Cluster, order: Sequence[int]) -> float:
    loads = Routes(cluster).load((order[i - 1], order[i], 1) for i in range(len(order)))
    return max((bits / link.bandwidth_bps.value for link, bits in loads.items()), default=0.0)


def cost(seconds: Sequence[Sequence[float]], order: Sequence[int]) -> tuple[float, float]:
    edges = [seconds[order[i - 1]][order[i]] for i in range(len(order))]
    return max(edges), sum(edges)


@given(cluster=networks(loops=0))
def test_on_a_tree_each_link_is_crossed_once_in_each_direction(cluster: Cluster) -> None:
    order = ring_order(cluster)
    assert sorted(order) == list(range(cluster.world_size)) and order[0] == 0
    loads = Routes(cluster).load((order[i - 1], order[i], 1) for i in range(len(order)))
    assert set(loads.values()) <= {1}


@given(cluster=networks(loops=3))
def test_on_any_network_it_is_no_worse_than_the_order_of_ranks(cluster: Cluster) -> None:
    order = ring_order(cluster)
    assert sorted(order) == list(range(cluster.world_size)) and order[0] == 0
    assert busiest_s(cluster, order) <= busiest_s(cluster, range(cluster.world_size))


@settings(max_examples=60)
@given(data=st.data(), p=st.integers(1, 7))
def test_few_ranks_get_the_best_order(data: st.DataObject, p: int) -> None:
    """Against all orders."""
    seconds = data.draw(st.lists(st.lists(costs, min_size=p, max_size=p), min_size=p, max_size=p))
    order = min_max_order(seconds)
    assert order[0] == 0 and sorted(order) == list(range(p))
    assert cost(seconds, order) == min(cost(seconds, (0, *rest)) for rest in permutations(range(1, p)))


@settings(max_examples=20)
@given(data=st.data(), p=st.integers(13, 15))
def test_many_ranks_get_one_that_is_no_worse_than_their_own(data: st.DataObject, p: int) -> None:
    seconds = data.draw(st.lists(st.lists(costs, min_size=p, max_size=p), min_size=p, max_size=p))
    order = min_max_order(seconds)
    assert order[0] == 0 and sorted(order) == list(range(p))
    assert cost(seconds, order) <= cost(seconds, range(p))


def test_the_heuristic_finds_a_hidden_ring() -> None:
    """24 ranks of which each has one fast neighbour on either side, in an order unlike that of the ranks."""
    p = 24
    hidden = [rank * 7 % p for rank in range(p)]
    seconds = [[9.0] * p for _ in range(p)]
    for i in range(p):
        seconds[hidden[i - 1]][hidden[i]] = seconds[hidden[i]][hidden[i - 1]] = 1.0
    assert cost(seconds, min_max_order(seconds)) == (1.0, p)
    assert p > orders.EXACT


def test_interleaved_racks_are_put_in_order() -> None:
    assert ring_order(load_cluster("two-racks")) == (0, 2, 4, 6, 1, 3, 5, 7)


@pytest.mark.parametrize("name", shipped_clusters())
def test_shipped_clusters_have_an_order(name: str) -> None:
    cluster = load_cluster(name)
    cluster = replace(cluster, ranks=cluster.ranks[: orders.SEARCHED + 8])
    assert sorted(ring_order(cluster)) == list(range(cluster.world_size))
