"""Links whose rate is kept by a token bucket: what they let pass at once after a silence.

A bucket holds at most `burst` bytes and fills at the rate of its link; what passes takes out as much. So a message that finds
bytes in the buckets of all its links is that much shorter on the wire, and short messages between which a link rests take no time
there at all.
"""

from collections.abc import Sequence

import numpy as np

from thinwire.cluster import FRAME_OVERHEAD, Link
from thinwire.collectives.choose.fair_share import Floats


def payload_burst(link: Link) -> float:
    """Payload bytes in the full bucket of `link`; 0 if it has none."""
    return link.burst_bytes.value / FRAME_OVERHEAD


class Buckets:
    """Of all links; full at first. In payload bytes, and seconds. Where there is none, asking costs nothing."""

    def __init__(self, links: Sequence[Link], capacity: Sequence[float]) -> None:
        """capacity: of each link, in payload bytes/s."""
        self._most: Floats = np.array([payload_burst(link) for link in links])
        self._rates: Floats = np.array(capacity)
        self._filled = self._most.copy()
        self._any = bool(self._most.any())

    def rest(self, seconds: float, carried: Floats) -> None:
        """Time passes in which link i carries carried[i] bytes/s."""
        if self._any:
            self._filled = np.minimum(self._most, self._filled + np.maximum(0.0, self._rates - carried) * seconds)

    def passing(self, way: Sequence[int], size: float) -> float:
        """What of `size` bytes would pass at once across the links `way`."""
        return min(size, float(self._filled[list(way)].min())) if self._any else 0.0

    def taken(self, way: Sequence[int], size: float) -> float:
        """The same, and it does."""
        free = self.passing(way, size)
        if free:
            self._filled[list(way)] -= free
        return free
