"""What a cluster file may hold, and the graph that it stands for: templates are counted out, cards and racks become links."""

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Annotated, Any, Literal

import networkx
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from thinwire.cluster.graph import graph
from thinwire.cluster.model import Cluster, Device, Host, Link, Quantity, Switch
from thinwire.errors import UserError
from thinwire.units import parse

MAX_COUNT = 100_000

Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]


def _quantity(unit: str, *, zero: bool = False) -> BeforeValidator:
    def read(value: Any) -> Quantity:
        if isinstance(value, Quantity):
            return value
        if not isinstance(value, dict):
            return checked(Quantity(parse(value, unit)))
        unknown = set(value) - {"value", "source", "low", "high", "date"}
        if unknown or "value" not in value:
            raise ValueError(f"{value}: a measured quantity is a table of value, source, low, high, date")
        if value.get("source", "measured") not in ("declared", "measured"):
            raise ValueError(f"source = {value['source']!r}; allowed: declared, measured")
        ends = {end: parse(value[end], unit) for end in ("low", "high") if end in value}
        if len(ends) == 2 and ends["low"] > ends["high"]:
            raise ValueError(f"low = {ends['low']:g} is above high = {ends['high']:g}")
        date = str(value["date"]) if "date" in value else None
        return checked(Quantity(parse(value["value"], unit), value.get("source", "measured"), date=date, **ends))

    def checked(quantity: Quantity) -> Quantity:
        if quantity.value < 0 or (quantity.value == 0 and not zero):
            raise ValueError(f"{quantity.value:g} is not allowed; it must be {'0 or more' if zero else 'above 0'}")
        return quantity

    return BeforeValidator(read)


Bandwidth = Annotated[Quantity, _quantity("bit/s")]
Latency = Annotated[Quantity, _quantity("s", zero=True)]
Memory = Annotated[Quantity, _quantity("B")]
MemoryRate = Annotated[Quantity, _quantity("B/s")]
Burst = Annotated[Quantity, _quantity("B", zero=True)]
Rate = Annotated[Quantity, _quantity("flop/s")]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class DeviceSpec(_Spec):
    """`count` equal devices of a host; {j} in the name counts them."""

    name: str = ""
    kind: str = "cpu"
    count: Count = 1
    flops_per_s: Rate | None = None
    memory_bytes: Memory | None = None
    memory_bytes_per_s: MemoryRate | None = None


class Cable(_Spec):
    """Two links, one for each direction; the one back is equal unless given. burst_bytes: of both."""

    bandwidth_bps: Bandwidth
    latency_s: Latency = Quantity(0.0)
    back_bandwidth_bps: Bandwidth | None = None
    back_latency_s: Latency | None = None
    burst_bytes: Burst = Quantity(0.0)


class CardSpec(Cable):
    """A cable whose near end is known: to the rack's switch, or to `to`."""

    to: str | None = None


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class HostSpec(_Spec):
    """`count` equal hosts; {i} in name, rack and address counts them."""

    name: str
    count: Count = 1
    device: Annotated[list[DeviceSpec], BeforeValidator(_listed), Field(min_length=1)] = [DeviceSpec()]
    card: CardSpec | None = None
    rack: str | None = None
    address: str | None = None


class RackSpec(_Spec):
    """A switch and its cable to the core switch."""

    name: str
    count: Count = 1
    uplink: CardSpec


class SwitchSpec(_Spec):
    """`count` equal switches."""

    name: str
    kind: Literal["network", "nvswitch", "optical"] = "network"
    count: Count = 1


class LinkSpec(Cable):
    """One cable, or one for each value of the counters in `each`."""

    source: str
    target: str
    one_way: bool = False
    each: dict[str, Count] = {}


class ClusterSpec(_Spec):
    """The whole file."""

    name: str
    host: list[HostSpec] = Field(min_length=1)
    rack: list[RackSpec] = []
    switch: list[SwitchSpec] = []
    link: list[LinkSpec] = []
    ranks: list[str] = []


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
    nodes, network = list(dict.fromkeys(cluster.node_of(rank) for rank in range(cluster.world_size))), graph(cluster)
    reached, reaching = networkx.descendants(network, nodes[0]), networkx.ancestors(network, nodes[0])
    for node in nodes[1:]:
        for known, source, target in ((reached, nodes[0], node), (reaching, node, nodes[0])):
            if node not in known:
                raise UserError(f"{cluster.name}: no route from {source!r} to {target!r}; add the missing link or card")


def _host(spec: HostSpec, index: int) -> Host:
    place = {"i": index}
    name = _fill("host.name", spec.name, place)
    devices = tuple(
        Device(
            name=f"{name}/" + _fill("host.device.name", device.name or f"{device.kind}{{j}}", place | {"j": j}),
            kind=device.kind,
            flops_per_s=device.flops_per_s,
            memory_bytes=device.memory_bytes,
            memory_bytes_per_s=device.memory_bytes_per_s,
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
