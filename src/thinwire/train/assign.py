"""Micro-batches assigned by speed: a step is over when its slowest rank has computed, so slow ranks get fewer of them.

A step has N = p k micro-batches over p ranks, k of them (`accumulate`) on average. Rank r takes n_r >= 1, sum n_r = N, and needs
s_r seconds for each, so that the step computes for

    T(n) = max over r of n_r s_r

`assign` finds the least T in whole micro-batches: each rank has one, and each further one goes to the rank that would be done
with it first. The gain is limited by whole numbers: with three ranks at s and one at 2 s, N = 16 takes 5 s (5 5 4 2) where four
equal ranks take 4 s, 25 % more, and N = 28 takes 8 s (8 8 8 4) for 7 s, the 14.3 % that such ranks differ by. More and smaller
micro-batches come nearer.

The mathematics does not depend on the assignment. Each rank divides its losses by k, whatever its own n_r, and ranks average:

    1/p sum over r of sum over i < n_r of grad loss_ri / k  =  1/N sum over all N of grad loss

All micro-batches have as many tokens, so this weighs by tokens. Which one is whose: ranks take one each in rounds, and a rank
that has all of its own is passed over. Equal counts then give those of `(round, rank)` in order. Only the order in which
gradients are added up changes with the assignment.

s_r is measured: the seconds until a rank's last gradient is ready, of the median step between two reports, over its n_r. A rank
that slows down is assigned fewer at the next report.

Slow links are not compensated. An all-reduce begins on a bucket when the last rank has it ready, and its ring or tree goes
through the slow link with the same bytes whoever computed what; fewer micro-batches for the rank behind that link would make it
wait at the start of the exchange, and the others compute longer (`thinwire bench uneven` measures it). What a link costs in
compute, a processor busy with sending, is in s_r. For the link itself: compression, or a `sync.kind` that exchanges rarely.
"""

import heapq
from collections.abc import Sequence

GAIN = 0.03
"""The part of a step's compute that a new assignment must save, or noise would shuffle the ranks at each report."""

Assignment = tuple[int, ...]
"""Micro-batches of a step by rank."""


def assign(total: int, seconds_per_micro: Sequence[float]) -> Assignment:
    """The split of `total`, at least 1 each, in which the slowest rank is done first. Of equals, the lower rank gets more."""
    assert total >= len(seconds_per_micro) > 0, "a micro-batch for each rank"
    counts = [1] * len(seconds_per_micro)
    waiting = [(2 * seconds, rank) for rank, seconds in enumerate(seconds_per_micro)]
    heapq.heapify(waiting)
    for _ in range(total - len(counts)):
        _, rank = waiting[0]
        counts[rank] += 1
        heapq.heapreplace(waiting, ((counts[rank] + 1) * seconds_per_micro[rank], rank))
    return tuple(counts)


def slowest_s(counts: Assignment, seconds_per_micro: Sequence[float]) -> float:
    """T(n)."""
    return max(count * seconds for count, seconds in zip(counts, seconds_per_micro, strict=True))


def reassign(counts: Assignment, seconds_per_micro: Sequence[float]) -> Assignment:
    """The best assignment if it saves more than GAIN of the slowest rank's time, else `counts`.

    A function of its arguments: ranks with the same numbers come to the same assignment without an exchange.
    """
    best = assign(sum(counts), seconds_per_micro)
    return best if slowest_s(best, seconds_per_micro) < (1 - GAIN) * slowest_s(counts, seconds_per_micro) else counts


def first_assignment(equal: Assignment, seconds_per_micro: Sequence[float], saved: Assignment = ()) -> Assignment:
    """What a run begins with: the saved assignment, if it is for as many ranks and micro-batches, else by what is known."""
    fits = len(saved) == len(equal) and sum(saved) == sum(equal)
    return saved if fits else reassign(equal, seconds_per_micro)


def index_in_step(counts: Assignment, rank: int, micro: int) -> int:
    """Which micro-batch of the step, 0 to N - 1, is number `micro` of `rank`."""
    assert micro < counts[rank]
    earlier_rounds = sum(min(count, micro) for count in counts)
    return earlier_rounds + sum(count > micro for count in counts[:rank])


def shown(counts: Assignment) -> str:
    """A line for the terminal."""
    return f"micro-batches by rank: {' '.join(map(str, counts))}"
