"""The candidates: right schedules all of them, in segments of sensible sizes; what is left out is listed."""

from typing import Any

import pytest
from any_clusters import clusters, star, wired
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.cluster import Cluster, load_cluster
from thinwire.collectives.choose import placement
from thinwire.collectives.choose.call import collective_call
from thinwire.collectives.choose.candidates import LARGEST_BYTES, MOST_MESSAGES, SMALLEST_BYTES, Candidate, candidates_for
from thinwire.collectives.choose.native import pattern
from thinwire.collectives.schedules.verify import verify
from thinwire.collectives.synthesis.bounds import OPS
from thinwire.collectives.wire import flows
from thinwire.errors import UserError

SIZE = 4 << 20


def candidates(cluster: Cluster, op: str, message_bytes: int, **group: Any) -> tuple[Candidate, ...]:
    return candidates_for(collective_call(cluster, op, message_bytes, **group))[0]


@settings(max_examples=10)
@given(cluster=clusters(), op=st.sampled_from(OPS), data=st.data())
def test_every_candidate_is_a_right_schedule_of_the_op(cluster: Cluster, op: str, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, cluster.world_size - 1))
    found = candidates(cluster, op, 70_000, root=root)
    assert found[0].name == "native"
    assert len({one.title for one in found}) == len(found)
    for one in found:
        if one.schedule is None:
            assert one.order is None or sorted(one.order) == list(range(cluster.world_size))
            continue
        assert (one.schedule.op, one.schedule.p) == (op, cluster.world_size)
        assert one.schedule.root in (None, root)
        verify(one.schedule)


def names(cluster: str, op: str) -> set[str]:
    return {one.name for one in candidates(load_cluster(cluster), op, SIZE)}


def test_what_fits_the_network_is_tried() -> None:
    racks = names("two-racks", "all_reduce")
    assert {"native, ring order", "ring", "ring, ring order", "bidirectional ring, ring order", "recursive doubling"} <= racks
    assert {"Rabenseifner", "double binary tree", "direct", "hierarchy of 2 racks", "2 x 4 torus", "packed trees"} <= racks
    assert not any(name.startswith("weighted") for name in racks)
    assert {"weighted direct", "chain", "parameter server, 7 of 8"} <= names("one-slow-host", "all_reduce")
    assert "native, ring order" not in names("two-racks", "reduce_scatter")
    assert {"binomial tree", "chain", "widest tree", "packed trees"} <= names("one-slow-host", "broadcast")
    assert {"ring and gather", "chain"} <= names("two-racks", "reduce")
    assert {"pairwise", "direct", "Bruck"} <= names("two-racks", "all_to_all")
    assert {"ring", "Bruck", "direct"} <= names("two-racks", "all_gather") & names("two-racks", "reduce_scatter")


@pytest.mark.parametrize("op", OPS)
def test_segments_are_of_sensible_sizes(op: str) -> None:
    for one in candidates(load_cluster("eight-hosts-100mbit"), op, SIZE):
        if one.schedule is not None:
            lengths = [4 * len(part) for part in one.schedule.ranges(one.schedule.block_sizes(SIZE // 4))]
            largest = max(sum(lengths[chunk] for chunk in message.chunks) for message in one.schedule.messages)
            assert largest >= SMALLEST_BYTES
            assert largest <= LARGEST_BYTES * 1.01 or 2 * len(one.schedule.messages) > MOST_MESSAGES
            assert len(one.schedule.messages) <= MOST_MESSAGES


@pytest.mark.long
def test_large_groups_leave_out_what_they_cannot_go_through_and_list_it() -> None:
    found, left = candidates_for(collective_call(star([1e9] * 120), "all_reduce", SIZE))
    left_out = {sentence.split(":")[0]: sentence for sentence in left}
    assert (
        "about 28800 chunks to move among 120 ranks" in left_out["ring"]
        and "packing takes too long above 32" in left_out["packed trees"]
    )
    kept = {one.name for one in found}
    assert "double binary tree" in kept and not kept & set(left_out)


def test_a_group_is_a_cluster_of_its_own() -> None:
    """Ranks 0, 2, 4, 6 are one rack of two; the uplink is none of their business."""
    cluster = load_cluster("two-racks")
    rack = collective_call(cluster, "all_reduce", SIZE, [0, 2, 4, 6])
    assert rack.cluster.ranks == ("a0/cpu0", "a1/cpu0", "a2/cpu0", "a3/cpu0")
    assert not placement.groupings(rack.cluster, range(4))
    assert {one.schedule.p for one in candidates(cluster, "all_reduce", SIZE, ranks=[0, 2, 4, 6]) if one.schedule} == {4}


def test_where_ranks_sit() -> None:
    racks, slow = load_cluster("two-racks"), load_cluster("one-slow-host")
    assert placement.groupings(racks, [0, 2, 4, 6, 1, 3, 5, 7]) == [((0, 2, 4, 6), (1, 3, 5, 7))]
    assert set(placement.orders(racks)) == {"", "ring order"} and set(placement.orders(slow)) == {""}
    rates = placement.card_rates_bps(slow)
    assert rates == (100e6,) * 7 + (25e6,)
    assert placement.with_slow_ends(range(8), rates)[0] == 7 or placement.with_slow_ends(range(8), rates)[-1] == 7
    assert placement.card_rates_bps(load_cluster("laptop")) == (1.0,) * 4
    assert placement.grid(range(6)) == ((0, 1, 2), (3, 4, 5)) and placement.grid(range(7)) is None


def test_hosts_on_two_switches_are_racks_in_two_manners() -> None:
    """By the switch of the first card, and by that of the last."""
    cables = [(f"h{k}", f"first{k // 2}", 1e9) for k in range(4)] + [(f"h{k}", f"last{k % 2}", 1e9) for k in range(4)]
    cluster = wired({f"h{k}": 1 for k in range(4)}, cables)
    assert placement.groupings(cluster, range(4)) == [((0, 1), (2, 3)), ((0, 2), (1, 3))]


@pytest.mark.parametrize("op", ["all_reduce", "reduce_scatter", "all_gather", "reduce", "broadcast", "all_to_all"])
@pytest.mark.parametrize("p", [2, 5, 8])
def test_the_native_pattern_moves_what_the_backend_moves(op: str, p: int) -> None:
    """Pair by pair, as the wire formulas say, which the ledger is tested against."""
    n = 4 * p * 1000
    schedule = pattern(op, p, n, root=p - 1)
    assert schedule is not None
    moved = {(a, b): 4 * elements for a, b, elements in schedule.flows(schedule.block_sizes(n // 4))}
    expected: dict[tuple[int, int], int] = {}
    for a, b, size in flows(op, n, p, p - 1):
        expected[a, b] = expected.get((a, b), 0) + size
    assert moved == expected


def test_calls_that_make_no_sense() -> None:
    cluster = load_cluster("two-racks")
    for arguments, message in [
        (("gather", 4), "unknown collective 'gather'; known: all_reduce, "),
        (("all_reduce", 0), "0 bytes: a message has 1 byte or more"),
        (("broadcast", 4, None, 8), "root = 8, but the group has ranks 0 to 7"),
        (("broadcast", 4, [0, 1], 2), "root = 2, but the group has ranks 0 to 1"),
        (("all_reduce", 4, [0, 8]), "there is no rank 8; ranks of two-racks are 0 to 7"),
        (("all_reduce", 4, [1, 1]), "each once"),
        (("all_reduce", 4, []), "a group has one rank or more"),
    ]:
        with pytest.raises(UserError, match=message):
            collective_call(cluster, *arguments)  # type: ignore[arg-type]
