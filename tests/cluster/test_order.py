"""Ranks are numbered along the links: whole hosts, racks and sites one after the other, whoever was started first."""

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.cluster import load_cluster, shipped_clusters
from thinwire.cluster.order import along_links, in_order

ALTERNATING = ("two-racks", "two-racks-gpu", "two-racks-half-uplink")
SMALL = ("four-hosts-of-two-100mbit", "two-racks", "two-sites", "one-node-8gpu")


@pytest.mark.parametrize("name", [name for name in shipped_clusters() if name != "dgx-h100-x128"])
def test_where_neighbours_are_near_already_numbers_stay(name: str) -> None:
    cluster = load_cluster(name)
    racks = (0, 2, 4, 6, 1, 3, 5, 7)
    assert along_links(cluster) == (racks if name in ALTERNATING else tuple(range(cluster.world_size)))


@given(st.sampled_from(SMALL), st.randoms())
def test_hosts_racks_and_sites_stay_together_however_ranks_were_started(name: str, draw: Random) -> None:
    cluster = load_cluster(name)
    started = list(range(cluster.world_size))
    draw.shuffle(started)
    mixed = in_order(cluster, started)
    order = along_links(mixed)
    assert sorted(order) == list(range(cluster.world_size)) and order[0] == 0
    numbered = in_order(mixed, order)
    assert along_links(numbered) == tuple(range(cluster.world_size))
    groups = [lambda host: host.name] + ([lambda host: host.rack] if name == "two-racks" else [])
    for group in groups:
        seen = [group(numbered.host_of(rank)) for rank in range(cluster.world_size)]
        assert sum(one != other for one, other in pairwise(seen)) == len(set(seen)) - 1


def test_chance_in_measured_rates_changes_nothing() -> None:
    cluster = load_cluster("two-racks")
    links = [
        replace(link, bandwidth_bps=replace(link.bandwidth_bps, value=link.bandwidth_bps.value * (0.95 + 0.01 * (number % 9))))
        for number, link in enumerate(cluster.links)
    ]
    assert along_links(replace(cluster, links=tuple(links))) == along_links(cluster)
