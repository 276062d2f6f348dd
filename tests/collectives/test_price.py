"""Prices of collectives: the closed forms on simple networks, and laws on any."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thinwire.cluster import FRAME_OVERHEAD, load_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.cluster.graph import Routes
from thinwire.collectives.price import MESSAGE_OVERHEAD_S, price

RATE = 100e6
OPS = ["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce", "gather", "scatter"]
seconds_per_byte = 8 * FRAME_OVERHEAD / RATE


def on_equal_hosts(op: str, message_bytes: int, count: int, rate: float = RATE, root: int = 0) -> float:
    return price(Routes(equal_hosts(count, rate)), op, message_bytes, range(count), root)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_closed_forms_on_a_switch(count: int) -> None:
    n, p, o = 2**22, count, MESSAGE_OVERHEAD_S
    ring = 2 * (p - 1) * (n / p * seconds_per_byte + o)
    assert on_equal_hosts("all_reduce", n, p) == pytest.approx(ring, rel=1e-6)
    assert on_equal_hosts("all_gather", n // p, p) == pytest.approx(ring / 2, rel=1e-6)
    tree = (p - 1).bit_length() * (n * seconds_per_byte + o)
    assert on_equal_hosts("broadcast", n, p) == pytest.approx(tree, rel=1e-6)
    assert on_equal_hosts("gather", n, p) == pytest.approx((p - 1) * n * seconds_per_byte + o, rel=1e-6)


def test_interleaved_ranks_cost_four_times_as_much_on_two_racks() -> None:
    """All eight ring neighbours cross the uplink instead of two: four flows in each direction on one link."""
    cluster = load_cluster("two-racks")
    routes = Routes(cluster)
    interleaved = price(routes, "all_reduce", 2**22, range(8))
    in_order = price(routes, "all_reduce", 2**22, [0, 2, 4, 6, 1, 3, 5, 7])
    assert interleaved / in_order == pytest.approx(4, rel=0.02)


def test_a_reduce_is_a_ring_and_then_a_gather() -> None:
    """Interleaved on two racks: 4 x 7/8 n over the uplink, then 7/8 n through the card of the root."""
    found = price(Routes(load_cluster("two-racks")), "reduce", 2**24, range(8))
    assert found == pytest.approx((4 + 1) * 7 / 8 * 2**24 * seconds_per_byte, rel=0.01)


def test_every_round_has_its_latency() -> None:
    found = price(Routes(load_cluster("eight-hosts-100mbit")), "all_reduce", 8, range(8))
    assert found == pytest.approx(14 * (100e-6 + MESSAGE_OVERHEAD_S), rel=0.01)


def test_a_slow_host_decides_the_ring() -> None:
    cluster = load_cluster("one-slow-host")
    found = price(Routes(cluster), "all_reduce", 2**22, range(8))
    assert found == pytest.approx(4 * on_equal_hosts("all_reduce", 2**22, 8), rel=0.02)


@given(
    op=st.sampled_from(OPS),
    n=st.integers(1, 10**8),
    count=st.integers(2, 9),
    root=st.integers(0, 8),
    more=st.integers(1, 10**6),
)
def test_more_bytes_cost_more_and_a_faster_wire_less(op: str, n: int, count: int, root: int, more: int) -> None:
    root %= count
    base = on_equal_hosts(op, n, count, root=root)
    assert on_equal_hosts(op, n + more, count, root=root) >= base
    assert on_equal_hosts(op, n, count, 2 * RATE, root) <= base


def test_one_rank_and_ranks_of_one_host_pay_nothing_on_the_wire() -> None:
    assert on_equal_hosts("all_reduce", 2**20, 1) == 0
    laptop = price(Routes(load_cluster("laptop")), "all_reduce", 2**30, range(4))
    assert laptop == pytest.approx(6 * MESSAGE_OVERHEAD_S)
