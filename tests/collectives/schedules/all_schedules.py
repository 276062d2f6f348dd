"""Every generator of schedules, with arguments drawn at random: what the tests of this folder go through."""

from collections.abc import Callable
from itertools import pairwise
from random import Random

from thinwire.collectives.schedules import bruck, direct, doubling, forest, hierarchy, ring, rooted
from thinwire.collectives.schedules.combine import on_ranks, pipelined, then
from thinwire.collectives.schedules.schedule import Schedule

Make = Callable[[int, Random], Schedule]


def order(p: int, random: Random) -> list[int]:
    return random.sample(range(p), p)


def tree(p: int, random: Random, root: int | None = None) -> tuple[int, ...]:
    """Any tree: each rank hangs on one that is there already."""
    ranks = order(p, random)
    if root is not None:
        ranks.remove(root)
        ranks.insert(0, root)
    parents = [-1] * p
    for place in range(1, p):
        parents[ranks[place]] = ranks[random.randrange(place)]
    return tuple(parents)


def racks(p: int, random: Random) -> list[list[int]]:
    ranks = order(p, random)
    borders = sorted({0, p, *(random.randrange(p) for _ in range(random.randint(0, 4)))})
    return [ranks[first:last] for first, last in pairwise(borders)]


def grid(p: int, random: Random) -> list[list[int]]:
    ranks = order(p, random)
    rows = random.choice([rows for rows in range(1, p + 1) if p % rows == 0])
    return [ranks[row::rows] for row in range(rows)]


def shares(p: int, random: Random) -> list[int]:
    return [*(random.choice([0, 1, 1, 3, 10]) for _ in range(p - 1)), 2]


def weighted_trees(p: int, random: Random, roots: list[int]) -> list[tuple[tuple[int, ...], int]]:
    return [(tree(p, random, root), random.randint(1, 4)) for root in roots]


def forest_all_reduce(p: int, random: Random) -> Schedule:
    roots = [random.randrange(p) for _ in range(random.randint(1, 4))]
    return forest.all_reduce([(tree(p, random, root), tree(p, random, root), random.randint(1, 5)) for root in roots])


def forest_broadcast(p: int, random: Random) -> Schedule:
    return forest.broadcast(weighted_trees(p, random, [random.randrange(p)] * random.randint(1, 3)))


def forest_reduce(p: int, random: Random) -> Schedule:
    return forest.reduce(weighted_trees(p, random, [random.randrange(p)] * random.randint(1, 3)))


def scattered_reduce(p: int, random: Random) -> Schedule:
    return then(bruck.reduce_scatter(p), rooted.gather(rooted.star(p, random.randrange(p))), "reduce-scatter, gather")


GENERATORS: dict[str, Make] = {
    "ring all_reduce": lambda p, random: ring.all_reduce(order(p, random)),
    "ring reduce_scatter": lambda p, random: ring.reduce_scatter(order(p, random)),
    "ring all_gather": lambda p, random: ring.all_gather(order(p, random)),
    "bidirectional all_reduce": lambda p, random: ring.bidirectional(ring.all_reduce, order(p, random)),
    "bidirectional reduce_scatter": lambda p, random: ring.bidirectional(ring.reduce_scatter, order(p, random)),
    "bidirectional all_gather": lambda p, random: ring.bidirectional(ring.all_gather, order(p, random)),
    "recursive doubling": lambda p, random: doubling.recursive_doubling(p),
    "Rabenseifner": lambda p, random: on_ranks(doubling.rabenseifner(p), order(p, random)),
    "double binary tree": lambda p, random: rooted.double_tree(p),
    "direct all_reduce": lambda p, random: direct.all_reduce(p),
    "direct reduce_scatter": lambda p, random: direct.reduce_scatter(p),
    "direct all_gather": lambda p, random: on_ranks(direct.all_gather(p), order(p, random)),
    "weighted direct": lambda p, random: direct.all_reduce(p, shares(p, random)),
    "parameter server": lambda p, random: direct.parameter_server(p, order(p, random)[: random.randint(1, p)]),
    "hierarchy": lambda p, random: hierarchy.all_reduce(racks(p, random)),
    "torus": lambda p, random: hierarchy.torus(grid(p, random)),
    "binomial broadcast": lambda p, random: rooted.broadcast(rooted.binomial(p, random.randrange(p))),
    "binomial reduce": lambda p, random: rooted.reduce(rooted.binomial(p, random.randrange(p))),
    "chain broadcast": lambda p, random: rooted.broadcast(rooted.chain(order(p, random))),
    "chain reduce": lambda p, random: rooted.reduce(rooted.chain(order(p, random))),
    "tree broadcast": lambda p, random: rooted.broadcast(tree(p, random)),
    "tree reduce": lambda p, random: rooted.reduce(tree(p, random)),
    "tree all_reduce": lambda p, random: rooted.all_reduce(tree(p, random)),
    "tree scatter": lambda p, random: rooted.scatter(tree(p, random)),
    "tree gather": lambda p, random: rooted.gather(tree(p, random)),
    "reduce_scatter then gather": scattered_reduce,
    "Bruck all_gather": lambda p, random: bruck.all_gather(p),
    "Bruck reduce_scatter": lambda p, random: on_ranks(bruck.reduce_scatter(p), order(p, random)),
    "Bruck all_to_all": lambda p, random: on_ranks(bruck.all_to_all(p), order(p, random)),
    "direct all_to_all": lambda p, random: direct.all_to_all(p),
    "pairwise all_to_all": lambda p, random: direct.pairwise(p),
    "forest all_gather": lambda p, random: forest.all_gather(weighted_trees(p, random, [*range(p), random.randrange(p)])),
    "forest reduce_scatter": lambda p, random: forest.reduce_scatter(weighted_trees(p, random, [*range(p), 0])),
    "forest broadcast": forest_broadcast,
    "forest reduce": forest_reduce,
    "forest all_reduce": forest_all_reduce,
}


def make(name: str, p: int, seed: int, segments: int = 1) -> Schedule:
    """The schedule of this generator for p ranks; the seed decides about its other arguments."""
    return pipelined(GENERATORS[name](p, Random(seed)), segments)
