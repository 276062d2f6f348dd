"""Lower bounds: closed forms, the link that they name, and that no forest beats them; NCCL's files as graphs."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from known_networks import a100, small_graphs

from thinwire.cluster import FRAME_OVERHEAD, load_cluster
from thinwire.collectives.synthesis.bounds import bound
from thinwire.collectives.synthesis.forest import all_reduce_plan, packed
from thinwire.collectives.synthesis.graph import Graph, matrix_graph
from thinwire.errors import UserError

SIZE = 4 << 20
PER_BYTE = 8 * FRAME_OVERHEAD / 100e6
LATENCY = 100e-6


@pytest.mark.parametrize(
    ("op", "times"),
    [
        ("all_reduce", 14 / 8),
        ("all_gather", 7),
        ("reduce_scatter", 7 / 8),
        ("all_to_all", 7 / 8),
        ("broadcast", 1),
        ("reduce", 1),
    ],
)
def test_closed_forms_on_a_switch(op: str, times: float) -> None:
    found = bound(load_cluster("eight-hosts-100mbit"), op, SIZE)
    assert found.bandwidth_s == pytest.approx(times * SIZE * PER_BYTE, rel=1e-9)
    assert found.latency_s == pytest.approx(LATENCY, rel=1e-6)
    assert found.seconds == pytest.approx(found.bandwidth_s + found.latency_s)


def test_the_slow_host_and_the_uplink_are_named() -> None:
    slow = bound(load_cluster("one-slow-host"), "all_reduce", SIZE)
    assert slow.bandwidth_s == pytest.approx(4 * SIZE * PER_BYTE)
    assert len(slow.links) == 1 and f"{slow.links[0][0]} -> {slow.links[0][1]}" in slow.where and "23.9 Mbit/s" in slow.where
    uplink = bound(load_cluster("two-racks"), "all_to_all", SIZE)
    assert uplink.bandwidth_s == pytest.approx(16 / 8 * SIZE * PER_BYTE)
    assert any("rack-" in end for end in uplink.links[0])
    assert bound(load_cluster("laptop"), "all_reduce", SIZE).where == "all ranks are on laptop: no link is crossed"


def test_small_messages_are_bounded_by_the_farthest_ranks() -> None:
    far = bound(load_cluster("two-racks"), "all_reduce", 4)
    assert far.seconds == pytest.approx(140e-6) and far.where == "latency from a0 to b0: 140 us"


@pytest.mark.parametrize(("op", "ends"), [("broadcast", "b0 to a0"), ("reduce", "a0 to b0")])
def test_the_farthest_from_the_root_is_named(op: str, ends: str) -> None:
    assert bound(load_cluster("two-racks"), op, 4, root=1).where == f"latency from {ends}: 140 us"


@pytest.mark.parametrize(("op", "latency_s"), [("broadcast", 0.25), ("reduce", 0.5)])
def test_latency_counts_in_the_direction_of_the_bytes(op: str, latency_s: float) -> None:
    """Two nodes, 2 bytes over 1 byte/s; from the root 0.25 s, to it 0.5 s."""
    graph = matrix_graph([[0, 1], [1, 0]])
    graph = replace(graph, bytes_per_s=1.0, latency_s={(0, 1): 0.25, (1, 0): 0.5})
    assert bound(graph, op, 2).seconds == pytest.approx(2 + latency_s)


def test_uneven_lines_bound_by_what_can_be_sent() -> None:
    """home-internet sends slower than it receives: 3 shares of 4 must come out of 4 slow ends, 1 / (4 * 20 Mbit/s) each."""
    found = bound(load_cluster("home-internet"), "all_gather", SIZE)
    assert found.bandwidth_s == pytest.approx(4 * 3 * SIZE * 8 * FRAME_OVERHEAD / 80e6, rel=1e-6)


def test_a_thousand_ranks_are_no_trouble() -> None:
    found = bound(load_cluster("dgx-h100-x128"), "all_reduce", 1e9)
    assert found.bandwidth_s > 0 and found.links


@pytest.mark.long
@settings(max_examples=6)
@given(graph=small_graphs(balanced=False))
def test_no_forest_beats_its_bound_and_few_miss_it(graph: Graph) -> None:
    p = graph.world_size
    found = {
        "all_gather": packed(graph, "all_gather", k=None if graph.balanced() else 4).seconds_per_byte * p,
        "reduce_scatter": packed(graph, "reduce_scatter", k=None if graph.balanced() else 4).seconds_per_byte,
        "broadcast": packed(graph, "broadcast", 0).seconds_per_byte,
        "reduce": packed(graph, "reduce", 0).seconds_per_byte,
        "all_reduce": all_reduce_plan(graph).seconds_per_byte,
    }
    for op, seconds in found.items():
        least = bound(graph, op, SIZE).seconds
        assert least <= seconds * SIZE * (1 + 1e-6), op
        if graph.balanced() or op == "all_reduce":
            assert seconds * SIZE <= least * 1.025, op


def test_only_collectives_have_a_bound() -> None:
    with pytest.raises(UserError, match="'gather' has no bound"):
        bound(a100(1), "gather", 1)
