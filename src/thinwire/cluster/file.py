"""The cluster file: one TOML format for all who speak of a network.

    name = "four-hosts"
    [[host]]
    name = "host{i}"                # {i} counts 0 .. count-1
    count = 4
    device = { kind = "cpu", flops_per_s = "10 Gflop/s", memory_bytes = "4 GiB" }
    card = { bandwidth_bps = "100 Mbit/s", latency_s = "100 us" }      # a cable to the switch of its rack, or to `to`

    [[rack]]                        # shorthand: a switch, and a cable from it to the core switch
    name = "rack0"
    uplink = { bandwidth_bps = "100 Mbit/s" }

    [[switch]]                      # switches that cards and racks name are made by themselves
    name = "dgx{i}/nvswitch"
    kind = "nvswitch"
    count = 16

    [[link]]                        # any other cable; both ways unless one_way
    source = "dgx{i}/gpu{j}"
    target = "dgx{i}/nvswitch"
    bandwidth_bps = "3.6 Tbit/s"
    each = { i = 16, j = 8 }        # one for each i and j

    ranks = ["host0/cpu0", ...]     # default: devices in the order of the file

A quantity is a number in the base unit, a string with its unit, or, when measured, a table {value, source, low, high, date}.
The other direction of a cable differs where back_bandwidth_bps or back_latency_s says so.
"""

from collections.abc import Iterator
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from thinwire.cluster.model import Cluster, Device, Host, Link, Quantity, Switch
from thinwire.errors import UserError
from thinwire.tomlfile import read_toml, validate
from thinwire.units import parse

CORE_SWITCH = "switch"
MAX_COUNT = 100_000


def _quantity(unit: str, *, zero: bool = False) -> Any:
    def read(value: Any) -> Quantity:
        if isinstance(value, Quantity):
            return value
        if not isinstance(value, dict):
            return _positive(Quantity(parse(value, unit)))
        unknown = set(value) - {"value", "source", "low", "high", "date"}
        if unknown or "value" not in value:
            raise ValueError("a measured quantity is a table of value, source, low, high, date")
        if value.get("source", "measured") not in ("declared", "measured"):
            raise ValueError(f"source = {value['source']!r}; allowed: declared, measured")
        ends = {end: parse(value[end], unit) for end in ("low", "high") if end in value}
        date = str(value["date"]) if "date" in value else None
        return _positive(Quantity(parse(value["value"], unit), value.get("source", "measured"), date=date, **ends))

    def _positive(quantity: Quantity) -> Quantity:
        if quantity.value < 0 or (quantity.value == 0 and not zero):
            raise ValueError(f"{quantity.value:g} is not allowed; it must be above 0")
        return quantity

    return Annotated[Quantity, BeforeValidator(read)]


Bandwidth = _quantity("bit/s")
Latency = _quantity("s", zero=True)
Memory = _quantity("B")
Rate = _quantity("flop/s")


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class DeviceSpec(_Spec):
    name: str = ""
    kind: str = "cpu"
    count: int = Field(1, ge=1, le=MAX_COUNT)
    flops_per_s: Rate | None = None
    memory_bytes: Memory | None = None


class Cable(_Spec):
    bandwidth_bps: Bandwidth
    latency_s: Latency = Quantity(0.0)
    back_bandwidth_bps: Bandwidth | None = None
    back_latency_s: Latency | None = None


class CardSpec(Cable):
    to: str | None = None


class HostSpec(_Spec):
    name: str
    count: int = Field(1, ge=1, le=MAX_COUNT)
    device: DeviceSpec = DeviceSpec()
    card: CardSpec | None = None
    rack: str | None = None
    address: str | None = None


class RackSpec(_Spec):
    name: str
    count: int = Field(1, ge=1, le=MAX_COUNT)
    uplink: CardSpec


class SwitchSpec(_Spec):
    name: str
    kind: Literal["network", "nvswitch", "optical"] = "network"
    count: int = Field(1, ge=1, le=MAX_COUNT)


class LinkSpec(Cable):
    source: str
    target: str
    one_way: bool = False
    each: dict[str, int] = {}


class ClusterSpec(_Spec):
    name: str
    host: list[HostSpec] = Field(min_length=1)
    rack: list[RackSpec] = []
    switch: list[SwitchSpec] = []
    link: list[LinkSpec] = []
    ranks: list[str] = []


