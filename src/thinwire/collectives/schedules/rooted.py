"""Over one tree, or two: broadcast, reduce, all-reduce, scatter and gather. Trees: binomial, chain, star, two binary ones, any.

A tree is a tuple of parents, -1 for the root. A rank passes the vector on to one child after the other, one in a step; the child
that needs longest is served first, which is the fewest steps if a rank sends to one other at a time:

    steps(v) = max over children, i = 0, 1, .. in the order of falling steps(child_i), of  i + 1 + steps(child_i)

Reduce is the broadcast backwards, an all-reduce the one after the other. Without segments a binomial tree needs the fewest steps,
ceil(lg p), and n bytes in each. In k segments (`combine.pipelined`) a chain takes p-2+k steps of n/k bytes and every rank sends
the vector once, so the time of a long vector tends to n / rate, the bound. (Chan, Heimlich, Purkayastha, van de Geijn 2007.)

Double binary tree: half of the vector along each of two trees. In one tree half of the ranks are leaves and send only once; the
second makes leaves of the inner nodes of the first and vice versa, so that each rank sends, and gets, at most 2 n in all. In many
segments the time tends to 2 n / rate, about that of a ring, after at most 4 lg p + 2 steps instead of 2 (p-1). The first tree is
in order: with b the lowest set bit of rank r, its parent is (r ^ b) | 2b, or r ^ b if there is no such rank; rank 0 is the root,
above the greatest power of two. The second is the first mirrored, r -> p-1-r, if p is even, else shifted by one.
(Sanders, Speck, Traeff, Two-tree algorithms for full bandwidth broadcast, reduction and scan, 2009; built as in NCCL.)
"""

from collections.abc import Callable, Sequence

from thinwire.collectives.schedules.combine import reverse, then, together
from thinwire.collectives.schedules.schedule import Chunk, Message, Schedule, Step, check_order, whole_blocks
from thinwire.errors import UserError

Parents = tuple[int, ...]


def binomial(p: int, root: int = 0) -> Parents:
    """Counted from the root, the parent of v is v without its lowest set bit. Subtrees are runs of neighbouring ranks."""
    return tuple(-1 if rank == root else ((v := (rank - root) % p) - (v & -v) + root) % p for rank in range(p))


def chain(order: Sequence[int]) -> Parents:
    """order[0] is the root; each passes on to the next."""
    before = dict(zip(check_order(order)[1:], order, strict=False))
    return tuple(before.get(rank, -1) for rank in range(len(order)))


def star(p: int, root: int = 0) -> Parents:
    """The root sends to each."""
    return tuple(-1 if rank == root else root for rank in range(p))


def two_binary(p: int) -> tuple[Parents, Parents]:
    """The trees of `double_tree`; see the top of the file."""
    first, second = [-1] * p, [-1] * p
    place = [p - 1 - rank if p % 2 == 0 else (rank + 1) % p for rank in range(p)]
    for rank in range(1, p):
        bit = rank & -rank
        up = (rank ^ bit) | bit << 1
        first[rank] = up if up < p else rank ^ bit
        second[place[rank]] = place[first[rank]]
    return tuple(first), tuple(second)


def broadcast(parents: Sequence[int], name: str = "tree") -> Schedule:
    """From the root down."""
    steps = down(parents, lambda _: (0,))
    return Schedule(op="broadcast", p=len(parents), root=root_of(parents), chunks=(Chunk(0),), steps=steps, name=name)


def reduce(parents: Sequence[int], name: str = "tree") -> Schedule:
    """Up to the root."""
    return reverse(broadcast(parents), name)


def all_reduce(parents: Sequence[int], name: str = "tree") -> Schedule:
    """Up, and down again."""
    return then(reduce(parents), broadcast(parents), name)


def double_tree(p: int) -> Schedule:
    """All-reduce, half of the vector along each of `two_binary`; meant to be run in segments."""
    return together([all_reduce(parents) for parents in two_binary(p)], "double binary tree")


def scatter(parents: Sequence[int], name: str = "tree") -> Schedule:
    """Each rank passes to a child the blocks of all ranks below it."""
    below: list[set[int]] = [{rank} for rank in range(len(parents))]
    for rank, parent in reversed(_in_order(parents)):
        if parent >= 0:
            below[parent] |= below[rank]
    steps = down(parents, lambda rank: tuple(sorted(below[rank])))
    return Schedule(
        op="scatter", p=len(parents), root=root_of(parents), chunks=whole_blocks(len(parents)), steps=steps, name=name
    )


def gather(parents: Sequence[int], name: str = "tree") -> Schedule:
    """The scatter backwards."""
    return reverse(scatter(parents), name)


def root_of(parents: Sequence[int]) -> int:
    """The rank without a parent; UserError unless `parents` is one tree."""
    return _in_order(parents)[0][0]


def down(parents: Sequence[int], chunks_for: Callable[[int], tuple[int, ...]]) -> tuple[Step, ...]:
    """Steps from the root to the leaves; chunks_for(v) is what v gets from its parent."""
    order = _in_order(parents)
    children: list[list[int]] = [[] for _ in parents]
    takes = [0] * len(parents)
    for rank, parent in reversed(order):
        children[rank].sort(key=lambda child: (-takes[child], child))
        takes[rank] = max((place + 1 + takes[child] for place, child in enumerate(children[rank])), default=0)
        if parent >= 0:
            children[parent].append(rank)
    steps: list[list[Message]] = [[] for _ in range(takes[order[0][0]])]
    begins = [0] * len(parents)
    for rank, _ in order:
        for place, child in enumerate(children[rank]):
            steps[begins[rank] + place].append(Message(rank, child, chunks_for(child)))
            begins[child] = begins[rank] + place + 1
    return tuple(map(tuple, steps))


def _in_order(parents: Sequence[int]) -> list[tuple[int, int]]:
    """(rank, parent), parents before children."""
    children: dict[int, list[int]] = {}
    for rank, parent in enumerate(parents):
        children.setdefault(parent, []).append(rank)
    roots = children.get(-1, [])
    order = [(rank, -1) for rank in roots]
    for rank, _ in order:  # grows while it is read
        order += [(child, rank) for child in children.get(rank, [])]
    if len(roots) != 1 or len(order) != len(parents):
        raise UserError(
            f"parents {list(parents)} are not a tree: one rank has parent -1, and a path leads from it to every other"
        )
    return order
