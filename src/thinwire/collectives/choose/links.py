"""How messages share links: max-min fair rates; and what a token bucket lets pass at once.

Every active connection has a route, a set of links. All rates grow together; when a link is full, the connections across it keep
their rate and the others go on (progressive filling). No connection can then get more without one that has no more losing some,
which is what TCP flows of equal age tend to. (Bertsekas and Gallager, Data networks, 1992, 6.5.2.)

What arrives is acknowledged, on the links of the route back: those have so much less for data of their own. (Rates are found
without that first, then with what they cause.)

A bucket holds at most `burst` bytes and fills at the rate of its link; what passes takes out as much. So a message that finds
bytes in the buckets of all its links is that much shorter on the wire, and short messages between which a link rests take no time
there at all.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thinwire.cluster import FRAME_OVERHEAD, Link

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

_TIE = 1 + 1e-12


class Sharing:
    """Rates of connections over links of given capacities; what was asked once is remembered."""

    def __init__(
        self,
        routes: Sequence[Sequence[int]],
        capacity: Sequence[float],
        back: Sequence[Sequence[int]] = (),
        acknowledged: float = 0.0,
    ) -> None:
        """routes[c]: numbers of the links that connection c crosses, one or more; capacity in bytes/s. back[c]: of the route
        back, on which there are `acknowledged` bytes for each byte of data."""
        self._links, self._acknowledged = len(capacity), acknowledged
        self._routes = self._padded(routes)
        self._back = self._padded(back)
        self._capacity = np.array([*capacity, np.inf])
        self._known: dict[bytes, tuple[Floats, Floats]] = {}

    def rates(self, active: Numbers) -> tuple[Floats, Floats]:
        """Bytes/s of each of the connections `active` (ascending); and on each link, what is acknowledged included."""
        key = active.tobytes()
        found = self._known.get(key)
        if found is None:
            rates = self._filled(self._routes[active], self._capacity)
            if self._acknowledged:
                rates = self._filled(self._routes[active], self._capacity - self._taken_back(active, rates))
            carried = self._across(self._routes[active], rates) + self._taken_back(active, rates)
            found = self._known[key] = rates, carried[: self._links]
        return found

    def _taken_back(self, active: Numbers, rates: Floats) -> Floats:
        if not self._acknowledged:
            return np.zeros(self._links + 1)
        return self._acknowledged * self._across(self._back[active], rates)

    def _across(self, routes: Numbers, rates: Floats) -> Floats:
        weights = np.repeat(rates, routes.shape[1])
        return np.bincount(routes.ravel(), weights=weights, minlength=self._links + 1).astype(np.float64, copy=False)

    def _padded(self, routes: Sequence[Sequence[int]]) -> Numbers:
        """Routes as rows of equal length; short ones end with a link that is never full."""
        padded = np.full((len(routes), max(map(len, routes), default=0)), self._links, dtype=np.int64)
        for number, route in enumerate(routes):
            padded[number, : len(route)] = route
        return padded

    def _filled(self, routes: Numbers, capacity: Floats) -> Floats:
        rates = np.zeros(len(routes))
        left = capacity.copy()
        growing = np.arange(len(routes))
        while len(growing):
            flows = np.bincount(routes[growing].ravel(), minlength=self._links + 1)
            share = np.divide(left, flows, out=np.full_like(left, np.inf), where=flows > 0)
            level = float(share.min())
            full = (share <= level * _TIE)[routes[growing]].any(1)
            done = growing[full]
            rates[done] = level
            left -= level * np.bincount(routes[done].ravel(), minlength=self._links + 1)
            growing = growing[~full]
        return rates


def payload_burst(link: Link) -> float:
    """Payload bytes in the full bucket of `link`; 0 if it has none."""
    return link.burst_bytes.value / FRAME_OVERHEAD


class Buckets:
    """Of all links; full at first. In payload bytes, a second for `capacity`. Where there is none, asking costs nothing."""

    def __init__(self, links: Sequence[Link], capacity: Sequence[float]) -> None:
        self._most: Floats = np.array([payload_burst(link) for link in links])
        self._rates: Floats = np.array(capacity)
        self._filled = self._most.copy()
        self._any = bool(self._most.any())

    def rest(self, seconds: float, carried: Floats) -> None:
        """Time passes in which link i carries carried[i] bytes/s."""
        if self._any:
            self._filled = np.minimum(self._most, self._filled + np.maximum(0.0, self._rates - carried) * seconds)

    def passing(self, route: Sequence[int], size: float) -> float:
        """What of `size` bytes would pass at once across the links `route`."""
        return min(size, float(self._filled[list(route)].min())) if self._any else 0.0

    def taken(self, route: Sequence[int], size: float) -> float:
        """The same, and it does."""
        free = self.passing(route, size)
        if free:
            self._filled[list(route)] -= free
        return free
