"""What a choice was measured on: the links, and the hosts on which the ranks of the group ran.

Two networks count as the same if

    ranks lie on hosts of the same names, place by place in the group
    the same nodes are joined by the same links, and the ranks begin at the same ones
    each bandwidth, and each burst, is within 20 % of the other's; each latency within a factor of two, or 50 us

so a new probe of the same network finds what was measured before it, though its numbers are never quite the same, while a link
of twice the rate, another switch, or another machine does not. A network is always compared with the one that was measured, so
small changes do not add up unseen. Without a cluster file only the hosts are known.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from thinwire.cluster import Cluster

RATE_FACTOR, LATENCY_FACTOR, LATENCY_SLACK_S = 1.2, 2.0, 50e-6


@dataclass(frozen=True)
class Network:
    """shape: a digest of all names; rates and latencies_s of the links, in one order."""

    shape: str
    rates: tuple[float, ...] = ()
    latencies_s: tuple[float, ...] = ()

    def near(self, other: "Network") -> bool:
        """Whether choices made on one hold for the other; see the top of the file."""
        return (
            self.shape == other.shape
            and all(_within(a, b, RATE_FACTOR) for a, b in zip(self.rates, other.rates, strict=True))
            and all(
                abs(a - b) <= LATENCY_SLACK_S or _within(a, b, LATENCY_FACTOR)
                for a, b in zip(self.latencies_s, other.latencies_s, strict=True)
            )
        )

    @property
    def key(self) -> str:
        """Short, and different for each network."""
        return _digest([self.shape, self.rates, self.latencies_s])[:16]

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> "Network":
        """What `asdict` made of one, and JSON."""
        return Network(str(plain["shape"]), tuple(plain["rates"]), tuple(plain["latencies_s"]))


def network_of(cluster: Cluster | None, ranks: Sequence[int], hosts: Iterable[str]) -> Network:
    """Of a group. ranks: global ones, in the order of the group; hosts: the machines' own names for themselves, likewise."""
    hosts = list(hosts)
    if cluster is None:
        return Network(_digest([hosts]))
    links = sorted(cluster.links, key=lambda link: (link.source, link.target))
    nodes = sorted([*((host.name, "host") for host in cluster.hosts), *((one.name, one.kind) for one in cluster.switches)])
    begins = [cluster.node_of(rank) for rank in ranks]
    shape = _digest([hosts, nodes, [(link.source, link.target) for link in links], begins])
    rates = [rate for link in links for rate in (link.bandwidth_bps.value, link.burst_bytes.value)]
    return Network(shape, tuple(rates), tuple(link.latency_s.value for link in links))


def _within(a: float, b: float, factor: float) -> bool:
    return max(a, b) <= factor * min(a, b)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
