"""What may be run for an op in a group: every generator that makes sense there, in a few numbers of segments each.

Orders of rings, racks, cards and trees come from the cluster. Segments are powers of two for which the largest message has
SMALLEST to LARGEST bytes: smaller ones cost more software than they save, in larger ones the pipeline fills late.

Two are not schedules of ours: the backend's own collective (native), and the same on a private group in another order of ranks.

Everything is a description until it is used: a schedule in its segments is built when it is asked for.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import lcm

from thinwire.cluster import Cluster
from thinwire.collectives.choose import native, placement
from thinwire.collectives.choose.question import Question, question
from thinwire.collectives.choose.simulate import chunk_bytes
from thinwire.collectives.schedules import bruck, direct, double_tree, doubling, forest, hierarchy, pairwise, ring, rooted
from thinwire.collectives.schedules.combine import on_ranks, pipelined, then
from thinwire.collectives.schedules.schedule import Schedule
from thinwire.collectives.schedules.trees import widest_tree
from thinwire.collectives.synthesis import (
    all_gather_forest,
    all_reduce_plan,
    broadcast_forest,
    graph_of,
    reduce_forest,
    reduce_scatter_forest,
)
from thinwire.errors import UserError

SMALLEST_BYTES, LARGEST_BYTES = 16 << 10, 1 << 20
MOST_MOVES = 20_000
"""Chunks moved in a schedule: more take seconds to go through."""
MOST_MESSAGES = 4096
"""Up to which segments are multiplied."""
SYNTHESISED = 32
"""Ranks up to which trees are packed."""

Make = Callable[[], Schedule]


@dataclass(frozen=True)
class Candidate:
    """model: the schedule in one segment, None for native ones. order: of the private group of a reordered native one."""

    name: str
    model: Schedule | None = None
    segments: int = 1
    order: tuple[int, ...] | None = None

    @cached_property
    def schedule(self) -> Schedule | None:
        """What is to be run; None: the backend's own collective."""
        return self.model and pipelined(self.model, self.segments)

    @property
    def title(self) -> str:
        """The name with its segments."""
        return self.name if self.segments == 1 else f"{self.name}, {self.segments} segments"


@dataclass(frozen=True, slots=True)
class Offers:
    """left_out: what was not made, and why, a sentence each."""

    candidates: tuple[Candidate, ...]
    left_out: tuple[str, ...]


def candidates(
    cluster: Cluster, op: str, message_bytes: int, ranks: Sequence[int] | None = None, root: int = 0
) -> list[Candidate]:
    """For the group of the global ranks `ranks` (default: all); schedules are over positions in it, and so is the root."""
    return list(offers(question(cluster, op, message_bytes, ranks, root)).candidates)


def offers(asked: Question) -> Offers:
    """The candidates, and what was left out."""
    found = [Candidate("native")]
    orders = placement.orders(asked.cluster)
    if asked.op in native.ORDERED:
        found += [Candidate(f"native, {name}", order=order) for name, order in orders.items() if name]
    left_out, known = [], set()
    for name, moves, make in _drafts(asked, orders) if asked.p > 1 else ():
        if moves > MOST_MOVES:
            left_out.append(f"{name}: about {moves} chunks to move among {asked.p} ranks; at most {MOST_MOVES} are gone through")
            continue
        try:
            model = make()
        except UserError as error:  # trees cannot be packed into every network
            left_out.append(f"{name}: {error}")
            continue
        if (model.chunks, model.steps) not in known:
            found += [Candidate(name, model, segments) for segments in segment_counts(model, asked.message_bytes)]
            known.add((model.chunks, model.steps))
    if asked.p > SYNTHESISED and asked.op != "all_to_all":
        left_out.append(f"packed trees: {asked.p} ranks; packing takes too long above {SYNTHESISED}")
    return Offers(tuple(found), tuple(left_out))


def segment_counts(model: Schedule, message_bytes: int) -> list[int]:
    """Powers of two; see the top of the file. One segment where even halves would be too small."""
    lengths = chunk_bytes(model, message_bytes)
    sizes = [sum(lengths[chunk] for chunk in message.chunks) for message in model.messages]
    largest, count = max(sizes, default=0), sum(size > 0 for size in sizes)
    allowed = [1]
    while largest >= 2 * allowed[-1] * SMALLEST_BYTES and 2 * allowed[-1] * count <= MOST_MESSAGES:
        allowed.append(2 * allowed[-1])
    return [segments for segments in allowed if largest <= segments * LARGEST_BYTES] or allowed[-1:]


_Draft = tuple[str, int, Make]
"""Name, about how many chunks move, how to make it."""


def _drafts(asked: Question, orders: dict[str, placement.Order]) -> Iterator[_Draft]:
    match asked.op:
        case "all_reduce":
            yield from _all_reduces(asked, orders)
        case "reduce_scatter" | "all_gather":
            yield from _halves(asked, orders)
        case "broadcast" | "reduce":
            yield from _rooted(asked, orders)
        case _:
            p = asked.p
            yield "pairwise", p * p, partial(pairwise.all_to_all, p)
            yield "direct", p * p, partial(native.at_once, p)
            yield "Bruck", p * p * p.bit_length() // 2, partial(bruck.all_to_all, p)


def _named(name: str, order: str) -> str:
    return f"{name}, {order}" if order else name


