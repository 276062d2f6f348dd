"""Messages on their way over the links of a cluster, event by event: for simulations that say when a message is handed over.

    connection   messages of one (source, target) pair travel one after the other, in the order in which they were posted
    link         connections share it max-min fairly (`links`); payload passes at bandwidth / FRAME_OVERHEAD, but for what its
                 bucket lets pass at once

What happens within SAME_S seconds happens at once. A simulation goes from event to event: it takes the sooner of `soonest` and
its own next one for `now`, asks who has `left`, does what happens at `now`, posts, and ends with `settle`.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Generic, TypeVar

import numpy as np

from thinwire.cluster import FRAME_OVERHEAD, Link
from thinwire.cluster.graph import Routes
from thinwire.collectives.choose.links import Buckets, Sharing

SAME_S = 1e-9


@dataclass(slots=True)
class Message:
    """began: when its turn came on the connection; left: when its last byte had left. inf until known."""

    size: int
    began: float = inf
    left: float = inf


M = TypeVar("M", bound=Message)


class Wires(Generic[M]):
    """soonest: when the next message leaves, as things stand. carried: payload bytes that were posted, by link."""

    def __init__(self, pairs: Iterable[tuple[int, int]], routes: Routes, acknowledged: float) -> None:
        """pairs: (source, target) ranks that may send; those on one node, without a link between, have no connection."""
        numbers: dict[Link, int] = {}

        def numbered(route: Sequence[Link]) -> list[int]:
            return [numbers.setdefault(link, len(numbers)) for link in route]

        self._pairs: dict[tuple[int, int], int] = {}
        self._latency_s: list[float] = []
        self._routes: list[list[int]] = []
        back: list[list[int]] = []
        for source, target in pairs:
            if (source, target) not in self._pairs and (route := routes.between(source, target)):
                self._pairs[source, target] = len(self._routes)
                self._routes.append(numbered(route))
                back.append(numbered(routes.between(target, source)))
                self._latency_s.append(sum(link.latency_s.value for link in route))
        self.links = tuple(numbers)
        self.capacity = [link.bandwidth_bps.value / (8 * FRAME_OVERHEAD) for link in self.links]
        self.carried = [0] * len(self.links)
        self._sharing = Sharing(self._routes, self.capacity, back, acknowledged)
        self._buckets = Buckets(self.links, self.capacity)
        self._queues: list[deque[M]] = [deque() for _ in self._routes]  # [0] is on the wire
        self._left = np.zeros(len(self._routes))
        self._advanced = 0.0  # when `_left` was true
        self._changed = False
        self._started: list[tuple[int, M]] = []
        self._active: set[int] = set()
        self._now_active = np.empty(0, dtype=np.int64)
        self._rates, self._now_carried = self._sharing.rates(self._now_active)
        self.soonest = inf

    @property
    def busy(self) -> bool:
        """Whether a message is under way."""
        return bool(self._active)

    def connection(self, source: int, target: int) -> int | None:
        """None on one node."""
        return self._pairs.get((source, target))

    def latency_s(self, connection: int) -> float:
        """Along its route."""
        return self._latency_s[connection]

    def passing(self, connection: int, size: int) -> float:
        """What of `size` bytes would pass at once, were it posted now."""
        return self._buckets.passing(self._routes[connection], size)

    def post(self, connection: int, message: M, now: float) -> M | None:
        """Handed over; the message before it in the queue of the connection, if there is one."""
        for link in self._routes[connection]:
            self.carried[link] += message.size
        queue = self._queues[connection]
        queue.append(message)
        if len(queue) > 1:
            return queue[-2]
        self._active.add(connection)
        self._start(connection, now)
        self._changed = True
        return None

    def left(self, now: float) -> Iterator[tuple[int, M]]:
        """(connection, message) of those whose last byte leaves at `now`; the next ones in their queues have begun."""
        if self.soonest > now + SAME_S:
            return
        self._advance(now)
        for connection in self._now_active[self._left[self._now_active] <= self._rates * SAME_S].tolist():
            queue = self._queues[connection]
            message = queue.popleft()
            message.left = now
            if queue:
                self._start(connection, now)
            else:
                self._active.remove(connection)
                self._changed = True
            yield connection, message

    def settle(self, now: float) -> None:
        """All that happens at `now` has happened."""
        if not (self._changed or self._started):
            return
        self._advance(now)
        for connection, message in self._started:
            self._left[connection] = message.size - self._buckets.taken(self._routes[connection], message.size)
        self._started.clear()
        if self._changed:
            self._changed = False
            self._now_active = np.array(sorted(self._active), dtype=np.int64)
            self._rates, self._now_carried = self._sharing.rates(self._now_active)
        active = self._now_active
        self.soonest = now + float((self._left[active] / self._rates).min()) if len(active) else inf

    def _start(self, connection: int, now: float) -> None:
        message = self._queues[connection][0]
        message.began = now
        self._started.append((connection, message))

    def _advance(self, now: float) -> None:
        self._left[self._now_active] -= self._rates * (now - self._advanced)
        self._buckets.rest(now - self._advanced, self._now_carried)
        self._advanced = now
