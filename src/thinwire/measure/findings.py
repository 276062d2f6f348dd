"""What the probe found, as plain data, and the cluster that it describes. No torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch
from thinwire.measure.fit import Estimate

CORE = "switch"
SLOW_BELOW = 1 / 1.5
"""A card below two thirds of the median is called slow."""


@dataclass(frozen=True, kw_only=True)
class HostFound:
    """Rates are line rates: payload times FRAME_OVERHEAD. None where there was no other host to measure against.

    latency_s: of the cable to the switch, one way. flops_per_s: of a training step on one device, all ranks computing at once.
    """

    name: str
    address: str
    ranks: tuple[int, ...]
    kind: str
    rack: str | None
    send_bps: Estimate | None
    receive_bps: Estimate | None
    latency_s: Estimate | None
    flops_per_s: Estimate
    matmul_flops_per_s: float
    memory_bytes: float

    @property
    def device_prefix(self) -> str:
        return f"{self.name}/{'cpu' if self.kind == 'cpu' else 'gpu'}"


@dataclass(frozen=True, kw_only=True)
class RackFound:
    """Hosts behind one uplink. cards_bps: what their cards could send and receive together."""

    name: str
    hosts: tuple[str, ...]
    up_bps: Estimate
    down_bps: Estimate
    latency_s: float
    cards_bps: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """together: what all hosts at once get of what their cards allow alone, racks aside; 1 is all."""

    hosts: tuple[HostFound, ...]
    racks: tuple[RackFound, ...]
    together: float
    dtype: str
    date: str
    seconds: float

    @property
    def world_size(self) -> int:
        return sum(len(host.ranks) for host in self.hosts)

    def slow_hosts(self) -> list[tuple[HostFound, float, float]]:
        """Hosts with a card far below the median: (host, its rate in the slower direction, how many times slower)."""
        rated = [
            (host, min(host.send_bps.value, host.receive_bps.value)) for host in self.hosts if host.send_bps and host.receive_bps
        ]
        if len(rated) < 3:
            return []
        middle = median(rate for _, rate in rated)
        return [(host, rate, middle / rate) for host, rate in rated if rate < SLOW_BELOW * middle]


def unique_names(names: Sequence[str], taken: Sequence[str]) -> list[str]:
    """The names, told apart where machines share one: node, node-2, node-3."""
    used, result = Counter(taken), []
    for name in names:
        candidate, number = name, 1
        while used[candidate]:
            number += 1
            candidate = f"{name}-{number}"
        used[candidate] += 1
        result.append(candidate)
    return result


def to_cluster(findings: Findings, name: str) -> Cluster:
    """Hosts on the switch of their rack or on the core switch, each direction of every cable with its own rate."""

    def measured(found: Estimate) -> Quantity:
        return Quantity(found.value, "measured", found.low, found.high, findings.date)

    hosts, links, devices = [], [], [""] * findings.world_size
    for host in findings.hosts:
        own = [f"{host.device_prefix}{index}" for index in range(len(host.ranks))]
        for rank, device in zip(host.ranks, own, strict=True):
            devices[rank] = device
        flops, memory = measured(host.flops_per_s), Quantity(host.memory_bytes, "measured", date=findings.date)
        made = tuple(Device(name=device, kind=host.kind, flops_per_s=flops, memory_bytes=memory) for device in own)
        hosts.append(Host(name=host.name, devices=made, rack=host.rack, address=host.address))
        if host.send_bps and host.receive_bps and host.latency_s:
            to, latency = host.rack or CORE, measured(host.latency_s)
            links.append(Link(source=host.name, target=to, bandwidth_bps=measured(host.send_bps), latency_s=latency))
            links.append(Link(source=to, target=host.name, bandwidth_bps=measured(host.receive_bps), latency_s=latency))
    for rack in findings.racks:
        latency = Quantity(rack.latency_s, "measured", date=findings.date)
        links.append(Link(source=rack.name, target=CORE, bandwidth_bps=measured(rack.up_bps), latency_s=latency))
        links.append(Link(source=CORE, target=rack.name, bandwidth_bps=measured(rack.down_bps), latency_s=latency))
    switches = [Switch(name=rack.name) for rack in findings.racks]
    if links:
        switches.append(Switch(name=CORE))
    return Cluster(name=name, hosts=tuple(hosts), switches=tuple(switches), links=tuple(links), ranks=tuple(devices))
