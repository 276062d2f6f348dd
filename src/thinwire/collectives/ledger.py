"""The ledger: what was really sent. Whoever issues a collective writes it; it knows nothing of predictions.

Calls are summed by (label, axis, op, message bytes); two snapshots subtract, so any stretch of a run can be read.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from thinwire.collectives.wire import sent_bytes

SETUP_STEP = -1
"""The step under which calls before the first training step are entered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What makes calls alike."""

    label: str
    axis: str
    op: str
    world_size: int
    message_bytes: int


@dataclass(slots=True)
class Total:
    """Sums over alike calls of this rank. seconds: from issuing to completion, as the caller could see it."""

    calls: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0
    first_step: int = SETUP_STEP
    last_step: int = SETUP_STEP


Snapshot = dict[Call, Total]


@dataclass
class Ledger:
    """One per rank. `step` is set by the training loop; `axes` names process groups by mesh axis."""

    step: int = SETUP_STEP
    axes: dict[str, str] = field(default_factory=dict)
    sent_bytes: int = 0
    _totals: Snapshot = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)

    @contextmanager
    def label(self, label: str) -> Iterator[None]:
        """Calls that this thread issues inside are entered under `label`. Threads do not inherit it: whoever issues, labels."""
        before = getattr(self._local, "label", "")
        self._local.label = label
        try:
            yield
        finally:
            self._local.label = before

    def enter(self, op: str, message_bytes: int, group: "Group", root: int = 0, wire_bytes: int | None = None) -> Total:
        """Enter one call at the moment it is issued. Returns the running total, to which `completed` adds the seconds.

        wire_bytes: payload bytes that this rank sends, if it is not by the backend's own algorithm.
        """
        call = Call(
            label=getattr(self._local, "label", ""),
            axis=self.axes.get(group.name, group.axis),
            op=op,
            world_size=group.size,
            message_bytes=message_bytes,
        )
        if wire_bytes is None:
            wire_bytes = sent_bytes(op, message_bytes, group.size, group.rank, root)
        with self._lock:
            total = self._totals.get(call)
            if total is None:
                total = self._totals[call] = Total(first_step=self.step)
            total.calls += 1
            total.wire_bytes += wire_bytes
            total.last_step = self.step
            self.sent_bytes += wire_bytes
        return total

    def completed(self, total: Total, issued: float, _future: Any = None) -> None:
        """Add the time since `issued` (time.perf_counter) to `total`; a callback of futures too."""
        seconds = time.perf_counter() - issued
        with self._lock:
            total.seconds += seconds

    def snapshot(self) -> Snapshot:
        """A copy of all totals so far."""
        with self._lock:
            return {call: replace(total) for call, total in self._totals.items()}

    def entries(self, rank: int) -> list[dict[str, Any]]:
        """All totals as flat rows for the run folder."""
        return [{"rank": rank, **asdict(call), **asdict(total)} for call, total in self.snapshot().items()]


@dataclass(frozen=True, slots=True)
class Group:
    """The group of ranks in which a call is made, as the ledger needs it. axis: used where the ledger knows no better."""

    name: str
    rank: int
    size: int
    axis: str = "world"


def axis_of(description: str) -> str:
    """The mesh axis of a group that a DeviceMesh has made and described; "world" for any other."""
    return description.removeprefix("mesh_") if description.startswith("mesh_") else "world"


def difference(after: Snapshot, before: Snapshot) -> Snapshot:
    """What was entered between two snapshots; calls without any are left out."""
    result = {}
    for call, total in after.items():
        old = before.get(call, Total())
        if total.calls > old.calls:
            result[call] = replace(
                total,
                calls=total.calls - old.calls,
                wire_bytes=total.wire_bytes - old.wire_bytes,
                seconds=total.seconds - old.seconds,
            )
    return result
