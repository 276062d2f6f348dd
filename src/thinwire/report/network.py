"""The cluster reduced to what can be drawn: alike nodes become one with a count, the rest a tree from its middle.

1. A host is one node with its devices and the switches inside it (names before the "/"), unless it is the only one.
2. Twins, nodes with the same neighbours over the same links, are merged: rails always, hosts when there are too many.
3. Breadth first from the switch farthest above the hosts; subtrees alike are merged when still too many.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import networkx

from thinwire.cluster import Cluster, Link
from thinwire.stepcost import LinkLoad

MAX_LEAVES = 40


@dataclass(frozen=True)
class Direction:
    """One direction of a drawn cable: line rate, delay, and the heaviest load among the links it stands for.

    `bytes_per_step` and `busy_s` are None where nothing was predicted.
    """

    bandwidth_bps: float
    latency_s: float
    measured: bool
    bytes_per_step: float | None
    busy_s: float | None
    axes: Mapping[str, float] = field(default_factory=dict)
    """The bytes by axis of the layout."""


@dataclass
class Node:
    """A drawn node: `members` alike nodes; `up` and `down` are the cable to the parent, None at the root."""

    members: list[str]
    kind: str
    detail: str = ""
    children: list["Node"] = field(default_factory=list)
    up: Direction | None = None
    down: Direction | None = None

    @property
    def name(self) -> str:
        return _name(self.members)

    @property
    def directions(self) -> list[Direction]:
        """Of the cable to the parent, those that exist."""
        return [direction for direction in (self.up, self.down) if direction]

    @property
    def leaves(self) -> int:
        return sum(child.leaves for child in self.children) or 1


@dataclass(frozen=True)
class Picture:
    """The tree, and what is not in it as (node, node, direction)."""

    roots: list[Node]
    others: list[tuple[str, str, Direction]]


def picture(cluster: Cluster, loads: Sequence[LinkLoad]) -> Picture:
    """What to draw of `cluster` with the predicted loads of its links."""
    graph = _contracted(cluster, loads)
    leaves = sum(data["kind"] == "host" for _, data in graph.nodes(data=True))
    graph = _without_twins(graph, hosts_too=leaves > MAX_LEAVES)
    roots, drawn = [], set()
    for part in sorted(networkx.weakly_connected_components(graph), key=len, reverse=True):
        root, edges = _tree(graph.subgraph(part))
        roots.append(root)
        drawn |= edges
    if sum(root.leaves for root in roots) > MAX_LEAVES:
        roots = [_folded(root) for root in roots]
        if len(roots) > 1:
            roots = _merged(roots)
    others = [
        (_name(graph.nodes[source]["members"]), _name(graph.nodes[target]["members"]), direction)
        for source, target, direction in graph.edges(data="direction")
        if frozenset((source, target)) not in drawn
    ]
    return Picture(roots, others[: 2 * MAX_LEAVES])


def _contracted(cluster: Cluster, loads: Sequence[LinkLoad]) -> networkx.DiGraph:
    """Hosts and switches as nodes {members, kind, detail}, links between them as edges {direction}."""
    by_link = {(load.source, load.target): load for load in loads}
    inside = len(cluster.hosts) == 1 and bool(cluster.links)
    graph = networkx.DiGraph()
    for host in cluster.hosts:
        kinds = sorted({device.kind for device in host.devices})
        detail = "" if inside else f"{len(host.devices)} × {', '.join(kinds)}"
        for name in [device.name for device in host.devices] if inside else [host.name]:
            graph.add_node(name, members=[name], kind="host", detail=detail)
    for switch in cluster.switches:
        if inside or "/" not in switch.name:
            graph.add_node(switch.name, members=[switch.name], kind=switch.kind, detail="")
    parallel: dict[tuple[str, str], list[Direction]] = defaultdict(list)
    for link in cluster.links:
        ends = (link.source, link.target) if inside else tuple(end.split("/")[0] for end in (link.source, link.target))
        if ends[0] != ends[1]:
            parallel[ends[0], ends[1]].append(_direction(link, by_link.get((link.source, link.target)), bool(loads)))
    for (source, target), directions in parallel.items():
        if source in graph and target in graph:
            graph.add_edge(source, target, direction=_heaviest(directions))
    return graph


def _direction(link: Link, load: LinkLoad | None, predicted: bool) -> Direction:
    none = 0.0 if predicted else None
    return Direction(
        bandwidth_bps=link.bandwidth_bps.value,
        latency_s=link.latency_s.value,
        measured=link.bandwidth_bps.source == "measured",
        bytes_per_step=load.bytes_per_step if load else none,
        busy_s=load.busy_s if load else none,
        axes=load.axes if load else {},
    )


def _heaviest(directions: Sequence[Direction]) -> Direction:
    return max(directions, key=lambda direction: (direction.busy_s or 0.0, -direction.bandwidth_bps))


def _without_twins(graph: networkx.DiGraph, hosts_too: bool) -> networkx.DiGraph:
    """Merge nodes of one kind with equal neighbours, over links of equal rate, round by round."""
    while True:
        twins: dict[object, list[str]] = defaultdict(list)
        for node, data in graph.nodes(data=True):
            ends = frozenset(
                (target if source == node else source, direction.bandwidth_bps, direction.latency_s, source == node)
                for edges in (graph.out_edges, graph.in_edges)
                for source, target, direction in edges(node, data="direction")
            )
            many = data["kind"] != "host" and len({end for end, *_ in ends}) > 1
            twins[(data["kind"], data["detail"], ends) if ends and (hosts_too or many) else node].append(node)
        groups = [group for group in twins.values() if len(group) > 1]
        if not groups:
            return graph
        graph = graph.copy()
        for first, *rest in groups:
            for other in rest:
                graph.nodes[first]["members"] = graph.nodes[first]["members"] + graph.nodes[other]["members"]
                around = [*graph.out_edges(other, data="direction"), *graph.in_edges(other, data="direction")]
                for source, target, direction in around:
                    edge = (first if source == other else source, first if target == other else target)
                    known = graph.edges[edge]["direction"] if graph.has_edge(*edge) else direction
                    graph.add_edge(*edge, direction=_heaviest([known, direction]))
                graph.remove_node(other)


def _tree(graph: networkx.DiGraph) -> tuple[Node, set[frozenset[str]]]:
    """A breadth-first tree of a connected graph, and the cables it uses."""
    plain = graph.to_undirected()
    farthest = networkx.eccentricity(plain)
    hosts = {node for node, kind in graph.nodes(data="kind") if kind == "host"}
    above = networkx.multi_source_dijkstra_path_length(plain, hosts, weight=None) if hosts else farthest
    root = max(plain, key=lambda node: (above[node], -farthest[node], plain.degree(node)))
    nodes = {name: Node(data["members"], data["kind"], data["detail"]) for name, data in graph.nodes(data=True)}
    used = set()
    for parent, child in networkx.bfs_edges(plain, root):
        used.add(frozenset((parent, child)))
        nodes[parent].children.append(nodes[child])
        nodes[child].up = (graph.get_edge_data(child, parent) or {}).get("direction")
        nodes[child].down = (graph.get_edge_data(parent, child) or {}).get("direction")
    return nodes[root], used


def _folded(node: Node) -> Node:
    """The node with alike children merged, bottom up."""
    node.children = _merged([_folded(child) for child in node.children])
    return node


def _merged(nodes: list[Node]) -> list[Node]:
    groups: dict[object, list[Node]] = defaultdict(list)
    for node in nodes:
        groups[_shape(node)].append(node)
    merged = []
    for first, *rest in groups.values():
        for other in rest:
            first.members = first.members + other.members
            first.up = _heaviest([first.up, other.up]) if first.up and other.up else None
            first.down = _heaviest([first.down, other.down]) if first.down and other.down else None
        merged.append(first)
    return merged


def _shape(node: Node) -> tuple[object, ...]:
    rates = tuple((end.bandwidth_bps, end.latency_s) if end else None for end in (node.up, node.down))
    below = tuple(sorted((repr(_shape(child)), len(child.members)) for child in node.children))
    return (node.kind, node.detail, rates, below)


def _name(members: Sequence[str]) -> str:
    return members[0] if len(members) == 1 else f"{members[0]} … ×{len(members)}"
