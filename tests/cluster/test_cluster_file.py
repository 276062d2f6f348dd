"""Cluster files: what is written loads back equal, templates count, and every shipped file describes what it says."""

import tempfile
from pathlib import Path

import pytest
from clusters import clusters
from hypothesis import given

from thinwire.cluster import Cluster, Quantity, dump_cluster, load_cluster, shipped_clusters
from thinwire.cluster.graph import Routes

SHIPPED = {
    "laptop": 4,
    "four-hosts-100mbit": 4,
    "four-hosts-1gbit": 4,
    "four-hosts-of-two-100mbit": 8,
    "eight-hosts-100mbit": 8,
    "two-racks": 8,
    "two-racks-gpu": 8,
    "two-racks-half-uplink": 8,
    "one-slow-host": 8,
    "two-sites": 4,
    "home-internet": 4,
    "one-node-8gpu": 8,
    "32-nodes-25gbe": 32,
    "dgx-h100-x128": 1024,
}


def from_text(text: str, folder: Path) -> Cluster:
    path = folder / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    return load_cluster(path)


def test_these_clusters_are_shipped() -> None:
    assert set(shipped_clusters()) == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_cluster_loads_by_name_and_comes_back_equal(name, tmp_path) -> None:
    cluster = load_cluster(name)
    assert (cluster.name, cluster.world_size) == (name, SHIPPED[name])
    dump_cluster(cluster, tmp_path / "copy.toml")
    assert load_cluster(tmp_path / "copy.toml") == cluster


@given(clusters())
def test_any_cluster_comes_back_equal(cluster) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dump_cluster(cluster, Path(folder) / "cluster.toml")
        assert load_cluster(Path(folder) / "cluster.toml") == cluster


@pytest.mark.parametrize(("name", "rate_bps"), [("two-racks", 1e8), ("two-racks-gpu", 1e9)])
def test_two_racks_share_uplinks_as_fast_as_one_card_and_ranks_alternate(name: str, rate_bps: float) -> None:
    cluster = load_cluster(name)
    assert {link.bandwidth_bps.value for link in cluster.links} == {rate_bps}
    assert [cluster.host_of(rank).rack for rank in range(8)] == ["rack-a", "rack-b"] * 4
    uplinks = [link for link in cluster.links if "switch" in (link.source, link.target)]
    assert len(uplinks) == 4
    assert [link.target for link in Routes(cluster).between(0, 1)] == ["rack-a", "switch", "rack-b", "b0"]
    assert [link.target for link in Routes(cluster).between(0, 2)] == ["rack-a", "a1"]


def test_one_host_of_eight_is_slow() -> None:
    cluster = load_cluster("one-slow-host")
    rates = {link.source: link.bandwidth_bps.value for link in cluster.links if link.target == "switch"}
    assert sorted(rates.values()) == [25e6] + [100e6] * 7 and rates["slow"] == 25e6


def test_home_connections_are_slower_upwards() -> None:
    links = load_cluster("home-internet").links
    assert {link.bandwidth_bps.value for link in links if link.target == "switch"} == {20e6}
    assert {link.bandwidth_bps.value for link in links if link.source == "switch"} == {100e6}


def test_each_direction_of_a_cable_may_have_its_own_rate_and_latency(tmp_path) -> None:
    back = 'back_bandwidth_bps = "2 Mbit/s", back_latency_s = 0'
    card = f'card = {{ bandwidth_bps = "1 Mbit/s", latency_s = "1 ms", {back}, burst_bytes = 9000 }}'
    there, other = from_text(f'name = "c"\n[[host]]\nname = "a"\n{card}', tmp_path).links
    assert (there.source, there.bandwidth_bps.value, there.latency_s.value) == ("a", 1e6, 1e-3)
    assert (other.target, other.bandwidth_bps.value, other.latency_s.value) == ("a", 2e6, 0.0)
    assert there.burst_bytes == other.burst_bytes == Quantity(9000)


def test_a_big_cluster_is_few_lines_and_every_gpu_has_its_rail() -> None:
    cluster = load_cluster("dgx-h100-x128")
    assert len(cluster.hosts) == 128 and len(cluster.devices) == 1024
    assert cluster.node_of(9) == "dgx1/gpu1"
    routes = Routes(cluster)
    assert [link.target for link in routes.between(0, 1)] == ["dgx0/nvswitch", "dgx0/gpu1"]
    assert [link.target for link in routes.between(1, 9)] == ["rail1", "dgx1/gpu1"]


def test_templates_count_hosts_racks_devices_and_links(tmp_path) -> None:
    cluster = from_text(
        """
        name = "grid"
        [[host]]
        name = "n{i}"
        count = 2
        rack = "rack{i}"
        address = "10.0.0.{i}"
        device = { kind = "gpu", count = 2 }
        card = { bandwidth_bps = "1 Gbit/s" }
        [[rack]]
        name = "rack{i}"
        count = 2
        uplink = { bandwidth_bps = "10 Gbit/s", to = "spine" }
        [[link]]
        source = "n{i}/gpu{j}"
        target = "n{i}"
        bandwidth_bps = "64 Gbit/s"
        one_way = true
        each = { i = 2, j = 2 }
        [[link]]
        source = "n{i}"
        target = "n{i}/gpu{j}"
        bandwidth_bps = "32 Gbit/s"
        one_way = true
        each = { i = 2, j = 2 }
        """,
        tmp_path,
    )
    assert [(host.name, host.rack, host.address) for host in cluster.hosts] == [
        ("n0", "rack0", "10.0.0.0"),
        ("n1", "rack1", "10.0.0.1"),
    ]
    assert cluster.ranks == ("n0/gpu0", "n0/gpu1", "n1/gpu0", "n1/gpu1")
    assert [switch.name for switch in cluster.switches] == ["rack0", "rack1", "spine"]
    assert len(cluster.links) == 4 + 4 + 8
    route = [(link.target, link.bandwidth_bps.value) for link in Routes(cluster).between(0, 3)]
    assert route == [("n0", 64e9), ("rack0", 1e9), ("spine", 10e9), ("rack1", 10e9), ("n1", 1e9), ("n1/gpu1", 32e9)]


def test_devices_of_a_host_may_differ(tmp_path) -> None:
    cluster = from_text(
        """
        name = "mixed"
        [[host]]
        name = "box"
        [[host.device]]
        kind = "a100"
        flops_per_s = "150 Tflop/s"
        [[host.device]]
        kind = "cpu"
        count = 2
        """,
        tmp_path,
    )
    assert [(device.name, device.kind) for device in cluster.devices] == [
        ("box/a1000", "a100"),
        ("box/cpu0", "cpu"),
        ("box/cpu1", "cpu"),
    ]


def test_a_measured_quantity_keeps_its_interval_and_date(tmp_path) -> None:
    cluster = from_text(
        """
        name = "probed"
        [[host]]
        name = "h{i}"
        count = 2
        [host.card]
        latency_s = "50 us"
        burst_bytes = "20 kB"
        bandwidth_bps = { value = "94 Mbit/s", low = "93 Mbit/s", high = "95 Mbit/s", date = 2026-03-01 }
        """,
        tmp_path,
    )
    assert {link.bandwidth_bps for link in cluster.links} == {Quantity(94e6, "measured", 93e6, 95e6, "2026-03-01")}
    assert {link.latency_s for link in cluster.links} == {Quantity(50e-6)}
    assert [link.burst_bytes for link in cluster.links] == 4 * [Quantity(20e3)]
