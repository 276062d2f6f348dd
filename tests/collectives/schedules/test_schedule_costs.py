"""Steps and bytes of the schedules: the closed forms that their sources give."""

from collections import Counter
from fractions import Fraction
from itertools import pairwise
from math import lcm

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from message_parts import fractions

from thinwire.collectives.schedules import bruck, direct, doubling, forest, hierarchy, ring, rooted
from thinwire.collectives.schedules.combine import pipelined
from thinwire.collectives.schedules.schedule import Schedule
from thinwire.errors import UserError

ranks = st.integers(2, 17)


def amounts(schedule: Schedule, end: str) -> list[Fraction]:
    """What passes this end of the messages, "source" or "target", in parts of the message: for each rank."""
    parts = fractions(schedule)
    unit = lcm(*(part.denominator for part in parts))
    whole = [int(part * unit) for part in parts]
    total = [0] * schedule.p
    for message in schedule.messages:
        total[getattr(message, end)] += sum(whole[chunk] for chunk in message.chunks)
    return [Fraction(amount, unit) for amount in total]


def sent(schedule: Schedule) -> list[Fraction]:
    return amounts(schedule, "source")


def received(schedule: Schedule) -> list[Fraction]:
    return amounts(schedule, "target")


def lg(p: int) -> int:
    return (p - 1).bit_length()


@settings(max_examples=17)
@given(p=ranks)
def test_those_that_send_the_least_possible(p: int) -> None:
    once, twice = [Fraction(p - 1, p)] * p, [Fraction(2 * (p - 1), p)] * p
    order = range(p)
    assert sent(ring.all_reduce(order)) == sent(direct.all_reduce(p)) == sent(ring.bidirectional(ring.all_reduce, order)) == twice
    assert sent(ring.reduce_scatter(order)) == sent(direct.reduce_scatter(p)) == sent(bruck.reduce_scatter(p)) == once
    gathered = [Fraction(p - 1)] * p  # the message is one rank's part
    assert sent(ring.all_gather(order)) == sent(direct.all_gather(p)) == sent(bruck.all_gather(p)) == gathered
    assert sent(direct.pairwise(p)) == once


