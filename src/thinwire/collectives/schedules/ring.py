"""Rings in a given order: all-gather, reduce-scatter, all-reduce, each also in both directions at once.

p ranks in a ring, position i holds rank order[i]; part q belongs to position q. All sums of positions mod p.

    reduce-scatter   step t = 0 .. p-2: position i sends part i-1-t to i+1, which adds it. Part q starts at q+1 and ends at q.
    all-gather       step t = 0 .. p-2: position i sends part i-t to i+1, which copies it.
    all-reduce       the one, then the other: 2 (p-1) steps, 2 (p-1)/p n bytes per rank, all in one direction.

Least possible bytes (Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009). In both
directions: half of each block goes round each direction, twice as fast where the links to both neighbours are separate ones.
"""

from collections.abc import Callable, Sequence

from thinwire.collectives.schedules.combine import then, together
from thinwire.collectives.schedules.schedule import Message, Schedule, Step, check_order, whole_blocks


def all_gather(order: Sequence[int]) -> Schedule:
    """Copies only."""
    steps = around(check_order(order), [(rank,) for rank in order], reduce=False)
    return Schedule(op="all_gather", p=len(order), chunks=whole_blocks(len(order)), steps=steps, name="ring")


def reduce_scatter(order: Sequence[int]) -> Schedule:
    """Rank r ends with block r."""
    steps = around(check_order(order), [(rank,) for rank in order], reduce=True)
    return Schedule(op="reduce_scatter", p=len(order), chunks=whole_blocks(len(order)), steps=steps, name="ring")


def all_reduce(order: Sequence[int]) -> Schedule:
    """Reduce-scatter, then all-gather, both from order[i] to order[i + 1]."""
    return then(reduce_scatter(order), all_gather(order), "ring")


def bidirectional(ring: Callable[[Sequence[int]], Schedule], order: Sequence[int]) -> Schedule:
    """`ring` is one of the three above: half of each block goes along the order, half against it."""
    return together([ring(order), ring(order[::-1])], "bidirectional ring")


def around(order: Sequence[int], parts: Sequence[tuple[int, ...]], reduce: bool) -> tuple[Step, ...]:
    """Reduce-scatter of parts (chunk numbers each) that end at their position, or all-gather of parts that start there."""
    m = len(order)
    return tuple(
        tuple(Message(order[i], order[(i + 1) % m], chunks, reduce) for i in range(m) if (chunks := parts[(i - reduce - t) % m]))
        for t in range(m - 1)
    )
