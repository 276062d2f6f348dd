"""What rank 0 saw, for chrome://tracing or Perfetto: of each tensor when ranks asked for it, and when it was run.

NEGOTIATE_ALLREDUCE    from the first rank that asked until it was announced; a tick for each rank
ALLREDUCE              from there until its results were there
CYCLE_START            an announcement, where those are asked for
"""

import threading
import time
from pathlib import Path
from typing import Any

from thinwire.adapters.horovod.controller import Announcement
from thinwire.adapters.horovod.request import Request
from thinwire.collectives.chrome import ChromeTrace, write_trace


class Timeline:
    """Of one process; begins with `start`. Only rank 0 writes."""

    def __init__(self, writes: bool) -> None:
        self._writes, self._path, self._cycles = writes, "", False
        self._lock = threading.Lock()
        self._trace = ChromeTrace()

    def start(self, path: str, cycles: bool) -> None:
        """Into the file `path`, when it ends; cycles: with CYCLE_START."""
        if not self._writes:
            return
        self.stop()
        with self._lock:
            self._path, self._cycles = path, cycles
            begun = {"start_time_since_epoch_in_micros": int(time.time() * 1e6)}
            self._trace = ChromeTrace(begun={"name": "start", "ph": "M", "pid": 0, "args": begun})

    def stop(self) -> None:
        """Write what there is, and end."""
        with self._lock:
            if self._path:
                write_trace(Path(self._path), self._trace.events)
            self._path = ""

    def asked(self, request: Request, rank: int) -> None:
        """A rank's request has come."""
        if not self._path:
            return
        name = f"{request.kind}.{request.name}"
        phase = f"NEGOTIATE_{request.kind.upper()}"
        with self._lock:
            self._add(phase, "b", name)
            self._add(f"{rank}", "i", name, {"rank": rank})

    def begun(self, announcement: Announcement) -> None:
        """It is run now."""
        self._mark(announcement, "B")

    def ended(self, announcement: Announcement) -> None:
        """Its results are there, or on their way from codes."""
        self._mark(announcement, "E")

    def _mark(self, announcement: Announcement, phase: str) -> None:
        if not self._path:
            return
        with self._lock:
            if self._cycles and phase == "B":
                self._trace.events.append({"name": "CYCLE_START", "ph": "i", "s": "g", "pid": 0, "tid": 0, "ts": _now_us()})
            for part in announcement.parts:
                kind, name = part.request.kind, f"{part.request.kind}.{part.request.name}"
                if phase == "B":
                    self._add(f"NEGOTIATE_{kind.upper()}", "e", name)
                self._add(kind.upper(), phase, name, {"bytes": part.request.message_bytes})

    def _add(self, name: str, phase: str, row: str, arguments: dict[str, Any] | None = None) -> None:
        event = self._trace.add(name, phase, row, _now_us(), args=arguments or {})
        if phase in "be":  # several ranks ask for one tensor
            event |= {"cat": "negotiation", "id": event["tid"]}


def _now_us() -> float:
    return time.monotonic_ns() / 1000
