"""Synthesis: published optima to the digit; on random graphs the optimum is the worst of all cuts, and trees reach it."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from known_networks import a100, cables, dgx1v, mi250, racks, small_graphs, star, torus
from scipy.optimize import linprog

from thinwire.cluster import load_cluster
from thinwire.collectives.synthesis.forest import Forest, all_reduce_plan, packed
from thinwire.collectives.synthesis.graph import Graph, graph_of, matrix_graph
from thinwire.collectives.synthesis.lp import all_reduce_time
from thinwire.collectives.synthesis.optimum import fixed_k, optimum
from thinwire.errors import UserError

LOSS = 1.025
"""What whole numbers of trees may cost where no exact number exists."""


def gbytes(graph: Graph, k: int | None = None) -> float:
    return (optimum(graph) if k is None else fixed_k(graph, k)).bytes_per_s(graph) / 1e9


def seconds_per_byte(graph: Graph, k: int | None = None) -> float:
    return 1e-9 / gbytes(graph, k)


def subsets(graph: Graph) -> list[np.ndarray]:
    """All sets of nodes that leave out a node that computes."""
    every = (np.array(bits, dtype=bool) for bits in product((False, True), repeat=len(graph.nodes)))
    return [inside for inside in every if not inside[: graph.computes].all()]


def leaving(graph: Graph, inside: np.ndarray) -> Fraction:
    return sum((value for (a, b), value in graph.capacity.items() if inside[a] and not inside[b]), Fraction(0))


def check(graph: Graph, forest: Forest, shares: dict[int, Fraction]) -> None:
    """Trees span, paths are paths, roots have their shares, and no link is busy for longer than the forest says."""
    names, ranks = {name: node for node, name in enumerate(graph.nodes)}, range(graph.world_size)
    loads: Counter[tuple[int, int]] = Counter()
    assert forest.shares() == {rank: share for rank, share in shares.items() if share}
    for tree in forest.trees:
        reached = {tree.root}
        for edge in tree.edges:
            assert edge.parent in reached and edge.child not in reached
            reached.add(edge.child)
            ends = (edge.child, edge.parent) if forest.inward else (edge.parent, edge.child)
            path = [names[name] for name in edge.path]
            assert path[0] == graph.node_of(ends[0]) and path[-1] == graph.node_of(ends[1])
            assert all(node >= graph.computes for node in path[1:-1])
            for link in pairwise(path):
                loads[link] += tree.weight  # type: ignore[assignment]
        assert reached == set(ranks)
        assert tree.parents()[tree.root] == -1
    busiest = max((load / graph.capacity[link] for link, load in loads.items()), default=Fraction(0))
    assert float(busiest) / graph.bytes_per_s == pytest.approx(forest.seconds_per_byte, rel=1e-12)


@pytest.mark.parametrize(
    ("graph", "expected", "k"),
    [
        (a100(1), 342.857, 1),
        (a100(2), 346.667, 13),
        (a100(4), 266.667, 1),
        (mi250(1), 342.857, 3),
        (mi250(2), 354.133, 83),
        (dgx1v(), 171.429, 6),
        (torus(2, 4), 3.429, 3),
        (torus(4, 4), 4.267, 4),
    ],
    ids=lambda value: value.name if isinstance(value, Graph) else str(value),
)
def test_published_optima(graph: Graph, expected: float, k: int) -> None:
    assert round(gbytes(graph), 3) == expected
    assert optimum(graph).k == k


@pytest.mark.parametrize(
    ("graph", "expected"),
    [
        (a100(1), {1: 342.857}),
        (a100(2), {1: 342.857}),
        (a100(4), {1: 266.667}),
        (mi250(1), {1: 266.667, 2: 320.0, 4: 320.0}),
        (mi250(2), {1: 320.0, 2: 341.333, 4: 341.333}),
    ],
    ids=lambda value: value.name if isinstance(value, Graph) else "",
)
def test_published_optima_with_few_trees(graph: Graph, expected: dict[int, float]) -> None:
    assert {k: round(gbytes(graph, k), 3) for k in expected} == expected


@settings(max_examples=25)
@given(graph=small_graphs())
def test_the_optimum_is_the_worst_of_all_cuts_and_trees_reach_it(graph: Graph) -> None:
    worst = max(
        Fraction(int(inside[: graph.computes].sum())) / leaving(graph, inside)
        for inside in subsets(graph)
        if inside[: graph.computes].any()
    )
    best = optimum(graph)
    assert best.time == worst and best.cut is not None
    assert Fraction(int(graph.weights @ best.cut[: graph.computes])) / leaving(graph, best.cut) == worst
    shares = dict.fromkeys(range(graph.world_size), Fraction(1, graph.world_size))
    for op in ("all_gather", "reduce_scatter"):
        forest = packed(graph, op)
        check(graph, forest, shares)
        assert forest.seconds_per_byte == pytest.approx(seconds_per_byte(graph), rel=1e-12)


@settings(max_examples=15)
@given(graph=small_graphs())
def test_with_k_trees_the_time_falls_towards_the_optimum(graph: Graph) -> None:
    best = optimum(graph)
    assert fixed_k(graph, best.k).time == best.time
    for k in (1, 2):
        forest = packed(graph, "all_gather", k=k)
        check(graph, forest, dict.fromkeys(range(graph.world_size), Fraction(1, graph.world_size)))
        assert seconds_per_byte(graph) <= forest.seconds_per_byte * (1 + 1e-12)
        assert forest.seconds_per_byte <= seconds_per_byte(graph, k) * (1 + 1e-12)


@pytest.mark.long
@settings(max_examples=15)
@given(graph=small_graphs(balanced=False))
def test_k_trees_fit_through_switches_that_take_more_than_they_give(graph: Graph) -> None:
    """No cut lets them be faster, and twice as many, of half the size, are no slower."""
    ranks = Fraction(1, graph.world_size)
    worst = max(Fraction(int(inside[: graph.computes].sum())) / leaving(graph, inside) for inside in subsets(graph)[1:])
    times = [fixed_k(graph, k).time for k in (1, 2, 4)]
    assert worst <= times[2] <= times[1] <= times[0]
    check(graph, packed(graph, "all_gather", k=2), dict.fromkeys(range(graph.world_size), ranks))


def test_a_switch_passes_on_what_both_hosts_need() -> None:
    """Two hosts send 5 each and receive 1 and 100: the one that receives 1 sets the time."""
    graph = matrix_graph([[0, 0, 5], [0, 0, 5], [1, 100, 0]], switches=[2])
    assert fixed_k(graph, 1).time == 1


def test_many_trees_a_rank_keep_within_the_links() -> None:
    graph = torus(2, 4)
    forest = packed(graph, "all_gather", k=24)
    check(graph, forest, dict.fromkeys(range(8), Fraction(1, 8)))
    assert forest.seconds_per_byte == pytest.approx(seconds_per_byte(graph), rel=1e-12)


def joint_time(graph: Graph) -> float:
    """The joint program with every cut written down. Columns: T, x, then c' and c'' of each link."""
    links, computes = list(graph.capacity), graph.computes
    columns = 1 + computes + 2 * len(links)
    upper, equal = [], [np.r_[0, np.ones(computes), np.zeros(2 * len(links))]]
    for place, link in enumerate(links):
        row = np.zeros(columns)
        row[0], row[1 + computes + place], row[1 + computes + len(links) + place] = -float(graph.capacity[link]), 1, 1
        upper.append(row)
    for inside in subsets(graph):
        for phase in (0, 1):
            row = np.zeros(columns)
            row[1 : 1 + computes] = inside[:computes]
            for place, (a, b) in enumerate(links if phase else [link[::-1] for link in links]):
                row[1 + computes + phase * len(links) + place] = -float(inside[a] and not inside[b])
            upper.append(row)
    for switch in range(computes, len(graph.nodes)):
        for phase in (0, 1):
            row = np.zeros(columns)
            row[1 + computes + phase * len(links) :][: len(links)] = [float(b == switch) - float(a == switch) for a, b in links]
            equal.append(row)
    done = linprog(np.eye(1, columns)[0], np.array(upper), np.zeros(len(upper)), np.array(equal), np.eye(1, len(equal))[0])
    return float(done.fun)


