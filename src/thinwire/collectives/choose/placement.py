"""Where the ranks of a group sit: the rates of their cards, their racks, orders and chains that follow from it."""

from collections.abc import Sequence
from math import inf, isqrt

from thinwire.cluster import Cluster
from thinwire.collectives.schedules.orders import EXACT, is_tree, min_max_order, ring_order, seconds_per_bit

Order = tuple[int, ...]


def card_rates_bps(cluster: Cluster) -> tuple[float, ...]:
    """What each rank can send, or receive if that is less; ranks of one node share it. 1 for all if there are no links."""
    out: dict[str, float] = {}
    into: dict[str, float] = {}
    for link in cluster.links:
        out[link.source] = out.get(link.source, 0.0) + link.bandwidth_bps.value
        into[link.target] = into.get(link.target, 0.0) + link.bandwidth_bps.value
    nodes = [cluster.node_of(rank) for rank in range(cluster.world_size)]
    rates = [min(out.get(node, inf), into.get(node, inf)) / nodes.count(node) for node in nodes]
    return tuple(rates) if max(rates) < inf else (1.0,) * len(rates)


def orders(cluster: Cluster) -> dict[str, Order]:
    """Orders for rings, each once, by what to call them; that of the ranks has no name.

    Where the network is no tree, the min-max order is tried too, in small groups.
    """
    p = cluster.world_size
    found: dict[str, Order] = {"": tuple(range(p)), "ring order": ring_order(cluster)}
    if 2 < p <= EXACT and not is_tree(cluster):
        found["min-max order"] = min_max_order(seconds_per_bit(cluster))
    once = {order: name for name, order in reversed(found.items())}
    return {name: order for name, order in found.items() if once[order] == name}


def groupings(cluster: Cluster, order: Sequence[int]) -> list[tuple[Order, ...]]:
    """Partitions of the ranks into racks, two racks or more with two ranks somewhere: by host, by the switch of a card.

    Racks, and ranks in them, come in the order given.
    """
    switches = {switch.name for switch in cluster.switches}
    above: dict[str, list[str]] = {}
    for link in cluster.links:
        if link.target in switches:
            above.setdefault(link.source, []).append(link.target)
    hosts = {rank: cluster.host_of(rank).name for rank in order}
    first = {rank: above.get(cluster.node_of(rank), [hosts[rank]])[0] for rank in order}
    last = {rank: above.get(cluster.node_of(rank), [hosts[rank]])[-1] for rank in order}
    found: list[tuple[Order, ...]] = []
    for place in (hosts, first, last):
        racks: dict[str, list[int]] = {}
        for rank in order:
            racks.setdefault(place[rank], []).append(rank)
        grouping = tuple(map(tuple, racks.values()))
        if 1 < len(grouping) < len(order) and grouping not in found:
            found.append(grouping)
    return found


def grid(order: Sequence[int]) -> tuple[Order, ...] | None:
    """The ranks as rows of a torus, as near to a square as can be; None if their number is prime."""
    p = len(order)
    rows = next((rows for rows in range(isqrt(p), 1, -1) if p % rows == 0), None)
    return rows and tuple(tuple(order[first : first + p // rows]) for first in range(0, p, p // rows))  # type: ignore[return-value]


def with_slow_ends(order: Sequence[int], rates: Sequence[float]) -> Order:
    """The ring cut open where the two ends of the chain are as slow as can be: they pass on the least."""
    p = len(order)
    cut = min(range(p), key=lambda place: (sorted((rates[order[place]], rates[order[place - 1]])), place))
    return (*order[cut:], *order[:cut])


def from_root(order: Sequence[int], root: int) -> Order:
    """The ring cut open so that it begins with the root."""
    place = order.index(root)
    return (*order[place:], *order[:place])
