"""The simulation of a schedule: closed forms, the lower bound, and laws that hold on any network."""

from dataclasses import fields, replace

import pytest
from any_clusters import RATE, clusters, star
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.cluster import FRAME_OVERHEAD, Cluster, Quantity, load_cluster
from thinwire.cluster.graph import Routes
from thinwire.collectives.choose.call import collective_call
from thinwire.collectives.choose.candidates import candidates_for
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.simulate import Simulated, simulate
from thinwire.collectives.schedules import direct, doubling, ring, rooted
from thinwire.collectives.schedules.combine import pipelined
from thinwire.collectives.schedules.schedule import Schedule
from thinwire.collectives.synthesis.bounds import OPS, bound
from thinwire.errors import UserError

FREE = Costs(**dict.fromkeys((field.name for field in fields(Costs)), 0.0))
"""The wires alone."""
PER_BYTE = 8 * FRAME_OVERHEAD / RATE
COSTS = Costs(send_s=3e-5, receive_s=7e-5, wake_s=0.0, reduce_s_per_byte=1e-9, call_s=1e-4, acknowledged=0.0)


def run(schedule: Schedule, message_bytes: int, cluster: Cluster, costs: Costs = FREE) -> Simulated:
    return simulate(schedule, message_bytes, Routes(cluster), costs)


@pytest.mark.parametrize("p", [2, 3, 8])
def test_a_ring_on_equal_hosts(p: int) -> None:
    """All in step: post, send a part, latency, wake up, receive; and an addition in the first half."""
    n, latency_s = 4 * p * 50_000, 20e-6
    found = run(ring.all_reduce(range(p)), n, star([RATE] * p, latency_s), replace(COSTS, wake_s=4e-5))
    step_s = COSTS.send_s + n / p * PER_BYTE + 2 * latency_s + 4e-5 + COSTS.receive_s
    added_s = (p - 1) * n / p * COSTS.reduce_s_per_byte
    assert found.seconds == pytest.approx(COSTS.call_s + 2 * (p - 1) * step_s + added_s, rel=1e-9)
    assert found.latency_s == pytest.approx(2 * (p - 1) * 2 * latency_s, rel=1e-6)
    assert found.wire_s == pytest.approx(2 * (p - 1) / p * n * PER_BYTE, rel=1e-6)
    assert found.busy == pytest.approx(2 * (p - 1) / p * n * PER_BYTE / found.seconds, rel=1e-6)


def test_a_pipelined_chain() -> None:
    p, segments, n = 6, 16, 4 * 16 * 10_000
    found = run(pipelined(rooted.broadcast(rooted.chain(range(p))), segments), n, star([RATE] * p))
    assert found.seconds == pytest.approx((segments + p - 2) / segments * n * PER_BYTE, rel=1e-9)


def test_calls_back_to_back_follow_one_another_down_a_chain() -> None:
    """As segments of one message would; and each call has its own beginning."""
    p, n, calls = 5, 40_000, 7
    routes, chain = Routes(star([RATE] * p)), rooted.broadcast(rooted.chain(range(p)))
    assert simulate(chain, n, routes, FREE, calls).seconds == pytest.approx((calls + p - 2) * n * PER_BYTE, rel=1e-9)
    local = Routes(load_cluster("laptop"))
    pair = rooted.broadcast(rooted.chain([0, 1]))
    costs = replace(FREE, call_s=1e-3, send_s=1e-4)
    assert simulate(pair, n, local, costs, calls).seconds == pytest.approx(calls * 1.1e-3, rel=1e-3)


def test_messages_of_nothing_are_not_waited_for() -> None:
    """One element among eight ranks: most chunks are empty, in the second call too."""
    routes = Routes(star([RATE] * 8))
    for make in (doubling.rabenseifner, lambda p: ring.all_reduce(range(p)), direct.all_reduce):
        one, four = (simulate(make(8), 4, routes, COSTS, calls).seconds for calls in (1, 4))
        assert one < four <= 4 * one * (1 + 1e-9)


