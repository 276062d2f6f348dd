"""The first steps of a run as Chrome's trace events, for Perfetto: for each rank a row of what it did, and one for each axis.

Ranks note times by their host's steady clock; on the way to the wall clock of each host they get as far apart as these are.
"""

import time
from typing import Any

from thinwire.collectives.chrome import ChromeTrace
from thinwire.collectives.ledger import Ledger
from thinwire.train.step import Ran

PHASES = (
    ("forward and backward", "started", "ready"),
    ("wait for the exchange", "ready", "exchanged"),
    ("optimizer", "exchanged", "updated"),
    ("rare exchange", "updated", "synchronised"),
)


class Timeline:
    """Of one rank. From the moment it is made, `ledger` records each call, until `steps` steps have run."""

    def __init__(self, ledger: Ledger, rank: int, steps: int) -> None:
        self._ledger, self._left = ledger, steps
        self._trace = ChromeTrace(rank, {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        self._offset_s = time.time() - time.perf_counter()
        if steps:
            ledger.recorded = []

    def step(self, step: int, ran: Ran) -> None:
        """After each step; nothing after the last that counts."""
        if not self._left or ran.clock.on_device:
            return
        self._left -= 1
        for name, begin, end in PHASES:
            self._span(name, "steps", getattr(ran, begin), getattr(ran, end), {"step": step})
        if not self._left:
            self._close()

    def events(self) -> list[dict[str, Any]]:
        """All there are; for `write_trace`, with those of other ranks."""
        self._close()
        return self._trace.events

    def _close(self) -> None:
        for step, call, begin, end in self._ledger.recorded_calls():
            arguments = {"step": step, "message_bytes": call.message_bytes, "ranks": call.world_size}
            self._span(f"{call.op} {call.label}".strip(), f"axis {call.axis}", begin, end, arguments)
        self._ledger.recorded = None

    def _span(self, name: str, row: str, begin: float, end: float, arguments: dict[str, Any]) -> None:
        if end > begin:
            self._trace.add(name, "X", row, (begin + self._offset_s) * 1e6, dur=(end - begin) * 1e6, args=arguments)
