"""The order of a ring, and the tree of a pipelined broadcast or reduce, from the cluster.

On a tree of switches: depth first, small subtrees first. Every link is then crossed once in each direction, by one flow, which is
the least for any ring, and with equal links as fast as any all-reduce (Patarasuk and Yuan 2009).

On any other network the best of three candidates, judged by the busiest link of their routes, then by the sum over all links:
depth first along the tree of shortest routes from rank 0; the min-max order, up to SEARCHED ranks; the order of ranks.

Min-max order: c(i, j) seconds per bit from rank i to rank j, alone on the wires. Least greatest c(i, j) over the edges of the
ring, then least sum (bottleneck travelling salesman; c may be asymmetric). Exact up to EXACT ranks: dynamic programming over sets
of ranks (Held and Karp 1962) for the least threshold under which a ring exists, then for the least sum under it. Above that a
heuristic: the order of ranks and nearest neighbour from several starts, each improved by moves that remove the worst edge
(turn round a stretch, move a rank) while they help. It may miss the best order.

Widest tree: in many segments every edge of a tree is busy all the time, so the rate is that of the fullest link:

    rate = min over links of  bandwidth / (edges of the tree whose routes cross the link)

It grows from the root (Prim 1957), always along the edge out of what is reached with the most bandwidth / (edges so far + 1),
then fewest links, then least depth; it is compared with the chain in ring order, and the faster one taken. A heuristic: the best
tree with shared links is NP-hard to find (a tree of bounded degree is a special case).
"""

from collections.abc import Callable, Iterator, Sequence
from math import inf
from operator import add

import networkx

from thinwire.cluster import Cluster, Link
from thinwire.cluster.graph import Routes, graph
from thinwire.collectives.schedules.rooted import Parents, chain
from thinwire.collectives.schedules.schedule import check_order
from thinwire.errors import UserError

EXACT = 12
SEARCHED = 64
STARTS = 4

Matrix = Sequence[Sequence[float]]


def ring_order(cluster: Cluster) -> tuple[int, ...]:
    """The ranks of `cluster` in the order in which a ring should visit them; begins with rank 0."""
    wires = _connected(cluster)
    if networkx.is_tree(wires):
        return _depth_first(cluster, wires)
    shortest = networkx.bfs_tree(wires, cluster.node_of(0)).to_undirected()
    routes = Routes(cluster)
    candidates = [_depth_first(cluster, shortest), tuple(range(cluster.world_size))]
    if cluster.world_size <= SEARCHED:
        candidates.insert(1, min_max_order(seconds_per_bit(cluster)))
    return min(candidates, key=lambda order: _busy_s(routes, order))


def is_tree(cluster: Cluster) -> bool:
    """Whether the network of the ranks is a tree, so that depth first is the best order there is."""
    return bool(networkx.is_tree(_connected(cluster)))


def _connected(cluster: Cluster) -> networkx.Graph:
    wires = graph(cluster).to_undirected()
    return wires.subgraph(networkx.node_connected_component(wires, cluster.node_of(0)))


def _busy_s(routes: Routes, order: Sequence[int]) -> tuple[float, float]:
    """Seconds that the busiest link, and all together, need for one bit from each rank to the next in the ring."""
    loads = routes.load((order[i - 1], order[i], 1) for i in range(len(order)))
    busy = [bits / link.bandwidth_bps.value for link, bits in loads.items()]
    return max(busy, default=0.0), sum(busy)


def seconds_per_bit(cluster: Cluster) -> list[list[float]]:
    """c(i, j): the slowest link from rank i to rank j; 0 on one node."""
    routes, ranks = Routes(cluster), range(cluster.world_size)
    return [[max((1 / link.bandwidth_bps.value for link in routes.between(i, j)), default=0.0) for j in ranks] for i in ranks]


def min_max_order(seconds: Matrix) -> tuple[int, ...]:
    """See the top of the file; begins with rank 0."""
    p = len(seconds)
    if p <= 2:
        return tuple(range(p))
    return _exact(seconds) if p <= EXACT else _heuristic(seconds)


def _depth_first(cluster: Cluster, tree: networkx.Graph) -> tuple[int, ...]:
    """Ranks in the order in which a walk from rank 0 along the tree meets their nodes."""
    on_node: dict[str, list[int]] = {}
    for rank in range(cluster.world_size):
        on_node.setdefault(cluster.node_of(rank), []).append(rank)
    start = cluster.node_of(0)
    parents = {start: start, **{node: before for before, node in networkx.bfs_edges(tree, start)}}
    below = {node: list(on_node.get(node, [])) for node in parents}
    for node in reversed(parents):
        if node != start:
            below[parents[node]] += below[node]
    order: list[int] = []
    waiting = [start]
    while waiting:
        node = waiting.pop()
        order += on_node.get(node, [])
        further = [other for other in tree.neighbors(node) if other != parents[node] and below[other]]
        waiting += sorted(further, key=lambda other: (len(below[other]), min(below[other])), reverse=True)
    return check_order(order)


