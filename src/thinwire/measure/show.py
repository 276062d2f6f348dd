"""Findings as a table and as sentences for a person. No torch."""

from collections.abc import Sequence
from statistics import median

from rich.console import Group
from rich.table import Table

from thinwire.measure.findings import Findings
from thinwire.measure.fit import Estimate
from thinwire.measure.racks import SHARED_BELOW
from thinwire.units import show

TOGETHER_BELOW = 0.75
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def table(findings: Findings) -> Group:
    """A row a host, first of its network (line rates, in brackets the interval), then of its devices."""
    hosts = f"{len(findings.hosts)} host{'s' * (len(findings.hosts) > 1)}"
    title = f"{hosts}, {findings.world_size} ranks, probed in {findings.seconds:.1f} s"
    slow = {host.name for host, _, _ in findings.slow_hosts()}
    names = {host.name: f"[red]{host.name}[/]" if host.name in slow else host.name for host in findings.hosts}
    devices = Table("host", "devices", title=None if len(findings.hosts) > 1 else title, title_justify="left")
    for column in ("training step", "matmul", "memory"):
        devices.add_column(f"{column}, each", justify="right")
    for host in findings.hosts:
        rates = (show(rate, "flop/s") for rate in (host.flops_per_s.value, host.matmul_flops_per_s))
        devices.add_row(names[host.name], f"{len(host.ranks)} x {host.kind}", *rates, show(host.memory_bytes, "B"))
    if len(findings.hosts) == 1:
        return Group(devices)
    rated = [rate.value for host in findings.hosts for rate in (host.send_bps, host.receive_bps) if rate]
    unit, factor = next(((name, size) for name, size in _PREFIXES if median(rated) >= size), ("", 1.0))
    network = Table("host", "ranks", title=title, title_justify="left")
    for column in (f"send {unit}bit/s", f"receive {unit}bit/s", "latency"):
        network.add_column(column, justify="right", no_wrap=True)
    network.add_column("rack")
    for host in findings.hosts:
        ways = (_with_interval(rate, factor) for rate in (host.send_bps, host.receive_bps))
        latency = show(host.latency_s.value, "s") if host.latency_s else "-"
        network.add_row(names[host.name], _spans(host.ranks), *ways, latency, host.rack or "-")
    return Group(network, devices)


def sentences(findings: Findings) -> list[str]:
    """What stands out: slow hosts, shared uplinks, or that nothing is shared; and what the compute rate means."""
    told = [
        f"slow host: {host.name}, {show(rate, 'bit/s')}, {times:.1f} times slower than the median"
        for host, rate, times in findings.slow_hosts()
    ]
    for rack in findings.racks:
        up, down = rack.up_bps.value, rack.down_bps.value
        short = [
            f"{show(rate, 'bit/s')} {way} for {show(cards, 'bit/s')} of cards ({cards / rate:.1f} times)"
            for rate, cards, way in ((up, rack.cards_bps[0], "out"), (down, rack.cards_bps[1], "in"))
            if rate < SHARED_BELOW * cards
        ]
        told.append(f"shared uplink: {', '.join(rack.hosts)} ({rack.name}) share one: {', '.join(short)}")
    if not findings.racks and len(findings.hosts) > 3:
        if findings.together < TOGETHER_BELOW:
            told.append(
                f"all hosts at once get only {findings.together:.0%} of what they get alone, whoever sends to whom: "
                "they share a hub, a radio cell or a processor, which a cluster file cannot say; "
                "the rates written are those of one flow alone"
            )
        else:
            told.append("no shared uplink: all hosts stand on one switch")
    if len(findings.hosts) == 1:
        told.append("all ranks are on one host: there are no links to measure")
    told.append(f"compute: a small transformer's training step in {findings.dtype}, all ranks at once")
    return told


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
