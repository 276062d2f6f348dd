"""The plan of a lab: every directed link is shaped exactly once, and what cannot be imitated is refused in one line."""

import re
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_cluster import build_cluster

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch, load_cluster, shipped_clusters
from thinwire.errors import UserError
from thinwire.lab.wiring import Wiring, burst_bytes, imitated, shape, wire


def rates(wiring: Wiring) -> Counter[int]:
    lines = [line for step in wiring.steps if step.tool == "tc" for line in step.lines]
    return Counter(int(found) for line in lines for found in re.findall(r"tbf rate (\d+)bit", line))


@given(st.data())
def test_every_directed_link_of_a_tree_is_shaped_once_at_its_own_rate(data: st.DataObject) -> None:
    switches = data.draw(st.integers(1, 5))
    uplinks = [(f"s{i}", f"s{data.draw(st.integers(0, i - 1))}") for i in range(1, switches)]
    cards = [(f"host{i}", f"s{data.draw(st.integers(0, switches - 1))}") for i in range(data.draw(st.integers(1, 6)))]
    cluster = build_cluster(*cards, *uplinks)
    links = tuple(replace(link, bandwidth_bps=Quantity(1e6 + i)) for i, link in enumerate(cluster.links))
    wiring = wire(replace(cluster, switches=tuple(Switch(name=f"s{i}") for i in range(switches)), links=links), netem=False)
    assert rates(wiring) == Counter(round(link.bandwidth_bps.value) for link in links)
    assert {card.host for card in wiring.cards} == {host.name for host in cluster.hosts}
    assert len({card.address for card in wiring.cards}) == len({card.mac for card in wiring.cards}) == len(wiring.cards)


@given(st.floats(1e5, 1e8))
def test_the_bucket_lets_at_most_a_tenth_of_256_kib_pass_at_once(bps: float) -> None:
    (line,) = shape("eth0", Link(source="a", target="b", bandwidth_bps=Quantity(bps), latency_s=Quantity(0)), with_netem=False)
    assert int(re.findall(r"burst (\d+)", line)[0]) <= 0.1 * 256 * 1024


@pytest.mark.parametrize(
    ("bps", "bytes_"), [(97.5e3, 3072), (1e6, 3072), (2e6, 5000), (6e6, 15000), (10e6, 16384), (65e6, 16384), (100e6, 25000)]
)
def test_the_bucket_holds_16_kib_or_2_ms_of_the_rate_but_no_more_than_20_ms_of_it_or_two_frames(bps: float, bytes_: int) -> None:
    assert burst_bytes(Link(source="a", target="b", bandwidth_bps=Quantity(bps), latency_s=Quantity(0))) == bytes_


def test_a_direct_cable_shapes_both_directions_at_both_ends() -> None:
    wiring = wire(build_cluster(("host0", "host1"), bps=5e6), netem=False)
    assert rates(wiring) == Counter({5_000_000: 4})
    assert len({card.switch for card in wiring.cards}) == 1


def test_more_links_are_more_cards() -> None:
    wiring = wire(build_cluster(("host0", "r0"), ("host1", "r0"), ("host0", "r1"), ("host1", "r1")), netem=False)
    assert [(c.host, c.interface, c.switch) for c in wiring.cards if c.host == "host0"] == [
        ("host0", "eth0", "r0"),
        ("host0", "eth1", "r1"),
    ]


def test_links_inside_hosts_are_left_out_with_a_note() -> None:
    cluster = build_cluster(("host0", "switch"), ("host1", "switch"))
    inner = Link(source="host0/cpu0", target="nv", bandwidth_bps=Quantity(1e12), latency_s=Quantity(0))
    cluster = replace(cluster, switches=(*cluster.switches, Switch(name="nv", kind="nvswitch")), links=(*cluster.links, inner))
    wiring = wire(cluster, netem=False)
    assert wiring.notes == ("1 links inside hosts are not imitated (memory, NVLink, optical)",)
    assert sum(rates(wiring).values()) == 4


def test_latency_becomes_netem_before_the_bucket() -> None:
    wiring = wire(build_cluster(latency_s=0.02), netem=True)
    assert wiring.delay == "applied"
    lines = [line for step in wiring.steps if step.tool == "tc" and step.netns == "h0" for line in step.lines]
    assert lines[0].startswith("qdisc add dev eth0 root handle 1: netem delay 20000us limit ")
    assert lines[1].startswith("qdisc add dev eth0 parent 1:1 handle 10: tbf rate 100000000bit burst 25000 ")


def test_a_declared_bucket_is_built_and_every_bucket_is_in_the_cluster_file() -> None:
    """Inside the lab the cluster file has what is there: the buckets, and no latency that nothing imitates."""
    cluster = build_cluster(latency_s=50e-6)
    own, *others = cluster.links
    own = replace(own, burst_bytes=Quantity(4000.0))
    cluster = replace(cluster, links=(own, *others))
    assert " burst 4000 " in shape("eth0", own, with_netem=False)[0]
    inside = imitated(cluster, "none")
    assert [link.burst_bytes.value for link in inside.links] == [4000, *(burst_bytes(link) for link in others)]
    assert {link.latency_s.value for link in inside.links} == {0.0}
    assert {link.latency_s.value for link in imitated(cluster, "applied").links} == {50e-6}
    with pytest.raises(UserError, match=r"burst_bytes = 900 B of .* -> .*; a lab's bucket must hold a frame: 1600 B or more"):
        wire(replace(cluster, links=(replace(own, burst_bytes=Quantity(900.0)), *others)), netem=False)


@pytest.mark.parametrize(("latency_s", "said"), [(50e-6, "none"), (500e-6, "none")])
def test_short_latencies_need_no_netem(latency_s: float, said: str) -> None:
    assert wire(build_cluster(latency_s=latency_s), netem=False).delay == said


def test_no_delay_goes_on_with_a_note() -> None:
    for netem in (False, True):
        wiring = wire(build_cluster(latency_s=0.02), netem=netem, delay=False)
        assert wiring.delay.startswith("refused: --no-delay, latencies up to 20 ms")
        assert any("20 ms" in note for note in wiring.notes)


def _one_way() -> Cluster:
    cluster = build_cluster()
    return replace(cluster, links=cluster.links[:-1])


@pytest.mark.parametrize(
    ("cluster", "part"),
    [
        (build_cluster(("host0", "a"), ("host1", "b"), ("a", "b"), ("b", "c"), ("c", "a")), "loop"),
        (build_cluster(("host0", "a"), ("host1", "b")), "not joined"),
        (build_cluster(latency_s=0.002), "--no-delay"),
        (build_cluster(bps=4e11), "at most 100 Gbit/s"),
        (build_cluster(*((f"host{i}", "s") for i in range(65))), "at most 64"),
        (Cluster(name="alone", hosts=(Host(name="host0", devices=(Device(name="host0/cpu0"),)),)), "no network card"),
        (_one_way(), "needs both"),
    ],
)
def test_what_cannot_be_imitated_is_refused_in_one_line(cluster: Cluster, part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        wire(cluster, netem=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", list(shipped_clusters()))
def test_shipped_clusters_can_be_wired_or_are_refused(name: str) -> None:
    cluster = load_cluster(name)
    try:
        wiring = wire(cluster, netem=True)
    except UserError as refusal:
        assert name in ("laptop", "one-node-8gpu", "dgx-h100-x128"), str(refusal)
    else:
        assert set(wiring.addresses) == {host.name for host in cluster.hosts}
