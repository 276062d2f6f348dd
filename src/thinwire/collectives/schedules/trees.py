"""The tree of a pipelined broadcast or reduce, from the cluster.

In many segments every edge of the tree is busy all the time, so the rate is that of the fullest link:

    rate = min over links of  bandwidth / (edges of the tree whose routes cross the link)

    maximum_bandwidth_tree   from a table of bandwidths between pairs, as if no two edges shared a link: the greatest least edge.
                             Exact: grow from the root, always along the widest edge out of what is reached (Prim 1957; in a
                             directed graph too, for every cut has an edge that is as wide as the best threshold).
    widest_tree              from a Cluster, with sharing: the same growth by bandwidth / (edges so far + 1), then fewest links,
                             then least depth; compared with the chain in ring order, and the faster one taken. A heuristic: the
                             best tree with shared links is NP-hard to find (a tree of bounded degree is a special case).
"""

from collections.abc import Sequence
from math import inf

from thinwire.cluster import Cluster, Link
from thinwire.cluster.graph import Routes
from thinwire.collectives.schedules.orders import ring_order
from thinwire.collectives.schedules.rooted import Parents, chain
from thinwire.errors import UserError


def maximum_bandwidth_tree(bandwidth_bps: Sequence[Sequence[float]], root: int) -> Parents:
    """bandwidth_bps[i][j] from rank i to j. Among equally wide edges: from the rank with the fewest children."""
    p = len(bandwidth_bps)
    _check_root(root, p)
    parents, children = [-1] * p, [0] * p
    reached, left = [root], [rank for rank in range(p) if rank != root]
    while left:
        source, target = max(
            ((i, j) for i in reached for j in left), key=lambda edge: (bandwidth_bps[edge[0]][edge[1]], -children[edge[0]])
        )
        parents[target] = source
        children[source] += 1
        reached.append(target)
        left.remove(target)
    return tuple(parents)


def widest_tree(cluster: Cluster, root: int, *, up: bool = False) -> Parents:
    """A tree over all ranks of `cluster`; up: for a reduce, whose messages go from child to parent."""
    _check_root(root, cluster.world_size)
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
    loads: dict[Link, int] = {}
    parents, depth = [-1] * p, [0] * p
    reached, left = [root], [rank for rank in range(p) if rank != root]

    def merit(edge: tuple[int, int]) -> tuple[float, int, int]:
        links = routes.between(*(edge[::-1] if up else edge))
        rate = min((link.bandwidth_bps.value / (loads.get(link, 0) + 1) for link in links), default=inf)
        return rate, -len(links), -depth[edge[0]]

    while left:
        source, target = max(((i, j) for i in reached for j in left), key=merit)
        for link in routes.between(*((target, source) if up else (source, target))):
            loads[link] = loads.get(link, 0) + 1
        parents[target], depth[target] = source, depth[source] + 1
        reached.append(target)
        left.remove(target)
    return tuple(parents)


def _check_root(root: int, p: int) -> None:
    if not 0 <= root < p:
        raise UserError(f"root = {root}, but ranks are 0 to {p - 1}")
