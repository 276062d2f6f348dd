"""Routes: they are connected, lead where they should, and loads add up."""

from itertools import pairwise, product

from clusters import clusters
from hypothesis import given
from hypothesis import strategies as st

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch, load_cluster
from thinwire.cluster.graph import Routes, graph
from thinwire.collectives.wire import flows


@given(clusters())
def test_every_pair_of_ranks_has_a_connected_route_without_a_detour(cluster) -> None:
    routes = Routes(cluster)
    for a, b in product(range(cluster.world_size), repeat=2):
        route = routes.between(a, b)
        if cluster.node_of(a) == cluster.node_of(b):
            assert route == ()
            continue
        assert route[0].source == cluster.node_of(a) and route[-1].target == cluster.node_of(b)
        assert all(one.target == other.source for one, other in pairwise(route))
        assert len({link.source for link in route}) == len(route)
        assert [link.source for link in route] == [link.target for link in reversed(routes.between(b, a))]


@given(clusters(), st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(1, 1000)), max_size=8))
def test_the_load_is_what_leaves_and_arrives(cluster, messages) -> None:
    messages = [(a % cluster.world_size, b % cluster.world_size, size) for a, b, size in messages]
    loads = Routes(cluster).load(messages)
    for host in cluster.hosts:
        out = sum(size for a, b, size in messages if cluster.host_of(a) == host != cluster.host_of(b))
        came = sum(size for a, b, size in messages if cluster.host_of(b) == host != cluster.host_of(a))
        assert sum(size for link, size in loads.items() if link.source == host.name) == out
        assert sum(size for link, size in loads.items() if link.target == host.name) == came


def test_interleaved_ranks_drive_every_hop_of_a_ring_over_the_uplinks() -> None:
    cluster = load_cluster("two-racks")
    ring = flows("all_reduce", 8000, 8)
    loads = Routes(cluster).load(ring)
    each = 2 * 7 * 1000
    by_name = {(link.source, link.target): size for link, size in loads.items()}
    assert by_name["rack-a", "switch"] == by_name["switch", "rack-b"] == 4 * each
    assert all(by_name[host.name, host.rack] == by_name[host.rack, host.name] == each for host in cluster.hosts)


def test_of_equal_routes_the_first_in_the_file_is_taken() -> None:
    def cluster(order: list[str]) -> Cluster:
        links = [
            Link(source=a, target=b, bandwidth_bps=Quantity(1.0), latency_s=Quantity(0.0))
            for switch in order
            for a, b in (("h0", switch), (switch, "h0"), (switch, "h1"), ("h1", switch))
        ]
        hosts = tuple(Host(name=name, devices=(Device(name=f"{name}/cpu0"),)) for name in ("h0", "h1"))
        switches = tuple(Switch(name=name) for name in ("s0", "s1", "s2"))
        return Cluster(name="rails", hosts=hosts, switches=switches, links=tuple(links))

    for order in (["s0", "s1", "s2"], ["s2", "s0", "s1"], ["s1", "s2", "s0"]):
        for a, b in ((0, 1), (1, 0)):
            assert Routes(cluster(order)).between(a, b)[0].target == order[0]


def test_the_graph_has_every_node_and_link() -> None:
    cluster = load_cluster("32-nodes-25gbe")
    network = graph(cluster)
    assert network.number_of_nodes() == 32 + 4 + 1
    assert network.number_of_edges() == len(cluster.links) == 2 * (32 + 4)
