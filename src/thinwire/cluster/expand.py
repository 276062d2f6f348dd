"""From the shorthands of a cluster file to the graph: templates are counted out, cards and racks become links."""

from collections.abc import Iterator
from itertools import product
from math import prod

from thinwire.cluster.model import Cluster, Device, Host, Link, Switch
from thinwire.cluster.spec import MAX_COUNT, Cable, ClusterSpec, HostSpec, LinkSpec
from thinwire.errors import UserError

CORE_SWITCH = "switch"


def expand(spec: ClusterSpec) -> Cluster:
    """The cluster that `spec` describes. UserError for what only the whole can show: names, counters, routes."""
    hosts = [_host(host, index) for host in spec.host for index in range(host.count)]
    switches = [
        Switch(name=_fill("switch.name", switch.name, {"i": index}), kind=switch.kind)
        for switch in spec.switch
        for index in range(switch.count)
    ]
    racks = {}
    links: list[Link] = []
    for rack in spec.rack:
        for index in range(rack.count):
            name = _fill("rack.name", rack.name, {"i": index})
            if name in racks:
                raise UserError(f"rack.name = {name!r} is given twice; names of racks must differ")
            racks[name] = _cable(rack.uplink, name, _fill("rack.uplink.to", rack.uplink.to or CORE_SWITCH, {"i": index}))
    places = ((host_spec, index) for host_spec in spec.host for index in range(host_spec.count))
    for (host_spec, index), host in zip(places, hosts, strict=True):
        if host_spec.card is not None:
            links += _card(host_spec, host, index, {*racks, *(switch.name for switch in switches)})
    for uplink in racks.values():
        links += uplink
    known = {host.name for host in hosts} - set(racks) | {switch.name for switch in switches}
    for end in dict.fromkeys(end for link in links for end in (link.source, link.target)):
        if end not in known:
            switches.append(Switch(name=end))
    links += [link for link_spec in spec.link for link in _each(link_spec)]
    cluster = Cluster(name=spec.name, hosts=tuple(hosts), switches=tuple(switches), links=tuple(links), ranks=tuple(spec.ranks))
    _check_joined(cluster)
    return cluster


def _check_joined(cluster: Cluster) -> None:
    """UserError unless every rank can reach every other: all from the first, and the first from all."""
    nodes = list(dict.fromkeys(cluster.node_of(rank) for rank in range(cluster.world_size)))
    ahead: dict[str, list[str]] = {}
    back: dict[str, list[str]] = {}
    for link in cluster.links:
        ahead.setdefault(link.source, []).append(link.target)
        back.setdefault(link.target, []).append(link.source)
    reached, reaching = _reached(nodes[0], ahead), _reached(nodes[0], back)
    for node in nodes:
        for known, source, target in ((reached, nodes[0], node), (reaching, node, nodes[0])):
            if node not in known:
                raise UserError(f"{cluster.name}: no way from {source!r} to {target!r}; add the missing link or card")


def _reached(start: str, neighbours: dict[str, list[str]]) -> set[str]:
    reached, edge = {start}, [start]
    while edge:
        edge = list({node for last in edge for node in neighbours.get(last, ())} - reached)
        reached.update(edge)
    return reached


def _host(spec: HostSpec, index: int) -> Host:
    place = {"i": index}
    name = _fill("host.name", spec.name, place)
    devices = tuple(
        Device(
            name=f"{name}/" + _fill("host.device.name", device.name or f"{device.kind}{{j}}", place | {"j": j}),
            kind=device.kind,
            flops_per_s=device.flops_per_s,
            memory_bytes=device.memory_bytes,
        )
        for device in spec.device
        for j in range(device.count)
    )
    return Host(
        name=name,
        devices=devices,
        rack=_fill("host.rack", spec.rack, place) if spec.rack else None,
        address=_fill("host.address", spec.address, place) if spec.address else None,
    )


def _card(spec: HostSpec, host: Host, index: int, switches: set[str]) -> list[Link]:
    assert spec.card is not None
    if host.rack and host.rack not in switches:
        raise UserError(f"host {host.name}: rack = {host.rack!r}: there is no such rack; write a [[rack]] with that name")
    target = _fill("host.card.to", spec.card.to or host.rack or CORE_SWITCH, {"i": index})
    return _cable(spec.card, host.name, target)


def _each(spec: LinkSpec) -> Iterator[Link]:
    if prod(spec.each.values()) > MAX_COUNT:
        raise UserError(f"link.each = {spec.each}: {prod(spec.each.values())} links; at most {MAX_COUNT} are allowed")
    for values in product(*(range(count) for count in spec.each.values())):
        place = dict(zip(spec.each, values, strict=True))
        both = _cable(spec, _fill("link.source", spec.source, place), _fill("link.target", spec.target, place))
        yield from both[:1] if spec.one_way else both


def _cable(cable: Cable, source: str, target: str) -> list[Link]:
    back = cable.back_bandwidth_bps or cable.bandwidth_bps
    back_latency = cable.back_latency_s or cable.latency_s
    burst = cable.burst_bytes
    return [
        Link(source=source, target=target, bandwidth_bps=cable.bandwidth_bps, latency_s=cable.latency_s, burst_bytes=burst),
        Link(source=target, target=source, bandwidth_bps=back, latency_s=back_latency, burst_bytes=burst),
    ]


def _fill(key: str, template: str, place: dict[str, int]) -> str:
    result = template
    for letter, index in place.items():
        result = result.replace("{" + letter + "}", str(index))
    if "{" in result or "}" in result:
        known = ", ".join("{" + letter + "}" for letter in place) or "none"
        raise UserError(f"{key} = {template!r}: unknown counter; known here: {known}")
    return result
