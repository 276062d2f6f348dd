"""Trees over ranks, with the physical way of each edge: what synthesis hands to whoever makes a schedule of it.

A tree carries `weight` of the whole message. Outward (broadcast, all-gather) bytes run from the root to the leaves;
inward (reduce, reduce-scatter) from the leaves to the root. A way always runs with the bytes.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from math import lcm

from thinwire.collectives.synthesis.graph import Graph


@dataclass(frozen=True, slots=True)
class Edge:
    """Ranks, and the names of the nodes that the bytes pass, both ends included (one name: they never leave the node)."""

    parent: int
    child: int
    path: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tree:
    """A spanning tree of the ranks; an edge comes after the edge to its parent."""

    root: int
    weight: Fraction
    edges: tuple[Edge, ...]

    @property
    def depth(self) -> int:
        """Edges from the root to the farthest rank."""
        level = {self.root: 0}
        for edge in self.edges:
            level[edge.child] = level[edge.parent] + 1
        return max(level.values())

    def parents(self) -> tuple[int, ...]:
        """The parent of each rank, -1 for the root."""
        parents = [-1] * (len(self.edges) + 1)
        for edge in self.edges:
            parents[edge.child] = edge.parent
        return tuple(parents)


@dataclass(frozen=True, slots=True)
class Forest:
    """Trees whose weights add up to 1, and the seconds that a byte of the message takes when all run at once."""

    inward: bool
    trees: tuple[Tree, ...]
    seconds_per_byte: float

    @property
    def depth(self) -> int:
        return max(tree.depth for tree in self.trees)

    def weighted(self) -> tuple[tuple[tuple[int, ...], int], ...]:
        """(parents, integer weight) of each tree; those that differ only in their physical ways are one."""
        weights: dict[tuple[int, ...], Fraction] = {}
        for tree in self.trees:
            weights[tree.parents()] = weights.get(tree.parents(), Fraction(0)) + tree.weight
        common = lcm(*(weight.denominator for weight in weights.values()))
        return tuple((parents, int(weight * common)) for parents, weight in weights.items())

    def shares(self) -> dict[int, Fraction]:
        """What part of the message has its root at each rank."""
        shares: Counter[int] = Counter()
        for tree in self.trees:
            shares[tree.root] += tree.weight  # type: ignore[assignment]
        return {rank: Fraction(share) for rank, share in sorted(shares.items())}

    def link_shares(self) -> dict[tuple[str, str], Fraction]:
        """What part of the message each link carries (parts of different trees add up, so it may pass 1)."""
        loads: Counter[tuple[str, str]] = Counter()
        for tree in self.trees:
            for edge in tree.edges:
                for link in zip(edge.path, edge.path[1:], strict=False):
                    loads[link] += tree.weight  # type: ignore[assignment]
        return {link: Fraction(load) for link, load in loads.items()}


def congestion(graph: Graph, *forests: Forest) -> float:
    """Seconds per byte of the busiest link when all `forests` run at the same time."""
    index = {name: node for node, name in enumerate(graph.nodes)}
    loads: Counter[tuple[str, str]] = Counter()
    for forest in forests:
        loads.update(forest.link_shares())  # type: ignore[arg-type]
    busiest = max((load / graph.capacity[index[a], index[b]] for (a, b), load in loads.items()), default=Fraction(0))
    return float(busiest) / graph.bytes_per_s
