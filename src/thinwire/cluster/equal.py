"""The simplest network: equal hosts on one switch that does not block."""

from thinwire.cluster.model import Cluster, Device, Host, Link, Quantity, Switch


def equal_hosts(count: int, link_bps: float, latency_s: float = 0.0) -> Cluster:
    """`count` hosts with one device each; latency_s: of each link, so twice that between two hosts."""
    names = [f"host{index}" for index in range(count)]
    rate, latency = Quantity(link_bps), Quantity(latency_s)
    ends = [pair for name in names for pair in ((name, "switch"), ("switch", name))]
    return Cluster(
        name=f"{count}-hosts",
        hosts=tuple(Host(name=name, devices=(Device(name=f"{name}/cpu0"),)) for name in names),
        switches=(Switch(name="switch"),),
        links=tuple(Link(source=a, target=b, bandwidth_bps=rate, latency_s=latency) for a, b in ends),
    )
