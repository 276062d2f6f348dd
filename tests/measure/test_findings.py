"""What the probe writes is a cluster file that says what was found."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from thinwire.cluster import dump_cluster, load_cluster
from thinwire.cluster.graph import Routes
from thinwire.measure.findings import Findings, HostFound, RackFound, sentences, table, to_cluster, unique_names
from thinwire.measure.fit import Estimate


def around(value: float) -> Estimate:
    return Estimate(value, 0.99 * value, 1.01 * value)


def make(racks: list[int | None], rates: list[float], devices: int = 1, together: float = 1.0) -> Findings:
    """Hosts with cards of these rates; ranks assigned in turns, so that those of a host do not stand together."""
    hosts = tuple(
        HostFound(
            name=f"node{index}",
            address=f"10.0.0.{index + 1}",
            ranks=tuple(index + len(racks) * number for number in range(devices)),
            kind="cpu",
            rack=None if rack is None else f"rack{rack}",
            send_bps=around(rates[index]),
            receive_bps=around(0.5 * rates[index]),
            latency_s=around(1e-5 * (index + 1)),
            flops_per_s=around(1e10),
            matmul_flops_per_s=2e10,
            memory_bytes=2.0**33,
            memory_bytes_per_s=3e9 * (index + 1),
        )
        for index, rack in enumerate(racks)
    )
    found = [
        RackFound(
            name=f"rack{number}",
            hosts=tuple(host.name for host in hosts if host.rack == f"rack{number}"),
            up_bps=around(1e8),
            down_bps=around(2e8),
            latency_s=5e-5,
            cards_bps=(4e8, 2e8),
        )
        for number in sorted({rack for rack in racks if rack is not None})
    ]
    return Findings(hosts=hosts, racks=tuple(found), together=together, dtype="float32", date="2026-01-31", seconds=12.3)


@given(
    racks=st.lists(st.sampled_from([None, 0, 1, 2]), min_size=2, max_size=9), devices=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_the_cluster_file_reads_back_equal_and_joins_all_ranks(
    tmp_path_factory: pytest.TempPathFactory, racks: list[int | None], devices: int, seed: int
) -> None:
    draw = random.Random(seed)
    findings = make(racks, [draw.uniform(1e6, 1e11) for _ in racks], devices)
    cluster = to_cluster(findings, "found")
    path = tmp_path_factory.mktemp("probe") / "cluster.toml"
    dump_cluster(cluster, path)
    assert load_cluster(path) == cluster
    assert cluster.world_size == devices * len(racks)
    routes = Routes(cluster)
    for host in findings.hosts:
        for rank in host.ranks:
            assert cluster.host_of(rank).name == host.name
    for a in range(len(racks)):
        for b in range(len(racks)):
            route = routes.between(a, b)
            assert len(route) == (0 if a == b else 2 + (racks[a] != racks[b]) * ((racks[a] is not None) + (racks[b] is not None)))


def test_each_direction_keeps_its_rate_interval_and_date() -> None:
    cluster = to_cluster(make([0, 0, None], [1e8, 2e8, 4e8]), "found")
    links = {(link.source, link.target): link for link in cluster.links}
    assert links["node0", "rack0"].bandwidth_bps.value == 1e8
    assert links["rack0", "node0"].bandwidth_bps.value == 0.5e8
    assert links["rack0", "switch"].bandwidth_bps.value == 1e8
    assert links["switch", "rack0"].bandwidth_bps.value == 2e8
    assert links["node2", "switch"].latency_s.value == pytest.approx(3e-5)
    rate = links["node2", "switch"].bandwidth_bps
    assert (rate.source, rate.low, rate.high, rate.date) == ("measured", 0.99 * 4e8, 1.01 * 4e8, "2026-01-31")


def test_what_stands_out_is_a_sentence() -> None:
    lines = sentences(make([0, 0, 1, 1], [1e8, 1e8, 1e8, 0.25e8]))
    assert lines[0] == "slow host: node3, 12.5 Mbit/s, 4.0 times slower than the median"
    assert lines[1] == "shared uplink: node0, node1 (rack0) share one: 100 Mbit/s out for 400 Mbit/s of cards (4.0 times)"
    assert "one switch" in sentences(make([None] * 4, [1e8] * 4))[0]
    assert "only 20% of what they get alone" in sentences(make([None] * 4, [1e8] * 4, together=0.2))[0]


def test_equal_hosts_are_not_called_slow() -> None:
    assert make([None] * 3, [1e8, 0.8e8, 1.1e8]).slow_hosts() == []
    assert make([None] * 2, [1e8, 0.1e8]).slow_hosts() == []


def test_the_table_has_a_row_a_host_with_rate_and_interval_and_fits_a_terminal() -> None:
    with Path(os.devnull).open("w") as nowhere:
        console = Console(width=80, record=True, file=nowhere)
        console.print(table(make([0, 0, None], [1e8, 1e8, 2.5e7], devices=2)))
        text = console.export_text()
        console.print(table(make([None], [1e8], devices=4)))
        alone = console.export_text()
    for part in (
        "send Mbit/s",
        "100 [99, 101]",
        "12.5 [12.38, 12.62]",
        "2, 5",
        "30 us",
        "rack0",
        "2 x cpu",
        "10 Gflop/s",
        "8 GiB",
    ):
        assert part in text
    assert "1 host, 4 ranks" in alone and "send" not in alone


@given(st.lists(st.sampled_from(["node", "node-2", "switch", "a"]), min_size=1, max_size=8))
def test_names_become_unique(names: list[str]) -> None:
    unique = unique_names(names, ["switch"])
    assert len({*unique, "switch"}) == len(names) + 1
    assert all(new.startswith(old) for new, old in zip(unique, names, strict=True))
