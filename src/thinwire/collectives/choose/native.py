"""What the backend's own collective would take: gloo's patterns (`collectives.wire`) as schedules, with its costs.

    all_reduce      ring to the left neighbour, two segments a chunk, of 1 MiB at most
    reduce_scatter  the all-reduce
    all_gather      ring to the right neighbour, two segments a block
    reduce          ring reduce-scatter, then everyone sends its part to the root
    broadcast       binomial tree of whole messages, nearest first. A rank posts the sends to all its children at once. If these
                    shared its card evenly 8 equal hosts would take 6 n b (n bytes, b seconds a byte), if they went one after the
                    other 3 n b. TCP does something between: measured were 4.35 to 5.6 n b at 8 hosts, and 2.55 to 2.7 at 4, where
                    the two are 3 and 2. So: two thirds of the first and one of the second.
    all_to_all      everything at once. Of two ranks, the one that posts its send later has the other's receive already and sends
                    at once; its own receive is then announced behind all that, on the same connection: between two ranks one
                    direction waits for the other. Measured against full duplex: 1.92 at 2 hosts, 1.58 at 4, 1.36 at 8: about
                    1 + 1.47 p^-0.675.

On a group of its own, whose ranks are in another order, the same code is another pattern (`order`).
"""

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from thinwire.collectives.choose.call import CollectiveCall
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.simulate import Simulated, simulate
from thinwire.collectives.price import price
from thinwire.collectives.schedules import direct, ring, rooted
from thinwire.collectives.schedules.combine import on_ranks, pipelined, then
from thinwire.collectives.schedules.schedule import Chunk, Message, Schedule
from thinwire.collectives.wire import binomial_rounds

ORDERED = ("all_reduce", "reduce", "broadcast")
"""Ops whose results do not depend on the order of ranks, so that the native collective can run on a reordered group."""

_EVEN = 2 / 3
_SEGMENT_BYTES = 1 << 20
_MOST_MESSAGES = 40_000


def simulate_native(call: CollectiveCall, order: Sequence[int] | None, costs: Costs, calls: int = 1) -> Simulated | None:
    """order: of the group that it runs on; calls: as in `simulate`. None: too many messages to go through (`closed_form_s`)."""
    p = call.p
    order = tuple(range(p)) if order is None else tuple(order)
    schedule = pattern(call.op, p, call.message_bytes, order.index(call.root))
    if schedule is None:
        return None
    found = simulate(on_ranks(schedule, order), call.message_bytes, call.routes, costs.native, calls)
    match call.op:
        case "broadcast":
            rounds_s = calls * price(call.routes, "broadcast", call.message_bytes, order, order.index(call.root))
            return _scaled(found, _EVEN + (1 - _EVEN) * rounds_s / found.seconds) if found.seconds else found
        case "all_to_all":
            return _scaled(found, 1 + 1.47 * p**-0.675)
    return found


def closed_form_s(call: CollectiveCall, order: Sequence[int] | None) -> float:
    """For groups that are too large to simulate."""
    ranks = tuple(range(call.p)) if order is None else tuple(order)
    return price(call.routes, call.op, call.message_bytes, ranks, ranks.index(call.root))


def pattern(op: str, p: int, message_bytes: int, root: int) -> Schedule | None:
    """What gloo does in rank order, as a schedule; None if it has too many messages."""
    segments = max(2, ceil(message_bytes / p / _SEGMENT_BYTES))
    if op != "broadcast" and 2 * p * p * segments > _MOST_MESSAGES:
        return None
    left, right = tuple(range(p - 1, -1, -1)), tuple(range(p))
    match op:
        case "all_reduce" | "reduce_scatter":
            return pipelined(ring.all_reduce(left), segments)
        case "all_gather":
            return pipelined(ring.all_gather(right), 2)
        case "reduce":
            return pipelined(then(ring.reduce_scatter(left), rooted.gather(rooted.star(p, root)), "gloo"), segments)
        case "broadcast":
            rounds = binomial_rounds(message_bytes, p, root)
            steps = tuple(tuple(Message(source, target, (0,)) for source, target, _ in turn) for turn in rounds)
            return Schedule(op="broadcast", p=p, root=root, chunks=(Chunk(0),), steps=steps, name="gloo")
        case _:
            return direct.all_to_all(p)


def _scaled(found: Simulated, factor: float) -> Simulated:
    return replace(
        found,
        seconds=found.seconds * factor,
        software_s=found.software_s * factor,
        wire_s=found.wire_s * factor,
        latency_s=found.latency_s * factor,
        busy=found.busy / factor,
        transfers=tuple(replace(one, began_s=one.began_s * factor, left_s=one.left_s * factor) for one in found.transfers),
    )
