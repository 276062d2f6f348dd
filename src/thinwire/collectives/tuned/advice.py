"""What may be faster than the backend's own collective: a few ways, by predicted seconds. Asked on the first rank only."""

from collections.abc import Sequence
from dataclasses import replace

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch
from thinwire.collectives.choose.calibrate import calibrated
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.question import question
from thinwire.collectives.choose.select import choose
from thinwire.collectives.tuned.way import NATIVE, Way
from thinwire.errors import UserError

TRIED = 3
ASSUMED_BPS = 1e9
"""Of every card, where no cluster is known. What wins is measured, so this only says what is tried."""


class Advisor:
    """cluster: None if none is known. tried: how many ways are advised."""

    def __init__(self, cluster: Cluster | None = None, *, tried: int = TRIED, costs: Costs | None = None) -> None:
        self.cluster, self.tried, self.costs = cluster, tried, costs or Costs()

    def calibrate(self, p: int, ours_s: float, native_s: float) -> None:
        """Take the costs of messages from what p ranks measured; see `choose.calibrate`."""
        whole = self.cluster is not None and self.cluster.world_size == p
        self.costs = calibrated(self.costs, self.cluster if whole and self.cluster else equal_hosts(p), ours_s, native_s)

    def ways(self, op: str, message_bytes: int, ranks: Sequence[int], root: int) -> list[tuple[Way, float]]:
        """(way, predicted seconds), the best first, the native one always among them. `ranks`: global, as in the cluster."""
        cluster = self.cluster
        if cluster is None:
            cluster, ranks = equal_hosts(len(ranks)), range(len(ranks))
        elif max(ranks) >= cluster.world_size:
            raise UserError(
                f"{cluster.name} has {cluster.world_size} ranks, but rank {max(ranks)} runs; give the cluster file of these ranks"
            )
        selection = choose(question(cluster, op, message_bytes, ranks, root), self.costs)
        found: list[tuple[Way, float]] = []
        names: set[str] = set()
        for one in selection.ranking:
            candidate = one.candidate
            if candidate.model is None and candidate.order is None:
                found.append((NATIVE, one.seconds))
            elif len(names) < self.tried and candidate.name not in names:
                names.add(candidate.name)
                found.append((Way(candidate.title, candidate.schedule, candidate.order), one.seconds))
        return found


def equal_hosts(count: int, bandwidth_bps: float = ASSUMED_BPS) -> Cluster:
    """Hosts on one switch that does not block."""
    rate, latency = Quantity(bandwidth_bps), Quantity(50e-6)
    names = [f"host{rank}" for rank in range(count)]
    out = [Link(source=name, target="switch", bandwidth_bps=rate, latency_s=latency) for name in names]
    back = [replace(link, source=link.target, target=link.source) for link in out]
    hosts = tuple(Host(name=name, devices=(Device(name=f"{name}/cpu0"),)) for name in names)
    return Cluster(name=f"{count} equal hosts", hosts=hosts, switches=(Switch(name="switch"),), links=(*out, *back))
