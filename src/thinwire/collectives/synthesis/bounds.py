"""No schedule is faster than this, and why: for a network, an op and a size, the seconds and the link or cut that they come from.

    seconds = max(farthest latency, bytes that must cross a cut / its capacity + least latency across it)

n: message bytes as in `collectives.wire` (all_gather: one rank's input; reduce_scatter: the whole input; all_to_all: all that
a rank holds), W ranks, w(S) of them in S. What must cross:

    all_gather, reduce_scatter   w(S) n (or n / W) leave S, or enter it backwards; the worst S is ForestColl's optimum
    broadcast, reduce            n leave every S with the root, or enter it; the worst S is a least cut
    all_reduce                   n leave S and n enter it; m disjoint sets together receive 2 (m-1) n (each byte needs m-1
                                 messages to be added up, and m-1 to be handed out: Patarasuk & Yuan 2009); and `lp`
    all_to_all                   w(S) (W - w(S)) n / W leave S

All but all_to_all are exact in bandwidth up to 32 compute nodes. Beyond, and for all_to_all, the sets tried are single nodes,
hosts and what hangs together when a switch (up to 32 nodes also: all links up to some rate) is taken out; on networks that are
trees these are the worst ones. Time that software spends on messages is not counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components, dijkstra

from thinwire.cluster import Cluster
from thinwire.collectives.synthesis.flow import min_cut
from thinwire.collectives.synthesis.graph import Graph, Mask, graph_of
from thinwire.collectives.synthesis.lp import BROADCAST, TreeProgram, all_reduce_time
from thinwire.collectives.synthesis.optimum import optimum
from thinwire.errors import UserError
from thinwire.units import show

OPS = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "all_to_all")
_EXACT = 32
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Bound:
    """seconds; its two parts (0 for the bandwidth where the farthest latency decides); the links, by names; all in words."""

    seconds: float
    latency_s: float
    bandwidth_s: float
    links: tuple[tuple[str, str], ...]
    where: str


@dataclass(frozen=True, slots=True)
class _Limit:
    """Seconds of the wires alone, and the groups of nodes whose outgoing (or incoming) links cause it."""

    seconds: float
    groups: tuple[Mask, ...]
    outward: bool
    why: str


def bound(network: Cluster | Graph, op: str, message_bytes: float, root: int = 0, *, jointly: bool = True) -> Bound:
    """The lower bound of one call of `op` by all ranks. jointly: also by all cuts of an all-reduce together, which
    takes longer to find."""
    if op not in OPS:
        raise UserError(f"{op!r} has no bound; known: {', '.join(OPS)}")
    graph = graph_of(network) if isinstance(network, Cluster) else network
    if graph.computes == 1:
        return Bound(0.0, 0.0, 0.0, (), f"all ranks are on {graph.nodes[0]}: no link is crossed")
    return _Limits(graph, op, message_bytes, graph.node_of(root), jointly).bound()


class _Limits:
    """What each cut asks for, and how far apart the ranks are."""

    def __init__(self, graph: Graph, op: str, message_bytes: float, root: int, jointly: bool) -> None:
        self._graph, self._op, self._bytes, self._root, self._jointly = graph, op, message_bytes, root, jointly
        self._links = np.array(list(graph.capacity))
        self._rate = np.array([float(value) * graph.bytes_per_s for value in graph.capacity.values()])
        # Zero would mean no link to scipy.
        latency = csr_array(
            (np.array([graph.latency_s[pair] for pair in graph.capacity]) + 1e-15, tuple(zip(*graph.capacity, strict=True)))
        )
        self._far = dijkstra(latency, indices=range(graph.computes))[:, : graph.computes]
        self._weights = graph.weights

    def bound(self) -> Bound:
        best = max(self._limits(), key=lambda limit: limit.seconds)
        links = [pair for group in best.groups for pair in self._links[self._crossed(group, best.outward)].tolist()]
        across = min(self._across(group, best.outward) for group in best.groups)
        nodes = np.arange(self._graph.computes)
        sources, targets = (nodes[[self._root]] if self._op == op else nodes for op in ("broadcast", "reduce"))
        far = self._far[np.ix_(sources, targets)]
        farthest = float(far.max())
        if farthest > best.seconds + across:
            source, target = np.argwhere(far == farthest)[0]
            ends = self._graph.nodes[sources[source]], self._graph.nodes[targets[target]]
            return Bound(farthest, farthest, 0.0, (), f"latency from {ends[0]} to {ends[1]}: {show(farthest, 's')}")
        named = tuple((self._graph.nodes[a], self._graph.nodes[b]) for a, b in links)
        return Bound(best.seconds + across, across, best.seconds, named, self._words(best, named))

    def _limits(self) -> Iterator[_Limit]:
        graph, size = self._graph, self._bytes
        match self._op:
            case "all_gather":
                yield from self._gather(graph, size, True)
            case "reduce_scatter":
                yield from self._gather(graph.reversed(), size / graph.world_size, False)
            case "broadcast":
                yield from self._rooted(graph, True)
            case "reduce":
                yield from self._rooted(graph.reversed(), False)
            case "all_reduce":
                yield from self._all_reduce()
            case _:
                total = graph.world_size
                for group in self._groups():
                    inside = int(self._weights @ group[: graph.computes])
                    for outward in (True, False):
                        why = f"{inside * (total - inside)} of {total * (total - 1)} pairs of ranks"
                        yield self._limit(inside * (total - inside) * size / total, (group,), outward, why)

    def _gather(self, graph: Graph, share: float, outward: bool) -> Iterator[_Limit]:
        """outward: links out of the set that sends; else the graph is reversed, and the set's incoming links count."""
        total = graph.world_size
        sets = [inside for group in self._groups() for inside in (group, ~group)]
        exact = graph.computes <= _EXACT
        if exact and graph.balanced() and (cut := optimum(graph).cut) is not None:
            sets.append(cut)
        for inside in sets:
            ranks = int(self._weights @ inside[: graph.computes])
            yield self._limit(ranks * share, (inside,), outward, f"the shares of {ranks} of {total} ranks")
        if exact and not graph.balanced():
            time = TreeProgram(graph, BROADCAST, self._weights / total).time()
            yield self._joint(time / graph.bytes_per_s * total * share, outward, "switches pass on no more than they receive")

    def _rooted(self, graph: Graph, outward: bool) -> Iterator[_Limit]:
        if graph.computes > _EXACT:
            for group in self._groups():
                yield self._limit(self._bytes, (group if group[self._root] else ~group,), outward, "the whole message")
            return
        capacity, _ = graph.integral()
        others = [node for node in range(graph.computes) if node != self._root]
        inside = min((min_cut(capacity, self._root, node) for node in others), key=lambda found: found[0])[1]
        yield self._limit(self._bytes, (inside,), outward, "the whole message")
        if not graph.balanced():
            time = TreeProgram(graph, BROADCAST, np.eye(1, graph.computes, self._root)[0]).time()
            yield self._joint(time / graph.bytes_per_s * self._bytes, outward, "switches pass on no more than they receive")

    def _all_reduce(self) -> Iterator[_Limit]:
        graph = self._graph
        found = []
        for group in self._groups():
            found += [self._limit(self._bytes, (group,), outward, "the whole message") for outward in (True, False)]
        for groups in self._partitions():
            for outward in (True, False):
                amount = 2 * (len(groups) - 1) * self._bytes
                found.append(
                    self._limit(amount, tuple(groups), outward, f"{len(groups)} parts exchange 2 x {len(groups) - 1} messages")
                )
        yield from found
        best = max(limit.seconds for limit in found)
        if self._jointly and graph.computes <= _EXACT:
            seconds = all_reduce_time(graph) / graph.bytes_per_s * self._bytes
            if seconds > best * (1 + 1e-6):
                yield self._joint(seconds, True, "all cuts together (the joint program)")

    def _joint(self, seconds: float, outward: bool, why: str) -> _Limit:
        """A limit that no single cut gives: all nodes that compute, each with its own links."""
        nodes = tuple(np.arange(len(self._graph.nodes)) == node for node in range(self._graph.computes))
        return _Limit(seconds, nodes, outward, why)

    def _limit(self, amount: float, groups: tuple[Mask, ...], outward: bool, why: str) -> _Limit:
        return _Limit(amount / self._rate_of(groups, outward), groups, outward, why)

    def _groups(self) -> list[Mask]:
        """Single nodes, hosts, and the parts that each switch, or the links up to some rate, hold together."""
        return [group for groups in self._partitions() for group in groups]

    def _partitions(self) -> list[list[Mask]]:
        graph, size = self._graph, len(self._graph.nodes)
        every = [[np.arange(size) == node for node in range(graph.computes)]]
        hosts: dict[str, Mask] = {}
        for node, name in enumerate(graph.nodes):
            hosts.setdefault(name.split("/")[0], np.zeros(size, dtype=bool))[node] = True
        every.append(list(hosts.values()))
        kept = [(self._links != switch).all(1) for switch in range(graph.computes, size)]
        if graph.computes <= _EXACT:
            kept += [self._rate > rate for rate in np.unique(self._rate)]
        for links in (self._links[one].T for one in kept):
            count, part = connected_components(
                csr_array((np.ones(links.shape[1]), tuple(links)), shape=(size, size)), directed=False
            )
            every.append([part == number for number in range(count)])
        held = ([group for group in groups if group[: graph.computes].any()] for groups in every)
        return [groups for groups in held if len(groups) > 1]

    def _crossed(self, group: Mask, outward: bool) -> Mask:
        inside = group if outward else ~group
        return inside[self._links[:, 0]] & ~inside[self._links[:, 1]]

    def _rate_of(self, groups: tuple[Mask, ...], outward: bool) -> float:
        return sum(float(self._rate[self._crossed(group, outward)].sum()) for group in groups)

    def _across(self, group: Mask, outward: bool) -> float:
        inside = group[: self._graph.computes]
        source, target = (inside, ~inside) if outward else (~inside, inside)
        return float(self._far[source][:, target].min())

    def _words(self, limit: _Limit, named: tuple[tuple[str, str], ...]) -> str:
        some = ", ".join(f"{a} -> {b}" for a, b in named[:_NAMED])
        if len(named) > _NAMED:
            some += f", ... ({len(named)} links)"
        return f"{limit.why} over {some}: {show(8 * self._rate_of(limit.groups, limit.outward), 'bit/s')} of payload"
