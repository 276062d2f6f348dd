"""Events for chrome://tracing and Perfetto: rows of named spans, in the JSON that both read.

The form is Chrome's Trace Event Format: "X" is a span (ts and dur, in microseconds), "B" and "E" its begin and end, "b" and "e"
those of spans that may overlap, "i" a moment, "M" a name; pid is a group of rows (here a rank), tid a row.
"""

import json
from pathlib import Path
from typing import Any


class ChromeTrace:
    """Collects events of one process; a row gets its number, and its name in the trace, when it is first named."""

    def __init__(self, pid: int = 0, begun: dict[str, Any] | None = None) -> None:
        self.pid, self._rows = pid, dict[str, int]()
        self.events: list[dict[str, Any]] = [begun] if begun else []

    def add(self, name: str, phase: str, row: str, ts_us: float, **more: Any) -> dict[str, Any]:
        """One event, which is returned."""
        if row not in self._rows:
            self._rows[row] = len(self._rows) + 1
            self._append("thread_name", "M", self._rows[row], ts_us, args={"name": row})
        return self._append(name, phase, self._rows[row], ts_us, **{"args": {}} | more)

    def _append(self, name: str, phase: str, tid: int, ts_us: float, **more: Any) -> dict[str, Any]:
        event = {"name": name, "ph": phase, "pid": self.pid, "tid": tid, "ts": ts_us} | more
        self.events.append(event)
        return event


def write_trace(path: Path, events: list[dict[str, Any]]) -> None:
    """One file of all."""
    path.write_text(json.dumps(events), encoding="utf-8")
