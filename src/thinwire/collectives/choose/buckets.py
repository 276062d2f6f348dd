"""Links whose rate is kept by a token bucket: what they let pass at once after a silence.

A bucket holds at most `burst` bytes and fills at the rate of its link; what passes takes out as much. So a message that finds
bytes in the buckets of all its links is that much shorter on the wire, and short messages between which a link rests take no time
there at all.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thinwire.cluster import FRAME_OVERHEAD, Link

Floats = NDArray[np.float64]


class Buckets:
    """Of all links; full at first. In payload bytes, and seconds."""

    def __init__(self, links: Sequence[Link]) -> None:
        self._most: Floats = np.array([link.burst_bytes.value / FRAME_OVERHEAD for link in links])
        self._rates: Floats = np.array([link.bandwidth_bps.value / (8 * FRAME_OVERHEAD) for link in links])
        self._filled = self._most.copy()
        self.any = bool(self._most.any())
        """Whether there is a bucket at all."""

    def rest(self, seconds: float, carried: Floats) -> None:
        """Time passes in which link i carries carried[i] bytes/s."""
        self._filled = np.minimum(self._most, self._filled + np.maximum(0.0, self._rates - carried) * seconds)

    def least(self, way: Sequence[int]) -> float:
        """What would pass at once across the links `way`."""
        return float(self._filled[list(way)].min())

    def taken(self, way: Sequence[int], size: float) -> float:
        """The same of `size` bytes that now do."""
        free = min(size, self.least(way))
        self._filled[list(way)] -= free
        return free
