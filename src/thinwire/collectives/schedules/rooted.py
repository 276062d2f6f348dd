"""Over one tree: broadcast, reduce, all-reduce, scatter and gather. Trees: binomial, chain, star, or any other.

A tree is a tuple of parents, -1 for the root. A rank passes the vector on to one child after the other, one in a step; the child
that needs longest is served first, which is the fewest steps if a rank sends to one other at a time:

    steps(v) = max over children, i = 0, 1, .. in the order of falling steps(child_i), of  i + 1 + steps(child_i)

Reduce is the broadcast backwards, an all-reduce the one after the other. Without segments a binomial tree needs the fewest steps,
ceil(lg p), and n bytes in each. In k segments (`combine.pipelined`) a chain takes p-2+k steps of n/k bytes and every rank sends
the vector once, so the time of a long vector tends to n / rate, the bound. (Chan, Heimlich, Purkayastha, van de Geijn 2007.)
"""

from collections.abc import Callable, Sequence

from thinwire.collectives.schedules.combine import then, turned
from thinwire.collectives.schedules.schedule import Chunk, Message, Schedule, Step, check_order
from thinwire.errors import UserError

Parents = tuple[int, ...]


def binomial(p: int, root: int = 0) -> Parents:
    """Counted from the root, the parent of v is v without its lowest set bit. Subtrees are runs of neighbouring ranks."""
    _check_root(p, root)
    return tuple(-1 if rank == root else ((v := (rank - root) % p) - (v & -v) + root) % p for rank in range(p))


def chain(order: Sequence[int]) -> Parents:
    """order[0] is the root; each passes on to the next."""
    before = dict(zip(check_order(order)[1:], order, strict=False))
    return tuple(before.get(rank, -1) for rank in range(len(order)))


def star(p: int, root: int = 0) -> Parents:
    """The root talks to each."""
    _check_root(p, root)
    return tuple(-1 if rank == root else root for rank in range(p))


def broadcast(parents: Sequence[int], name: str = "tree") -> Schedule:
    """From the root down."""
    steps = down(parents, lambda _: (0,))
    return Schedule(op="broadcast", p=len(parents), root=root_of(parents), chunks=(Chunk(0),), steps=steps, name=name)


def reduce(parents: Sequence[int], name: str = "tree") -> Schedule:
    """Up to the root."""
    return turned(broadcast(parents), name)


def all_reduce(parents: Sequence[int], name: str = "tree") -> Schedule:
    """Up, and down again."""
    return then(reduce(parents), broadcast(parents), name)


def scatter(parents: Sequence[int], name: str = "tree") -> Schedule:
    """Each rank passes to a child the blocks of all ranks below it."""
    below: list[set[int]] = [{rank} for rank in range(len(parents))]
    for rank, parent in reversed(_in_order(parents)):
        if parent >= 0:
            below[parent] |= below[rank]
    chunks = tuple(Chunk(rank) for rank in range(len(parents)))
    steps = down(parents, lambda rank: tuple(sorted(below[rank])))
    return Schedule(op="scatter", p=len(parents), root=root_of(parents), chunks=chunks, steps=steps, name=name)


def gather(parents: Sequence[int], name: str = "tree") -> Schedule:
    """The scatter backwards."""
    return turned(scatter(parents), name)


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
    return tuple(tuple(step) for step in steps)


def _in_order(parents: Sequence[int]) -> list[tuple[int, int]]:
    """(rank, parent), parents before children."""
    children: dict[int, list[int]] = {}
    for rank, parent in enumerate(parents):
        children.setdefault(parent, []).append(rank)
    order = [(rank, -1) for rank in children.get(-1, [])]
    for rank, _ in order:  # grows while it is read
        order += [(child, rank) for child in children.get(rank, [])]
    if len(children.get(-1, [])) != 1 or len(order) != len(parents):
        raise UserError(f"parents {list(parents)} are not a tree: one rank has parent -1, and a way leads from it to every other")
    return order


def _check_root(p: int, root: int) -> None:
    if not 0 <= root < p:
        raise UserError(f"root = {root}, but ranks are 0 to {p - 1}")
