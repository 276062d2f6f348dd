"""Many trees at once, each carrying a share: what tree packings (Blink, ForestColl, Edmonds) are run as.

A tree is a tuple of parents, -1 for the root (`rooted`); its weight is an integer.

    all-gather     the block of rank r travels along all trees with root r, cut in proportion to their weights; reduce-scatter
                   is the all-gather backwards, along the reversed trees
    broadcast      the vector travels from the one root, likewise
    all-reduce     a part of the vector is added up along one tree, and handed out along another one with the same root; roots
                   may own unequal parts

What a link carries is the sum of the weights of the trees that cross it. (Edmonds 1973; Wang et al., Blink, 2020; Zhao et al.,
ForestColl, 2024.)
"""

from collections.abc import Sequence

from thinwire.collectives.schedules.combine import overlaid, reverse, reversed_steps
from thinwire.collectives.schedules.rooted import down, root_of
from thinwire.collectives.schedules.schedule import Chunk, Schedule, Step
from thinwire.errors import UserError

Weighted = tuple[Sequence[int], int]
"""(parents, weight)."""


def all_gather(trees: Sequence[Weighted], name: str = "forest") -> Schedule:
    """Every rank is the root of one tree or more."""
    trees = sorted(trees, key=lambda tree: root_of(tree[0]))  # stable, so that the order within a root is kept
    p = _num_ranks([parents for parents, _ in trees], name)
    chunks = tuple(Chunk(root_of(parents), weight) for parents, weight in trees)
    return Schedule(op="all_gather", p=p, chunks=chunks, steps=_all_down(trees), name=name)


def reduce_scatter(trees: Sequence[Weighted], name: str = "forest") -> Schedule:
    """Up the trees: a rank sends to its parent."""
    return reverse(all_gather(trees, name), name)


def broadcast(trees: Sequence[Weighted], name: str = "forest") -> Schedule:
    """All trees have one root."""
    p, root = _num_ranks([parents for parents, _ in trees], name), root_of(trees[0][0])
    if any(root_of(parents) != root for parents, _ in trees):
        raise UserError(f"{name}: the trees of a broadcast have one root, not {sorted({root_of(one) for one, _ in trees})}")
    chunks = tuple(Chunk(0, weight) for _, weight in trees)
    return Schedule(op="broadcast", p=p, root=root, chunks=chunks, steps=_all_down(trees), name=name)


def reduce(trees: Sequence[Weighted], name: str = "forest") -> Schedule:
    """Up the trees, all with one root."""
    return reverse(broadcast(trees, name), name)


def all_reduce(trees: Sequence[tuple[Sequence[int], Sequence[int], int]], name: str = "forest") -> Schedule:
    """(up, down, weight) of each part: parents in the tree that adds up, and in the one that hands out, with the same root.

    A part turns round as soon as it is complete, so parts with low trees do not wait for those with high ones.
    """
    p = _num_ranks([parents for up, below, _ in trees for parents in (up, below)], name)
    parts = []
    for number, (up, below, _) in enumerate(trees):
        if root_of(up) != root_of(below):
            raise UserError(f"{name}: part {number} is added up at rank {root_of(up)} but handed out by {root_of(below)}")
        parts.append(reversed_steps(_down(up, number), reduce=True) + _down(below, number))
    chunks = tuple(Chunk(0, weight) for _, _, weight in trees)
    return Schedule(op="all_reduce", p=p, chunks=chunks, steps=overlaid(parts), name=name)


def _all_down(trees: Sequence[Weighted]) -> tuple[Step, ...]:
    return overlaid(_down(parents, number) for number, (parents, _) in enumerate(trees))


def _down(parents: Sequence[int], number: int) -> tuple[Step, ...]:
    return down(parents, lambda _: (number,))


def _num_ranks(trees: Sequence[Sequence[int]], name: str) -> int:
    sizes = sorted({len(parents) for parents in trees})
    if len(sizes) != 1:
        raise UserError(f"{name}: the trees must be over the same ranks; they have {sizes or 'none'}")
    return sizes[0]