def _all_reduces(asked: Question, orders: dict[str, placement.Order]) -> Iterator[_Draft]:
    p, cluster = asked.p, asked.cluster
    lg, square = p.bit_length(), 2 * p * p
    for name, order in orders.items():
        yield _named("ring", name), square, partial(ring.all_reduce, order)
        yield _named("bidirectional ring", name), 2 * square, partial(ring.both_ways, ring.all_reduce, order)
        yield _named("recursive doubling", name), p * lg, partial(_on, doubling.recursive_doubling, p, order)
        yield _named("Rabenseifner", name), square, partial(_on, doubling.rabenseifner, p, order)
        yield _named("double binary tree", name), 4 * p, partial(_on, double_tree.all_reduce, p, order)
        yield _named("binomial tree", name), 2 * p, partial(_tree_all_reduce, rooted.binomial(p), order)
    best = list(orders.values())[-1]
    rates = placement.card_rates_bps(cluster)
    chain = placement.with_slow_ends(best, rates)
    yield "chain", 2 * p, partial(rooted.all_reduce, rooted.chain(chain))
    yield "direct", square, partial(direct.all_reduce, p)
    fast = [rank for rank in range(p) if rates[rank] == max(rates)]
    if len(fast) < p:
        yield "weighted direct", square, partial(direct.all_reduce, p, direct.best_shares(rates))
        yield _servers(p, fast)
    if len(fast) > 1:
        yield _servers(p, fast[:1])
    yield from _on_racks(asked, best)
    if p <= SYNTHESISED:
        yield "packed trees", 0, partial(_joint_trees, cluster)


def _servers(p: int, servers: Sequence[int]) -> _Draft:
    made = partial(direct.parameter_server, p, servers)
    return f"parameter server, {len(servers)} of {p}", 2 * p * len(servers), made


def _on_racks(asked: Question, order: placement.Order) -> Iterator[_Draft]:
    p, names = asked.p, set()
    for racks in placement.groupings(asked.cluster, order):
        pieces = lcm(*map(len, racks))
        name = f"hierarchy of {len(racks)} racks"
        moves = 2 * len(racks) * (pieces * max(map(len, racks)) * len(racks) + pieces * len(racks))
        if name not in names:
            yield name, moves, partial(hierarchy.all_reduce, racks)
        names.add(name)
        if len({len(rack) for rack in racks}) == 1:
            rows, columns = len(racks), len(racks[0])
            name = f"{rows} x {columns} torus"
            if name not in names:
                yield name, 4 * p * p, partial(hierarchy.torus, racks)
            names.add(name)
    grid = placement.grid(order)
    if grid is not None and f"{len(grid)} x {len(grid[0])} torus" not in names:
        yield f"{len(grid)} x {len(grid[0])} torus", 4 * p * p, partial(hierarchy.torus, grid)


def _halves(asked: Question, orders: dict[str, placement.Order]) -> Iterator[_Draft]:
    """Reduce-scatter and all-gather."""
    p, gathers = asked.p, asked.op == "all_gather"
    square = p * p
    around = ring.all_gather if gathers else ring.reduce_scatter
    for name, order in orders.items():
        yield _named("ring", name), square, partial(around, order)
        yield _named("bidirectional ring", name), 2 * square, partial(ring.both_ways, around, order)
        yield _named("Bruck", name), square, partial(_on, bruck.all_gather if gathers else bruck.reduce_scatter, p, order)
    yield "direct", square, partial(direct.all_gather if gathers else direct.reduce_scatter, p)
    if p <= SYNTHESISED:
        yield "packed trees", 0, partial(_packed_halves, asked)


def _rooted(asked: Question, orders: dict[str, placement.Order]) -> Iterator[_Draft]:
    """Broadcast and reduce."""
    p, root, up = asked.p, asked.root, asked.op == "reduce"
    made = rooted.reduce if up else rooted.broadcast
    for name, order in orders.items():
        along = placement.from_root(order, root)
        against = placement.from_root(order[::-1], root)
        yield _named("binomial tree", name), p, partial(_rooted_on, made, rooted.binomial(p), along)
        yield _named("chain", name), p, partial(made, rooted.chain(against if up else along))
        if up:
            yield _named("ring and gather", name), 2 * p * p, partial(_ring_and_gather, order, root)
    yield "star", p, partial(made, rooted.star(p, root))
    if p <= SYNTHESISED:
        yield "widest tree", p, lambda: made(widest_tree(asked.cluster, root, up=up))
        yield "packed trees", 0, partial(_packed_rooted, asked)


def _on(make: Callable[[int], Schedule], p: int, order: Sequence[int]) -> Schedule:
    return on_ranks(make(p), order)


def _rooted_on(make: Callable[[Sequence[int]], Schedule], parents: Sequence[int], order: Sequence[int]) -> Schedule:
    return on_ranks(make(parents), order)


def _tree_all_reduce(parents: Sequence[int], order: Sequence[int]) -> Schedule:
    return on_ranks(rooted.all_reduce(parents), order)


def _ring_and_gather(order: Sequence[int], root: int) -> Schedule:
    return then(ring.reduce_scatter(order), rooted.gather(rooted.star(len(order), root)), "ring and gather")


def _joint_trees(cluster: Cluster) -> Schedule:
    parts = all_reduce_plan(graph_of(cluster)).parts()
    common = lcm(*(part.denominator for _, _, part in parts))
    return forest.all_reduce([(up.parents(), down.parents(), int(part * common)) for up, down, part in parts], "packed trees")


def _packed_halves(asked: Question) -> Schedule:
    graph = graph_of(asked.cluster)
    if asked.op == "all_gather":
        return forest.all_gather(all_gather_forest(graph).weighted(), "packed trees")
    return forest.reduce_scatter(reduce_scatter_forest(graph).weighted(), "packed trees")


def _packed_rooted(asked: Question) -> Schedule:
    graph = graph_of(asked.cluster)
    if asked.op == "broadcast":
        return forest.broadcast(broadcast_forest(graph, asked.root).weighted(), "packed trees")
    return forest.reduce(reduce_forest(graph, asked.root).weighted(), "packed trees")
