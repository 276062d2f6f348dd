"""The choice: what it is on networks whose best algorithm is known, how near to the bound, and never slower than native."""

from functools import cache

import pytest
from any_clusters import RATE, clusters, star, wired
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.cluster import FRAME_OVERHEAD, Cluster, load_cluster
from thinwire.collectives.choose.call import collective_call
from thinwire.collectives.choose.candidates import Candidate
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.estimate import estimate
from thinwire.collectives.choose.explain import as_dict, fullest, lines, loses
from thinwire.collectives.choose.native import simulate_native
from thinwire.collectives.choose.select import NEAR, TIE, Priced, Selection, choose
from thinwire.collectives.choose.simulate import simulate
from thinwire.collectives.schedules import direct, doubling, ring, rooted
from thinwire.collectives.synthesis.bounds import OPS, bound

SIZE = 4 << 20
MESSAGE_S = SIZE * 8 * FRAME_OVERHEAD / RATE
"""4 MiB through one card of 100 Mbit/s."""
BOTH_DIRECTIONS = 1 + Costs().acknowledged
"""Where as much is acknowledged on a link as it carries."""


def chosen(cluster: Cluster, op: str, message_bytes: int = SIZE) -> Selection:
    return choose(collective_call(cluster, op, message_bytes))


@settings(max_examples=8)
@given(cluster=clusters(), op=st.sampled_from(OPS), size=st.sampled_from([4, 40_000]))
def test_the_best_is_never_slower_than_native_nor_below_the_bound(cluster: Cluster, op: str, size: int) -> None:
    n = size * cluster.world_size
    found = chosen(cluster, op, n)
    seconds = [one.seconds for one in found.ranking]
    assert seconds == sorted(seconds)
    assert found.best.seconds <= min(found.native.seconds, seconds[0] * (1 + TIE))
    assert all(one.seconds >= bound(cluster, op, n).seconds * (1 - 1e-6) for one in found.ranking)


@pytest.mark.long
def test_equal_hosts() -> None:
    """6/4 of the message through each card is the bound, and the backend's ring is as near to it as anything."""
    hosts = star([RATE] * 4, latency_s=50e-6)
    found = chosen(hosts, "all_reduce")
    assert found.best is found.native
    assert found.native.seconds == pytest.approx(6 / 4 * MESSAGE_S * BOTH_DIRECTIONS, rel=0.01)
    for op, native, ours in (
        ("reduce_scatter", 6 / 4 * BOTH_DIRECTIONS, 3 / 4),
        ("reduce", 6 / 4 * BOTH_DIRECTIONS, 1),
        ("broadcast", 8 / 3, 1),
        ("all_to_all", 3 / 4 * 1.58 * BOTH_DIRECTIONS, 3 / 4),
    ):
        found = chosen(hosts, op)
        assert found.native.seconds == pytest.approx(native * MESSAGE_S, rel=0.015), op
        assert found.best.seconds == pytest.approx(ours * MESSAGE_S, rel=0.05), op


def native_s(hosts: int, op: str) -> float:
    found = simulate_native(collective_call(star([RATE] * hosts), op, SIZE), None, Costs())
    assert found is not None
    return found.seconds


@pytest.mark.parametrize(("hosts", "low", "high"), [(2, 0.99, 1.01), (4, 2.55, 2.7), (8, 4.35, 5.6)])
def test_the_native_broadcast_is_as_slow_as_it_was_measured(hosts: int, low: float, high: float) -> None:
    assert low * MESSAGE_S <= native_s(hosts, "broadcast") <= high * MESSAGE_S


@pytest.mark.parametrize(("hosts", "measured"), [(2, 1.92), (4, 1.58), (8, 1.36)])
def test_the_native_all_to_all_is_as_slow_as_it_was_measured(hosts: int, measured: float) -> None:
    least_s = (hosts - 1) / hosts * MESSAGE_S * BOTH_DIRECTIONS
    assert native_s(hosts, "all_to_all") == pytest.approx(measured * least_s, rel=0.02)


@pytest.mark.parametrize("op", ["broadcast", "all_to_all"])
def test_the_parts_of_a_native_collective_add_up(op: str) -> None:
    found = simulate_native(collective_call(star([RATE] * 4, latency_s=1e-3), op, 40_000), None, Costs())
    assert found is not None and found.latency_s > 0
    assert found.software_s + found.wire_s + found.latency_s == pytest.approx(found.seconds)


def test_of_those_nearly_as_good_the_one_with_the_fewest_steps_comes_second() -> None:
    call = collective_call(star([RATE] * 8), "all_reduce", 8 * 4000)
    models = [(ring.all_reduce(range(8)), 1.0), (doubling.rabenseifner(8), NEAR - 0.05), (direct.all_reduce(8), NEAR - 0.01)]
    models.append((doubling.recursive_doubling(8), NEAR + 0.01))
    runs = [
        (Candidate(model.name, model), seconds, simulate(model, call.message_bytes, call.routes)) for model, seconds in models
    ]
    found = Selection(call, tuple(Priced(*one) for one in runs), len(runs), ())
    names = [one.candidate.name for one in found.promising]
    assert names == ["ring", "direct", "Rabenseifner", "recursive doubling"]
    assert found.best.candidate.name == "ring"