@settings(max_examples=20)
@given(p=ranks, k=st.integers(1, 6))
def test_steps(p: int, k: int) -> None:
    chain = rooted.chain(range(p))
    expected = [
        (ring.all_reduce(range(p)), 2 * (p - 1)),
        (ring.bidirectional(ring.all_gather, range(p)), p - 1),
        (direct.all_reduce(p), 2),
        (pipelined(direct.all_reduce(p), k), k + 1),
        (bruck.all_gather(p), lg(p)),
        (bruck.all_to_all(p), lg(p)),
        (direct.pairwise(p), p - 1),
        (rooted.broadcast(rooted.binomial(p, p // 2)), lg(p)),
        (rooted.reduce(rooted.binomial(p, p // 2)), lg(p)),
        (rooted.broadcast(rooted.star(p)), p - 1),
        (pipelined(rooted.broadcast(chain), k), p - 2 + k),
        (pipelined(rooted.reduce(chain), k), p - 2 + k),
    ]
    for schedule, count in expected:
        assert len(schedule.steps) == count, (schedule.op, schedule.name)
    power = p & (p - 1) == 0
    m = p.bit_length() - 1
    assert len(doubling.recursive_doubling(p).steps) == (m if power else m + 2)
    assert len(doubling.rabenseifner(p).steps) == (2 * m if power else 2 * m + 2)
    assert len(rooted.double_tree(p).steps) <= 4 * lg(p) + 2


@pytest.mark.parametrize("p", [2, 4, 8, 16])
def test_powers_of_two(p: int) -> None:
    assert sent(doubling.recursive_doubling(p)) == [Fraction(lg(p))] * p
    assert sent(doubling.rabenseifner(p)) == [Fraction(2 * (p - 1), p)] * p
    assert sent(bruck.all_to_all(p)) == [Fraction(lg(p), 2)] * p


@given(p=ranks)
def test_ranks_too_many_cost_one_more_vector(p: int) -> None:
    """2 (m-1)/m n and n for the result to hand back; the others send n, once."""
    m = 1 << (p.bit_length() - 1)
    core = Fraction(2 * (m - 1), m)
    assert sorted(sent(doubling.rabenseifner(p))) == sorted([Fraction(1)] * (p - m) + [core + 1] * (p - m) + [core] * (2 * m - p))


@settings(max_examples=20)
@given(p=st.integers(2, 64))
def test_no_rank_sends_more_than_twice_the_vector_along_two_trees(p: int) -> None:
    schedule = rooted.double_tree(p)
    assert max(sent(schedule)) <= 2 and max(received(schedule)) <= 2
    inner = [{parent for parent in parents if parent >= 0} for parents in rooted.two_binary(p)]
    assert len(inner[0] & inner[1]) <= p % 2


@pytest.mark.parametrize(
    ("rates", "seconds"),
    [
        ([1.0] * 8, 1.75),
        ([1.0] * 7 + [0.25], 4.0),
        ([1.0] * 7 + [0.5], 2.0),
        ([1.0] * 15 + [0.5], 2.0),
        ([1.0] * 7 + [0.6], 14 / 7.6),
        ([1.0] * 4 + [0.5] * 4, 14 / 6),
        ([1.0] * 7 + [10.0], 1.0),
        ([1.0, 1.0], 1.0),
        ([3.0, 1.0], 1.0),
    ],
)
def test_the_best_shares_reach_the_bound_of_unequal_cards(rates: list[float], seconds: float) -> None:
    """The optimum max(1 / min b, 2 (p-1) / sum b), as the exact linear program gives it."""
    shares = direct.best_shares(rates)
    assert sum(shares) == 1000 and min(shares) >= 0
    schedule = direct.all_reduce(len(rates), shares)
    for each in (sent(schedule), received(schedule)):
        busy = max(float(amount) / rate for amount, rate in zip(each, rates, strict=True))
        assert seconds * (1 - 1e-9) <= busy <= seconds * 1.01


@given(rates=st.lists(st.floats(0.01, 100), min_size=1, max_size=17))
def test_shares_of_any_cards(rates: list[float]) -> None:
    shares = direct.best_shares(rates)
    assert sum(shares) == 1000 and min(shares) >= 0
    order = sorted(range(len(rates)), key=rates.__getitem__)
    assert all(shares[slow] <= shares[fast] + 1 for slow, fast in pairwise(order))


def test_rates_must_be_above_zero() -> None:
    with pytest.raises(UserError, match="rates_bps"):
        direct.best_shares([1.0, 0.0])


@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_a_rack_sends_and_gets_once_its_share_whatever_its_size(sizes: list[int]) -> None:
    """2 (R-1)/R n over each uplink, in each direction."""
    numbers = iter(range(sum(sizes)))
    racks = [[next(numbers) for _ in range(size)] for size in sizes]
    rack_of = {rank: number for number, rack in enumerate(racks) for rank in rack}
    schedule = hierarchy.all_reduce(racks)
    parts = fractions(schedule)
    out: Counter[int] = Counter()
    into: Counter[int] = Counter()
    for message in schedule.messages:
        if rack_of[message.source] != rack_of[message.target]:
            amount = sum(parts[chunk] for chunk in message.chunks)
            out[rack_of[message.source]] += amount
            into[rack_of[message.target]] += amount
    count = len(sizes)
    assert all(out[rack] == into[rack] == Fraction(2 * (count - 1), count) for rack in range(count))
    assert len(schedule.steps) == 2 * (max(sizes) - 1) + 2 * (count - 1)


@given(rows=st.integers(1, 4), columns=st.integers(1, 4))
def test_on_a_torus_only_neighbours_talk(rows: int, columns: int) -> None:
    grid = [[row * columns + column for column in range(columns)] for row in range(rows)]
    schedule = hierarchy.torus(grid)
    p = rows * columns
    assert sent(schedule) == [Fraction(2 * (p - 1), p)] * p
    assert len(schedule.steps) == 2 * (rows - 1) + 2 * (columns - 1)
    for message in schedule.messages:
        (a, b), (c, d) = divmod(message.source, columns), divmod(message.target, columns)
        assert (a == c and (d - b) % columns == 1) or (b == d and (c - a) % rows == 1)


def test_a_forest_sends_along_its_trees_only() -> None:
    """Two chains round a ring of four, one in each direction, weights 3 and 1."""
    there, back = rooted.chain([0, 1, 2, 3]), rooted.chain([0, 3, 2, 1])
    schedule = forest.broadcast([(there, 3), (back, 1)])
    assert schedule.flows([8]) == ((0, 1, 6), (0, 3, 2), (1, 2, 6), (2, 1, 2), (2, 3, 6), (3, 2, 2))
    with pytest.raises(UserError, match="added up at rank 0 but handed out by 1"):
        forest.all_reduce([(there, rooted.star(4, 1), 1)])
    with pytest.raises(UserError, match="cover blocks"):
        forest.all_gather([(there, 1)])
