"""Findings as a table and as sentences for a person. No torch."""

from collections.abc import Sequence

from rich.table import Table

from thinwire.measure.findings import Findings
from thinwire.measure.fit import Estimate
from thinwire.measure.racks import SHARED_BELOW
from thinwire.units import show

TOGETHER_BELOW = 0.75
_PREFIXES = (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3))


def table(findings: Findings) -> Table:
    """A row a host; rates are line rates, in brackets the interval."""
    result = Table(
        title=f"{len(findings.hosts)} hosts, {findings.world_size} ranks, probed in {findings.seconds:.1f} s",
        title_justify="left",
    )
    for column in ("host", "ranks"):
        result.add_column(column)
    for column in ("send", "receive", "latency", "rack", "training step", "matmul", "memory"):
        result.add_column(column, justify="right" if column != "rack" else "left")
    slow = {host.name for host, _, _ in findings.slow_hosts()}
    for host in findings.hosts:
        result.add_row(
            f"[red]{host.name}[/]" if host.name in slow else host.name,
            _spans(host.ranks),
            _with_interval(host.send_bps),
            _with_interval(host.receive_bps),
            show(host.latency_s.value, "s") if host.latency_s else "-",
            host.rack or "-",
            f"{len(host.ranks)} x {show(host.flops_per_s.value, 'flop/s')}",
            show(host.matmul_flops_per_s, "flop/s"),
            f"{len(host.ranks)} x {show(host.memory_bytes, 'B')}",
        )
    return result


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


def _with_interval(found: Estimate | None) -> str:
    """100.1 [99.8, 100.1] Mbit/s"""
    if found is None:
        return "-"
    prefix, factor = next(((name, size) for name, size in _PREFIXES if found.value >= size), ("", 1.0))
    value, low, high = (f"{rate / factor:.4g}" for rate in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}] {prefix}bit/s"


def _spans(ranks: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
