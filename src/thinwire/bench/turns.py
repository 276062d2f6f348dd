"""Contenders that take turns in one run, so that a machine whose speed drifts is fair to all.

All contenders' ranks are started at once. A number in a file is whose turn it is; while it is not theirs, the ranks of a
contender wait in a barrier of their own group, and its rank 0 looks at the file. This module is imported by peers that must not
import the rest of thinwire, so it uses the standard library only, and can be loaded by its path.
"""

import os
import time
from pathlib import Path

POLL_S = 0.01
TIMEOUT_S = 600.0


class Turns:
    """One per rank. index: which contender this is, of `contenders`; barrier: of the contender's own ranks."""

    def __init__(self, folder, index, contenders, rank, barrier):
        self.file = Path(folder) / "turn"
        self.index, self.contenders, self.rank, self.barrier = index, contenders, rank, barrier
        self.taken = 0

    def begin(self):
        """Wait for this contender's next turn. Every rank calls."""
        mine = self.taken * self.contenders + self.index
        started = time.monotonic()
        while self.rank == 0 and self._now() < mine:
            if time.monotonic() - started > TIMEOUT_S:
                raise TimeoutError(f"turn {mine} did not come in {TIMEOUT_S:.0f} s; another contender has failed")
            time.sleep(POLL_S)
        self.barrier()

    def end(self):
        """Hand over. Every rank calls."""
        self.barrier()
        self.taken += 1
        if self.rank == 0:
            aside = self.file.with_suffix(".tmp")
            aside.write_text(str(self._now() + 1))
            os.replace(aside, self.file)

    def _now(self):
        return int(self.file.read_text()) if self.file.exists() else 0
