"""The network as a capacity graph: nodes that compute, nodes that only forward, and what each link carries in its direction.

Compute nodes come first. A node may carry several ranks (a host whose devices share its card); what they send each other
crosses no link. Capacities are exact fractions in any unit (of floats, the first six digits); `bytes_per_s` is how many payload
bytes capacity 1 moves in a second.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd, isfinite, lcm

import networkx
import numpy as np
from numpy.typing import NDArray

from thinwire.cluster import FRAME_OVERHEAD, Cluster
from thinwire.errors import UserError

Pair = tuple[int, int]
Counts = NDArray[np.int64]
Matrix = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """`ranks[i]`: the ranks on node i, for compute nodes only; the remaining nodes forward. Keys of the maps: (from, to).

    left_out: what the file had that the graph has not, in words.
    """

    name: str
    nodes: tuple[str, ...]
    ranks: tuple[tuple[int, ...], ...]
    capacity: Mapping[Pair, Fraction]
    latency_s: Mapping[Pair, float]
    bytes_per_s: float
    left_out: tuple[str, ...] = ()

    @property
    def computes(self) -> int:
        return len(self.ranks)

    @property
    def weights(self) -> Counts:
        return np.array(list(map(len, self.ranks)), dtype=np.int64)

    @property
    def world_size(self) -> int:
        return sum(map(len, self.ranks))

    def node_of(self, rank: int) -> int:
        for node, ranks in enumerate(self.ranks):
            if rank in ranks:
                return node
        raise UserError(f"{self.name}: there is no rank {rank}; ranks are 0 to {self.world_size - 1}")

    def integral(self) -> tuple[Matrix, Fraction]:
        """Capacities as integers without a common divisor, and the factor that made them: integer = factor * capacity."""
        common = lcm(*(value.denominator for value in self.capacity.values())) if self.capacity else 1
        whole = {pair: int(value * common) for pair, value in self.capacity.items()}
        divisor = gcd(*whole.values()) or 1
        matrix = np.zeros((len(self.nodes), len(self.nodes)), dtype=np.int64)
        for pair, amount in whole.items():
            matrix[pair] = amount // divisor
        return matrix, Fraction(common, divisor)

    def balanced(self) -> bool:
        """Whether as much can enter each switch as can leave it."""
        matrix, _ = self.integral()
        return bool((matrix.sum(0) == matrix.sum(1))[self.computes :].all())

    def reversed(self) -> "Graph":
        """Each link turned round: broadcast trees in it are reduce trees here."""
        return replace(
            self,
            capacity={(target, source): value for (source, target), value in self.capacity.items()},
            latency_s={(target, source): value for (source, target), value in self.latency_s.items()},
        )


def graph_of(cluster: Cluster) -> Graph:
    """The graph of a cluster, in line bits per second; bytes_per_s takes the headers of frames off."""
    places: dict[str, list[int]] = {}
    for rank in range(cluster.world_size):
        places.setdefault(cluster.node_of(rank), []).append(rank)
    linked = dict.fromkeys(end for link in cluster.links for end in (link.source, link.target))
    nodes = (*places, *(name for name in linked if name not in places))
    index = {name: position for position, name in enumerate(nodes)}
    capacity, latency_s = {}, {}
    for link in cluster.links:
        pair = index[link.source], index[link.target]
        capacity[pair] = _exact(link.bandwidth_bps.value)
        latency_s[pair] = link.latency_s.value
    return _checked(
        Graph(
            name=cluster.name,
            nodes=nodes,
            ranks=tuple(tuple(ranks) for ranks in places.values()),
            capacity=capacity,
            latency_s=latency_s,
            bytes_per_s=1 / (8 * FRAME_OVERHEAD),
        )
    )


def matrix_graph(
    rows: Sequence[Sequence[int | float | Fraction]],
    *,
    switches: Sequence[int] = (),
    name: str = "matrix",
    names: Sequence[str] = (),
) -> Graph:
    """A graph from a matrix of capacities, rows[from][to], 0 where there is no link (as ForestColl's topologies, in GB/s).

    switches: indices of the nodes that only forward. All others compute; their ranks are in the order of the rows.
    """
    size = len(rows)
    if size == 0 or any(len(row) != size for row in rows):
        raise UserError(f"{name}: {size} rows of {sorted({len(row) for row in rows})} values; a topology matrix is square")
    if names and len(names) != size:
        raise UserError(f"{name}: {len(names)} names for {size} nodes; give one a node, or none")
    wrong = sorted(set(switches) - set(range(size)))
    if wrong:
        raise UserError(f"{name}: there is no node {wrong[0]} to be a switch; nodes are 0 to {size - 1}")
    for row in range(size):
        for column, value in enumerate(rows[row]):
            if not isfinite(value) or value < 0 or (row == column and value):
                raise UserError(f"{name}: [{row}][{column}] = {value}: a capacity is 0 or more, and 0 on the diagonal")
    order = [node for node in range(size) if node not in switches] + list(dict.fromkeys(switches))
    at = {node: position for position, node in enumerate(order)}
    capacity = {(at[a], at[b]): _exact(rows[a][b]) for a in range(size) for b in range(size) if rows[a][b]}
    computes = size - len(set(switches))
    if not computes:
        raise UserError(f"{name}: all {size} nodes are switches; one or more must compute")
    return _checked(
        Graph(
            name=name,
            nodes=tuple(names[node] if names else f"node{node}" for node in order),
            ranks=tuple((rank,) for rank in range(computes)),
            capacity=capacity,
            latency_s=dict.fromkeys(capacity, 0.0),
            bytes_per_s=1e9,
        )
    )


def _checked(graph: Graph) -> Graph:
    """`graph` without nodes that lie on no path between ranks. UserError where a link carries nothing or ranks cannot meet."""
    for (source, target), value in graph.capacity.items():
        if value <= 0:
            raise UserError(
                f"{graph.name}: {graph.nodes[source]} -> {graph.nodes[target]} has bandwidth {value}; it must be above 0"
            )
    links = networkx.DiGraph()
    links.add_nodes_from(range(len(graph.nodes)))
    links.add_edges_from(graph.capacity)
    ahead, back = networkx.descendants(links, 0) | {0}, networkx.ancestors(links, 0) | {0}
    for node in range(graph.computes):
        for known, source, target in ((ahead, 0, node), (back, node, 0)):
            if node not in known:
                raise UserError(
                    f"{graph.name}: no path from {graph.nodes[source]!r} to {graph.nodes[target]!r}; add the missing link or card"
                )
    keep = sorted(ahead & back)
    at = {node: position for position, node in enumerate(keep)}
    capacity = {(at[a], at[b]): value for (a, b), value in graph.capacity.items() if a in at and b in at}
    latency_s = {(at[a], at[b]): value for (a, b), value in graph.latency_s.items() if a in at and b in at}
    return replace(graph, nodes=tuple(graph.nodes[node] for node in keep), capacity=capacity, latency_s=latency_s)


def _exact(value: int | float | Fraction) -> Fraction:
    return Fraction(f"{value:.6g}") if isinstance(value, float) else Fraction(value)