def _exact(seconds: Matrix) -> tuple[int, ...]:
    least, _ = _held_karp(seconds, inf, max)
    return _held_karp(seconds, least, add)[1]


def _held_karp(seconds: Matrix, limit: float, join: Callable[[float, float], float]) -> tuple[float, tuple[int, ...]]:
    """The least cost of a ring with all edges at most `limit`, of which there is one, and the ring; join: edges into a cost."""
    p = len(seconds)
    best: dict[tuple[int, int], tuple[float, int]] = {(1, 0): (0.0, 0)}
    for visited in range(3, 1 << p, 2):
        for j in range(1, p):
            if visited >> j & 1:
                before = visited ^ 1 << j
                near = [i for i in range(p) if (before, i) in best and seconds[i][j] <= limit]
                least = min(((join(best[before, i][0], seconds[i][j]), i) for i in near), default=None)
                if least:
                    best[visited, j] = least
    visited, order = (1 << p) - 1, []
    closing = [j for j in range(1, p) if (visited, j) in best and seconds[j][0] <= limit]
    cost, last = min((join(best[visited, j][0], seconds[j][0]), j) for j in closing)
    while last:
        order.append(last)
        visited, last = visited ^ 1 << last, best[visited, last][1]
    return cost, (0, *reversed(order))


def _heuristic(seconds: Matrix) -> tuple[int, ...]:
    p = len(seconds)
    starts = sorted({place * p // STARTS for place in range(STARTS)})
    begun = [list(range(p)), *(_nearest(seconds, start) for start in starts)]
    order = min((_improved(seconds, one) for one in begun), key=lambda one: _cost(seconds, one))
    zero = order.index(0)
    return tuple(order[zero:] + order[:zero])


def _nearest(seconds: Matrix, start: int) -> list[int]:
    order, left = [start], set(range(len(seconds))) - {start}
    while left:
        row = seconds[order[-1]]
        order.append(min(left, key=lambda j: (row[j], j)))
        left.remove(order[-1])
    return order


def _improved(seconds: Matrix, order: list[int]) -> list[int]:
    cost = _cost(seconds, order)
    while True:
        worst = max(range(len(order)), key=lambda i: seconds[order[i - 1]][order[i]])
        order = order[worst:] + order[:worst]  # the worst edge now goes from the last to the first
        least, better = min(((_cost(seconds, one), one) for one in _moves(order)), default=((inf, inf), order))
        if least >= cost:
            return order
        cost, order = least, better


def _moves(order: list[int]) -> Iterator[list[int]]:
    """Rings without the edge from the last to the first."""
    for i in range(1, len(order) - 1):
        yield order[:i][::-1] + order[i:]
        yield order[1 : i + 1] + order[:1] + order[i + 1 :]
        yield order[:i] + order[-1:] + order[i:-1]


def _cost(seconds: Matrix, order: Sequence[int]) -> tuple[float, float]:
    edges = [seconds[order[i - 1]][order[i]] for i in range(len(order))]
    return max(edges), sum(edges)


def widest_tree(cluster: Cluster, root: int, *, up: bool = False) -> Parents:
    """A tree over all ranks of `cluster`; up: for a reduce, whose messages go from child to parent."""
    if not 0 <= root < cluster.world_size:
        raise UserError(f"root = {root}, but ranks are 0 to {cluster.world_size - 1}")
    routes = Routes(cluster)
    order = ring_order(cluster)
    if up:
        order = order[::-1]
    place = order.index(root)
    candidates = [_grown(routes, cluster.world_size, root, up), chain(order[place:] + order[:place])]
    return max(candidates, key=lambda parents: rate_bps(routes, parents, up=up))


def rate_bps(routes: Routes, parents: Parents, *, up: bool = False) -> float:
    """The rate at which a long vector runs through the tree in many segments; inf if no link is crossed."""
    flows = ((rank, parent, 1) if up else (parent, rank, 1) for rank, parent in enumerate(parents) if parent >= 0)
    return min((link.bandwidth_bps.value / edges for link, edges in routes.load(flows).items()), default=inf)


def _grown(routes: Routes, p: int, root: int, up: bool) -> Parents:
    edges: dict[Link, int] = {}
    parents, depth = [-1] * p, [0] * p
    reached, left = [root], [rank for rank in range(p) if rank != root]

    def crossed(edge: tuple[int, int]) -> tuple[Link, ...]:
        return routes.between(*(edge[::-1] if up else edge))

    def merit(edge: tuple[int, int]) -> tuple[float, int, int]:
        links = crossed(edge)
        rate = min((link.bandwidth_bps.value / (edges.get(link, 0) + 1) for link in links), default=inf)
        return rate, -len(links), -depth[edge[0]]

    while left:
        source, target = max(((i, j) for i in reached for j in left), key=merit)
        for link in crossed((source, target)):
            edges[link] = edges.get(link, 0) + 1
        parents[target], depth[target] = source, depth[source] + 1
        reached.append(target)
        left.remove(target)
    return tuple(parents)
