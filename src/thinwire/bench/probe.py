"""What the probe finds in the lab against what the cluster file declares: every link's rate, the racks, the slow host.

The lab shapes its links as declared; the probe knows nothing of the file. Bars: each link within 10 % of its declared
rate, the racks and the slow hosts named, 30 s for eight hosts.
"""

import sys
from collections.abc import Mapping
from statistics import median
from typing import Any

from thinwire.bench.ranks import run_commands
from thinwire.bench.registry import Rows
from thinwire.cluster import Cluster, Link, load_cluster
from thinwire.lab.run import RESULTS, LabOptions

CLUSTERS = ("four-hosts-100mbit", "two-racks", "one-slow-host")
DEFAULTS = {"delay": True}
BAR, BAR_S = 0.10, 30.0
SLOW_BELOW = 1 / 1.5


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row a cluster (ratios, probe_s, racks, slow: as found, `held` if all is as declared), then a row a link.

    Link rows: cluster, link, declared_bps, measured_bps, ratio, held. Without a cluster: three shipped ones.
    """
    rows: Rows = []
    for cluster in map(load_cluster, [cluster_name] if cluster_name else CLUSTERS):
        command = [sys.executable, "-m", "thinwire", "probe", "-o", f"{RESULTS}/probe.toml", "--json", f"{RESULTS}/probe.json"]
        found = run_commands(cluster, [command], LabOptions(delay=options["delay"])).results["probe"]
        rows += compare(cluster, found)
    return rows


def compare(cluster: Cluster, found: Mapping[str, Any]) -> Rows:
    """`found`: what `thinwire probe --json` wrote."""
    links: Rows = []
    for link, measured_bps in _matched(cluster, found):
        declared_bps = link.bandwidth_bps.value
        ratio = measured_bps / declared_bps
        row = {"case": cluster.name, "link": f"{link.source} -> {link.target}", "declared_bps": declared_bps}
        links.append({**row, "measured_bps": measured_bps, "ratio": ratio, "held": abs(ratio - 1) <= BAR})
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
    matched = []
    for link in cluster.links:
        for node, direction in ((link.source, "out"), (link.target, "in")):
            # A rack's switch ends its hosts' cables too; those belong to the hosts.
            hosts_cable = node not in rack_of and bool(rack_of.keys() & {link.source, link.target})
            if (node, direction) in rates and not hosts_cable:
                matched.append((link, rates[node, direction]))
    return matched


def _declared_racks(cluster: Cluster) -> list[list[str]]:
    names = {host.rack for host in cluster.hosts if host.rack}
    return sorted(sorted(host.name for host in cluster.hosts if host.rack == name) for name in names)


def _declared_slow(cluster: Cluster) -> list[str]:
    slowest = {
        host.name: min(link.bandwidth_bps.value for link in cluster.links if host.name in (link.source, link.target))
        for host in cluster.hosts
    }
    return sorted(name for name, rate in slowest.items() if rate < SLOW_BELOW * median(slowest.values()))
