"""Spanning trees packed into capacities (Edmonds' branchings with multiplicities: Bang-Jensen, Bérczi & Frank; Tarjan 1974).

A partial tree j has the nodes V_j and the multiplicity m_j. All of them can be completed iff for every set X of nodes

    c(edges into X) >= sum of m_j over the trees with no node in X.

Tree i may take mu of the edge (x, y), x in V_i, y not, if every X with y inside and x outside that V_i meets has the slack mu.
One flow from x to y measures it: give every other tree a node with an edge of m_j from x and free edges to V_j; then mu is the
flow less the sum of these m_j. Where mu < m_i the tree is cloned and the clone finished later.

A set without slack stays so for ever, and then only trees that have not met it may enter. Each one found is kept, which answers
most questions without a flow. Nodes near the root are tried first, so trees are as shallow as the packing allows.
"""

from dataclasses import dataclass

import numpy as np

from thinwire.collectives.synthesis.flow import min_cut
from thinwire.collectives.synthesis.graph import Counts, Mask, Matrix, Pair

_MANY = 16


@dataclass(slots=True)
class Partial:
    """A tree that grows: its nodes, their depth, its edges, how many equal trees it stands for."""

    root: int
    count: int
    depth: dict[int, int]
    edges: list[Pair]


class Packing:
    """Capacities that shrink and partial trees that wait, while trees grow by one edge at a time."""

    def __init__(self, capacity: Matrix, roots: Counts) -> None:
        self._capacity = capacity.copy()
        self._roots = roots.copy()
        self._many = bool(roots.max() > _MANY)
        self._growing: list[Partial] = []
        self._tight: list[Mask] = []

    def trees(self) -> list[Partial]:
        """All trees, completed; the one that is lowest so far grows next, so none takes the short paths from the others.

        Where roots have many trees, one root comes after the other, and trees stay together: fewer, faster, but higher.
        """
        done: list[Partial] = []
        while (tree := self._lowest()) is not None:
            if len(tree.depth) == len(self._roots):
                done.append(tree)
            else:
                self._grow(tree)
                self._growing.append(tree)
        return done

    def _lowest(self) -> Partial | None:
        if self._roots.any() and not (self._many and self._growing):
            root = int(np.flatnonzero(self._roots)[0])
            count, self._roots[root] = int(self._roots[root]), 0
            return Partial(root, count, {root: 0}, [])
        if not self._growing:
            return None
        sizes = [(max(one.depth.values()), len(one.depth), one.root) for one in self._growing]
        return self._growing.pop(-1 if self._many else sizes.index(min(sizes)))

    def _grow(self, tree: Partial) -> None:
        """Add one edge: from the node nearest to the root that has one for half of these trees or more, else the one for most."""
        best, pair = 0, (-1, -1)
        for level in range(max(tree.depth.values()) + 1):
            for x, y in self._candidates(tree, level):
                most = self._most(tree, x, y, best)
                if most > best:
                    best, pair = most, (x, y)
                if best == tree.count:
                    break
            if best >= tree.count * (1 if self._many else 0.5):
                break
        assert best, f"no edge for the tree of node {tree.root}: the capacities hold fewer trees than asked for"
        self._add(tree, pair, best)

    def _candidates(self, tree: Partial, level: int) -> list[Pair]:
        sources = [x for x, depth in tree.depth.items() if depth == level]
        pairs = [(x, int(y)) for x in sources for y in np.flatnonzero(self._capacity[x]) if int(y) not in tree.depth]
        return sorted(pairs, key=lambda pair: -int(self._capacity[pair]))

    def _add(self, tree: Partial, pair: Pair, count: int) -> None:
        if count < tree.count:
            self._growing.append(Partial(tree.root, tree.count - count, dict(tree.depth), list(tree.edges)))
            tree.count = count
        x, y = pair
        tree.edges.append(pair)
        tree.depth[y] = tree.depth[x] + 1
        self._capacity[pair] -= count

    def _most(self, tree: Partial, x: int, y: int, enough: int) -> int:
        """How many of `tree` may take the edge (x, y); 0 as well where no more than `enough` can."""
        wanted = min(int(self._capacity[x, y]), tree.count)
        if wanted <= enough or any(inside[y] and not inside[x] and inside[list(tree.depth)].any() for inside in self._tight):
            return 0
        size = len(self._roots)
        others = self._growing
        needed = int(self._roots.sum()) + sum(other.count for other in others)
        if self._surely(x, y) >= needed + wanted:
            return wanted
        free = needed + int(self._capacity.sum()) + 1
        graph = np.zeros((size + len(others),) * 2, dtype=np.int64)
        graph[:size, :size] = self._capacity
        graph[x, :size] += self._roots
        graph[x, x] = 0
        for place, other in enumerate(others, start=size):
            graph[x, place] = other.count
            graph[place, list(other.depth)] = free
        value, outside = min_cut(graph, x, y)
        slack = value - needed
        if slack <= 0:
            self._tight.append(~outside[:size])
        return max(0, min(wanted, slack))

    def _surely(self, x: int, y: int) -> int:
        """A flow that surely exists: over one node in between at most."""
        into = np.minimum(self._capacity[:, y], self._capacity[x] + self._roots)
        into[[x, y]] = 0
        done = sum(other.count for other in self._growing if y in other.depth)
        return int(into.sum()) + int(self._capacity[x, y]) + int(self._roots[y]) + done
