"""Small clusters, made from their cables."""

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch


def build_cluster(*pairs: tuple[str, str], bps: float = 100e6, latency_s: float = 0.0, devices: int = 1) -> Cluster:
    """A cluster from its cables; names that start with "host" are hosts. Without cables: two hosts on a switch."""
    pairs = pairs or (("host0", "switch"), ("host1", "switch"))
    nodes = list(dict.fromkeys(node for pair in pairs for node in pair))
    both = [ends for a, b in pairs for ends in ((a, b), (b, a))]
    return Cluster(
        name="small",
        hosts=tuple(
            Host(name=node, devices=tuple(Device(name=f"{node}/cpu{j}") for j in range(devices)))
            for node in nodes
            if node.startswith("host")
        ),
        switches=tuple(Switch(name=node) for node in nodes if not node.startswith("host")),
        links=tuple(Link(source=a, target=b, bandwidth_bps=Quantity(bps), latency_s=Quantity(latency_s)) for a, b in both),
    )
