"""Predictions for groups whose collectives were chosen: bytes and seconds of the ways that they decided upon."""

from collections.abc import Sequence
from functools import lru_cache

from thinwire.cluster import Cluster
from thinwire.cluster.graph import Routes
from thinwire.collectives.carrier import Native
from thinwire.collectives.choose.call import CollectiveCall, collective_call
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.native import closed_form_s, simulate_native
from thinwire.collectives.choose.simulate import simulate
from thinwire.collectives.schedules import ops
from thinwire.collectives.tuned.tuner import Tuner, size_class
from thinwire.collectives.tuned.way import NATIVE, Way
from thinwire.collectives.wire import Flow, flows
from thinwire.traffic import Transfer


class Chosen:
    """A `carrier.Carrier`: what the groups of this process have decided so far; gloo's own for the rest.

    Of a group that this rank is not in, it takes what a group of as many ranks has decided.
    """

    def __init__(self, tuner: Tuner, cluster: Cluster) -> None:
        self._tuner, self._cluster, self._native = tuner, cluster, Native()
        self._seconds = lru_cache(maxsize=None)(self._simulated)

    def flows(self, transfer: Transfer, group: Sequence[int]) -> tuple[Flow, ...]:
        op, message_bytes, p = transfer.op, transfer.message_bytes, len(group)
        way = self._way(op, message_bytes, tuple(group))
        if way.schedule is not None:
            return way.schedule.flows(ops.block_sizes(op, p, message_bytes // transfer.item_bytes), transfer.item_bytes)
        if way.order is not None:
            own = flows(op, message_bytes, p, way.order.index(0))
            return tuple((way.order[source], way.order[target], size) for source, target, size in own)
        return self._native.flows(transfer, group)

    def seconds(self, routes: Routes, transfer: Transfer, group: Sequence[int]) -> float:
        way = self._way(transfer.op, transfer.message_bytes, tuple(group))
        if way.native:
            return self._native.seconds(routes, transfer, group)
        return self._seconds(way, transfer.op, transfer.message_bytes, tuple(group))

    def about(self) -> str:
        names = sorted({f"{op} by {way.name}" for (_, op, _, _), way in self._tuner.chosen.items() if not way.native})
        return f"collectives: {', '.join(names)}; for the rest gloo's own" if names else self._native.about()

    def _way(self, op: str, message_bytes: int, group: tuple[int, ...]) -> Way:
        size, chosen = size_class(message_bytes), self._tuner.chosen
        alike = (way for (ranks, *what), way in chosen.items() if len(ranks) == len(group) and what == [op, size, 0])
        return chosen.get((group, op, size, 0)) or next(alike, NATIVE)

    def _simulated(self, way: Way, op: str, message_bytes: int, group: tuple[int, ...]) -> float:
        return predicted_s(way, collective_call(self._cluster, op, message_bytes, group), self._tuner.costs)


def predicted_s(way: Way, call: CollectiveCall, costs: Costs, calls: int = 1) -> float:
    """Seconds of one of `calls` back to back."""
    if way.schedule is not None:
        return simulate(way.schedule, call.message_bytes, call.routes, costs, calls).seconds / calls
    run = simulate_native(call, way.order, costs, calls)
    return run.seconds / calls if run else closed_form_s(call, way.order)
