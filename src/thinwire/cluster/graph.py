"""Routes through a cluster: which links a message crosses, and the load that several messages put on each."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import networkx

from thinwire.cluster.model import Cluster, Link
from thinwire.errors import UserError


def graph(cluster: Cluster) -> networkx.DiGraph:
    """The cluster as a networkx graph; each edge carries its Link as `link`."""
    result = networkx.DiGraph()
    result.add_nodes_from(host.name for host in cluster.hosts)
    result.add_nodes_from(switch.name for switch in cluster.switches)
    for link in cluster.links:
        result.add_edge(link.source, link.target, link=link)
    return result


class Routes:
    """Shortest routes between the nodes of ranks (fewest links; equal ones: in the order of the file)."""

    def __init__(self, cluster: Cluster) -> None:
        self._graph = graph(cluster)
        self._nodes = [cluster.node_of(rank) for rank in range(cluster.world_size)]
        self._name = cluster.name
        self.known: dict[Any, Any] = {}
        """What has been worked out on these routes, by whoever asked."""
        self._route = lru_cache(maxsize=None)(self._find)
        self._paths = lru_cache(maxsize=None)(lambda source: networkx.single_source_shortest_path(self._graph, source))

    def between(self, source_rank: int, target_rank: int) -> tuple[Link, ...]:
        """The links from one rank to another; empty when both sit on one node (memory is not modelled as a link)."""
        return self._route(self._nodes[source_rank], self._nodes[target_rank])

    def load(self, flows: Iterable[tuple[int, int, float]]) -> Counter[Link]:
        """Payload bytes on each link when (source rank, target rank, payload bytes) flow along their routes."""
        loads: Counter[Link] = Counter()
        for source, target, payload_bytes in flows:
            for link in self.between(source, target):
                loads[link] += payload_bytes  # type: ignore[assignment]
        return loads

    def pattern(self, ranks: Sequence[int]) -> tuple[tuple[tuple[int, float, float], ...], ...]:
        """Of the routes between each two of `ranks`: (number of the link, its rate, its latency), links being numbered as they
        come. Groups with the same one differ in names only."""
        numbers: dict[tuple[str, str], int] = {}
        pairs = ((source, target) for source in ranks for target in ranks if source != target)
        return tuple(
            tuple(
                (
                    numbers.setdefault((link.source, link.target), len(numbers)),
                    link.bandwidth_bps.value,
                    link.latency_s.value,
                )
                for link in self.between(*pair)
            )
            for pair in pairs
        )

    def _find(self, source: str, target: str) -> tuple[Link, ...]:
        path = self._paths(source).get(target)
        if path is None:
            raise UserError(f"{self._name}: no route from {source!r} to {target!r}; add the missing link")
        return tuple(self._graph.edges[ends]["link"] for ends in pairwise(path))