def test_weighted_direct_on_a_star() -> None:
    """The slow host owns nothing: it sends the vector in the first half, and gets it in the second, a segment behind."""
    n, segments, rates = 4 * 32 * 7000, 32, [RATE] * 7 + [RATE / 4]
    schedule = pipelined(direct.all_reduce(8, direct.best_shares(rates, 7)), segments)
    found = run(schedule, n, star(rates))
    least_s = 4 * n * PER_BYTE
    assert least_s * (1 + 1 / segments) * 0.999 <= found.seconds <= least_s * (1 + 2 / segments)
    assert found.fullest is not None and "h7" in (found.fullest.source, found.fullest.target)


def test_one_step_shares_the_card_of_the_receiver() -> None:
    """Seven send to one at once: n bytes each through one card; then the messages of software follow one another."""
    n = 4 * 1000
    found = run(rooted.reduce(rooted.star(8)), n, star([RATE] * 8), COSTS)
    assert found.seconds > 7 * (n * PER_BYTE) + COSTS.send_s + COSTS.receive_s
    assert found.seconds < 7 * (n * PER_BYTE + COSTS.receive_s + n * COSTS.reduce_s_per_byte) + COSTS.send_s + COSTS.call_s + 1e-9


def test_a_message_waits_for_the_one_before_it_on_its_connection() -> None:
    found = run(pipelined(rooted.broadcast(rooted.chain([0, 1])), 4), 4000, star([RATE] * 2))
    times = [(one.began_s, one.left_s) for one in found.transfers]
    each_s = 1000 * PER_BYTE
    assert times == [(pytest.approx(k * each_s), pytest.approx((k + 1) * each_s)) for k in range(4)]


def bucketed(cluster: Cluster, burst_bytes: float) -> Cluster:
    links = tuple(replace(link, burst_bytes=Quantity(burst_bytes * FRAME_OVERHEAD)) for link in cluster.links)
    return replace(cluster, links=links)


def test_a_bucket_lets_the_first_bytes_pass_at_once_and_fills_while_its_link_rests() -> None:
    """Two messages of 1000 bytes, the second by a sender that takes a while: it finds what has come back since."""
    cluster = bucketed(star([RATE] * 2), 600)
    message = rooted.broadcast(rooted.chain([0, 1]))
    alone = run(message, 1000, cluster)
    assert alone.seconds == pytest.approx(400 * PER_BYTE)
    assert run(message, 500, cluster).seconds == pytest.approx(0, abs=1e-9)
    for pause_bytes, free in ((0, 0), (400 + 200, 200), (400 + 5000, 600)):
        costs = replace(FREE, send_s=pause_bytes * PER_BYTE)
        first, second = run(pipelined(message, 2), 2000, cluster, costs).transfers
        assert first.left_s - first.began_s == pytest.approx(400 * PER_BYTE)
        assert second.left_s - second.began_s == pytest.approx((1000 - free) * PER_BYTE), pause_bytes


def test_what_arrives_is_acknowledged() -> None:
    """A ring keeps both directions of each card busy; in a chain of whole messages one ever moves, in one direction."""
    costs, n, hosts = replace(FREE, acknowledged=0.02), 4 * 6 * 10_000, star([RATE] * 6)
    for schedule, slower in ((ring.all_reduce(range(6)), 1.02), (rooted.broadcast(rooted.chain(range(6))), 1.0)):
        found, free = run(schedule, n, hosts, costs).seconds, run(schedule, n, hosts).seconds
        assert found == pytest.approx(slower * free, rel=1e-3)


def test_shared_cores_make_ranks_wait_for_one_another() -> None:
    """8 ranks in step on 2 cores: each of 3 steps takes four times the software; with a core each, once."""
    cluster, schedule = star([1e15] * 8), doubling.recursive_doubling(8)
    alone = run(schedule, 4, cluster, COSTS)
    shared = run(schedule, 4, cluster, replace(COSTS, cores_shared=4.0))
    each_s = 3 * (COSTS.send_s + COSTS.receive_s)
    assert alone.seconds == pytest.approx(COSTS.call_s + each_s, rel=1e-3)
    assert shared.seconds == pytest.approx(4 * (COSTS.call_s + each_s), rel=0.05)
    assert shared.software_s == pytest.approx(shared.seconds, rel=1e-3)


