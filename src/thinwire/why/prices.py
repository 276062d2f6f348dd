"""What the calls of a step would take otherwise: on another network, in another order of ranks, in codes, sent together.

What was measured and what `collectives.price` says are joined by two numbers, of which both terms of a price are multiplied:

    service  ~  a * latency term + b * busy term          least squares of (service / predicted - 1), a and b pulled towards 1

and every call keeps its own remaining error as a factor. What a call takes beyond its price where flows share a link (a round of
a ring waits for the flow that got least) goes away with the sharing. No torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy

from thinwire.cluster import Cluster, Link
from thinwire.cluster.graph import Routes
from thinwire.collectives.choose.call import collective_call
from thinwire.collectives.choose.placement import orders
from thinwire.collectives.choose.select import choose
from thinwire.collectives.price import price
from thinwire.collectives.synthesis.bounds import OPS
from thinwire.collectives.wire import flows
from thinwire.why.steps import Key, Made

PULL = 0.05
CHOSEN = 4
"""Different calls for which a schedule is looked for; the others are taken to stay as they are."""
Services = dict[Key, float]


@dataclass(frozen=True)
class Prices:
    """Of the calls of a step on `cluster`, whose ranks are those of the script."""

    cluster: Cluster
    calls: dict[Key, Made]

    @cached_property
    def routes(self) -> Routes:
        return Routes(self.cluster)

    @cached_property
    def measured(self) -> Services:
        return {key: made.service_s for key, made in self.calls.items()}

    @cached_property
    def factors(self) -> tuple[float, float]:
        """(a, b), see the top of the file."""
        known = [
            (*self._terms(self.routes, key[0], made.op, made.message_bytes), made.service_s) for key, made in self.calls.items()
        ]
        rows = [(latency / seconds, busy / seconds, 1.0) for latency, busy, seconds in known if seconds > 0]
        weight = (PULL * len(rows)) ** 0.5 if rows else 1.0
        table = numpy.array([*rows, (weight, 0.0, weight), (0.0, weight, weight)])
        found = numpy.linalg.lstsq(table[:, :2], table[:, 2], rcond=None)[0]
        return max(0.1, float(found[0])), max(0.1, float(found[1]))

    def seconds(
        self, key: Key, cluster: Cluster | None = None, order: Sequence[int] | None = None, *, busy: float = 1.0
    ) -> float:
        """Of a call on another network, with the ranks in another order, or with only so much of its busy term."""
        made = self.calls[key]
        group = key[0] if order is None else tuple(rank for rank in order if rank in key[0])
        routes = self.routes if cluster is None else Routes(cluster)
        latency_s, busy_s = self._terms(routes, group, made.op, made.message_bytes)
        seconds = self._joined(latency_s, busy * busy_s) * self._error(key)
        shared, now = _sharing(routes, group, made), _sharing(self.routes, key[0], made)
        excess = made.service_s / sum(self._terms(self.routes, key[0], made.op, made.message_bytes)) - 1 if now > 1 else 0.0
        if excess <= 0:
            return seconds
        return seconds * (1 + excess * min(1.0, (shared - 1) / (now - 1))) / (1 + excess)

    def all(self, cluster: Cluster | None = None, order: Sequence[int] | None = None, *, busy: float = 1.0) -> Services:
        """`seconds` of each call."""
        return {key: self.seconds(key, cluster, order, busy=busy) for key in self.calls}

    def sized(self, group: Sequence[int], op: str, message_bytes: float) -> float:
        """Of a call that the script does not make, by the same two factors."""
        return self._joined(*self._terms(self.routes, group, op, int(message_bytes)))

    def chosen(self) -> Services | None:
        """With the schedules that `thinwire.init` would choose for this network; None where that is gloo's own everywhere."""
        totals: dict[tuple[tuple[int, ...], str, int], float] = {}
        for (group, _), made in self.calls.items():
            if made.op in OPS and len(group) > 1 and made.message_bytes:
                kind = group, made.op, made.message_bytes
                totals[kind] = totals.get(kind, 0.0) + made.service_s
        ratios = {}
        for kind in sorted(totals, key=totals.__getitem__, reverse=True)[:CHOSEN]:
            found = choose(collective_call(self.cluster, kind[1], kind[2], kind[0]))
            if found.best.candidate.name != "native":
                ratios[kind] = min(1.0, found.best.seconds / found.native.seconds)
        if not ratios:
            return None
        return {key: made.service_s * ratios.get((key[0], made.op, made.message_bytes), 1.0) for key, made in self.calls.items()}

    def best_order(self) -> tuple[int, ...] | None:
        """The order of ranks in which the calls of the whole world take least; None where it is theirs."""
        world = tuple(range(self.cluster.world_size))
        if all(len(group) < len(world) for group, _ in self.calls):
            return None
        costs = {order: sum(self.all(order=order).values()) for order in orders(self.cluster).values()}
        best = min(costs, key=costs.__getitem__)
        return best if costs[best] < 0.95 * costs[world] else None

    def link_bytes(self) -> dict[Link, float]:
        """Payload bytes on each link in a step."""
        found: dict[Link, float] = {}
        for (group, _), made in self.calls.items():
            placed = [(group[a], group[b], size) for a, b, size in flows(made.op, made.message_bytes, len(group))]
            for link, size in self.routes.load(placed).items():
                found[link] = found.get(link, 0.0) + size
        return found

    def _joined(self, latency_s: float, busy_s: float) -> float:
        a, b = self.factors
        return a * latency_s + b * busy_s

    def _error(self, key: Key) -> float:
        made = self.calls[key]
        predicted = self._joined(*self._terms(self.routes, key[0], made.op, made.message_bytes))
        return made.service_s / predicted if predicted > 0 else 1.0

    @staticmethod
    def _terms(routes: Routes, group: Sequence[int], op: str, message_bytes: int) -> tuple[float, float]:
        latency_s = price(routes, op, 0, group)
        return latency_s, price(routes, op, message_bytes, group) - latency_s


def _sharing(routes: Routes, group: Sequence[int], made: Made) -> int:
    """How many flows of a call go through the link that is busy longest."""
    flowing = [(group[a], group[b], size) for a, b, size in flows(made.op, made.message_bytes, len(group)) if size]
    busy = routes.load(flowing)
    if not busy:
        return 1
    fullest = max(busy, key=lambda link: busy[link] / link.bandwidth_bps.value)
    return sum(fullest in routes.between(source, target) for source, target, _ in flowing)


def with_rates(cluster: Cluster, rates_bps: dict[Link, float]) -> Cluster:
    """The same network with other rates of some links."""
    links = [
        replace(link, bandwidth_bps=replace(link.bandwidth_bps, value=rates_bps.get(link, link.bandwidth_bps.value)))
        for link in cluster.links
    ]
    return replace(cluster, links=tuple(links))
