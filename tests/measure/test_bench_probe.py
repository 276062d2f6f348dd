"""The benchmark compares every declared link with what was found, and fails what is wrong."""

from typing import Any

from thinwire.bench.probe import compare
from thinwire.cluster import Cluster, load_cluster


def perfect(cluster: Cluster) -> dict[str, Any]:
    """What `thinwire probe --json` would write if it measured without error."""
    hosts, racks = [], {}
    for host in cluster.hosts:
        out = next(link for link in cluster.links if link.source == host.name)
        back = next(link for link in cluster.links if link.target == host.name)
        rates = {"send_bps": {"value": out.bandwidth_bps.value}, "receive_bps": {"value": back.bandwidth_bps.value}}
        hosts.append({"name": host.name, **rates})
        if host.rack:
            racks.setdefault(host.rack, []).append(host.name)
    uplinks = {link.source: link.bandwidth_bps.value for link in cluster.links if link.source in racks}
    found = [
        {"name": f"rack{index}", "hosts": names, "up_bps": {"value": uplinks[rack]}, "down_bps": {"value": uplinks[rack]}}
        for index, (rack, names) in enumerate(racks.items())
        if rack in uplinks
    ]
    slow = [host["name"] for host in hosts if host["send_bps"]["value"] < 50e6]
    return {"hosts": hosts, "racks": found, "slow_hosts": slow, "seconds": 20.0}


def test_every_declared_link_has_a_row_and_a_perfect_probe_holds() -> None:
    for name in ("four-hosts-100mbit", "two-racks", "one-slow-host"):
        cluster = load_cluster(name)
        summary, *links = compare(cluster, perfect(cluster))
        assert {row["link"] for row in links} == {f"{link.source} -> {link.target}" for link in cluster.links}
        assert all(row["held"] and row["ratio"] == 1.0 for row in links)
        assert summary["held"] and summary["ratio"] == 1.0


def test_a_wrong_rate_a_missing_rack_or_a_slow_probe_does_not_hold() -> None:
    cluster = load_cluster("two-racks")
    wrong = perfect(cluster)
    wrong["hosts"][3]["receive_bps"]["value"] *= 0.89
    summary, *links = compare(cluster, wrong)
    assert not summary["held"] and sum(not row["held"] for row in links) == 1
    assert not compare(cluster, perfect(cluster) | {"racks": []})[0]["held"]
    assert not compare(cluster, perfect(cluster) | {"slow_hosts": ["a0"]})[0]["held"]
    assert not compare(cluster, perfect(cluster) | {"seconds": 31.0})[0]["held"]
