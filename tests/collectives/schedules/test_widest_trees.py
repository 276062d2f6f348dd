"""Trees for broadcasts and reduces: no slower than a chain, and what is known of small networks."""

import pytest
from all_networks import networks
from hypothesis import given
from hypothesis import strategies as st

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch, load_cluster
from thinwire.cluster.graph import Routes
from thinwire.collectives.schedules.orders import rate_bps, ring_order, widest_tree
from thinwire.collectives.schedules.rooted import broadcast, chain, root_of
from thinwire.collectives.schedules.verify import verify
from thinwire.errors import UserError


@given(cluster=networks(loops=2), data=st.data(), up=st.booleans())
def test_with_sharing_it_is_a_tree_no_slower_than_a_chain(cluster: Cluster, data: st.DataObject, up: bool) -> None:
    root = data.draw(st.integers(0, cluster.world_size - 1))
    parents = widest_tree(cluster, root, up=up)
    verify(broadcast(parents))
    assert root_of(parents) == root
    order = ring_order(cluster)
    if up:
        order = order[::-1]
    place = order.index(root)
    routes = Routes(cluster)
    assert rate_bps(routes, parents, up=up) >= rate_bps(routes, chain(order[place:] + order[:place]), up=up)


@pytest.mark.parametrize(("name", "rate"), [("eight-hosts-100mbit", 100e6), ("two-racks", 100e6), ("one-slow-host", 25e6)])
@pytest.mark.parametrize("up", [False, True])
def test_known_networks(name: str, rate: float, up: bool) -> None:
    """The slowest card decides, and the uplink that is as fast as a card does not."""
    cluster = load_cluster(name)
    for root in range(cluster.world_size):
        assert rate_bps(Routes(cluster), widest_tree(cluster, root, up=up), up=up) == rate


def test_what_a_card_sends_already_counts() -> None:
    """Up and down in Mbit/s: 150/100, 100/100, 10/100, 10/100. Rank 0 sends to two and rank 1 to one: 75. Rank 0 to all: 50."""
    cards = [(150, 100), (100, 100), (10, 100), (10, 100)]
    links = []
    for host, (up, down) in enumerate(cards):
        for source, target, rate in ((f"h{host}", "s", up), ("s", f"h{host}", down)):
            links.append(Link(source=source, target=target, bandwidth_bps=Quantity(rate * 1e6), latency_s=Quantity(0.0)))
    hosts = tuple(Host(name=f"h{host}", devices=(Device(name=f"h{host}/0"),)) for host in range(len(cards)))
    cluster = Cluster(name="uneven", hosts=hosts, switches=(Switch(name="s"),), links=tuple(links))
    parents = widest_tree(cluster, 0)
    assert parents == (-1, 0, 1, 0)
    assert rate_bps(Routes(cluster), parents) == 75e6


def test_a_root_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match="root = 9"):
        widest_tree(load_cluster("two-racks"), 9)
