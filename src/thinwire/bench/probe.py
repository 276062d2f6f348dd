"""What the probe finds in the lab against what the cluster file declares: every link's rate, the racks, the slow host.

The lab shapes its links as declared; the probe knows nothing of the file. Bars: each link within 10 % of its declared
rate, the racks and the slow hosts named, 30 s for eight hosts.
"""

import json
import sys
from collections.abc import Mapping
from statistics import median
from typing import Any

from thinwire.bench.registry import Rows, take
from thinwire.cluster import Cluster, Link, load_cluster
from thinwire.errors import UserError
from thinwire.lab.commands import processes_for
from thinwire.lab.run import RESULTS, LabOptions, launch

CLUSTERS = ("four-hosts-100mbit", "two-racks", "one-slow-host")
DEFAULTS = {"delay": True}
BAR = 0.10
BAR_S = 30.0
SLOW_BELOW = 1 / 1.5
COMMAND = (sys.executable, "-m", "thinwire", "probe")


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> Rows:
    """A row a cluster (ratios, probe_s, racks, slow: as found, `held` if all is as declared), then a row a link.

    Link rows: cluster, link, declared_bps, measured_bps, ratio, held. Without a cluster: three shipped ones.
    """
    told = take(options or {}, DEFAULTS)
    rows: Rows = []
    for name in [cluster_name] if cluster_name else CLUSTERS:
        rows += measure(load_cluster(name), delay=told["delay"])
    return rows


def measure(cluster: Cluster, *, delay: bool = True) -> Rows:
    """Probe one cluster in the lab."""
    command = [*COMMAND, "-o", f"{RESULTS}/probe.toml", "--json", f"{RESULTS}/probe.json"]
    result = launch(cluster, processes_for(cluster, command), LabOptions(delay=delay))
    if result.failure:
        raise UserError(f"probe of {cluster.name}: {result.failure}")
    return compare(cluster, json.loads(result.results["probe.json"]))


def compare(cluster: Cluster, found: Mapping[str, Any]) -> Rows:
    """`found`: what `thinwire probe --json` wrote."""
    links: Rows = []
    for link, measured_bps in _matched(cluster, found):
        declared_bps = link.bandwidth_bps.value
        ratio = measured_bps / declared_bps
        links.append(
            {
                "case": cluster.name,
                "link": f"{link.source} -> {link.target}",
                "declared_bps": declared_bps,
                "measured_bps": measured_bps,
                "ratio": ratio,
                "held": abs(ratio - 1) <= BAR,
            }
        )
    racks, slow = sorted(sorted(rack["hosts"]) for rack in found["racks"]), sorted(found["slow_hosts"])
    right = racks == _declared_racks(cluster) and slow == _declared_slow(cluster)
    ratios: list[float] = sorted((row["ratio"] for row in links), key=lambda ratio: abs(ratio - 1))
    summary = {
        "case": cluster.name,
        "link": f"all {len(links)}: the median, and the worst {ratios[-1]:.4f}" if ratios else "no link found",
        "declared_bps": None,
        "measured_bps": None,
        "ratio": median(ratios) if ratios else None,
        "held": right and len(links) == len(cluster.links) and all(row["held"] for row in links) and found["seconds"] <= BAR_S,
        "probe_s": found["seconds"],
        "racks": " | ".join(" ".join(rack) for rack in racks) or "none",
        "slow": " ".join(slow) or "none",
    }
    return [summary, *links]


def _matched(cluster: Cluster, found: Mapping[str, Any]) -> list[tuple[Link, float]]:
    """Each declared link that the probe found, and the rate that it found for it."""
    rates: dict[tuple[str, str], float] = {}
    for host in found["hosts"]:
        rates[host["name"], "out"] = host["send_bps"]["value"]
        rates[host["name"], "in"] = host["receive_bps"]["value"]
    rack_of = {host.name: host.rack for host in cluster.hosts}
    for rack in found["racks"]:
        name = rack_of[rack["hosts"][0]]
        if name is not None:
            rates[name, "out"], rates[name, "in"] = rack["up_bps"]["value"], rack["down_bps"]["value"]
    ends = [(link, key) for link in cluster.links for key in ((link.source, "out"), (link.target, "in"))]
    return [(link, rates[key]) for link, key in ends if key in rates and not _is_rack_side(cluster, link, key[0])]


def _is_rack_side(cluster: Cluster, link: Link, node: str) -> bool:
    """A rack switch ends its hosts' cables too; those belong to the hosts."""
    hosts = {host.name for host in cluster.hosts}
    return node not in hosts and bool(hosts & {link.source, link.target})


def _declared_racks(cluster: Cluster) -> list[list[str]]:
    racks: dict[str, list[str]] = {}
    for host in cluster.hosts:
        if host.rack:
            racks.setdefault(host.rack, []).append(host.name)
    return sorted(sorted(hosts) for hosts in racks.values())


def _declared_slow(cluster: Cluster) -> list[str]:
    names = {host.name for host in cluster.hosts}
    slowest: dict[str, float] = {}
    for link in cluster.links:
        for name in names & {link.source, link.target}:
            slowest[name] = min(link.bandwidth_bps.value, slowest.get(name, float("inf")))
    return sorted(name for name, rate in slowest.items() if rate < SLOW_BELOW * median(slowest.values()))