@settings(max_examples=10)
@given(graph=small_graphs(balanced=False))
def test_all_reduce_reaches_the_joint_optimum_on_any_network(graph: Graph) -> None:
    expected = joint_time(graph)
    assert all_reduce_time(graph) == pytest.approx(expected, rel=1e-6)
    plan = all_reduce_plan(graph)
    shares = plan.reduce.shares()
    check(graph, plan.reduce, shares)
    check(graph, plan.broadcast, shares)
    assert plan.reduce.inward and not plan.broadcast.inward
    assert expected * (1 - 1e-6) <= plan.seconds_per_byte * graph.bytes_per_s <= expected * LOSS
    assert sum(part for _, _, part in plan.parts()) == 1
    assert all(up.root == down.root for up, down, _ in plan.parts())


@settings(max_examples=8)
@given(graph=small_graphs(balanced=False))
def test_one_root_and_switches_that_take_more_than_they_give(graph: Graph) -> None:
    root = graph.world_size - 1
    for op, source in (("broadcast", graph), ("reduce", graph.reversed())):
        forest = packed(graph, op, root)
        check(graph, forest, {root: Fraction(1)})
        least = min(leaving(source, inside) for inside in subsets(source) if inside[root])
        assert forest.seconds_per_byte * graph.bytes_per_s >= float(1 / least) * (1 - 1e-9)
        if graph.balanced():
            assert forest.seconds_per_byte * graph.bytes_per_s <= float(1 / least) * LOSS
    check(graph, packed(graph, "all_gather"), dict.fromkeys(range(graph.world_size), Fraction(1, graph.world_size)))


