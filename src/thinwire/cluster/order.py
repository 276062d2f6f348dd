"""Ranks in the order of the links between them, so that neighbours by number are neighbours on the network.

Ranks of a host stay together. Two hosts are as near as the thinnest link on their route is fast, for each of the hosts that must
share it, and of equal ones, as its latencies are short. A link is shared by all hosts on its smaller side: the uplink of a rack
of four by four, a card by one. Hosts are joined into groups, the nearest first, whole classes of links at once: one rack, one
site. The order is a walk over these groups, each as a whole, in the order of their first ranks. So the innermost axes of a layout
lie on the fastest links, and the outermost ones cross the slowest, whatever numbers a launcher has given. Where that is so
already, the order is by numbers.

Measured links differ by chance: rates, and latencies, of which each is less than STEP times the next are one class.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations, permutations

import networkx

from thinwire.cluster.graph import Routes
from thinwire.cluster.model import Cluster, Link
from thinwire.errors import UserError

STEP = 1.5
LEAST_LATENCY_S = 1e-9
"""Below, all are alike."""


@lru_cache(maxsize=4)
def along_links(cluster: Cluster) -> tuple[int, ...]:
    """The ranks of `cluster`, by their place."""
    hosts: dict[str, list[int]] = {}
    for rank in range(cluster.world_size):
        hosts.setdefault(cluster.host_of(rank).name, []).append(rank)
    groups, routes = [tuple(ranks) for ranks in hosts.values()], Routes(cluster)
    if len(groups) == 1:
        return groups[0]
    ways = {pair: routes.between(*pair) for pair in combinations((ranks[0] for ranks in groups), 2)}
    ends: dict[Link, tuple[set[int], set[int]]] = {}
    for first, last in permutations((ranks[0] for ranks in groups), 2):
        for link in routes.between(first, last):
            sources, targets = ends.setdefault(link, (set(), set()))
            sources.add(first)
            targets.add(last)
    each_bps = {link: link.bandwidth_bps.value / min(map(len, both)) for link, both in ends.items()}
    rates = {pair: min(each_bps[link] for link in way) for pair, way in ways.items()}
    latencies = {pair: max(LEAST_LATENCY_S, sum(link.latency_s.value for link in way)) for pair, way in ways.items()}
    rate_class, latency_class = _classes(rates.values()), _classes(latencies.values())
    far = {pair: (-rate_class[rates[pair]], latency_class[latencies[pair]]) for pair in ways}
    for distance in sorted(set(far.values())):
        near = networkx.Graph()
        near.add_nodes_from(ranks[0] for ranks in groups)
        near.add_edges_from(pair for pair, its in far.items() if its <= distance)
        members = sorted(networkx.connected_components(near), key=min)
        groups = [tuple(rank for one in groups if one[0] in its for rank in one) for its in members]
    return tuple(rank for one in groups for rank in one)


def in_order(cluster: Cluster, order: Sequence[int]) -> Cluster:
    """The same cluster, whose rank number n is the one that was order[n]."""
    return replace(cluster, ranks=tuple(cluster.ranks[rank] for rank in order))


def some_hosts(cluster: Cluster, count: int) -> Cluster:
    """Those with the fastest devices, with all links between them. UserError for more than there are."""
    if not 1 <= count <= len(cluster.hosts):
        raise UserError(f"{cluster.name} has {len(cluster.hosts)} hosts, not {count}")
    if count == len(cluster.hosts):
        return cluster

    def speed(index: int) -> float:
        return min(device.flops_per_s.value if device.flops_per_s else 0.0 for device in cluster.hosts[index].devices)

    taken = sorted(sorted(range(len(cluster.hosts)), key=lambda index: -speed(index))[:count])
    hosts = tuple(cluster.hosts[index] for index in taken)
    names = {host.name for host in hosts} | {switch.name for switch in cluster.switches}
    names |= {device.name for host in hosts for device in host.devices}
    return Cluster(
        name=cluster.name,
        hosts=hosts,
        switches=cluster.switches,
        links=tuple(link for link in cluster.links if link.source in names and link.target in names),
        ranks=tuple(rank for rank in cluster.ranks if rank in names),
    )


def _classes(values: Iterable[float]) -> dict[float, int]:
    """Of each value the number of its class, that of the smallest is 0."""
    found: dict[float, int] = {}
    number, before = 0, None
    for value in sorted(set(values)):
        number += before is not None and value >= STEP * before
        found[value], before = number, value
    return found
