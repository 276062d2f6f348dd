"""How messages share links: max-min fair rates.

Every active connection has a route, a set of links. All rates grow together; when a link is full, the connections across it keep
their rate and the others go on (progressive filling). No connection can then get more without one that has no more losing some,
which is what TCP flows of equal age tend to. (Bertsekas and Gallager, Data networks, 1992, 6.5.2.)
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]

_TIE = 1 + 1e-12


class Sharing:
    """Rates of connections over links of given capacities; what was asked once is remembered."""

    def __init__(self, routes: Sequence[Sequence[int]], capacity: Sequence[float]) -> None:
        """routes[c]: numbers of the links that connection c crosses, one or more; capacity in bytes/s."""
        self._links = len(capacity)
        longest = max((len(route) for route in routes), default=0)
        # Short routes are filled up with a link that is never full.
        self._routes = np.full((len(routes), longest), self._links, dtype=np.int64)
        for number, route in enumerate(routes):
            self._routes[number, : len(route)] = route
        self._capacity = np.array([*capacity, np.inf])
        self._known: dict[bytes, Floats] = {}

    def rates(self, active: Numbers) -> Floats:
        """Bytes/s of each of the connections `active` (ascending)."""
        key = active.tobytes()
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._filled(self._routes[active])
        return found

    def _filled(self, routes: Numbers) -> Floats:
        rates = np.zeros(len(routes))
        left = self._capacity.copy()
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
