"""What was measured is stored beside the cluster file, so that the next run on this cluster need not measure again.

One JSON file: the version of the format, torch's version, the networks that were measured on, and for each carrier
(gloo, or an MPI), group, op, root and class of sizes, for each network, the implementation that won ("way"), its seconds and
those of the native collective, the bytes of the call that was timed, and the date. A choice holds for the network that it was
measured on; those of other networks stand beside it, and of more than `MOST_NETWORKS` the one measured first is dropped. A file
of another version of torch or of this format, or one that cannot be read, is started anew: what it held is measured again.

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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from thinwire.cluster import Cluster
from thinwire.files import written_aside

FORMAT = 4
MOST_NETWORKS = 8
"""For each call. Hosts of a batch system or of containers may have other names in every run."""
RATE_FACTOR, LATENCY_FACTOR, LATENCY_SLACK_S = 1.2, 2.0, 50e-6


@dataclass(frozen=True)
class Network:
    """shape: a digest of all names; rates and latencies_s of the links, in one order."""

    shape: str
    rates: Sequence[float] = ()
    latencies_s: Sequence[float] = ()

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
    return Network(shape, rates, [link.latency_s.value for link in links])


def _within(a: float, b: float, factor: float) -> bool:
    return max(a, b) <= factor * min(a, b)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Cache:
    """Used by one rank of a job. path: None stores nothing on the disk. dropped: why the file is started anew, if it is."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.dropped = path, ""
        self._entries: dict[str, list[tuple[Network, dict[str, Any]]]] = {}
        """By what was called: what was found on each network, the oldest first."""
        if path is not None and path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                if (form := stored["thinwire_collectives"]) != FORMAT:
                    self.dropped = f"has format {form}, and this thinwire writes {FORMAT}"
                elif stored["torch"] != torch.__version__:
                    self.dropped = f"is of torch {stored['torch']}, and this is {torch.__version__}"
                else:
                    networks = {name: Network(**one) for name, one in stored["networks"].items()}
                    self._entries = {
                        call: [(networks[name], one) for name, one in found.items()] for call, found in stored["entries"].items()
                    }
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self.dropped = f"cannot be read ({type(error).__name__}: {str(error)[:80]})"

    def find(self, key: str, network: Network) -> dict[str, Any] | None:
        """{"way", "bytes", "seconds", "native_s", "date"} of a call on this network, or one near it."""
        found = self._entries.get(key, [])
        exact = next((one for own, one in found if own == network), None)
        return exact or next((one for own, one in found if own.near(network)), None)

    def elsewhere(self, key: str) -> bool:
        """Whether there is a choice for the call on any network."""
        return bool(self._entries.get(key))

    def store(self, key: str, network: Network, found: dict[str, Any]) -> None:
        """found: as `find` gives it, less the date. In the place of those on networks near it. Written at once."""
        kept = [(own, one) for own, one in self._entries.get(key, []) if not own.near(network)]
        dated = {**found, "date": datetime.now(UTC).date().isoformat()}
        self._entries[key] = [*kept, (network, dated)][-MOST_NETWORKS:]
        if self.path is not None:
            content = {
                "thinwire_collectives": FORMAT,
                "torch": torch.__version__,
                "networks": {own.key: asdict(own) for entries in self._entries.values() for own, _ in entries},
                "entries": {call: {own.key: one for own, one in entries} for call, entries in self._entries.items()},
            }
            with written_aside(self.path) as aside:
                aside.write_text(json.dumps(content), encoding="utf-8")
