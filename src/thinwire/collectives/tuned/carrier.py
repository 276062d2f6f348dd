"""Predictions for groups whose collectives were chosen: bytes and seconds of the implementations that they decided upon."""

from collections.abc import Sequence
from functools import cache

from thinwire.cluster import Cluster
from thinwire.cluster.graph import Routes
from thinwire.collectives.choose.call import CollectiveCall, collective_call
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.native import closed_form_s, simulate_native
from thinwire.collectives.choose.simulate import simulate
from thinwire.collectives.price import Carrier
from thinwire.collectives.schedules import ops
from thinwire.collectives.tuned.implementation import NATIVE, Implementation
from thinwire.collectives.tuned.tuner import Tuner, size_class
from thinwire.collectives.wire import Flow, flows
from thinwire.traffic import Transfer


class Chosen(Carrier):
    """What the groups of this process have decided so far; gloo's own for the rest.

    Of a group that this rank is not in, it takes what a group of as many ranks has decided.
    """

    def __init__(self, tuner: Tuner, cluster: Cluster) -> None:
        self._tuner, self._cluster = tuner, cluster
        self._simulated_s = cache(self._simulate)

    def flows(self, transfer: Transfer, group: Sequence[int]) -> tuple[Flow, ...]:
        op, message_bytes, p = transfer.op, transfer.message_bytes, len(group)
        chosen = self._implementation(transfer, tuple(group))
        if chosen.schedule is not None:
            return chosen.schedule.flows(ops.block_sizes(op, p, message_bytes // transfer.item_bytes), transfer.item_bytes)
        if chosen.order is not None:
            own = flows(op, message_bytes, p, chosen.order.index(0))
            return tuple((chosen.order[source], chosen.order[target], size) for source, target, size in own)
        return super().flows(transfer, group)

    def seconds(self, routes: Routes, transfer: Transfer, group: Sequence[int]) -> float:
        chosen = self._implementation(transfer, tuple(group))
        if chosen.native:
            return super().seconds(routes, transfer, group)
        return self._simulated_s(chosen, transfer.op, transfer.message_bytes, tuple(group))

    def about(self) -> str:
        names = sorted({f"{op} by {one.name}" for (_, op, _, _), one in self._tuner.chosen.items() if not one.native})
        return f"collectives: {', '.join(names)}; for the rest gloo's own" if names else super().about()

    def _implementation(self, transfer: Transfer, group: tuple[int, ...]) -> Implementation:
        chosen, call = self._tuner.chosen, (transfer.op, size_class(transfer.message_bytes), 0)
        alike = (one for (ranks, *other), one in chosen.items() if len(ranks) == len(group) and tuple(other) == call)
        return chosen.get((group, *call)) or next(alike, NATIVE)

    def _simulate(self, chosen: Implementation, op: str, message_bytes: int, group: tuple[int, ...]) -> float:
        return predicted_s(chosen, collective_call(self._cluster, op, message_bytes, group), self._tuner.costs)


def predicted_s(implementation: Implementation, call: CollectiveCall, costs: Costs, calls: int = 1) -> float:
    """Seconds of one of `calls` back to back."""
    if implementation.schedule is not None:
        return simulate(implementation.schedule, call.message_bytes, call.routes, costs, calls).seconds / calls
    run = simulate_native(call, implementation.order, costs, calls)
    return run.seconds / calls if run else closed_form_s(call, implementation.order)