def test_ranks_of_one_host_cross_no_link() -> None:
    found = run(ring.all_reduce(range(4)), 4096, load_cluster("laptop"), COSTS)
    assert found.fullest is None and not found.link_bytes and found.wire_s == 0
    assert found.seconds == pytest.approx(COSTS.call_s + 6 * (COSTS.send_s + COSTS.receive_s) + 3 * 1024 * 1e-9, rel=1e-6)


def test_only_who_waits_has_to_wake_up() -> None:
    """64 messages through a fast wire to a rank that is busy with them: it wakes up once."""
    costs = replace(COSTS, wake_s=1e-3)
    found = run(pipelined(rooted.broadcast(rooted.chain([0, 1])), 64), 64 * 4, star([1e12] * 2), costs)
    assert found.seconds == pytest.approx(COSTS.call_s + COSTS.send_s + 1e-3 + 64 * COSTS.receive_s, rel=1e-3)


def test_one_rank_and_costs_below_nothing() -> None:
    assert run(ring.all_reduce([0]), 4096, star([RATE])).seconds == 0
    with pytest.raises(UserError, match=r"send_s = -1; it must be 0 or more"):
        Costs(send_s=-1)


@settings(max_examples=12)
@given(cluster=clusters(), op=st.sampled_from(OPS), size=st.sampled_from([1, 500, 50_000]), data=st.data())
def test_laws_on_any_network(cluster: Cluster, op: str, size: int, data: st.DataObject) -> None:
    """Of candidates: never below the bound; each link carries what routes say; the path adds up; a second run is the same."""
    p = cluster.world_size
    root, n = data.draw(st.integers(0, p - 1)), 4 * p * size
    least_s, routes = bound(cluster, op, n, root).seconds, Routes(cluster)
    costs = data.draw(st.sampled_from([FREE, COSTS, replace(COSTS, cores_shared=3.0)]))
    for one in candidates_for(collective_call(cluster, op, n, root=root))[0][data.draw(st.integers(0, 2)) :: 3]:
        if one.schedule is None or len(one.schedule.messages) > 400:
            continue
        found = simulate(one.schedule, n, routes, costs)
        assert found.seconds >= least_s * (1 - 1e-6) - 1e-12, one.title
        flows = one.schedule.flows(one.schedule.block_sizes(n // 4))
        loads = {link: size for link, size in routes.load((a, b, 4 * elements) for a, b, elements in flows).items() if size}
        assert {link: size for link, size in found.link_bytes.items() if size} == loads, one.title
        assert found.software_s + found.wire_s + found.latency_s == pytest.approx(found.seconds, rel=1e-6, abs=1e-8), one.title
        if len(one.schedule.messages) < 50:
            assert simulate(one.schedule, n, routes, costs) == found


@settings(max_examples=15)
@given(cluster=clusters(), op=st.sampled_from(OPS))
def test_twice_the_bytes_at_twice_the_rate_take_the_same_time(cluster: Cluster, op: str) -> None:
    def at(cluster: Cluster, factor: int) -> Cluster:
        links = tuple(
            replace(link, bandwidth_bps=Quantity(link.bandwidth_bps.value * factor), latency_s=Quantity(0.0))
            for link in cluster.links
        )
        return replace(cluster, links=links)

    n = 4 * cluster.world_size * 100_000
    for one in candidates_for(collective_call(cluster, op, 4))[0][::3]:
        if one.model is not None:
            once, twice = run(one.model, n, at(cluster, 1)), run(one.model, 2 * n, at(cluster, 2))
            assert twice.seconds == pytest.approx(once.seconds, rel=1e-3), one.title  # chunks are cut at whole elements
