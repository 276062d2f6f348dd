"""All-reduce over two binary trees at once, half of the vector along each.

In one tree half of the ranks are leaves and send only once; the second tree makes leaves of the inner nodes of the first and
the other way round, so that each rank sends, and gets, at most 2 n in all. In many segments (`combine.pipelined`) the time tends
to 2 n / rate, about that of a ring, after at most 4 lg p + 2 steps instead of 2 (p-1).

The first tree is in order: with b the lowest set bit of rank r, its parent is (r ^ b) | 2b, or r ^ b if there is no such rank;
rank 0 is the root, above the greatest power of two. The second is the first mirrored, r -> p-1-r, if p is even, else shifted by
one.
(Sanders, Speck, Traeff, Two-tree algorithms for full bandwidth broadcast, reduction and scan, 2009; built as in NCCL.)
"""

from thinwire.collectives.schedules import rooted
from thinwire.collectives.schedules.combine import together
from thinwire.collectives.schedules.rooted import Parents
from thinwire.collectives.schedules.schedule import Schedule


def all_reduce(p: int) -> Schedule:
    """Meant to be run in segments."""
    return together([rooted.all_reduce(parents) for parents in trees(p)], "double binary tree")


def trees(p: int) -> tuple[Parents, Parents]:
    """The parents in both trees."""
    first = tuple(_parent(rank, p) for rank in range(p))
    place = [p - 1 - rank if p % 2 == 0 else (rank + 1) % p for rank in range(p)]
    second = [-1] * p
    for rank, parent in enumerate(first):
        second[place[rank]] = place[parent] if parent >= 0 else -1
    return first, tuple(second)


def _parent(rank: int, p: int) -> int:
    if rank == 0:
        return -1
    bit = rank & -rank
    up = (rank ^ bit) | bit << 1
    return up if up < p else rank ^ bit