def load_cluster(source: str | Path) -> Cluster:
    """Read a cluster file: a path, or the name of a shipped one ("four-hosts-100mbit"). UserError in one line."""
    path = Path(source)
    if not path.suffix and not path.exists():
        shipped = shipped_clusters()
        if str(source) not in shipped:
            raise UserError(f"there is no cluster {str(source)!r}; give a .toml file or one of: {', '.join(shipped)}")
        path = shipped[str(source)]
    spec = validate(ClusterSpec, read_toml(path), str(path))
    try:
        return _expand(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def shipped_clusters() -> dict[str, Path]:
    """The cluster files that come with thinwire, by name: from the installed package, else from the checkout."""
    installed = Path(str(resources.files("thinwire"))) / "clusters"
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "clusters"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def dump_cluster(cluster: Cluster, path: Path) -> None:
    """Write `cluster` without shorthands; load_cluster gives back an equal Cluster."""
    hosts = []
    for host in cluster.hosts:
        if len({(d.kind, d.flops_per_s, d.memory_bytes) for d in host.devices}) > 1:
            raise UserError(f"{host.name}: devices of one host that differ cannot be written to a cluster file")
        first = host.devices[0]
        device = {
            "kind": first.kind,
            "name": first.name.removeprefix(f"{host.name}/").rstrip("0123456789") + "{j}",
            "count": len(host.devices),
            "flops_per_s": _write(first.flops_per_s),
            "memory_bytes": _write(first.memory_bytes),
        }
        hosts.append(
            _without_none({"name": host.name, "rack": host.rack, "address": host.address, "device": _without_none(device)})
        )
    content = {
        "name": cluster.name,
        "ranks": list(cluster.ranks),
        "host": hosts,
        "switch": [{"name": switch.name, "kind": switch.kind} for switch in cluster.switches],
        "link": [
            {
                "source": link.source,
                "target": link.target,
                "one_way": True,
                "bandwidth_bps": _write(link.bandwidth_bps),
                "latency_s": _write(link.latency_s),
            }
            for link in cluster.links
        ],
    }
    path.write_text(tomli_w.dumps(content), encoding="utf-8")


def _expand(spec: ClusterSpec) -> Cluster:
    hosts: list[Host] = []
    links: list[Link] = []
    switches: dict[str, Switch] = {}
    for switch in spec.switch:
        for index in range(switch.count):
            name = _fill(switch.name, {"i": index})
            switches[name] = Switch(name=name, kind=switch.kind)
    racks = [(_fill(rack.name, {"i": index}), rack.uplink) for rack in spec.rack for index in range(rack.count)]
    for host_spec in spec.host:
        for index in range(host_spec.count):
            host = _host(host_spec, index)
            hosts.append(host)
            if host_spec.card is not None:
                if host.rack and host.rack not in dict(racks) and host.rack not in switches:
                    raise UserError(f"host {host.name}: there is no rack {host.rack!r}; write a [[rack]] with that name")
                links += _cable(host_spec.card, host.name, _fill(host_spec.card.to or host.rack or CORE_SWITCH, {"i": index}))
    for name, uplink in racks:
        links += _cable(uplink, name, uplink.to or CORE_SWITCH)
    host_names = {host.name for host in hosts}
    for link in links:
        for end in (link.source, link.target):
            if end not in host_names and end not in switches:
                switches[end] = Switch(name=end)
    for link_spec in spec.link:
        for place in _places(link_spec.each):
            both = _cable(link_spec, _fill(link_spec.source, place), _fill(link_spec.target, place))
            links += both[:1] if link_spec.one_way else both
    return Cluster(
        name=spec.name,
        hosts=tuple(hosts),
        switches=tuple(switches.values()),
        links=tuple(links),
        ranks=tuple(spec.ranks),
    )


def _host(spec: HostSpec, index: int) -> Host:
    name = _fill(spec.name, {"i": index})
    device = spec.device
    template = device.name or f"{device.kind}{{j}}"
    devices = tuple(
        Device(
            name=f"{name}/{_fill(template, {'i': index, 'j': j})}",
            kind=device.kind,
            flops_per_s=device.flops_per_s,
            memory_bytes=device.memory_bytes,
        )
        for j in range(device.count)
    )
    fill = {"i": index}
    return Host(
        name=name,
        devices=devices,
        rack=_fill(spec.rack, fill) if spec.rack else None,
        address=_fill(spec.address, fill) if spec.address else None,
    )


def _cable(cable: Cable, source: str, target: str) -> list[Link]:
    back = cable.back_bandwidth_bps or cable.bandwidth_bps
    back_latency = cable.back_latency_s or cable.latency_s
    return [
        Link(source=source, target=target, bandwidth_bps=cable.bandwidth_bps, latency_s=cable.latency_s),
        Link(source=target, target=source, bandwidth_bps=back, latency_s=back_latency),
    ]


def _places(each: dict[str, int]) -> Iterator[dict[str, int]]:
    for values in product(*(range(count) for count in each.values())):
        yield dict(zip(each, values, strict=True))


def _fill(template: str, place: dict[str, int]) -> str:
    for letter, index in place.items():
        template = template.replace("{" + letter + "}", str(index))
    if "{" in template:
        raise UserError(f"{template!r}: unknown counter; known here: {', '.join(place) or 'none'}")
    return template


def _write(quantity: Quantity | None) -> Any:
    if quantity is None:
        return None
    if quantity == Quantity(quantity.value):
        return quantity.value
    fields = ("value", "source", "low", "high", "date")
    return _without_none({name: getattr(quantity, name) for name in fields})


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}
