"""Hosts whose cards end in an optical switch: cables between pairs of them, chosen for what they send, no more at a host than it
has ports.

Greedy as in TopoOpt (Wang et al., NSDI 2023): a ring through all hosts, so that each reaches each, in which hosts that send each
other much are neighbours; then for each port that is left a matching of the greatest weight, what a pair sends counting for less
with each cable it has. `swapped` gives all graphs that differ in two cables and keep the ports.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, pairwise

import networkx

from thinwire.cluster.model import Cluster, Link, Quantity
from thinwire.errors import UserError

Cables = tuple[tuple[int, int], ...]
"""Pairs of hosts by number, the smaller first, in order; a pair may be there twice."""


def cables(hosts: int, ports: int, sent: Mapping[tuple[int, int], float]) -> Cables:
    """For bytes sent between pairs of hosts, either way. UserError for too few ports."""
    if hosts < 2 or ports < (1 if hosts == 2 else 2):
        raise UserError(f"{hosts} hosts with {ports} ports each do not all reach each other; give them 2 ports or more")
    both = Counter[tuple[int, int]]()
    for (a, b), size in sent.items():
        if a != b:
            both[_pair(a, b)] += size  # type: ignore[assignment]
    if hosts == 2:
        return ((0, 1),) * ports
    ring = [0]
    while len(ring) < hosts:
        ring.append(max(set(range(hosts)) - set(ring), key=lambda one: (both[_pair(ring[-1], one)], -one)))
    found = [_pair(a, b) for a, b in pairwise([*ring, ring[0]])]
    for _ in range(ports - 2):
        have, graph = Counter(found), networkx.Graph()
        graph.add_weighted_edges_from((a, b, both[a, b] / (1 + have[a, b])) for a, b in combinations(range(hosts), 2))
        found += [_pair(a, b) for a, b in networkx.max_weight_matching(graph, maxcardinality=True)]
    return tuple(sorted(found))


def swapped(taken: Cables) -> Iterator[Cables]:
    """All connected graphs in which two cables have changed partners."""
    for one, two in combinations(range(len(taken)), 2):
        (a, b), (c, d) = taken[one], taken[two]
        rest = [cable for number, cable in enumerate(taken) if number not in (one, two)]
        for new in (((a, c), (b, d)), ((a, d), (b, c))):
            if all(x != y for x, y in new):
                found = tuple(sorted([*rest, *(_pair(x, y) for x, y in new)]))
                if found != taken and _connected(found):
                    yield found


def wired(cluster: Cluster, taken: Iterable[tuple[int, int]]) -> Cluster:
    """The hosts of a cluster joined by these cables alone; each port has the rate and the latency of the host's card."""
    names, links = [host.name for host in cluster.hosts], []
    cards = {link.source: link for link in cluster.links}
    if lost := [name for name in names if name not in cards]:
        raise UserError(f"{cluster.name}: {lost[0]} has no card of its own, so it has no ports")
    for (a, b), count in Counter(taken).items():
        for source, target in ((names[a], names[b]), (names[b], names[a])):
            card = cards[source]
            rate = Quantity(count * min(card.bandwidth_bps.value, cards[target].bandwidth_bps.value))
            links.append(Link(source=source, target=target, bandwidth_bps=rate, latency_s=card.latency_s))
    return replace(cluster, name=f"{cluster.name}, rewired", switches=(), links=tuple(links))


def _pair(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a < b else (b, a)


def _connected(taken: Cables) -> bool:
    return bool(networkx.is_connected(networkx.Graph(taken)))
