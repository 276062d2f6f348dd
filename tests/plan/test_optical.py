"""Cables chosen with the plan: no more than there are ports, as good as trying every graph, and none worse than a ring."""

from collections import Counter
from dataclasses import replace
from itertools import combinations_with_replacement

import networkx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import of_rates

from thinwire.cluster import load_cluster
from thinwire.cluster.ports import Cables, cables, swapped, wired
from thinwire.errors import UserError
from thinwire.plan.optical import improved, rewired, sent
from thinwire.plan.price import price
from thinwire.plan.search import search


def regular(taken: Cables, hosts: int, ports: int) -> bool:
    """Whether all are joined and nobody has more cables than ports."""
    ends = Counter(end for cable in taken for end in cable)
    graph = networkx.Graph(taken)
    return max(ends.values()) <= ports and len(graph) == hosts and networkx.is_connected(graph)


@settings(deadline=None, max_examples=12)
@given(st.integers(3, 9), st.integers(2, 4), st.integers(0, 99))
def test_cables_keep_to_the_ports(hosts: int, ports: int, seed: int) -> None:
    sizes = {(a, b): float((seed * (a + 1) * (b + 3)) % 17) for a in range(hosts) for b in range(hosts)}
    found = cables(hosts, ports, sizes)
    assert regular(found, hosts, ports) and len(found) >= hosts * ports // 2 - 1
    assert all(regular(one, hosts, ports) for one in swapped(found))


def test_what_cannot_be_wired_is_refused() -> None:
    with pytest.raises(UserError, match="4 hosts with 1 ports each do not all reach each other"):
        cables(4, 1, {})
    assert cables(2, 3, {}) == ((0, 1),) * 3


@pytest.mark.long
@pytest.mark.parametrize("kept", [("layout.pipe=2", "layout.data=2"), ("layout.data=4",)], ids=["pipe-data", "data"])
def test_no_graph_of_all_is_better(kept: tuple[str, ...]) -> None:
    """Four hosts, two ports: of the plan that is chosen every graph is tried."""
    problem = of_rates("4x1xcpu:10Gflop/s@20Mbit/s", "sync.kind=every_step", "pipeline.schedule=1f1b", *kept)
    found = rewired(problem, 2)
    pairs = [(a, b) for a in range(4) for b in range(a + 1, 4)]
    least_s = float("inf")
    for graph in combinations_with_replacement(pairs, 4):
        if regular(graph, 4, 2):
            cluster = wired(load_cluster("4x1xcpu:10Gflop/s@20Mbit/s"), graph)
            least_s = min(least_s, price(found.best.candidate, of_rates(cluster, *kept)).step_s)
    assert found.best.step_s == pytest.approx(least_s, rel=0.01)


@pytest.mark.long
def test_links_follow_the_layout() -> None:
    """With three ports the pair that sends most has a cable, and no plan on a ring is faster."""
    problem = of_rates("4x1xcpu:10Gflop/s@5Mbit/s", "sync.kind=every_step", "compress.kind=none", "pipeline.schedule=1f1b")
    found = rewired(problem, 3)
    ring = replace(problem, cluster=wired(problem.cluster, cables(4, 2, {})))
    assert found.best.time_s < search(ring, refined=0).best.time_s
    assert improved(problem, found.best.candidate, found.cables) == found.cables
    assert tuple(sorted(max(sent(found.problem, found.best.candidate).items(), key=lambda one: one[1])[0])) in found.cables