def test_costs_are_scaled_by_whose_they_are() -> None:
    costs, scaled = Costs(), Costs().scaled(ours=2.0, native=3.0)
    for name in ("send_s", "receive_s", "call_s"):
        assert getattr(scaled, name) == 2 * getattr(costs, name)
        assert getattr(scaled.native, name) == pytest.approx(3 * getattr(costs.native, name))


@pytest.mark.long
def test_interleaved_racks_are_reordered() -> None:
    found = chosen(load_cluster("two-racks"), "all_reduce", SIZE // 2)
    assert found.native.seconds == pytest.approx(4 * 14 / 8 * MESSAGE_S / 2 * BOTH_DIRECTIONS, rel=0.01)
    assert found.best.candidate.name == "native, ring order"
    assert found.best.candidate.order == (0, 2, 4, 6, 1, 3, 5, 7)
    assert found.best.seconds == pytest.approx(14 / 8 * MESSAGE_S / 2 * BOTH_DIRECTIONS, rel=0.01)
    assert found.runner_up is not None and found.runner_up.candidate.name != found.best.candidate.name


@pytest.mark.long
def test_half_uplinks_call_for_a_hierarchy() -> None:
    """Bound 2 n / rate; the best-ordered ring takes 3. Ranks are on the two racks in turn."""
    cables = [(f"h{rank}", f"rack{rank % 2}", RATE) for rank in range(4)]
    cluster = wired({f"h{rank}": 1 for rank in range(4)}, [*cables, ("rack0", "core", RATE / 2), ("rack1", "core", RATE / 2)])
    found = chosen(cluster, "all_reduce")
    reordered = next(one for one in found.ranking if one.candidate.name == "native, ring order")
    assert reordered.seconds == pytest.approx(3 * MESSAGE_S * BOTH_DIRECTIONS, rel=0.01)
    assert found.best.candidate.name in ("hierarchy of 2 racks", "Rabenseifner, ring order")  # halving is one, among four
    assert found.best.seconds < 2.2 * MESSAGE_S


@cache
def one_slow_host() -> Selection:
    return chosen(star([RATE] * 3 + [RATE / 4]), "all_reduce")


@pytest.mark.long
def test_a_slow_host_does_not_decide_twice() -> None:
    """At a quarter of the rate a ring takes 6 n / rate, the bound is 4 n / rate."""
    found = one_slow_host()
    assert found.native.seconds == pytest.approx(6 * MESSAGE_S * BOTH_DIRECTIONS, rel=0.01)
    assert found.best.seconds <= 4 * MESSAGE_S * 1.06
    weighted = next(one for one in found.ranking if one.candidate.name == "weighted direct")
    assert weighted.seconds <= 4 * MESSAGE_S * 1.06


def test_short_messages_take_few_steps() -> None:
    """Recursive doubling, or direct where every rank has a core for its 14 messages."""
    found = chosen(load_cluster("eight-hosts-100mbit"), "all_reduce", 1024)
    assert found.best.candidate.schedule is not None and len(found.best.candidate.schedule.steps) <= 3
    assert found.native.seconds > 2 * found.best.seconds
    shared = choose(found.call, Costs(cores_shared=4.0))
    assert shared.best.candidate.name == "recursive doubling"


def test_costs_decide_too() -> None:
    """Where a message costs a hundredth of a second of software, nobody sends hundreds of them."""
    call = collective_call(load_cluster("eight-hosts-100mbit"), "broadcast", SIZE)
    cheap, dear = choose(call).best.run, choose(call, Costs(send_s=0.01, receive_s=0.01)).best.run
    assert cheap and dear and len(dear.transfers) < len(cheap.transfers) / 4


def test_estimates_are_exact_for_rings_and_chains() -> None:
    call = collective_call(star([RATE] * 6), "all_reduce", 6 * 40_000)
    costs = Costs(reduce_s_per_byte=0.0, call_s=0.0)
    for model in (ring.all_reduce(range(6)), rooted.all_reduce(rooted.chain(range(6)))):
        found = simulate(model, call.message_bytes, call.routes, costs).seconds
        assert estimate(model, call, costs)(1) == pytest.approx(found, rel=1e-3)


def test_the_words() -> None:
    selection = one_slow_host()
    said = dict(lines(selection))
    assert "h3 -> s0 is busy" in said["predicted"]
    assert "h3 -> s0" in said["bound"] and said["native"].startswith("2.15 s (1.")
    found = as_dict(selection)
    assert found["bound_s"] <= found["predicted_s"] < found["native_s"]
    assert {found["links"][0]["source"], found["links"][0]["target"]} == {"h3", "s0"}
    best, native = selection.best, selection.native
    assert fullest(best)[0][0] == best.run.fullest  # type: ignore[union-attr]
    assert loses(best, native) in [f"{link} carries 6 MiB (4 MiB)" for link in ("s0 -> h3", "h3 -> s0")]


@pytest.mark.long
def test_large_groups_are_answered_too() -> None:
    """120 ranks: the native ring has a closed form; what can be gone through is simulated, and what cannot is listed."""
    found = chosen(star([RATE] * 120), "all_reduce", 120 * 4)
    assert found.native.run is None and found.native.seconds > 0
    assert found.best.candidate.model is not None and found.best.run is not None and found.left_out