def star_time(rates: list[float]) -> float:
    """The closed form for nodes on one switch that never blocks, for a message of size 1."""
    return max(1 / min(rates), 2 * (len(rates) - 1) / sum(rates))


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([1] * 8, 1.75),
        ([0.25, *[1] * 7], 4.0),
        ([0.5, *[1] * 7], 2.0),
        ([0.5, *[1] * 15], 2.0),
        ([0.6, *[1] * 7], 1.84),
        ([0.5] * 4 + [1] * 4, 2.33),
        ([10, *[1] * 7], 1.0),
    ],
)
def test_joint_optimum_of_a_star(rates: list[float], expected: float) -> None:
    assert round(all_reduce_time(star(rates)), 2) == expected
    assert all_reduce_time(star(rates)) == pytest.approx(star_time(rates), rel=1e-6)


@pytest.mark.parametrize(
    ("count", "hosts", "uplink", "expected"), [(2, 4, 0.5, 2.0), (2, 8, 0.5, 2.0), (4, 4, 0.5, 3.0), (2, 4, 1, 1.75)]
)
def test_joint_optimum_of_racks(count: int, hosts: int, uplink: float, expected: float) -> None:
    time = all_reduce_time(racks(count, hosts, uplink))
    assert time == pytest.approx(expected, rel=1e-6)
    closed_form = max(star_time([1] * count * hosts), 2 * (count - 1) / (count * uplink))  # racks below a core that never blocks
    assert time == pytest.approx(closed_form, rel=1e-6)


@pytest.mark.parametrize("graph", [a100(1), mi250(1), dgx1v(), torus(4, 4), mi250(2)], ids=lambda graph: graph.name)
def test_joint_optimum_of_even_networks_is_one_after_the_other(graph: Graph) -> None:
    assert all_reduce_time(graph) == pytest.approx(2 * float(optimum(graph).time) / graph.world_size, rel=1e-6)


def test_trees_are_low_where_the_network_lets_them() -> None:
    assert packed(a100(1), "all_gather").depth == 1
    assert packed(a100(2), "all_gather", k=1).depth == 2
    assert packed(torus(2, 4), "all_gather", k=1).depth == 3
    assert all_reduce_plan(racks(2, 4, 0.5)).broadcast.depth <= 3


def test_ranks_that_share_a_node_share_its_links() -> None:
    laptop = graph_of(load_cluster("laptop"))
    forest = packed(laptop, "all_gather")
    check(laptop, forest, dict.fromkeys(range(4), Fraction(1, 4)))
    assert forest.seconds_per_byte == 0 and forest.depth == 1 and all_reduce_plan(laptop).seconds_per_byte == 0
    pairs = Graph(
        name="pairs",
        nodes=("a", "b", "c"),
        ranks=((0, 3), (1, 4), (2, 5)),
        capacity={(a, b): Fraction(1) for a in range(3) for b in range(3) if a != b},
        latency_s={(a, b): 0.0 for a in range(3) for b in range(3) if a != b},
        bytes_per_s=1.0,
    )
    assert optimum(pairs).time == 2  # 4 ranks outside, 2 links in
    forest = packed(pairs, "all_gather")
    check(pairs, forest, dict.fromkeys(range(6), Fraction(1, 6)))
    assert forest.seconds_per_byte == pytest.approx(2 / 6)
    weights = [weight for _, weight in forest.weighted()]
    assert all(isinstance(weight, int) for weight in weights)
    check(pairs, packed(pairs, "broadcast", 4), {4: Fraction(1)})


def test_what_cannot_be_a_network_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="no path from 'node1' to 'node0'"):
        matrix_graph([[0, 1], [0, 0]])
    with pytest.raises(UserError, match="square"):
        matrix_graph([[0, 1]])
    with pytest.raises(UserError, match=r"\[0\]\[1\] = -1"):
        matrix_graph([[0, -1], [1, 0]])
    with pytest.raises(UserError, match="all 2 nodes are switches"):
        matrix_graph([[0, 1], [1, 0]], switches=[0, 1])
    with pytest.raises(UserError, match="k = 0"):
        fixed_k(a100(1), 0)
    uneven = matrix_graph([[0, 0, 1], [0, 0, 1], [2, 2, 0]], switches=[2])
    with pytest.raises(UserError, match="ask for a fixed k"):
        optimum(uneven)
    assert cables("one", ["a"], [], []).world_size == 1
