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
from typing import Any

from thinwire.collectives.choose import native, placement
from thinwire.collectives.choose.call import CollectiveCall
from thinwire.collectives.choose.simulate import chunk_bytes
from thinwire.collectives.schedules import bruck, direct, doubling, forest, hierarchy, ring, rooted
from thinwire.collectives.schedules.combine import on_ranks, pipelined, then
from thinwire.collectives.schedules.orders import widest_tree
from thinwire.collectives.schedules.schedule import Schedule
from thinwire.collectives.synthesis.forest import all_reduce_plan, packed
from thinwire.collectives.synthesis.graph import graph_of
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
        return self.name if self.segments == 1 else f"{self.name}, {self.segments} segments"


def candidates_for(call: CollectiveCall) -> tuple[list[Candidate], list[str]]:
    """Over positions in the group of `call`, as is its root; and what was not made, and why, a sentence each."""
    found = [Candidate("native")]
    orders = placement.orders(call.cluster)
    if call.op in native.ORDERED:
        found += [Candidate(f"native, {name}", order=order) for name, order in orders.items() if name]
    left_out: list[str] = []
    names, known = set(), set()
    for name, moves, make in _drafts(call, orders) if call.p > 1 else ():
        if name in names:
            continue
        names.add(name)
        if moves > MOST_MOVES:
            left_out.append(f"{name}: about {moves} chunks to move among {call.p} ranks; at most {MOST_MOVES} are gone through")
            continue
        try:
            model = make()
        except UserError as error:  # trees cannot be packed into every network
            left_out.append(f"{name}: {error}")
            continue
        if (model.chunks, model.steps) not in known:
            found += [Candidate(name, model, segments) for segments in segment_counts(model, call.message_bytes)]
            known.add((model.chunks, model.steps))
    if call.p > SYNTHESISED and call.op != "all_to_all":
        left_out.append(f"packed trees: {call.p} ranks; packing takes too long above {SYNTHESISED}")
    return found, left_out


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
"""Name, about how many chunks move, how to make it. Of two with one name the first counts."""


def _drafts(call: CollectiveCall, orders: dict[str, placement.Order]) -> Iterator[_Draft]:
    p = call.p
    match call.op:
        case "all_reduce":
            yield from _all_reduces(call, orders)
        case "reduce_scatter" | "all_gather":
            yield from _halves(call, orders)
        case "broadcast" | "reduce":
            yield from _rooted(call, orders)
        case _:
            yield "pairwise", p * p, partial(direct.pairwise, p)
            yield "direct", p * p, partial(direct.all_to_all, p)
            yield "Bruck", p * p * p.bit_length() // 2, partial(bruck.all_to_all, p)
            return
    if p <= SYNTHESISED:
        yield "packed trees", 0, partial(_packed, call)


def _named(name: str, order: str) -> str:
    return f"{name}, {order}" if order else name


def _on(order: Sequence[int], make: Callable[..., Schedule], *arguments: Any) -> Schedule:
    return on_ranks(make(*arguments), order)


def _all_reduces(call: CollectiveCall, orders: dict[str, placement.Order]) -> Iterator[_Draft]:
    p = call.p
    lg, square = p.bit_length(), 2 * p * p
    for name, order in orders.items():
        yield _named("ring", name), square, partial(ring.all_reduce, order)
        yield _named("bidirectional ring", name), 2 * square, partial(ring.bidirectional, ring.all_reduce, order)
        yield _named("recursive doubling", name), p * lg, partial(_on, order, doubling.recursive_doubling, p)
        yield _named("Rabenseifner", name), square, partial(_on, order, doubling.rabenseifner, p)
        yield _named("double binary tree", name), 4 * p, partial(_on, order, rooted.double_tree, p)
        yield _named("binomial tree", name), 2 * p, partial(_on, order, rooted.all_reduce, rooted.binomial(p))
    best = list(orders.values())[-1]
    rates = placement.card_rates_bps(call.cluster)
    chain = placement.with_slow_ends(best, rates)
    yield "chain", 2 * p, partial(rooted.all_reduce, rooted.chain(chain))
    yield "direct", square, partial(direct.all_reduce, p)
    fast = [rank for rank in range(p) if rates[rank] == max(rates)]
    if len(fast) < p:
        yield "weighted direct", square, partial(direct.all_reduce, p, direct.best_shares(rates))
        yield _servers(p, fast)
    if len(fast) > 1:
        yield _servers(p, fast[:1])
    for racks in placement.groupings(call.cluster, best):
        pieces = lcm(*map(len, racks))
        moves = 2 * len(racks) * (pieces * max(map(len, racks)) * len(racks) + pieces * len(racks))
        yield f"hierarchy of {len(racks)} racks", moves, partial(hierarchy.all_reduce, racks)
        if len({len(rack) for rack in racks}) == 1:
            yield _torus(racks)
    grid = placement.grid(best)
    if grid is not None:
        yield _torus(grid)


def _servers(p: int, servers: Sequence[int]) -> _Draft:
    made = partial(direct.parameter_server, p, servers)
    return f"parameter server, {len(servers)} of {p}", 2 * p * len(servers), made


def _torus(grid: Sequence[placement.Order]) -> _Draft:
    rows, columns = len(grid), len(grid[0])
    return f"{rows} x {columns} torus", 4 * (rows * columns) ** 2, partial(hierarchy.torus, grid)


def _halves(call: CollectiveCall, orders: dict[str, placement.Order]) -> Iterator[_Draft]:
    p, gathers = call.p, call.op == "all_gather"
    square = p * p
    around = ring.all_gather if gathers else ring.reduce_scatter
    for name, order in orders.items():
        yield _named("ring", name), square, partial(around, order)
        yield _named("bidirectional ring", name), 2 * square, partial(ring.bidirectional, around, order)
        yield _named("Bruck", name), square, partial(_on, order, bruck.all_gather if gathers else bruck.reduce_scatter, p)
    yield "direct", square, partial(direct.all_gather if gathers else direct.reduce_scatter, p)


def _rooted(call: CollectiveCall, orders: dict[str, placement.Order]) -> Iterator[_Draft]:
    p, root, up = call.p, call.root, call.op == "reduce"
    made = rooted.reduce if up else rooted.broadcast
    for name, order in orders.items():
        along = placement.from_root(order, root)
        against = placement.from_root(order[::-1], root)
        yield _named("binomial tree", name), p, partial(_on, along, made, rooted.binomial(p))
        yield _named("chain", name), p, partial(made, rooted.chain(against if up else along))
        if up:
            yield _named("ring and gather", name), 2 * p * p, partial(_ring_and_gather, order, root)
    yield "star", p, partial(made, rooted.star(p, root))
    if p <= SYNTHESISED:
        yield "widest tree", p, lambda: made(widest_tree(call.cluster, root, up=up))


def _ring_and_gather(order: Sequence[int], root: int) -> Schedule:
    return then(ring.reduce_scatter(order), rooted.gather(rooted.star(len(order), root)), "ring and gather")


def _packed(call: CollectiveCall) -> Schedule:
    graph, name = graph_of(call.cluster), "packed trees"
    if call.op == "all_reduce":
        parts = all_reduce_plan(graph).parts()
        common = lcm(*(part.denominator for _, _, part in parts))
        return forest.all_reduce([(up.parents(), down.parents(), int(part * common)) for up, down, part in parts], name)
    trees = packed(graph, call.op, call.root).weighted()
    make = {"all_gather": forest.all_gather, "reduce_scatter": forest.reduce_scatter, "broadcast": forest.broadcast}
    return make.get(call.op, forest.reduce)(trees, name)
