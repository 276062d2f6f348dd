"""From a graph to trees: optimum, switches out, packing, and back to physical paths, for each op.

    all-gather, reduce-scatter   the exact optimum, or the best with k trees a rank (ForestColl, fixed k)
    broadcast, reduce            one root, as much as the tightest cut lets through (Edmonds 1973)
    all-reduce                   reduce trees and broadcast trees that run at once, roots with unequal shares (`lp`)

Real capacities become whole numbers of trees like this: D trees in all; x_u is rounded down to r_u / D, each D c_e up to an
integer so that switches still pass on what they receive. Every cut then holds the r_u trees, and what is lost falls with D.

A tree carries `weight` of the whole message. Outward (broadcast, all-gather) bytes run from the root to the leaves; inward
(reduce, reduce-scatter) from the leaves to the root. A path always runs with the bytes.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from math import lcm

import numpy as np
from scipy.optimize import linprog

from thinwire.collectives.synthesis.flow import switch_balance, violated_cut
from thinwire.collectives.synthesis.graph import Counts, Floats, Graph, Matrix, Pair
from thinwire.collectives.synthesis.lp import BOTH, BROADCAST, Sharing, TreeProgram, all_reduce_time, sequential_time
from thinwire.collectives.synthesis.optimum import fixed_k, optimum
from thinwire.collectives.synthesis.packing import Packing, Partial
from thinwire.collectives.synthesis.split import Piece, paired, take, without_switches
from thinwire.errors import UserError

_LOSS = 0.02
"""Few trees mean few messages: a fiftieth of the bandwidth is given for them where roots or links are shared unequally."""
_TREES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48, 96, 192, 384, 768)


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


@dataclass(frozen=True, slots=True)
class AllReducePlan:
    """Trees that add up and trees that hand out, at the same time. seconds_per_byte: both together; optimum: of the program."""

    reduce: Forest
    broadcast: Forest
    seconds_per_byte: float
    optimum_seconds_per_byte: float

    def parts(self) -> tuple[tuple[Tree, Tree, Fraction], ...]:
        """(reduce tree, broadcast tree, part of the message): a common refinement, both with the same root."""
        parts: list[tuple[Tree, Tree, Fraction]] = []
        for root in self.reduce.shares():
            ups = [(tree, tree.weight) for tree in self.reduce.trees if tree.root == root]
            parts += paired(ups, [(tree, tree.weight) for tree in self.broadcast.trees if tree.root == root])
        return tuple(parts)


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


def packed(graph: Graph, op: str, root: int = 0, k: int | None = None) -> Forest:
    """The trees of any op but all_reduce (`all_reduce_plan`) and all_to_all, which has none.

    k: of an all-gather or reduce-scatter, trees for each rank; None: the exact optimum, where switches are balanced.
    """
    match op:
        case "reduce_scatter":
            return packed(graph.reversed(), "all_gather", k=k).reversed()
        case "reduce":
            return packed(graph.reversed(), "broadcast", root).reversed()
        case "broadcast":
            return _shared(graph, np.eye(1, graph.computes, graph.node_of(root))[0], root)
    if graph.computes == 1 or k is not None or graph.balanced():
        best = optimum(graph) if k is None else fixed_k(graph, k)
        return _forest(graph, best.capacity, graph.weights * best.k)
    return _shared(graph, graph.weights / graph.world_size)


def all_reduce_plan(graph: Graph) -> AllReducePlan:
    """The joint optimum as trees, or up to two percent less where that takes far fewer trees."""
    if graph.computes == 1:
        forest = _forest(graph, graph.integral()[0], graph.weights)
        return AllReducePlan(forest.reversed(), forest, 0.0, 0.0)
    time, sequential = all_reduce_time(graph), sequential_time(graph)
    if sequential is not None and sequential <= time * (1 + 1e-6):
        # Equal shares lose nothing, and their trees are lower. Either half keeps the links busy in its own half of the time.
        reduce = packed(graph, "reduce_scatter", k=_small_k(graph.reversed()))
        broadcast = packed(graph, "all_gather", k=_small_k(graph))
    else:
        sharing = TreeProgram(graph, BOTH).solve()
        roots, outward, inward = _rounded(graph, sharing)
        reduce, broadcast = _forest(graph.reversed(), inward.T.copy(), roots).reversed(), _forest(graph, outward, roots)
        time = sharing.time
    seconds_per_byte = congestion(graph, *reduce.trees, *broadcast.trees)
    return AllReducePlan(reduce, broadcast, seconds_per_byte, time / graph.bytes_per_s)


def _small_k(graph: Graph) -> int | None:
    """The fewest trees a rank that lose little; None: the exact number."""
    exact = float(optimum(graph).time)
    return next((k for k in (1, 2, 3, 4) if float(fixed_k(graph, k).time) <= exact * (1 + _LOSS)), None)


def _shared(graph: Graph, shares: Floats, root: int | None = None) -> Forest:
    """Broadcast trees with given shares of the roots, for switches of any kind."""
    if graph.computes == 1:
        return _forest(graph, graph.integral()[0], np.array([1]), root)
    roots, capacity, _ = _rounded(graph, TreeProgram(graph, BROADCAST, shares).solve())
    return _forest(graph, capacity, roots, root)


def _rounded(graph: Graph, sharing: Sharing) -> tuple[Counts, Matrix, Matrix]:
    """Whole trees for each root, and whole broadcast and reduce capacities that surely hold them; the fewest that lose little."""
    shares, parts = sharing.roots, (sharing.broadcast, sharing.reduce)
    common = lcm(*(Fraction(float(share)).limit_denominator(64).denominator for share in shares))
    rates = np.zeros((len(graph.nodes),) * 2)
    for pair, value in graph.capacity.items():
        rates[pair] = float(value)
    ideal = _busiest(parts, rates)
    found: list[tuple[float, Counts, Matrix, Matrix]] = []
    for many in _TREES:
        count = common * many
        roots = np.floor(shares * count + 1e-5).astype(np.int64)
        if not roots.any():
            continue
        broadcast, reduce = (_circulation(part * count, graph.computes) for part in parts)
        if violated_cut(broadcast, roots) or (reduce.any() and violated_cut(reduce.T, roots)):
            continue
        loss = _busiest((broadcast, reduce), rates) / int(roots.sum()) / ideal - 1
        found.append((loss, roots, broadcast, reduce))
        if loss <= _LOSS:
            break
    if not found:
        raise UserError(f"{graph.name}: rates differ too much for whole trees; leave out the slowest links")
    return min(found, key=lambda one: one[0])[1:]


def _busiest(parts: Sequence[Floats] | Sequence[Matrix], rates: Floats) -> float:
    loads = np.sum(parts, axis=0)
    return float(np.divide(loads, rates, out=np.zeros_like(rates), where=rates > 0).max())


def _circulation(least: Floats, computes: int) -> Matrix:
    """The smallest integers of at least `least` that keep the switches balanced."""
    lower = np.ceil(least - 1e-5).astype(np.int64)
    if bool((lower.sum(0) == lower.sum(1))[computes:].all()):
        return lower
    links = np.argwhere(least > 1e-9)
    places = links[:, 0], links[:, 1]
    balance = switch_balance(links, computes, len(lower))
    bounds = [(amount, None) for amount in lower[places].tolist()]
    done = linprog(1 / least[places], A_eq=balance, b_eq=np.zeros(len(balance)), bounds=bounds, method="highs-ds")
    result = np.zeros_like(lower)
    result[places] = np.rint(done.x).astype(np.int64)  # a vertex of a network matrix is integral
    return result


def _forest(graph: Graph, capacity: Matrix, roots: Counts, root: int | None = None) -> Forest:
    """roots[u] trees from each compute node, shared evenly by its ranks (or all from the rank `root`), within `capacity`."""
    direct, paths = without_switches(capacity, roots)
    total = int(roots.sum())
    left = {rank: Fraction(int(roots[node]), len(ranks)) for node, ranks in enumerate(graph.ranks) for rank in ranks}
    if root is not None:
        left = {rank: Fraction(total if rank == root else 0) for rank in left}
    weights: defaultdict[tuple[int, tuple[Edge, ...]], Fraction] = defaultdict(Fraction)
    for tree in Packing(direct, roots).trees():
        for chosen, count in _on_links(tree, paths):
            amount = Fraction(count)
            for rank in graph.ranks[tree.root]:
                part = min(amount, left[rank])
                if part:
                    weights[rank, _over_ranks(graph, tree, chosen, rank)] += part
                    left[rank] -= part
                    amount -= part
    ordered = sorted(weights.items(), key=lambda item: (item[0][0], -item[1]))
    trees = tuple(Tree(rank, weight / total, edges) for (rank, edges), weight in ordered)
    return Forest(False, trees, congestion(graph, *trees))


def _on_links(tree: Partial, paths: dict[Pair, list[Piece]]) -> list[tuple[list[tuple[int, ...]], int]]:
    """The tree once for each choice of physical paths, with its count; what it uses is taken from `paths`."""
    taken = []
    for pair in tree.edges:
        # A path that carries all of these trees comes first, so that they stay together.
        paths[pair].sort(key=lambda piece: (piece[1] < tree.count, piece[1] if piece[1] >= tree.count else -piece[1]))
        taken.append(take(paths[pair], tree.count))
    result, left = [], tree.count
    while left:
        part = min((pieces[0][1] for pieces in taken), default=left)
        result.append(([take(pieces, part)[0][0] for pieces in taken], part))
        left -= part
    return result


def _over_ranks(graph: Graph, tree: Partial, paths: list[tuple[int, ...]], root: int) -> tuple[Edge, ...]:
    """Edges between ranks: the first rank of a node (the root's: the root) receives for it and hands on to the others."""
    first = {node: ranks[0] for node, ranks in enumerate(graph.ranks)} | {tree.root: root}
    edges = []
    for (x, y), path in zip(tree.edges, paths, strict=True):
        edges.append(Edge(first[x], first[y], tuple(graph.nodes[node] for node in path)))
    for node in (tree.root, *(y for _, y in tree.edges)):
        edges += [Edge(first[node], rank, (graph.nodes[node],)) for rank in graph.ranks[node] if rank != first[node]]
    return tuple(edges)
