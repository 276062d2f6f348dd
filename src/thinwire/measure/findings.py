"""What the probe found, as plain data, the cluster that it describes, and its words for a person. No torch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from rich.console import Group
from rich.table import Table

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch
from thinwire.measure.fit import Estimate
from thinwire.measure.racks import SHARED_BELOW
from thinwire.units import show

TOGETHER_BELOW = 0.75
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))
CORE = "switch"
SLOW_BELOW = 1 / 1.5
"""A card below two thirds of the median is called slow."""


@dataclass(frozen=True, kw_only=True)
class HostWired:
    """A host on its network. Rates are line rates: payload times FRAME_OVERHEAD. None where there was no other host to measure
    against. latency_s: of the cable to the switch, in one direction.
    """

    name: str
    address: str
    ranks: tuple[int, ...]
    kind: str
    rack: str | None
    send_bps: Estimate | None
    receive_bps: Estimate | None
    latency_s: Estimate | None

    @property
    def device_names(self) -> list[str]:
        """By rank."""
        return [f"{self.name}/{'cpu' if self.kind == 'cpu' else 'gpu'}{index}" for index in range(len(self.ranks))]


@dataclass(frozen=True, kw_only=True)
class HostFound(HostWired):
    """And what its devices do. flops_per_s: of a training step on a device, while all ranks compute."""

    flops_per_s: Estimate
    matmul_flops_per_s: float
    memory_bytes: float
    memory_bytes_per_s: float


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
    """The names, numbered where machines share one: node, node-2, node-3."""
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
    rates = {
        host.name: Device(
            name="",
            kind=host.kind,
            flops_per_s=_measured(host.flops_per_s, findings.date),
            memory_bytes=Quantity(host.memory_bytes, "measured", date=findings.date),
            memory_bytes_per_s=Quantity(host.memory_bytes_per_s, "measured", date=findings.date),
        )
        for host in findings.hosts
    }
    return wired(name, findings.hosts, findings.racks, findings.date, rates)


def wired(
    name: str,
    found: Sequence[HostWired],
    racks: Sequence[RackFound],
    date: str,
    devices: Mapping[str, Device] | None = None,
) -> Cluster:
    """The network of `to_cluster`. devices: what each of a host's devices is like, by host; None: only their kind is known."""
    hosts, links, ranks = [], [], [""] * sum(len(host.ranks) for host in found)
    for host in found:
        for rank, device in zip(host.ranks, host.device_names, strict=True):
            ranks[rank] = device
        like = devices[host.name] if devices else Device(name="", kind=host.kind)
        made = tuple(replace(like, name=device) for device in host.device_names)
        hosts.append(Host(name=host.name, devices=made, rack=host.rack, address=host.address))
        if host.send_bps and host.receive_bps and host.latency_s:
            to, latency = host.rack or CORE, _measured(host.latency_s, date)
            links.append(Link(source=host.name, target=to, bandwidth_bps=_measured(host.send_bps, date), latency_s=latency))
            links.append(Link(source=to, target=host.name, bandwidth_bps=_measured(host.receive_bps, date), latency_s=latency))
    for rack in racks:
        latency = Quantity(rack.latency_s, "measured", date=date)
        links.append(Link(source=rack.name, target=CORE, bandwidth_bps=_measured(rack.up_bps, date), latency_s=latency))
        links.append(Link(source=CORE, target=rack.name, bandwidth_bps=_measured(rack.down_bps, date), latency_s=latency))
    switches = [Switch(name=rack.name) for rack in racks]
    if links:
        switches.append(Switch(name=CORE))
    return Cluster(name=name, hosts=tuple(hosts), switches=tuple(switches), links=tuple(links), ranks=tuple(ranks))


def _measured(found: Estimate, date: str) -> Quantity:
    return Quantity(found.value, "measured", found.low, found.high, date)


def table(findings: Findings) -> Group:
    """A row a host, first of its network (line rates, in brackets the interval), then of its devices."""
    hosts = f"{len(findings.hosts)} host{'s' * (len(findings.hosts) > 1)}"
    title = f"{hosts}, {findings.world_size} ranks, probed in {findings.seconds:.1f} s"
    slow = {host.name for host, _, _ in findings.slow_hosts()}
    names = {host.name: f"[red]{host.name}[/]" if host.name in slow else host.name for host in findings.hosts}
    devices = Table("host", "devices", title=None if len(findings.hosts) > 1 else title, title_justify="left")
    for column in ("training step", "matmul", "memory", "copy"):
        devices.add_column(f"{column}, each", justify="right")
    for host in findings.hosts:
        rates = (show(rate, "flop/s") for rate in (host.flops_per_s.value, host.matmul_flops_per_s))
        memory = show(host.memory_bytes, "B"), show(host.memory_bytes_per_s, "B/s")
        devices.add_row(names[host.name], f"{len(host.ranks)} x {host.kind}", *rates, *memory)
    if len(findings.hosts) == 1:
        return Group(devices)
    rated = [rate.value for host in findings.hosts for rate in (host.send_bps, host.receive_bps) if rate]
    unit, factor = next(((name, size) for name, size in _PREFIXES if median(rated) >= size), ("", 1.0))
    network = Table("host", "ranks", title=title, title_justify="left")
    for column in (f"send {unit}bit/s", f"receive {unit}bit/s", "latency"):
        network.add_column(column, justify="right", no_wrap=True)
    network.add_column("rack")
    for host in findings.hosts:
        rates = (_with_interval(rate, factor) for rate in (host.send_bps, host.receive_bps))
        latency = show(host.latency_s.value, "s") if host.latency_s else "-"
        network.add_row(names[host.name], _spans(host.ranks), *rates, latency, host.rack or "-")
    return Group(network, devices)


def sentences(findings: Findings) -> list[str]:
    """What stands out: slow hosts, shared uplinks, or that nothing is shared; and what the compute rate means."""
    lines = [
        f"slow host: {host.name}, {show(rate, 'bit/s')}, {times:.1f} times slower than the median"
        for host, rate, times in findings.slow_hosts()
    ]
    for rack in findings.racks:
        up, down = rack.up_bps.value, rack.down_bps.value
        short = [
            f"{show(rate, 'bit/s')} {direction} for {show(cards, 'bit/s')} of cards ({cards / rate:.1f} times)"
            for rate, cards, direction in ((up, rack.cards_bps[0], "out"), (down, rack.cards_bps[1], "in"))
            if rate < SHARED_BELOW * cards
        ]
        lines.append(f"shared uplink: {', '.join(rack.hosts)} ({rack.name}) share one: {', '.join(short)}")
    if not findings.racks and len(findings.hosts) > 3:
        if findings.together < TOGETHER_BELOW:
            lines.append(
                f"all hosts at once get only {findings.together:.0%} of what they get alone, whoever sends to whom: "
                "they share a hub, a radio cell or a processor, which a cluster file cannot express; "
                "the rates written are those of one flow alone"
            )
        else:
            lines.append("no shared uplink: all hosts stand on one switch")
    if len(findings.hosts) == 1:
        lines.append("all ranks are on one host: there are no links to measure")
    lines.append(f"compute: a small transformer's training step in {findings.dtype}, all ranks at once")
    return lines


def _with_interval(found: Estimate | None, factor: float) -> str:
    """100.1 [99.8, 100.1]"""
    if found is None:
        return "-"
    value, low, high = (f"{rate / factor:.4g}" for rate in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _spans(ranks: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
