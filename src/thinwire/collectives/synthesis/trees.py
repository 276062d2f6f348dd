"""Trees over ranks, with the physical path of each edge: what synthesis hands to whoever makes a schedule of it.

A tree carries `weight` of the whole message. Outward (broadcast, all-gather) bytes run from the root to the leaves;
inward (reduce, reduce-scatter) from the leaves to the root. A path always runs with the bytes.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
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
        """(parents, integer weight) of each tree; those that differ only in their physical paths are one."""
        weights: defaultdict[tuple[int, ...], Fraction] = defaultdict(Fraction)
        for tree in self.trees:
            weights[tree.parents()] += tree.weight
        common = lcm(*(weight.denominator for weight in weights.values()))
        return tuple((parents, int(weight * common)) for parents, weight in weights.items())

    def shares(self) -> dict[int, Fraction]:
        """What part of the message has its root at each rank."""
        shares: defaultdict[int, Fraction] = defaultdict(Fraction)
        for tree in self.trees:
            shares[tree.root] += tree.weight
        return dict(sorted(shares.items()))

    def reversed(self) -> "Forest":
        """The same trees in the reversed graph, their bytes running in the other direction."""
        trees = tuple(
            replace(tree, edges=tuple(replace(edge, path=edge.path[::-1]) for edge in tree.edges)) for tree in self.trees
        )
        return Forest(not self.inward, trees, self.seconds_per_byte)


def congestion(graph: Graph, *trees: Tree) -> float:
    """Seconds per byte of the busiest link when all `trees` run at the same time."""
    index = {name: node for node, name in enumerate(graph.nodes)}
    loads: defaultdict[tuple[int, int], Fraction] = defaultdict(Fraction)
    for tree in trees:
        for edge in tree.edges:
            for a, b in pairwise(edge.path):
                loads[index[a], index[b]] += tree.weight
    busiest = max((load / graph.capacity[link] for link, load in loads.items()), default=Fraction(0))
    return float(busiest) / graph.bytes_per_s
