"""Racks, uplinks and cards are found whatever the network looks like, if it can be seen from its ends."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import SimulatedLinks

from thinwire.errors import UserError
from thinwire.measure.findings import RackFound
from thinwire.measure.network import Network, Phases, measure_network

CARD = 100.0e6


def probe(links: SimulatedLinks) -> Network:
    return measure_network(links, [f"host{index}" for index in range(len(links.send))], Phases(lambda _: None))


def members(rack: RackFound) -> tuple[int, ...]:
    return tuple(int(name.removeprefix("host")) for name in rack.hosts)


@settings(max_examples=30)
@given(
    sizes=st.lists(st.integers(2, 6), min_size=2, max_size=4),
    share=st.floats(0.15, 0.5),
    broken=st.sampled_from([0.0, 0.03]),
    seed=st.integers(0, 10_000),
)
def test_any_partition_into_racks_is_found_with_its_uplinks(sizes: list[int], share: float, broken: float, seed: int) -> None:
    """Uplinks carry a seventh to half of what the smallest rack's cards send; hosts stand in any order."""
    draw = random.Random(seed)
    rack = [index for index, size in enumerate(sizes) for _ in range(size)]
    draw.shuffle(rack)
    uplinks = [share * CARD * min(sizes) * draw.uniform(0.95, 1.05) for _ in sizes]
    links = SimulatedLinks([CARD] * len(rack), [CARD] * len(rack), rack, uplinks, uplinks, broken=broken, seed=seed)
    found = probe(links)
    assert {members(rack_found) for rack_found in found.racks} == {
        tuple(host for host, own in enumerate(rack) if own == index) for index in range(len(sizes))
    }
    for rack_found in found.racks:
        assert rack_found.up_bps.value == pytest.approx(uplinks[rack[members(rack_found)[0]]], rel=0.12)
    for estimate in (*found.send_bps, *found.receive_bps):
        assert estimate.value == pytest.approx(CARD, rel=0.05)


@given(
    cards=st.lists(st.sampled_from([10e6, 25e6, 50e6, 100e6]), min_size=2, max_size=10),
    seed=st.integers(0, 10_000),
)
def test_no_racks_are_seen_on_one_switch_whatever_the_cards(cards: list[float], seed: int) -> None:
    cards = [max(cards), *cards]  # that the fastest card is not alone: it would only be known as the second fastest
    found = probe(SimulatedLinks(cards, cards, [None] * len(cards), broken=0.02, seed=seed))
    assert found.racks == ()
    for host, card in enumerate(cards):
        assert found.send_bps[host].value == pytest.approx(card, rel=0.05)
        assert found.receive_bps[host].value == pytest.approx(card, rel=0.05)


def test_both_directions_are_told_apart() -> None:
    send, receive = [100e6, 100e6, 20e6, 100e6], [100e6, 50e6, 100e6, 100e6]
    found = probe(SimulatedLinks(send, receive, [None] * 4))
    assert [estimate.value for estimate in found.send_bps] == pytest.approx(send, rel=0.05)
    assert [estimate.value for estimate in found.receive_bps] == pytest.approx(receive, rel=0.05)


def test_an_uplink_with_unequal_directions() -> None:
    """With two groups, what leaves one enters the other: whose uplink it is cannot be seen, so both get it."""
    rack = [0, 0, 0, None, None, None, None, None]
    found = probe(SimulatedLinks([CARD] * 8, [CARD] * 8, rack, up=[0.4 * CARD], down=[1.2 * CARD]))
    assert [members(rack_found) for rack_found in found.racks] == [(0, 1, 2), (3, 4, 5, 6, 7)]
    for own, other in (found.racks, found.racks[::-1]):
        assert own.up_bps.value == pytest.approx(other.down_bps.value, rel=0.05)
    assert found.racks[0].up_bps.value == pytest.approx(0.4 * CARD, rel=0.05)
    assert found.racks[0].down_bps.value == pytest.approx(1.2 * CARD, rel=0.05)


def test_an_uplink_as_wide_as_its_cards_is_none() -> None:
    found = probe(SimulatedLinks([CARD] * 8, [CARD] * 8, [0, 1] * 4, up=[4 * CARD] * 2, down=[4 * CARD] * 2))
    assert found.racks == ()


@settings(max_examples=25)
@given(slow=st.integers(0, 8), share=st.floats(0.08, 0.4), seed=st.integers(0, 10_000))
def test_a_slow_host_is_put_into_its_rack(slow: int, share: float, seed: int) -> None:
    """Its own flows are never slowed, so what shows its rack is what the others lose. The ninth host is on the core switch."""
    rack: list[int | None] = [0, 1, 0, 1, 0, 1, 0, 1, None]
    cards = [share * CARD if host == slow else CARD for host in range(9)]
    found = probe(SimulatedLinks(cards, cards, rack, up=[CARD] * 2, down=[CARD] * 2, seed=seed))
    assert [members(rack_found) for rack_found in found.racks] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    for rack_found in found.racks:
        assert rack_found.up_bps.value == pytest.approx(CARD, rel=0.05)
    assert [estimate.value for estimate in found.send_bps] == pytest.approx(cards, rel=0.05)


def test_one_wire_for_all_is_not_called_racks() -> None:
    """A hub: every host behind an uplink of its own would look the same, so nothing is claimed but the loss is known."""
    found = probe(SimulatedLinks([CARD] * 6, [CARD] * 6, [None] * 6, hub=CARD))
    assert found.racks == ()
    assert found.together == pytest.approx(1 / 6, rel=0.1)


def test_latencies_are_split_over_the_cables() -> None:
    found = probe(SimulatedLinks([CARD] * 4, [CARD] * 4, [None] * 4, cable_s=1e-3))
    for latency in found.latency_s:
        assert latency.low <= latency.value <= latency.high
        assert latency.value == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("num_hosts", [2, 3, 8])
def test_the_probe_is_short(num_hosts: int) -> None:
    links = SimulatedLinks(
        [CARD] * num_hosts, [CARD] * num_hosts, [index % 2 for index in range(num_hosts)], [CARD] * 2, [CARD] * 2
    )
    probe(links)
    assert links.seconds < 19


def test_slow_links_get_more_time() -> None:
    fast, slow = (SimulatedLinks([rate] * 4, [rate] * 4, [None] * 4) for rate in (1e9, 0.5e6))
    probe(fast)
    probe(slow)
    assert slow.seconds > 2 * fast.seconds


def test_a_line_that_carries_nothing_is_one_line_of_error() -> None:
    with pytest.raises(UserError, match=r"nothing that host1 sent arrived at host2; .*on any port") as raised:
        probe(SimulatedLinks([CARD, 0.0, CARD], [CARD] * 3, [None] * 3))
    assert "\n" not in str(raised.value)
